"""Whether a base and a delta (or a target) belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.delta.delta_base_check import DeltaBaseEvidence, check_delta_base
from llavar_peft.weights.delta.released_layout import ReleasedView
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.weights_fingerprint import differences, read_fingerprint, take_fingerprint

FINGERPRINT_FILE = "fingerprints.json"
"""Fingerprints: of ``base`` and ``target`` beside a delta, of ``base`` and ``delta`` beside what was made from one."""
_GROWS = (tensor_names.RELEASED_EMBEDDINGS, tensor_names.HEAD)
_VERBATIM = (tensor_names.RELEASED_PROJECTOR_WEIGHT, tensor_names.RELEASED_PROJECTOR_BIAS)
_SHOWN = 6


def check_base(old: ReleasedView, step: ReleasedView) -> str:
    """Reject a base that a delta was not taken from.

    Args:
        old: The base.
        step: The delta.

    Returns:
        How it was told: ``"fingerprint"``, or for a delta that has none ``"statistics"``, those of ``lineage``.

    Raises:
        WeightsError: It is another base; says what gave it away.
    """
    known = read_fingerprint(step.folder / FINGERPRINT_FILE)
    if known is not None and "base" in known:
        found = differences(known["base"], take_fingerprint(old.table, old.config))
        if found:
            raise _wrong_base(old, step, f"its fingerprint differs in {_some(found)}")
        return "fingerprint"
    lineage = check_delta_base(old.table, step.table)
    if not lineage.fits:
        raise _wrong_base(old, step, _evidence(lineage))
    return "statistics"


def check_adapter_base(adapter: Path, base_print: Callable[[], Mapping[str, Any]], base: str) -> None:
    """Reject a base that an adapter was not trained on. An adapter without a fingerprint tells nothing.

    Args:
        adapter: Its folder.
        base_print: Takes the base's fingerprint.
        base: What to call the base.

    Raises:
        WeightsError: Another base; says what gave it away.
    """
    known = read_fingerprint(adapter / FINGERPRINT_FILE)
    if known is None or "base" not in known:
        return
    found = [line for line in differences(known["base"], base_print()) if not line.endswith("(not expected)")]
    if found:
        raise WeightsError.at(
            str(base),
            f"not the base that {adapter} was trained on: its fingerprint differs in {_some(found)}",
            "give the base it was trained on, unchanged",
        )


def _evidence(lineage: DeltaBaseEvidence) -> str:
    share = lineage.off / lineage.tested
    where = f", most in {_some(list(lineage.tensors))}" if lineage.tensors else ""
    return f"{share:.2%} of {lineage.tested} sampled differences cannot have come from these numbers{where}"


def _wrong_base(old: ReleasedView, step: ReleasedView, why: str) -> WeightsError:
    fault = Fault(
        str(old.folder),
        f"not the base that {step.folder} was taken from: {why}",
        "give the original base (LLaVAR's is LLaMA-13B, not Vicuna), unchanged; or force it and get other weights",
    )
    return WeightsError(str(fault), (fault,))


def check_pair(old: ReleasedView, new: ReleasedView) -> None:
    """Reject a base and a target (or delta) that do not have the same tensors, but for what LLaVA adds to LLaMA.

    Args:
        old: The base.
        new: The target or delta: may have the projector besides, and more rows of the embeddings and the head.

    Raises:
        WeightsError: Names what is missing, unknown or misshapen, on either side.

    Source: the assertions of LLaVAR, llava/model/make_delta.py and apply_delta.py.
    """
    fix = "give the base that the other was trained from"
    absent = [name for name in old.table if name not in new.table]
    unknown = [name for name in new.table if name not in old.table and name not in _VERBATIM]
    faults = [
        Fault(str(view.folder), f"{len(found)} tensors of {other.folder} are missing: {_some(found)}", fix)
        for view, other, found in ((new, old, absent), (old, new, unknown))
        if found
    ]
    for name, entry in new.table.items():
        if name in old.table and not _fits(name, old.table[name].shape, entry.shape):
            what = f"does not fit {new.folder} (got {list(old.table[name].shape)}, expected {list(entry.shape)})"
            faults.append(Fault(f"{old.folder}:{name}", what, fix))
    if faults:
        shown = faults[:_SHOWN]
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WeightsError("\n".join([*map(str, shown), *more]), faults)


def _fits(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return old == new or (name in _GROWS and old[1:] == new[1:] and old[0] <= new[0])


def _some(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
