"""A training step of LLaVAR-7B and 13B without memory and without a GPU, and the peak that a GPU would see.

Model, tuning, packing, chunked loss, recomputation and FSDP2's wrapping are the product's and its libraries' own; only
the tensors are fake. Two things stand in for a GPU: CPU autocast and CPU SDPA, which keep the same tensors as CUDA's,
and ``fake_quantized.py``. The ranks of a process group are fake too: collectives return at once.

A step of 40 layers takes 10 seconds. Memory is linear in the number of layers, separately for each part of a step, so
that two short models give the peak of the whole one; ``test_estimate_peaks.py`` compares that with a longer model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from llavar_peft import CrossAttention, ModelConfig, Tiles
from llavar_peft.compat.dependency_internals import release_int8_inputs
from llavar_peft.compat.memory_tracker import MemoryTracker
from llavar_peft.models.build_model import resolve_attention
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.cross_attention import CrossAttentionLayer, detail_segments
from llavar_peft.models.detail_features import ImageDetails
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.preflight.estimate_views import ImageCost, image_cost
from llavar_peft.recipe.schema import Quantization, Tune
from tests.gpu_sim.fake_quantized import quantize_layers

_SHORT = {False: (2, 4), True: (4, 6)}
"""Numbers of layers of the two short models, without and with sharding, under which the first and last layers differ
from the others; even, because the backward pass is divided at half of them."""


@dataclass(frozen=True)
class Case:
    """A run on a GPU.

    Attributes:
        language_model: ``"7b"`` or ``"13b"`` of Vicuna, or the name of another model of known size.
        tune: What is trained.
        quantize: Storage of the base.
        gpus: Number of ranks; more than one are sharded by FSDP2.
        recompute: Whether activations are recomputed.
        records: Records of 2,048 tokens in a forward pass, each with an image.
        accumulation: Forward passes per optimizer step.
        fused: Whether AdamW's kernel is fused.
        vision_tower: The tower's name. One other than CLIP has the projector ``mlp2x_gelu``.
        tiles: How each image, which fills the largest grid that fits, is cut.
        crops: Rows, and columns, of crops for cross-attention; 0 is a model without it.
    """

    language_model: str
    tune: Tune
    quantize: Quantization | None = None
    gpus: int = 1
    recompute: bool = True
    records: int = 1
    accumulation: int = 1
    fused: bool = True
    vision_tower: str = "openai/clip-vit-large-patch14-336"
    tiles: Tiles | None = None
    crops: int = 0

    @property
    def model(self) -> ModelConfig:
        """The model's configuration as a recipe has it."""
        name = self.language_model
        return ModelConfig(
            language_model=name if "/" in name else f"lmsys/vicuna-{name}-v1.1", vision_tower=self.vision_tower,
            projector_type="linear" if "clip" in self.vision_tower else "mlp2x_gelu",
            quantize=self.quantize, dtype="bfloat16",
            resolution=CrossAttention(grid=self.crops) if self.crops else self.tiles,
        )  # fmt: skip

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the records of a forward pass."""
        return (2048,) * self.records

    @property
    def supervised(self) -> int:
        """Supervised tokens of a forward pass: all text, as ``estimate`` assumes."""
        return self.records * (2048 - image_cost(config_without_weights(self.model), 2048).tokens)


PARTS = ("before", "forward", "first half of backward", "second half of backward", "optimizer")


def track_peaks(case: Case, depth: int | None = None) -> dict[str, float]:
    """Return the peak of each part of a step in bytes, from those of two short models.

    Args:
        case: The run.
        depth: Number of layers of the language model; None means all.
    """
    few, many = _SHORT[case.gpus > 1]
    shorter, longer = track_layers(case, few), track_layers(case, many)
    depth = depth or config_without_weights(case.model).text_config.num_hidden_layers
    return {part: shorter[part] + (longer[part] - shorter[part]) * (depth - few) / (many - few) for part in PARTS}


def track_peak(case: Case) -> float:
    """Return the peak of a step in bytes, of the whole model."""
    return max(track_peaks(case).values())


def track_layers(case: Case, layers: int | None = None) -> dict[str, float]:
    """Return the peak of each part of a step in bytes.

    Args:
        case: The run.
        layers: Number of layers of the language model; None means all.
    """
    config = config_without_weights(case.model)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    with torch.device("meta"):
        model, trained = _build(case, config)
    with _ranks(case.gpus) as mesh, FakeTensorMode(), _DataDependent():
        _allocate(trained)
        if mesh is not None:
            trained = _shard(trained, mesh)
        with MemoryTracker() as tracker:
            tracker.add([*trained.parameters(), *trained.buffers()])
            return Step(case, model, trained, tracker).peaks()


def _build(case: Case, config: LlavarConfig) -> tuple[LlavarForConditionalGeneration, Any]:
    attention = resolve_attention("sdpa", torch.bfloat16, config)
    model: Any = LlavarForConditionalGeneration._from_config(
        config, attn_implementation=attention, dtype=torch.bfloat16
    )
    if case.quantize is not None:
        quantize_layers(model, case.quantize, sharded=case.gpus > 1)
        release_int8_inputs(model)
    trained = apply_tuning(model, case.tune)
    trained.train()
    for module in trained.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # as in training under autocast
    if case.recompute:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    return model, trained


def _allocate(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    data = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _ranks(gpus: int) -> Iterator[Any]:
    """Make this process the first rank of a fake process group, and yield its mesh; None for one rank."""
    if gpus == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield init_device_mesh("cpu", (gpus,), mesh_dim_names=("dp_shard",))
    finally:
        dist.destroy_process_group()


def _shard(model: Any, mesh: Any) -> Any:
    """Shard a model by accelerate's own function, with the settings of ``examples/accelerate/fsdp2_8gpu.yaml``."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half, names = torch.bfloat16, {type(module).__name__ for module in model.modules()}
    crossed = {CrossAttentionLayer.__name__} & names
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.get_decoder().layers[0]).__name__, *crossed],
        reshard_after_forward=True,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=None),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)),
        is_main_process=False,
        mixed_precision="bf16",
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


class _DataDependent(TorchDispatchMode):
    """Answers what depends on values, which fake tensors do not have: every condition is true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class Step:
    """The optimizer steps of a case."""

    def __init__(self, case: Case, model: Any, trained: Any, tracker: MemoryTracker) -> None:
        self.case, self.model, self.trained, self.tracker = case, model, trained, tracker
        self.parameters = [one for one in trained.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=case.fused, foreach=not case.fused)
        self.packs = enable_packing(model)
        self.found = dict.fromkeys(PARTS, 0.0)
        layers = model.model.language_model.layers
        layers[len(layers) // 2 - 1].register_forward_hook(self._divide_backward)

    def peaks(self) -> dict[str, float]:
        """Return the peaks of a step after the first, when the optimizer's states exist."""
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tracker.reset_peak()
        self._record("before")
        for _ in range(self.case.accumulation):  # gradients are exchanged after each pass
            loss = self.forward()
            self._record("forward")
            loss.backward()
            del loss
            self._record("second half of backward")
        self.optimizer.step()
        self._record("optimizer")
        return self.found

    def forward(self) -> Tensor:
        """Return the loss of a pass. FSDP2 is not wrapped in autocast, because its policy converts."""
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with autocast if self.case.gpus == 1 else nullcontext():
            return self.trained(**self._batch(), use_cache=False).loss

    def _batch(self) -> dict[str, Any]:
        tokens = sum(self.case.lengths)
        side = self.model.config.vision_config.image_size
        cost = image_cost(self.model.config, 2048)
        patches = self.case.records * cost.tokens
        if self.packs:
            shape, arguments = (1, tokens), packed_arguments(self.case.lengths, self.model, torch.device("cpu"))
        else:
            shape = (self.case.records, tokens // self.case.records)
            arguments = {"attention_mask": torch.ones(shape, dtype=torch.long)}
        if self.case.crops:
            conversations = zip(range(0, tokens, 2048), self.case.lengths, [[0]] * self.case.records, strict=True)
            arguments["detail_values"] = torch.zeros(self.case.records, self.case.crops**2, 3, side, side)
            arguments["details"] = ImageDetails(detail_segments(conversations))
        return {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "targets": torch.zeros(shape, dtype=torch.long),
            "pixel_values": torch.zeros(self.case.records * (cost.views - self.case.crops**2), 3, side, side),
            **self._layouts(cost),
            "image_places": torch.zeros(patches, dtype=torch.long),
            "supervised_places": torch.zeros(tokens - patches, dtype=torch.long),
            **arguments,
        }

    def _layouts(self, cost: ImageCost) -> dict[str, Any]:
        if self.case.tiles is None:
            return {}
        whole = [(rows, columns) for rows, columns in self.case.tiles.grids if rows * columns == cost.views - 1]
        side = math.isqrt(cost.projected)
        layouts = [(rows, columns, rows * side, columns * side) for rows, columns in whole]
        found = next(one for one in layouts if cost.projected + one[2] * (one[3] + 1) == cost.tokens)
        return {"image_layouts": [found] * self.case.records}

    def _record(self, part: str) -> None:
        self.found[part] = max(self.found[part], float(self.tracker.reset_peak()))

    def _divide_backward(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        def divide(_: Tensor) -> None:
            self._record("first half of backward")

        if output.requires_grad:
            output.register_hook(divide)
