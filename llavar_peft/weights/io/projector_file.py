"""The projector file, result of stage 1 in the original layout: ``mm_projector.bin`` and the same as safetensors.

Source: LLaVAR, llava/train/train.py, ``LLaVATrainer._save``, and llava/model/llava.py, ``initialize_vision_tokenizer``.
The original's loader uses the last part of a tensor's name as key, so that two collide on ``weight``; here the full
names count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.constants import PROJECTOR_BIN, PROJECTOR_SAFETENSORS
from llavar_peft.errors import WeightsError
from llavar_peft.types import expand_home
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import JoinedRows, first_rows
from llavar_peft.weights.io.tensor_blocks import WeightsStore, check_tensors, check_values
from llavar_peft.weights.io.tensor_table import read_tensor_table

if TYPE_CHECKING:
    from torch import Tensor

TRAINED_ROWS = 2
"""``<im_start>`` and ``<im_end>``, the last two rows of the embeddings."""


def apply_projector(tensors: dict[str, Tensor | JoinedRows], source: str | Path) -> None:
    """Replace the projector and the last two embedding rows of a model, in place.

    Args:
        tensors: All tensors of the model by our names.
        source: ``mm_projector.bin`` or ``.safetensors`` with the keys ``model.mm_projector.weight`` ``[D, C]`` and
            ``model.mm_projector.bias`` ``[D]`` (for two layers, ``model.mm_projector.0.weight`` and so on) and,
            optionally, ``model.embed_tokens.weight``: the whole ``[V, D]`` or its last two rows ``[2, D]``; and the
            tensors of the cross-attention, if it was trained.

    Raises:
        WeightsError: A tensor is missing, unexpected or misshapen.
    """
    stored = read_projector(source)
    if any(".layers." in name for name in stored if not name.startswith(tensor_names.CROSS_ATTENTION)):
        what = "the weights of a complete model, expected those of a projector"
        raise WeightsError.at(
            str(source), what, "set model.checkpoint to the model's folder instead of model.projector"
        )
    embeddings = stored.pop(tensor_names.EMBEDDINGS, None)
    has_cross_attention = any(name.startswith(tensor_names.CROSS_ATTENTION) for name in stored)
    parts = tensor_names.TRAINED_WITH_PROJECTOR if has_cross_attention else tensor_names.PROJECTOR
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(parts)}
    _check_newline(expected, stored, str(source))
    check_tensors(stored, expected, where=str(source))
    tensors.update(stored)
    if embeddings is not None:
        name = tensor_names.find_embeddings(tensors)
        tensors[name] = _replace_rows(tensors[name], embeddings, Path(source))


def _check_newline(expected: Mapping[str, object], stored: Mapping[str, object], source: str) -> None:
    """Reject a projector that was trained without tiles for a model that reads them, and the other way round."""
    name = tensor_names.NEWLINE
    if name in expected and name not in stored:
        what = f"no {tensor_names.RELEASED_NEWLINE} in this file: it was trained without tiles, which the model reads"
        fix = "train it with the same model.resolution; or build and save a model with it and without resolution, and "
        raise WeightsError.at(source, what, f"{fix}set model.checkpoint to that and model.resolution to tiles")
    if name in stored and name not in expected:
        what = f"has {tensor_names.RELEASED_NEWLINE}: it was trained with tiles, which the model does not read"
        raise WeightsError.at(source, what, "set model.resolution to that of the run that trained it")


def read_projector(source: str | Path) -> dict[str, Tensor]:
    """Read a projector file.

    Args:
        source: ``mm_projector.bin`` or ``.safetensors``, or the folder that holds it.

    Returns:
        Its tensors by our names, unchecked.

    Raises:
        WeightsError: No such file, or not readable, or a tensor is damaged or not finite.
    """
    path, fix = expand_home(source), "give the mm_projector.bin that stage 1 wrote"
    if path.is_dir():
        found = [path / name for name in (PROJECTOR_SAFETENSORS, PROJECTOR_BIN) if (path / name).is_file()]
        if not found:
            raise WeightsError.at(str(path), f"no {PROJECTOR_BIN} in this folder", fix)
        path = found[0]
    elif not path.is_file():
        raise WeightsError.at(str(path), "no such file", fix)
    table = read_tensor_table(path)
    check_values(table)
    return {tensor_names.from_released(name) or name: tensor for name, tensor in WeightsStore(table).items()}


def _replace_rows(embeddings: Tensor | JoinedRows, rows: Tensor, path: Path) -> JoinedRows:
    rows_fit = rows.ndim == len(embeddings.shape) and rows.shape[1] == embeddings.shape[1]
    if not rows_fit or rows.shape[0] not in (embeddings.shape[0], TRAINED_ROWS):
        expected = f"{list(embeddings.shape)} or [{TRAINED_ROWS}, {embeddings.shape[1]}]"
        raise WeightsError.at(
            f"{path}:{tensor_names.RELEASED_EMBEDDINGS}",
            f"wrong shape (got {list(rows.shape)}, expected {expected})",
            "give a projector that was trained for this language model",
        )
    # Only the last two: stage 1 trains no others, and the original's loader reads no others.
    return JoinedRows(*first_rows(embeddings, embeddings.shape[0] - TRAINED_ROWS), rows[-TRAINED_ROWS:])


def save_projector(directory: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each under a temporary name that is then changed.

    Args:
        directory: An existing folder.
        tensors: By our names: the projector's, the whole input embeddings ``[V, D]``, as the original writes them, and
            those of the cross-attention.
    """
    import torch
    from safetensors.torch import save_file

    released = {
        new: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if (new := tensor_names.to_released(name)) is not None
    }
    folder = Path(directory)
    temporary = folder / (PROJECTOR_SAFETENSORS + ".part")
    save_file(released, str(temporary), metadata={"format": "pt"})
    _commit(temporary, folder / PROJECTOR_SAFETENSORS)
    temporary = folder / (PROJECTOR_BIN + ".part")
    torch.save(released, temporary)
    _commit(temporary, folder / PROJECTOR_BIN)


def _commit(temporary: Path, final: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
