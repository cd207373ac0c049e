"""The number of operations that are launched: on a GPU each costs microseconds, however small its tensors are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig

from llavar_peft import Full, Lora, ModelConfig, Projector, build_model
from llavar_peft.inference.batch_decoder import DecodingBatch, Row
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Request
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models import packed_attention
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Tune
from llavar_peft.training.supervised_loss import supervised_loss
from tests.flash_attention import varlen_kernels

_NO_KERNEL = ("detach", "_unsafe_view", "empty", "lift_fresh", "alias")
LIMITS: dict[str, tuple[Tune, int]] = {
    "projector": (Projector(), 97),
    "lora": (Lora(rank=4), 200),
    "full": (Full(), 108),
}
"""The most operations a layer may launch in a training step: forward and backward pass of one packed row."""
DECODING_LIMIT = 38
"""The most operations that a layer may launch for a decoded token."""


class Launches(TorchDispatchMode):
    """Counts the operators that start a kernel: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket).split(".")[-1]
        if not function.is_view and not name.startswith(_NO_KERNEL):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _launched(work: Callable[[], object]) -> int:
    work()  # without one-time work
    with Launches() as launches:
        work()
    return sum(launches.counts.values())


def _model(layers: int) -> LlavarForConditionalGeneration:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = make_config(
        LlamaConfig(**size, num_hidden_layers=layers, vocab_size=60, pad_token_id=0),
        CLIPVisionConfig(**size, num_hidden_layers=3, image_size=28, patch_size=14),
        vocab_size=63,
        image_token_id=60,
    )
    model: LlavarForConditionalGeneration = LlavarForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    )
    return model


def _step(layers: int, tune: Tune, lengths: tuple[int, ...]) -> int:
    """Return the operations of the forward and backward pass of a packed row, each record with an image."""
    model = _model(layers)
    trained = apply_tuning(model, tune).train()
    enable_packing(model)
    ids, start = torch.randint(3, 50, (1, sum(lengths))), 0
    for length in lengths:
        ids[0, start : start + 4] = 60
        start += length
    labels = torch.where(ids == 60, -100, ids)
    batch = {"input_ids": ids, "labels": labels, "lengths": lengths}
    batch["pixel_values"] = torch.zeros(len(lengths), 3, 28, 28)

    def work() -> None:
        trained.zero_grad()
        supervised_loss(trained, batch)[0].backward()

    return _launched(work)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda device: True)
    monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", (torch.float32,))
    with varlen_kernels():
        yield


@pytest.mark.parametrize("kind", LIMITS)
def test_a_training_step(kind: str, varlen: None) -> None:
    tune, limit = LIMITS[kind]
    few = {layers: _step(layers, tune, (24, 24)) for layers in (1, 3)}
    assert (few[3] - few[1]) / 2 <= limit
    # However many conversations and images a row has, the step launches as much.
    assert _step(3, tune, (8, 16, 8, 8, 8)) == few[3]


def test_sdpa_in_each_conversation_launches_more() -> None:
    few, many = (_step(3, Projector(), lengths) for lengths in ((24, 24), (8, 16, 8, 8, 8)))
    assert many > few + 3 * 3


def test_a_decoded_token(tiny_model: ModelConfig) -> None:
    built, processor = build_model(tiny_model)
    launched: dict[tuple[int, int], int] = {}
    layers = list(built.get_decoder().layers)
    for depth in (1, len(layers)):
        built.get_decoder().layers = torch.nn.ModuleList(layers[:depth])
        built.config.text_config.num_hidden_layers = depth
        engine = Engine(built.eval(), processor)
        for rows in (1, 6):
            batch = DecodingBatch(engine)
            sampling = Sampling(temperature=0.0, max_new_tokens=40)
            ids = [torch.arange(10, 15 + index) for index in range(rows)]
            made = [Row(Request(ids=one, images=[], sampling=sampling), engine) for one in ids]
            for row in made:
                row._eos = -1  # the answer does not end before the counted steps
            batch.join(made)
            launched[depth, rows] = _launched(batch.step)
            assert len(batch.rows) == rows
    depth = len(layers)
    alone, together = ((launched[depth, rows] - launched[1, rows]) / (depth - 1) for rows in (1, 6))
    assert alone == together <= DECODING_LIMIT
    # A batch has a mask, which is built once for all layers.
    assert launched[depth, 6] <= launched[depth, 1] + 15
