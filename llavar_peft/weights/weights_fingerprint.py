"""What a set of weights is, in a few kilobytes: enough to tell two models apart, whatever files they lie in.

The values are compared as fp16, the dtype of everything released, so that a model stored in fp32 that was fp16 once has
the same fingerprint as the original. Buffers, the tower and what a file is called do not enter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llavar_peft.errors import WeightsError
from llavar_peft.weights.io.tensor_blocks import read_elements, tensor_bytes
from llavar_peft.weights.io.tensor_table import TensorEntry

PLACES, RUN = 4, 2048
"""How many runs of a tensor are sampled, first and last included, and how many elements each has."""
_FORMAT = 1
_CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps",
)  # fmt: skip


def sampled_runs(numel: int, places: int = PLACES, run: int = RUN) -> list[tuple[int, int]]:
    """Start and length of the runs that are sampled of a tensor: all of it where it is small."""
    if numel <= places * run:
        return [(0, numel)] if numel else []
    return [((numel - run) * place // (places - 1), run) for place in range(places)]


def take_fingerprint(table: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fingerprint of a model.

    Args:
        table: Its tensors by released names.
        config: Its flat configuration.

    Returns:
        A JSON object: ``format``, ``config``, and ``tensors`` with shape and hash of each.

    Raises:
        WeightsError: A file ends early.
    """
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip(table, pool.map(_hash, table.values()), strict=True))
    return {
        "format": _FORMAT,
        "config": {key: config[key] for key in _CONFIG if config.get(key) is not None},
        "tensors": {name: [list(table[name].shape), hashes[name]] for name in sorted(table)},
    }


def _hash(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    for start, count in sampled_runs(entry.numel):
        # + 0.0 makes -0.0 and 0.0 the same: which of them comes out of a subtraction means nothing.
        digest.update(tensor_bytes(read_elements(entry, start, count).half() + 0.0))
    return digest.hexdigest()[:16]


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint in 16 letters, for the eye."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """What of a fingerprint another does not share.

    Args:
        expected: A fingerprint.
        got: Another.

    Returns:
        One line for each tensor or field that is missing, extra, of another shape or of other values.
    """
    lines = [
        f"{key} (got {got['config'][key]}, expected {value})"
        for key, value in expected["config"].items()
        if key in got["config"] and got["config"][key] != value
    ]
    for name in sorted({*expected["tensors"], *got["tensors"]}):
        ours, theirs = expected["tensors"].get(name), got["tensors"].get(name)
        if ours is None or theirs is None:
            lines.append(f"{name} ({'not expected' if ours is None else 'missing'})")
        elif list(ours[0]) != list(theirs[0]):
            lines.append(f"{name} (got shape {theirs[0]}, expected {ours[0]})")
        elif ours[1] != theirs[1]:
            lines.append(f"{name} (other values)")
    return lines


def read_fingerprint(path: Path) -> dict[str, Any] | None:
    """Read a file of fingerprints.

    Args:
        path: A JSON object of fingerprints by role.

    Returns:
        Its content; None where there is no such file.

    Raises:
        WeightsError: It is no such file.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for value in content.values():
            if not isinstance(value, Mapping) or value.get("format") != _FORMAT:
                raise ValueError("not fingerprints of this version")
            _ = value["config"].items(), value["tensors"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError.at(str(path), f"not readable as fingerprints ({error})", "fetch the file again") from error
    return dict(content)
