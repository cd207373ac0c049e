"""FSDP2 and ZeRO-3 on two processes give the losses and weights of one process, and do shard the parameters.

The processes have the environment that ``accelerate launch`` gives them for the files in ``examples/accelerate``, which
are tested this way. They run on CPUs, and compute in the formats that a run on GPUs uses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file

from llavar_peft import Lora, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from tests.training.sharded import TIME_LIMIT, ShardCounter, run

EXAMPLES = Path(__file__).parents[2] / "examples"
ENGINES = {"FSDP2": "fsdp2_8gpu.yaml", "ZeRO-3": "zero3_8gpu.yaml"}
LORA = Lora(rank=4, alpha=8, dropout=0.0)
# The losses of the first step and of later ones. ZeRO rounds trained weights to bf16 for the computation, FSDP2 and
# autocast in one process the same products.
TOLERANCES = {"FSDP2": (1e-4, 5e-3), "ZeRO-3": (1e-2, 1e-2)}


def _environment(example: str) -> dict[str, str]:
    """Return the environment that ``accelerate launch`` gives its processes for an example's file."""
    parsed = launch_command_parser().parse_args(["--config_file", str(EXAMPLES / "accelerate" / example), "train.py"])
    settings, defaults, _ = _validate_launch_command(parsed)
    if settings.use_deepspeed:
        settings.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, whole = prepare_deepspeed_cmd_env(settings)
    else:
        whole = prepare_multi_gpu_env(settings)
    given = {name: value for name, value in whole.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**given, "DS_ACCELERATOR": "cpu"}


def _write_records(tiny_recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write records of which every third has no image, and every third one of another shape; return data settings."""
    data = tiny_recipe.stages[0].data
    raw = json.loads(Path(str(data.records)).read_text())
    for number, record in enumerate(raw):
        if number % 3 == 0:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
        elif number % 3 == 1:
            image = Image.open(Path(str(data.images)) / record["image"]).convert("RGB")
            record["image"] = f"narrow-{number}.png"
            image.resize((image.width // 2, image.height)).save(folder / record["image"])
    (folder / "records.json").write_text(json.dumps(raw))
    return {"records": str(folder / "records.json"), "images": (str(data.images), str(folder))}


def _recipes(tiny_recipe: Recipe, engine: str, folder: Path) -> dict[str, Recipe]:
    """Return a recipe of both stages and an interrupted one in float32, and those in bf16."""
    fsdp = engine == "FSDP2"
    data = dataclasses.replace(tiny_recipe.stages[0].data, **_write_records(tiny_recipe, folder))
    one, two = (
        dataclasses.replace(
            stage, data=data, max_steps=2, micro_batch_size=1, probe=dataclasses.replace(stage.probe, images=1)
        )
        for stage in tiny_recipe.stages
    )
    lora = dataclasses.replace(two, tune=LORA, max_steps=3)
    half = dataclasses.replace(two, precision="bf16", gradient_checkpointing=True)
    if fsdp:
        passes = dataclasses.replace(
            half, global_batch_size=8, micro_batch_size=2, max_length=256, max_tokens=256, fp32_reduction=True
        )
        in_half = {"half": (passes, None), "quantized": (dataclasses.replace(half, tune=LORA), "nf4")}
    else:
        keep = dataclasses.replace(data, image_mode="keep")
        in_half = {"half": (dataclasses.replace(half, data=keep, micro_batch_size=2, tune=LORA), None)}
    base = dataclasses.replace(tiny_recipe, process_timeout=600)
    stored = dataclasses.replace(tiny_recipe.model, quantize="nf4" if fsdp else None)
    found = {
        "plain": dataclasses.replace(base, stages=(one, two)),
        "resumed": dataclasses.replace(base, stages=(lora,), model=stored),
    }
    for name, (stage, quantize) in in_half.items():
        model = dataclasses.replace(tiny_recipe.model, dtype="bfloat16", quantize=quantize)
        found[name] = dataclasses.replace(base, stages=(stage,), model=model)
    return found


def _launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, "-m", "tests.training.sharded", str(folder)],
        env={**os.environ, **environment}, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False,
        timeout=2 * TIME_LIMIT,
    )  # fmt: skip


def _losses(run_folder: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_folder / stage / "metrics.jsonl").read_text().splitlines()]


def _check_seen(seen: dict[str, Any], engine: str) -> None:
    # Generation before a stage's first step leaves the root's shards gathered until its first backward pass.
    assert all(0 < here <= 0.6 * whole for here, whole in seen["trained"][1:]), seen
    assert all(0 < here <= 0.6 * whole for here, whole in seen["frozen"][1::2]), seen
    assert seen["timeout"] == 600
    if engine == "FSDP2":
        # Without shards of the gradients from the first pass on, each rank holds those of the whole model.
        assert len(seen["gradients"]) > len(seen["trained"])
        assert seen["gradients"].count(0) == len(seen["trained"]), seen


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the launched ranks do: in bf16, sums of parts are rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_shards_equal_one_process(engine: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipes = _recipes(tiny_recipe, engine, tmp_path)
    for name, recipe in recipes.items():
        run(dataclasses.replace(recipe, output_dir=str(tmp_path / "whole" / name)), ShardCounter(None))
        sharded = dataclasses.replace(recipe, output_dir=str(tmp_path / "sharded" / name))
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(sharded))
    done = _launch(tmp_path, **_environment(ENGINES[engine]))
    assert done.returncode == 0, done.stderr[-5000:]
    for name, recipe in recipes.items():
        for rank in ("0", "1"):
            seen = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            _check_seen(seen, engine)
            # In bf16 a loss of 20 is a multiple of 0.125.
            assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in seen["losses"])
        for stage in recipe.stages:
            expected, found = (_losses(tmp_path / which / name, stage.name) for which in ("whole", "sharded"))
            first, later = (1e-5, 1e-5) if stage.precision == "fp32" else TOLERANCES[engine]
            assert found[0] == pytest.approx(expected[0], rel=first), name
            assert found == pytest.approx(expected, rel=later), name
    for file in ("plain/stage1/model/mm_projector.safetensors", "plain/model/model.safetensors"):
        _assert_close(tmp_path / "sharded" / file, tmp_path / "whole" / file, atol=1e-5)
    adapter = "adapter/adapter_model.safetensors"
    result = "quantized/" + adapter if "quantized" in recipes else "half/" + adapter
    for file, atol in (("resumed/" + adapter, 1e-5), (result, 5e-3)):
        _assert_close(tmp_path / "sharded" / file, tmp_path / "whole" / file, atol=atol)


def _assert_close(path: Path, other: Path, *, atol: float) -> None:
    ours, theirs = load_file(path), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=atol, rtol=10 * atol)


def test_all_fsdp_examples_give_the_environment_that_is_tested() -> None:
    expected = _environment(ENGINES["FSDP2"])
    assert expected["ACCELERATE_USE_FSDP"] == "true"
    assert expected["ACCELERATE_MIXED_PRECISION"] == "bf16"
    others = {path.name for path in (EXAMPLES / "accelerate").glob("*fsdp*.yaml")} - {ENGINES["FSDP2"]}
    assert others == {"fsdp2_2x8.yaml", "qlora_fsdp2_2gpu.yaml"}
    for example in others:
        assert _environment(example) == expected
    exported = re.findall(r"\b((?:ACCELERATE_USE|FSDP)_\w+)=(\w+)", (EXAMPLES / "slurm.sh").read_text())
    assert len(exported) >= 5
    assert {name: expected[name] for name, _ in exported} == dict(exported)
