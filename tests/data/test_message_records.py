"""OpenAI's messages: the same ids and labels as the equal conversation, and a message for everything that is wrong."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.conversation_template import LLAVA_V1, VICUNA_V1
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.message_records import as_record
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.data.training_dataset import image_count, text_tokens
from llavar_peft.errors import DataError
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from tests.data.test_tokenize import GOLDEN, Settings
from tests.parts.test_chat_template import _processor as chat_processor

WHERE = "r.json:3"


def _settings() -> dict[str, Any]:
    tokenizer = load_tokenizer(GOLDEN / "small")
    add_image_tokens(tokenizer)
    chat = chat_processor("chatml")
    return {
        "llava_v1": Settings(tokenizer, conversation_template=LLAVA_V1),
        "vicuna_v1": Settings(tokenizer, use_im_start_end=False, conversation_template=VICUNA_V1),
        "chat": Settings(
            chat.tokenizer,
            use_im_start_end=False,
            image_token="<image>",
            conversation_template=chat.conversation_template,
        ),
    }


PROCESSORS = _settings()


def user(*content: Any) -> dict[str, Any]:
    single = len(content) == 1 and not isinstance(content[0], dict)
    return {"role": "user", "content": content[0] if single else list(content)}


def assistant(text: str | None = "EXIT") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def messages(*listed: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": "a", **keys, "messages": list(listed)}


def conversation(*turns: str, **keys: Any) -> dict[str, Any]:
    listed = [{"from": "gpt" if number % 2 else "human", "value": turn} for number, turn in enumerate(turns)]
    return {"id": "a", **keys, "conversations": listed}


IMAGE, URL = {"type": "image"}, {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": (messages(user("Hi"), assistant()), conversation("Hi", "EXIT")),
    "placeholder": (
        messages(user("<image>\nRead."), assistant(), image="a.png"),
        conversation("<image>\nRead.", "EXIT", image="a.png"),
    ),
    "part with the column's image": (
        messages(user(IMAGE, text("Read.")), assistant(), images=["a.png"]),
        conversation("<image>\nRead.", "EXIT", image="a.png"),
    ),
    "image after the text": (
        messages(user(text("Read:"), URL), assistant()),
        conversation("Read:\n<image>", "EXIT", image="a.png"),
    ),
    "a URL that is a path": (
        messages(user({"type": "image_url", "image_url": "a.png"}, text("Read.")), assistant()),
        conversation("<image>\nRead.", "EXIT", image="a.png"),
    ),
    "two turns": (
        messages(
            user({"type": "image", "image": "b.png"}, text("One?")),
            assistant("1"),
            user(text("Two?"), URL),
            assistant(),
        ),
        conversation("<image>\nOne?", "1", "Two?\n<image>", "EXIT", image=["b.png", "a.png"]),
    ),
    "a line break that is there": (
        messages(user(text("See\n"), IMAGE, text("\nRead.")), assistant(), image_url="a.png"),
        conversation("See\n<image>\nRead.", "EXIT", image="a.png"),
    ),
    "one image twice": (
        messages(user(IMAGE, text("Read.")), assistant("x"), user(IMAGE), assistant(), image={"url": "a.png"}),
        conversation("<image>\nRead.", "x", "<image>", "EXIT", image="a.png"),
    ),
    "messages of one role": (
        messages(user("One"), user("two"), assistant("x"), assistant("y")),
        conversation("One\ntwo", "x\ny"),
    ),
    "a greeting": (messages(assistant("Hello"), user("Hi"), assistant()), conversation("Hi", "EXIT")),
    "nulls of a table": (
        messages(
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Read.", "image_url": None},
                    {"type": "image_url", "text": None, "image_url": {"url": "a.png"}},
                ],
                "tool_calls": None,
            },
            assistant(),
            image=None,
            images=[],
            conversations=None,
        ),
        conversation("Read.\n<image>", "EXIT", image="a.png"),
    ),
    "no content": (messages(user("Hi"), assistant(None)), conversation("Hi", "")),
    "messages under 'conversations'": (
        {"id": "a", "image": "a.png", "conversations": [user("<image>"), assistant()]},
        conversation("<image>", "EXIT", image="a.png"),
    ),
    "an address next to the image": (
        messages(user(IMAGE), assistant(), images=["a.png"], image_url="https://example.org/a.png"),
        conversation("<image>", "EXIT", image="a.png", image_url="https://example.org/a.png"),
    ),
    "images under 'images'": (
        conversation("<image>", "EXIT", images=["a.png"]),
        conversation("<image>", "EXIT", image="a.png"),
    ),
}


def _encoded(raw: dict[str, Any], processor: Any) -> tuple[Any, ...]:
    example = encode_record(raw, processor, 4096)
    return example.input_ids.tolist(), example.labels.tolist(), example.images, example.dropped


@pytest.mark.parametrize("template", PROCESSORS)
@pytest.mark.parametrize("name", EQUAL)
def test_messages_have_the_ids_and_labels_of_the_equal_conversation(name: str, template: str) -> None:
    ours, equal = EQUAL[name]
    assert _encoded(ours, PROCESSORS[template]) == _encoded(equal, PROCESSORS[template])


WORDS = st.lists(st.sampled_from(["the", " ", "\n", "é", "</s>", "USER:", "🙂", "<im_end>"]), max_size=4).map("".join)


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a record of messages, and the equal conversation."""
    listed: list[dict[str, Any]] = []
    turns: list[str] = []
    paths: list[str] = []
    own = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        parts, said = [], [draw(WORDS)]
        parts.append(text(said[0]))
        for _ in range(draw(st.integers(0, 2))):
            path = draw(st.sampled_from(["a.png", "b/c.jpg"]))
            paths.append(path)
            after = draw(WORDS)
            parts += [{"type": "image", "image": path} if own else IMAGE, text(after)]
            said.append(after)
        value = said[0]
        for after in said[1:]:
            value += "" if value.endswith("\n") or value == "" else "\n"
            value += "<image>" + ("" if after.startswith("\n") or after == "" else "\n") + after
        answer = draw(WORDS)
        listed += [{"role": "user", "content": parts}, assistant(answer)]
        turns += [value, answer]
    keys = {"image": paths} if paths else {}
    return messages(*listed, **({} if own else keys)), conversation(*turns, **keys)


@settings(deadline=None, max_examples=40)
@given(_pairs())
def test_any_messages_have_the_ids_and_labels_of_the_equal_conversation(
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for processor in PROCESSORS.values():
        assert _encoded(pair[0], processor) == _encoded(pair[1], processor)
    assert image_count(pair[0]) == image_count(pair[1])
    assert text_tokens(pair[0]) == text_tokens(pair[1])
    read = parse_record(pair[0], WHERE)
    again = parse_record(json.loads(json.dumps(as_record(read, [str(path) for path in read.images]))), WHERE)
    assert _encoded(as_record(again, [str(path) for path in again.images]), PROCESSORS["chat"]) == _encoded(
        pair[0], PROCESSORS["chat"]
    )


@pytest.mark.parametrize("template", PROCESSORS)
def test_a_placeholder_in_the_text_is_text_where_images_are_parts(template: str) -> None:
    raw = messages(user(text("What is <image>?"), URL), assistant("<image>"), user("And <image>?"), assistant())
    example = encode_record(raw, PROCESSORS[template], 4096)
    assert example.images == ("a.png",)
    plain = messages(user(text("What is (image)?"), URL), assistant("(image)"), user("And (image)?"), assistant())
    count = encode_record(plain, PROCESSORS[template], 4096)
    assert len(example.image_token_counts) == len(count.image_token_counts) == 1


@pytest.mark.parametrize("template", PROCESSORS)
def test_a_system_message_replaces_the_prompt_of_the_template(template: str) -> None:
    processor = PROCESSORS[template]
    raw = messages({"role": "system", "content": "Be brief."}, user("Hi"), assistant())
    read = processor.tokenizer.decode(encode_record(raw, processor, 4096).input_ids)
    default = processor.tokenizer.decode(encode_record(conversation("Hi", "EXIT"), processor, 4096).input_ids)
    assert "Be brief." in read
    assert "Be brief." not in default
    assert "artificial intelligence" not in read
    assert "language and vision assistant" not in read
    two = messages(
        {"role": "system", "content": "Be"}, {"role": "system", "content": [text("brief.")]}, user("Hi"), assistant()
    )
    assert parse_record(two, WHERE).system == "Be\nbrief."


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "tool": (
        messages(user("a"), {"role": "tool", "content": "b"}),
        "messages[1]: has the role 'tool'",
        "remove the call",
    ),
    "function": (messages(user("a"), {"role": "function", "content": "b"}), "role 'function'", "leave the record out"),
    "tool calls": (messages(user("a"), CALL), "messages[1]: 'tool_calls' is set", "remove the call"),
    "developer": (messages({"role": "developer", "content": "a"}, user("a")), "got 'developer'", "write 'system'"),
    "no role": (messages({"content": "a"}), "messages[0]: has no 'role'", "one of these"),
    "late system": (
        messages(user("a"), {"role": "system", "content": "b"}, assistant()),
        "messages[1]: the system message follows",
        "beginning",
    ),
    "image in an answer": (
        messages(user("a"), {"role": "assistant", "content": [IMAGE]}, image="a.png"),
        "messages[1]: an image in a message of the assistant",
        "move the image",
    ),
    "image in the system message": (
        messages({"role": "system", "content": [URL]}, user("a"), assistant()),
        "an image in a message of the system",
        "move the image",
    ),
    "remote": (
        messages(user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}), assistant()),
        "is a URL",
        "download it",
    ),
    "remote part": (
        messages(
            user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, text("a")), assistant()
        ),
        "messages[0].content[0].image_url: is a URL",
        "download it",
    ),
    "data URL": (
        messages(user({"type": "image_url", "image_url": "data:image/png;base64,A"}, text("a")), assistant()),
        "is a data URL that is not valid base64",
        "save the image",
    ),
    "no URL": (messages(user({"type": "image_url"}, text("a")), assistant()), "content[0]: has no 'image_url'", "path"),
    "audio": (
        messages(user({"type": "input_audio"}, text("a")), assistant()),
        "unknown type of part (got 'input_audio'",
        "type",
    ),
    "number of parts": (
        messages(user(IMAGE, IMAGE, text("a")), assistant(), images=["a.png", "b.png", "c.png"]),
        "got 2, expected 3",
        "one part for each",
    ),
    "unused image": (
        messages(user({"type": "image", "path": "b.png"}, text("a")), assistant(), image="a.png"),
        "got 0, expected 1",
        "into its part",
    ),
    "two keys": (
        messages(user("<image>"), assistant(), image="a.png", images=["b.png"]),
        "'image' and under 'images'",
        "keep",
    ),
    "both formats": (
        {**messages(user("a"), assistant()), "conversations": []},
        "has 'conversations' and 'messages'",
        "remove one",
    ),
    "no user": (messages(assistant()), "has no message of the user", "add the question"),
    "empty": (messages(), "has no message of the user", "add the question"),
    "not a list": ({"messages": "a"}, "'messages' has the wrong type (got a string", '"role"'),
    "not an object": (messages("a"), "messages[0]: the message has the wrong type (got a string", '"role"'),  # type: ignore[arg-type]
    "turns": ({"messages": [{"from": "human", "value": "a"}]}, "has 'from' as in LLaVA's format", "rename 'messages'"),
    "content": (messages(user(3)), "messages[0]: 'content' has the wrong type (got an integer", "string"),
    "part": (messages(user([3])), "messages[0].content[0]: the part has the wrong type", '"type"'),
    "long role": (messages({"role": "x" * 500, "content": ""}), "unknown role (got 'xxx", "one of these"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_alike_by_the_check_and_before_training(name: str, tmp_path: Path) -> None:
    raw, what, fix = FAULTS[name]
    path = tmp_path / "r.json"
    path.write_text(json.dumps([raw]))
    for found in (
        check_records(open_records(path), ImageRoots([tmp_path])).faults,
        preflight(open_records(path), ImageRoots([tmp_path])),
    ):
        assert found
        assert what in f"{found[0].where}: {found[0].what}"
        assert fix in found[0].fix
        assert found[0].where.startswith(f"{path}:0")
        assert len(str(found[0])) < 400 + len(str(path))
    with pytest.raises(DataError):
        parse_record(raw, WHERE)


def test_a_record_of_messages_is_checked_like_a_conversation(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        messages(user(IMAGE, text("Read.")), assistant(), images=["a.png"]),
        messages(user(URL, text("Read.")), id="b"),
        messages(user("Hi"), assistant(""), id="c"),
        messages(user({"type": "image", "path": "../x.png"}, text("Read.")), assistant(), id="d"),
        messages(user("Read."), assistant(), id="e", image="a.png"),
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = check_records(open_records(path), ImageRoots([tmp_path]))
    kinds = [(fault.index, fault.kind) for fault in found.faults]
    assert kinds == [(1, "no_answer"), (2, "empty_answer"), (3, "image_outside"), (4, "placeholder")]
    assert [(one.index, one.kind) for one in preflight(open_records(path), ImageRoots([tmp_path]))] == kinds


def test_lengths_are_estimated_alike() -> None:
    ours = messages(user(IMAGE, text("x" * 400)), assistant("y" * 40), image="a.png")
    equal = conversation("<image>\n" + "x" * 400, "y" * 40, image="a.png")
    assert image_count(ours) == image_count(equal) == 1
    assert text_tokens(ours) == text_tokens(equal)


def _data_url(color: str, form: str = "PNG") -> str:
    file = BytesIO()
    Image.new("RGB", (8, 8), color).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_data_urls_are_images_like_files(name: str, tmp_path: Path) -> None:
    """In both forms of a part, several in a message, under a record's key, with line breaks, and without padding."""
    red, blue = _data_url("red"), _data_url("blue", "WEBP")
    broken = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n cut").decode()
    parts = [
        {"type": "image_url", "image_url": {"url": red, "detail": "high"}},
        text("Which is blue?"),
        {"type": "image_url", "image_url": f"{blue[:60]}\n{blue[60:]}".rstrip("=")},
    ]
    rows = [
        messages(user(*parts), assistant("The second.")),
        conversation("<image>\nColor?", "Red.", image=red),
        messages(user({"type": "image", "image": broken}, text("Color?")), assistant()),
    ]
    (tmp_path / name).write_text(json.dumps(rows) if name == "r.json" else "\n".join(map(json.dumps, rows)))
    store, roots = open_records(tmp_path / name), ImageRoots()
    assert preflight(store, roots) == []
    first = parse_record(store[0], store.where(0))
    assert [roots.open(image).getpixel((0, 0))[2] > 200 for image in first.images] == [False, True]
    assert first.turns[0].parts == ("", None, "\nWhich is blue?\n", None, "")
    assert [image_count(store[index]) for index in range(3)] == [2, 1, 1]
    (fault,) = check_records(store, roots).faults
    assert fault.kind == "image_broken"
    assert fault.where == f"{tmp_path / name}:2: messages[0].content[0].image"
    assert "cannot be read" in fault.what or "damaged" in fault.what
