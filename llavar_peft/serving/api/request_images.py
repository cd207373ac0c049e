"""Images that clients send: checked before they are decoded, and encoded by the vision tower once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from PIL import Image

from llavar_peft.data.data_urls import decode_base64, split_data_url
from llavar_peft.data.image_files import decode_image, describe_start, read_header
from llavar_peft.errors import ImageError
from llavar_peft.inference.fetch_image import FetchRules, fetch
from llavar_peft.inference.generation_request import PromptImage
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError

# The formats that browsers and cameras write; decoders of rare formats are an unnecessary risk. Pillow's JPEG plugin
# opens MPO too. MPO is not listed here: it has no plugin of that name, and Pillow would stop at it.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA_URL_NEEDED = "Images have to be data URLs (data:image/png;base64,...)."
_PDF = "PDF files are not supported. Send each page as an image."
_CACHE_SIZE = 64
_MAX_SCANS = 100
"""Scans of a JPEG. Cameras write 1, progressive files about 10. A scan of a few bytes is a pass over all pixels."""


class RequestImageReader:
    """Opens clients' images, and caches the most recent ones with their encoding by the vision tower.

    Args:
        processor: The model's processor.
        limits: Limits of a request.
        domains: Hosts from which images may be downloaded; none by default.
    """

    def __init__(
        self, processor: LlavarProcessor, limits: RequestLimits, *, domains: frozenset[str] = frozenset()
    ) -> None:
        self._processor = processor
        self._limits = limits
        self._rules = FetchRules(max_bytes=limits.image_bytes, public_only=True, domains=domains)
        self._cache: OrderedDict[tuple[bytes, int | None], PromptImage] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(limits.decoding)

    def open(self, url: str, *, of: int = 1) -> PromptImage:
        """Open an image. Run it in a thread: decoding and downloading take long.

        Args:
            url: The client's URL. It is never used as a path.
            of: Number of images of the request, which share the model's limit of image tokens.

        Returns:
            The image; the same object for the same bytes and the same share of the limit, as long as it is cached.

        Raises:
            RequestRejectedError: The image is too large or unreadable, or its URL is not allowed.
        """
        data = self._data(url)
        geometry = self._processor.tile_geometry
        most = None if geometry is None or geometry.budget is None else geometry.budget // of
        key = hashlib.blake2b(data, digest_size=32).digest(), most
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        image = self._prepare(data, most)
        with self._lock:
            image = self._cache.setdefault(key, image)
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return image

    def _data(self, url: str) -> bytes:
        url = url.strip()
        digits = split_data_url(url)
        if digits is None:
            return self._fetch(url)
        if len(digits) * 3 // 4 > self._limits.image_bytes + 2:
            raise RequestRejectedError(413, "An image file is too large.", "image_too_large", param="messages")
        try:
            return decode_base64(digits)
        except ValueError as error:
            raise _unreadable("The data URL of an image is not valid base64.") from error

    def _fetch(self, url: str) -> bytes:
        if not self._rules.domains or not url[:8].lower().startswith(("http://", "https://")):
            raise _unreadable(_DATA_URL_NEEDED)
        try:
            return fetch(url, self._rules)
        except ImageError as error:
            # The reason goes to the log only: a client could explore the server's network with it.
            raise _unreadable("An image cannot be downloaded from its URL.") from error

    def _prepare(self, data: bytes, most: int | None) -> PromptImage:
        """Prepare an image, with tiles in the best grid of at most this many image tokens."""
        if data.startswith(b"%PDF"):
            raise _unreadable(_PDF)
        try:
            with read_header(data, _FORMATS) as opened:
                width, height = opened.size
                animated = opened.format != "MPO" and int(getattr(opened, "n_frames", 1)) > 1
                scans = data.count(b"\xff\xda") if opened.format in ("JPEG", "MPO") else 0
        except Image.DecompressionBombError:  # Pillow's limit is higher than ours
            raise self._too_many_pixels() from None
        except Exception as error:
            kind = describe_start(data)[0]
            what = "An image cannot be read" if kind == "not an image" else f"An image is {kind}"
            raise _unreadable(f"{what}. Supported formats are PNG, JPEG, WebP, GIF and BMP.") from error
        if animated:
            raise _unreadable("An image is an animation. Send the frame that you mean as an image.")
        if scans > _MAX_SCANS:
            raise _unreadable(f"An image has more than {_MAX_SCANS} scans.")
        if width * height > self._limits.pixels:
            raise self._too_many_pixels()
        try:
            with self._decoding:
                decoded, geometry = decode_image(data, "image"), self._processor.tile_geometry
                layout = geometry.layout(decoded.size, most) if geometry is not None and most is not None else None
                return PromptImage.prepare(decoded, self._processor, layout=layout)
        except ImageError as error:
            raise _unreadable("An image cannot be read, because its file is damaged or incomplete.") from error

    def _too_many_pixels(self) -> RequestRejectedError:
        what = f"An image has more than {self._limits.pixels // 1_000_000} megapixels."
        return RequestRejectedError(413, what, "image_too_large", param="messages")


def _unreadable(message: str) -> RequestRejectedError:
    return RequestRejectedError(400, message, "invalid_image", param="messages")
