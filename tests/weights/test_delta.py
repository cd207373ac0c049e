"""Making, applying and verifying deltas as the original does, and rejecting everything that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavar_peft import cli
from llavar_peft.errors import ConfigError, EnvironmentFaultError, InterruptedRunError, LlavarError, WeightsError
from llavar_peft.weights.delta.delta_files import apply_delta, make_delta
from llavar_peft.weights.delta.verify_delta import verify_delta
from llavar_peft.weights.io import folder_writer
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.tensor_table import CHECKSUMS_FILE
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE
from tests.weights.conftest import LLAMA, LLAVA, draw_llama, finetune, make_llava, write_folder
from tests.weights.killing import kill_twenty_times


def _original_delta(base: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a delta as LLaVAR, llava/model/make_delta.py, does."""
    delta = {name: tensor.clone() for name, tensor in target.items() if "inv_freq" not in name}
    for name, tensor in delta.items():
        if name in base:
            tensor[: base[name].shape[0]] -= base[name]
    return delta


def _same(folder: Path, expected: dict[str, Tensor]) -> bool:
    got = open_weights(folder)
    return set(got) == set(expected) and all(
        got[name].dtype == tensor.dtype and torch.equal(got[name].view(torch.int16), tensor.view(torch.int16))
        for name, tensor in expected.items()
    )


def _nothing_is_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_make_and_apply(
    form: str, base: Path, target: Path, tmp_path: Path, llama: dict[str, Tensor], llava: dict[str, Tensor]
) -> None:
    delta, again = tmp_path / "delta", tmp_path / "again"
    report = make_delta(base, target, delta, form=form, shard_size=100_000)
    expected = _original_delta(llama, llava)
    assert report.tensors == len(expected)
    assert _same(delta, expected)
    apply_delta(base, delta, again, form=form)
    for name, tensor in expected.items():
        if name in llama:
            tensor[: llama[name].shape[0]] += llama[name]
    assert _same(again, expected)


def test_folders_of_another_role_are_rejected(base: Path, target: Path, tmp_path: Path) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    make_delta(base, target, delta)
    for what, call in (
        ("the target is the base", lambda: make_delta(base, base, out)),
        ("a plain language model", lambda: make_delta(base, shutil.copytree(base, tmp_path / "copy"), out)),
        ("delta: a delta, expected complete weights", lambda: make_delta(base, delta, out)),
        ("delta: a delta, expected complete weights", lambda: make_delta(delta, target, out)),
        ("delta: a delta, expected complete weights", lambda: apply_delta(delta, delta, out)),
        ("llava: complete weights, expected a delta", lambda: apply_delta(base, target, out)),
    ):
        with pytest.raises(ConfigError, match=what):
            call()
        assert _nothing_is_left(out)


def test_the_files_are_those_of_the_released_delta(base: Path, target: Path, tmp_path: Path) -> None:
    make_delta(base, target, tmp_path / "delta", shard_size=150_000)
    files = sorted(path.name for path in (tmp_path / "delta").iterdir())
    shards = [name for name in files if name.endswith(".bin")]
    assert len(shards) > 1
    assert shards == [f"pytorch_model-{n:05d}-of-{len(shards):05d}.bin" for n in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "delta/pytorch_model.bin.index.json").read_text())
    held = {}
    for shard in shards:
        path = tmp_path / "delta" / shard
        assert zipfile.ZipFile(path).testzip() is None
        tensors = torch.load(path, weights_only=True)
        held.update(dict.fromkeys(tensors, shard))
    assert index["weight_map"] == held
    assert list(index["weight_map"]) == sorted(held)
    config = json.loads((tmp_path / "delta/config.json").read_text())
    assert config == {**LLAVA, "torch_dtype": "float16"}
    assert set(files) - set(shards) == {
        "config.json", "pytorch_model.bin.index.json", "tokenizer_config.json", FINGERPRINT_FILE, "README.md",
    }  # fmt: skip


def test_a_base_in_fp32_is_the_same_base(
    base: Path, target: Path, tmp_path: Path, llama: dict[str, Tensor], llava: dict[str, Tensor]
) -> None:
    wide = write_folder(tmp_path / "wide", {name: tensor.float() for name, tensor in llama.items()}, LLAMA)
    make_delta(wide, target, tmp_path / "delta")
    assert _same(tmp_path / "delta", _original_delta(llama, llava))
    apply_delta(base, tmp_path / "delta", tmp_path / "out")  # the fingerprint is the same


def test_verify(base: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_delta(base, target, tmp_path / "delta")
    check = verify_delta(base, tmp_path / "delta", target=target)
    assert check.base == "fingerprint"
    assert check.compared
    assert 0 < check.differing < 0.1 * check.elements
    assert 0 < check.largest < 1e-3
    (tmp_path / "delta" / FINGERPRINT_FILE).unlink()
    assert verify_delta(base, tmp_path / "delta").base == "statistics"
    arguments = ["--base", str(base), "--delta", str(tmp_path / "delta"), "--target", str(target)]
    assert cli.main(["delta", "verify", *arguments]) == 0
    assert "the base matches" in capsys.readouterr().out


def test_verify_rejects_another_target(
    base: Path, target: Path, tmp_path: Path, llama: dict[str, Tensor], llava: dict[str, Tensor]
) -> None:
    make_delta(base, target, tmp_path / "delta")
    other = write_folder(tmp_path / "other", finetune(llava, 9, by=1e-4), LLAVA)
    with pytest.raises(WeightsError, match="not reproduced by base"):
        verify_delta(base, tmp_path / "delta", target=other)


def _other_training(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    return draw_llama(7)


def _vicuna(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    return finetune(llama, 8, by=1e-3)


def _barely_tuned(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    return finetune(llama, 8, by=1e-4)


def _one_layer_changed(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.1.mlp.up_proj.weight"
    return {**llama, name: finetune({name: llama[name]}, 8, by=1e-3)[name]}


@pytest.mark.parametrize("fingerprinted", [True, False], ids=["fingerprint", "statistics"])
@pytest.mark.parametrize("wrong", [_other_training, _vicuna, _barely_tuned, _one_layer_changed])
def test_a_wrong_base_is_rejected(
    wrong: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    fingerprinted: bool,
    base: Path,
    target: Path,
    tmp_path: Path,
    llama: dict[str, Tensor],
) -> None:
    make_delta(base, target, tmp_path / "delta")
    if not fingerprinted:
        (tmp_path / "delta" / FINGERPRINT_FILE).unlink()
    other = write_folder(tmp_path / "other", wrong(llama), LLAMA)
    with pytest.raises(WeightsError, match="not the base") as raised:
        apply_delta(other, tmp_path / "delta", tmp_path / "out")
    assert str(other) in str(raised.value)
    assert _nothing_is_left(tmp_path / "out")
    apply_delta(other, tmp_path / "delta", tmp_path / "out", force=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by", [1e-5, 1e-4, 1e-3, 1e-2, 0.3])
def test_statistics_accept_the_right_base(seed: int, by: float, tmp_path: Path) -> None:
    llama = draw_llama(100 + seed)
    base = write_folder(tmp_path / "llama", llama, LLAMA)
    target = write_folder(tmp_path / "llava", make_llava(finetune(llama, 200 + seed, by=by), 300 + seed), LLAVA)
    make_delta(base, target, tmp_path / "delta")
    (tmp_path / "delta" / FINGERPRINT_FILE).unlink()
    assert verify_delta(base, tmp_path / "delta", target=target).base == "statistics"


def _delete_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def _truncate(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _flip_bit(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _nan(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 3] = torch.nan
    torch.save(tensors, path)


def _rename_tensor(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.layers.0.self_attn.x_proj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    torch.save(tensors, path)


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')


def _break_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("[]")


_DAMAGE = {
    _delete_shard: "pytorch_model-00002-of-00002.bin",
    _truncate: "pytorch_model-00001-of-00002.bin",
    _flip_bit: "pytorch_model-00001-of-00002.bin:model.",
    _nan: "model.layers.0.self_attn.q_proj.weight",
    _rename_tensor: "model.layers.0.self_attn.q_proj.weight",
    _break_config: "config.json",
    _break_index: "pytorch_model.bin.index.json",
}


@pytest.mark.torture
@pytest.mark.parametrize("side", ["base", "delta"])
@pytest.mark.parametrize("damage", _DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_nothing_is_left(
    damage: Callable[[Path], None], side: str, base: Path, llava: dict[str, Tensor], llama: dict[str, Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    folders = {"base": base, "delta": write_folder(tmp_path / "delta", _original_delta(llama, llava), LLAVA)}
    damage(folders[side])
    with pytest.raises(LlavarError) as raised:
        apply_delta(folders["base"], folders["delta"], tmp_path / "out", force=True)
    assert _DAMAGE[damage] in str(raised.value)
    assert str(folders[side]) in str(raised.value)
    assert "Fix: " in str(raised.value)
    assert _nothing_is_left(tmp_path / "out")


@pytest.mark.torture
@pytest.mark.parametrize(
    "shape", [{"words": 520}, {"width": 64}, {"layers": 2}, {"layers": 4}], ids=lambda shape: next(iter(shape))
)
def test_a_base_of_another_shape_is_rejected(shape: dict[str, int], base: Path, target: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", draw_llama(1, **shape), LLAMA)
    make_delta(base, target, tmp_path / "delta")
    for attempt in (
        lambda: make_delta(other, target, tmp_path / "out"),
        lambda: apply_delta(other, tmp_path / "delta", tmp_path / "out", force=True),
    ):
        with pytest.raises(WeightsError) as raised:
            attempt()
        assert str(other) in str(raised.value)
        assert any(text in str(raised.value) for text in ("model.layers.2.", "model.layers.3.", "got ["))
        assert _nothing_is_left(tmp_path / "out")


@pytest.mark.torture
def test_safetensors_of_ours_have_checksums(base: Path, target: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    make_delta(base, target, delta, form="safetensors")
    assert (delta / CHECKSUMS_FILE).is_file()
    path = delta / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model.safetensors:model\..*damaged"):
        apply_delta(base, delta, tmp_path / "out")
    assert _nothing_is_left(tmp_path / "out")


def test_an_existing_folder_is_not_overwritten(base: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        make_delta(base, target, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_interrupted_make_is_resumed(
    base: Path, target: Path, tmp_path: Path, llama: dict[str, Tensor], llava: dict[str, Tensor]
) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        make_delta(base, target, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    again: list[int] = []
    make_delta(base, target, tmp_path / "out", progress=lambda done, total: again.append(done))
    # Tensors this small may all be written before progress is called for the first of them.
    assert all(done > sum(seen[-2:-1]) for done in again)
    assert _same(tmp_path / "out", _original_delta(llama, llava))
    assert _nothing_is_left(tmp_path / "nothing")


def test_another_input_starts_from_the_beginning(
    base: Path, target: Path, tmp_path: Path, llama: dict[str, Tensor], llava: dict[str, Tensor]
) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        make_delta(base, target, tmp_path / "out", progress=stop)
    other = finetune(llama, 5)
    make_delta(write_folder(tmp_path / "other", other, LLAMA), target, tmp_path / "out")
    assert _same(tmp_path / "out", _original_delta(other, llava))


def test_two_processes_at_once_are_rejected(base: Path, target: Path, tmp_path: Path) -> None:
    def start_another(done: int, total: int) -> None:
        with pytest.raises(EnvironmentFaultError, match="another process"):
            make_delta(base, target, tmp_path / "out")

    make_delta(base, target, tmp_path / "out", progress=start_another)


_JOB = """
from llavar_peft.weights.delta import delta_files
folder_writer._SYNC_AFTER = 20_000
def work(folder, progress):
    delta_files.apply_delta(first, second, folder, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_twenty_random_moments(base: Path, target: Path, tmp_path: Path) -> None:
    make_delta(base, target, tmp_path / "delta")
    kill_twenty_times(_JOB, base, tmp_path / "delta", tmp_path)


@pytest.mark.torture
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_the_run_is_resumed(
    base: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    whole = folder_writer._write_all
    left = 100_000

    def fill(file: object, view: memoryview) -> None:
        nonlocal left
        left -= len(view)
        if left < 0:
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(view)
        whole(file, view)

    with monkeypatch.context() as patch:
        patch.setattr(folder_writer, "_write_all", fill)
        with pytest.raises(EnvironmentFaultError, match="free some space"):
            make_delta(base, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make_delta(base, target, tmp_path / "out")


def test_commands(base: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    assert cli.main(["delta", "make", "--base", str(base), "--target", str(target), "--out", str(delta)]) == 0
    assert cli.main(["delta", "apply", "--base", str(base), "--delta", str(delta), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    shutil.rmtree(out)
    wrong = ["delta", "apply", "--base", str(target), "--delta", str(delta), "--out", str(out)]
    assert cli.main(wrong) == 2
    assert "Fix:" in capsys.readouterr().err
