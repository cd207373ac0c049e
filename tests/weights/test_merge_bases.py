"""Merging into a quantized base and into a plain language model, and the difference in logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavar_peft import ModelConfig, apply_delta, build_model, cli, make_delta, merge_adapter
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models import merge_logits_gap
from llavar_peft.models.probe_weights import UnmergedWeights
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.merge.merge_plan import plan_merge
from llavar_peft.weights.merge.merge_stream import MergedTensors
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

PARTS = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
WITH_ROWS = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True)
IDS = torch.tensor([[1, 40, 41, 858, 42, 43, 859, 44]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVAR of ours, in fp32."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model, processor = build_model(PARTS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


# -- a plain language model ------------------------------------------------------------


def test_an_adapter_of_a_plain_language_model_becomes_a_whole_model(tmp_path: Path) -> None:
    wrapped = save_moved_adapter(tmp_path / "adapter", PARTS, WITH_ROWS)
    report = merge_adapter(LANGUAGE_MODEL, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert report.gaps["result"].relative < 1e-5
    merged = load_chat(tmp_path / "merged", dtype="float32")
    assert torch.allclose(_logits(merged.engine.model), _logits(wrapped), atol=1e-4)
    expected = wrapped.get_base_model().model.multi_modal_projector.weight
    assert torch.equal(merged.engine.model.model.multi_modal_projector.weight, expected)
    assert merged.engine.processor.image_mode == "pad"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_an_adapter_of_a_plain_language_model_becomes_a_delta(variant: str, tmp_path: Path) -> None:
    """Adapter of a Vicuna, then delta to LLaMA, then applied: values and logits are those of the merged model."""
    tune = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True, variant=variant)  # type: ignore[arg-type]
    wrapped = save_moved_adapter(tmp_path / "adapter", PARTS, tune)
    make_delta(LANGUAGE_MODEL, LANGUAGE_MODEL, tmp_path / "delta", adapter=tmp_path / "adapter")
    apply_delta(LANGUAGE_MODEL, tmp_path / "delta", tmp_path / "applied")
    applied = load_chat(tmp_path / "applied", vision_tower=str(VISION_TOWER), dtype="float32")
    assert torch.allclose(_logits(applied.engine.model), _logits(wrapped), atol=0.1)
    assert _logits(applied.engine.model).argmax(-1).equal(_logits(wrapped).argmax(-1))
    merge_adapter(LANGUAGE_MODEL, tmp_path / "adapter", tmp_path / "merged", dtype="float16")
    merged, applied_weights = open_weights(tmp_path / "merged"), open_weights(tmp_path / "applied")
    assert {tensor_names.to_released(name) for name in merged} - {None} == set(applied_weights)
    for name, tensor in applied_weights.items():
        ours = merged[tensor_names.from_released(name) or ""]
        assert torch.allclose(tensor.float(), ours.float(), atol=2e-3), name
    config = json.loads((tmp_path / "delta/config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llava", 863)


@pytest.mark.slow
def test_a_stage_1_projector_belongs_to_the_base(checkpoint: Path, tmp_path: Path) -> None:
    """For an adapter that was trained on a base with a stage-1 file, the merge applies the file to the base again."""
    stage_1 = {
        "model.mm_projector.weight": torch.full((128, 192), 0.01),
        "model.mm_projector.bias": torch.full((128,), 0.5),
        "model.embed_tokens.weight": torch.full((2, 128), 0.25),
    }
    torch.save(stage_1, tmp_path / "mm_projector.bin")
    for base, source in ((PARTS, LANGUAGE_MODEL), (ModelConfig(checkpoint=str(checkpoint)), checkpoint)):
        config = ModelConfig(**{**base.__dict__, "projector": str(tmp_path / "mm_projector.bin"), "dtype": "float32"})
        folder = tmp_path / Path(source).name
        wrapped = save_moved_adapter(folder / "adapter", config, Lora(rank=4, train_projector=False, dropout=0.0))
        merge_adapter(source, folder / "adapter", folder / "merged", dtype="float32")
        merged = load_chat(folder / "merged", dtype="float32").engine.model
        assert torch.equal(merged.model.multi_modal_projector.bias, stage_1["model.mm_projector.bias"])
        assert torch.equal(merged.get_input_embeddings().weight[-2:], stage_1["model.embed_tokens.weight"])
        assert torch.allclose(_logits(merged), _logits(wrapped), atol=1e-4)
        (tmp_path / "mm_projector.bin").rename(tmp_path / "moved.bin")
        with pytest.raises(ConfigError, match=r"projector file of the adapter.s run does not exist.*--projector"):
            merge_adapter(source, folder / "adapter", folder / "again")
        merge_adapter(source, folder / "adapter", folder / "again", projector=tmp_path / "moved.bin", dtype="float32")
        (tmp_path / "moved.bin").rename(tmp_path / "mm_projector.bin")
        again = open_weights(folder / "again")
        assert all(torch.equal(tensor, again[name]) for name, tensor in open_weights(folder / "merged").items())


def test_a_plain_language_model_needs_tower_and_projector(tmp_path: Path) -> None:
    save_moved_adapter(tmp_path / "adapter", PARTS, Lora(rank=4, train_projector=False))
    with pytest.raises(WeightsError, match=r"no model\.multi_modal_projector\.weight"):
        merge_adapter(LANGUAGE_MODEL, tmp_path / "adapter", tmp_path / "out")
    save_moved_adapter(tmp_path / "other", PARTS, WITH_ROWS)
    with pytest.raises(ConfigError, match=r"no vision tower found"):
        merge_adapter(LANGUAGE_MODEL, tmp_path / "other", tmp_path / "out", vision_tower=tmp_path)
    assert not (tmp_path / "out").exists()


# -- a quantized base ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_merging_onto_the_dequantized_or_the_original_base(quantize: str, checkpoint: Path, tmp_path: Path) -> None:
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32", quantize=quantize)  # type: ignore[arg-type]
    wrapped = save_moved_adapter(tmp_path / "adapter", base, Lora(rank=4, alpha=8, dropout=0.0))
    trained = _logits(wrapped)
    difference = {}
    for onto in (None, "original", "dequantized"):
        report = merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / str(onto), onto=onto)  # type: ignore[arg-type]
        merged = _logits(load_chat(tmp_path / str(onto), dtype="float32").engine.model)
        difference[report.onto] = float((merged - trained).abs().max())
        assert report.gaps["result"].relative < (0.3 if report.onto == "original" else 1e-5)
    assert report.gaps["original"].relative > 1e-3
    # bitsandbytes rounds the activations of int8 too.
    assert difference["dequantized"] < (1e-3 if quantize == "nf4" else 0.3)
    assert quantize == "int8" or difference["original"] > 20 * difference["dequantized"]
    default, dequantized = open_weights(tmp_path / "None"), open_weights(tmp_path / "dequantized")
    assert all(torch.equal(tensor, dequantized[name]) for name, tensor in default.items())
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    for name in (tower, tensor_names.HEAD, tensor_names.EMBEDDINGS):
        assert torch.equal(default[name], open_weights(checkpoint)[name])
    described = json.loads((tmp_path / "None/merge.json").read_text())
    assert (described["onto"], described["trained_on"]["kind"]) == ("dequantized", quantize)
    assert described["logits_gap"]["original"]["relative"] == report.gaps["original"].relative


def test_a_delta_of_an_adapter_trained_on_4_bits(checkpoint: Path, tmp_path: Path) -> None:
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32", quantize="nf4")
    wrapped = save_moved_adapter(tmp_path / "adapter", base, Lora(rank=4, alpha=8, dropout=0.0))
    difference = {}
    for onto in ("dequantized", "original"):
        make_delta(LANGUAGE_MODEL, checkpoint, tmp_path / onto / "d", adapter=tmp_path / "adapter", onto=onto)  # type: ignore[arg-type]
        apply_delta(LANGUAGE_MODEL, tmp_path / onto / "d", tmp_path / onto / "applied")
        chat = load_chat(tmp_path / onto / "applied", vision_tower=str(VISION_TOWER), dtype="float32")
        difference[onto] = float((_logits(chat.engine.model) - _logits(wrapped)).abs().max())
    assert 0 < difference["dequantized"] < 0.1
    assert difference["original"] > 3 * difference["dequantized"]


@pytest.mark.slow
def test_dequantized_requires_a_quantized_base(checkpoint: Path, tmp_path: Path) -> None:
    save_moved_adapter(tmp_path / "adapter", ModelConfig(checkpoint=str(checkpoint)), Lora(rank=4))
    with pytest.raises(ConfigError, match="not trained on a quantized base"):
        merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out", onto="dequantized")
    base = ModelConfig(checkpoint=str(checkpoint), quantize="nf4", dtype="float32")
    save_moved_adapter(tmp_path / "other", base, Lora(rank=4))
    with pytest.raises(ConfigError, match="stored in different ways"):
        merge_adapter(checkpoint, [tmp_path / "adapter", tmp_path / "other"], tmp_path / "out")


# -- the probe ------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_probe_computes_the_logits_of_the_model(variant: str, checkpoint: Path, tmp_path: Path) -> None:
    """Logits computed from disk, block by block with an unmerged adapter, are those of peft's model."""
    tune = Lora(rank=4, alpha=8, dropout=0.0, variant=variant, train_image_rows=True)  # type: ignore[arg-type]
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    wrapped = save_moved_adapter(tmp_path / "adapter", base, tune)
    plan = plan_merge(checkpoint, tmp_path / "adapter")
    text, image_id = merge_logits_gap.read_config(plan.merged.base.config)
    got = merge_logits_gap.probe_logits(UnmergedWeights(plan.merged), text, IDS[0], image_id)
    assert torch.allclose(got, _logits(wrapped)[0], atol=1e-4)
    plain = merge_logits_gap.probe_logits(UnmergedWeights(MergedTensors(plan.merged.base, ())), text, IDS[0], image_id)
    assert not torch.allclose(got, plain, atol=1e-1)
    assert torch.allclose(plain, _logits(build_model(base)[0])[0], atol=1e-4)


@pytest.mark.slow
def test_a_result_that_differs_too_much_is_not_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    save_moved_adapter(tmp_path / "adapter", base, Lora(rank=4, alpha=8, dropout=0.0))
    arguments = ["merge", "--base", str(checkpoint), "--adapter", str(tmp_path / "adapter"), "--out"]
    assert cli.main([*arguments, str(tmp_path / "out"), "--dtype", "bfloat16", "--bound", "1e-5"]) == 2
    said = capsys.readouterr().err
    assert "the merge changes the logits too much" in said
    assert "--bound" in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert cli.main([*arguments, str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "of their spread" in capsys.readouterr().out
    assert cli.main([*arguments, str(tmp_path / "silent"), "--no-probe"]) == 0
    assert "of their spread" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_adapters_probed(checkpoint: Path, tmp_path: Path) -> None:
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    tunes = (Lora(rank=4, dropout=0.0), Lora(rank=2, dropout=0.0, variant="dora"))
    for number, tune in enumerate(tunes):
        save_moved_adapter(tmp_path / str(number), base, tune, seed=number)
    both = [tmp_path / "0", tmp_path / "1"]
    for name, weights in (("sequence", None), ("weighted", [0.5, -1.5])):
        report = merge_adapter(checkpoint, both, tmp_path / name, weights=weights)
        assert report.gaps["result"].relative < 1e-4


# -- other files ------------------------------------------------------------


def test_a_delta_has_the_tokenizer_that_the_original_reads(checkpoint: Path, tmp_path: Path) -> None:
    """Ours has a tokenizer.json; the original reads the base's tokenizer.model and a file with the image tokens."""
    llama = tmp_path / "llama"
    shutil.copytree(LANGUAGE_MODEL, llama)
    (llama / "tokenizer.model").write_bytes(b"the base's own")
    save_moved_adapter(tmp_path / "adapter", PARTS, WITH_ROWS)
    for name, target, adapter in (("ours", checkpoint, ()), ("plain", LANGUAGE_MODEL, tmp_path / "adapter")):
        make_delta(llama, target, tmp_path / name, adapter=adapter)
        assert (tmp_path / name / "tokenizer.model").read_bytes() == b"the base's own"
        added = json.loads((tmp_path / name / "added_tokens.json").read_text())
        assert added == {"<im_patch>": 860, "<im_start>": 861, "<im_end>": 862}
        assert (
            json.loads((tmp_path / name / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
        )
        assert not (tmp_path / name / "tokenizer.json").exists()
    make_delta(LANGUAGE_MODEL, LANGUAGE_MODEL, tmp_path / "neither", adapter=tmp_path / "adapter")
    assert "<im_patch>" in (tmp_path / "neither/tokenizer.json").read_text()
