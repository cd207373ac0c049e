"""Listening, until a signal ends it."""

from __future__ import annotations

import ipaddress
import signal
import socket

import uvicorn
from fastapi import FastAPI

from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.serving.api.client_connection import ClientConnection
from llavar_peft.serving.api.middleware import LOOPBACK

_GRACE = 10  # seconds that answers have to come to their end
_CONNECTIONS = 256  # each may hold a body while it waits


def check_listen_address(host: str, api_key: str | None) -> frozenset[str] | None:
    """Whether a server may listen there.

    Args:
        host: The address.
        api_key: Its key.

    Returns:
        The names that it answers to; None is any.

    Raises:
        ConfigError: Others can reach it, and there is no key.
    """
    if host in LOOPBACK or _is_loopback(host):
        return LOOPBACK | {host}
    if not api_key:
        raise ConfigError.at(
            "--host", f"{host} can be reached from other machines, and there is no API key",
            "give --api-key (or LLAVAR_API_KEY), or leave --host out",
        )  # fmt: skip
    return None


def _is_loopback(host: str) -> bool:
    """Of an address; a name that begins like one may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before anything expensive is done.

    Args:
        host: The address.
        port: 0 takes any that is free.

    Returns:
        The socket, bound.

    Raises:
        EnvironmentFaultError: It is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise EnvironmentFaultError.at(
            f"{host}:{port}", f"cannot be listened at ({error.strerror})", "take another --port"
        ) from error
    return bound


def make_server(app: FastAPI, *, grace: int = _GRACE) -> uvicorn.Server:
    """A server with this package's settings.

    Args:
        app: From ``create_app``.
        grace: Seconds that answers have to come to their end when it is stopped.

    Returns:
        The server, which does not run yet.
    """
    config = uvicorn.Config(
        app, http=ClientConnection, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=grace, timeout_keep_alive=5, limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    return uvicorn.Server(config)


def run_server(app: FastAPI, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, which let running answers end.

    Args:
        app: From ``create_app``.
        bound: From ``listen``.
    """
    server = make_server(app)
    # uvicorn takes the signals, and raises them again when it has ended: then they have done what they were for.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        bound.close()
