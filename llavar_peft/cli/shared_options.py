"""Options that the commands which ask a model share, and what they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.errors import ConfigError
from llavar_peft.recipe.schema import Quantization
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.inference.token_sampling import Sampling

ModelOption = Annotated[Path, typer.Option("--model", help="A checkpoint's folder, or an adapter's.")]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="An adapter's folder, laid over the model.")]
VisionTowerOption = Annotated[
    str | None, typer.Option("--vision-tower", help="CLIP's folder, for a model in the released layout.")
]
QuantizeOption = Annotated[Quantization | None, typer.Option("--quantize", help="Store the base in 4 or 8 bits.")]
ImageModeOption = Annotated[
    ImageMode | None, typer.Option("--image-mode", help="How pictures are prepared; default: the model's own.")
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most per answer.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="Default: 0.2, that of the original's run_llava.")
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token, instead of drawing.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.")]


def make_sampling(max_new_tokens: int, temperature: float | None, greedy: bool, seed: int | None) -> Sampling:
    """What the options say.

    Args:
        max_new_tokens: Of ``--max-new-tokens``.
        temperature: Of ``--temperature``, None where it is not given.
        greedy: Of ``--greedy``.
        seed: Of ``--seed``.

    Returns:
        The sampling.

    Raises:
        ConfigError: ``--greedy`` and a temperature.
    """
    from llavar_peft.inference.token_sampling import Sampling

    if greedy and temperature:
        raise ConfigError.at(
            "--greedy", f"goes without drawing, and --temperature is {temperature:g}", "give one of them"
        )
    if greedy:
        return Sampling(max_new_tokens=max_new_tokens, temperature=0.0, seed=seed)
    if temperature is None:
        return Sampling(max_new_tokens=max_new_tokens, seed=seed)
    return Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def open_image(source: str) -> Image:
    """Open an image by a file's path or by its URL.

    Args:
        source: What the user wrote.

    Returns:
        The image.

    Raises:
        ImageError: It is missing or broken, or cannot be fetched.
    """
    from llavar_peft.data.image_files import decode_image, open_image

    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return open_image(source)
    from llavar_peft.inference.fetch_image import fetch

    return decode_image(fetch(source), source)


def name_adapters(given: list[str]) -> dict[str, Path]:
    """Read adapters given as ``FOLDER`` or ``NAME=FOLDER``.

    Args:
        given: What the user wrote.

    Returns:
        Folders by name, in order; without a name, the folder's.

    Raises:
        ConfigError: A name stands for two.
    """
    named: dict[str, Path] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        path = Path(folder if separator else text)
        name = name if separator else path.resolve().name
        if name in named or not name:
            raise ConfigError.at("--adapter", f"{name!r} stands for {named.get(name)} and {path}", "write NAME=FOLDER")
        named[name] = path
    return named
