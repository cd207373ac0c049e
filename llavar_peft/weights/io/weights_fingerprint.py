"""Fingerprints: a few kilobytes that tell two models apart, in whatever files their weights are stored.

Values are compared in fp16, the dtype of all released weights, so that fp16 weights stored in fp32 have the fingerprint
of the original. Buffers and file names do not count. A vision tower has a fingerprint of its own, which exists only
where it was trained: any other tower is the original one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import DAMAGED, WeightsError, describe_reason
from llavar_peft.weights.io.tensor_blocks import join_first, read_elements, tensor_bytes
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_FILE = "fingerprints.json"
"""Fingerprints by role: of ``base`` and ``target`` in a delta's folder, of ``base`` and ``delta`` in the folder of an
applied delta, of ``base`` in an adapter's, and of the base's ``tower`` if that or the adapter on it was trained."""
PLACES, RUN = 4, 2048
"""Number of sampled runs of a tensor, the first and last included, and the number of elements of a run."""
_FORMAT = 1
_CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps",
)  # fmt: skip
_UNEXPECTED = "(not expected)"


def sampled_runs(numel: int, places: int = PLACES, run: int = RUN) -> list[tuple[int, int]]:
    """Return start and length of the runs to sample of a tensor: all of it if it is small."""
    if numel <= places * run:
        return [(0, numel)] if numel else []
    return [((numel - run) * place // (places - 1), run) for place in range(places)]


def take_fingerprint(table: Mapping[str, TensorEntry | Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the fingerprint of a model.

    Args:
        table: Its tensors by released names; those of a vision tower by ours.
        config: Its flat configuration.

    Returns:
        A JSON object: ``format``, ``config``, and ``tensors`` with the shape and hash of each.

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


def _hash(entry: TensorEntry | Tensor) -> str:
    digest = hashlib.sha256()
    for start, count in sampled_runs(entry.numel if isinstance(entry, TensorEntry) else entry.numel()):
        if isinstance(entry, TensorEntry):
            run = read_elements(entry, start, count)
        else:
            run = entry.flatten()[start : start + count]
        # + 0.0 turns -0.0 into 0.0: the sign of a zero difference has no meaning.
        digest.update(tensor_bytes(run.half() + 0.0))
    return digest.hexdigest()[:16]


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Return a fingerprint in 16 characters, for display."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare_fingerprints(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Return one line for each tensor or field that is missing, unexpected or different."""
    lines = [
        f"{key} (got {got['config'][key]}, expected {value})"
        for key, value in expected["config"].items()
        if key in got["config"] and got["config"][key] != value
    ]
    for name in sorted({*expected["tensors"], *got["tensors"]}):
        ours, theirs = expected["tensors"].get(name), got["tensors"].get(name)
        if ours is None or theirs is None:
            lines.append(f"{name} {_UNEXPECTED if ours is None else '(missing)'}")
        elif list(ours[0]) != list(theirs[0]):
            lines.append(f"{name} (got shape {theirs[0]}, expected {ours[0]})")
        elif ours[1] != theirs[1]:
            lines.append(f"{name} (other values)")
    return lines


def read_fingerprint(path: Path) -> dict[str, Any] | None:
    """Read a file of fingerprints by role; return None if it does not exist.

    Raises:
        WeightsError: The file is not readable, or of another version.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for value in content.values():
            if not isinstance(value, Mapping) or value.get("format") != _FORMAT:
                raise ValueError("not fingerprints of this version")
            _ = value["config"].items()
            for pair in value["tensors"].values():
                shape, digest_ = pair
                if not (isinstance(pair, list) and isinstance(digest_, str) and all(isinstance(n, int) for n in shape)):
                    raise ValueError("expected a shape and a digest for each tensor")
    except DAMAGED as error:
        raise WeightsError.at(
            str(path), f"not a readable file of fingerprints ({describe_reason(error)})", DOWNLOAD_AGAIN
        ) from error
    return dict(content)


def check_adapter_base(
    adapter: Path, base_print: Callable[[], Mapping[str, Any] | None], base: str, *, role: str = "base"
) -> None:
    """Reject a base that an adapter was not trained on; accept any if the adapter has no fingerprint.

    Args:
        adapter: The adapter's folder.
        base_print: Computes the base's fingerprint; None if there is nothing to compare.
        base: What to call the base in the message.
        role: ``"base"``, or ``"tower"`` for the base's vision tower.

    Raises:
        WeightsError: The fingerprints differ; names the first tensors that do.
    """
    known = (read_fingerprint(adapter / FINGERPRINT_FILE) or {}).get(role)
    got = base_print() if known is not None else None
    if known is None or got is None:
        return
    found = [line for line in compare_fingerprints(known, got) if not line.endswith(_UNEXPECTED)]
    if found:
        raise WeightsError.at(
            base,
            f"not the base that {adapter} was trained on: its fingerprint differs in {join_first(found, 3)}",
            "give the unchanged base that the adapter was trained on",
        )
