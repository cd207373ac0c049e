"""Invalid and hostile requests, among them such as broke vLLM, SGLang or Gradio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from llavar_peft import Chat
from llavar_peft.inference import fetch_image as fetching
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.api_schema import parse_request
from llavar_peft.serving.api.chat_messages import read_conversation
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError
from tests.serving.server import JSON, MODEL, Neighbour, ask_body, call, data_url, png, progressive, serving


@pytest.fixture
def app(chat: Chat) -> Iterator[FastAPI]:
    made = create_app(chat.engine, name=MODEL)
    yield made
    made.state.scheduler.close()


def test_an_allowed_host_is_connected_to_only_at_public_addresses(
    chat: Chat, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = RequestImageReader(chat.engine.processor, RequestLimits(), domains=frozenset({"images.example"}))
    monkeypatch.setattr(fetching, "_resolve", lambda target, deadline: ["93.184.216.34", "127.0.0.1"])
    with pytest.raises(RequestRejectedError) as refused:
        reader.open([f"http://images.example:{neighbour.port}/a.png"])
    assert "127.0.0.1" not in refused.value.message
    assert neighbour.visits == 0


def test_a_redirect_to_a_private_address_is_not_followed(
    chat: Chat, neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = f"127.0.0.1:{neighbour.port}"
    asked = []

    def redirects(target: Any, url: str, rules: Any, deadline: float) -> str:
        asked.append(url)
        return f"http://{inside}/" if len(asked) == 1 else f"http://images.example@{inside}/"

    reader = RequestImageReader(chat.engine.processor, RequestLimits(), domains=frozenset({"images.example"}))
    monkeypatch.setattr(fetching, "_get", redirects)
    with pytest.raises(RequestRejectedError):
        reader.open(["http://images.example/a.png"])
    assert asked == ["http://images.example/a.png"]
    assert neighbour.visits == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@images.example/",
        "http://127.0.0.1:{port}#@images.example/", "http://127.0.0.1:{port}?@images.example/",
        "http://images.example:80@127.0.0.1:{port}/", "http://[::1]:{port}%25images.example/",
        "http://images.example\t@127.0.0.1:{port}/", "http://images.example.127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/images.example", "http:127.0.0.1:{port}/", "//127.0.0.1:{port}/",
        "http://images。example@127.0.0.1:{port}/", "file://images.example/etc/passwd",
    ],
)  # fmt: skip
def test_one_parser_reads_an_address(url: str, chat: Chat, neighbour: Neighbour) -> None:
    reader = RequestImageReader(chat.engine.processor, RequestLimits(), domains=frozenset({"images.example"}))
    with pytest.raises(RequestRejectedError):
        reader.open([url.format(port=neighbour.port)])
    assert neighbour.visits == 0


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "file:///etc/passwd", "tests/golden", "C:\\x.png", "\\\\host\\x.png", ""]
)
def test_no_url_is_opened_as_a_path(path: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("builtins.open", lambda *args, **_: opened.append(args))
    answer = asyncio.run(call(app, ask_body("Read.", path)))
    assert answer.status == 400
    assert opened == []


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 3000), (3000, 1), (13, 13)])
def test_tiny_and_thin_images_are_answered(size: tuple[int, int], app: FastAPI) -> None:
    answer = asyncio.run(call(app, ask_body("Read.", data_url(png(*size)))))
    assert answer.status == 200, answer.json


def test_an_image_with_a_huge_size_in_its_header_is_not_decoded(app: FastAPI) -> None:
    """A file of some kilobytes whose decoding would take gigabytes."""
    data = bytearray(png(1, 1))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    answer = asyncio.run(call(app, ask_body("Read.", data_url(bytes(data)))))
    assert answer.status == 413
    assert "megapixels" in answer.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP"])
def test_every_documented_format_is_read(kind: str, app: FastAPI) -> None:
    file = BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    answer = asyncio.run(call(app, ask_body("Read.", data_url(file.getvalue()))))
    assert answer.status == 200, answer.json


def test_a_jpeg_of_endless_scans_is_not_decoded(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """Decoding a megabyte of scans, each a pass over all pixels, would take minutes."""
    assert asyncio.run(call(app, ask_body("Read.", data_url(progressive())))).status == 200
    answer = asyncio.run(call(app, ask_body("Read.", data_url(progressive(200)))))
    assert answer.status == 400
    assert "more than 100 scans" in answer.message


def test_the_cause_is_logged_but_not_sent(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = asyncio.run(call(app, ask_body("Read.", data_url(b"no image"))))
    assert answer.status == 400
    (line,) = (record.getMessage() for record in caplog.records if " rejected: " in record.getMessage())
    assert "UnidentifiedImageError" in line
    assert "Unidentified" not in answer.message


def test_a_busy_server_rejects_a_request_before_reading_it(chat: Chat) -> None:
    full = create_app(chat.engine, name=MODEL, limits=RequestLimits(waiting=0, rows=0))
    answer = asyncio.run(call(full, b"{"))
    full.state.scheduler.close()
    assert answer.status == 429
    assert int(dict(answer.headers)["retry-after"]) > 0


@pytest.mark.parametrize(
    "typed", ["<image>", "<im_patch>", "<im_start><im_patch><im_patch><im_end>", "<image>\n" * 900]
)
def test_placeholders_without_an_image_are_text(typed: str, app: FastAPI) -> None:
    answer = asyncio.run(call(app, ask_body(typed)))
    assert answer.status in (200, 400), answer.json
    with_image = asyncio.run(call(app, ask_body(typed[:60], data_url(png()))))
    assert with_image.status == 200, with_image.json


@pytest.mark.parametrize(
    "text", ["</s>", "<s>", "<unk>", "<im_start>", "<im_end>", "<pad>", "[PAD]", "###", "USER:", "<0x0A>"]
)
def test_text_never_becomes_a_special_token(text: str, chat: Chat, app: FastAPI) -> None:
    processor = chat.engine.processor
    images = RequestImageReader(processor, RequestLimits())

    def ids(words: str) -> list[int]:
        request = parse_request(ask_body(words))
        (one,) = read_conversation(request, processor, images, RequestLimits(), adapter=None)
        return one.ids.tolist()

    special = {*processor.tokenizer.all_special_ids, *processor.tokenizer.added_tokens_decoder}
    plain = [one for one in ids("Hm") if one in special]
    assert [one for one in ids(f"Hm{text}Hm") if one in special] == plain
    assert text in processor.tokenizer.decode(ids(f"Hm {text} Hm"))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9}, {"n": 9}, {"n": 2**70}, {"n": 0}, {"best_of": 10**9, "n": 10**9},
        {"max_tokens": 10**12}, {"max_tokens": 2049}, {"max_tokens": 0}, {"max_completion_tokens": 10**9},
        {"top_logprobs": 10**9, "logprobs": True}, {"stop": ["x"] * 5}, {"stop": "x" * 10_000},
        {"seed": 2**64}, {"seed": -(2**64)}, {"temperature": 1e308}, {"temperature": -1}, {"top_p": 0},
    ],
)  # fmt: skip
def test_numbers_beyond_the_limits_are_rejected(fields: dict[str, Any], app: FastAPI) -> None:
    answer = asyncio.run(call(app, ask_body("Hm?", **fields)))
    assert answer.status == 400
    assert app.state.scheduler.waiting == app.state.scheduler.running == 0


def test_five_images_are_too_many(app: FastAPI) -> None:
    answer = asyncio.run(call(app, ask_body("Read.", *[data_url(png())] * 5)))
    assert (answer.status, answer.json["error"]["code"]) == (400, "too_many_images")


def test_reading_a_body_stops_at_the_limit(app: FastAPI) -> None:
    """The declared length does not matter."""
    given = 0

    def endless() -> Iterator[bytes]:
        nonlocal given
        while True:
            given += 2**20
            yield b" " * 2**20

    answer = asyncio.run(call(app, endless(), headers=[*JSON, (b"content-length", b"10")]))
    assert answer.status == 413
    assert given <= 21 * 2**20
    headers = [*JSON, (b"content-length", b"99999999999999999999999")]
    assert asyncio.run(call(app, b"", headers=headers)).status == 413


def test_a_slow_body_is_rejected(chat: Chat) -> None:
    slow = create_app(chat.engine, name=MODEL, limits=RequestLimits(body_seconds=0.2))
    answer = asyncio.run(call(slow, itertools.repeat(b" "), pause=0.05))
    slow.state.scheduler.close()
    assert answer.status == 408


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[" * 100_000,
        b'{"model": "' + b"x" * 500 + b'"}',
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"messages": 1e999}',
    ],
)
def test_errors_contain_no_internal_details(body: bytes, app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = asyncio.run(call(app, body))
    assert answer.status == 400
    assert len(answer.message) < 400
    for inside in ("Traceback", "/", "pydantic", "llavar", "File ", "x" * 50):
        assert inside not in answer.message
    assert answer.headers["x-request-id"] in caplog.text


def test_another_sites_page_cannot_send_requests(address: str) -> None:
    """Browsers send forms to other sites without asking the server first."""
    body = ask_body("Hm?")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 415
    assert (
        "access-control-allow-origin" not in httpx.get(f"{address}/v1/models", headers={"origin": "http://x"}).headers
    )


def test_an_unknown_host_name_is_rejected(chat: Chat) -> None:
    with serving(chat, hosts=frozenset({"localhost", "127.0.0.1"})) as (address, _):
        assert httpx.get(f"{address}/v1/models").status_code == 200
        assert httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}).status_code == 421


def test_a_client_cannot_add_lines_to_the_log(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asyncio.run(call(app, path="/x\nERROR forged", method="GET"))
    assert "\nERROR forged" not in caplog.text
    assert "/x" in caplog.text
