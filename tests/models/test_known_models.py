"""The sizes of models that are not on this disk are those that were published, and unknown ones are not guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import Full, ModelConfig, cli
from llavar_peft.errors import ConfigError
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.preflight.estimate_counts import count_parameters

CLIP = "openai/clip-vit-large-patch14-336"
# Parameters with tied embeddings counted once. Source: the models' pages on the hub, from their safetensors files.
PUBLISHED = {
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "google/gemma-2-2b-it": 2_614_341_888,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
}
# Rows of the embeddings where the image token needs a new one.
PUBLISHED_ROWS = {
    "meta-llama/Llama-3.2-3B-Instruct": 128256, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 49152,
    "google/gemma-2-2b-it": 256000,
}  # fmt: skip
# Row of the image token, and rows of the embeddings: a spare one where the tokenizer has fewer tokens.
ROWS = {
    "Qwen/Qwen2.5-7B-Instruct": (151665, 152064),
    "meta-llama/Llama-3.2-3B-Instruct": (128256, 128257),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (49152, 49153),
    "lmsys/vicuna-7b-v1.1": (32000, 32003),
}
TOWERS = {CLIP: (303_507_456, 576), "google/siglip2-so400m-patch14-384": (428_225_600, 729)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_the_published_ones(name: str) -> None:
    config = config_without_weights(ModelConfig(language_model=name))
    counts = count_parameters(config, Full())
    matrices = 1 if config.tie_word_embeddings else 2
    new_rows = max(0, config.image_token_index + 1 - PUBLISHED_ROWS.get(name, 1 << 62))
    added = matrices * new_rows * config.text_config.hidden_size
    assert counts.linear + counts.norms + counts.head - added == PUBLISHED[name]


def test_llava_1_5_has_its_published_size_and_projector() -> None:
    config = config_without_weights(ModelConfig(checkpoint="llava-hf/llava-1.5-7b-hf"))
    assert count_parameters(config, Full()).whole == 7_063_427_072
    assert (config.image_token_index, config.projector_hidden_act, config.use_im_start_end) == (32000, "gelu", False)


@pytest.mark.parametrize("name", ROWS)
def test_the_image_token_takes_a_spare_row_or_a_new_one(name: str) -> None:
    config = config_without_weights(ModelConfig(language_model=name))
    assert (config.image_token_index, config.text_config.vocab_size) == ROWS[name]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_have_their_published_sizes_and_numbers_of_patches(name: str) -> None:
    config = config_without_weights(ModelConfig(language_model="vicuna-7b", vision_tower=name))
    assert (count_parameters(config, Full()).tower, config.image_seq_length) == TOWERS[name]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"language_model": "mistralai/Mistral-7B-Instruct-v0.3"}, "model.language_model"),
        ({"language_model": "Qwen2.5-7B"}, "model.language_model"),
        ({"checkpoint": "llava-hf/llava-v1.6-mistral-7b-hf"}, "model.checkpoint"),
        ({"language_model": "vicuna-7b", "vision_tower": "facebook/dinov2-large"}, "model.vision_tower"),
        ({"language_model": "vicuna-7b", "vision_tower": "openai/clip-vit-base-patch32"}, "model.vision_tower"),
    ],
)
def test_a_name_that_states_another_kind_of_model_is_not_taken_for_a_llama_or_clip(
    settings: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError, match=r"not a folder, not in the hub's cache") as caught:
        config_without_weights(ModelConfig(**settings))
    (fault,) = caught.value.faults
    assert fault.where == where
    assert ("hf download" in fault.fix) == ("/" in settings[where.removeprefix("model.")])


def test_a_configuration_in_the_hub_s_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    described = {"model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 500}
    repository = tmp_path / "models--owner--small"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc/config.json").write_text(json.dumps(described))
    text = config_without_weights(ModelConfig(language_model="owner/small")).text_config
    assert (text.model_type, text.hidden_size, text.vocab_size) == ("mistral", 64, 501)


def test_estimate_prints_the_tokens_of_an_image_and_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "qwen3-4b-siglip2"]) == 0
    assert "Smallest common GPU: 16 GB. An image takes 729 tokens." in capsys.readouterr().out


def test_without_the_hub_a_dry_run_names_the_missing_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "Read."}, {"from": "gpt", "value": "STOP"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    data = [f"stages.{stage}.data.records={tmp_path / 'r.json'}" for stage in (0, 1)]
    images = [f"stages.{stage}.data.images={tmp_path}" for stage in (0, 1)]
    arguments = ["train", "qwen3-4b-siglip2", "--dry-run", *data, *images, f"output_dir={tmp_path / 'out'}"]
    assert cli.main(arguments) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: model.language_model: no such folder")
    assert "Qwen/Qwen3-4B-Instruct-2507" in error
    assert "Fix: give a folder" in error
    assert not (tmp_path / "out").exists()
