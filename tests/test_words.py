"""The vocabulary of the project: words that must not come back, in code, messages, documentation and tests."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {
    "affair": "name the subject",
    "aloud": "leave it out",
    "anew": "again",
    "came to|come to|comes to": "is, or gives",
    "for want of": "because there is no",
    "gave back|give back|gives back|given back": "return",
    "go on|goes on|going on|went on|goes on with": "continue, or resume",
    "laid|lay|laying|lays": "apply, put, or store",
    "learnt": "learned",
    "let go": "release, or disable",
    "mend|mended|mending|mends": "fix",
    "nobody": "no one, or name who",
    "picture|pictures|pictured": "image",
    "settle|settled|settles|settling": "commit, decide, or finish",
    "see to it|sees to it|seen to": "ensure",
    "spell|spelled|spelling|spells|spelt": "write, format, or name",
    "take up|taken up|takes up|taking up|took up": "load, or resume",
    "wanted": "expected, or requested",
    "whoever": "anyone who, or name who",
    "without a word": "silently",
}
"""Regular expression alternatives (whole words) and what to write instead."""

ALLOWED = {
    # Names on disk and on the command line that 0.1 introduced keep working.
    ("llavar_peft/", "--pictures"),
    ("examples/ocr_to_model.py", "--pictures"),
    ("llavar_peft/cli/preflight_command.py", '"pictures"'),
    ("llavar_peft/datagen/ocr/make_conversations.py", '"pictures"'),
    ("llavar_peft/datagen/ocr/make_conversations.py", '"mended"'),
    ("llavar_peft/serving/ui/chat_page.py", "picture"),
    ("llavar_peft/inference/__init__.py", '"Picture"'),
    ("tests/serving/test_page.py", "picture"),
    ("llavar_peft/training/dropped_records.py", "Mend"),
    ("llavar_peft/errors.py", "mend"),
    # The questions of the paper's OCR data.
    ("llavar_peft/constants.py", "picture."),
    # Texts sent to language models: replies are kept by the hash of the request.
    ("llavar_peft/datagen/ocr/make_conversations.py", "look at the same picture"),
    ("llavar_peft/datagen/ocr/make_conversations.py", "text in the picture"),
    ("llavar_peft/datagen/ocr/make_conversations.py", "as if you saw the picture"),
    ("llavar_peft/datagen/ocr/make_conversations.py", "again, mended, as JSON alone"),
    ("llavar_peft/datagen/ocr/make_conversations.py", "mend obvious mistakes of"),
    ("llavar_peft/datagen/ocr/make_conversations.py", "turns, wanted at least"),
    ("llavar_peft/datagen/ocr/check_replies.py", "which nobody who sees the picture would"),
    ("llavar_peft/cli/output.py", '"mend"'),
    ("llavar_peft/serving/ui/page_conversation.py", '"picture"'),
}
"""Pairs of a path's beginning and a literal in which a banned word may stand."""

_TEXT_SUFFIXES = (".md", ".j2", ".yaml", ".toml", ".ipynb", ".sh")
_SKIPPED = (
    "CHANGELOG.md",
    "LICENSE",
    "tests/golden",
    "tests/test_words.py",
    "benchmarks/results",
    "docs/benchmarks.md",
    "llavar_peft/assets",
)
_PATTERN = re.compile(rf"(?<![a-z])({'|'.join(BANNED)})(?![a-z])", re.IGNORECASE)


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        return []
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [name for name in names if name.endswith((".py", *_TEXT_SUFFIXES)) and not name.startswith(_SKIPPED)]


def _pieces(name: str) -> list[tuple[int, str]]:
    """Return the lines of a file that people read, each with its number.

    In tests, string literals other than docstrings may hold data of any kind and are left out.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".py"):
        return list(enumerate(text.splitlines(), 1))
    pieces: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            # Parts of an identifier are words: `refuse_unsharded`, `LookAtPictures`.
            pieces.append((token.start[0], re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", token.string)))
        elif token.type == tokenize.COMMENT or (token.type == tokenize.STRING and _is_prose(name, token)):
            pieces += [(token.start[0] + n, line) for n, line in enumerate(token.string.splitlines())]
    return pieces


def _is_prose(name: str, token: tokenize.TokenInfo) -> bool:
    docstring = token.string.startswith('"""') and token.line.lstrip().startswith('"""')
    return docstring or not name.startswith("tests/")


def _found(name: str) -> list[str]:
    found = []
    for number, line in _pieces(name):
        kept = line
        for beginning, literal in ALLOWED:
            if name.startswith(beginning):
                kept = kept.replace(literal, "")
        for match in _PATTERN.finditer(kept):
            word = match.group().lower()
            instead = next(hint for words, hint in BANNED.items() if word in words.split("|"))
            found.append(f"{name}:{number}: '{word}' in {line.strip()[:90]!r}. Write: {instead}.")
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's list of files")
@pytest.mark.parametrize("area", ["llavar_peft", "tests", "benchmarks", "examples", ""])
def test_no_banned_words(area: str) -> None:
    names = _tracked()
    areas = ("llavar_peft/", "tests/", "benchmarks/", "examples/")
    chosen = [name for name in names if (name.startswith(f"{area}/") if area else not name.startswith(areas))]
    found = [line for name in chosen for line in _found(name)]
    assert not found, f"{len(found)} banned words:\n" + "\n".join(found[:2000])


def test_a_banned_word_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text('"""Mend."""\nwanted_images = f"laid {1}"  # anew\n')
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [line.split("'")[1] for line in _found("one.py")] == ["mend", "wanted", "laid", "anew"]
