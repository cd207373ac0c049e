"""The fonts that ship with the package: six DejaVu faces, reduced to printable ASCII.

Drawing must not depend on what a machine has installed, so the faces lie in `assets/fonts/` (licence beside them), and
Pillow's basic layout engine is asked for by name, because the other one (raqm) is not in every build of Pillow.
"""

from functools import lru_cache
from importlib import resources

from PIL import ImageFont

FONT_NAMES: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
"""Names that `load_font` accepts."""

CAP_HEIGHT = 0.73
"""Height of a capital letter, as a share of the font size (DejaVu; most Latin faces lie between 0.66 and 0.74)."""

_UNIT = 100


@lru_cache(maxsize=512)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Open one of the packaged faces.

    Args:
        name: One of `FONT_NAMES`.
        size: Font size (em) in pixels.

    Returns:
        The face at that size; cached.

    Raises:
        ValueError: If `name` is not a packaged face.
    """
    if name not in FONT_NAMES:
        raise ValueError(f"no packaged font is called {name!r}; there are: {', '.join(FONT_NAMES)}")
    path = resources.files("llavar_peft") / "assets" / "fonts" / f"{name}.ttf"
    with resources.as_file(path) as file:
        return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1 << 14)
def text_width(text: str, name: str) -> float:
    """Measure a text.

    Args:
        text: A line of printable ASCII.
        name: One of `FONT_NAMES`.

    Returns:
        Its advance width as a multiple of the font size.
    """
    return load_font(name, _UNIT).getlength(text) / _UNIT
