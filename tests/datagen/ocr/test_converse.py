"""Conversations by a model at a local endpoint that fails, limits rates, and replies as models do."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from llavar_peft.cli import main
from llavar_peft.data.json_schema import AnswerSchema
from llavar_peft.data.record_store import parse_record
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_ocr_records import journal_path, make_ocr_record
from llavar_peft.datagen.ocr.check_replies import check_reply, find_ungrounded
from llavar_peft.datagen.ocr.make_conversations import (
    ConverseReport,
    ConverseSettings,
    make_conversations,
    read_captions,
)
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.openai_client import Endpoint
from llavar_peft.errors import DataError, EnvironmentFaultError, InterruptedRunError, LlavarError

READ = ["GRAND OPENING Saturday 14 June\nFree coffee until 11:30", "GRAND 0PENING Saturday 14 June"]
CAPTION = "A poster on a shop window."
SOUND = [
    {"question": "What is announced?", "answer": 'The poster announces a "Grand Opening".'},
    {"question": "On which day is it?", "answer": "It is on Saturday, 14 June."},
]


def written(turns: list[dict[str, str]]) -> str:
    return json.dumps({"turns": turns})


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("It is on Saturday.", None),
        ("14", None),
        ("GRAND", None),
        ('The sign says "grand opening".', None),
        ('The sign says "grand openning".', None),  # one letter in fourteen
        ("A shop window.", None),
        ("Yes.", "no word of it"),
        ("Certainly, with pleasure.", "no word of it"),
        ("It is on Saturday, 15 June.", "the number 15"),
        ('It says "Closing down" on Saturday.', '"closing down" is quoted'),
        ("In 30 minutes coffee is no longer free.", None),
    ],
)
def test_grounding(answer: str, fault: str | None) -> None:
    found = find_ungrounded(answer, [*READ, CAPTION])
    assert found is None if fault is None else found is not None and found.startswith(fault)


def test_a_number_may_come_from_the_question() -> None:
    assert find_ungrounded("The 3 words are Free coffee until.", READ)
    assert find_ungrounded("The 3 words are Free coffee until.", READ, ["Which 3 words?"]) is None


@given(st.text(max_size=60))
def test_a_text_is_grounded_in_itself(text: str) -> None:
    assert find_ungrounded(text, [text]) is None


REPLIES = [
    written(SOUND),
    json.dumps(SOUND),
    f"Here you are:\n```json\n{written(SOUND)}\n```\nAnything else?",
    written(SOUND).replace("poster announces", "poster\nannounces"),
    "\n".join(f"Question {n}: {turn['question']}\nAnswer {n}: {turn['answer']}" for n, turn in enumerate(SOUND, 1)),
    "\n\n".join(f"**Q:** {turn['question']}\n**A:** {turn['answer']}" for turn in SOUND),
    written([{key: f"{key.title()}: {text} <image>" for key, text in turn.items()} for turn in SOUND]),
]


@pytest.mark.parametrize("reply", REPLIES)
def test_all_forms_of_replies_are_accepted(reply: str) -> None:
    checked = check_reply(reply, [*READ, CAPTION])
    assert checked.faults == ()
    assert [question for question, _ in checked.turns] == [turn["question"] for turn in SOUND]
    assert [" ".join(answer.split()) for _, answer in checked.turns] == [turn["answer"] for turn in SOUND]


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ({"question": "", "answer": "Saturday"}, "it is empty"),
        ({"question": "When?", "answer": " "}, "it is empty"),
        ({"question": "what is announced?", "answer": "The Grand Opening."}, "the same again"),
        ({"question": "What does the OCR say?", "answer": "Saturday"}, "speaks of 'OCR'"),
        ({"question": "Who?", "answer": "According to the caption, a shop."}, "speaks of 'caption'"),
        ({"question": "When does it end?", "answer": "The coffee ends at 12:45."}, "the number 12"),
    ],
)
def test_invalid_turns_are_left_out(bad: dict[str, str], fault: str) -> None:
    checked = check_reply(written([*SOUND, bad]), [*READ, CAPTION])
    assert len(checked.turns) == 2
    assert len(checked.faults) == 1
    assert fault in checked.faults[0]


@pytest.mark.slow
@given(
    st.text(max_size=200)
    | st.recursive(st.none() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)).map(json.dumps)
)
def test_any_reply_is_handled(reply: str) -> None:
    for question, answer in check_reply(reply, READ).turns:
        assert question.strip()
        assert answer.strip()


@dataclass
class Server:
    """A local endpoint, which answers with a status and a body by the number of the request and the messages."""

    url: str
    answer: Callable[[int, list[dict[str, str]]], tuple[int, str]]
    requests: list[list[dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body["messages"])
                number = len(state.requests)
            status, text = state.answer(number, body["messages"])
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            data = json.dumps(reply if status == 200 else {"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    pytest.importorskip("openai")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{running.server_port}/v1", lambda *_: (200, written(SOUND)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    yield state
    running.shutdown()
    running.server_close()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Return twelve records with the readings of two engines, as ``build_records`` writes them."""
    path = tmp_path / "records.json"
    made = [make_ocr_record(f"p{number}", f"p{number}.png", READ[0], 0) for number in range(12)]
    path.write_text(json.dumps(made), encoding="utf-8")
    with ResumeJournal(journal_path(path), {"format": 1}) as journal:
        for number in range(12):
            corners = ((0.0, 0.0), (90.0, 0.0), (90.0, 20.0), (0.0, 20.0))
            said = [f"{text} page {number}" for text in READ]
            lines = {name: [OcrLine(text, corners, 0.9).as_json()] for name, text in zip("ab", said, strict=True)}
            journal.append({"path": f"p{number}.png", "lines": lines})
    return path


def settings(server: Server, **changes: Any) -> ConverseSettings:
    return ConverseSettings(endpoint=Endpoint(model="m", base_url=server.url, tries=3), **changes)


def run(records: Path, server: Server, **changes: Any) -> tuple[ConverseReport, list[dict[str, Any]]]:
    out = records.with_name("conversations.json")
    report = make_conversations(records, out, settings(server, **changes), {f"p{n}.png": CAPTION for n in range(12)})
    return report, json.loads(out.read_text("utf-8"))


def test_every_conversation_is_well_formed(records: Path, server: Server) -> None:
    report, made = run(records, server)
    assert (report.kept, report.turns, report.asked, report.repaired) == (12, 24, 12, 0)
    sides = set()
    for number, record in enumerate(made):
        conversation = parse_record(record, "made")
        assert (conversation.id, conversation.images) == (f"p{number}", (f"p{number}.png",))
        assert [turn.role for turn in conversation.turns] == ["human", "gpt"] * 2
        assert [turn.text.count("<image>") for turn in conversation.turns] == [1, 0, 0, 0]
        sides.add(conversation.turns[0].text.startswith("<image>\n"))
    assert sides == {True, False}
    asked = server.requests[0][-1]["content"]
    assert CAPTION in asked
    assert "Read by program 2:\nGRAND 0PENING" in asked


def test_no_more_turns_are_kept_than_requested(records: Path, server: Server) -> None:
    report, made = run(records, server, least=1, most=1)
    assert (report.kept, report.turns) == (12, 12)
    assert all(len(record["conversations"]) == 2 for record in made)


def test_fields_are_asked_for_and_bad_ones_are_dropped_and_counted(records: Path, server: Server) -> None:
    """Every fourth reply lacks a field, and stays so; all others have one in the wrong place, which is put right."""
    pytest.importorskip("jsonschema")
    fields = {"title": {"type": "string"}, "day": {"type": "integer"}}
    schema = AnswerSchema.of({"type": "object", "properties": fields, "required": ["title", "day"]})

    def answer(number: int, messages: list[dict[str, str]]) -> tuple[int, str]:
        assert schema.text in messages[0]["content"]
        page = int(messages[1]["content"].rpartition("page ")[2])
        return 200, json.dumps({"day": 14, "title": "GRAND OPENING"} if page % 4 else {"title": "GRAND OPENING"})

    server.answer = answer
    report, made = run(records, server, schema=schema, attempts=2)
    assert (report.kept, report.turns, report.as_dict()["dropped"]) == (9, 9, {"malformed": 3})
    asked, answered = made[0]["conversations"]
    assert schema.question in asked["value"]
    assert answered["value"] == '{"title":"GRAND OPENING","day":14}'
    arguments = ["ocr", "converse", str(records), "--out", str(records.with_name("o.json")), "--model", "m"]
    assert main([*arguments, "--task", "extract"]) == 2


def test_an_unpaired_surrogate_is_kept(records: Path, server: Server) -> None:
    server.answer = lambda *_: (200, "\ud83d " + written(SOUND))
    assert run(records, server)[0].kept == 12
    assert run(records, server)[0].remembered == 12


def test_captions_may_contain_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    line = json.dumps({"image": "a.jpg", "caption": "two\u2028lines \x85"}, ensure_ascii=False)
    path.write_text(line + "\n\n", encoding="utf-8")
    assert read_captions(path) == {"a.jpg": "two\u2028lines \x85"}


def test_nothing_is_paid_for_twice(records: Path, server: Server) -> None:
    first, made = run(records, server)
    again, same = run(records, server)
    assert (first.asked, again.asked, again.remembered) == (12, 0, 12)
    assert made == same
    assert len(server.requests) == 12


def test_replies_kept_by_version_0_1_are_not_paid_for_again(tmp_path: Path, server: Server) -> None:
    """Replies are found by a hash of the request, including its fixed texts."""
    records, out = tmp_path / "records.json", tmp_path / "conversations.json"
    records.write_text(json.dumps([make_ocr_record("p0", "p0.png", READ[0], 0)]), encoding="utf-8")
    corners = [0.0, 0.0, 90.0, 0.0, 90.0, 20.0, 0.0, 20.0]
    entry = {"path": "p0.png", "lines": {"a": [["GRAND OPENING Saturday 14 June", corners, 0.9]]}}
    journal_path(records).write_text(f'{{"format":2}}\n{json.dumps(entry)}\n', encoding="utf-8")
    key = "cb83acf4b63e65195c35a8d4c0c645a020b8cfed1d59e14577a881710f7dd92c"
    reply = json.dumps({"key": key, "model": "m", "reply": written(SOUND)})
    out.with_suffix(".replies.jsonl").write_text(f'{{"format":1}}\n{reply}\n', encoding="utf-8")
    report = make_conversations(records, out, settings(server), {"p0.png": "A poster."})
    assert (report.asked, report.remembered, report.kept) == (0, 1, 1)
    assert server.requests == []


def test_rate_limits_and_failures_are_retried(records: Path, server: Server) -> None:
    failing = {2: 429, 3: 429, 5: 500, 7: 503}
    server.answer = lambda number, _: (failing[number], "busy") if number in failing else (200, written(SOUND))
    report, made = run(records, server)
    assert (report.asked, len(made)) == (12, 12)
    assert len(server.requests) == 16


def test_an_endpoint_that_keeps_failing_stops_the_run_without_loss(records: Path, server: Server) -> None:
    server.answer = lambda number, _: (503, "down") if number > 5 else (200, written(SOUND))
    with pytest.raises(InterruptedRunError, match="failed 4 times in a row"):
        run(records, server, concurrency=1)
    assert not records.with_name("conversations.json").exists()
    server.answer = lambda *_: (200, written(SOUND))
    report, _ = run(records, server)
    assert (report.asked, report.remembered) == (7, 5)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(status: int, records: Path, server: Server) -> None:
    server.answer = lambda *_: (status, "no such model")
    with pytest.raises(EnvironmentFaultError, match="no such model"):
        run(records, server, concurrency=1)
    assert len(server.requests) == 1


def test_invalid_replies_are_repeated_with_their_faults(records: Path, server: Server) -> None:
    wrong = [{"question": "When?", "answer": "On Saturday, 15 June."}, SOUND[0]]

    def answer(_: int, messages: list[dict[str, str]]) -> tuple[int, str]:
        if "page 3" in messages[1]["content"]:
            return 200, "I cannot help with that."
        return 200, written(SOUND) if len(messages) > 2 else written(wrong)

    server.answer = answer
    report, made = run(records, server)
    assert (report.kept, report.repaired) == (11, 11)
    saved = report.as_dict()
    assert list(saved) == ["pictures", "kept", "turns", "mended", "asked", "remembered", "drops", "dropped"]
    assert (saved["pictures"], saved["mended"]) == (12, 11)  # the keys of version 0.1
    assert [(identity, outcome) for identity, outcome, _ in report.drops] == [("p3", "malformed")]
    assert all("15" not in json.dumps(record) for record in made)
    repaired = next(messages for messages in server.requests if len(messages) == 4 and "page 3" not in str(messages))
    assert "- turn 1: the number 15 is not in the text that was read" in repaired[-1]["content"]


def test_an_image_whose_request_is_rejected_is_left_out(records: Path, server: Server) -> None:
    server.answer = lambda _, messages: (
        (400, "content policy") if "page 7" in messages[1]["content"] else (200, written(SOUND))
    )
    report, made = run(records, server)
    assert len(made) == 11
    assert [(identity, outcome) for identity, outcome, _ in report.drops] == [("p7", "refused")]
    server.answer = lambda *_: (400, "unknown parameter")
    for path in records.parent.glob("conversations.*"):
        path.unlink()
    with pytest.raises(EnvironmentFaultError, match="rejects all requests"):
        run(records, server, concurrency=1)


def test_the_command(records: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    out = records.with_name("made.json")
    captions = records.with_name("captions.jsonl")
    captions.write_text(json.dumps({"image": "p0.png", "caption": CAPTION}) + "\n", encoding="utf-8")
    command = ["ocr", "converse", str(records), "--out", str(out), "--model", "m", "--base-url", server.url]
    assert main([*command, "--captions", str(captions)]) == 0
    assert "12 conversations about 12 images, 24 questions" in capsys.readouterr().out
    assert main(["data", "check", str(out)]) == 2  # no folder of images was named
    assert "12 records, 1 fault" in capsys.readouterr().out


def test_captions_are_written_about_images_without_their_text(
    records: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A caption counts as evidence, is asked for once, and the image that is sent has no text where text was read."""
    pytest.importorskip("cv2")
    for number in range(12):  # no two alike, because a request is sent once
        drawn = Image.new("RGB", (90, 60 + number), (200, 60, 60))
        ImageDraw.Draw(drawn).rectangle((4, 4, 84, 16), fill=(255, 255, 255))
        drawn.save(records.with_name(f"p{number}.png"))
    records.with_name("p5.png").write_bytes(b"broken")
    about = [*SOUND, {"question": "Where does it hang?", "answer": "In a greenhouse."}]
    seen: list[Image.Image] = []

    def answer(_: int, messages: list[dict[str, Any]]) -> tuple[int, str]:
        if isinstance(messages[0]["content"], str):
            return 200, written(about) if "greenhouse" in messages[1]["content"] else written(SOUND)
        data = messages[0]["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        seen.append(Image.open(io.BytesIO(base64.b64decode(data))))
        return 200, "A wall of a\n greenhouse."

    server.answer = answer
    out = records.with_name("made.json")
    known = records.with_name("captions.json")
    known.write_text(json.dumps({"p0.png": "A wall."}))
    command = ["ocr", "converse", str(records), "--out", str(out), "--model", "m", "--base-url", server.url]
    command += ["--caption-model", "sees", "--captions", str(known)]
    assert main(command) == 2  # the folder is not known
    assert "give --images FOLDER" in capsys.readouterr().err
    for _ in range(2):
        assert main([*command, "--images", str(records.parent)]) == 0
        assert len(seen) == 10  # p0 has a caption, p5 is broken
    assert "11 conversations about 12 images, 32 questions" in capsys.readouterr().out
    for image in seen:
        pixels = np.asarray(image).astype(int)
        assert image.width == 90
        assert np.abs(pixels - (200, 60, 60)).max() < 40


def test_missing_inputs_are_reported(records: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(LlavarError, match="OPENAI_API_KEY: is not set"):
        run(records, server)
    journal_path(records).unlink()
    with pytest.raises(DataError, match="run llavar-peft ocr build"):
        run(records, server)
    bad = records.with_name("captions.json")
    bad.write_text('{"p0.png": 3}', encoding="utf-8")
    with pytest.raises(DataError, match=r"captions\.json:p0\.png: is int, expected text"):
        read_captions(bad)
