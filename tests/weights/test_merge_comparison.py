"""The comparison of logits during a merge: it fails for every kind of wrong merge, also for one that was resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavar_peft import ModelConfig, build_model, merge_adapter
from llavar_peft.errors import InterruptedRunError, WeightsError
from llavar_peft.models.merge_adapter import MergeReport
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.adapter.lora_updates import LowRank, Replacement, Rows
from llavar_peft.weights.io import folder_writer
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.merge.merge_plan import plan_merge
from llavar_peft.weights.merge.merge_stream import MergedTensors, float_pieces
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

PARTS = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
SKIPPED = "layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base, and an adapter with rows and projector that changes its logits much."""
    folder = tmp_path_factory.mktemp("merge")
    model, processor = build_model(PARTS)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    tune = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True)
    save_moved_adapter(folder / "adapter", ModelConfig(checkpoint=str(folder / "base"), dtype="float32"), tune, by=0.1)
    return folder / "base", folder / "adapter"


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> MergeReport:
    return merge_adapter(*inputs, tmp_path_factory.mktemp("whole") / "out")


def _half_the_scale(self: LowRank, rows: Tensor, start: int, *, overwrite: bool = False) -> Tensor:
    return rows + 0.5 * self.scale * (self.b[start : start + len(rows)] @ self.a)


def _unchanged(self: object, rows: Tensor, start: int, *, overwrite: bool = False) -> Tensor:
    return rows


def _skip_one(self: MergedTensors, name: str, rows: Tensor, start: int, after: Any) -> Tensor:
    return rows if SKIPPED in name else after(self, name, rows, start)


def _transpose_one(self: MergedTensors, name: str, rows: Tensor, start: int, after: Any) -> Tensor:
    done: Tensor = after(self, name, rows, start)
    return done.T if "layers.0.self_attn.v_proj" in name else done


def _round_to_three_bits(self: MergedTensors, name: str, rows: Tensor, start: int, after: Any) -> Tensor:
    done: Tensor = after(self, name, rows, start)
    return done.to(torch.float8_e5m2).float()


def _shift_rows(self: MergedTensors, name: str, rows: Tensor, start: int, after: Any) -> Tensor:
    done: Tensor = after(self, name, rows, start)
    return done.roll(1, 0) if "layers.2.mlp.up_proj" in name else done


@pytest.mark.parametrize(
    ("changed", "by"),
    [
        (LowRank, _half_the_scale),
        (Rows, _unchanged),
        (Replacement, _unchanged),
        (MergedTensors, _skip_one),
        (MergedTensors, _transpose_one),
        (MergedTensors, _round_to_three_bits),
        (MergedTensors, _shift_rows),
    ],
    ids=["scale", "rows forgotten", "projector forgotten", "tensor skipped", "transposed", "coarse", "shifted"],
)
def test_a_wrong_merge_is_not_kept(
    changed: type, by: Any, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed is MergedTensors:
        after = MergedTensors.after
        monkeypatch.setattr(MergedTensors, "after", lambda *given: by(*given, after))
    else:
        monkeypatch.setattr(changed, "apply", by)
    with pytest.raises(WeightsError, match="the merge changes the logits too much"):
        merge_adapter(*inputs, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_right_merge_is_kept(whole: MergeReport) -> None:
    assert whole.gaps["result"].relative < 1e-5
    assert whole.gaps["result"].same_top == 1.0
    assert whole.gaps["result"].tokens > 20


def test_the_files_contain_what_was_compared(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = folder_writer._write_all

    def write_other(file: Any, view: memoryview) -> None:
        write_all(file, memoryview(bytes(len(view))))

    monkeypatch.setattr(folder_writer, "_write_all", write_other)
    with pytest.raises(WeightsError, match=r"checksum|does not contain what was written"):
        merge_adapter(*inputs, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _interrupted_at(share: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_resumed_merge_is_compared_as_a_whole(
    share: float, inputs: tuple[Path, Path], whole: MergeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_writer, "_SYNC_AFTER", 1)
    with pytest.raises(InterruptedRunError):
        merge_adapter(*inputs, tmp_path / "out", progress=_interrupted_at(share))
    kept = (tmp_path / ".out.part/.journal").read_text().splitlines()
    assert len(kept) > 1
    again: list[int] = []
    report = merge_adapter(*inputs, tmp_path / "out", progress=lambda done, total: again.append(done))
    assert len(again) == report.tensors - (len(kept) - 1)
    assert report.gaps == whole.gaps
    for name in ("model.safetensors", "weights_checksums.json"):
        assert (report.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_damage_after_the_interruption_is_found(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_writer, "_SYNC_AFTER", 1)
    with pytest.raises(InterruptedRunError):
        merge_adapter(*inputs, tmp_path / "out", progress=_interrupted_at(0.8))
    staged = tmp_path / ".out.part/model.safetensors"
    kept = [json.loads(line)[0] for line in (tmp_path / ".out.part/.journal").read_text().splitlines()[1:]]
    entry = read_tensor_table(staged)[next(name for name in reversed(kept) if "language_model" in name)]
    with staged.open("r+b") as file:
        file.seek(entry.offset + 100)
        file.write(b"\0\0\0\0")
    with pytest.raises(WeightsError, match="wrong checksum"):
        merge_adapter(*inputs, tmp_path / "out")


def test_the_result_does_not_depend_on_the_pieces(inputs: tuple[Path, Path]) -> None:
    """A block is merged in pieces that fit into a core's cache: the same numbers as the whole block at once."""
    merged = plan_merge(*inputs).merged
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    for count, width in ((1037, 300), (381, 2752), (150, 4000), (5, 60000)):
        a, b = torch.randn(8, width, generator=generator), torch.randn(count, 8, generator=generator)
        block = torch.randn(count, width, generator=generator)
        update = LowRank(a, b, 0.5)
        updates = merged.adapters[0].updates
        updates[name] = update  # type: ignore[index]
        places = [place for _, place in float_pieces(block)]
        assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
        assert places[-1].stop == count
        assert (len(places) > 1) == (count > 64)
        for dtype in ("float16", "float32"):
            expected = update.apply(block, 0).to(getattr(torch, dtype))
            assert torch.equal(merged.merge_block(name, block, 0, dtype), expected)
