"""The peak of a GPU's memory in whole training steps on fake tensors: what fits, and that ``estimate`` agrees."""

from __future__ import annotations

import dataclasses
import os
from functools import cache

import pytest

from llavar_peft import DataConfig, Full, Lora, OptimConfig, Projector, Stage, Tiles
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.preflight.estimate_counts import count_parameters, count_trained
from llavar_peft.preflight.estimate_memory import Memory, estimate_memory
from llavar_peft.recipe.schema import Tune
from tests.gpu_sim.fake_training import Case, track_layers, track_peak, track_peaks

_GIB = 2**30
_LORA = Lora(rank=64, alpha=128.0, dropout=0.05, train_image_rows=False)
TARGETS = {
    "7B QLoRA": (Case("7b", _LORA, "nf4", accumulation=2), 9),
    "13B QLoRA": (Case("13b", _LORA, "nf4", accumulation=2), 16),
    "7B full on one H200": (Case("7b", Full(), accumulation=2), 141e9 / _GIB),
    "13B full on 8 GPUs of 80 GB, with room": (Case("13b", Full(), gpus=8, records=4), 40),
}
"""Cases and the GiB that they must stay under, of which CUDA itself takes about one."""

OTHERS = {
    "stage 1": Case("13b", Projector()),
    "stage 1, activations kept": Case("7b", Projector(), recompute=False),
    "stage 1 on 8, activations kept": Case("13b", Projector(), gpus=8, recompute=False),
    "full, activations kept, on 8": Case("13b", Full(), gpus=8, recompute=False),
    "full on 2 x 8": Case("13b", Full(), gpus=16),
    "LoRA": Case("7b", _LORA),
    "LoRA, activations kept": Case("7b", _LORA, recompute=False),
    "LoRA on 8, activations kept": Case("7b", _LORA, gpus=8, recompute=False),
    "QLoRA on 2 x 8": Case("13b", _LORA, "nf4", gpus=16),
    "int8": Case("7b", _LORA, "int8", recompute=False),
}


_SO400M = "google/siglip2-so400m-patch14-384"
_BASE = "google/siglip2-base-patch16-384"
OTHER_MODELS = {
    "Qwen 2.5, QLoRA": Case("Qwen/Qwen2.5-7B-Instruct", _LORA, "nf4", records=4, accumulation=2, vision_tower=_SO400M),
    "SmolLM 2, full": Case("HuggingFaceTB/SmolLM2-1.7B-Instruct", Full(), accumulation=2, vision_tower=_BASE),
    "Gemma 2, LoRA, scores kept": Case("google/gemma-2-2b-it", _LORA, recompute=False, vision_tower=_SO400M),
    "Phi 3, int8": Case("microsoft/Phi-3-mini-4k-instruct", _LORA, "int8", recompute=False, vision_tower=_BASE),
}
"""Other shapes: grouped queries, fused layers, tied embeddings, large vocabularies, capped logits and scores."""
MANY_LAYERS = {
    **OTHER_MODELS,
    "Qwen 2.5, projector": Case("Qwen/Qwen2.5-7B-Instruct", Projector(), records=4, vision_tower=_SO400M),
    "Qwen 3, LoRA": Case("Qwen/Qwen3-4B-Instruct-2507", _LORA, vision_tower=_SO400M),
    "Qwen 3, LoRA, activations kept": Case("Qwen/Qwen3-4B", _LORA, recompute=False, vision_tower=_SO400M),
    "Qwen 3, full": Case("Qwen/Qwen3-4B", Full(), accumulation=2, vision_tower=_SO400M),
    "Qwen 3, full on 8": Case("Qwen/Qwen3-4B", Full(), gpus=8, vision_tower=_SO400M),
    "Llama 3.2, full": Case("meta-llama/Llama-3.2-3B-Instruct", Full(), vision_tower=_SO400M),
    "Llama 3.2, LoRA": Case("meta-llama/Llama-3.2-3B-Instruct", _LORA, records=4, vision_tower=_SO400M),
    "SmolLM 2, projector": Case("HuggingFaceTB/SmolLM2-1.7B-Instruct", Projector(), records=8, vision_tower=_BASE),
    "Gemma 2, LoRA": Case("google/gemma-2-2b-it", _LORA, records=2, vision_tower=_SO400M),
    "Gemma 2, full": Case("google/gemma-2-2b-it", Full(), vision_tower=_SO400M),
    "Phi 3, full": Case("microsoft/Phi-3-mini-4k-instruct", Full(), vision_tower=_SO400M),
}


_ALL = os.environ.get("LLAVAR_ESTIMATE") == "all"
_ONLY_ALL = pytest.mark.skipif(not _ALL, reason="takes minutes; LLAVAR_ESTIMATE=all runs it")
_FITTING = ("13B QLoRA", "13B full on 8 GPUs of 80 GB, with room")
_ALWAYS = ("LoRA, activations kept", "int8")
_SMALL = ("SmolLM 2, full", "Phi 3, int8")


@cache
def _tracked(case: Case) -> float:
    return track_peak(case)


def _estimated(case: Case, *, layers: int | None = None) -> Memory:
    config = config_without_weights(case.model)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    stage = Stage(
        name="stage",
        data=DataConfig(records="records.json"),
        tune=case.tune,
        optim=OptimConfig(learning_rate=1e-4),
        global_batch_size=case.records * case.gpus * case.accumulation,
        micro_batch_size=case.records,
        precision="bf16",
        gradient_checkpointing=case.recompute,
    )
    return estimate_memory(
        config, case.model, stage, tokens=sum(case.lengths), supervised=case.supervised, gpus=case.gpus,
        sharded=case.gpus > 1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS if _ALL else _FITTING)
def test_the_recipes_fit(name: str) -> None:
    case, limit = TARGETS[name]
    assert _tracked(case) < (limit - 1) * _GIB
    assert _estimated(case).peak == pytest.approx(_tracked(case), rel=0.1), _estimated(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS if _ALL else _ALWAYS)
def test_the_estimate_agrees_with_the_tracker(name: str) -> None:
    case = OTHERS[name]
    assert _estimated(case).peak == pytest.approx(_tracked(case), rel=0.1), _estimated(case)


def test_a_short_qlora_fits_and_the_estimate_agrees() -> None:
    """The one test of this file that takes only a few seconds."""
    case = Case("7b", _LORA, "nf4")
    peaks = track_layers(case, 2)
    assert _estimated(case, layers=2).peak == pytest.approx(max(peaks.values()), rel=0.1)


@pytest.mark.parametrize("name", OTHER_MODELS if _ALL else _SMALL)
def test_the_estimate_agrees_for_other_models(name: str) -> None:
    """With two layers, whose weight in the peak is small: the embeddings, the logits and the tower are whole."""
    case = OTHER_MODELS[name]
    peaks = track_layers(case, 2)
    assert _estimated(case, layers=2).peak == pytest.approx(max(peaks.values()), rel=0.05), peaks


@pytest.mark.slow
@_ONLY_ALL
@pytest.mark.parametrize("name", MANY_LAYERS if _ALL else ["all"])
def test_the_estimate_agrees_for_other_models_with_all_layers(name: str) -> None:
    case = MANY_LAYERS[name]
    estimated, tracked = _estimated(case).peak, _tracked(case)
    print(f"{name}: estimated {estimated / _GIB:.2f} GiB, tracked {tracked / _GIB:.2f} GiB")  # noqa: T201 - with -s
    assert estimated == pytest.approx(tracked, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tune",
    [
        pytest.param(Projector(), marks=_ONLY_ALL, id="projector"),
        pytest.param(_LORA, id="lora"),
        pytest.param(Full(train_tower=True), marks=_ONLY_ALL, id="tower"),
    ],
)
def test_tiles_are_part_of_the_estimate(tune: Tune) -> None:
    """Three tiles and the whole image are four images of the tower."""
    case = Case("7b", tune, records=2, tiles=Tiles(grid=((1, 3),), pool=2))
    peak = max(track_layers(case, 2).values())
    assert _estimated(case, layers=2).peak == pytest.approx(peak, rel=0.1), _estimated(case, layers=2)


@pytest.mark.slow
def test_a_trained_tower_is_part_of_the_estimate() -> None:
    case = Case("7b", Full(train_tower=True))
    peak = max(track_layers(case, 2).values())
    assert _estimated(dataclasses.replace(case, tune=Full()), layers=2).peak < 0.85 * peak
    assert _estimated(case, layers=2).peak == pytest.approx(peak, rel=0.1), _estimated(case, layers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("7b", Projector(), records=4, accumulation=2), id="projector"),
        pytest.param(Case("7b", _LORA, "nf4"), marks=_ONLY_ALL, id="QLoRA"),
        pytest.param(Case("7b", Full(), gpus=8), id="full on 8"),
        pytest.param(Case("7b", _LORA, recompute=False), marks=_ONLY_ALL, id="LoRA, activations kept"),
    ],
)
def test_cross_attention_is_part_of_the_estimate(case: Case) -> None:
    crossed = dataclasses.replace(case, crops=4, vision_tower="openai/clip-vit-large-patch14")
    peaks = track_layers(crossed, 4)
    assert _estimated(crossed, layers=4).peak == pytest.approx(max(peaks.values()), rel=0.1), peaks


@pytest.mark.slow
@_ONLY_ALL
def test_two_short_models_give_the_peaks_of_a_longer_one() -> None:
    case = Case("7b", Projector(), gpus=8, recompute=False)
    assert track_layers(case, 12) == pytest.approx(track_peaks(case, 12), rel=0.001)


@pytest.mark.slow
def test_fused_adamw_needs_no_memory_of_its_own() -> None:
    fused = Case("7b", Full())
    config = config_without_weights(fused.model)
    config.text_config.num_hidden_layers = 2
    trained = count_trained(config, fused.tune, count_parameters(config, fused.tune))
    peaks, unfused = (track_layers(dataclasses.replace(fused, fused=value), 2) for value in (True, False))
    assert unfused["optimizer"] - peaks["optimizer"] == pytest.approx(4 * trained, rel=0.01)
