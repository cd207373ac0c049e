"""Photograph a page: rotation, perspective, shadow, blur, noise and compression, with the boxes moved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from random import Random
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from llavar_peft.datagen.synth.scene import Colour, Quad

if TYPE_CHECKING:
    import numpy.typing as npt

_CameraLevel: TypeAlias = Literal["light", "heavy"]
_Span: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Strength:
    """Ranges of a level's properties.

    Attributes:
        turn: Maximum rotation in degrees, in either direction.
        tilt: Maximum displacement of a corner as a fraction of the width.
        shadow: Brightness lost in the deepest shadow, 0 to 1.
        blur: Radius in thousandths of the width.
        noise: Standard deviation in levels of 255.
        quality: JPEG quality.
    """

    turn: float
    tilt: float
    shadow: _Span
    blur: _Span
    noise: _Span
    quality: tuple[int, int]


_LEVELS: Final[dict[_CameraLevel, _Strength]] = {
    "light": _Strength(2.0, 0.008, (0.0, 0.2), (0.0, 0.6), (0.0, 4.0), (75, 95)),
    "heavy": _Strength(7.0, 0.03, (0.2, 0.45), (0.3, 1.0), (4.0, 12.0), (40, 75)),
}


@dataclass(frozen=True, slots=True)
class Camera:
    """Properties of one photograph.

    Attributes:
        corners: The page's corners in the photograph, clockwise from the top left, in pixels.
        height: Height of the photograph in pixels; its width is the page's.
        desk: Colour around the page.
        shadow: Brightness lost in the deepest shadow.
        light: Direction of the shadow in degrees.
        blur: Radius in pixels.
        noise: Standard deviation in levels of 255.
        grain: Seed of the noise.
        quality: JPEG quality.
    """

    corners: Quad
    height: int
    desk: Colour
    shadow: float
    light: float
    blur: float
    noise: float
    grain: int
    quality: int


def draw_camera(level: _CameraLevel, rng: Random, width: int, height: int) -> Camera:
    """Draw the properties of a photograph that shows the whole page and has its width.

    Args:
        level: Strength of the distortions.
        rng: Source of the random choices.
        width: Width of the page in pixels.
        height: Height of the page in pixels.
    """
    strength = _LEVELS[level]
    angle = radians(rng.uniform(-strength.turn, strength.turn))
    corners = []
    for corner_x, corner_y in _corners(width, height):
        x = corner_x + width * rng.uniform(-1, 1) * strength.tilt
        y = corner_y + width * rng.uniform(-1, 1) * strength.tilt
        corners.append((x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle)))
    margin = width * rng.uniform(0.0, 0.04)
    left, top = min(x for x, _ in corners) - margin, min(y for _, y in corners) - margin
    scale = width / (max(x for x, _ in corners) + margin - left)
    first, second, third, fourth = (((x - left) * scale, (y - top) * scale) for x, y in corners)
    return Camera(
        corners=(first, second, third, fourth),
        height=round((max(y for _, y in corners) + margin - top) * scale),
        desk=(rng.randint(20, 160), rng.randint(20, 140), rng.randint(20, 120)),
        shadow=rng.uniform(*strength.shadow),
        light=rng.uniform(0, 360),
        blur=rng.uniform(*strength.blur) * width / 1000,
        noise=rng.uniform(*strength.noise),
        grain=rng.getrandbits(32),
        quality=rng.randint(*strength.quality),
    )


def photograph(page: Image.Image, camera: Camera) -> Image.Image:
    """Return the photograph of an RGB page before compression, with properties drawn for a page of its size."""
    back = homography(camera.corners, _corners(page.width, page.height))
    size = page.width, camera.height
    image = page.transform(
        size, Image.Transform.PERSPECTIVE, back.ravel()[:8].tolist(), Image.Resampling.BICUBIC, fillcolor=camera.desk
    )
    image = image.filter(ImageFilter.GaussianBlur(camera.blur))
    values_HWC = np.asarray(image, dtype=np.float32) * _shadow(camera, *size)[:, :, None]
    grain_HWC = np.random.default_rng(camera.grain).standard_normal(values_HWC.shape, dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(values_HWC + camera.noise * grain_HWC), 0, 255).astype(np.uint8))


def move_quads(quads: Sequence[Quad], page_size: tuple[int, int], camera: Camera) -> list[Quad]:
    """Return the positions of a page's quadrilaterals in its photograph; a projection keeps edges straight."""
    forth = homography(_corners(*page_size), camera.corners)
    return [_moved(quad, forth) for quad in quads]


def homography(source: Quad, target: Quad) -> npt.NDArray[np.float64]:
    """Return the projection of four corners to four others, float64 ``[3, 3]`` with 1 as the last element."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved = np.linalg.solve(np.array(rows, float), np.array(values, float))
    return np.append(solved, 1.0).reshape(3, 3)


def _moved(quad: Quad, forth: npt.NDArray[np.float64]) -> Quad:
    points_N3 = np.array([(x, y, 1.0) for x, y in quad]) @ forth.T
    first, second, third, fourth = ((float(x / w), float(y / w)) for x, y, w in points_N3)
    return first, second, third, fourth


def _corners(width: int, height: int) -> Quad:
    return (0, 0), (width, 0), (width, height), (0, height)


def _shadow(camera: Camera, width: int, height: int) -> npt.NDArray[np.float32]:
    """Return the remaining brightness, float32 ``[H, W]``, decreasing smoothly from one side to the other."""
    x_W, y_H = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    along_HW = x_W[None, :] * cos(radians(camera.light)) + y_H[:, None] * sin(radians(camera.light))
    depth_HW = np.clip((along_HW + 1.5) / 3, 0, 1)
    return np.asarray(1 - camera.shadow * depth_HW * depth_HW * (3 - 2 * depth_HW), dtype=np.float32)
