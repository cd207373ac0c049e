"""One process uses one device, its own; what a launch does not support is rejected before the model is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import training_args
from transformers.training_args import ParallelMode

from llavar_peft import Lora, Recipe, build_model
from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError
from llavar_peft.models import build_model as model_building
from llavar_peft.models.build_model import resolve_dtype
from llavar_peft.models.launch_environment import claim_device
from llavar_peft.preflight.doctor_devices import check_devices
from llavar_peft.recipe.schema import Full
from llavar_peft.training import dry_run, launch, out_of_memory, stage_arguments, trainer
from llavar_peft.training.launch import start_processes
from llavar_peft.training.out_of_memory import memory_remedies
from llavar_peft.training.stage_arguments import resolve_precision, training_arguments

FSDP2 = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch report eight A100; return the devices that are made the current one."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    _set_capability(monkeypatch, (8, 0))
    return chosen


def _set_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    about = type("About", (), {"major": capability[0], "minor": capability[1], "name": "GPU"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # What PyTorch counts as support: a bfloat16 tensor can be created, on every GPU since 2014.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda *_: True)


@pytest.fixture
def new_state() -> Iterator[None]:
    """Let transformers and accelerate look for the device again, before the test and after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("new_state")
def test_the_recipe_limits_how_long_processes_wait_for_each_other(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, waits = dataclasses.replace(tiny_recipe, process_timeout=1234), []
    alone = type("Alone", (), {"num_processes": 1})
    monkeypatch.setattr(launch, "PartialState", lambda timeout=None, **_: waits.append(timeout) or alone)
    start_processes(recipe)
    assert waits == [timedelta(seconds=1234)]
    # Where there is no process group yet, the Trainer creates it.
    assert training_arguments(recipe, recipe.stages[0], tmp_path, ranks=1).ddp_timeout == 1234


# -- one process, one device ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpus", "new_state")
def test_one_process_that_sees_eight_gpus_trains_on_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    stage = dataclasses.replace(tiny_recipe.stages[0], global_batch_size=32, micro_batch_size=4)
    made = training_arguments(tiny_recipe, stage, tmp_path, ranks=1)
    assert made.n_gpu == 1
    assert made.parallel_mode == ParallelMode.NOT_PARALLEL  # otherwise the Trainer uses nn.DataParallel
    assert made.train_batch_size * made.gradient_accumulation_steps == 32


def test_the_log_says_how_to_use_the_other_gpus(
    gpus: list[Any], tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = type("Alone", (), {"num_processes": 1})
    monkeypatch.setattr(launch, "PartialState", lambda **_: alone)
    launch._report_unused_gpus.cache_clear()
    with caplog.at_level(logging.WARNING, "llavar_peft"):
        start_processes(tiny_recipe)
        start_processes(tiny_recipe)
    (record,) = caplog.records
    assert record.message.startswith("this process sees 8 GPUs and uses one of them, cuda:0; to use all")
    assert record.message.endswith("accelerate launch --multi_gpu --num_processes 8")
    assert gpus == [torch.device("cuda:0")] * 2


@pytest.mark.parametrize(
    ("variables", "seen", "expected"),
    [
        ({}, 8, "cuda:0"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16", "RANK": "11"}, 8, "cuda:3"),
        ({"LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8"}, 8, "cuda:7"),
        # Slurm gives each process a GPU of its own.
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "3"}, 1, "cuda:0"),
        ({"LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "true"}, 8, "cpu"),
    ],
)
def test_each_rank_has_its_own_device(
    variables: dict[str, str], seen: int, expected: str, gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    _set(monkeypatch, variables)
    assert claim_device() == torch.device(expected)
    assert gpus == ([] if expected == "cpu" else [torch.device(expected)])


@pytest.mark.parametrize("seen", [8, 1])
def test_more_processes_than_gpus_are_rejected(seen: int, gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _set(monkeypatch, {"LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": "10"})
    with pytest.raises(EnvironmentFaultError, match=rf"got 10, expected at most {seen}.*--num_processes {seen}"):
        claim_device()


def test_without_gpus_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    if not torch.cuda.is_available():
        assert claim_device() == torch.device("cpu")


def test_a_quantized_model_is_loaded_onto_the_device_of_its_rank(
    gpus: list[Any], tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, {"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"})
    given: list[Any] = []

    def load(*_: Any, **arguments: Any) -> None:
        given.append(arguments["device_map"])
        raise InterruptedError

    monkeypatch.setattr(model_building.LlavarForConditionalGeneration, "from_pretrained", load)
    for quantize in ("nf4", "int8"):
        with pytest.raises(InterruptedError):
            build_model(dataclasses.replace(tiny_recipe.model, quantize=quantize))
    assert given == [{"": torch.device("cuda:5")}] * 2


@pytest.mark.parametrize(("module", "run"), [(trainer, trainer.run_recipe), (dry_run, dry_run.dry_run)])
def test_processes_start_before_the_model_is_loaded(
    module: Any, run: Any, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def load(*_: Any, **__: Any) -> None:
        order.append("load")
        raise InterruptedError

    def start(recipe: Recipe) -> Any:
        order.append("start")
        return start_processes(recipe)

    monkeypatch.setattr(module, "start_processes", start)
    monkeypatch.setattr(module, "build_for_training", load)
    with pytest.raises(InterruptedError):
        list(run(tiny_recipe))
    assert order == ["start", "load"]


# -- number formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "precision"),
    [
        ((8, 0), torch.bfloat16, "bf16"),
        ((9, 0), torch.bfloat16, "bf16"),
        ((7, 5), torch.float16, "fp16"),  # T4
        ((7, 0), torch.float16, "fp16"),  # V100
        ((6, 1), torch.float32, "fp32"),
    ],
)
def test_auto_does_not_emulate_bfloat16(
    capability: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    gpus: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _set_capability(monkeypatch, capability)
    assert torch.cuda.is_bf16_supported()
    assert resolve_dtype("auto") is dtype
    assert resolve_precision("auto") == precision
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**34, 2**34))
    found = next(one for one in check_devices() if one.name == "GPU 0")
    launch._report_precision.cache_clear()
    with caplog.at_level(logging.WARNING, "llavar_peft"):
        launch._report_precision()
    if precision == "bf16":
        assert caplog.records == []
    else:
        assert "has no bfloat16 arithmetic" in caplog.text
        assert f"'auto' is {precision}" in found.what


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("capability", "dtype", "bf16", "fp16", "optimizer"),
    [
        ((9, 0), torch.bfloat16, True, False, "adamw_torch_fused"),
        ((7, 5), torch.float16, False, True, "adamw_torch"),
        ((6, 1), torch.float32, False, False, "adamw_torch_fused"),
    ],
)
def test_the_trainer_and_the_model_have_the_format_that_the_gpu_has(
    capability: tuple[int, int],
    dtype: torch.dtype,
    bf16: bool,
    fp16: bool,
    optimizer: str,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ``transformers.Trainer`` is given where the recipe says ``auto``: also an AdamW without scratch memory."""
    _set_capability(monkeypatch, capability)
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "enable_tf32", lambda _: None)
    stage = dataclasses.replace(tiny_recipe.stages[0], precision="auto")
    made = training_arguments(tiny_recipe, stage, tmp_path, ranks=1)
    assert (made.bf16, made.fp16, made.optim) == (bf16, fp16, optimizer)
    model, _ = build_model(dataclasses.replace(tiny_recipe.model, dtype="auto"))
    assert model.dtype == dtype


def test_the_recipe_decides_the_precision(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what examples/accelerate sets
    for precision, expected in (("fp32", "no"), ("bf16", "bf16")):
        stage = dataclasses.replace(tiny_recipe.stages[0], precision=precision)
        assert training_arguments(tiny_recipe, stage, tmp_path, ranks=1).mixed_precision == expected


# -- sharding ---------------------------------------------------------------------------------------------------------

LORA = Lora(rank=4, alpha=8.0)
OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD"


def _groups(launch: dict[str, str], processes: int, *, replicas: int, shards: int) -> dict[str, str]:
    sizes = {
        f"PARALLELISM_CONFIG_DP_{name}_SIZE": str(size) for name, size in (("REPLICATE", replicas), ("SHARD", shards))
    }
    return {**launch, "WORLD_SIZE": str(processes), "ACCELERATE_USE_PARALLELISM_CONFIG": "true", **sizes}


@pytest.mark.parametrize(
    ("variables", "model", "stage", "expected"),
    [
        (FSDP2, {}, {"optimizer": "adamw_8bit"}, "stages.stage2.optim.optimizer: FSDP cannot shard the states"),
        (FSDP2, {}, {"optimizer": "paged_adamw_8bit"}, "stages.stage2.optim.optimizer: FSDP cannot shard"),
        (FSDP2, {"quantize": "int8"}, {"tune": LORA}, "model.quantize: FSDP cannot shard int8 weights"),
        (
            FSDP2,
            {"quantize": "nf4"},
            {"tune": LORA, "precision": "bf16"},
            "model.dtype: FSDP needs nf4 weights in the format of the computation (got float32, expected bfloat16)",
        ),
        (FSDP2, {}, {"tune": Lora(variant="pissa")}, "stages.stage2.tune.variant: pissa cannot be sharded"),
        (ZERO, {}, {"optimizer": "adamw_8bit"}, "stages.stage2.optim.optimizer: ZeRO cannot shard the states"),
        (ZERO, {}, {"tune": Lora(variant="pissa")}, "stages.stage2.tune.variant: pissa cannot be sharded"),
        ({**FSDP2, "FSDP_VERSION": "1"}, {}, {}, "accelerate: FSDP version 1 is not supported"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, {}, {}, "accelerate: FSDP with fsdp_offload_params"),
        ({**FSDP2, "PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, {}, "(got parallelism_config_tp_size: 2)"),
        ({"WORLD_SIZE": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, {}, "(got parallelism_config_cp_size: 2)"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_MEGATRON_LM": "true"}, {}, {}, "(got distributed_type: MEGATRON_LM)"),
        (_groups(FSDP2, 4, replicas=2, shards=1), {}, {}, "replicate_size: 2 and parallelism_config_dp_shard_size: 2"),
        (_groups(FSDP2, 4, replicas=3, shards=2), {}, {}, "replicate_size: 1 and parallelism_config_dp_shard_size: 4"),
        (_groups(FSDP2, 2, replicas=2, shards=1), {}, {}, "replicate_size: 1 and parallelism_config_dp_shard_size: 2"),
        (_groups(FSDP2, 4, replicas=1, shards=1), {}, {}, "replicate_size: 1 and parallelism_config_dp_shard_size: 4"),
        (_groups({}, 4, replicas=2, shards=2), {}, {}, "accelerate: only FSDP divides its processes into groups"),
        (_groups(ZERO, 4, replicas=2, shards=2), {}, {}, "accelerate: only FSDP divides its processes into groups"),
        ({**FSDP2, "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}, {}, "launch with examples/accelerate/one_gpu.yaml"),
        ({**ZERO, f"{OFFLOAD}_OPTIMIZER_DEVICE": "nvme"}, {}, {}, "set offload_optimizer_device: cpu"),
        ({**ZERO, f"{OFFLOAD}_PARAM_DEVICE": "nvme"}, {}, {}, "set offload_param_device: cpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_rejected_before_the_model_is_loaded(
    variables: dict[str, str],
    model: dict[str, Any],
    stage: dict[str, Any],
    expected: str,
    tiny_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, variables)
    monkeypatch.setattr(trainer, "build_for_training", lambda *_, **__: pytest.fail("the model is loaded"))
    last = tiny_recipe.stages[1]
    if "optimizer" in stage:
        stage = {"optim": dataclasses.replace(last.optim, **stage)}
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, **model),
        stages=(dataclasses.replace(last, **stage),),
    )
    with pytest.raises(LlavarError) as caught:
        trainer.run_recipe(recipe)
    assert expected in str(caught.value)
    assert "Fix:" in str(caught.value)


def test_all_faults_of_a_launch_are_listed(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, FSDP2)
    last = tiny_recipe.stages[1]
    optim = dataclasses.replace(last.optim, optimizer="adamw_8bit")
    stage = dataclasses.replace(last, tune=Lora(variant="pissa"), optim=optim)
    with pytest.raises(ConfigError, match="2 problems"):
        launch.check_launch(dataclasses.replace(tiny_recipe, stages=(stage,)))


def test_the_advice_for_memory_is_accepted_by_the_launch(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "uses_gpu", lambda: True)
    full = dataclasses.replace(tiny_recipe.stages[1], tune=Full())
    alone = memory_remedies(full, tiny_recipe.model, ranks=2)
    assert any("paged_adamw_8bit" in one for one in alone)
    assert any("fsdp2_8gpu.yaml" in one for one in alone)
    pissa = dataclasses.replace(full, tune=Lora(variant="pissa"))
    assert not any("quantize" in one for one in memory_remedies(pissa, tiny_recipe.model, ranks=1))
    for variables in (FSDP2, ZERO):
        with monkeypatch.context() as patched:
            _set(patched, variables)
            sharded = memory_remedies(full, tiny_recipe.model, ranks=2)
            assert not any("8bit" in one for one in sharded)
            assert "shard the model over more GPUs" in sharded


# -- the CPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("auto", False), ("fp32", False)])
def test_16_bits_on_a_cpu_are_said_to_be_slow(
    precision: Any, warned: bool, tiny_recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    stage = dataclasses.replace(tiny_recipe.stages[0], precision=precision)
    launch._report_slow.cache_clear()
    with caplog.at_level(logging.WARNING, "llavar_peft"):
        for _ in range(2):  # the command and the Trainer
            start_processes(dataclasses.replace(tiny_recipe, stages=(stage,)))
    assert len(caplog.records) == warned
    assert ("stages.0.precision=bf16: a CPU computes in 16 bits more slowly" in caplog.text) == warned


@pytest.mark.parametrize(("ranks", "workers"), [("1", 3), ("2", 1), ("8", 1)])
def test_image_workers_are_limited_to_the_cores_of_the_rank(
    ranks: str, workers: int, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_arguments, "usable_cores", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    stage = tiny_recipe.stages[0]
    for asked in (0, 4):
        chosen = dataclasses.replace(stage, data=dataclasses.replace(stage.data, workers=asked))
        found = training_arguments(tiny_recipe, chosen, tmp_path, ranks=1).dataloader_num_workers
        assert found == (workers if asked else 0)
