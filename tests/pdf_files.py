"""PDF documents for tests, written object by object, so that each can have a fault of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

A4 = (595, 842)
_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
_FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding %s >>"


def text_at(lines: Sequence[tuple[float, float, str]], size: float = 12, mode: int = 0) -> bytes:
    """Return the content of a page that shows lines of text at (x, y) in points; mode 3 is invisible."""
    shown = b"".join(b"1 0 0 1 %g %g Tm (%s) Tj\n" % (x, y, text.encode("cp1252")) for x, y, text in lines)
    return b"BT /F1 %g Tf %d Tr\n%sET\n" % (size, mode, shown)


def paragraph(text: str, *, top: float = 780, width: int = 60, size: float = 12) -> bytes:
    """Return the content of a page that shows a text in lines of some characters."""
    words, rows = text.split(), [""]
    for word in words:
        rows[-1:] = [f"{rows[-1]} {word}".strip()] if len(rows[-1]) + len(word) < width else [rows[-1], word]
    return text_at([(60, top - 1.3 * size * number, row) for number, row in enumerate(rows)], size)


def pdf(
    *contents: bytes,
    size: tuple[float, float] = A4,
    page: bytes = b"",
    to_unicode: bytes | None = None,
    image: bool = False,
    password: str | None = None,
    count: int | None = None,
    typed: str | None = None,
) -> bytes:
    """Return a document with a page for each content.

    Args:
        contents: Content streams.
        size: Width and height of the pages in points.
        page: Further entries of each page, such as ``/Rotate 90``.
        to_unicode: A map from codes to characters that the font has.
        image: Whether each page has a dark image ``/Im1`` as a resource.
        password: Encrypts the document; an empty one opens it without asking.
        count: The number of pages that the document says it has.
        typed: What was typed into a form's field at (60, 500) of the pages.
    """
    form = b"/AcroForm << /Fields [6 0 R] /DR << /Font << /F1 3 0 R >> >> /DA (/F1 12 Tf 0 g) >>" if typed else b""
    objects: list[bytes] = [b"<< /Type /Catalog /Pages 2 0 R %s >>" % form, b"", b""]
    cipher = _cipher(password) if password is not None else None
    unicode_map = b"/ToUnicode 4 0 R" if to_unicode is not None else b""
    objects[2] = _FONT % unicode_map
    objects.append(_stream(to_unicode or b"", 4, cipher))
    objects.append(_stream(bytes(range(64)), 5, cipher, b"/Type /XObject /Subtype /Image /Width 8 /Height 8 "
                           b"/ColorSpace /DeviceGray /BitsPerComponent 8"))  # fmt: skip
    resources = b"<< /Font << /F1 3 0 R >> %s >>" % (b"/XObject << /Im1 5 0 R >>" if image else b"")
    if typed:
        page += b" /Annots [6 0 R]"
        objects.append(b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (%s) /DA (/F1 12 Tf 0 g) /F 4 "
                       b"/Rect [60 500 260 520] /AP << /N 7 0 R >> >>" % typed.encode())  # fmt: skip
        objects.append(_stream(b"/Tx BMC q BT /F1 12 Tf 2 5 Td (%s) Tj ET Q EMC" % typed.encode(), 7, cipher,
                               b"/Type /XObject /Subtype /Form /BBox [0 0 200 20] "
                               b"/Resources << /Font << /F1 3 0 R >> >>"))  # fmt: skip
    kids = []
    for content in contents:
        number = len(objects) + 1
        kids.append(b"%d 0 R" % number)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %.1f %.1f] /Resources %s /Contents %d 0 R %s >>"
            % (*size, resources, number + 1, page)
        )
        objects.append(_stream(content, number + 1, cipher))
    said = len(contents) if count is None else count
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), said)
    trailer = b""
    if password is not None:
        objects.append(_encryption(password))
        trailer = b"/Encrypt %d 0 R /ID [<00> <00>]" % len(objects)
    return _assemble(objects, trailer)


def _assemble(objects: Sequence[bytes], trailer: bytes) -> bytes:
    data, places = bytearray(b"%PDF-1.4\n"), []
    for number, written in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, written)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return bytes(data) + head + b"trailer << /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1, trailer, len(data)
    )  # fmt: skip


def _stream(data: bytes, number: int, cipher: Callable[[int, bytes], bytes] | None, entries: bytes = b"") -> bytes:
    data = data if cipher is None else cipher(number, data)
    return b"<< %s /Length %d >>\nstream\n%s\nendstream" % (entries, len(data), data)


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def _key(password: str) -> tuple[bytes, bytes]:
    """Return the document's key and its owner's entry: PDF 1.4, 3.5, revision 2."""
    padded = (password.encode() + _PADDING)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    return hashlib.md5(padded + owner + b"\xfc\xff\xff\xff" + b"\0").digest()[:5], owner


def _cipher(password: str) -> Callable[[int, bytes], bytes]:
    key, _ = _key(password)
    return lambda number, data: _rc4(hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10], data)


def _encryption(password: str) -> bytes:
    key, owner = _key(password)
    entry = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>"
    return entry % (owner.hex().encode(), _rc4(key, _PADDING).hex().encode())
