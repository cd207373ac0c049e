"""``load_adapter``: an adapter laid over a model that was built, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import ConfigError
from llavar_peft.weights.adapter import ADAPTER_CONFIG, load_adapter_weights
from llavar_peft.weights.fingerprint import take_fingerprint
from llavar_peft.weights.pairing import check_adapter_base
from llavar_peft.weights.released import view_as_released

if TYPE_CHECKING:
    from peft import PeftModel

    from llavar_peft.models.modeling import LlavarForConditionalGeneration


def load_adapter(
    model: LlavarForConditionalGeneration, folder: str | Path, *, trainable: bool = False, force: bool = False
) -> PeftModel:
    """Lays an adapter over its base.

    Args:
        model: From ``build_model``; it is changed in place.
        folder: The adapter's.
        trainable: Whether it can be trained on.
        force: Go on with a base of the right shape that the adapter was not trained on.

    Returns:
        ``peft``'s model, in ``eval`` mode.

    Raises:
        ConfigError: No adapter there.
        WeightsError: Another base: other numbers, more or fewer layers; or a tensor that does not land.
    """
    from peft import PeftConfig, get_peft_model

    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        what = f"no {ADAPTER_CONFIG} in it" if path.is_dir() else "no such folder"
        raise ConfigError.at(str(path), what, "give an adapter's folder")
    source = Path(model.name_or_path)
    if not force and (source / "config.json").is_file():
        check_adapter_base(path, lambda: _fingerprint(source), str(source))
    settings = PeftConfig.from_pretrained(str(path))
    settings.inference_mode = not trainable
    laid: Any = get_peft_model(model, settings)
    load_adapter_weights(laid, path)
    opened: PeftModel = laid.eval()
    return opened


def _fingerprint(folder: Path) -> dict[str, Any]:
    view = view_as_released(folder)
    return take_fingerprint(view.table, view.config)
