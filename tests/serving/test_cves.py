"""The published CVEs of the original's controller, workers and Gradio page."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serving.server import MODEL, Neighbour, ask_body

SECRET = "root:x:0:0"


def _ask_page(address: str, image: Any) -> str:
    data = [image, "Read.", MODEL, "(off)", 0, 4, None]
    answers = []
    for path in ("call/ask", "call/v2/ask"):
        started = httpx.post(f"{address}/ui/gradio_api/{path}", json={"data": data}, timeout=30)
        if started.status_code == 200:
            event = started.json()["event_id"]
            answers.append(httpx.get(f"{address}/ui/gradio_api/call/ask/{event}", timeout=30).text)
    for path in ("run/ask", "run/predict", "api/ask", "api/predict"):
        body = {"data": data, "fn_index": 0, "session_hash": "abc"}
        answers.append(httpx.post(f"{address}/ui/gradio_api/{path}", json=body, timeout=30).text)
    return "\n".join(answers)


@pytest.mark.parametrize(
    "path",
    [
        "/ui/gradio_api/file=https://example.org", "/ui/file=https://example.org",
        "/ui/gradio_api/proxy=https://example.org", "/ui/?next=https://example.org", "//example.org/%2e%2e",
        "/ui//example.org", "/ui/gradio_api/login?_target_url=//example.org", "/\\example.org",
        "/login/callback?_target_url=https://example.org", "/ui/gradio_api/logout?_target_url=https://example.org",
        "/v1/models/https://example.org", "/v1//example.org/",
    ],
)  # fmt: skip
def test_cve_2024_9308_no_url_redirects_to_another_site(path: str, address: str) -> None:
    """Open redirect by a crafted URL."""
    with httpx.Client(base_url=address, follow_redirects=False) as http:
        answer = http.get(httpx.URL(address).copy_with(raw_path=path.encode()))
    assert "example.org" not in answer.headers.get("location", "")


def test_cve_2024_9309_clients_cannot_register_workers(address: str, neighbour: Neighbour) -> None:
    """Server-side request forgery by the controller's ``/worker_generate_stream`` after ``/register_worker``."""
    worker = f"http://127.0.0.1:{neighbour.port}"
    body = {"worker_name": worker, "check_heart_beat": True, "worker_status": None, "model": worker, "queue_length": 0}
    for path in (
        "register_worker", "refresh_all_workers", "list_models", "get_worker_address", "receive_heart_beat",
        "worker_generate_stream", "worker_get_status", "v1/register_worker",
    ):  # fmt: skip
        assert httpx.post(f"{address}/{path}", json=body).status_code in (404, 405)
    assert httpx.post(f"{address}/v1/chat/completions", json=json.loads(ask_body("Hm?")) | body).status_code == 404
    assert neighbour.visits == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/ui/gradio_api/upload", "/v1/models", "/health"])
def test_cve_2024_10225_a_long_multipart_boundary_does_not_block(path: str, address: str) -> None:
    """Denial of service by characters after a multipart boundary."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--b--' + b"-" * 10_000_000
    )
    answer = httpx.post(
        address + path, content=body, headers={"content-type": "multipart/form-data; boundary=b"}, timeout=60
    )
    assert answer.status_code in (200, 400, 404, 405, 413, 415, 422)
    assert httpx.get(f"{address}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("meta", [{"_type": "gradio.FileData"}, None])
def test_cve_2024_11449_the_page_downloads_no_url(meta: Any, address: str, neighbour: Neighbour) -> None:
    """Server-side request forgery by ``path`` in ``/run/predict``."""
    url = f"http://127.0.0.1:{neighbour.port}/latest/meta-data"
    answers = [
        _ask_page(address, {"path": url, "meta": meta}),
        _ask_page(address, {"path": None, "url": url, "meta": meta}),
    ]
    assert neighbour.visits == 0, answers


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "../../../../etc/passwd", "/proc/self/environ"])
def test_cve_2024_12065_the_page_opens_no_local_file(path: str, address: str) -> None:
    """Local file inclusion: one request makes Gradio copy a file, another one reads the copy."""
    for image in (path, {"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
        assert SECRET not in _ask_page(address, image)
    for prefix in ("/ui/gradio_api/file=", "/ui/file=", "/ui/gradio_api/file/", "/ui/gradio_api/proxy=", "/file="):
        answer = httpx.get(f"{address}{prefix}{path}", follow_redirects=True)
        assert answer.status_code in (400, 403, 404)
        assert SECRET not in answer.text
    assert SECRET not in httpx.get(f"{address}/ui/gradio_api/stream/{path}").text


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "gopher"])
def test_cve_2024_12068_the_api_downloads_no_url(scheme: str, address: str, neighbour: Neighbour) -> None:
    """Server-side request forgery by an image URL."""
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "127.1", "0x7f.1", "0"):
        body = ask_body("Read.", f"{scheme}://{host}:{neighbour.port}/x.png")
        answer = httpx.post(
            f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
    assert neighbour.visits == 0
