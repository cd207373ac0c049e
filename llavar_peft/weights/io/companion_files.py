"""Copy the files of a checkpoint other than its weights into a folder that may be published.

Nothing is copied that the result does not need: a checkpoint of others may contain links to private files, code, or a
chat template that anyone who opens the result would run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import ConfigError
from llavar_peft.weights.io.checkpoint_code import CODE_KEYS, check_no_code

TOKENIZER_MODEL, ADDED_TOKENS_FILE = "tokenizer.model", "added_tokens.json"
TOKENIZER_FILES = (
    TOKENIZER_MODEL, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", ADDED_TOKENS_FILE,
)  # fmt: skip
GENERATION_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_FILE = "processor_config.json"
IMAGES_FILE = "preprocessor_config.json"
MODEL_FILES = (
    *TOKENIZER_FILES, GENERATION_FILE, IMAGES_FILE, PROCESSOR_FILE, "vocab.json", "merges.txt",
)  # fmt: skip
"""Files of a model that are copied, besides its licence. ``config.json`` is written."""
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_PASSED_ON = CODE_KEYS | {"chat_template"}


def find_companions(folder: Path, names: Sequence[str] = MODEL_FILES, *, licences: bool = True) -> list[Path]:
    """Return the files of these names in a checkpoint, and its licence.

    Raises:
        ConfigError: One of them is a link out of the folder, or names code to run.
    """
    check_no_code(folder)
    found = [folder / name for name in names if (folder / name).is_file()]
    if licences:
        found += [path for pattern in LICENCES for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in found:
        check_link(path, folder)
    return found


def copy_companion(path: Path, staged: Path) -> None:
    """Copy a file of ``find_companions`` to a folder, without settings that name code or a chat template."""
    target = staged / path.name
    settings = _read_settings(path)
    if isinstance(settings, dict) and not settings.keys().isdisjoint(_NOT_PASSED_ON):
        write_json(target, {key: value for key, value in settings.items() if key not in _NOT_PASSED_ON})
    else:
        shutil.copyfile(path, target)


def _read_settings(path: Path) -> Any:
    if path.suffix != ".json" or path.name == "tokenizer.json":  # the latter is long, and is only data
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def check_link(path: Path, folder: Path) -> None:
    """Accept a link within the folder, and one of a hub cache, whose files are links to ``../../blobs``."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise ConfigError.at(
            str(path),
            f"a link out of its folder (to {ascii(str(target))[1:-1]}), which is not copied into the result",
            "put the file itself there instead of the link, or remove the link",
        )
