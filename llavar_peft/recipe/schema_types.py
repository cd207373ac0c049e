"""The types of the recipe's fields, which declare their constraints, and the base of its dataclasses."""

from __future__ import annotations

import os
import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from llavar_peft.types import ReadableRepr

_NUMBER = re.compile(r"\s*[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


def _number_from_text(value: object) -> object:
    """Convert ``2e-5``, which YAML 1.1 reads as text because it has no decimal point, to a number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _kind(value: object) -> str:
    """Select the alternative of a union that a value is validated against, so that only its errors are reported."""
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list | tuple) else "switch"


FROM_TEXT = BeforeValidator(_number_from_text)
BY_KIND = Discriminator(_kind)

Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00\x1c-\x1f][^\x00]*$")]
"""A string that is not blank and has no NUL character."""
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, or the name of a model on the hub; ``~`` is the user's home."""
PathOrList = Annotated[Annotated[PathText, Tag("text")] | Annotated[tuple[PathText, ...], Tag("list")], BY_KIND]
PathOrFilledList = Annotated[
    Annotated[PathText, Tag("text")] | Annotated[tuple[PathText, ...], Field(min_length=1), Tag("list")], BY_KIND
]
PositiveInteger = Annotated[int, Field(ge=1)]
IntegerFromZero = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), FROM_TEXT]
NumberFromZero = Annotated[float, Field(ge=0, allow_inf_nan=False), FROM_TEXT]
Share = Annotated[float, Field(ge=0, le=1), FROM_TEXT]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), FROM_TEXT]
Recompute = Annotated[Annotated[bool, Tag("switch")] | Annotated[Literal["auto"], Tag("text")], BY_KIND]


class StrictFields(ReadableRepr):
    """Reject unknown fields, and values that would have to be converted to the field's type."""

    _most_entries: ClassVar[int] = 100
    _most_characters: ClassVar[int] = 1000
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True}
