"""The page's endpoints, called by Gradio's client, and the requests that they reject."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from html import unescape
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import gradio
import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from llavar_peft import Chat
from llavar_peft.data.image_files import open_images
from tests.pdf_files import paragraph, pdf
from tests.serving.server import MODEL, progressive, serving

GREEDY = {"temperature": 0, "tokens": 12, "seed": None}


@pytest.fixture(scope="module")
def address(chat: Chat) -> Iterator[str]:
    with serving(chat, ui=True) as (url, _):
        yield f"{url}/ui/"


@pytest.fixture
def client(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False, download_files=False)


def ask(client: Client, image: Path | None, question: str, model: str = MODEL, other: str = "(off)") -> list[Any]:
    """Return all outputs that the endpoint streamed."""
    shown = handle_file(str(image)) if image else None
    job = client.submit(picture=shown, question=question, model=model, other=other, api_name="/ask", **GREEDY)
    job.result(60)
    return job.outputs()


def shown_answers(html: Any) -> list[str]:
    html = html["value"] if isinstance(html, dict) else html
    return [unescape(part.partition("</span>")[0]) for part in html.split('<span class="words">')[1:]]


def conversation(client: Client) -> dict[str, Any]:
    return json.loads(client.predict(api_name="/as_json"))


def test_an_answer_is_streamed_and_is_the_models(client: Client, chat: Chat, images: list[Path]) -> None:
    outputs = ask(client, images[0], "Read.")
    expected = chat.ask(images[0], "Read.", adapter=None, temperature=0, max_new_tokens=12)
    assert shown_answers(outputs[-1][1]) == [expected]
    assert len({shown_answers(output[1])[0] for output in outputs}) > 2
    assert conversation(client) == {
        "picture": images[0].name,
        "turns": [{"question": "Read.", "answers": [{"model": MODEL, "text": expected}]}],
    }
    assert client.predict(api_name="/as_text") == f"Image: {images[0].name}\n\nQ: Read.\n{MODEL}: {expected}\n"


@pytest.mark.slow
def test_two_models_answer_side_by_side(client: Client, chat: Chat, images: list[Path]) -> None:
    one, two = chat.adapters
    outputs = ask(client, images[1], "Read.", one, two)
    expected = [chat.ask(images[1], "Read.", adapter=name, temperature=0, max_new_tokens=12) for name in (one, two)]
    assert expected[0] != expected[1]
    assert [shown_answers(window) for window in outputs[-1][1:]] == [[expected[0]], [expected[1]]]
    (turn,) = conversation(client)["turns"]
    assert [answer["model"] for answer in turn["answers"]] == [one, two]


@pytest.mark.slow
def test_pages_of_a_document_are_asked_about(client: Client, chat: Chat, images: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    document = tmp_path / "three.pdf"
    document.write_bytes(pdf(*(paragraph(f"Page {number} of a document. " * number) for number in (1, 2, 3))))

    def ask_pages(pages: str, picture: Path | None = None) -> list[str]:
        shown = handle_file(str(picture)) if picture else None
        arguments = {"picture": shown, "question": "Read.", "model": MODEL, "other": "(off)", **GREEDY}
        job = client.submit(**arguments, document=handle_file(str(document)), pages=pages, api_name="/ask")
        job.result(60)
        return shown_answers(job.outputs()[-1][1])

    for chosen in ("", "3, 1"):
        pages = list(open_images(document, pages=chosen.replace(" ", "") or None).values())
        assert ask_pages(chosen) == [chat.ask(pages, "Read.", adapter=None, temperature=0, max_new_tokens=12)]
    assert conversation(client)["picture"] == "three.pdf#page=3,1"
    for picture, pages, message in (
        (images[0], "", "Please remove one of them"), (None, "two", "write pages as in 1-3,7"),
        (None, "4", "has 3 pages"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=message):
            ask_pages(pages, picture)


def test_another_image_starts_another_conversation(client: Client, images: list[Path]) -> None:
    ask(client, images[0], "Read.")
    ask(client, images[0], "Again.")
    assert [turn["question"] for turn in conversation(client)["turns"]] == ["Read.", "Again."]
    ask(client, images[1], "Read.")
    assert len(conversation(client)["turns"]) == 1


def test_an_invalid_image_or_question_is_rejected(
    client: Client, address: str, images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    with pytest.raises(Exception, match="image cannot be read"):
        ask(client, broken, "Read.")
    with pytest.raises(Exception, match="write a question"):
        ask(client, None, "  ")
    assert conversation(client)["turns"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", r"An image cannot be read\. Supported formats"), (b"", "An image is an empty file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "An image is a PostScript drawing"),
        (b"%PDF-1.4", "is a PDF document that was cut off"), (progressive()[:900], "damaged or incomplete"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_image_is_named_without_a_traceback(
    content: bytes, message: str, client: Client, images: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Gradio opens uploads itself by default, and prints the exception."""
    monkeypatch.setattr("gradio.image_utils.preprocess_image", lambda *_, **__: pytest.fail("Gradio opened the file"))
    ask(client, images[0], "Read.")
    before = conversation(client)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(Exception, match=message):
        ask(client, path, "Read.")
    assert conversation(client) == before  # the conversation about the earlier image is kept
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("question", "message"),
    [("x" * 8001, "too long: it has 8,001 characters"), ("many words " * 700, "longer than the model can read")],
)
def test_a_long_question_is_named(
    question: str, message: str, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=message):
        ask(client, None, question)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_huge_image_is_not_decoded(client: Client, tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    Image.new("1", (12000, 12000)).save(huge)
    with pytest.raises(Exception, match="image"):
        ask(client, huge, "Read.")


def test_gradio_does_not_decode_a_jpeg_of_endless_scans(client: Client, tmp_path: Path) -> None:
    """With an image mode set, Gradio would decode the file itself, and the API would get a harmless copy."""
    endless = tmp_path / "endless.jpg"
    endless.write_bytes(progressive(200))
    with pytest.raises(Exception, match="more than 100 scans"):
        ask(client, endless, "Read.")


NOT_UPLOADED = (
    "/etc/hostname", "http://127.0.0.1:9/x.png", "https://example.org/x.png", "../README.md", "file:///etc/hostname",
)  # fmt: skip


@pytest.mark.parametrize("path", NOT_UPLOADED)
@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_client_cannot_name_files_or_urls(address: str, path: str, meta: dict[str, Any], place: int) -> None:
    """Without the guard, Gradio copies any file of this machine and downloads any URL, in any field."""
    data: list[Any] = [None, "Read.", MODEL, "(off)", 0, 4, None]
    data[place] = {"path": path, **meta}
    with httpx.Client(base_url=address, timeout=30) as http:
        for endpoint in ("call/ask", "run/ask", "queue/join"):
            body = {"data": data, "session_hash": "abc", "fn_index": 0}
            answer = http.post(f"gradio_api/{endpoint}", json=body)
            assert (answer.status_code, answer.text) == (400, "Files have to be uploaded to this page.")


def test_only_uploaded_files_are_served(address: str, images: list[Path]) -> None:
    for path in ("/etc/hostname", "README.md", str(images[0]), str(Path(__file__)), "/proc/self/environ"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 404
    with images[0].open("rb") as file:
        (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
    assert httpx.get(f"{address}gradio_api/file={path}").content == images[0].read_bytes()


def test_the_size_of_an_upload_is_limited(address: str) -> None:
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"0" * (15 * 2**20))}, timeout=30)
    assert answer.status_code == 413


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_is_told_where_an_upload_is_stored(address: str, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"0" * 60_000)}, timeout=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (answer.status_code, answer.text) == (507, "The server cannot store the image: its disk is full.")
    assert "Traceback" not in caplog.text
    assert "an upload cannot be stored in" in caplog.text


def test_uploads_outlive_a_cleaning_of_temporary_files(chat: Chat) -> None:
    with serving(chat, ui=True) as (url, app):
        shutil.rmtree(app.state.page_files.path)
        answer = httpx.post(f"{url}/ui/gradio_api/upload", files={"files": ("a.png", b"0")}, timeout=30)
    assert answer.status_code == 200


def test_the_page_tells_only_the_first_number_of_gradios_version(address: str) -> None:
    assert httpx.get(f"{address}config").json()["version"].isdigit()
    assert gradio.__version__ not in httpx.get(address).text


def test_the_page_loads_nothing_from_other_hosts(address: str) -> None:
    html = httpx.get(address).text
    for tag in ("<script src=", "<link"):
        for part in html.split(tag)[1:]:
            assert "://" not in part.partition(">")[0].replace(address.partition("/ui")[0], ""), part[:200]
    assert "fonts.googleapis" not in html
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False


@pytest.fixture(scope="module")
def keyed(chat: Chat) -> Iterator[str]:
    with serving(chat, ui=True, api_key="secret") as (root, _):
        yield root


def test_the_key_is_required(keyed: str) -> None:
    url = f"{keyed}/ui/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=("anyone", "secret")).status_code == 200
    assert httpx.post(f"{url}gradio_api/queue/join", json={}).status_code == 401
    client = Client(
        url,
        verbose=False,
        analytics_enabled=False,
        download_files=False,
        headers={"Authorization": "Bearer secret"},
    )
    assert shown_answers(ask(client, None, "Read.")[-1][1])


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "why"),
    [
        ("GET", "", {"Authorization": "Bearer wrong"}, 401, "The API key is missing"),
        ("GET", "", {"Origin": "http://elsewhere.example"}, 403, "Requests from other sites"),
        ("GET", "monitoring/summary", {}, 404, "Not found"),
        ("POST", "gradio_api/queue/join", {"Content-Length": "30000000"}, 413, "The body is larger"),
    ],
)
def test_a_rejected_request_has_an_id_and_is_logged(
    keyed: str, method: str, path: str, headers: dict[str, str], status: int, why: str, caplog: Any
) -> None:
    caplog.set_level("INFO", "llavar_peft")
    before = _refusals(keyed, status)
    connection = HTTPConnection(keyed.removeprefix("http://"), timeout=30)
    connection.request(method, f"/ui/{path}", headers={"Authorization": "Bearer secret", **headers})
    answer = connection.getresponse()
    assert (answer.status, answer.headers.get_all("x-content-type-options")) == (status, ["nosniff"])
    name = answer.headers["x-request-id"]
    connection.close()
    assert _refusals(keyed, status) == before + 1
    lines = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert lines[0].startswith(f"request {name} rejected: {why}")
    assert lines[1].startswith(f"{method} /ui/{path} {status} ")


def _refusals(root: str, status: int) -> int:
    lines = httpx.get(f"{root}/metrics", headers={"Authorization": "Bearer secret"}).text.splitlines()
    return sum(int(line.rpartition(" ")[2]) for line in lines if f'path="other",status="{status}"' in line)
