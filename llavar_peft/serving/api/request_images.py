"""Images that clients send: measured before they are decoded, looked at once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
from collections import OrderedDict
from io import BytesIO

from PIL import Image

from llavar_peft.data.image_files import decode_image
from llavar_peft.errors import ImageError
from llavar_peft.inference.fetch_image import FetchRules, fetch
from llavar_peft.inference.generation_request import PromptImage
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRefusedError

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
# What browsers and cameras write; the decoders of rarer formats are no business of strangers. JPEG's opens MPO too,
# which has no entry of its own in Pillow: named here, it would end the search before the others' turn.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_KEPT = 64
_SCANS = 100
"""Of a JPEG; cameras write 1, progressive files have about 10. Each is a pass over all pixels for a few bytes."""


class RequestImageReader:
    """Opens clients' images, and keeps the last of them with what the model saw in them.

    Args:
        processor: The model's.
        limits: What is accepted.
        domains: Hosts that images may be fetched from; none by default.
    """

    def __init__(
        self, processor: LlavarProcessor, limits: RequestLimits, *, domains: frozenset[str] = frozenset()
    ) -> None:
        self._processor = processor
        self._limits = limits
        self._rules = FetchRules(max_bytes=limits.image_bytes, public_only=True, domains=domains)
        self._known: OrderedDict[bytes, PromptImage] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(limits.decoding)

    def open(self, url: str) -> PromptImage:
        """Open an image. For a thread of its own: decoding takes a while, and fetching longer.

        Args:
            url: As the client wrote it. It is never a path.

        Returns:
            The image; the same object for the same bytes, as long as it is kept.

        Raises:
            RequestRefusedError: It is too large, not an image, or not to be fetched.
        """
        data = self._data(url)
        key = hashlib.blake2b(data, digest_size=32).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        image = self._prepare(data)
        with self._lock:
            image = self._known.setdefault(key, image)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return image

    def _data(self, url: str) -> bytes:
        head = _DATA_URL.match(url)
        if head is None:
            return self._fetched(url)
        if (len(url) - head.end()) * 3 // 4 > self._limits.image_bytes + 2:
            raise RequestRefusedError(413, "a picture is too large", "image_too_large", param="messages")
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _unreadable("a picture's data URL is not valid base64") from error

    def _fetched(self, url: str) -> bytes:
        if not self._rules.domains:
            raise _unreadable("pictures are taken from data URLs only (data:image/png;base64,...)")
        try:
            return fetch(url, self._rules)
        except ImageError as error:
            # What was found there, or why not, is for the log alone: it would map our network.
            raise _unreadable("a picture cannot be fetched from this address") from error

    def _prepare(self, data: bytes) -> PromptImage:
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as opened:
                width, height = opened.size
                scans = data.count(b"\xff\xda") if opened.format in ("JPEG", "MPO") else 0
        except Image.DecompressionBombError:  # Pillow's own limit is higher than any that is sensible here
            raise self._too_many_pixels() from None
        except Exception as error:
            raise _unreadable("a picture cannot be read (PNG, JPEG, WebP, GIF and BMP are)") from error
        if scans > _SCANS:
            raise _unreadable(f"a picture has more than {_SCANS} scans")
        if width * height > self._limits.pixels:
            raise self._too_many_pixels()
        try:
            with self._decoding:
                return PromptImage.prepare(decode_image(data, "picture"), self._processor)
        except ImageError as error:
            raise _unreadable("a picture cannot be read") from error

    def _too_many_pixels(self) -> RequestRefusedError:
        most = self._limits.pixels // 1_000_000
        return RequestRefusedError(
            413, f"a picture has more than {most} megapixels", "image_too_large", param="messages"
        )


def _unreadable(message: str) -> RequestRefusedError:
    return RequestRefusedError(400, message, "invalid_image", param="messages")
