"""What the files of a model or an adapter say about its resolution: ``ModelConfig.resolution``, in any layout.

Here it is the mapping that our ``config.json`` has; ``recipe.resolution`` gives it types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavar_peft.constants import MODEL_TYPE, STOCK_TILES_MODEL_TYPE
from llavar_peft.errors import DAMAGED, ConfigError, Fault, describe_reason

RESOLUTION = "resolution"
"""In our ``config.json`` and ``processor_config.json``."""
FLAT_RESOLUTION = "mm_resolution"
"""In a flat configuration of ours: the same mapping, next to what LLaVA's code has for tiles."""
FLAT_TILES = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
"""How LLaVA 1.6's code says that a model reads tiles. Source: ``liuhaotian/llava-v1.6-vicuna-7b``, config.json."""
FLAT_GRIDS = "image_grid_pinpoints"
"""In LLaVA's code: the (width, height) in pixels of each grid; in stock transformers the (height, width)."""
_STOCK_SIDE, _STOCK_GRIDS = 336, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The defaults of stock transformers' ``LlavaNextConfig``, which its files leave out."""
_WORDS = {"tiles": "reads tiles", "cross_attention": "has a cross-attention", None: "reads the whole image only"}


def resolution_kind(config: Mapping[str, Any]) -> str | None:
    """Return how a model reads small letters: ``tiles``, ``cross_attention``, or None for the whole image only.

    Args:
        config: Its ``config.json``, in any layout.
    """
    stated = config.get(RESOLUTION) or config.get(FLAT_RESOLUTION)
    if isinstance(stated, Mapping):
        return str(stated.get("type"))
    reads_tiles = config.get("model_type") == STOCK_TILES_MODEL_TYPE
    return "tiles" if reads_tiles or FLAT_TILES.items() <= config.items() else None


def stated_resolution(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the resolution of a model in our layout or in that of stock transformers, as our ``config.json`` has it.

    Args:
        config: Its ``config.json``.

    Raises:
        ConfigError: Stock transformers' sizes of images are damaged.
    """
    stated = config.get(RESOLUTION)
    if isinstance(stated, Mapping):
        return dict(stated)
    if config.get("model_type") != STOCK_TILES_MODEL_TYPE:
        return None
    try:
        side = (config.get("vision_config") or {}).get("image_size", _STOCK_SIDE)
        sizes = config.get(FLAT_GRIDS) or _STOCK_GRIDS
        return {"type": "tiles", "grid": [[height // side, width // side] for height, width in sizes], "pool": 1}
    except (*DAMAGED, ZeroDivisionError) as error:
        what = f"not readable as sizes of images ({describe_reason(error)})"
        raise ConfigError.at(f"config.json:{FLAT_GRIDS}", what, "download or copy the file again") from error


def resolution_of_adapter(folder: Path) -> Mapping[str, Any] | None:
    """Return the resolution of the model that an adapter was trained on; None also if its files do not say it.

    Raises:
        ConfigError: It is no mapping with a known type.
    """
    stated = _read_adapter_config(folder).get(RESOLUTION)
    if stated is None:
        return None
    if not isinstance(stated, Mapping) or stated.get("type") not in _WORDS:
        where = f"{folder / 'config.json'}:{RESOLUTION}"
        what = f"not readable as tiles or cross-attention (got {ascii(stated)[:80]})"
        raise ConfigError.at(where, what, "download or copy the file again")
    return stated


def find_resolution_fault(adapter: Path, base: str | None, *, can_change: bool = True) -> Fault | None:
    """Return why an adapter does not fit the resolution of a base, or None.

    Args:
        adapter: Its folder. Without a ``config.json`` of ours, nothing is known.
        base: From ``resolution_kind``.
        can_change: Whether a base without a resolution gets that of the adapter, which contains the weights for it.
    """
    config = _read_adapter_config(adapter)
    kind = resolution_kind(config)
    if not config or kind == base or (base is None and can_change):
        return None
    what = f"was trained on a model that {_WORDS.get(kind, kind)}, and this one {_WORDS.get(base, base)}"
    fix = "give the base that it was trained on, which base.json in its folder names"
    if base is None:
        fix = f"build the model with the resolution in {adapter / 'base.json'}, or load the adapter with load_chat"
    return Fault(str(adapter), f"the adapter {what}", fix)


def flat_resolution(resolution: object, side: int) -> dict[str, Any]:
    """Return the settings of a resolution for a flat ``config.json``.

    Args:
        resolution: As our ``config.json`` has it.
        side: Side of a tile in pixels.

    Returns:
        Ours, and those of LLaVA 1.6's code if it computes the same.
    """
    if not isinstance(resolution, Mapping):
        return {}
    if resolution.get("type") != "tiles" or resolution.get("pool", 1) != 1:
        return {FLAT_RESOLUTION: dict(resolution)}
    sizes = [[columns * side, rows * side] for rows, columns in resolution.get("grid") or ()]
    return {**FLAT_TILES, FLAT_GRIDS: sizes, FLAT_RESOLUTION: dict(resolution)}


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of ours in an adapter's folder; empty if there is none, or it is damaged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, *DAMAGED):
        return {}
    return found if isinstance(found, dict) and found.get("model_type") == MODEL_TYPE else {}
