"""Options that several commands share, and their conversion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, overload

import typer

from llavar_peft.constants import MOST_PAGES
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.shipped_recipes import list_presets, list_recipes
from llavar_peft.types import ImageMode, Quantization, expand_home

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.data.json_schema import AnswerSchema
    from llavar_peft.inference.token_sampling import Sampling
    from llavar_peft.recipe.schema import Recipe


def _complete(list_names: Callable[[], dict[str, str]]) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function for the shell's completion: the names that begin as the given text, with their descriptions."""
    return lambda incomplete: [pair for pair in list_names().items() if pair[0].startswith(incomplete)]


complete_recipe = _complete(list_recipes)
complete_preset = _complete(list_presets)
complete_recipe_or_preset = _complete(lambda: {**list_recipes(), **list_presets()})

# A model and its answers.
ModelOption: TypeAlias = Annotated[Path, typer.Option("--model", help="The folder of a checkpoint, adapter or run.")]
AdapterOption: TypeAlias = Annotated[
    Path | None, typer.Option("--adapter", help="The folder of an adapter to apply to the model.")
]
VisionTowerOption: TypeAlias = Annotated[
    str | None, typer.Option("--vision-tower", help="The CLIP folder or Hub name, for a model in the released layout.")
]
QuantizeOption: TypeAlias = Annotated[
    Quantization | None, typer.Option("--quantize", help="Store the base weights in 4 bits (nf4) or 8 bits (int8).")
]
ImageModeOption: TypeAlias = Annotated[
    ImageMode | None,
    typer.Option(
        "--image-mode", help="How images are brought to the model's size. Default: the mode saved with the model."
    ),
]
MaxNewTokensOption: TypeAlias = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Largest number of tokens in an answer.")
]
TemperatureOption: TypeAlias = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: 0.2, as in LLaVA.")
]
GreedyOption: TypeAlias = Annotated[
    bool, typer.Option("--greedy", help="Always take the most probable token (temperature 0).")
]
SeedOption: TypeAlias = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of the sampling. Default: a random one.")
]

PagesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--pages",
        help="Pages of a PDF document, e.g. 1-3,7 or 2-. Default: all. One page is also FILE#page=3.",
        metavar="PAGES",
    ),
]
MaxPagesOption: TypeAlias = Annotated[
    int, typer.Option("--max-pages", min=1, help="Largest number of pages of a PDF document.")
]

SchemaOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--schema", help="A JSON Schema that answers have to follow; they are JSON then.", metavar="FILE"),
]

# Data, recipes and output.
ImagesOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--images", help="A folder of images. Repeat the option to search several folders in order."),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WorkersOption: TypeAlias = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of processes. Default: one per usable core.")
]
RecipeArgument: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        help="A YAML file or the name of a shipped recipe. Optional with --preset.",
        metavar="RECIPE",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change, e.g. stages.0.optim.learning_rate=1e-3.", metavar="[PATH=VALUE]..."),
]
PresetOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="A preset for the last stage, e.g. qlora. See 'llavar-peft recipe list'.",
        autocompletion=complete_preset,
    ),
]

# Weights on disk.
OutFolderOption: TypeAlias = Annotated[Path, typer.Option("--out", help="The folder to create. It must not exist.")]
ShardGigabytes: TypeAlias = Annotated[
    float, typer.Option("--shard-gb", min=0.001, help="Largest size of a weight file, in GB (10^9 bytes).")
]
TrainedTowerOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--vision-tower", help="The CLIP folder, for a plain LLaMA. Default: the one used in training."),
]
TrainedProjectorOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--projector", help="The projector file that the training started from, if it has moved."),
]
DtypeOption: TypeAlias = Annotated[
    Literal["float16", "bfloat16", "float32"] | None,
    typer.Option("--dtype", help="Data type of the result. Default: as in the source."),
]
OntoOption: TypeAlias = Annotated[
    Literal["original", "dequantized"] | None,
    typer.Option(
        "--onto",
        help="The base weights that an adapter trained in 4 or 8 bits is added to: the original ones, or the "
        "dequantized ones it was trained on. Default: dequantized.",
    ),
]


def make_sampling(max_new_tokens: int, temperature: float | None, greedy: bool, seed: int | None) -> Sampling:
    """Return the sampling settings that the options select; None is the default.

    Raises:
        ConfigError: Both ``--greedy`` and a temperature are given.
    """
    from llavar_peft.inference.token_sampling import Sampling

    default = Sampling().temperature
    return Sampling(
        max_new_tokens=max_new_tokens, temperature=choose_temperature(temperature, default, greedy=greedy), seed=seed
    )


@overload
def choose_temperature(given: float | None, default: float, *, greedy: bool) -> float: ...
@overload
def choose_temperature(given: float | None, default: None, *, greedy: bool) -> float | None: ...
def choose_temperature(given: float | None, default: float | None, *, greedy: bool) -> float | None:
    """Return the temperature that ``--temperature`` and ``--greedy`` select, or the default.

    Raises:
        ConfigError: Both are given.
    """
    if greedy and given:
        raise ConfigError.at(
            "--greedy", f"it means temperature 0 (got --temperature {given:g} too)", "leave out one of them"
        )
    return 0.0 if greedy else default if given is None else given


def read_schema(path: Path | None) -> AnswerSchema | None:
    """Return the schema of ``--schema``.

    Raises:
        ConfigError: The file holds no schema.
        DataError: The file is missing, or is not JSON.
    """
    from llavar_peft.data.json_schema import AnswerSchema

    return None if path is None else AnswerSchema.read(path)


def open_image_or_url(source: str, pages: str | None = None, most: int = MOST_PAGES) -> dict[str, Image]:
    """Open an image, or pages of a PDF document, by its path or its http(s) URL.

    Args:
        source: The path or URL, which may end in ``#page=1-3``.
        pages: The value of ``--pages``.
        most: The value of ``--max-pages``.

    Returns:
        The images by name.

    Raises:
        ConfigError: Pages are chosen of what is no PDF document, or a second time.
        ImageError: The image is missing or broken, cannot be downloaded, or has no such pages.
        MissingDependencyError: It is a PDF document, and pypdfium2 is not installed.
    """
    from llavar_peft.data.image_files import open_images

    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        images = open_images(source, pages=pages, most=most)
    else:
        from llavar_peft.inference.fetch_image import fetch

        images = open_images(fetch(source), source, pages=pages, most=most)
    if pages is not None and source in images:
        what = f"got {pages!r} for {source}, expected a PDF document without #page= in its name"
        raise ConfigError.at("--pages", what, "leave out --pages")
    return images


def parse_adapters(given: Sequence[str], option: str = "--adapter") -> dict[str, Path]:
    """Parse adapters or models written as ``FOLDER`` or ``NAME=FOLDER``; the default name is the folder's.

    Raises:
        ConfigError: Two have the same name.
    """
    named: dict[str, Path] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        path = expand_home(folder if separator else text)
        name = name if separator else path.resolve().name
        if name in named or not name:
            raise ConfigError.at(
                option, f"{name!r} is the name of both {named.get(name)} and {path}", "write NAME=FOLDER"
            )
        named[name] = path
    return named


def load_chosen_recipe(
    context: typer.Context, recipe: str | None, overrides: Sequence[str] | None, preset: str | None
) -> Recipe:
    """Load the recipe that a command's arguments select. This does not import torch, so mistakes are reported at once.

    Raises:
        BadParameter: There is neither a recipe nor a preset.
    """
    if preset is not None and recipe is not None and "=" in recipe:
        # Without a recipe, the first override takes its place among the arguments.
        overrides, recipe = [recipe, *(overrides or ())], None
    if recipe is None and preset is None:
        raise typer.BadParameter("give a RECIPE, a --preset, or both", ctx=context)
    from llavar_peft.recipe.presets import load_recipe

    return load_recipe(recipe, overrides or [], preset=preset)
