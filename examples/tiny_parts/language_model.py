"""Train the tiny language model on the conversation template, on writing words, and on reading pages of characters.

In place of image features, it gets a page as a grid of cells with the embeddings of the page's characters, like a sign
or a receipt drawn in plain text. It is never trained on pixels. The tokens `<im_start>` and `<im_end>` do not exist
yet; they are represented by the mean of all embeddings, with which new rows are initialized.
"""

import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TypeAlias

import torch
from grid import BLANK, CHARACTERS, SIDE, Cells, Line, centres, fill_cells
from optimizers import make_optimizers
from pages import CLIP_EYE
from tokenizer import make_tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from llavar_peft.constants import IGNORE_INDEX, OCR_INSTRUCTIONS, USER_ROLE
from llavar_peft.data.encode_record import encode_record
from llavar_peft.datagen.synth.plain_style import draw_layout
from llavar_peft.datagen.synth.scene import PlacedLine
from llavar_peft.datagen.synth.synth_settings import KINDS
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.processing_llavar import LlavarProcessor

HIDDEN, HEADS, LAYERS, MLP = 128, 4, 4, 256
EMBEDDING_STD = 0.5
BLANK_PIECE = "<0x20>"
"""The token of an empty cell: the space's byte token, which the tokenizer itself never uses."""

Decoder: TypeAlias = LlamaForCausalLM | Qwen2ForCausalLM
Sample: TypeAlias = tuple[list[int], list[int], int, Cells]
"""Ids, labels, position of the page's first cell, the page."""


def page_cells(lines: Sequence[PlacedLine], width: int, height: int, rng: Random) -> Cells:
    """Return a layout as cells, centered on a square as in LLaVA's pad mode, with small random offsets."""
    long_side = max(width, height)
    dx, dy = (long_side - width) / 2, (long_side - height) / 2
    scale = SIDE / long_side
    return fill_cells(
        [(c, (x + dx) * scale + rng.gauss(0, 0.05), (y + dy) * scale) for c, x, y in centres(line)] for line in lines
    )


def random_layout(rng: Random, repeats: float, alphabet: str | None = None) -> tuple[Cells, str]:
    """Draw a page of random words at random positions; return cells and text.

    Args:
        rng: Of every choice.
        repeats: Share of the words with few distinct letters.
        alphabet: The characters; None for words of all kinds.
    """
    row, words, lines = rng.uniform(0, 4), list[str](), list[Line]()
    while row < SIDE and len(words) < 6:
        letters = rng.choice((string.ascii_uppercase, string.ascii_lowercase, string.digits, string.printable[:94]))
        if rng.random() < 0.3:
            letters = string.ascii_uppercase + string.digits
        letters = alphabet or letters
        if rng.random() < repeats:  # many repetitions, so that copying has to keep its position
            letters = "".join(rng.choices(letters, k=3))
        text = "".join(rng.choices(letters, k=rng.randint(1, 8)))
        if rng.random() < 0.25 and alphabet is None:
            text = text.capitalize()
        pitch = rng.choice((1.0, 1.1, 1.25, 1.5, 2.0))
        room = SIDE - len(text) * pitch
        if room < 0:
            continue
        start = rng.uniform(0, room)
        lines.append([(c, start + (n + 0.5) * pitch, row) for n, c in enumerate(text)])
        words.append(text)
        row += rng.uniform(1.2, 3)
    return fill_cells(lines), " ".join(words)


def make_sample(processor: LlavarProcessor, rng: Random, *, system: bool, repeats: float) -> Sample:
    """Draw a conversation about a page, encoded as a training record is, with or without the system prompt."""
    if rng.random() < 0.3:
        cells, transcript = random_layout(rng, repeats)
        pairs: list[tuple[str, str]] = [(rng.choice(OCR_INSTRUCTIONS), transcript)]
        if rng.random() < 0.5:
            pairs.append((rng.choice(("What does the sign say?", "Which words are on the sign?")), transcript))
    else:
        layout = draw_layout(rng.choice((*KINDS["plain"], "receipts")), rng, most_items=2)
        write = rng.choice((str, str, str, str.lower, str.title))
        lines = [replace(line, text=write(line.text)) for line in layout.lines]
        cells = page_cells(lines, layout.width, layout.height, rng)
        pairs = [(question, write(answer)) for question, answer in layout.questions]
        pairs.append((rng.choice(OCR_INSTRUCTIONS), " ".join(line.text for line in lines)))
        rng.shuffle(pairs)
    ids, labels = encode_pairs(pairs, processor, rng)
    if not system:
        role = ids.index(processor.tokenizer.convert_tokens_to_ids(f"▁{USER_ROLE}"))
        ids, labels = [ids[0], *ids[role:]], [labels[0], *labels[role:]]
    return ids, labels, ids.index(processor.image_token_id), cells


def encode_pairs(pairs: list[tuple[str, str]], processor: LlavarProcessor, rng: Random) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a conversation of questions and answers about one page."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = rng.choice(("<image>\n{}", "{}\n<image>")).format(turns[0]["value"])
    example = encode_record({"id": "", "image": "page.png", "conversations": turns}, processor, 2048)
    return example.input_ids.tolist(), example.labels.tolist()


def page_processor(directory: Path) -> LlavarProcessor:
    """Return a processor for conversations about pages: an image has as many patches as a page has cells."""
    tokenizer = load_tokenizer(directory)
    add_image_tokens(tokenizer)
    size = {"height": CLIP_EYE.pixels, "width": CLIP_EYE.pixels}
    return LlavarProcessor(CLIPImageProcessorPil(crop_size=size), tokenizer, patch_size=CLIP_EYE.cell)


def all_questions() -> list[str]:
    """Return every question that the quickstart asks, and those about a second item on a receipt."""
    layouts = (draw_layout(kind, Random(f"{kind}/{n}"), most_items=2) for kind in KINDS["plain"] for n in range(400))
    return sorted({question for layout in layouts for question, _ in layout.questions})


class PageEmbedder:
    """Turns samples into input embeddings.

    Args:
        model: Its embeddings fill the cells.
        tokenizer: The model's.
        seed: Of the noise.
        space: The token of a space.
        blank: The token of an empty cell.
        border: Whether a token before and one after the page enclose it.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        *,
        space: str = "▁",
        blank: str = BLANK_PIECE,
        border: bool = True,
    ) -> None:
        self.table, self.border = model.get_input_embeddings(), border
        pieces = [space if c == " " else c for c in CHARACTERS]
        self.ids = torch.tensor(tokenizer.convert_tokens_to_ids([*pieces, blank]))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings, attention mask and labels, padded on the right."""
        longest = max(len(ids) for ids, _, _, _ in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.long)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        mask = torch.zeros_like(tokens)
        for n, (ids, expected, _, _) in enumerate(samples):
            tokens[n, : len(ids)] = torch.tensor(ids)
            labels[n, : len(ids)] = torch.tensor(expected)
            mask[n, : len(ids)] = 1
        embeds = self.table(tokens.masked_fill(tokens >= self.table.num_embeddings, 0))
        border = self.table.weight.detach().mean(0)
        scale = 1 + 0.15 * torch.randn(len(samples), 1, 1, generator=self.generator)
        for n, (_, _, start, cells) in enumerate(samples):
            if self.border:
                embeds[n, start - 1] = embeds[n, start + len(cells[0])] = border
            embeds[n, start : start + len(cells[0])] = self._page(cells) * scale[n]
        return embeds, mask, labels

    def _page(self, cells: Cells) -> Tensor:
        """Return a page as a projector would: some letters weak or mixed with others, a few traces in empty cells."""

        def draw(*size: int) -> Tensor:
            return torch.rand(*size, generator=self.generator)

        classes, share = torch.tensor(cells[0]), torch.tensor(cells[1])
        share = share * torch.where(draw(len(share)) < 0.1, 1 - 0.5 * draw(len(share)), 1.0)
        doubt = 0.4 * draw(len(share)) * (draw(len(share)) < torch.where(classes == BLANK, 0.01, 0.15))
        other = torch.randint(len(CHARACTERS), (len(share),), generator=self.generator)
        parts = [(1 - share) * (1 - doubt), share * (1 - doubt), doubt]
        pieces = [torch.full_like(classes, BLANK), classes, other]
        page = sum(part[:, None] * self.table(self.ids[kind]) for part, kind in zip(parts, pieces, strict=True))
        assert isinstance(page, Tensor)
        return page + EMBEDDING_STD * 0.25 * torch.randn(page.shape, generator=self.generator)


@torch.no_grad()
def start_looking_back(model: Decoder) -> None:
    """Initialize heads of the first layer to attend one, two and three tokens back.

    The first eight features of every embedding start equal, which gives queries and keys a constant part, and the
    rotary position embedding turns it into an offset.
    """
    model.get_input_embeddings().weight[:, :8] = 2 * EMBEDDING_STD
    attention, size = model.model.layers[0].self_attn, HIDDEN // HEADS
    shared = HEADS // model.config.num_key_value_heads  # heads that have the same keys
    speed = 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    for head, back in enumerate((1, 2, 3)):
        query = torch.cat(((speed * back).cos(), -(speed * back).sin()))
        key = torch.cat((torch.ones(size // 2), torch.zeros(size // 2)))
        for linear, place, vector in ((attention.q_proj, head, query), (attention.k_proj, head // shared, key)):
            rows = linear.weight[place * size : (place + 1) * size]
            rows.mul_(0.2)
            rows[:, :8] = 6.0 / 8 / 1.8 * vector[:, None]


def make_language_model(directory: Path, *, steps: tuple[int, int], batch: int, rate: float, seed: int) -> None:
    """Train tokenizer and model and write them as one Hugging Face folder.

    Args:
        directory: The folder.
        steps: Optimizer steps of the first lesson, which starts from random initialization, and of the second, which
            always has the system prompt and has more words with few distinct letters, which are harder to copy.
        batch: Conversations per step.
        rate: Peak learning rate.
        seed: Of every random draw.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(directory, all_questions())
    processor = page_processor(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2048, rms_norm_eps=1e-6,
        initializer_range=HIDDEN**-0.5 * 0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    embed = PageEmbedder(model, tokenizer, seed)
    start_looking_back(model)

    def first(step: int) -> list[Sample]:
        rngs = [Random(f"conversation/{seed}/{step * batch + n}") for n in range(batch)]
        return [make_sample(processor, rng, system=step > 0.5 * steps[0], repeats=0.25) for rng in rngs]

    def second(step: int) -> list[Sample]:
        rngs = [Random(f"second/{seed}/{step * batch + n}") for n in range(batch)]
        return [make_sample(processor, rng, system=True, repeats=0.5) for rng in rngs]

    learn(model, embed, first, steps=steps[0], rate=rate)
    model.half().float()
    embed = PageEmbedder(model, tokenizer, seed + 1)
    learn(model, embed, second, steps=steps[1], rate=rate)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.half().save_pretrained(directory)


def learn(
    model: Decoder, embed: PageEmbedder, lesson: Callable[[int], list[Sample]], *, steps: int, rate: float
) -> None:
    """Train on the samples that `lesson` returns for each step."""
    optimizers, schedules = make_optimizers(model.model.layers, model.parameters(), rate, steps)
    started = time.perf_counter()
    pool = ThreadPoolExecutor(1)
    coming = pool.submit(lesson, 0)
    for step in range(steps):
        samples = coming.result()
        coming = pool.submit(lesson, step + 1)  # prepared while this step is trained on
        embeds, mask, labels = embed(samples)
        hidden = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        asked_for = labels[:, 1:] != IGNORE_INDEX
        logits, expected = model.lm_head(hidden[:, :-1][asked_for]), labels[:, 1:][asked_for]
        loss = nn.functional.cross_entropy(logits, expected)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == expected).float().mean()
            spent = time.perf_counter() - started
            print(f"language model {step:5d} loss {loss.item():.3f} pieces {right:.4f} {spent:.0f} s", flush=True)
    pool.shutdown(cancel_futures=True)
