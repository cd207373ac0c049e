"""What a client may ask for, and how a request is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Caps that hold while a request is read, before anything in it is decoded.

    Attributes:
        body_bytes: Of a request's body.
        body_seconds: For sending it.
        images: Images in a request.
        image_bytes: Of an image's file.
        pixels: Of an image, by its header.
        decoding: Images that are decoded at a time, each of which takes a few bytes a pixel.
        new_tokens: That an answer can have.
        choices: Answers to one request (``n``).
        rows: Answers that are computed at a time.
        waiting: Answers that wait for their turn; beyond them clients are told to come back.
        seconds: From a request's arrival to its last token.
        retry_after: Seconds after which a client that was sent away may come back.
    """

    body_bytes: int = 20_000_000
    body_seconds: float = 30.0
    images: int = 4
    image_bytes: int = 20_000_000
    pixels: int = 50_000_000
    decoding: int = 2
    new_tokens: int = 2048
    choices: int = 8
    rows: int = 16
    waiting: int = 64
    seconds: float = 300.0
    retry_after: int = 5


class RequestRefusedError(Exception):
    """A request that is not answered; every word of it is for the client.

    Args:
        status: Of HTTP.
        message: Short, without anything of the server's insides.
        code: A word for programs.
        param: The field at fault.
        retry_after: Seconds after which the client may come back.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
