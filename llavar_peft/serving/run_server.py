"""Running the server until a signal stops it."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Iterable

import uvicorn
from fastapi import FastAPI

from llavar_peft.compat.server_internals import TimedConnection
from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.serving.api.middleware import LOOPBACK

_SHUTDOWN_SECONDS = 10
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
        return LOOPBACK | {host} | {name.lower() for name in names}
    if not api_key:
        raise ConfigError.at(
            "--host", f"{host} can be reached from other machines, and there is no API key",
            "set --api-key or LLAVAR_API_KEY, or leave out --host",
        )  # fmt: skip
    return None


def _is_loopback(host: str) -> bool:
    """Return True for a loopback address; False for a name, which may resolve to any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address before the model is loaded; port 0 selects a free port.

    Raises:
        EnvironmentFaultError: The address is in use or not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise EnvironmentFaultError.at(
            f"{host}:{port}", f"the server cannot listen at this address ({error.strerror})", "choose another --port"
        ) from error
    return bound


def make_server(app: FastAPI, *, shutdown_seconds: int = _SHUTDOWN_SECONDS) -> uvicorn.Server:
    """Create a uvicorn server with this package's settings.

    Args:
        app: The application from ``create_app``.
        shutdown_seconds: Time that running answers have to complete when the server stops.
    """
    config = uvicorn.Config(
        app, http=TimedConnection, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=shutdown_seconds, timeout_keep_alive=5, limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    return uvicorn.Server(config)


def run_server(app: FastAPI, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; running answers may complete.

    Args:
        app: The application from ``create_app``.
        bound: The socket from ``bind_socket``.
    """
    server = make_server(app)
    # uvicorn handles the signals, and raises them again after it has stopped. By then they have had their effect.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        bound.close()
