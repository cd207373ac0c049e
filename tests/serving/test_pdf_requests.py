"""PDF documents in requests: their pages are images of the question, and what cannot be used is named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from llavar_peft import Chat
from llavar_peft.data.image_files import decode_image
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError
from tests.pdf_files import paragraph, pdf
from tests.serving.server import MODEL, call, data_url, png

pytest.importorskip("pypdfium2")

THREE = pdf(*(paragraph(f"Page {number} of a short document. " * number) for number in (1, 2, 3)))
URL = data_url(THREE, "application/pdf")
OPTIONS: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 6}


@pytest.fixture
def app(chat: Chat) -> Iterator[FastAPI]:
    made = create_app(chat.engine, name=MODEL)
    yield made
    made.state.scheduler.close()


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _send(app: FastAPI, *parts: dict[str, Any]) -> Any:
    content = [{"type": "text", "text": "Read."}, *parts]
    body = {**OPTIONS, "messages": [{"role": "user", "content": content}]}
    return asyncio.run(call(app, json.dumps(body).encode()))


def test_pages_are_images_of_the_question(app: FastAPI, chat: Chat) -> None:
    pages = [decode_image(THREE, "page", str(number)) for number in (1, 2, 3)]
    document = {"type": "file", "file": {"filename": "a.pdf", "file_data": URL}}
    for parts, shown in (
        ([_image(URL)], pages), ([document], pages), ([_image(f"{URL}#page=3,1")], [pages[2], pages[0]]),
        ([_image(data_url(png())), _image(f"{URL}#page=2")], [decode_image(png(), "image"), pages[1]]),
    ):  # fmt: skip
        reply = _send(app, *parts)
        assert reply.status == 200, reply.message
        expected = chat.ask(shown, "Read.", adapter=None, temperature=0, max_new_tokens=6)
        assert reply.json["choices"][0]["message"]["content"] == expected


def test_pages_are_cached_one_by_one(chat: Chat) -> None:
    reader = RequestImageReader(chat.engine.processor, RequestLimits())
    (one,), (two,), (same,) = reader.open([f"{URL}#page=1", f"{URL}#page=2", f"{URL}#page=1"])
    assert one is same
    assert one is not two


@pytest.mark.parametrize(
    ("url", "what"),
    [
        (f"{URL}#page=4", "has 3 pages (got page 4)"),
        (f"{URL}#page=2-1", "names no pages (got '2-1')"),
        (f"{data_url(png())}#page=1", "an image is none"),
        (data_url(pdf(paragraph("x"), password="secret")), "needs a password"),
        (data_url(pdf()), "is damaged or has no pages"),
        (data_url(THREE[:900]), "was cut off"),
        (data_url(pdf(paragraph("x"), size=(1e6, 1e6))), "unusable size (got 1,000,000 x 1,000,000 points"),
        (data_url(pdf(*[b""] * 300)), "has 300 pages (expected at most 20)"),
        (data_url(pdf(b"BT " + b"0 0 m 99 99 l S " * 900_000), "application/pdf"), "cannot be read within"),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_documents_that_cannot_be_used_are_named(url: str, what: str, chat: Chat) -> None:
    reader = RequestImageReader(chat.engine.processor, RequestLimits(page_seconds=1.0))
    with pytest.raises(RequestRejectedError) as raised:
        reader.open([url])
    assert raised.value.status == 400
    assert what in raised.value.message
    assert len(raised.value.message) < 300


def test_all_documents_of_a_request_share_the_limit_of_pages(chat: Chat) -> None:
    reader = RequestImageReader(chat.engine.processor, RequestLimits(pages=4))
    assert [len(shown) for shown in reader.open([URL, f"{URL}#page=1"])] == [3, 1]
    with pytest.raises(RequestRejectedError, match=r"has 3 pages \(expected at most 1\)"):
        reader.open([URL, URL])
    with pytest.raises(RequestRejectedError, match="at most 4 pages of PDF documents"):
        reader.open([URL, f"{URL}#page=1", f"{URL}#page=1"])


def test_without_pypdfium2_the_server_says_so(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "pypdfium2" else find(name))
    reply = _send(app, _image(URL))
    assert reply.status == 400
    assert "PDF files are not supported by this server" in reply.message
