"""Records in Parquet files, folders and data sets of the hub; embedded images; streams."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llavar_peft.cli import main
from llavar_peft.data import record_tables
from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.hub_sources import TableSelection, is_hub_source
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import RecordStore, open_records, parse_record
from llavar_peft.errors import DataError, EnvironmentFaultError, LlavarError
from llavar_peft.types import EmbeddedImage

TURNS = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
TEXT = datasets.Value("string")
TURNS_TYPE = datasets.List({"from": TEXT, "value": TEXT})


def png(color: str = "red", size: int = 8) -> bytes:
    file = BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """Return a PNG of 10,000 x 10,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def row(number: int = 0, **keys: Any) -> dict[str, Any]:
    return {"id": str(number), "conversations": TURNS, **keys}


def table(rows: list[dict[str, Any]], **types: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        rows, features=datasets.Features({"id": TEXT, "conversations": TURNS_TYPE, **types})
    )


STRUCT = {"bytes": datasets.Value("binary"), "path": TEXT}
FORMS: dict[str, tuple[Any, Any]] = {
    "Image": (datasets.Image(), {"image": {"bytes": png(), "path": None}}),
    "list of Image": (datasets.List(datasets.Image()), {"images": [{"bytes": png(), "path": "a.png"}]}),
    "struct": (STRUCT, {"image": {"bytes": png(), "path": "/etc/passwd"}}),
    "bytes": (datasets.Value("large_binary"), {"image": png()}),
    "list of bytes": (datasets.List(datasets.Value("binary")), {"images": [png()]}),
    "path of a struct": (STRUCT, {"image": {"bytes": None, "path": "a.png"}}),
    "path": (TEXT, {"image_url": "a.png"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_images_in_a_parquet_file_are_used(name: str, tmp_path: Path) -> None:
    kind, keys = FORMS[name]
    (tmp_path / "a.png").write_bytes(png())
    key = next(iter(keys))
    table([row(0, **keys), row(1, **keys)], **{key: kind}).to_parquet(tmp_path / "d.parquet")
    store = open_records(tmp_path / "d.parquet", cache_dir=tmp_path / "cache")
    roots = ImageRoots([tmp_path])
    assert preflight(store, roots) == []
    report = check_records(store, roots)
    assert report.clean
    (image,) = parse_record(store[1], store.where(1)).images
    assert roots.open(image).getpixel((0, 0)) == (255, 0, 0)
    if "path" not in name:
        assert isinstance(image, EmbeddedImage)
        assert str(image).startswith(key)
        assert bytes(pickle.loads(pickle.dumps(image)).data) == png()
        assert report.images_opened == 2


BROKEN = {
    "no image": (b"no image", "is not an image"),
    "cut": (png(size=64)[:60], "cannot be read as an image"),
    "empty": (b"", "is an empty file"),
    "bomb": (bomb(), "the image is too large"),
    "page": (b"<html>", "is a web page"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_embedded_image_is_named_with_its_record(name: str, tmp_path: Path) -> None:
    data, what = BROKEN[name]
    rows = [row(0, image={"bytes": png(), "path": None}), row(1, image={"bytes": data, "path": "scan.png"})]
    path = tmp_path / "d.parquet"
    table(rows, image=datasets.Image()).to_parquet(path)
    store = open_records(path, cache_dir=tmp_path / "cache")
    (fault,) = check_records(store, ImageRoots()).faults
    assert (fault.index, fault.kind) == (1, "image_broken")
    assert fault.where == f"{path}:1: image (scan.png)"
    assert what in fault.what
    assert preflight(store, ImageRoots()) == []


def test_a_path_in_a_table_cannot_leave_the_image_folders(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images").mkdir()
    rows = [
        row(0, image={"bytes": None, "path": str(tmp_path / "secret.png")}),
        row(1, image={"bytes": None, "path": ""}),
    ]
    table(rows, image=STRUCT).to_parquet(tmp_path / "d.parquet")
    store = open_records(tmp_path / "d.parquet", cache_dir=tmp_path / "cache")
    found = preflight(store, ImageRoots([tmp_path / "images"]))
    assert [one.kind for one in found] == ["image_outside", "record"]
    assert "the path is empty" in found[1].what


def test_messages_of_a_table_with_nulls_and_embedded_parts(tmp_path: Path) -> None:
    part = pa.struct(
        [
            ("type", pa.string()),
            ("text", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("image_url", pa.struct([("url", pa.string())])),
        ]
    )
    rows = [
        {"role": "user", "content": [{"type": "image", "image": {"bytes": png()}}, {"type": "text", "text": "Read."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "EXIT"}]},
    ]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    pq.write_table(pa.table({"messages": pa.array([rows], kind)}), tmp_path / "m.parquet")
    store = open_records(tmp_path / "m.parquet", cache_dir=tmp_path / "cache")
    assert check_records(store, ImageRoots()).clean
    read = parse_record(store[0], store.where(0))
    assert read.turns[0].parts == ("", None, "\nRead.")
    assert [str(image) for image in read.images] == ["messages[0].content[0].image"]


def _folder(path: Path) -> dict[str, Path]:
    """Write the same three records as the folders that ``datasets`` reads."""
    rows = table([row(number, image={"bytes": png(), "path": None}) for number in range(3)], image=datasets.Image())
    texts = [row(number, image="a.png") for number in range(3)]
    parquet, lines, saved = path / "parquet", path / "lines", path / "saved"
    (parquet / "data").mkdir(parents=True)
    lines.mkdir()
    rows.select([0, 1]).to_parquet(parquet / "data/train-00000-of-00002.parquet")
    rows.select([2]).to_parquet(parquet / "data/train-00001-of-00002.parquet")
    rows.select([0]).to_parquet(parquet / "data/test-00000-of-00001.parquet")
    (lines / "train.jsonl").write_text("\n".join(map(json.dumps, texts)))
    rows.save_to_disk(saved)
    return {"parquet": parquet, "lines": lines, "saved": saved}


@pytest.mark.parametrize("name", ["parquet", "lines", "saved"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_folders_are_opened_without_a_network(name: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    folder = _folder(tmp_path)[name]
    store = open_records(folder, tmp_path / "cache", TableSelection(streaming=streaming))
    assert [raw["id"] for raw in store] == ["0", "1", "2"]
    assert check_records(store, ImageRoots([tmp_path])).clean
    assert [raw["id"] for raw in pickle.loads(pickle.dumps(store))] == ["0", "1", "2"]
    if name == "parquet":
        test = open_records(folder, tmp_path / "cache", TableSelection("test", streaming=streaming))
        assert len(test) == 1
        with pytest.raises(DataError, match=r"has no split 'dev' \(got .*test.*\).*set 'split'"):
            open_records(folder, tmp_path / "cache", TableSelection("dev", streaming=streaming))
        with pytest.raises(DataError, match=r"has no configuration 'b' \(got 'default'\).*set 'config'"):
            open_records(folder, tmp_path / "cache", TableSelection(config="b", streaming=streaming))


def test_a_stream_is_written_once_and_again_when_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path)["lines"]
    streamed = TableSelection(streaming=True)
    assert len(open_records(folder, tmp_path / "cache", streamed)) == 3
    (written,) = (tmp_path / "cache").glob("*.arrow")
    before = written.stat().st_mtime_ns
    assert len(open_records(folder, tmp_path / "cache", streamed)) == 3
    assert written.stat().st_mtime_ns == before
    (folder / "train.jsonl").write_text(json.dumps(row(9)))
    assert len(open_records(folder, tmp_path / "cache", streamed)) == 1

    class Interrupted(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(os, "fsync", stop)
    (folder / "train.jsonl").write_text(json.dumps(row(10)))
    with pytest.raises(LlavarError):
        open_records(folder, tmp_path / "cache", streamed)
    assert list((tmp_path / "cache").glob("*.part")) == []
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("r.json", TableSelection("test"), "'split' is set, but a .json file has none"),
        ("r.jsonl", TableSelection(config="a"), "'config' is set, but a .jsonl file has none"),
        ("r.json", TableSelection(streaming=True), "never loaded as a whole anyway"),
        ("r.parquet", TableSelection(config="a"), "'config' is set, but a .parquet file has none"),
    ],
)
def test_a_file_has_no_splits(name: str, setting: TableSelection, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=message):
        open_records(tmp_path / name, selection=setting)


def test_damaged_tables_are_errors_of_the_data(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "conversations": ["x"]}), tmp_path / "d.parquet")
    whole = (tmp_path / "d.parquet").read_bytes()
    for number, data in enumerate((b"", b"PAR1", whole[:-9], whole[:40], bytes(200), b"PAR1" + bytes(200) + b"PAR1")):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{number}\.parquet: cannot be read.*Fix: "):
            open_records(path, cache_dir=tmp_path / "cache")
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"id": broken, "messages": [[]]}), tmp_path / "bytes.parquet")
    store = open_records(tmp_path / "bytes.parquet", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"bytes\.parquet:0: cannot be read"):
        store[0]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "text", ["[]", "1", '{"features": {"id": "x"}, "_data_files": [{}]}', "{", '{"features": {"a": []}}']
)
def test_a_damaged_folder_of_datasets_is_named(name: str, text: str, tmp_path: Path) -> None:
    table([row()]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(text)
    with pytest.raises(DataError, match="saved: cannot be read"):
        open_records(tmp_path / "saved")


def test_several_splits_and_streams_are_no_records() -> None:
    rows = table([row()])
    for given in (datasets.DatasetDict({"train": rows}), rows.to_iterable_dataset()):
        with pytest.raises(DataError, match=rf"got {type(given).__name__}, expected a Dataset"):
            open_records(given)


def test_a_folder_that_needs_a_program_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "a.json").write_text("[]")
    with pytest.raises(DataError, match="needs a program of its own, which is not run"):
        open_records(folder, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["hub:", "hub:x", "hub:a/b/c/d", "hf://../b", "hf://~/b"])
def test_a_name_that_cannot_be_on_the_hub_is_named(name: str) -> None:
    with pytest.raises(DataError, match="write hf://owner/name"):
        open_records(name)


@pytest.mark.parametrize(
    ("name", "given", "asked"),
    [
        ("hf://org/name", TableSelection(), (None, "train")),
        ("hf://org/name/small?split=dev", TableSelection(), ("small", "dev")),
        ("hf:/org/name/small?split=train%5B:10%5D", TableSelection(), ("small", "train[:10]")),
        ("hf://datasets/org/name", TableSelection(config="small"), ("small", "train")),
        ("hub:org/name/small", TableSelection("dev", "small"), ("small", "dev")),
        ("hub:org/name?config=small&split=train+dev", TableSelection("train+dev"), ("small", "train+dev")),
    ],
)
def test_the_name_of_a_data_set_may_say_its_configuration_and_split(
    name: str, given: TableSelection, asked: tuple[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**settings: Any) -> datasets.Dataset:
        assert settings == {"path": "org/name", "name": asked[0], "split": asked[1], "cache_dir": None}
        return table([row()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert is_hub_source(name)
    store = open_records(name, selection=given)
    assert store.where(0) == f"{name.partition('?')[0].replace('hf:/org', 'hf://org')}:0"
    assert open_records(Path(name) if name.startswith("hf:/o") else name, selection=given)[0]["id"] == "0"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hf://a/b/c?config=d", TableSelection(), "hf://a/b/c: names the config 'c', and 'd' is set too"),
        ("hf://a/b/c", TableSelection(config="d"), "names the config 'c', and 'd' is set too"),
        ("hf://a/b?split=x", TableSelection("y"), "names the split 'x', and 'y' is set too.* keep one of the two"),
        ("hf://a/b?revision=x", TableSelection(), "'revision' after the question mark is unknown"),
        ("hf://a/b?split=", TableSelection(), "'split' after the question mark is unknown or empty"),
    ],
)
def test_a_name_that_contradicts_the_settings_is_named(name: str, given: TableSelection, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_records(name, selection=given)


def _hub_error(error: Exception, monkeypatch: pytest.MonkeyPatch, offline: bool) -> LlavarError:
    import huggingface_hub.constants

    def load(**settings: Any) -> None:
        assert settings["path"] == "org/name"
        assert "trust_remote_code" not in settings
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(LlavarError) as caught:
        open_records("hub:org/name", selection=TableSelection("train", "small"))
    return caught.value


@pytest.mark.parametrize(
    ("error", "offline", "kind", "message"),
    [
        (ConnectionError("Couldn't reach 'org/name'"), True, EnvironmentFaultError, "unset HF_HUB_OFFLINE"),
        (ConnectionError("Couldn't reach 'org/name'"), False, EnvironmentFaultError, "check the connection"),
        (TimeoutError("slow"), False, EnvironmentFaultError, "check the connection"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
            False,
            EnvironmentFaultError,
            "check the name, or run `hf auth login`",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset"),
            False,
            EnvironmentFaultError,
            "request it on the data set's page",
        ),
        (ValueError("Unknown split \"train\". Should be one of ['a', 'b']."), False, DataError, "'a', 'b'"),
        (ValueError("BuilderConfig 'small' not found. Available: ['x']"), False, DataError, "'small' (got 'x')"),
        (RuntimeError("Dataset scripts are no longer supported, but found a.py"), False, DataError, "not run"),
        (datasets.exceptions.DatasetGenerationError("a\nb"), False, DataError, "cannot be read"),
    ],
)
def test_why_a_data_set_of_the_hub_does_not_open(
    error: Exception, offline: bool, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _hub_error(error, monkeypatch, offline)
    assert type(found) is kind
    assert message in str(found)
    assert "hub:org/name: " in str(found)
    assert "\n" not in str(found)
    assert found.exit_code == (3 if kind is EnvironmentFaultError else 2)


def test_the_hub_is_asked_for_what_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(**settings: Any) -> datasets.Dataset:
        asked.append(settings)
        return table([row()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    store = open_records("hub:org/name", selection=TableSelection("dev", "small"))
    assert store.where(0) == "hub:org/name:0"
    assert asked == [{"path": "org/name", "name": "small", "split": "dev", "cache_dir": None}]


def test_a_stream_of_the_hub_is_read_again_when_its_revision_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, revision = [row(0), row(1)], "a"

    def build(**given: Any) -> Any:
        assert given == {"path": "org/name", "name": None}
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
        return SimpleNamespace(hash=revision, as_streaming_dataset=lambda split: stream)

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    streamed = TableSelection(streaming=True)
    assert len(open_records("hub:org/name", tmp_path, streamed)) == 2
    rows = rows[:1]
    assert len(open_records("hub:org/name", tmp_path, streamed)) == 2
    revision = "b"
    assert len(open_records("hub:org/name", tmp_path, streamed)) == 1


def test_a_connection_that_breaks_in_a_stream_is_no_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        yield row(0)
        raise ConnectionResetError("peer")

    stream = datasets.IterableDataset.from_generator(broken)
    built = SimpleNamespace(hash="a", as_streaming_dataset=lambda split: stream)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **_: built)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EnvironmentFaultError, match="cannot be downloaded from the Hugging Face hub") as raised:
        open_records("hub:org/name", tmp_path, TableSelection(streaming=True))
    assert "written" not in str(raised.value)
    assert list(tmp_path.glob("*.arrow")) == []


def test_the_real_hub_client_says_what_to_do_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llavar_peft", "data", "check", "hub:llavar-peft-tests/no-such-data"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "Fix: unset HF_HUB_OFFLINE" in done.stderr


def test_the_check_takes_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path)["parquet"]
    assert main(["data", "check", str(folder), "--split", "test"]) == 0
    assert "1 record, 0 faults" in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--split", "dev"]) == 2
    assert "set 'split' to one of these" in capsys.readouterr().err


def test_the_bytes_of_a_table_stay_in_its_file(tmp_path: Path) -> None:
    """Reading a row copies no image: 40 images of 1 MB are parsed within a few MB."""
    import tracemalloc

    noise = np.random.default_rng(0).bytes(1_000_000)
    rows = pa.table(
        {
            "conversations": pa.array([TURNS] * 40),
            "image": pa.array([{"bytes": noise, "path": None}] * 40),
        }
    )
    pq.write_table(rows, tmp_path / "d.parquet", row_group_size=10)
    del rows
    store: RecordStore = open_records(tmp_path / "d.parquet", cache_dir=tmp_path / "cache")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    kept = [parse_record(raw, "x") for raw in store]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(one.images[0].data) for one in kept if isinstance(one.images[0], EmbeddedImage)) == 40_000_000
    assert peak < 5_000_000
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_no_setting_runs_code_of_a_data_set() -> None:
    assert "trust_remote_code" not in Path(record_tables.__file__).read_text()
