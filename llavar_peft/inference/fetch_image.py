"""Fetching an image by its URL, so that nothing else can be reached by it.

One parser reads the URL; every address its host resolves to is checked; the connection goes to a checked address; each
redirect is checked again; size and time have limits that hold while reading. Proxies in the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from llavar_peft.errors import ImageError, LlavarError

_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_BLOCK: Final = 2**16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRules:
    """What may be fetched.

    Attributes:
        max_bytes: Of the file.
        seconds: For the whole, redirects included.
        redirects: How many are followed.
        public_only: Whether every address of the host must be a public one.
        domains: The hosts that may be asked, in lower case; None for any.
    """

    max_bytes: int = 20_000_000
    seconds: float = 10.0
    redirects: int = 3
    public_only: bool = False
    domains: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class _Target:
    secure: bool
    host: str
    port: int
    path: str

    @property
    def header(self) -> str:
        """The ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.secure else "http"] else f"{host}:{self.port}"


def fetch(url: str, rules: FetchRules | None = None) -> bytes:
    """Fetch a file.

    Args:
        url: ``https://`` or ``http://``.
        rules: What may be fetched; None allows what is in one's own network.

    Returns:
        Its bytes.

    Raises:
        ImageError: The URL, an address or a redirect is not allowed, the file too large, or the server does not give it
            in time.
    """
    rules = rules or FetchRules()
    deadline = time.monotonic() + rules.seconds
    for _ in range(rules.redirects + 1):
        target = _parse(url, rules)
        try:
            answer = _get(target, url, rules, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            late = time.monotonic() >= deadline
            what = f"took longer than {rules.seconds:g} s" if late else f"cannot be fetched ({error})"
            raise _refusal(url, what, "try again, or save the picture and give the file") from error
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise _refusal(url, f"is reached only by more than {rules.redirects} redirects", "give the picture's own address")


def _parse(url: str, rules: FetchRules) -> _Target:
    if len(url) > 8192 or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _refusal(url, "is no URL (it is very long, or has spaces or backslashes)", "percent-encode them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _refusal(url, f"is no URL ({error})", "correct it") from error
    if parts.scheme not in _PORTS:
        raise _refusal(url, f"has the scheme {parts.scheme!r}, expected https or http", "save the picture as a file")
    if not _HOST.fullmatch(host) or "@" in parts.netloc or port == 0:
        raise _refusal(url, "does not name a plain host", "write https://host/path, without a user")
    if rules.domains is not None and host.lower().rstrip(".") not in rules.domains:
        raise _refusal(
            url, f"is on {host}, which is not among the allowed hosts", "allow it, or send the picture itself"
        )
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return _Target(parts.scheme == "https", host, port or _PORTS[parts.scheme], f"{path}?{query}" if query else path)


def _get(target: _Target, url: str, rules: FetchRules, deadline: float) -> bytes | str:
    """One request: the body, or where it redirects to."""
    with _connected(target, url, rules, deadline) as sock:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        headers = {
            "Host": target.header,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "llavar-peft",
        }
        connection.request("GET", target.path, headers=headers)
        with closing(connection.getresponse()) as response:
            if response.status in _REDIRECTS and response.headers["Location"]:
                return str(response.headers["Location"])
            if response.status != 200:
                raise _refusal(url, f"is not given (status {response.status})", "check the address")
            return _body(response, url, rules)


def _body(response: http.client.HTTPResponse, url: str, rules: FetchRules) -> bytes:
    expected = response.length  # None where the server does not say
    data = bytearray()
    while (expected or 0) <= rules.max_bytes and len(data) <= rules.max_bytes:
        block = response.read1(_BLOCK)
        data += block
        if not block:
            if expected is not None and len(data) < expected:
                raise _refusal(url, f"ended after {len(data)} of {expected} bytes", "try again")
            return bytes(data)
    raise _refusal(url, f"has more than {rules.max_bytes / 1e6:g} MB", "give a smaller picture")


@contextmanager
def _connected(target: _Target, url: str, rules: FetchRules, deadline: float) -> Iterator[socket.socket]:
    """A connection to a checked address, which is cut at the deadline whatever is being waited for."""
    addresses = _resolve(target, deadline)
    hidden = [address for address in addresses if not _is_public(address)] if rules.public_only else []
    if hidden:
        raise _refusal(url, "leads to an address that is not public", "send the picture itself")
    sock = _connect(addresses, target.port, deadline)
    if target.secure:
        try:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        except BaseException:
            sock.close()
            raise
    # A time-out of the socket begins anew with each byte, and a server may send one a second.
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, (sock,))
    watch.daemon = True
    watch.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        yield sock
        if time.monotonic() >= deadline:
            raise TimeoutError("the connection was cut")
    finally:
        watch.cancel()
        sock.close()


def _cut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed in this moment


def _resolve(target: _Target, deadline: float) -> list[str]:
    """Every address of a host. Asking for them knows no time-out, so that a thread does it."""
    found: list[str] = []
    failed: list[OSError | UnicodeError] = []

    def ask() -> None:
        try:
            entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            failed.append(error)
        else:
            found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(max(0.0, deadline - time.monotonic()))
    if failed:
        raise OSError(f"{target.host}: {failed[0]}")
    if not found:
        raise TimeoutError(f"{target.host}: no address yet")
    return list(found)


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    failed: OSError = OSError("no address")
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no connection yet")
        try:
            sock = socket.create_connection((address, port), timeout=left)
        except OSError as error:
            failed = error
        else:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            return sock
    raise failed


def _is_public(address: str) -> bool:
    """Whether an address is one that everybody may reach, those within IPv6 ones too."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        within = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            within = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if within is not None:
            return _is_public(str(within))
        if parsed.is_site_local:  # withdrawn long ago, and still routed within some networks
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _refusal(url: str, what: str, fix: str) -> LlavarError:
    return ImageError.at(repr(url[:200]), what, fix)
