"""The inputs of ``data.py``: conversations of English words, and images with the noise of photographs."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from lengths import draw_turns
from PIL import Image

TOKENS_PER_WORD = 1.9
"""LLaMA's tokenizer, on the sentences below with their punctuation."""
RARE, RARE_SHARE = 20_000, 0.2
"""Number of additional words, of which the n-th is 1/n as frequent as the first, and their share of all words. As in
natural text, a cache helps with some words only."""
_SYLLABLES = "ba re ti con der ing mo la ven sta per qui tor ness lo pri cha ment fe gu"
_WORDS = (
    "the a of in on and with is are to there this that which by at from two three several another people man woman"
    " group person street table building sign letters reads displayed restaurant entrance background foreground image"
    " scene standing sitting holding wearing visible possibly suggests appears located positioned surrounding"
    " colorful wooden vintage umbrella traffic bicycle refrigerator skateboard atmosphere enjoying preparing"
    " photograph advertisement characteristic conversation environment 24 1998 STOP OPEN"
)
WORDS = _WORDS.split()
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 640))
"""Sizes of the images in pixels, in turn: those common in COCO."""


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Return records with an image each, of the length of LLaVA-Instruct's."""
    draw = Random(seed)
    syllables = _SYLLABLES.split()
    rare = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(RARE)]
    weights = list(accumulate(1 / (number + 1) for number in range(RARE)))
    records = []
    for number, pairs in enumerate(draw_turns("stage2", count, seed)):
        turns = []
        for first, (question, answer) in enumerate(pairs):
            asked = _sentences(draw, question, "?", rare, weights)
            value = asked if first else draw.choice((f"<image>\n{asked}", f"{asked}\n<image>"))
            answered = _sentences(draw, answer, ".", rare, weights)
            turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answered}]
        records.append({"id": f"{number:09d}", "image": f"{number:012d}.jpg", "conversations": turns})
    return records


def _sentences(draw: Random, tokens: int, stop: str, rare: list[str], weights: list[float]) -> str:
    words = draw.choices(WORDS, k=max(2, round(tokens / TOKENS_PER_WORD)))
    unusual = draw.choices(rare, cum_weights=weights, k=len(words))
    words = [other if draw.random() < RARE_SHARE else word for word, other in zip(words, unusual, strict=True)]
    for start in range(0, len(words), 14):
        words[start] = words[start].capitalize()
        end = min(start + 13, len(words) - 1)
        words[end] += stop if end == len(words) - 1 else "."
    if len(words) > 20:
        words[7] += ","
        words[19] += ".\n\n"
    return " ".join(words).replace("\n ", "\n")


def write_images(folder: Path, count: int, seed: int) -> list[Path]:
    """Write JPEGs of COCO's sizes with about COCO's number of bytes, smooth shapes with noise; return their paths."""
    draw = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        shapes = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        soft = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = soft + draw.normal(0, 8, soft.shape).astype(np.float32)
        paths.append(folder / f"{number:012d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths
