"""Download an image from a URL without giving the caller access to other hosts.

The URL is parsed once; every address that its host resolves to is checked, and the connection goes to a checked
address; each redirect is checked again; size and time are limited while reading. Proxy settings are ignored.
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
_RESERVED: Final = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "2001::/23", "3fff::/20", "5f00::/16"),
    )
)
"""Networks that some versions of Python count as public. Source: IANA's registries of special-purpose addresses."""
_BLOCK: Final = 2**16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRules:
    """Limits of a download.

    Attributes:
        max_bytes: Maximum size of the file.
        seconds: Maximum time, redirects included.
        redirects: Maximum number of redirects.
        public_only: Whether all addresses of the host must be public.
        domains: Allowed hosts in lower case; None allows all.
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
        """The value of the ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.secure else "http"] else f"{host}:{self.port}"


def fetch(url: str, rules: FetchRules | None = None) -> bytes:
    """Download a file.

    Args:
        url: ``https://`` or ``http://``.
        rules: Limits; the default allows hosts in the local network.

    Raises:
        ImageError: The URL, an address or a redirect is not allowed, the file is too large, or the server is too slow.
    """
    rules = rules or FetchRules()
    deadline = time.monotonic() + rules.seconds
    for _ in range(rules.redirects + 1):
        target = _parse(url, rules)
        try:
            response = _get(target, url, rules, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            late = time.monotonic() >= deadline
            what = f"took longer than {rules.seconds:g} s" if late else f"cannot be fetched ({error})"
            raise _error(url, what, "try again, or save the image and give the file") from error
        if isinstance(response, bytes):
            return response
        url = urljoin(url, response)
    raise _error(url, f"needs more than {rules.redirects} redirects", "give the final address of the image")


def _parse(url: str, rules: FetchRules) -> _Target:
    if len(url) > 8192 or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _error(url, "is not a URL (it is too long, or has spaces or backslashes)", "percent-encode them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _error(url, f"is not a URL ({error})", "correct it") from error
    if parts.scheme not in _PORTS:
        raise _error(url, f"has the scheme {parts.scheme!r}, expected https or http", "save the image as a file")
    if not _HOST.fullmatch(host) or "@" in parts.netloc or port == 0:
        raise _error(url, "does not name a valid host", "write https://host/path, without a user name")
    if rules.domains is not None and host.lower().rstrip(".") not in rules.domains:
        raise _error(url, f"is on {host}, which is not among the allowed hosts", "allow it, or send the image itself")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return _Target(parts.scheme == "https", host, port or _PORTS[parts.scheme], f"{path}?{query}" if query else path)


def _get(target: _Target, url: str, rules: FetchRules, deadline: float) -> bytes | str:
    """Send one request. Return the body, or the location of a redirect."""
    with _connected(target, url, rules, deadline) as sock:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        headers = {
            "Host": target.header,
            "Accept": "image/*, application/pdf",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "llavar-peft",
        }
        connection.request("GET", target.path, headers=headers)
        with closing(connection.getresponse()) as response:
            if response.status in _REDIRECTS and response.headers["Location"]:
                return str(response.headers["Location"])
            if response.status != 200:
                raise _error(url, f"cannot be downloaded (status {response.status})", "check the address")
            return _body(response, url, rules)


def _body(response: http.client.HTTPResponse, url: str, rules: FetchRules) -> bytes:
    expected = response.length  # None where the server does not say
    data = bytearray()
    while (expected or 0) <= rules.max_bytes and len(data) <= rules.max_bytes:
        block = response.read1(_BLOCK)
        data += block
        if not block:
            if expected is not None and len(data) < expected:
                raise _error(url, f"ended after {len(data)} of {expected} bytes", "try again")
            return bytes(data)
    raise _error(url, f"has more than {rules.max_bytes / 1e6:g} MB", "give a smaller image")


@contextmanager
def _connected(target: _Target, url: str, rules: FetchRules, deadline: float) -> Iterator[socket.socket]:
    """Connect to a checked address. The connection is closed at the deadline, even during a blocking call."""
    addresses = _resolve(target, deadline)
    private = [address for address in addresses if not _is_public(address)] if rules.public_only else []
    if private:
        raise _error(url, "resolves to an address that is not public", "send the image itself")
    sock = _connect(addresses, target.port, deadline)
    if target.secure:
        try:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        except BaseException:
            sock.close()
            raise
    # A socket's timeout restarts with each byte, and a server may send one byte per second.
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), _close, (sock,))
    watch.daemon = True
    watch.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        yield sock
        if time.monotonic() >= deadline:
            raise TimeoutError("the connection was closed")
    finally:
        watch.cancel()
        sock.close()


def _close(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # already closed


def _resolve(target: _Target, deadline: float) -> list[str]:
    """Return all addresses of a host. The lookup has no timeout and therefore runs in a thread."""
    found: list[str] = []
    failed: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            failed.append(error)
        else:
            found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
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
    """Return whether an address is public, including IPv4 addresses embedded in IPv6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is not None:
            return _is_public(str(embedded))
        if parsed.is_site_local:  # deprecated, but still routed in some networks
            return False
    if any(parsed.version == network.version and parsed in network for network in _RESERVED):
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _error(url: str, what: str, fix: str) -> LlavarError:
    return ImageError.at(repr(url[:200]), what, fix)
