"""The processor: turns images and text into the model's input, for training and for inference.

Shape suffixes: B batch, T tokens, N images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from torch import Tensor
from transformers import BatchFeature, CLIPImageProcessorPil, ProcessorMixin

from llavar_peft.constants import ADDED_TOKENS, IMAGE_PATCH_TOKEN, IMAGE_PLACEHOLDER
from llavar_peft.data.chat_template import ChatTemplate, with_image_parts
from llavar_peft.data.conversation_template import (
    CHAT_TEMPLATE,
    LLAVA_V1,
    VICUNA_CHAT_TEMPLATE,
    VICUNA_V1,
    Content,
    RoleTemplate,
    image_block,
)
from llavar_peft.data.encode_record import encode_pieces
from llavar_peft.data.image_preparation import image_settings
from llavar_peft.data.prepared_images import PreparedImage, image_inputs, prepare_record_images
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.models.detail_encoder import image_processor_of
from llavar_peft.models.prompt_expansion import check_options, expand_prompts, flat_images
from llavar_peft.models.tower_loading import as_clip_processor, prepared_side
from llavar_peft.recipe.resolution import CONCAT_CLIP, CrossAttention, Tiles, resolution_from
from llavar_peft.types import ImageMode, Role, TemplateName

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES: Final = get_args(ImageMode)


class LlavarProcessor(ProcessorMixin):
    """Tokenizer and image processor, and how they are combined.

    It is saved as ``processor_config.json`` next to the tokenizer; ``AutoProcessor.from_pretrained`` loads it.

    Args:
        image_processor: CLIP's. One of another backend is replaced by the Pillow-based one, whose pixels equal the
            original's.
        tokenizer: From ``load_tokenizer``, with the image tokens added.
        patch_size: Side of the tower's patches, in pixels.
        image_mode: How images are prepared in training.
        inference_image_mode: How images are prepared in ``__call__``: ``"pad_black"`` is ``run_llava``'s.
        use_im_start_end: Whether images are enclosed in ``<im_start>`` and ``<im_end>``.
        sep_image_conv_front: Whether, in training, images precede the first words of the conversation.
        template: How conversations are written.
        image_token: The token at the positions of images.
        chat_template: Jinja; None is that of ``template``.
        resolution: The settings of ``Tiles`` or ``CrossAttention`` as a mapping; None is the whole image only.
        detail_settings: The settings of the second encoder's image processor, where that is not the tower.

    Raises:
        ConfigError: A mode is unknown, or the tokenizer has no image tokens.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the settings of a processor, as transformers passes them
        self,
        image_processor: Any,
        tokenizer: Any,
        patch_size: int = 14,
        image_mode: ImageMode = "pad",
        inference_image_mode: ImageMode = "pad",
        use_im_start_end: bool = True,
        sep_image_conv_front: bool = False,
        template: TemplateName = "llava_v1",
        image_token: str = IMAGE_PATCH_TOKEN,
        chat_template: str | None = None,
        resolution: dict[str, Any] | None = None,
        detail_settings: dict[str, Any] | None = None,
    ) -> None:
        _check_mode("image_mode", image_mode)
        _check_mode("inference_image_mode", inference_image_mode)
        if not isinstance(image_processor, CLIPImageProcessorPil):
            image_processor = as_clip_processor(image_processor)
        self.patch_size = patch_size
        self.image_mode: ImageMode = image_mode
        self.inference_image_mode: ImageMode = inference_image_mode
        self.use_im_start_end = use_im_start_end
        self.sep_image_conv_front = sep_image_conv_front
        self.template: TemplateName = template
        self.image_token = image_token
        self.resolution = resolution
        self.detail_settings = detail_settings
        self._resolution = resolution_from(resolution, "processor_config.json:resolution")
        jinja = chat_template or _jinja(template, tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=jinja)
        self._conversation_template = _conversation_template(template, tokenizer, jinja)
        self._tile_geometry: TileGeometry | None = None
        tiles = self._resolution
        if isinstance(tiles, Tiles):
            self._tile_geometry = TileGeometry(
                tiles.grids, self.image_side, patch_size, tiles.pool, tiles.max_image_tokens
            )
        # These raise here rather than in the first batch if the files do not fit.
        text_encoder(self)
        image_settings(self)
        _ = self.detail_processor
        tokenizer("text")  # reads settings such as model_max_length

    @property
    def conversation_template(self) -> RoleTemplate | ChatTemplate:
        """How conversations are written."""
        return self._conversation_template

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: the tokenizer's end of text, and the template's end of a turn."""
        end = self._conversation_template.end_of_answer()
        ids = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(end) if end else None}
        return frozenset(index for index in ids if index is not None)

    @property
    def generation_ids(self) -> dict[str, int | list[int] | None]:
        """The special tokens by their names in a generation configuration; several end an answer in some templates."""
        stop: list[int] = sorted(self.stop_token_ids)
        ids = {f"{role}_token_id": getattr(self.tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        return {**ids, "eos_token_id": stop} if len(stop) > 1 else ids

    @property
    def num_image_tokens(self) -> int:
        """Number of ``<im_patch>`` tokens for an image of the tower's square size (576 at 336 pixels).

        With tiles, the largest number that an image can have.
        """
        geometry = self.tile_geometry
        if geometry is not None:
            return geometry.most_tokens
        side = self.image_side // self.patch_size
        return side * side

    @property
    def tile_geometry(self) -> TileGeometry | None:
        """How images are cut into tiles; None without tiles."""
        return self._tile_geometry

    @property
    def detail_grid(self) -> int | None:
        """Rows, and columns, of an image's crops for the cross-attention; None without them."""
        crossed = self._resolution
        return crossed.grid if isinstance(crossed, CrossAttention) and crossed.encoder == CONCAT_CLIP else None

    @property
    def detail_processor(self) -> Any:
        """The image processor of the cross-attention's own encoder; None without one."""
        return None if self.detail_settings is None else image_processor_of(self.detail_settings)

    @property
    def image_side(self) -> int:
        """Side of a prepared image in pixels, except in image mode ``keep``."""
        return prepared_side(self.image_processor)

    @property
    def image_token_id(self) -> int:
        """Id of ``<im_patch>``."""
        return text_encoder(self).patch

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        image_mode: ImageMode | None = None,
        add_special_tokens: bool = True,
        return_text_replacement_offsets: bool = False,
        **options: Any,
    ) -> BatchFeature:
        """Prepare prompts and their images for inference.

        Prompts are trusted: ``</s>`` in a prompt becomes the token. Use ``encode_question`` for untrusted text.

        Args:
            images: An image (PIL image or local path), a list of images in reading order, or a list per prompt.
            text: One prompt or several; each ``<image>`` is replaced by one image.
            return_tensors: ``"pt"`` for tensors.
            image_mode: Overrides ``inference_image_mode``.
            add_special_tokens: Whether to start each prompt with ``<s>``, unless it already does.
            return_text_replacement_offsets: Whether to return where placeholders were expanded, for
                ``apply_chat_template``.
            **options: The tokenizer's: ``padding``, ``padding_side``, ``return_attention_mask``, ...

        Returns:
            ``input_ids`` and ``attention_mask`` (``[B, T]``) if there is text, ``pixel_values`` (float32
            ``[N, 3, H, W]``, a list if sizes differ) if there are images. With tiles, ``pixel_values`` has the views of
            all images one after the other, and ``image_layouts`` (``[N, 4]``) says how each is cut.

        Raises:
            DataError: The number of ``<image>`` differs from the number of images, or an option is unknown.
            ImageError: An image cannot be opened.
        """
        if images is None and text is None:
            raise DataError.at("processor", "got neither images nor text", "pass images, text or both")
        check_options(options)
        mode = image_mode or self.inference_image_mode
        prompts = [self._collapse(prompt) for prompt in ([text] if isinstance(text, str) else text or ())]
        prepared = self._prepare(flat_images(images), prompts, mode)
        data: dict[str, Any] = {}
        if text is not None:
            blocks = [self._tokens(image.tokens) for image in prepared]
            expanded, offsets = expand_prompts(prompts, blocks, (add_special_tokens and self.tokenizer.bos_token) or "")
            data.update(self.tokenizer(expanded, add_special_tokens=False, **options))
            if return_text_replacement_offsets:
                data["text_replacement_offsets"] = offsets
        data.update(
            image_inputs(
                [image.pixels for image in prepared],
                [image.layout for image in prepared if image.layout is not None],
                [image.detail for image in prepared if image.detail is not None],
            )
        )
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["text_replacement_offsets"])

    def _prepare(self, images: Sequence[Image | str], prompts: Sequence[str], mode: ImageMode) -> list[PreparedImage]:
        """Prepare images in reading order, those of each prompt together, and those without a prompt alone."""
        prepared: list[PreparedImage] = []
        for count in (*(prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts), *[1] * len(images)):
            start = len(prepared)
            prepared += prepare_record_images(images[start : start + count], mode, self)
        return prepared

    def encode_question(
        self,
        question: str,
        image: bool = True,
        history: Iterable[tuple[str, str]] = (),
        *,
        num_image_tokens: int | None = None,
    ) -> Tensor:
        """Encode a question as ``run_llava`` does: the question, a line break, the image, and ``ASSISTANT:``.

        Text in the question or the history never becomes a special token or an image placeholder.

        Args:
            question: The user's text.
            image: Whether the conversation has an image, which is placed in the first question.
            history: (question, answer) pairs of the previous turns.
            num_image_tokens: Number of tokens of an image in mode ``keep`` or with tiles; None is that of the tower's
                square size.

        Returns:
            Ids, int64 ``[1, T]``.

        Raises:
            DataError: The model reads tiles, and the number is not given.

        Source: LLaVAR, llava/eval/run_llava.py, ``eval_model``.
        """
        messages: list[tuple[Role, Content]] = []
        for asked, answered in history:
            messages += [("human", [asked]), ("gpt", [answered])]
        messages.append(("human", [question]))
        template = self.conversation_template
        messages[0] = ("human", template.question(str(messages[0][1][0]), int(image)))
        pieces = template.pieces(messages, answer_next=True)
        if image and num_image_tokens is None and self.tile_geometry is not None:
            what = "num_image_tokens is missing, and with tiles it depends on the image"
            raise DataError.at("encode_question", what, "pass it, or call the processor with text and image")
        tokens = self.num_image_tokens if num_image_tokens is None else num_image_tokens
        encoding = encode_pieces(pieces, text_encoder(self), [tokens] if image else [])
        return torch.tensor([encoding.ids], dtype=torch.int64)

    def _collapse(self, prompt: str) -> str:
        """Replace image tokens that a prompt already contains by ``<image>``."""
        if self.tile_geometry is None:
            prompt = prompt.replace(self._tokens(self.num_image_tokens), IMAGE_PLACEHOLDER)
        stray = [name for name in (*ADDED_TOKENS, self.image_token) if name != IMAGE_PLACEHOLDER and name in prompt]
        if stray:
            raise DataError.at(
                "processor",
                f"the text contains {', '.join(stray)} outside a complete image block of this model",
                f"write {IMAGE_PLACEHOLDER} for each image, and encode untrusted text with encode_question",
            )
        return prompt

    def _tokens(self, count: int) -> str:
        return image_block(count, use_im_start_end=self.use_im_start_end, patch=self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that ``__call__`` returns."""
        layouts = ["image_layouts"] if self.tile_geometry is not None else []
        details = ["detail_values"] if isinstance(self._resolution, CrossAttention) else []
        return ["input_ids", "attention_mask", "pixel_values", *layouts, *details]


def _jinja(template: TemplateName, tokenizer: Any) -> str:
    """Return the Jinja template of a conversation template.

    Raises:
        ConfigError: ``chat``, and the tokenizer has none.
    """
    if template == "llava_v1":
        return CHAT_TEMPLATE
    if template == "vicuna_v1":
        return VICUNA_CHAT_TEMPLATE
    if not isinstance(tokenizer.chat_template, str):
        raise ConfigError.at(
            "template", "the tokenizer has no chat template of its own", "use vicuna_v1, or a model tuned for chats"
        )
    return with_image_parts(tokenizer.chat_template)


def _conversation_template(template: TemplateName, tokenizer: Any, jinja: str) -> RoleTemplate | ChatTemplate:
    if template not in get_args(TemplateName):
        known = ", ".join(get_args(TemplateName))
        raise ConfigError.at("template", f"unknown (got {template!r}, expected one of {known})", "use one of them")
    if template == "chat":
        return ChatTemplate(tokenizer, jinja)
    return LLAVA_V1 if template == "llava_v1" else VICUNA_V1


def _check_mode(name: str, got: str) -> None:
    if got not in _MODES:
        raise ConfigError.at(
            name, f"unknown image mode (got {got!r}, expected one of {', '.join(_MODES)})", "use one of them"
        )
