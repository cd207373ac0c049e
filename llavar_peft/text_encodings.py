"""The encodings of text files: UTF-8, UTF-16 and UTF-32 are recognized, all others are rejected with advice.

Other encodings cannot be told apart reliably, and a wrong guess changes what a model is trained on. The message names
the byte, the likely encoding, and the command that converts the file.
"""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path
from typing import Final, NamedTuple

from llavar_peft.errors import Fault

_BOMS: Final = (  # UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Encodings that are proposed for a file that is not UTF-8, with iconv's names.
_LEGACY: Final = {
    "cp1252": "CP1252", "cp1250": "CP1250", "cp1251": "CP1251", "koi8_r": "KOI8-R", "gb18030": "GB18030",
    "big5": "BIG5", "cp932": "CP932", "euc_jp": "EUC-JP", "cp949": "CP949",
}  # fmt: skip
_FOREIGN: Final = (
    (b"PAR1", "is a Parquet file, not text", "name it .parquet where records are expected, or export it as JSON"),
    (b"PK\x03\x04", "is a ZIP archive or an Office file, not text", "unpack it, or export it as text in UTF-8"),
    (b"%PDF-", "is a PDF, not text", "export its content as text"),
    (b"\x89PNG", "is an image, not text", "give the file with the text"),
    (b"\xff\xd8\xff", "is an image, not text", "give the file with the text"),
    (b"\x80\x02}", "is a pickle, not text", "write its content as JSON"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run git lfs pull in its repository"),
    *(
        (magic, "the file is compressed", "decompress it")
        for magic in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
    ),
)
_UTF16_SAMPLE: Final = 2**12
_SAMPLE: Final = 2**16  # bytes around an undecodable one, from which the encoding is estimated
_RECORD: Final = b'"conversations"'
_SHOWN: Final = 12  # characters on each side of an undecodable byte


class UnicodeForm(NamedTuple):
    """One of Unicode's encodings, and the length of the mark at the beginning of the file."""

    encoding: str
    mark: int


def detect_unicode(head: bytes) -> UnicodeForm:
    """Return the form of Unicode that a file is in, by its beginning; UTF-8 if there is no sign of another one.

    Without a byte order mark, UTF-16 and UTF-32 are recognized by the NUL bytes of ASCII characters, which are at
    every second or in three of four positions, and which no other text contains.
    """
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return UnicodeForm(encoding, len(mark))
    sample = head[:_UTF16_SAMPLE]
    sample = sample[: len(sample) - len(sample) % 4] or sample
    zeros = [sample[place::4].count(0) for place in range(4)]
    quarter = len(sample) // 4
    if quarter and zeros[3] == quarter and zeros[2] * 2 > quarter and not zeros[0]:
        return UnicodeForm("utf-32-le", 0)
    if quarter and zeros[0] == quarter and zeros[1] * 2 > quarter and not zeros[3]:
        return UnicodeForm("utf-32-be", 0)
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if odd * 4 > len(sample) // 2 and even * 8 < odd:
        return UnicodeForm("utf-16-le", 0)
    if even * 4 > len(sample) // 2 and odd * 8 < even:
        return UnicodeForm("utf-16-be", 0)
    return UnicodeForm("utf-8", 0)


def to_utf8(data: bytes, form: UnicodeForm) -> bytes:
    """Return a text in UTF-8 without a byte order mark. UTF-8 itself is not checked.

    Raises:
        UnicodeDecodeError: The text is damaged; the error's positions do not count the mark.
    """
    text = data[form.mark :]
    return text if form.encoding == "utf-8" else text.decode(form.encoding).encode()


def find_foreign_format(where: str, head: bytes) -> Fault | None:
    """Return what a file is that is no text, by its first bytes; None if it may be text."""
    return next((Fault(where, what, fix) for magic, what, fix in _FOREIGN if head.startswith(magic)), None)


def explain_encoding(
    data: bytes, where: str, path: Path, *, base: int = 0, line: int | None = None, encoding: str = "utf-8"
) -> Fault:
    """Return where and why a text cannot be decoded, and how to convert its file.

    Args:
        data: The text, which is not valid in ``encoding``.
        where: Name of the text in messages.
        path: Its file.
        base: Position of the text in the file, in bytes.
        line: The line of the file that the text begins in, from 1; None for text whose name says where it is.
        encoding: The encoding that the file begins with.
    """
    at = first_undecodable(data, encoding)
    breaks = data.count(b"\n", 0, at)
    place = "" if line is None else f", line {line + breaks}"
    name = encoding[:6].upper()
    what = f"byte {data[at]:#04x} at position {base + at}{place} is not {name}"
    if encoding != "utf-8":
        return Fault(where, f"the file begins as {name}, but {what}", "save the file again as UTF-8")
    if len(data) - at < 4 and len(data[at:].decode(errors="replace")) == 1:
        return Fault(where, f"{what}: the text ends within a character", "get the file again: it may have been cut off")
    source, target = (shlex.quote(name) for name in (str(path), f"{path.stem}.utf8{path.suffix}"))
    sample = _read_around(path, base + at) or data
    broken, right = _count_characters(sample)
    if right >= broken:
        fix = f"correct the text there, or drop such bytes: iconv -c -f UTF-8 -t UTF-8 {source} > {target}"
        return Fault(where, f"{what}, although other text in the file is", fix)
    likely = _estimate(sample)
    if likely is None:
        fix = f"save the file as UTF-8, or convert it: iconv -f ENCODING -t UTF-8 {source} > {target}"
        return Fault(where, what, fix)
    near = data[max(0, at - _SHOWN) : at + 2 * _SHOWN].decode(likely, "replace").strip()
    fix = f"save the file as UTF-8, or convert it: iconv -f {_LEGACY[likely]} -t UTF-8 {source} > {target}"
    return Fault(where, f"{what}; it may be {_LEGACY[likely]}, which reads {near!r}", fix)


def first_undecodable(data: bytes, encoding: str = "utf-8") -> int:
    """Return the position of the first byte that an encoding does not allow; the length if there is none."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        return min(error.start, len(data) - 1)
    return len(data)


def is_legacy(head: bytes) -> bool:
    """Return whether a file of records is in an older encoding throughout.

    A file in UTF-8 with one damaged record is not: that record alone is at fault.

    Args:
        head: The beginning of the file.
    """
    first = first_undecodable(head)
    if first >= len(head) - 3:  # none, or a character that continues after the beginning
        return False
    broken, right = _count_characters(head)
    after = head.find(_RECORD, first)
    spread = after >= 0 and first_undecodable(head[after:]) < len(head) - after - 3
    return spread and broken > right


def _count_characters(sample: bytes) -> tuple[int, int]:
    """Return the number of bytes that are not UTF-8, and of characters outside ASCII that are."""
    foreign = [ord(character) for character in sample.decode(errors="surrogateescape") if not character.isascii()]
    broken = sum(0xDC80 <= code <= 0xDCFF for code in foreign)
    return broken, len(foreign) - broken


def _read_around(path: Path, at: int) -> bytes:
    """Return a part of a file around a position, without a part of a character; nothing if it cannot be read."""
    start = max(0, at - _SAMPLE // 2)
    try:
        with path.open("rb") as file:
            file.seek(start)
            sample = file.read(_SAMPLE)
    except OSError:
        return b""
    return sample.lstrip(bytes(range(0x80, 0xC0))) if start else sample


def _estimate(sample: bytes) -> str | None:
    """Return the older encoding that a text is probably in, as a key of ``_LEGACY``."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:  # it comes with datasets, but is not required
        return None
    matches = from_bytes(sample, cp_isolation=list(_LEGACY))
    best = matches.best()
    if best is None:
        return None
    # Short texts in CP1252 fit CP1250 as well, which is much rarer.
    alike = {name for match in matches for name in (match.encoding, *match.could_be_from_charset)}
    return "cp1252" if best.encoding == "cp1250" and "cp1252" in alike else best.encoding
