"""What keeps vLLM from loading an adapter, and adapters split into a base and a pure LoRA (``adapter bake``).

The commands of docs/adapters.md train with the preset ``lora-vllm`` and verify the result.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavar_peft import ModelConfig, bake_adapter, build_model, cli, export, merge_adapter
from llavar_peft.errors import ConfigError, InterruptedRunError, LlavarError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.tuning import merge_tuning
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.adapter.vllm_rules import RANKS, check_for_vllm
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

WHOLE = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True, tower_rank=2)
PURE = Lora(rank=4, alpha=8, dropout=0.0, train_projector=False, train_image_rows=False)
PARTS = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
IDS = torch.tensor([[1, 40, 41, 861, 42, 43, 862, 44]])
TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVAR in fp32, ``base``; an adapter with everything, ``whole``, and one that vLLM loads, ``pure``."""
    folder = tmp_path_factory.mktemp("adapters")
    model, processor = build_model(PARTS)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    base = ModelConfig(checkpoint=str(folder / "base"), dtype="float32")
    save_moved_adapter(folder / "whole", base, WHOLE)
    save_moved_adapter(folder / "pure", base, PURE)
    return folder


@pytest.fixture(scope="module")
def baked(folder: Path) -> Path:
    report = bake_adapter(folder / "base", folder / "whole", folder / "baked")
    assert report.gap is not None
    assert (report.gap.relative, report.updates) == (0.0, 28)
    assert not [name for name in report.baked if "language_model.layers" in name]
    return report.out


def _logits(base: Path, adapter: Path | None) -> Tensor:
    chat = load_chat(base, adapter=adapter, dtype="float32")
    with torch.no_grad():
        logits: Tensor = chat.engine.model(input_ids=IDS).logits
    return logits


def _rejected(folder: Path, *messages: str) -> None:
    found = "\n".join(map(str, check_for_vllm(folder).faults))
    assert len(check_for_vllm(folder).faults) == len(messages), found
    for message in messages:
        assert message in found


# -- what vLLM rejects -----------------------------------------------------------------


def test_an_adapter_of_the_language_model_alone_is_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_for_vllm(folder / "pure").faults == ()
    assert cli.main(["adapter", "verify", str(folder / "pure"), "--for", "vllm"]) == 0
    assert "--enable-lora --max-lora-rank 8 --lora-modules NAME=" in capsys.readouterr().out
    assert cli.main(["adapter", "verify", str(folder / "pure"), "--for", "vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vllm"] == {"max_lora_rank": 8}
    assert cli.main(["adapter", "verify", str(folder / "pure"), "--for", "sglang"]) == 2
    (spaced := folder / "my pure").symlink_to(folder / "pure")
    assert cli.main(["adapter", "verify", str(spaced), "--for", "vllm"]) == 0
    assert f"--lora-modules 'NAME={spaced}'\n" in capsys.readouterr().out


def test_all_reasons_are_given_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rejected(
        folder / "whole",
        "does not load tensors that were trained in full (got model.multi_modal_projector.bias, ",
        "does not load trained rows of the embeddings",
        "leaves out updates outside the language model and answers without them (got model.vision_tower.",
    )
    assert cli.main(["adapter", "verify", str(folder / "whole"), "--for", "vllm"]) == 2
    shown = capsys.readouterr().err
    assert "as it was trained: 3 problems" in shown
    assert f"llavar-peft adapter bake {folder / 'whole'} --base {folder / 'base'} --out OUT" in shown


SETTINGS: dict[str, dict[str, Any]] = {
    "vLLM has no DoRA": {"use_dora": True},
    "vLLM has no biases of updates": {"lora_bias": True},
    "vLLM has no activated LoRA": {"alora_invocation_tokens": [1]},
    "vLLM has no replicated layers": {"layer_replication": [[0, 2]]},
    "vLLM has no block-diagonal LoRA": {"use_bdlora": {"nblocks": 2}},
    "vLLM has no QALoRA": {"use_qalora": True},
    "vLLM does not load biases of the base": {"bias": "all"},
    "initial values changed the base (got 'pissa_niter_4')": {"init_lora_weights": "pissa_niter_4"},
    "vLLM's largest rank is 512 (got 600)": {"r": 600},
    "vLLM loads LoRA only (got peft_type 'LOHA')": {"peft_type": "LOHA", "r": "four"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_vllm_rejects(message: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "pure", tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, **SETTINGS[message]}))
    _rejected(copy, message)


def test_names_that_vllm_does_not_apply(folder: Path, tmp_path: Path) -> None:
    """Those of LLaVA's code are read without an error, and change nothing; those of peft < 0.7 are rejected."""
    copy = shutil.copytree(folder / "pure", tmp_path / "copy")
    (copy / "weights_checksums.json").unlink()
    tensors = load_file(copy / "adapter_model.safetensors")
    ours = "base_model.model.model.language_model.layers."
    for other, messages in (
        ("base_model.model.model.layers.", ("vLLM does not find the layers of these names",)),
        ("base_model.model.language_model.model.layers.", ()),
    ):
        renamed = {name.replace(ours, other): tensor for name, tensor in tensors.items()}
        save_file(renamed, copy / "adapter_model.safetensors")
        _rejected(copy, *messages)
    joined = {name.replace(".q_proj.", ".qkv_proj."): tensor for name, tensor in tensors.items()}
    save_file(joined, copy / "adapter_model.safetensors")
    _rejected(copy, "not of a joint qkv_proj")
    old = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(old, copy / "adapter_model.safetensors")
    _rejected(copy, "vLLM does not find the layers of these names")


def test_no_fix_that_does_not_help_is_given(folder: Path, tmp_path: Path) -> None:
    """DoRA cannot be split; and no engine has the cross-attention that is left in a base."""
    for name, changes in (("adapter_config.json", {"use_dora": True}), ("config.json", None)):
        copy = shutil.copytree(folder / ("whole" if changes else "pure"), tmp_path / name)
        settings = json.loads((copy / name).read_text())
        settings |= changes or {"resolution": {"type": "cross_attention"}}
        (copy / name).write_text(json.dumps(settings))
    assert "adapter bake" not in "\n".join(map(str, check_for_vllm(tmp_path / "adapter_config.json").faults))
    _rejected(tmp_path / "config.json", "config.json:resolution: vLLM has no cross-attention")


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (4, 8), (64, 64), (65, 128), (321, 512)])
def test_the_rank_to_serve_with(rank: int, expected: int, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "pure", tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, "r": rank}))
    assert check_for_vllm(copy).max_lora_rank == expected
    assert expected in RANKS
    pattern = {"r": 1, "rank_pattern": {"a_layer_that_it_lacks": rank}}
    (copy / "adapter_config.json").write_text(json.dumps({**settings, **pattern}))
    assert check_for_vllm(copy).max_lora_rank == expected


# -- adapter bake ----------------------------------------------------------------------


def test_base_and_lora_are_the_model_that_base_and_adapter_were(folder: Path, baked: Path) -> None:
    whole = load_chat(folder / "base", adapter=folder / "whole", dtype="float32").engine.model
    with torch.no_grad():
        assert _logits(baked, baked / "adapter").equal(whole(input_ids=IDS).logits)
    merged = merge_tuning(whole).state_dict()
    before, after = dict(open_weights(folder / "base")), dict(open_weights(baked))
    assert set(before) == set(after)
    for name, tensor in after.items():
        if "language_model.layers" in name:
            assert tensor.equal(before[name]), name
        else:  # with the updates of the tower, which are computed in float32 here and there
            assert torch.allclose(tensor, merged[name], atol=1e-6), name
    assert not after[f"{PROJECTOR}weight"].equal(before[f"{PROJECTOR}weight"])
    changed = [name for name in after if name.startswith(TOWER) and not after[name].equal(before[name])]
    assert len(changed) == 12  # six layers in each of the two blocks that are computed


def test_the_lora_is_a_whole_adapter_that_vllm_loads(folder: Path, baked: Path) -> None:
    assert check_for_vllm(baked / "adapter").faults == ()
    assert cli.main(["adapter", "verify", str(baked / "adapter"), "--for", "vllm", "--base", str(baked)]) == 0
    given, left = (load_file(one / "adapter_model.safetensors") for one in (folder / "whole", baked / "adapter"))
    assert set(left) == {name for name in given if "language_model.layers" in name}
    assert all(tensor.equal(given[name]) for name, tensor in left.items())
    # The folder names its base.
    assert load_chat(baked / "adapter", dtype="float32").adapters == ("adapter",)
    with pytest.raises(WeightsError, match="not the base that"):
        load_chat(folder / "base", adapter=baked / "adapter", dtype="float32")


def test_a_plain_language_model_becomes_a_whole_base(tmp_path: Path) -> None:
    tune = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True, variant="rslora")
    wrapped = save_moved_adapter(tmp_path / "whole", PARTS, tune)
    bake_adapter(LANGUAGE_MODEL, tmp_path / "whole", tmp_path / "baked", dtype="float32")
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
    assert torch.allclose(_logits(tmp_path / "baked", tmp_path / "baked/adapter"), expected, atol=1e-5)


def test_a_base_of_stock_transformers_in_bfloat16(tmp_path: Path) -> None:
    """It keeps its layout, which vLLM serves, and what was trained is rounded once."""
    parts = dataclasses.replace(PARTS, projector_type="mlp2x_gelu")
    model, processor = build_model(parts)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "stock", to="hf-llava", dtype="bfloat16")
    base = ModelConfig(checkpoint=str(tmp_path / "stock"), dtype="float32")
    save_moved_adapter(tmp_path / "whole", base, Lora(rank=4, alpha=8, dropout=0.0))
    report = bake_adapter(tmp_path / "stock", tmp_path / "whole", tmp_path / "baked")
    assert report.gap is not None
    assert 0 < report.gap.relative < 0.01  # of the logits' standard deviation
    before, after = dict(open_weights(tmp_path / "stock")), dict(open_weights(tmp_path / "baked"))
    trained = load_file(tmp_path / "whole/adapter_model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    for name in changed:
        ours = "base_model.model.model." + name.removeprefix("model.")
        assert after[name].equal(trained[ours].bfloat16())
    assert json.loads((tmp_path / "baked/config.json").read_text())["model_type"] == "llava"
    assert check_for_vllm(tmp_path / "baked/adapter").faults == ()
    assert load_chat(tmp_path / "baked/adapter").adapters == ("adapter",)


def test_an_adapter_of_a_quantized_base_keeps_its_quantization(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "whole", tmp_path / "copy")
    known = json.loads((copy / "base.json").read_text())
    (copy / "base.json").write_text(json.dumps({**known, "quantize": "nf4"}))
    bake_adapter(folder / "base", copy, tmp_path / "baked", probe=False)
    assert json.loads((tmp_path / "baked/adapter/base.json").read_text())["quantize"] == "nf4"
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    assert dict(open_weights(tmp_path / "baked"))[name].equal(dict(open_weights(folder / "base"))[name])
    assert check_for_vllm(tmp_path / "baked/adapter").quantize == "nf4"


def _quantized(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))


def _other_values(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.language_model.layers.0.mlp.down_proj.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("adapter", "change", "error", "message"),
    [
        ("pure", None, ConfigError, "nothing to write into a base: .* Fix: use the adapter as it is"),
        ("dora", None, ConfigError, r"DoRA does not become a plain LoRA.* Fix: merge it as a whole"),
        ("nowhere", None, ConfigError, "no such folder"),
        ("base", None, ConfigError, r"no adapter_config\.json in this folder"),
        ("whole", _quantized, ConfigError, "stored quantized .* Fix: give the same base without quantization"),
        ("whole", _other_values, WeightsError, r"not the base that .*layers\.0\.mlp\.down_proj\.weight"),
        ("whole", "exists", ConfigError, "exists already"),
        ("whole", "inside", ConfigError, "is in the folder that it is made from"),
    ],
)
def test_nothing_is_written_of_what_cannot_be_split(
    adapter: str,
    change: Callable[[Path], None] | str | None,
    error: type[LlavarError],
    message: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    base, given, out = folder / "base", folder / adapter, tmp_path / "out/baked"
    if callable(change):
        change(base := shutil.copytree(base, tmp_path / "base"))
    elif change == "exists":
        out.mkdir(parents=True)
    elif change == "inside":
        out = shutil.copytree(given, given := tmp_path / "whole") / "baked"
    if adapter == "dora":
        given = tmp_path / "dora"
        tune = Lora(rank=4, alpha=8, dropout=0.0, variant="dora")
        save_moved_adapter(given, ModelConfig(checkpoint=str(base), dtype="float32"), tune)
    with pytest.raises(error, match=message):
        bake_adapter(base, given, out)
    assert not out.exists() or not list(out.iterdir())
    assert not [path for path in out.parent.glob(".*") if path.is_dir()]


def test_other_logits_are_not_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(folder / "base"), "--out", str(tmp_path / "baked"), "--dtype", "bfloat16"]
    assert cli.main(["adapter", "bake", str(folder / "whole"), *words, "--bound", "1e-9"]) == 2
    assert "not written: base and LoRA have other logits" in capsys.readouterr().err
    assert not list(tmp_path.glob("*baked*/*"))


def test_an_interrupted_command_resumes_and_does_not_take_over_a_merge(
    folder: Path, baked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        merge_adapter(folder / "base", folder / "whole", out, progress=interrupt)
    seen: list[int] = []
    with pytest.raises(InterruptedRunError):
        bake_adapter(folder / "base", folder / "whole", out, progress=interrupt)
    bake_adapter(folder / "base", folder / "whole", out, progress=lambda done, _: seen.append(done))
    assert min(seen) > sum(one.nbytes for one in open_weights(out).values()) / 2  # the second call continued the first
    expected, got = dict(open_weights(baked)), dict(open_weights(out))
    assert all(tensor.equal(got[name]) for name, tensor in expected.items())
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == (
        baked / "adapter/adapter_model.safetensors"
    ).read_bytes()
