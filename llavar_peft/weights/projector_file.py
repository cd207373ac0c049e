"""Stage 1's result in the original's layout: ``mm_projector.bin`` and its safetensors twin.

Source: LLaVAR, llava/train/train.py, ``LLaVATrainer._save``, and llava/model/llava.py, ``initialize_vision_tokenizer``.
The original's loader keys tensors by the last part of their names, so that two collide on ``weight``; here the full
names count.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.constants import PROJECTOR_BIN, PROJECTOR_SAFETENSORS
from llavar_peft.errors import WeightsError
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.check_tensors import check_tensors
from llavar_peft.weights.io.open_weights import open_weights

if TYPE_CHECKING:
    from torch import Tensor

TRAINED_ROWS = 2
"""``<im_start>`` and ``<im_end>``, the last two rows of the embeddings."""


def apply_projector(tensors: dict[str, Tensor], source: str | Path) -> None:
    """Apply a stage-1 file over a model's tensors, in place.

    Args:
        tensors: The whole model's tensors by our names; the projector and the last two embedding rows are replaced.
        source: ``mm_projector.bin`` or ``.safetensors`` with the keys ``model.mm_projector.weight`` ``[D, C]``,
            ``model.mm_projector.bias`` ``[D]`` and, optionally, ``model.embed_tokens.weight``, whole ``[V, D]`` or its
            last two rows ``[2, D]``.

    Raises:
        WeightsError: A tensor is missing, unknown or misshapen.
    """
    stored = read_projector(source)
    embeddings = stored.pop(tensor_names.EMBEDDINGS, None)
    expected = {
        name: tuple(tensors[name].shape) for name in (tensor_names.PROJECTOR_WEIGHT, tensor_names.PROJECTOR_BIAS)
    }
    check_tensors(stored, expected, where=str(source))
    tensors.update(stored)
    if embeddings is not None:
        tensors[tensor_names.EMBEDDINGS] = _with_rows(tensors[tensor_names.EMBEDDINGS], embeddings, Path(source))


def read_projector(source: str | Path) -> dict[str, Tensor]:
    """Read a stage-1 file.

    Args:
        source: ``mm_projector.bin`` or ``.safetensors``, or the folder that stage 1 wrote it to.

    Returns:
        Its tensors by our names, unchecked.

    Raises:
        WeightsError: No such file, or not readable.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (PROJECTOR_SAFETENSORS, PROJECTOR_BIN) if (path / name).is_file()]
        if not found:
            raise WeightsError.at(str(path), f"holds no {PROJECTOR_BIN}", "give the file that stage 1 wrote")
        path = found[0]
    elif not path.is_file():
        raise WeightsError.at(str(path), "no such file", "give the mm_projector.bin that stage 1 wrote")
    return {tensor_names.from_released(name) or name: tensor for name, tensor in open_weights(path).items()}


def _with_rows(whole: Tensor, rows: Tensor, path: Path) -> Tensor:
    rows_fit = rows.ndim == whole.ndim and rows.shape[1] == whole.shape[1]
    if not rows_fit or rows.shape[0] not in (whole.shape[0], TRAINED_ROWS):
        raise WeightsError.at(
            f"{path}:{tensor_names.RELEASED_EMBEDDINGS}",
            f"misshapen (got {list(rows.shape)}, expected {list(whole.shape)} or [{TRAINED_ROWS}, {whole.shape[1]}])",
            "give a projector that was trained for this language model",
        )
    # Only the last two: stage 1 trains no others, and the original's loader takes no others.
    import torch

    return torch.cat([whole[:-TRAINED_ROWS].float(), rows[-TRAINED_ROWS:].float()])


def save_projector(directory: str | Path, weight: Tensor, bias: Tensor, embeddings: Tensor) -> None:
    """Write both files, each aside and then renamed.

    Args:
        directory: An existing folder.
        weight: The projector's, ``[D, C]``.
        bias: The projector's, ``[D]``.
        embeddings: The whole input embeddings ``[V, D]``, as the original writes them.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {
        tensor_names.RELEASED_EMBEDDINGS: embeddings.detach().cpu().contiguous(),
        tensor_names.RELEASED_PROJECTOR_WEIGHT: weight.detach().cpu().contiguous(),
        tensor_names.RELEASED_PROJECTOR_BIAS: bias.detach().cpu().contiguous(),
    }
    folder = Path(directory)
    aside = folder / (PROJECTOR_SAFETENSORS + ".part")
    save_file(tensors, str(aside), metadata={"format": "pt"})
    _settle(aside, folder / PROJECTOR_SAFETENSORS)
    aside = folder / (PROJECTOR_BIN + ".part")
    torch.save(tensors, aside)
    _settle(aside, folder / PROJECTOR_BIN)


def _settle(aside: Path, final: Path) -> None:
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(final)
