"""The order in which blocks of text are read.

Of two blocks one above the other the upper comes first. Of two side by side the left one comes first, and so it does
where their columns stand side by side, unless a block between them (a heading across both) parts them. All others are
read from top to bottom.

Source: after T. Breuel, "High performance document layout analysis", 2003, whose second rule is restricted here to
columns, since signs and posters have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.datagen.ocr.upright_boxes import Box

if TYPE_CHECKING:
    import numpy.typing as npt

_TOUCHING: Final = 0.1
"""Share of the smaller extent that two blocks may have in common and still stand apart: boxes are never exact."""


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Orders blocks.

    Args:
        boxes: Upright.

    Returns:
        The blocks' numbers in reading order.
    """
    before = _before(np.array([(box.left, box.top, box.right, box.bottom) for box in boxes], float).reshape(-1, 4))
    waiting = set(range(len(boxes)))
    order: list[int] = []
    while waiting:
        # Rules that contradict each other wait for as few as possible; the upper and left one breaks a tie.
        rest = sorted(waiting)
        open_rules = before[np.ix_(rest, rest)].sum(axis=0)
        chosen = min(
            zip(open_rules, rest, strict=True), key=lambda pair: (pair[0], boxes[pair[1]].top, boxes[pair[1]].left)
        )[1]
        waiting.remove(chosen)
        order.append(chosen)
    return order


def _before(boxes_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether the first block must be read before the second, bool ``[N, N]``."""
    left, top, right, bottom = boxes_N4.T
    stacked = _overlap(left, right)
    beside = _overlap(top, bottom)
    above = (top + bottom)[:, None] < (top + bottom)[None, :]
    leftward = ~stacked & ((left + right)[:, None] < (left + right)[None, :])
    under = stacked & above
    through = _joined(under, under)
    parted = through | through.T
    columns = _joined(stacked, beside) | _joined(beside, stacked)
    sideways = leftward & ~parted & (beside | above | columns)
    downwards = ~stacked & ~beside & above & ~sideways.T
    return np.asarray(under | sideways | downwards)


def _overlap(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether two extents have more in common than touching boxes do, bool ``[N, N]``."""
    shared = np.minimum(high[:, None], high[None, :]) - np.maximum(low[:, None], low[None, :])
    extent = high - low
    return np.asarray(shared > _TOUCHING * np.minimum(extent[:, None], extent[None, :]))


def _joined(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether some third block is related to both: the Boolean product, bool ``[N, N]``."""
    return np.asarray(first.astype(np.float32) @ second.astype(np.float32) > 0)
