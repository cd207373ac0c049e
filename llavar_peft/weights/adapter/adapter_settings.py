"""The settings of an adapter, ``adapter_config.json``, checked when they are read: they may come from anyone.

Patterns of module names are matched here, within a time limit, and replaced by the names themselves. peft matches them
with ``re``, which some patterns keep busy for years.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import regex

from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

_SECONDS = 2.0
"""For matching all patterns of one kind with all modules of a model. A usual pattern takes milliseconds."""
_LONGEST_PATTERN = 20_000
_LARGEST_RANK = 100_000
_PLAIN = re.compile(r"[\w.-]+")


class _LoraSettings(msgspec.Struct, kw_only=True):
    """The settings that this package reads, and their types."""

    peft_type: str
    r: int
    lora_alpha: int | float
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    lora_dropout: int | float = 0.0
    use_dora: bool | None = False
    use_rslora: bool | None = False
    lora_bias: bool | None = False
    bias: str | None = "none"
    base_model_name_or_path: str | None = None


def check_settings_types(settings: Mapping[str, Any]) -> None:
    """Reject settings that no LoRA adapter can have.

    Raises:
        ValueError: A value has the wrong type or is out of range (also msgspec's ``ValidationError``).
    """
    checked = msgspec.convert(settings, _LoraSettings)
    for name, rank in {"r": checked.r, **(checked.rank_pattern or {})}.items():
        if not 0 < rank <= _LARGEST_RANK:
            raise ValueError(f"rank {name[:80]}: got {rank!r}, expected a positive integer up to {_LARGEST_RANK}")
    for name, alpha in {"lora_alpha": checked.lora_alpha, **(checked.alpha_pattern or {})}.items():
        if not math.isfinite(alpha):
            raise ValueError(f"scale {name[:80]}: got {alpha!r}, expected a finite number")
    if not 0 <= checked.lora_dropout <= 1:
        raise ValueError(f"lora_dropout: got {checked.lora_dropout!r}, expected 0 to 1")
    names = [*(checked.modules_to_save or ()), *_listed(checked.target_modules), *_listed(checked.exclude_modules)]
    invalid = next((name for name in names if not _PLAIN.fullmatch(name)), None)
    if invalid is not None:
        raise ValueError(f"got the module {ascii(invalid)[:80]}, expected a name of letters, digits, _, - and dots")
    indices = checked.trainable_token_indices or []
    for rows in indices.values() if isinstance(indices, dict) else [indices]:
        if len(set(rows)) < len(rows) or min(rows, default=0) < 0:
            raise ValueError("trainable_token_indices: expected different numbers of rows")


def _listed(names: str | list[str] | None) -> list[str]:
    return names if isinstance(names, list) else []


def target_names(settings: Mapping[str, Any], modules: Iterable[str], where: str) -> list[str]:
    """Return the modules among others that an adapter's settings select.

    Raises:
        ConfigError: A pattern is invalid or takes too long.

    Source: peft, tuners/tuners_utils.py, ``check_target_module_exists``.
    """
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    names = list(modules)
    left_out = set(select_names(excluded, names, f"{where}:exclude_modules")) if excluded else set()
    selected = names if targets == "all-linear" else select_names(targets or [], names, f"{where}:target_modules")
    return [module for module in selected if module not in left_out]


def select_names(pattern: str | list[str], names: list[str], where: str) -> list[str]:
    """Return the names that match a pattern, or end with one of several names.

    Raises:
        ConfigError: The pattern is invalid or takes too long.
    """
    if isinstance(pattern, str):
        return _match(pattern, names, where)
    ends = set(pattern)
    return [name for name in names if any(end in ends for end in _ends(name))]


def _ends(name: str) -> Iterable[str]:
    """Yield the name, and what follows each of its dots."""
    yield name
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def _match(pattern: str, names: list[str], where: str) -> list[str]:
    """Return the names that a regular expression matches as a whole."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError.at(where, f"a pattern of {len(pattern)} characters", "give the modules' names")
    stop = time.monotonic() + _SECONDS
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(1e-3, stop - time.monotonic()))]
    except TimeoutError:
        reason = "matching it with the modules' names takes too long"
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = f"it is no regular expression: {str(error)[:80]}"
    raise ConfigError.at(
        where, f"unusable pattern of modules ({ascii(pattern)[:80]}: {reason})", "list the modules' names"
    )


def resolve_patterns(settings: Mapping[str, Any], modules: list[str], where: str) -> dict[str, dict[str, Any]]:
    """Return ``rank_pattern`` and ``alpha_pattern`` with the names of modules instead of patterns.

    Args:
        settings: The adapter's.
        modules: The modules that it adapts.
        where: The adapter, for messages.

    Raises:
        ConfigError: A pattern is invalid or takes too long.

    Source: peft, utils/other.py, ``get_pattern_key``: the first pattern that a module's name ends with counts.
    """
    resolved: dict[str, dict[str, Any]] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        values: dict[str, Any] = {}
        stop = time.monotonic() + _SECONDS
        for pattern, value in (settings.get(key) or {}).items():
            remaining = [module for module in modules if module not in values]
            if time.monotonic() > stop:
                raise ConfigError.at(f"{where}:{key}", "too many patterns of modules", "list the modules' names")
            values.update(dict.fromkeys(_match(rf"(.*\.)?({pattern})", remaining, f"{where}:{key}"), value))
        resolved[key] = values
    return resolved


def peft_settings(settings: Mapping[str, Any], modules: list[str]) -> LoraConfig:
    """Return peft's configuration of an adapter, made only of settings that have been checked, and without patterns.

    Args:
        settings: From ``open_adapter``.
        modules: The modules that it adapts.
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM" if settings.get("task_type") == "CAUSAL_LM" else None,
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=float(settings.get("lora_dropout") or 0),
        target_modules=sorted(modules),
        modules_to_save=settings.get("modules_to_save"),
        trainable_token_indices=settings.get("trainable_token_indices"),
        rank_pattern=_grouped(settings.get("rank_pattern") or {}),
        alpha_pattern=_grouped(settings.get("alpha_pattern") or {}),
        use_dora=bool(settings.get("use_dora")),
        use_rslora=bool(settings.get("use_rslora")),
        lora_bias=bool(settings.get("lora_bias")),
    )


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one pattern for each value, because peft tries all patterns with each module."""
    return {
        "|".join(re.escape(module) for module, other in values.items() if other == value): value
        for value in dict.fromkeys(values.values())
    }
