"""Records: validation, error messages, and stores that do not load their files."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llavar_peft.data import record_index
from llavar_peft.data.hub_sources import TableSelection
from llavar_peft.data.record_store import RecordStore, open_records, parse_record
from llavar_peft.errors import DataError
from llavar_peft.types import Conversation, Turn


def record(identity: Any = "a", **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nRead it. "}, {"from": "gpt", "value": "EXIT"}]
    return {"id": identity, "image": "a.png", "conversations": turns, **changes}


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


def whats(raw: object, where: str = "r.json:7") -> list[str]:
    with pytest.raises(DataError) as caught:
        parse_record(raw, where)
    return [str(fault) for fault in caught.value.faults]


# ---- one record


def test_a_record_becomes_a_conversation_verbatim() -> None:
    expected = Conversation("a", (Turn("human", "<image>\nRead it. "), Turn("gpt", "EXIT")), ("a.png",))
    assert parse_record(record(), "r.json:7") == expected


def test_missing_fields_have_defaults() -> None:
    raw = record(17, image=None)
    assert parse_record(raw, "r.json:7").id == "17"
    assert parse_record(raw, "r.json:7").images == ()
    del raw["id"], raw["image"]
    assert parse_record(raw, "r.json:7") == Conversation("7", parse_record(record(), "x").turns)


def test_alternative_role_names_are_accepted() -> None:
    raw = record(conversations=turns(("user", "a"), ("assistant", "b"), ("human", "c")))
    assert [turn.role for turn in parse_record(raw, "x").turns] == ["human", "gpt", "human"]


def test_a_leading_answer_is_dropped() -> None:
    raw = record(conversations=turns(("gpt", "Hello"), ("human", "a"), ("gpt", "b")))
    assert parse_record(raw, "x").turns == (Turn("human", "a"), Turn("gpt", "b"))


@pytest.mark.parametrize("places", [0, 1, 2])
def test_one_image_may_be_placed_any_number_of_times(places: int) -> None:
    raw = record(conversations=turns(("human", "<image>" * places), ("gpt", "b")))
    assert parse_record(raw, "x").images == ("a.png",)


def test_several_images_need_one_placeholder_each() -> None:
    raw = record(
        image=["a.png", "b.png"], conversations=turns(("human", "<image>"), ("gpt", "b"), ("human", "<image>"))
    )
    assert parse_record(raw, "x").images == ("a.png", "b.png")
    raw["image"].append("c.png")
    expected = "r.json:7: the number of <image> is wrong (got 2, expected 3: one per image)."
    assert whats(raw) == [f"{expected} Fix: write <image> once for each image."]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ([], "r.json:7: the record has the wrong type (got a list, expected an object)"),
        (None, "got null, expected an object"),
        (record(1.5), "r.json:7: id: wrong type (got a number, expected a string or an integer)"),
        (record(True), "id: wrong type (got a boolean"),
        (record(image=3), "image: wrong type (got an integer, expected a relative path)"),
        (record(image=""), "leave out 'image'"),
        (record(image=["a.png", None]), "image[1]: wrong type (got null"),
        (record(images=["b.png"]), "names images under 'image' and under 'images', expected one key"),
        ({"id": "a"}, "has no 'conversations'"),
        ({"conversation": []}, "rename 'conversation'"),
        (record(conversations="[]"), "'conversations' has the wrong type (got a string, expected a list)"),
        (record(conversations=[]), "has no turn from 'human'"),
        (record(conversations=turns(("gpt", "a"))), "has no turn from 'human'"),
        (record(conversations=["a"]), "conversations[0]: the turn has the wrong type (got a string"),
        (record(conversations=[{"value": "a"}]), "conversations[0]: has no 'from'"),
        (record(conversations=[{"from": "human"}]), "conversations[0]: has no 'value'"),
        (record(conversations=turns(("human", 3))), "'value' has the wrong type (got an integer, expected a string)"),
        (record(conversations=turns(("bot", "a"))), "unknown role (got 'bot', expected 'human' or 'gpt')"),
        (record(conversations=turns((["human"], "a"))), "got ['human']"),
        (record(conversations=turns(("system", "a"))), "the chat template adds the system prompt"),
        (
            record(conversations=turns(("gpt", "a"), ("gpt", "b"))),
            "conversations[1]: the turns do not alternate (got 'gpt', expected 'human')",
        ),
        (
            record(conversations=turns(("human", "a"), ("human", "b"))),
            "got 'human', expected 'gpt'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_are_described(raw: object, what: str) -> None:
    found = whats(raw)
    assert len(found) == 1
    assert what in found[0]
    assert "Fix: " in found[0]


def test_all_faults_of_a_record_are_reported_together() -> None:
    raw = {"id": [], "image": [1], "conversations": [{"from": "bot", "value": None}, 3]}
    places = [fault.partition(": ")[2].split(":")[0] for fault in whats(raw)]
    assert places == ["id", "image[0]", "conversations[0]", "conversations[0]", "conversations[1]"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "image": JSON,
        "conversations": JSON
        | st.lists(st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt", 1]), "value": JSON})),
    },
)


@given(JSON | SHAPED)
def test_any_json_is_a_conversation_or_a_data_error(raw: Any) -> None:
    try:
        conversation = parse_record(raw, "r:0")
    except DataError as error:
        assert error.faults  # noqa: PT017 - either outcome is right
        return
    assert [turn.role for turn in conversation.turns] == (["human", "gpt"] * len(conversation.turns))[
        : len(conversation.turns)
    ]


# ---- stores


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write index files for small files too."""
    monkeypatch.setattr(record_index, "MIN_INDEXED_BYTES", 0)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in records)


LAYOUTS: dict[str, Callable[[list[Any]], str | bytes]] = {
    "plain.json": json.dumps,
    "tight.json": lambda records: json.dumps(records, separators=(",", ":")),
    "indented.json": lambda records: json.dumps(records, indent=2, ensure_ascii=False).replace("\n", "\r\n"),
    "spaced.json": lambda records: " \n[\t " + " ,\n\n ".join(map(json.dumps, records)) + " \r\n] \n",
    "marked.json": lambda records: b"\xef\xbb\xbf" + json.dumps(records).encode(),
    "plain.jsonl": lines,
    "unended.jsonl": lambda records: lines(records).removesuffix("\n"),
    "windows.jsonl": lambda records: b"\xef\xbb\xbf" + lines(records).replace("\n", "\r\n").encode(),
    "blank.jsonl": lambda records: "\n \n" + lines(records).replace("\n", "\n\n \t\n\r\n") + "\n\n",
}
TRICKY = [
    record("é\u2028\u0000\U0001f600", note='"]}, {"id": "b"}, [{'),
    record("b", deep={"a": [[], {}, [{"}": "{"}]]}, text='\\\\" , \\'),
    record("c\nd,", conversations=turns(("human", "x, "), ("gpt", ","))),
]


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_back(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, LAYOUTS[name](TRICKY))
    for _ in range(2):  # the second time with the index
        store = open_records([path])
        assert list(store) == TRICKY
        assert [store.where(index) for index in range(3)] == [f"{path}:{index}" for index in range(3)]
    assert (tmp_path / f"{name}.index").is_file()


@pytest.mark.usefixtures("indexed")
@hypothesis_settings(max_examples=150)
@given(records=st.lists(JSON, min_size=1, max_size=5), name=st.sampled_from(sorted(LAYOUTS)))
def test_the_index_finds_any_records(tmp_path_factory: pytest.TempPathFactory, records: list[Any], name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    if name.endswith(".jsonl") and isinstance(records[0], list):
        return  # looks like an array, and is rejected
    write(path, LAYOUTS[name](records))
    Path(f"{path}.index").unlink(missing_ok=True)
    expected = json.loads(json.dumps(records))
    assert list(open_records(path)) == expected
    assert list(open_records(path)) == expected


def test_small_files_get_no_index_file(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(TRICKY))
    open_records(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_several_sources_are_one_store(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", json.dumps([record("0"), record("1")]))
    empty = write(tmp_path / "b.json", "[ ]")
    last = write(tmp_path / "c.jsonl", lines([record("2")]))
    store = open_records([first, empty, str(last)])
    assert [raw["id"] for raw in store] == ["0", "1", "2"]
    assert (len(store), store[-1]["id"], store.where(2)) == (3, "2", f"{last}:0")
    assert store[np.int64(1)]["id"] == "1"
    for index in (3, -4):
        with pytest.raises(IndexError):
            store[index]
    assert len(open_records([])) == 0


def test_workers_map_the_files_again(tmp_path: Path) -> None:
    store = open_records(write(tmp_path / "a.json", json.dumps([record(n, note="x" * 999) for n in range(200)])))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert list(pickle.loads(pickled)) == list(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.__getitem__, (7,)) == store[7]


def test_a_worker_notices_that_the_file_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([record()]))
    pickled = pickle.dumps(open_records(path))
    write(path, json.dumps([record("other")]))
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(pickled)


@pytest.mark.usefixtures("indexed")
def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([record("a"), record("b")]))
    open_records(path)
    stamp = path.stat()
    write(path, json.dumps([record("b"), record("c")]))  # as long as before
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as old as before
    assert [raw["id"] for raw in open_records(path)] == ["b", "c"]
    write(path, json.dumps([record("d")]))
    assert [raw["id"] for raw in open_records(path)] == ["d"]


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_index_is_rebuilt(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(TRICKY))
    open_records(path)
    index = tmp_path / "a.json.index"
    content = bytearray(index.read_bytes())
    content[-9] ^= 1
    write(index, {"cut": bytes(content[:-3]), "flip": bytes(content), "empty": b"", "other": b"x" * 200}[damage])
    assert list(open_records(path)) == TRICKY
    assert list(open_records(path)) == TRICKY
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.json", "a.json.index"]


@pytest.mark.usefixtures("indexed")
def test_the_index_is_saved_in_the_first_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", json.dumps(TRICKY))
    assert list(open_records(path, cache_dir=tmp_path / "own")) == TRICKY
    assert [found.suffix for found in (tmp_path / "own").iterdir()] == [".index"]
    assert not (tmp_path / "a.json.index").exists()

    save = record_index._save

    def read_only(place: Path, *rest: Any) -> None:
        if place.parent == tmp_path:
            raise PermissionError(13, "read-only")
        save(place, *rest)

    monkeypatch.setattr(record_index, "_save", read_only)
    assert list(open_records(path)) == TRICKY
    assert not (tmp_path / "a.json.index").exists()
    assert list(Path(os.environ["XDG_CACHE_HOME"], "llavar_peft").iterdir())
    monkeypatch.setattr(record_index, "_scan", lambda *_: pytest.fail("scanned again"))
    assert list(open_records(path)) == TRICKY


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", "", "a.json: the file is empty"),
        ("a.json", " \n", "the file starts with no text"),
        ("a.json", '{"id": 1}', "starts with '{', expected '.': one array.*rename it to .jsonl"),
        ("a.json", "<!DOCTYPE html>", "starts with '<', expected '.': one array.*the download failed"),
        ("a.jsonl", "[{}]", "rename it to .json"),
        ("a.json", b"\x1f\x8b\x08\0", "the file is compressed"),
        ("a.json", '[{"id": 1}, {"id": 2', "not valid JSON .*may have been cut off"),
        ("a.json", '[\n{"id": "}, {"},\n{"id": tru}]', "at line 3, column 9, record 1"),
        (
            "a.json",
            '[{"id": [1,2]}, {}, {"x": NaN}]',
            "line 1, column 27, record 2 .*NaN or Infinity, which are not JSON",
        ),
        ("a.json", '[{"id": -Infinity}]', "record 0 .*NaN or Infinity, which are not JSON"),
        ("a.json", "[{}] []", "not valid JSON at line 1, column 7, after the end of the array"),
        ("a.json", "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a.txt", "[]", r"unknown file format \(got '.txt'"),
        ("a.parquet", "[]", "cannot be read"),
    ],
)
def test_files_without_records_are_rejected(name: str, content: str | bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"(?s){what}") as caught:
        open_records(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_a_malformed_line_is_reported_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"id": 1}\n{"id": \n{"id": NaN}\n{"id": "\xff"}\n{"id": 5}\n')
    store = open_records(path)
    assert [store[0], store[4]] == [{"id": 1}, {"id": 5}]
    for index, what in (
        (1, "may have been cut off"),
        (2, "NaN or Infinity"),
        (3, "byte 0xff at position 38"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl:{index}: .*{what}"):
            store[index]


def test_missing_files_and_folders_are_reported(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.parquet", "nothing"):
        with pytest.raises(DataError, match=r"correct the path"):
            open_records(tmp_path / name)
    with pytest.raises(DataError, match="the folder holds no records"):
        open_records(tmp_path)


# ---- tables


@pytest.fixture
def table() -> datasets.Dataset:
    return datasets.Dataset.from_list([record("a"), record("b", image=None), record("c")])


def assert_table(store: RecordStore, name: str) -> None:
    conversations = [parse_record(raw, store.where(index)) for index, raw in enumerate(store)]
    assert [conversation.id for conversation in conversations] == ["a", "b", "c"]
    assert [conversation.images for conversation in conversations] == [("a.png",), (), ("a.png",)]
    assert store.where(2) == f"{name}:2"


def test_a_dataset_is_a_store(table: datasets.Dataset) -> None:
    assert_table(open_records(table), "records")


def test_a_list_is_a_store() -> None:
    assert_table(open_records([record("a"), record("b", image=None), record("c")]), "records")
    assert open_records([]).parts == ()


def test_a_saved_dataset_is_a_store(table: datasets.Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    assert_table(open_records(str(tmp_path / "saved")), str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "dev": table}).save_to_disk(tmp_path / "splits")
    assert_table(open_records(tmp_path / "splits"), str(tmp_path / "splits"))
    assert_table(open_records(tmp_path / "splits", selection=TableSelection("dev")), str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"has no split 'test' \(got dev, train\)"):
        open_records(tmp_path / "splits", selection=TableSelection("test"))


def test_parquet_is_a_store(table: datasets.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table.to_parquet(path)
    store = open_records(path, cache_dir=tmp_path / "cache")
    assert_table(store, str(path))
    assert_table(pickle.loads(pickle.dumps(store)), str(path))
