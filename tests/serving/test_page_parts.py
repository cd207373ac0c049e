"""The parts of the page that do not need Gradio: the guard, the API client and the conversation."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from llavar_peft.serving.api.middleware import Metrics, RequestMiddleware
from llavar_peft.serving.ui.page_client import PageClient, PageClientError
from llavar_peft.serving.ui.page_conversation import Exchange, PageConversation
from llavar_peft.serving.ui.page_guard import PageGuard


def guarded(api_key: str | None = None) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        keys = dict(scope["headers"]).get(b"authorization", b"").decode()
        await PlainTextResponse(f"{scope['path']} {keys}")(scope, receive, send)

    guard = PageGuard(app, prefix="/ui", files=Path("/srv/page"), api_key=api_key)
    gate = RequestMiddleware(guard, api_key=None, hosts=None, metrics=Metrics())
    return httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost")


def get(client: Any, path: str, **headers: str) -> Any:
    return asyncio.run(client.get(path, headers=headers))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ui", 200),
        ("/ui/", 200),
        ("/ui/gradio_api/queue/join", 200),
        ("/ui/gradio_api/file=/srv/page/0123/picture.png", 200),
        ("/ui/gradio_api/file=/etc/passwd", 404),
        ("/ui/gradio_api/file=/srv/page/../../etc/passwd", 404),
        ("/ui/gradio_api/file=/srv/page%2F..%2F..%2Fetc%2Fpasswd", 404),
        ("/ui/gradio_api/file=/srv/pages/x.png", 404),
        ("/ui/gradio_api/file=pyproject.toml", 404),
        ("/ui/gradio_api/file=/srv/page/%00", 404),
        ("/ui/assets/index.js", 200),
        ("/ui/gradio_api/file=http://169.254.169.254/latest", 404),
        ("/ui/gradio_api/file=//evil.example/x:y", 404),
        ("/ui/gradio_api/file=HTTP%3A%2F%2Fevil.example", 404),
        ("/ui/gradio_api/proxy=https://evil.example", 404),
        ("/ui/gradio_api/vibe-edit", 404),
        ("/ui/gradio_api/runs", 404),
        ("/ui/gradio_api/component_server", 404),
        ("/ui/monitoring/summary", 404),
        ("/ui/login", 404),
        ("/uix/anything", 200),  # not a path of the page
    ],
)
def test_only_the_paths_that_the_page_needs_are_allowed(path: str, status: int) -> None:
    assert get(guarded(), path).status_code == status


@pytest.mark.parametrize("path", ["/ui/gradio_api/queue/join", "/ui/gradio_api/upload"])
def test_reading_a_body_stops_at_the_limit(path: str) -> None:
    sent = []

    async def blocks(count: int) -> Any:
        for _ in range(count):
            sent.append(1)
            yield b" " * 1_000_000

    client = guarded()
    megabytes = 19 if path.endswith("upload") else 0
    assert asyncio.run(client.post(path, content=blocks(megabytes))).status_code == 200
    sent.clear()
    assert asyncio.run(client.post(path, content=blocks(500))).status_code == 413
    assert len(sent) <= megabytes + 3
    assert asyncio.run(client.post(path, content=b" " * 20_000_001)).status_code == 413


@pytest.mark.parametrize("path", ["/etc/passwd", "/srv/page/../x", "http://127.0.0.1/", "/srv/page/\0", 7, {}, []])
def test_a_body_names_only_uploaded_files(path: Any) -> None:
    client, endpoint = guarded(), "/ui/gradio_api/queue/join"
    for data in ([{"path": path}], {"a": [[{"value": {"path": path}}]]}, {"path": path}):
        refused = asyncio.run(client.post(endpoint, json={"data": data}))
        assert (refused.status_code, refused.text) == (400, "Files have to be uploaded to this page.")
    for allowed in (None, "/srv/page/0123/a.png"):
        assert asyncio.run(client.post(endpoint, json={"data": [{"path": allowed}]})).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff", b'{"path": '])
def test_a_body_that_is_not_json_is_rejected(body: bytes) -> None:
    assert asyncio.run(guarded().post("/ui/gradio_api/queue/join", content=body)).status_code == 400
    assert asyncio.run(guarded().post("/ui/gradio_api/upload", content=body)).status_code == 200


def test_the_body_that_was_checked_is_the_one_that_is_read() -> None:
    """Parsers differ in which of two equal keys they use."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse((await receive())["body"])(scope, receive, send)

    guard = PageGuard(echo, prefix="/ui", files=Path("/srv/page"), api_key=None)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost")
    body = b'{"path": "/etc/passwd", "path": "/srv/page/a.png"}'
    echoed = asyncio.run(client.post("/ui/gradio_api/queue/join", content=body)).text
    assert echoed == '{"path": "/srv/page/a.png"}'


def test_the_key_is_required_on_every_path() -> None:
    client = guarded("secret")
    for path in (
        "/ui/",
        "/ui/assets/x.js",
        "/ui/gradio_api/upload",
        "/ui/gradio_api/file=/srv/page/x",
        "/ui/monitoring",
    ):
        refused = get(client, path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
    basic = base64.b64encode(b"anyone:secret").decode()
    for given in (f"Basic {basic}", "Bearer secret", f"basic {basic}"):
        assert get(client, "/ui/", Authorization=given).text == "/ui/ Bearer secret"
    for wrong in ("Basic c2VjcmV0", "Basic !", "Bearer", "Bearer secre", "Digest secret", "secret"):
        assert get(client, "/ui/", Authorization=wrong).status_code == 401
    assert get(client, "/v1/models").text == "/v1/models "  # RequestMiddleware checks the key of the API


def test_other_sites_can_neither_send_requests_nor_embed_the_page() -> None:
    client = guarded()
    assert get(client, "/ui/", Origin="http://localhost").status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert get(client, "/ui/gradio_api/queue/join", Origin=origin).status_code == 403
    policy = get(client, "/ui/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy


def api() -> tuple[FastAPI, dict[str, Any]]:
    """Return an application that answers and fails like the API."""
    app, seen = FastAPI(), {"left": False}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = seen["body"] = await request.json()
        seen["key"] = request.headers.get("authorization")
        words = body["messages"][-1]["content"]
        if words == "busy":
            return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "7"})
        if words == "wrong":
            return JSONResponse({"error": {"message": "the image is too large"}}, 400)
        if words == "broken":
            raise RuntimeError("secret detail")

        async def pieces() -> Any:
            try:
                for piece in ("It ", "säys", " so"):
                    event = f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode()
                    yield event[:9]
                    yield event[9:]
                yield b'data: {"choices": []}\n\n'
                if words == "for ever":
                    await asyncio.sleep(600)
                yield b"data: [DONE]\n\n"
            finally:
                seen["left"] = True

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app, seen


async def ask(client: PageClient, question: str, **given: Any) -> str:
    history, image = given.pop("history", []), given.pop("image", None)
    return "".join([piece async for piece in client.stream("one", history, question, image, **given)])


def test_the_page_sends_the_requests_of_an_api_client(tmp_path: Path) -> None:
    app, seen = api()
    client = PageClient(app, ["one"], 64, api_key="secret")
    image = tmp_path / "a.png"
    image.write_bytes(b"png")
    answer = asyncio.run(
        ask(client, "And?", history=[("What?", "This.")], image=str(image), temperature=0.5, max_tokens=9, seed=None)
    )
    assert answer == "It säys so"
    assert seen["key"] == "Bearer secret"
    first = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}},
    ]
    assert seen["body"] == {
        "model": "one", "stream": True, "temperature": 0.5, "max_tokens": 9,
        "messages": [
            {"role": "user", "content": first}, {"role": "assistant", "content": "This."},
            {"role": "user", "content": "And?"},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("question", "message"),
    [("busy", "try again in 7 seconds"), ("wrong", "the image is too large"), ("broken", "could not answer")],
)
def test_an_api_error_gives_a_short_message(question: str, message: str) -> None:
    with pytest.raises(PageClientError, match=message) as error:
        asyncio.run(ask(PageClient(api()[0], ["one"], 64), question))
    assert "secret" not in str(error.value)


def test_a_deleted_image_gives_a_message() -> None:
    with pytest.raises(PageClientError, match="upload it again"):
        asyncio.run(ask(PageClient(api()[0], ["one"], 64), "What?", image="nowhere.png"))


def test_closing_the_stream_cancels_the_request() -> None:
    app, seen = api()

    async def leave() -> None:
        stream = PageClient(app, ["one"], 64).stream("one", [], "for ever", None)
        assert await anext(stream) == "It "
        await stream.aclose()

    asyncio.run(asyncio.wait_for(leave(), 60))
    assert seen["left"]


HOSTILE = '<img src=x onerror="alert(1)"> ${alert(1)} {{value}} `x` \\u003c & </div>'


def test_text_is_escaped() -> None:
    conversation = PageConversation("/tmp/x/a.png", [Exchange(HOSTILE, ("one", "two"), [HOSTILE, "yes"])])
    for side in (0, 1):
        shown = conversation.as_html(side, "<b>")
        for sign in ("<img", "${", "{{", "`", "\\", "<b>", "</div> "):
            assert sign not in shown
    assert conversation.as_html(0, "one").count("&#60;img") == 2
    assert "The answer will appear here" in PageConversation().as_html(0, "one")


def test_a_conversation_is_saved_as_text_and_json() -> None:
    conversation = PageConversation(
        "C:\\tmp\\a.png", [Exchange("Q1", ("one",), ["A1"]), Exchange("Q2", ("one", "two"), ["A2", "ß2"])]
    )
    assert json.loads(conversation.as_json()) == {
        "picture": "a.png",
        "turns": [
            {"question": "Q1", "answers": [{"model": "one", "text": "A1"}]},
            {"question": "Q2", "answers": [{"model": "one", "text": "A2"}, {"model": "two", "text": "ß2"}]},
        ],
    }
    assert conversation.as_text() == "Image: a.png\n\nQ: Q1\none: A1\n\nQ: Q2\none: A2\ntwo: ß2\n"
    assert conversation.history(1) == [("Q1", "A1"), ("Q2", "ß2")]
    assert "Q1" not in conversation.as_html(1, "two")
