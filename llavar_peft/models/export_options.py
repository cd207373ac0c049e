"""The options of a conversion that do not depend on the model: which belong to which layout, and where it may write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, get_args

from llavar_peft.errors import ConfigError
from llavar_peft.types import Quantization
from llavar_peft.weights.gguf.gguf_tensors import check_outtype
from llavar_peft.weights.io.convert_layout import ProjectorForm
from llavar_peft.weights.io.shard_layout import WeightsFormat

Layout = Literal["llavar", "original", "hf-llava", "adapter", "gguf"]
_BELONGS_TO: Final[dict[str, tuple[Layout, str]]] = {
    "base": ("adapter", "the conversion into an adapter"),
    "tokenizer": ("original", "the layout original"),
    "projector": ("hf-llava", "the layout hf-llava"),
}
"""The layout that an option is for, and its description."""
_FORMATS: Final = ("safetensors", "bin")


def check_options(
    to: Layout,
    *,
    base: str | Path | None,
    tokenizer: str | Path | None,
    projector: ProjectorForm,
    quantize: Quantization | None,
    dtype: str | None,
    form: WeightsFormat | None,
    outtype: str | None,
) -> None:
    """Reject options that are unknown, or that the chosen layout does not have and would ignore.

    Raises:
        ConfigError: Names the option.
    """
    _check_known("to", to, get_args(Layout))
    _check_known("projector", projector, get_args(ProjectorForm))
    _check_known("form", form, (None, *_FORMATS))
    _check_quantization(to, quantize, form)
    check_outtype(outtype, to, dtype)
    given = {"base": base, "tokenizer": tokenizer, "projector": None if projector == "linear" else projector}
    for name, (layout, described) in _BELONGS_TO.items():
        if given[name] is not None and to != layout:
            raise ConfigError.at(name, f"applies only to {described} (got {to!r})", "leave it out")
    for name, value in (("dtype", dtype), ("form", form)):
        if value is not None and to in ("adapter", "gguf"):
            raise ConfigError.at(name, f"does not apply to the layout {to}", "leave it out")


def _check_known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        expected = ", ".join(repr(one) for one in known if one is not None)
        kind = "layout" if name == "to" else "value"
        raise ConfigError.at(name, f"unknown {kind} (got {value!r}, expected one of {expected})", "correct it")


def _check_quantization(to: Layout, quantize: Quantization | None, form: WeightsFormat | None) -> None:
    if quantize is None:
        return
    if quantize != "nf4":
        what = f"only nf4 can be stored (got {quantize!r})"
        raise ConfigError.at("quantize", what, "use nf4, or choose int8 where the model is loaded")
    if to != "llavar" or form == "bin":
        what = f"a model in 4 bits has the layout llavar, in safetensors (got {to!r}{', bin' if form == 'bin' else ''})"
        raise ConfigError.at("quantize", what, "use the layout llavar, or leave quantize out")
