"""Reading weight files: the same tensors from every format, whole and in blocks, and errors that name the file."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llavar_peft.errors import WeightsError
from llavar_peft.weights.io.shard_layout import TensorSpec, allocate_file, write_zip_checksums
from llavar_peft.weights.io.tensor_blocks import (
    check_values,
    open_weights,
    read_blocks,
    read_elements,
    read_tensor,
    write_checksums,
)
from llavar_peft.weights.io.tensor_table import TensorEntry, read_tensor_table

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3000, 700, generator=generator),  # three blocks
        "half": torch.randn(5, 7, generator=generator).half(),
        "bfloat": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "codes": torch.arange(9, dtype=torch.uint8),
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


def _check(path: Path, tensors: dict[str, Tensor]) -> dict[str, TensorEntry]:
    table, whole = read_tensor_table(path), open_weights(path)
    assert set(table) == set(whole) == set(tensors)
    for name, tensor in tensors.items():
        entry = table[name]
        assert (entry.shape, f"torch.{entry.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert torch.equal(whole[name], tensor)
        assert torch.equal(read_tensor(entry).to(tensor.dtype), tensor)
        assert sum(block.numel() for block in read_blocks(entry)) == tensor.numel()
        middle = tensor.numel() // 2
        assert torch.equal(read_elements(entry, middle, tensor.numel() - middle), tensor.reshape(-1)[middle:])
    return table


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_every_format_has_the_same_tensors(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """``legacy.bin`` is written as torch before 1.6 did, which is no zip archive."""
    _check(_write(tmp_path / name, tensors), tensors)


def test_tensors_that_share_storage_or_are_transposed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    matrix = tensors["matrix"]
    views = {"matrix": matrix, "tied": matrix, "rows": matrix[7:9], "transposed": matrix.t()}
    torch.save(views, tmp_path / "views.bin")
    table = _check(tmp_path / "views.bin", views)
    assert table["tied"].offset == table["matrix"].offset
    assert table["rows"].crc32 is None  # the checksum is that of the whole storage


def test_a_bin_is_read_from_its_file_and_with_its_checksums(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Relies on ``torch.load(mmap=True)`` mapping the whole file at once; otherwise tensors would be kept in memory."""
    table = _check(_write(tmp_path / "model.bin", tensors), tensors)
    assert all(entry.data is None and entry.crc32 is not None for entry in table.values() if entry.numel)
    content = bytearray((tmp_path / "model.bin").read_bytes())
    content[table["half"].offset + 3] ^= 1
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.bin:half: damaged: wrong checksum \(got .*, expected .*\)\. Fix: "):
        read_tensor(read_tensor_table(tmp_path / "model.bin")["half"])


def test_blocks_can_be_modified(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin", "legacy.bin"):
        path = _write(tmp_path / name, tensors)
        entry = read_tensor_table(path)["matrix"]
        for block in read_blocks(entry):
            block.zero_()
        open_weights(path)["matrix"].zero_()
        assert torch.equal(read_tensor(entry), tensors["matrix"]) or entry.data is not None
        assert torch.equal(open_weights(path)["matrix"], tensors["matrix"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_truncated_while_it_is_mapped(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Reading behind its end would end the process with SIGBUS."""
    path = _write(tmp_path / name, tensors)
    last = max(read_tensor_table(path).values(), key=lambda entry: entry.offset)
    mapped = open_weights(path)
    for stored in mapped.values():
        assert stored is not None
    os.truncate(path, last.offset + 1)
    with pytest.raises(WeightsError, match="truncated while it was in use"):
        mapped[last.name]


@pytest.mark.parametrize("name", ["new.bin", "new.safetensors"])
def test_an_allocated_file_is_filled_in_place(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    specs = [TensorSpec(key, tuple(one.shape), str(one.dtype).removeprefix("torch.")) for key, one in tensors.items()]
    allocate_file(tmp_path / name, specs)
    table = read_tensor_table(tmp_path / name)
    assert all(entry.data is None for entry in table.values() if entry.numel)
    with (tmp_path / name).open("r+b") as file:
        for key, tensor in tensors.items():
            file.seek(table[key].offset)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    write_zip_checksums(tmp_path / name, dict.fromkeys(tensors, 1))
    filled = open_weights(tmp_path / name)
    assert all(torch.equal(filled[key], tensor) for key, tensor in tensors.items())
    assert name.endswith(".safetensors") or read_tensor_table(tmp_path / name)["matrix"].crc32 == 1


def test_errors_name_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights found \(got an empty folder, expected model\.safetensors"):
        read_tensor_table(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = _write(tmp_path / name, tensors)
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5]):
            path.write_bytes(damaged)
            with pytest.raises(
                WeightsError, match=rf"{name}: not a readable file of weights .*Fix: download"
            ) as caught:
                open_weights(tmp_path)
            assert "weights_only" not in str(caught.value)
        for written, what in ((b"", "the file is empty"), (LFS_POINTER, "a Git LFS pointer.*git lfs pull")):
            path.write_bytes(written)
            with pytest.raises(WeightsError, match=rf"{name}: {what}"):
                open_weights(tmp_path)
        path.unlink()
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(WeightsError, match=r"got a list, expected tensors by name"):
        open_weights(tmp_path / "list.bin")
    _write(tmp_path / "model.safetensors", tensors)
    write_checksums(tmp_path)
    (tmp_path / "weights_checksums.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(WeightsError, match=r"weights_checksums\.json: not the checksums of model\.safetensors"):
        read_tensor_table(tmp_path)
    assert set(open_weights(tmp_path)) == set(tensors)  # does not read checksums


def test_an_index_must_match_its_shards(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    _write(tmp_path / "a.safetensors", {"half": tensors["half"], "other": tensors["codes"]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"half": "a.safetensors"}}))
    assert list(open_weights(tmp_path)) == ["half"]
    for outside in ("../a.safetensors", str(tmp_path / "a.safetensors"), "x/../../a.safetensors", "..\\a", "", 7):
        index.write_text(json.dumps({"weight_map": {"half": outside}}))
        with pytest.raises(WeightsError, match="expected a file in the same folder"):
            open_weights(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "blobs/b")
    (tmp_path / "a.safetensors").symlink_to("blobs/b")  # as in the cache of the hub
    index.write_text(json.dumps({"weight_map": {"half": "a.safetensors"}}))
    assert list(open_weights(tmp_path)) == ["half"]
    index.write_text(json.dumps({"weight_map": {"half": "a.safetensors", "lost": "a.safetensors"}}))
    with pytest.raises(WeightsError, match="no shard holds these tensors of the index: lost"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"half": "b.safetensors"}}))
    with pytest.raises(WeightsError, match=r"missing shards: b\.safetensors"):
        open_weights(tmp_path)


def test_a_bin_that_grows_in_memory_is_rejected(tmp_path: Path) -> None:
    """Torch compresses nothing; a list of tensors of a gigabyte compresses to a megabyte."""
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02(" + b"N" * 3_000_000 + b"t.")
        archive.writestr("archive/version", "3\n")
    tracemalloc.start()
    with pytest.raises(WeightsError, match="a part of it is compressed"):
        read_tensor_table(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_header_of_very_many_tensors_is_rejected(tmp_path: Path) -> None:
    entries = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(60_000)}
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(WeightsError, match=r"too many tensors \(got 60000"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\nb", "a" * 5000 + ".safetensors"])
def test_a_shard_that_no_file_can_be_is_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"half": name}}))
    with pytest.raises(WeightsError, match="not an index of shards") as caught:
        open_weights(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_found(value: float, dtype: str, tmp_path: Path) -> None:
    tensor = torch.ones(3, 5, dtype=getattr(torch, dtype))
    save_file({"a": tensor, "codes": torch.arange(3)}, tmp_path / "model.safetensors")
    check_values(read_tensor_table(tmp_path))
    tensor[2, 4] = value
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors:a: 1 of 15 elements are NaN or infinite"):
        check_values(read_tensor_table(tmp_path))
