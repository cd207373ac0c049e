"""Batched decoding with rows that join and leave at any time, each sampled with its own settings.

Rows are aligned on the right. A prompt that is shorter than the batch is padded on the left; attention ignores the
padding and positions do not count it, so a row gets the answer that it would get alone. ``int8`` is an exception:
bitsandbytes looks for outlier columns in the activations of the whole batch and computes them unquantized for all rows.

Shape suffixes: B rows, T tokens, W width of the cache, D language model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from llavar_peft.errors import DataError
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer, FinishReason, Prefix, Request, inputs_of_images
from llavar_peft.inference.row_cache import cache_layers, join_caches, make_cache
from llavar_peft.inference.text_stream import TextStream
from llavar_peft.inference.token_sampling import choose_tokens, invalid_logits, new_generator
from llavar_peft.models.cross_attention import detail_segments
from llavar_peft.models.detail_features import ImageDetails
from llavar_peft.models.modeling_llavar import CACHE_ARGUMENT


class Row:
    """A request while it is being answered.

    Args:
        request: The request.
        engine: The engine that answers it.
        on_text: Called with each piece of text as soon as it is final; the joined pieces are the answer's text.

    Attributes:
        ids: The tokens chosen so far.
        logprobs: Log-probabilities of ``ids``, if requested.
        answer: The answer, once it is complete.
        cancelled: Set by the caller, from any thread, to end the row at the next step.
        grammar: Where the answer is in the grammar of its request; None without one.

    Raises:
        DataError: The prompt fills the model's context, or its image tokens do not match its images.
        ConfigError: The adapter does not exist.
    """

    def __init__(self, request: Request, engine: Engine, on_text: Callable[[str], None] | None = None) -> None:
        _check_request(request, engine)
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.answer: Answer | None = None
        self.cancelled = False
        self.generator = new_generator(request.sampling)
        self.grammar = None if request.grammar is None else request.grammar.start()
        self._stream = TextStream(engine.processor.tokenizer, request.sampling.stop)
        self._on_text = on_text
        self._stop_tokens = engine.processor.stop_token_ids
        self._limit = min(request.sampling.max_new_tokens, engine.context - len(request.ids))

    @property
    def text(self) -> str:
        """The text so far."""
        return self._stream.text

    def append(self, token: int, logprob: float | None) -> FinishReason | None:
        """Append a token. Return why the answer ends with it, or None if it continues."""
        self.ids.append(token)
        if self.request.sampling.logprobs and logprob is not None:
            self.logprobs.append(logprob)
        if self.grammar is not None and not self.grammar.accept(token):
            raise invalid_logits()  # no number is larger than -inf, to which tokens that may not come next are set
        if self.grammar is not None and self.grammar.gave_up:
            return "length"
        if token in self._stop_tokens:
            return "stop"
        self._emit(self._stream.add(token))
        if self._stream.stopped:
            return "stop"
        return "length" if len(self.ids) >= self._limit else None

    def finish(self, reason: FinishReason, prefix: Prefix | None = None) -> None:
        """Complete the answer."""
        self._emit(self._stream.close())
        # Closing the stream decodes bytes that were held back; they may have completed a stop text.
        reason = "stop" if self._stream.stopped else reason
        self.answer = Answer(
            text=self._stream.text,
            ids=tuple(self.ids),
            finish_reason=reason,
            prompt_tokens=len(self.request.ids),
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs else None,
            prefix=prefix,
        )

    def _emit(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


class DecodingBatch:
    """Rows that are decoded together with one adapter. Not thread-safe.

    Rows ``join`` at any time, ``step`` adds one token to each, and a finished row leaves the batch at once. Language
    models that keep more than keys and values (``Engine.keeps_state``) compute each row from its start for each token:
    their state cannot be cut and joined.

    Args:
        engine: The engine that decodes.
        adapter: Name of the adapter, None for the base.

    Attributes:
        rows: The unfinished rows.
    """

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        engine.check_adapter(adapter)
        self.rows: list[Row] = []
        self._engine = engine
        self._adapter = adapter
        self._cache = make_cache(())
        self._mask_BW = torch.zeros(0, 0, dtype=torch.int64, device=engine.device)

    def join(self, rows: Sequence[Row]) -> None:
        """Compute the prompts of new rows of this batch's adapter, and the first token of each.

        Rows without a prefix are computed together.
        """
        self._engine.use(self._adapter)
        if self._engine.keeps_state:
            self.rows += rows
            with self._engine.no_grad():
                self._compute_again(first=len(self.rows) - len(rows))
            return
        without_prefix = [row for row in rows if row.request.prefix is None]
        groups = [without_prefix] if without_prefix else []
        groups += [[row] for row in rows if row.request.prefix is not None]
        with self._engine.no_grad():
            for group in groups:
                cache, mask_BW, logits_BV = self._compute_prompts([row.request for row in group])
                self._cache, self._mask_BW = join_caches(self._cache, self._mask_BW, cache, mask_BW)
                self.rows += group
                self._append_tokens(logits_BV, first=len(self.rows) - len(group))

    def step(self) -> None:
        """Add one token to each row, after dropping cancelled rows."""
        with self._engine.no_grad():
            self._drop({row: "cancelled" for row in self.rows if row.cancelled})
            if self.rows:
                self._step()
            else:
                self._engine.idle_step()

    def _step(self) -> None:
        self._engine.use(self._adapter)
        if self._engine.keeps_state:
            self._compute_again(first=0)
            return
        device = self._engine.device
        last_B1 = torch.tensor([[row.ids[-1]] for row in self.rows], device=device)
        positions_B1 = torch.tensor([[len(row.request.ids) + len(row.ids) - 1] for row in self.rows], device=device)
        self._mask_BW = pad(self._mask_BW, (0, 1), value=1)
        output = self._engine.base_model(
            input_ids=last_B1,
            attention_mask=self._mask_BW,
            position_ids=positions_B1,
            use_cache=True,
            **self._details([row.request for row in self.rows], None, width=1),
            **{CACHE_ARGUMENT: self._cache},
        )
        self._append_tokens(output.logits[:, -1], first=0)

    def finish(self) -> None:
        """Decode until all rows are finished; in a training run, until all rows of all ranks are."""
        while self._engine.any_rank(bool(self.rows)):
            self.step()

    def _compute_again(self, first: int) -> None:
        """Compute rows from an index on, from their start, and add a token to each."""
        prompts_and_answers = [
            dataclasses.replace(row.request, ids=torch.cat([row.request.ids, row.request.ids.new_tensor(row.ids)]))
            for row in self.rows[first:]
        ]
        _, _, logits_BV = self._compute_prompts(prompts_and_answers)
        self._append_tokens(logits_BV, first=first)

    def _compute_prompts(self, requests: Sequence[Request]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Compute the prompts after their prefix. Only a single row may have one.

        Returns:
            The rows' cache, its mask ``[B, W]``, and the logits ``[B, V]`` after each prompt.
        """
        prefix = requests[0].prefix
        past = 0 if prefix is None else len(prefix.ids)
        lengths = torch.tensor([len(request.ids) for request in requests], device=self._engine.device)
        width = int(lengths.max())
        columns = torch.arange(width, device=self._engine.device)
        mask_BW = (columns[None] >= width - lengths[:, None]).long()
        cache = make_cache(prefix.layers if prefix is not None else ())
        if self._engine.training:
            inputs = self._encode_prompts(requests, width)
        else:
            inputs = self._embed_prompts(requests, past, width - past)
        details = self._details(requests, past, width - past)
        output = self._engine.base_model(
            **inputs,
            **details,
            attention_mask=mask_BW,
            position_ids=(mask_BW.cumsum(dim=1) - 1).clamp(min=0)[:, past:],
            use_cache=not self._engine.keeps_state,
            logits_to_keep=1,
            **({} if self._engine.keeps_state else {CACHE_ARGUMENT: cache}),
        )
        if details and "detail_values" in inputs:
            images = [image for request in requests for image in request.images]
            for image, features_FC in zip(images, details["details"].features_NFC, strict=True):
                image.detail_features[self._adapter] = features_FC
        return cache, mask_BW, output.logits[:, -1]

    def _details(self, requests: Sequence[Request], past: int | None, width: int) -> dict[str, Any]:
        """Return which tokens of the rows attend to which images, for a second encoder; nothing without one.

        Args:
            requests: The rows, aligned on the right.
            past: The number of tokens of each prompt that are in the cache; None for a token after all of them.
            width: The number of tokens of a row that are computed.
        """
        images = [image for request in requests for image in request.images]
        if not any(image.detail is not None for image in images):
            return {}
        conversations = []
        for row, request in enumerate(requests, start=1):
            start = len(request.ids) if past is None else past  # of the tokens to compute
            length = 1 if past is None else len(request.ids) - past
            places = (request.ids == self._engine.processor.image_token_id).nonzero()[:, 0].tolist()
            firsts = accumulate((image.tokens for image in request.images[:-1]), initial=0) if places else ()
            conversations.append((row * width - length, length, [places[first] - start for first in firsts]))
        features = [image.detail_features.get(self._adapter) for image in images]
        computed = [features_FC for features_FC in features if features_FC is not None]
        return {"details": ImageDetails(detail_segments(conversations), computed)}

    def _encode_prompts(self, requests: Sequence[Request], width: int) -> dict[str, Any]:
        """Return the model's inputs as a training step has them: the whole model is called, never a part of it."""
        device, padding = self._engine.device, self._engine.processor.tokenizer.pad_token_id
        ids = [pad(request.ids, (width - len(request.ids), 0), value=padding) for request in requests]
        images = [image for request in requests for image in request.images]
        return {"input_ids": torch.stack(ids).to(device), **inputs_of_images(images, device)}

    def _embed_prompts(self, requests: Sequence[Request], past: int, width: int) -> dict[str, Any]:
        """Return the embeddings from a position on, with features that were computed before or are kept from now on."""
        image_token = self._engine.processor.image_token_id
        images = [image for request in requests if image_token in request.ids[past:] for image in request.images]
        self._engine.compute_features(images, self._adapter)
        embeds = [self._embed(request, past) for request in requests]
        return {"inputs_embeds": torch.stack([pad(row, (0, 0, width - len(row), 0)) for row in embeds])}

    def _embed(self, request: Request, past: int) -> Tensor:
        """Return the embeddings of a prompt from a position on, ``[T, D]``."""
        image_token = self._engine.processor.image_token_id
        ids = request.ids[past:].to(self._engine.device)
        embeds_TD: Tensor = self._engine.base_model.get_input_embeddings()(ids[None])[0]
        places = ids == image_token
        if bool(places.any()):
            features_PD = torch.cat([image.features[self._adapter] for image in request.images])
            skipped = int((request.ids[:past] == image_token).sum())
            embeds_TD = embeds_TD.clone()
            embeds_TD[places] = features_PD[skipped:].to(embeds_TD.dtype)
        return embeds_TD

    def _append_tokens(self, logits_BV: Tensor, *, first: int) -> None:
        """Choose a token for each row from an index on, and drop the rows that end with it."""
        rows = self.rows[first:]
        self._follow_grammars(logits_BV, rows)
        tokens, logprobs = choose_tokens(logits_BV, [r.request.sampling for r in rows], [r.generator for r in rows])
        ended: dict[Row, FinishReason] = {}
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            reason = row.append(token, None if logprobs is None else logprobs[index])
            if reason is not None:
                ended[row] = reason
        self._drop(ended)

    def _follow_grammars(self, logits_BV: Tensor, rows: Sequence[Row]) -> None:
        """Set the logits of tokens that may not come next to -inf, of the rows that follow a grammar."""
        states = {index: row.grammar for index, row in enumerate(rows) if row.grammar is not None}
        if states:
            allowed_BV = self._engine.grammars.allowed_tokens([*states.values()], logits_BV.shape[1], logits_BV.device)
            chosen = torch.tensor([*states], device=logits_BV.device)
            logits_BV[chosen] = logits_BV[chosen].masked_fill(~allowed_BV, -torch.inf)

    def _drop(self, ended: dict[Row, FinishReason]) -> None:
        """Complete the answers of rows that ended, and remove the rows from the batch and its cache."""
        if not ended:
            return
        for index, row in enumerate(self.rows):
            if row in ended:
                returns_prefix = row.request.keep_prefix and not self._engine.keeps_state
                row.finish(ended[row], self._extract_prefix(index) if returns_prefix else None)
        remaining = [index for index, row in enumerate(self.rows) if row not in ended]
        self.rows = [self.rows[index] for index in remaining]
        if self._engine.keeps_state:
            return
        if not remaining:
            self._cache, self._mask_BW = make_cache(()), self._mask_BW[:0, :0]
            return
        indices = torch.tensor(remaining, device=self._mask_BW.device)
        self._mask_BW = self._mask_BW[indices]
        empty = int(self._mask_BW.any(dim=0).long().argmax())  # columns that only dropped rows used
        self._mask_BW = self._mask_BW[:, empty:]
        self._cache = make_cache(
            (keys[indices, :, empty:], values[indices, :, empty:]) for keys, values in cache_layers(self._cache)
        )

    def _extract_prefix(self, index: int) -> Prefix:
        """Return the keys and values of a row's prompt and answer, without those of its last token."""
        row = self.rows[index]
        ids = torch.cat([row.request.ids, torch.tensor(row.ids[:-1], dtype=torch.int64)])
        alone = len(self.rows) == 1  # a view of a larger batch would keep the memory of the other rows

        def extract(tensor: Tensor) -> Tensor:
            part = tensor[index : index + 1, :, -len(ids) :]
            return part if alone else part.clone()

        layers = tuple((extract(keys), extract(values)) for keys, values in cache_layers(self._cache))
        return Prefix(ids, row.request.images, layers)


def answer_all(engine: Engine, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
    """Answer requests in batches.

    Args:
        engine: The engine that answers.
        requests: Neighbours with the same adapter form a batch.
        batch_size: Maximum number of rows of a batch.

    Returns:
        The answers, in the order of the requests.
    """
    rows = [Row(request, engine) for request in requests]
    for adapter, group in groupby(rows, key=lambda row: row.request.adapter):
        members = list(group)
        for start in range(0, len(members), batch_size):
            batch = DecodingBatch(engine, adapter)
            batch.join(members[start : start + batch_size])
            batch.finish()
    return [row.answer for row in rows if row.answer is not None]


def stream_row(engine: Engine, row: Row, pieces: list[str]) -> Iterator[str]:
    """Answer one row and yield its text piece by piece. Closing the iterator cancels the row.

    Args:
        engine: The engine that answers.
        row: A row whose ``on_text`` appends to ``pieces``.
        pieces: An empty list.
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
            _how_to_shorten(request, engine),
        )
    places = int((request.ids == engine.processor.image_token_id).sum())
    tokens = sum(image.tokens for image in request.images)
    if places != tokens:
        raise DataError.at(
            "request", f"has {places} image tokens for images of {tokens}", "encode it with its own images"
        )


def _how_to_shorten(request: Request, engine: Engine) -> str:
    fix = "shorten the question, or start a new conversation"
    if len(request.images) < 2:
        return fix
    around = 2 if engine.processor.use_im_start_end else 0
    tokens = [image.tokens + around for image in request.images]
    fitting = (engine.context - 1 - len(request.ids) + sum(tokens)) // max(tokens)
    shown = f"show at most {fitting} images or pages" if fitting > 0 else "show no images"
    return f"{shown} (got {len(tokens)}), {fix}"
