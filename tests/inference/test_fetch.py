"""Images by URL: what is fetched, and what is refused before or while it is."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
from PIL import Image

from llavar_peft.data.image_files import decode_image
from llavar_peft.errors import ImageError
from llavar_peft.inference.fetch_image import FetchRules, fetch


class Handler(http.server.BaseHTTPRequestHandler):
    image: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name.startswith("/to"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
            return
        self.send_response(404 if name == "/missing" else 200)
        if name == "/short":
            self.send_header("Content-Length", str(len(self.image) + 9))
        self.end_headers()
        blocks = {"/endless": 2**30, "/drip": 100}.get(name, 0)
        try:
            for _ in range(blocks):
                self.wfile.write(b"\0" if name == "/drip" else bytes(2**16))
                time.sleep(0.1 if name == "/drip" else 0)
            self.wfile.write(self.image)
        except OSError:
            return  # the client has gone

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), (1, 2, 3)).save(buffer, "PNG")
    Handler.image = buffer.getvalue()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_image_is_downloaded(site: str) -> None:
    assert decode_image(fetch(f"{site}/a b.png".replace(" ", "%20")), "it").size == (9, 5)
    assert fetch(f"{site}/to?/to?{site}/b.png") == Handler.image  # relative and absolute redirects


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "status 404"),
        ("/endless", "more than 0.2 MB"),
        ("/short", "ended after"),
        ("/drip", "took longer than 0.6 s"),
        ("/to?/to?/to?/to?/to?/b.png", "more than 3 redirects"),
        ("/to?file:///etc/passwd", "scheme 'file'"),
        ("/to?http://10.0.0.1\\@x/", "is not a URL"),
    ],
)
def test_limits_hold_while_reading(site: str, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        fetch(site + path, FetchRules(max_bytes=200_000, seconds=0.6 if path == "/drip" else 60))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/a.png",
        "gopher://host/",
        "//host/a.png",
        "http:///a.png",
        "http://user@host/a.png",
        "http://host:99999/",
        "http://host:0/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://ho st/",
        "http://host/\r\nX-Other: 1",
        "http://host\\@127.0.0.1/",
        "http://h\u00f6st/",
    ],
)
def test_invalid_urls_are_rejected_without_a_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for an address"))
    with pytest.raises(ImageError):
        fetch(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "10.1.2.3", "192.168.0.1", "172.16.9.9",
        "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::ffff:127.0.0.1]", "[fc00::1]",
        "192.0.0.8", "192.0.0.169", "192.88.99.1", "[3fff::1]", "[64:ff9b:1::1]", "[2001:db8::1]", "[5f00::1]",
        "[fe80::1]", "[fec0::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::]",
    ],
)  # fmt: skip
def test_private_addresses_are_rejected_before_connecting(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    # Without IPv6 the name may not resolve, which is as good.
    with pytest.raises(ImageError, match=r"not public|cannot be fetched"):
        fetch(f"http://{host}/a.png", FetchRules(public_only=True))


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ImageError, match="not public"):
        fetch("http://rebinds.example/a.png", FetchRules(public_only=True))


def test_redirects_are_checked_again_and_names_resolved_once(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = site.replace("127.0.0.1", "localhost")
    rules = FetchRules(domains=frozenset({"localhost"}))
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def counted(host: str, *rest: object, **named: object) -> object:
        if host == "localhost":
            asked.append(host)
        return resolve(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    assert fetch(f"{named}/a.png", rules) == Handler.image
    assert len(asked) == 1  # what was checked is what was connected to
    with pytest.raises(ImageError, match=r"127\.0\.0\.1, which is not among the allowed hosts"):
        fetch(f"{named}/to?{site}/a.png", rules)


def test_a_download_need_not_be_an_image() -> None:
    for data in (b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(20)):
        with pytest.raises(ImageError, match=r"https://host/a\.png: "):
            decode_image(data, "https://host/a.png")
