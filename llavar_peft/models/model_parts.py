"""The parts that a model is built from, read from disk, and checks of their values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from llavar_peft.constants import IMAGE_PATCH_TOKEN
from llavar_peft.errors import WeightsError
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.types import ImageMode, Quantization, TemplateName
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import JoinedRows, whole
from llavar_peft.weights.io.tensor_blocks import check_values
from llavar_peft.weights.io.tensor_table import read_tensor_table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Everything that a model is built from.

    Attributes:
        source: The model's name in messages.
        config: The complete model's configuration.
        tensors: All tensors under this package's names, unchecked.
        tokenizer: With the image tokens added.
        image_processor: CLIP's Pillow-based one.
        image_mode: How images are prepared in training.
        inference_image_mode: How images are prepared in inference.
        template: How conversations are written.
        image_token: The token at the positions of images.
        chat_template: The Jinja template; None is that of ``template``.
        detail_settings: The settings of the second encoder's image processor, where that is not the tower.
        quantize: How the language model's linear layers are stored on disk; None for their own format.
    """

    source: str
    config: LlavarConfig
    tensors: dict[str, Tensor | JoinedRows]
    tokenizer: PreTrainedTokenizerFast
    image_processor: CLIPImageProcessorPil
    image_mode: ImageMode
    inference_image_mode: ImageMode
    template: TemplateName = "llava_v1"
    image_token: str = IMAGE_PATCH_TOKEN
    chat_template: str | None = None
    detail_settings: dict[str, Any] | None = None
    quantize: Quantization | None = None

    def whole_tensors(self) -> dict[str, Tensor]:
        """Return all tensors; those that were joined from parts are then in memory."""
        return {name: whole(tensor) for name, tensor in self.tensors.items()}

    def processor(self) -> LlavarProcessor:
        """Return the model's processor."""
        return LlavarProcessor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            image_mode=self.image_mode,
            inference_image_mode=self.inference_image_mode,
            patch_size=self.config.vision_config.patch_size,
            use_im_start_end=self.config.use_im_start_end,
            sep_image_conv_front=self.config.sep_image_conv_front,
            template=self.template,
            image_token=self.image_token,
            chat_template=self.chat_template,
            resolution=self.config.resolution,
            detail_settings=self.detail_settings,
        )


def check_vocabulary(parts: ModelParts) -> None:
    """Reject a tokenizer with ids beyond the rows of the embeddings, which fail in the middle of a batch.

    Raises:
        WeightsError: States the highest id and the number of rows; or the image token's id is not the configuration's.
    """
    embeddings = parts.tensors[tensor_names.find_embeddings(parts.tensors)]
    highest, rows = max(parts.tokenizer.get_vocab().values()), embeddings.shape[0]
    if highest >= rows:
        raise WeightsError.at(
            parts.source,
            f"the tokenizer and the embeddings do not belong together (got the id {highest}, expected less than the "
            f"number of rows, {rows})",
            "put the tokenizer's files that the checkpoint was saved with into its folder",
        )
    expected = parts.tokenizer.convert_tokens_to_ids(parts.image_token)
    if parts.config.image_token_index != expected:
        raise WeightsError.at(
            f"{parts.source}/config.json:image_token_index",
            f"not the id of the tokenizer's {parts.image_token} (got {ascii(parts.config.image_token_index)[:80]}, "
            f"expected {expected})",
            "put the tokenizer's files that the checkpoint was saved with into its folder",
        )


def check_stored_values(source: str | Path, tower: str | Path | None) -> None:
    """Reject damaged weights before they are used: with one NaN every answer, and every step of a training, is lost.

    Args:
        source: The folder of a checkpoint or a language model.
        tower: The folder of a separate vision tower.

    Raises:
        WeightsError: Names the tensors that have a wrong checksum, or elements that are NaN or infinite.
    """
    check_values(read_tensor_table(source))
    if tower is not None:
        table = read_tensor_table(tower)
        check_values({name: entry for name, entry in table.items() if tensor_names.from_clip(name) is not None})
