"""Decoding in batches whose rows come, go and are drawn each in its own way.

Rows are aligned on the right: a prompt shorter than the batch is wide has padding on its left, which attention does not
see and positions do not count, so that a row gets what it would get alone. Not quite on ``int8``: bitsandbytes looks
for columns of large activations in the whole batch, and multiplies those columns unrounded for every row of it.

Shape suffixes: B rows, T tokens, W width of the cache, D language model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from llavar_peft.errors import DataError
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer, FinishReason, Prefix, Request
from llavar_peft.inference.kv_cache import cache_layers, join_caches, make_cache
from llavar_peft.inference.text_stream import TextStream
from llavar_peft.inference.token_sampling import choose_tokens, new_generator
from llavar_peft.models.modeling_llavar import CACHE_ARGUMENT


class Row:
    """A request while it is answered.

    Args:
        request: What is wanted.
        engine: Who answers.
        on_text: Called with each piece of text as soon as it is certain; joined, they are the answer's text.

    Attributes:
        request: As given.
        ids: The tokens chosen so far.
        logprobs: Of ``ids``, if asked for.
        answer: Once there is one.
        cancelled: Set it, from any thread, and the row ends with the next step.

    Raises:
        DataError: The prompt fills the model's context, or its places for images are not those of its images.
        ConfigError: There is no such adapter.
    """

    def __init__(self, request: Request, engine: Engine, on_text: Callable[[str], None] | None = None) -> None:
        _check_request(request, engine)
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.answer: Answer | None = None
        self.cancelled = False
        self.generator = new_generator(request.sampling)
        self._stream = TextStream(engine.processor.tokenizer, request.sampling.stop)
        self._on_text = on_text
        self._eos = engine.processor.tokenizer.eos_token_id
        self._limit = min(request.sampling.max_new_tokens, engine.context - len(request.ids))

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self._stream.text

    def take(self, token: int, logprob: float | None) -> FinishReason | None:
        """Take the next token; returns why the answer ends with it, or None."""
        self.ids.append(token)
        if self.request.sampling.logprobs and logprob is not None:
            self.logprobs.append(logprob)
        if token == self._eos:
            return "stop"
        self._say(self._stream.add(token))
        if self._stream.stopped:
            return "stop"
        return "length" if len(self.ids) >= self._limit else None

    def finish(self, reason: FinishReason, prefix: Prefix | None = None) -> None:
        """End the answer."""
        self._say(self._stream.close())
        # A stop text may have been waiting for the end of a run of bytes.
        reason = "stop" if self._stream.stopped else reason
        self.answer = Answer(
            text=self._stream.text,
            ids=tuple(self.ids),
            finish_reason=reason,
            prompt_tokens=len(self.request.ids),
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs else None,
            prefix=prefix,
        )

    def _say(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


class DecodingBatch:
    """Rows that are answered together, by one adapter.

    ``join`` takes rows in at any time, ``step`` gives each one more token; a row that ends leaves the batch at once.
    Not for several threads at a time.

    Args:
        engine: Who answers.
        adapter: The adapter's name, None for the base.

    Attributes:
        rows: Those that are being answered.
    """

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        engine.check_adapter(adapter)
        self.rows: list[Row] = []
        self._engine = engine
        self._adapter = adapter
        self._cache = make_cache(())
        self._mask_BW = torch.zeros(0, 0, dtype=torch.int64, device=engine.device)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Compute the prompts of further rows, and the first token of each.

        Args:
            rows: New ones, of this batch's adapter. Those without a prefix go through together.
        """
        self._engine.use(self._adapter)
        fresh = [row for row in rows if row.request.prefix is None]
        for group in ([fresh] if fresh else []) + [[row] for row in rows if row.request.prefix is not None]:
            cache, mask_BW, logits_BV = self._read_prompts(group)
            self._cache, self._mask_BW = join_caches(self._cache, self._mask_BW, cache, mask_BW)
            self.rows += group
            self._take(logits_BV, first=len(self.rows) - len(group))

    @torch.inference_mode()
    def step(self) -> None:
        """Return each row one more token."""
        self._drop({row: "cancelled" for row in self.rows if row.cancelled})
        if not self.rows:
            return
        self._engine.use(self._adapter)
        device = self._engine.device
        last_B1 = torch.tensor([[row.ids[-1]] for row in self.rows], device=device)
        places_B1 = torch.tensor([[len(row.request.ids) + len(row.ids) - 1] for row in self.rows], device=device)
        self._mask_BW = torch.nn.functional.pad(self._mask_BW, (0, 1), value=1)
        output = self._engine.plain(
            input_ids=last_B1,
            attention_mask=self._mask_BW,
            position_ids=places_B1,
            use_cache=True,
            **{CACHE_ARGUMENT: self._cache},
        )
        self._take(output.logits[:, -1], first=0)

    def _read_prompts(self, rows: Sequence[Row]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Compute what no prefix holds yet: the rows' cache, its mask ``[B, W]``, and ``[B, V]`` after each prompt.

        Only a row that is alone may have a prefix.
        """
        device = self._engine.device
        prefix = rows[0].request.prefix
        past = 0 if prefix is None else len(prefix.ids)
        width = max(len(row.request.ids) for row in rows) - past
        patch = self._engine.processor.image_token_id
        seen = [row.request.images for row in rows if bool((row.request.ids[past:] == patch).any())]
        self._engine.look([image for images in seen for image in images], self._adapter)
        embeds = [self._embedded(row.request, past) for row in rows]
        embeds_BTD = torch.stack([torch.nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in embeds])
        lengths = torch.tensor([past + len(row) for row in embeds], device=device)
        columns = torch.arange(past + width, device=device)
        mask_BW = (columns[None] >= past + width - lengths[:, None]).long()
        cache = make_cache(prefix.layers if prefix is not None else ())
        output = self._engine.plain(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BW,
            position_ids=(mask_BW.cumsum(dim=1) - 1).clamp(min=0)[:, past:],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: cache},
        )
        return cache, mask_BW, output.logits[:, -1]

    def _embedded(self, request: Request, past: int) -> Tensor:
        """The prompt from a position on as the language model sees it, ``[T, D]``."""
        plain, patch = self._engine.plain, self._engine.processor.image_token_id
        ids = request.ids[past:].to(self._engine.device)
        embeds_TD: Tensor = plain.get_input_embeddings()(ids[None])[0]
        places = ids == patch
        if bool(places.any()):
            seen_PD = torch.cat([image.features[self._adapter] for image in request.images])
            skipped = int((request.ids[:past] == patch).sum())
            embeds_TD = embeds_TD.clone()
            embeds_TD[places] = seen_PD[skipped:].to(embeds_TD.dtype)
        return embeds_TD

    def _take(self, logits_BV: Tensor, *, first: int) -> None:
        """Choose a token for each row from an index on, and lets those go that end with it."""
        rows = self.rows[first:]
        tokens, logprobs = choose_tokens(logits_BV, [r.request.sampling for r in rows], [r.generator for r in rows])
        ended: dict[Row, FinishReason] = {}
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            reason = row.take(token, None if logprobs is None else logprobs[index])
            if reason is not None:
                ended[row] = reason
        self._drop(ended)

    def _drop(self, ended: dict[Row, FinishReason]) -> None:
        if not ended:
            return
        for index, row in enumerate(self.rows):
            if row in ended:
                row.finish(ended[row], self._prefix_of(index) if row.request.keep_prefix else None)
        kept = [index for index, row in enumerate(self.rows) if row not in ended]
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self._cache, self._mask_BW = make_cache(()), self._mask_BW[:0, :0]
            return
        chosen = torch.tensor(kept, device=self._mask_BW.device)
        self._mask_BW = self._mask_BW[chosen]
        empty = int(self._mask_BW.any(dim=0).long().argmax())  # columns that only the rows gone had used
        self._mask_BW = self._mask_BW[:, empty:]
        self._cache = make_cache(
            (keys[chosen, :, empty:], values[chosen, :, empty:]) for keys, values in cache_layers(self._cache)
        )

    def _prefix_of(self, index: int) -> Prefix:
        row = self.rows[index]
        known = torch.cat([row.request.ids, torch.tensor(row.ids[:-1], dtype=torch.int64)])
        alone = len(self.rows) == 1  # else a view would keep the others' memory

        def own(tensor: Tensor) -> Tensor:
            part = tensor[index : index + 1, :, -len(known) :]
            return part if alone else part.clone()

        return Prefix(
            known, row.request.images, tuple((own(keys), own(values)) for keys, values in cache_layers(self._cache))
        )


def answer_all(engine: Engine, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
    """Answer requests, in batches of one adapter each.

    Args:
        engine: Who answers.
        requests: In any order; those that stand beside each other are batched.
        batch_size: Rows at most that are answered at a time.

    Returns:
        Their answers, in the order of the requests.
    """
    rows = [Row(request, engine) for request in requests]
    for adapter, group in groupby(rows, key=lambda row: row.request.adapter):
        members = list(group)
        for start in range(0, len(members), batch_size):
            batch = DecodingBatch(engine, adapter)
            batch.join(members[start : start + batch_size])
            while batch.rows:
                batch.step()
    return [row.answer for row in rows if row.answer is not None]


def stream_row(engine: Engine, row: Row, pieces: list[str]) -> Iterator[str]:
    """Answer one row and gives out what it says. Nobody taking more of it cancels the row.

    Args:
        engine: Who answers.
        row: Whose ``on_text`` appends to ``pieces``.
        pieces: Empty.

    Yields:
        The pieces of text.
    """
    batch = DecodingBatch(engine, row.request.adapter)
    try:
        batch.join([row])
        while batch.rows:
            yield from pieces
            pieces.clear()
            batch.step()
        yield from pieces
    except GeneratorExit:
        row.cancelled = True
        batch.step()
        raise


def _check_request(request: Request, engine: Engine) -> None:
    engine.check_adapter(request.adapter)
    if len(request.ids) >= engine.context:
        raise DataError.at(
            "request",
            f"the prompt has {len(request.ids)} tokens, the model's context {engine.context}",
            "ask for less at a time, or begin a new conversation",
        )
    places = int((request.ids == engine.processor.image_token_id).sum())
    tokens = sum(image.tokens for image in request.images)
    if places != tokens:
        raise DataError.at(
            "request", f"has {places} image tokens for pictures of {tokens}", "encode it with its own pictures"
        )
