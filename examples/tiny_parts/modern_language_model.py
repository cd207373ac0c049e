"""Train the tiny modern language model, a Qwen 2: grouped queries, tied embeddings, spare rows, ChatML.

It learns what the other one does, in less time: only the quickstart's characters and layouts, without a system prompt,
and with tied embeddings, so that a cell has the embedding of the token that it is to be copied to.
"""

import string
from pathlib import Path
from random import Random

import torch
from byte_level_tokenizer import make_byte_level_tokenizer
from grid import BLANK, SIDE
from language_model import (
    EMBEDDING_STD,
    HEADS,
    HIDDEN,
    MLP,
    PageEmbedder,
    Sample,
    all_questions,
    encode_pairs,
    learn,
    page_cells,
    random_layout,
    start_looking_back,
)
from pages import SIGLIP_EYE
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, SiglipImageProcessorPil

from llavar_peft.constants import IMAGE_PLACEHOLDER, OCR_INSTRUCTIONS
from llavar_peft.datagen.synth.plain_style import LARGEST, draw_layout
from llavar_peft.datagen.synth.synth_settings import KINDS
from llavar_peft.models.language_model_loading import add_placeholder
from llavar_peft.models.processing_llavar import LlavarProcessor

LAYERS = 3
BLANK_PIECE, SPACE = "Ā", "Ġ"
"""The tokens of the bytes 0x00, which no text contains, and 0x20."""
ROWS = 64
"""The number of embedding rows is a multiple of this, so that some are spare."""


def draw_sample(
    processor: LlavarProcessor, rng: Random, *, random_words: float, repeats: float, cropped: bool
) -> Sample:
    """Draw a conversation about a page, encoded as a training record is.

    Args:
        processor: With the chat template.
        rng: Of every choice.
        random_words: Share of pages with random words at random positions.
        repeats: Share of these words that have few distinct letters.
        cropped: Whether the empty rows above and below the text are left out, which takes half the time.
    """
    if rng.random() < random_words:
        cells, transcript = random_layout(rng, repeats, alphabet=string.ascii_uppercase + string.digits)
        pairs = [
            (rng.choice((*OCR_INSTRUCTIONS, "What does the sign say?", "Which words are on the sign?")), transcript)
        ]
    else:
        layout = draw_layout(rng.choice(KINDS["plain"]), rng, longest=320, largest=LARGEST)
        cells = page_cells(layout.lines, layout.width, layout.height, rng)
        pairs = [*layout.questions, (rng.choice(OCR_INSTRUCTIONS), " ".join(line.text for line in layout.lines))]
        rng.shuffle(pairs)
    ids, labels = encode_pairs(pairs, processor, rng)
    start = ids.index(processor.image_token_id)
    return crop((ids, labels, start, cells)) if cropped else (ids, labels, start, cells)


def crop(sample: Sample) -> Sample:
    """Leave out a page's empty rows above and below the text."""
    ids, labels, start, (classes, shares) = sample
    filled = [n // SIDE for n, kind in enumerate(classes) if kind != BLANK]
    first, end = min(filled) * SIDE, (max(filled) + 1) * SIDE
    left_out = slice(start, start + len(classes) - (end - first))
    del ids[left_out], labels[left_out]
    return ids, labels, start, (classes[first:end], shares[first:end])


def new_model(tokens: int) -> Qwen2ForCausalLM:
    """Return a model with random weights whose first layer looks back."""
    config = Qwen2Config(
        vocab_size=-(-(tokens + 1) // ROWS) * ROWS, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=2048, rms_norm_eps=1e-6,
        initializer_range=HIDDEN**-0.5 * 0.6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    nn.init.constant_(model.model.norm.weight, 0.3)  # the head is as large as the embeddings
    start_looking_back(model)
    return model


def make_modern_language_model(directory: Path, *, steps: tuple[int, int], batch: int, rate: float, seed: int) -> None:
    """Train tokenizer and model and write them as one Hugging Face folder.

    Args:
        directory: The folder.
        steps: Optimizer steps of the first lesson, which starts from random initialization, and of the second. The
            first quarter of the first has mostly random words, which teach to copy, and the pages of all but its last
            15 % are cropped. The second has whole pages, mostly in the quickstart's layouts.
        batch: Conversations per step.
        rate: Peak learning rate.
        seed: Of every random draw.
    """
    torch.manual_seed(seed)
    tokenizer = make_byte_level_tokenizer(directory, all_questions())
    model = new_model(len(tokenizer))
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    add_placeholder(tokenizer)
    size = {"height": SIGLIP_EYE.pixels, "width": SIGLIP_EYE.pixels}
    processor = LlavarProcessor(
        SiglipImageProcessorPil(size=size), tokenizer, patch_size=SIGLIP_EYE.cell, use_im_start_end=False,
        template="chat", image_token=IMAGE_PLACEHOLDER,
    )  # fmt: skip
    assert processor.num_image_tokens == SIDE * SIDE

    def first(step: int) -> list[Sample]:
        rngs = [Random(f"modern/{seed}/{step * batch + n}") for n in range(batch)]
        words, cropped = 0.8 if step < 0.25 * steps[0] else 0.25, step < 0.85 * steps[0]
        return [draw_sample(processor, rng, random_words=words, repeats=0.25, cropped=cropped) for rng in rngs]

    def second(step: int) -> list[Sample]:
        rngs = [Random(f"modern second/{seed}/{step * batch + n}") for n in range(batch)]
        return [draw_sample(processor, rng, random_words=0.15, repeats=0.4, cropped=False) for rng in rngs]

    embed = PageEmbedder(model, tokenizer, seed, space=SPACE, blank=BLANK_PIECE, border=False)
    learn(model, embed, first, steps=steps[0], rate=rate)
    model.half().float()
    embed = PageEmbedder(model, tokenizer, seed + 1, space=SPACE, blank=BLANK_PIECE, border=False)
    learn(model, embed, second, steps=steps[1], rate=rate / 2)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.half().save_pretrained(directory)
