"""Write the result of a merge, and in the same pass compute how much the merge changes the logits of a short text.

The model before the merge and the model after it compute the text's logits in turn, one layer each. Both need the same
weight at the same time: it is read once, a block of rows at a time. A block is multiplied with the first model's input,
merged, rounded and given to the writer; then what is written is multiplied with the second model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread

import torch
from torch import Tensor

from llavar_peft.models.merge_logits_gap import LogitsGap, logits_gap, probe_ids, probe_logits, read_config
from llavar_peft.models.probe_weights import PickedRows, UnmergedWeights, Weights, WrittenWeights, join_columns
from llavar_peft.weights.adapter.lora_updates import LayerInput
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_stream import TensorStream
from llavar_peft.weights.merge.merge_plan import MergePlan
from llavar_peft.weights.merge.merge_stream import MergedTensors, RowsCallback, float_pieces

_MATRIX = 2  # dimensions
_PROBED = ("model.language_model.", tensor_names.PROJECTOR, tensor_names.HEAD)
"""How our names of tensors begin that the text passes."""


def probed_names(plan: MergePlan) -> list[str]:
    """Return the matrices of a merge's result that are written when the text passes them."""
    base = plan.merged.base
    return [
        name
        for name, shape in base.shapes.items()
        if len(shape) == _MATRIX and (base.ours(name) or "").startswith(_PROBED)
    ]


def measure_merge(
    plan: MergePlan, stream: TensorStream, dtype: str | None, tokenizers: tuple[Path, ...]
) -> dict[str, LogitsGap]:
    """Measure how much the logits of a merge's result differ from those of the model as it was trained.

    Args:
        plan: The merge.
        stream: Writes the result.
        dtype: Torch's name of the result's dtype; None keeps each tensor's own.
        tokenizers: Folders that may contain the model's tokenizer; the first one that does is used.

    Returns:
        The difference of the ``result``; for a result on a dequantized base also the difference that a merge onto the
        ``original`` would have, unrounded.

    Raises:
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the dtype.
    """
    merged = plan.merged
    text, image_id = read_config(merged.base.config)
    ids = probe_ids(tokenizers, text.vocab_size, image_id)
    compute = partial(probe_logits, config=text, ids=ids, image_id=image_id)
    after = WrittenWeights(merged, stream)
    with torch.no_grad():
        if plan.trained == merged.rounding:
            expected, got = _Lockstep(merged, stream, dtype).run([UnmergedWeights(merged), after], compute)
        else:  # the base's numbers in training are not those that the adapters are merged into
            trained = MergedTensors(merged.base, merged.adapters, merged.weights, plan.trained)
            expected = compute(UnmergedWeights(trained))
            (got,) = _Lockstep(merged, stream, dtype).run([after], compute)
    gaps = {"result": logits_gap(expected, got)}
    if merged.rounding is not None:
        original = UnmergedWeights(MergedTensors(merged.base, merged.adapters, merged.weights))
        gaps["original"] = logits_gap(expected, compute(original))
    return gaps


@dataclass(frozen=True, slots=True)
class _Request:
    """What a model needs next: the output of a linear layer for an input, or rows of an embedding by their numbers."""

    kind: str
    name: str
    value: Tensor


class _Model(Weights):
    """A model on a thread of its own, which stops at each of its matrices until that one's rows are read.

    Args:
        weights: The model's weights; small tensors are read from there directly.
        compute: Computes the logits.

    Attributes:
        next: What the model needs to continue; in the end its logits.
    """

    def __init__(self, weights: Weights, compute: Callable[[Weights], Tensor]) -> None:
        super().__init__(weights.merged)
        self.weights = weights
        self._requests: Queue[_Request | Tensor | BaseException] = Queue()
        self._answers: Queue[Tensor | BaseException] = Queue()
        self._compute = compute
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        self.next = self._wait()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a small tensor's rows."""
        return self.weights.blocks(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return a linear layer's output without its bias."""
        return self._ask(_Request("linear", name, x))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of a tensor, shape (len(ids), width)."""
        return self._ask(_Request("rows", name, ids))

    def answer(self, output: Tensor) -> None:
        """Let the model continue with what it asked for, and wait until it needs something else or is done."""
        self._answers.put(output)
        self.next = self._wait()

    def stop(self) -> None:
        """End the thread."""
        self._answers.put(_EndedError())
        self._thread.join()

    def _ask(self, request: _Request) -> Tensor:
        """Wait for the answer to a request; called on the model's thread."""
        self._requests.put(request)
        output = self._answers.get()
        if isinstance(output, BaseException):
            raise output
        return output

    def _wait(self) -> _Request | Tensor:
        """Wait for the model's next request, or its logits; called on the main thread."""
        request_or_logits = self._requests.get()
        if isinstance(request_or_logits, BaseException):
            raise request_or_logits
        return request_or_logits

    def _run(self) -> None:
        try:
            self._requests.put(self._compute(self))
        except BaseException as error:  # noqa: BLE001 - raised on the thread that waits
            self._requests.put(error)


class _Lockstep:
    """Runs models that need the same matrices at the same time, the last of which is that of the merge's result.

    Args:
        merged: The merge.
        stream: Writes its result.
        dtype: As for ``measure_merge``.
    """

    def __init__(self, merged: MergedTensors, stream: TensorStream, dtype: str | None) -> None:
        self._merged, self._stream, self._dtype = merged, stream, dtype
        self._stored = WrittenWeights(merged, stream).stored

    def run(self, weights: Sequence[Weights], compute: Callable[[Weights], Tensor]) -> list[Tensor]:
        """Return the logits of each."""
        models: list[_Model] = []
        try:
            models.extend(_Model(model_weights, compute) for model_weights in weights)
            while waiting := [model for model in models if isinstance(model.next, _Request)]:
                self._serve(waiting, models[-1])
        finally:
            for model in models:
                model.stop()
        return [model.next for model in models if isinstance(model.next, Tensor)]

    def _serve(self, models: Sequence[_Model], result: _Model) -> None:
        """Answer the requests of models that wait, which are mostly for the same matrix.

        Args:
            models: The models.
            result: The model of the merge's result.
        """
        requests = [model.next for model in models if isinstance(model.next, _Request)]
        if len({(request.kind, request.name) for request in requests}) > 1:  # such as other experts: one by one
            models, requests = models[:1], requests[:1]
        answers = [
            _Answer(request, model.weights if isinstance(model.weights, UnmergedWeights) else None)
            for model, request in zip(models, requests, strict=True)
        ]
        before_merge = [answer for model, answer in zip(models, answers, strict=True) if model is not result]
        after_merge = [answer for model, answer in zip(models, answers, strict=True) if model is result]
        self._read_matrix(requests[0].name, before_merge, after_merge)
        for model, answer in zip(models, answers, strict=True):
            model.answer(answer.joined())

    def _read_matrix(self, our_name: str, before: Sequence[_Answer], after: Sequence[_Answer]) -> None:
        """Read a matrix once; if the result's model needs it, merge and write it too.

        Args:
            our_name: The matrix.
            before: Get its rows before the merge.
            after: Get its rows after the merge.
        """
        name, start = self._stored[our_name], 0
        blocks = self._merged.before(name)
        if not after:
            for block in blocks:
                _pass_rows(block, before, start)
                start += len(block)
            return
        dtype = self._dtype or self._merged.base.dtype(name)
        is_written = self._stream.is_written(name)  # such as before an interruption: `put` returns the rows in the file
        with self._stream.writing(name) as put:
            for block in blocks:
                if is_written:
                    _pass_rows(block, before, start)
                    _pass_rows(put(block), after, start)
                else:
                    merged = self._merged.merge_block(name, block, start, dtype, _receiver(before), _receiver(after))
                    put(merged)
                start += len(block)


def _receiver(answers: Sequence[_Answer]) -> RowsCallback:
    """Return a function that passes rows to several answers."""

    def receive(rows: Tensor, start: int) -> None:
        for answer in answers:
            answer.add(rows, start)

    return receive


def _pass_rows(block: Tensor, answers: Sequence[_Answer], start: int) -> None:
    """Pass a block to several answers in pieces, as a merge does."""
    for rows, place in float_pieces(block):
        _receiver(answers)(rows, start + place.start)


class _Answer:
    """Collects the answer to a request from the blocks of its matrix.

    Args:
        request: The request.
        unmerged: Adds the adapters, for a matrix without them.
    """

    def __init__(self, request: _Request, unmerged: UnmergedWeights | None) -> None:
        self._request, self._unmerged = request, unmerged
        self._columns: list[Tensor] = []
        self._picked = PickedRows(request.value) if request.kind == "rows" else None
        self._input = None if request.kind == "rows" else LayerInput(request.value)

    def add(self, rows: Tensor, start: int) -> None:
        """Use the next rows of the matrix."""
        name = self._request.name
        if self._input is not None:
            if self._unmerged is None:
                self._columns.append(self._input.times(rows))
            else:
                self._columns.append(self._unmerged.output(name, self._input, rows, start))
        elif self._picked is not None:
            picked = self._picked.pick(rows, start)
            if self._unmerged is not None:
                picked = self._unmerged.lookup(name, picked, self._picked.inside(rows, start))
            self._picked.add(picked)

    def joined(self) -> Tensor:
        """Return the whole answer."""
        if self._picked is not None:
            return self._picked.joined()
        return torch.empty(0) if self._input is None else join_columns(self._input, self._columns)


class _EndedError(Exception):
    """The other model failed, or everything is done."""
