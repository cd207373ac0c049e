"""The estimates of memory and compute agree with what a run needs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavar_peft import Full, Lora, ModelConfig, Recipe, Tiles, cli
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.preflight.estimate_compute import measure_records
from llavar_peft.preflight.estimate_counts import count_parameters
from llavar_peft.preflight.estimate_memory import estimate_memory
from llavar_peft.preflight.estimate_stage import estimate_stage, what_would_help
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Tune

_TOKENS, _SUPERVISED = 1000, 1000 - 4 * 16
_LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "vocab_size": 8000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def middle(tmp_path: Path) -> ModelConfig:
    """Return a model of medium size that has configurations but no weights."""
    for name, described in (("llama", _LLAMA), ("clip", _CLIP)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    return ModelConfig(
        language_model=str(tmp_path / "llama"), vision_tower=str(tmp_path / "clip"), dtype="float32"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets its peak by /proc")
def test_estimated_peaks_agree_with_a_run(middle: ModelConfig, tiny_recipe: Recipe, tmp_path: Path) -> None:
    kinds: dict[str, tuple[Tune, bool]] = {
        "recomputing": (Full(), True),
        "lora": (Lora(rank=16, dropout=0.05), False),
    }
    stages = tuple(
        dataclasses.replace(tiny_recipe.stages[0], name=name, tune=tune, gradient_checkpointing=recompute)
        for name, (tune, recompute) in kinds.items()
    )
    recipe = dataclasses.replace(tiny_recipe, model=middle, stages=stages)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    # This allocator returns freed memory to the system: the rest is what PyTorch holds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fast_start", "tests.training.peak", str(tmp_path / "recipe.yaml"), str(_TOKENS)],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    measured = {name: int(peak) for name, peak in map(str.split, done.stdout.splitlines()[-len(stages) :])}
    config = config_without_weights(middle)
    estimated = {
        stage.name: estimate_memory(
            config, middle, stage, tokens=_TOKENS, supervised=_SUPERVISED, gpus=1, sharded=False
        ).peak
        for stage in stages
    }
    # Python and its libraries themselves allocate some tens of MB in the first steps.
    assert estimated == pytest.approx(measured, rel=0.15, abs=60e6)


def test_the_size_of_the_papers_model_is_derived_from_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "llavar-13b", "--gpus", "8", "--tflops", "150", "--json"]) == 0
    pretrain, finetune = json.loads(capsys.readouterr().out)
    # LLaMA-13B's 13,015,864,320 with three rows more in embeddings and head; the projector; in stage 1 two rows.
    assert finetune["trained"] == 13_015_864_320 + 2 * 3 * 5120 + 1024 * 5120 + 5120
    assert pretrain["trained"] == 1024 * 5120 + 5120 + 2 * 5120
    assert pretrain["steps"] is None  # its records do not exist
    assert set(pretrain["lengths"]) == {"records", "mean", "longest", "squares", "pictures"}  # as in version 0.1
    # Three times two for each weight and token, and a fourth time, because activations are recomputed.
    assert finetune["step_flops"] == pytest.approx(8 * 12.7e9 * 32 * 2048, rel=0.1)
    assert finetune["step_seconds"] == pytest.approx(finetune["step_flops"] / (8 * 150e12))
    # At the peak, the gradients of the first layer and of the embeddings do not exist yet.
    assert 25.5 < sum(finetune["memory"][part] for part in ("weights", "gradients", "optimizer")) / 1e9 < 26.5


@pytest.mark.slow
def test_settings_that_make_a_stage_fit_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("llavar-13b", [], preset="lora")
    stage = recipe.stages[-1]
    limit = 15 * 2**30
    assert estimate_stage(recipe.model, stage).memory.peak > limit
    *before, (last, peak) = what_would_help(recipe.model, stage, limit=limit)
    assert peak <= limit
    assert last == "model.quantize: nf4"
    assert all(more > limit for _, more in before)
    assert cli.main(["estimate", "llavar-13b", "--preset", "lora", "--memory", "16"]) == 0
    estimated = capsys.readouterr().out
    assert "finetune: does not fit in 16 GiB" in estimated
    assert "model.quantize: nf4" in estimated


def test_steps_and_lengths_are_those_of_the_records(tiny_recipe: Recipe) -> None:
    one = estimate_stage(tiny_recipe.model, tiny_recipe.stages[0])
    assert one.lengths.records == 18
    assert one.steps == 4  # 16 of them, four at a time
    assert one.lengths.mean <= one.lengths.longest == one.pass_tokens / 2
    assert count_parameters(config_without_weights(tiny_recipe.model), Full()).whole == one.parameters


def test_a_model_that_cannot_pack_has_passes_of_whole_micro_batches() -> None:
    """SDPA does not cap Gemma 2's attention scores, and eager attention does not support packed rows."""
    capped, plain = (
        estimate_stage(recipe.model, recipe.stages[0])
        for name in ("google/gemma-2-2b-it", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
        for recipe in [load_recipe("smollm2-1.7b", [f"model.language_model={name}"])]
    )
    assert (capped.pass_tokens, plain.pass_tokens) == (8 * 2048, 4096)
    scores = 8 * 8 * 2048**2 * 2  # heads, rows, positions, bytes; several of them exist at once
    assert capped.memory.activations > 3 * scores


def test_a_model_of_unknown_size_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "llavar-13b", "model.language_model=owner/some-llama"]) == 2
    assert "the name contains no size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resolution", "most", "tokens", "views"),
    [
        (None, 4096, 576, 1),
        (Tiles(max_tiles=4), 4096, 576 + 96 * 25, 5),
        (Tiles(max_tiles=4), 2048, 1776, 3),  # the largest grid that fits
        (Tiles(max_tiles=4, max_image_tokens=1200), 4096, 1176, 2),
        (Tiles(grid=((3, 3),), pool=2), 4096, 144 + 36 * 37, 10),
    ],
)
def test_tiles_are_counted_as_the_processor_counts_them(
    resolution: Tiles | None, most: int, tokens: int, views: int
) -> None:
    model = ModelConfig(language_model="vicuna-13b", vision_tower="clip-vit-large-patch14-336", resolution=resolution)
    stage = dataclasses.replace(load_recipe("llavar-13b").stages[0], max_length=most)
    found = estimate_stage(model, stage)
    assert (found.image_tokens, found.lengths.image_tokens, found.lengths.views) == (tokens, tokens, views)
    config = config_without_weights(model)
    counts = count_parameters(config, stage.tune)
    assert counts.projector == 1024 * 5120 + 5120 * (2 if resolution else 1)


def test_images_of_a_record_share_the_limit_of_image_tokens(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "Yes."}]
    record = {"id": "1", "image": ["a.png", "b.png"], "conversations": said}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    stage = load_recipe("llavar-13b").stages[0]
    data = dataclasses.replace(stage.data, records=str(tmp_path / "records.json"))
    stage = dataclasses.replace(stage, data=data, max_length=8192)
    for limit, tokens, views in (
        (None, 2 * 2976, 10),
        (2 * 2976, 2 * 2976, 10),
        (2 * 2976 - 1, 2 * 2928, 10),
        (2400, 2352, 4),
    ):
        model = ModelConfig(
            language_model="vicuna-13b", vision_tower="clip-vit-large-patch14-336",
            resolution=Tiles(max_tiles=4, max_image_tokens=limit),
        )  # fmt: skip
        lengths = measure_records(stage, config_without_weights(model))
        assert (lengths.image_tokens, lengths.views) == (tokens, views)


@pytest.mark.parametrize(
    ("setting", "tokens", "listed"),
    [
        ("{type: tiles}", 2376, "1: 1,176, 2: 1,752-1,776, 3: 2,328-2,376, 4: 2,904-2,976."),
        ("{type: tiles, pool: 2, max_image_tokens: 450}", 444, "1: 300, 2: 444-456, 3: 588-612, 4: 732-768."),
        ("{type: tiles, max_tiles: 64}", 2376, "1: 1,176, 2: 1,752-1,776, 3: 2,328-2,376, 4: 2,904-2,976, 5: 3,480-"),
    ],
)
def test_the_tokens_of_each_grid_are_printed(
    setting: str, tokens: int, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    most = ["stages.0.max_length=2500", "stages.1.max_length=2500"]
    assert cli.main(["estimate", "llavar-7b", f"model.resolution={setting}", *most]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"An image takes {tokens} tokens." in said
    assert f"Its tokens by its tiles: {listed}" in said
    assert "no room" not in said


def test_a_length_without_room_for_an_image_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    setting = ["model.resolution={type: tiles, grid: [2, 2]}", "stages.1.max_length=2929"]
    assert cli.main(["estimate", "llavar-7b", *setting]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pretrain: max_length (1,024) has no room for an image, which takes at least 2,928 tokens" in said
    assert said.count("no room") == 1


def test_the_size_of_llava_next_is_known() -> None:
    config = config_without_weights(ModelConfig(checkpoint="llava-hf/llava-v1.6-vicuna-7b-hf"))
    assert config.tiles is not None
    assert config.tiles.grids == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    plain = config_without_weights(ModelConfig(checkpoint="llava-hf/llava-1.5-7b-hf"))
    ours, theirs = (count_parameters(one, Full()).whole for one in (config, plain))
    assert ours == theirs + 4096
