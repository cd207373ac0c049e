"""Running the server until a signal stops it."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from llavar_peft.compat.server_internals import TimedConnection
from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError
from llavar_peft.serving.api.middleware import LOOPBACK
from llavar_peft.serving.api.scheduler import Scheduler

_SHUTDOWN_SECONDS = 10
_LAST_SECONDS = 2  # for the errors of answers that did not complete in time
_MAX_CONNECTIONS = 256  # each may hold a body while it waits


def check_listen_address(host: str, api_key: str | None, names: Iterable[str] = ()) -> frozenset[str] | None:
    """Check whether the server may listen at an address.

    Args:
        host: The address.
        api_key: The key that clients have to send; None requires none.
        names: Further host names that are accepted in requests, such as that of a proxy.

    Returns:
        The host names that the server accepts in requests; None is any, since a page of another site that reaches the
        server under its own name does not have the key.

    Raises:
        ConfigError: Other machines can reach the address, and there is no API key.
    """
    local = host in LOOPBACK or _is_loopback(host)
    if local and not api_key:
        return LOOPBACK | {host} | {_host_name(name) for name in names}
    if not api_key:
        raise ConfigError.at(
            "--host", f"{host!r} is no loopback address, so that other machines may reach it, and there is no API key",
            "set --api-key or LLAVAR_API_KEY, or leave out --host",
        )  # fmt: skip
    return None


def _host_name(given: str) -> str:
    """Return the name in an --allow-host option as the ``Host`` header has it, without a port."""
    name, _, port = given.rpartition(":")
    has_port = port.isdigit() and (name.startswith("[") or ":" not in name)
    bare = name if has_port else f"[{given}]" if ":" in given and not given.startswith("[") else given
    if not bare or "/" in bare or "*" in bare:
        raise ConfigError.at(
            "--allow-host", f"is not a host name (got {given!r})", "give a name such as llm.example.com"
        )
    return bare.lower()


def check_origins(origins: Iterable[str]) -> list[str]:
    """Return the origins as browsers send them.

    Raises:
        ConfigError: One is not an origin, so that it would never match.
    """
    found = []
    for given in origins:
        parts = urlsplit(given)
        if given != "*" and (not parts.scheme or not parts.netloc or parts.path not in ("", "/") or parts.query):
            raise ConfigError.at(
                "--allow-origin",
                f"is not an origin (got {given!r})",
                "give scheme and host, as in http://localhost:3000",
            )
        found.append(given.rstrip("/").lower())
    return found


def _is_loopback(host: str) -> bool:
    """Return True for a loopback address; False for a name, which may resolve to any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address before the model is loaded; port 0 selects a free port.

    Raises:
        ConfigError: The host is not an address of this machine.
        EnvironmentFaultError: The port is in use, or needs permission.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise _host_error(host, getattr(error, "strerror", None) or "it is not a host name") from error
    # With protocol 0, as by default, asyncio would not turn off Nagle's algorithm, and each answer would wait 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise _host_error(host, error.strerror or "not available") from error
        fix = "choose another --port (0 selects a free one)"
        if error.errno == errno.EADDRINUSE:
            fix += ", or stop the program that uses it"
        raise EnvironmentFaultError.at(
            f"{host}:{port}", f"the server cannot listen at this port ({error.strerror})", fix
        ) from error
    # Otherwise a second server could bind the port as well while this one loads its model, and fail only afterwards.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return bound


def listen(bound: socket.socket) -> None:
    """Let clients connect to a socket from ``bind_socket``; the server accepts them as soon as it runs."""
    # Connections inherit it, so that a server that is started again need not wait until those of the last one time out.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.listen(_MAX_CONNECTIONS)


def _host_error(host: str, why: str) -> LlavarError:
    return ConfigError.at(
        "--host", f"{host!r} is not an address of this machine ({why})",
        "give 127.0.0.1, or 0.0.0.0 for all addresses of this machine",
    )  # fmt: skip


class _Server(uvicorn.Server):
    """A server that ends answers which do not complete in time with an error in the API's form.

    Args:
        config: The settings; ``timeout_graceful_shutdown`` is later than the time of answers.
        scheduler: Computes the answers.
        seconds: Time that running answers have to complete when the server stops.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, seconds: int) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._seconds = seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, wait for the answers, and end those that take too long."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._seconds, loop.run_in_executor, None, self._scheduler.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        if self.force_exit:  # by a second Ctrl-C; uvicorn would cancel the lifespan, and print a traceback of it
            await self.lifespan.shutdown()


def make_server(app: FastAPI, *, shutdown_seconds: int = _SHUTDOWN_SECONDS) -> uvicorn.Server:
    """Create a uvicorn server with this package's settings.

    Args:
        app: The application from ``create_app``.
        shutdown_seconds: Time that running answers have to complete when the server stops.
    """
    config = uvicorn.Config(
        app, http=TimedConnection, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=shutdown_seconds + _LAST_SECONDS, timeout_keep_alive=5,
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    return _Server(config, app.state.scheduler, shutdown_seconds)


def run_server(app: FastAPI, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; running answers may complete.

    Args:
        app: The application from ``create_app``.
        bound: The socket from ``bind_socket``.
    """
    server = make_server(app)

    # uvicorn handles the signals as soon as it runs, and raises them again after it has stopped. By then they have had
    # their effect.
    def stop(*_: object) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        bound.close()
