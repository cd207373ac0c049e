"""Names and numbers of LLaVAR that several modules use.

Source: LLaVAR, llava/conversation.py (``conv_llava_v1``) and llava/train/train.py.
"""

from typing import Final

TUNED_TOWER: Final = "tuned_vision_tower"
"""Field of a model's ``config.json``: whether its vision tower was trained and must not be replaced."""

IGNORE_INDEX: Final = -100
"""Label of a position that is not supervised."""

IMAGE_PLACEHOLDER: Final = "<image>"
"""Marks the position of an image in a record's text. It is not a token."""

IMAGE_PATCH_TOKEN: Final = "<im_patch>"
IMAGE_START_TOKEN: Final = "<im_start>"
IMAGE_END_TOKEN: Final = "<im_end>"
ADDED_TOKENS: Final = (IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
"""In the order of their ids: 32000, 32001, 32002 with LLaMA's vocabulary."""

BOS_TOKEN: Final = "<s>"
EOS_TOKEN: Final = "</s>"
UNK_TOKEN: Final = "<unk>"
PAD_TOKEN: Final = UNK_TOKEN
"""LLaVAR pads with ``<unk>`` (id 0)."""

TOP_K: Final = 50
"""Number of most likely tokens that sampling is limited to; LLaVAR uses its library's default.

Source: transformers 4.28, ``GenerationConfig``.
"""

SYSTEM_PROMPT: Final = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
"""Identical to LLaVAR's prompt, which has no space between its sentences."""

VICUNA_SYSTEM_PROMPT: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""LLaVA-1.5's prompt. Source: LLaVA, llava/conversation.py, ``conv_vicuna_v1``."""

USER_ROLE: Final = "USER"
ASSISTANT_ROLE: Final = "ASSISTANT"

OCR_INSTRUCTIONS: Final[tuple[str, ...]] = (
    "Identify any text visible in the image provided.",
    "List all the text you can see in the given image.",
    "Enumerate the words or sentences visible in the picture.",
    "Describe any readable text present in the image.",
    "Report any discernible text you see in the image.",
    "Share any legible words or sentences visible in the picture.",
    "Provide a list of texts observed in the provided image.",
    "Note down any readable words or phrases shown in the photo.",
    "Report on any text that can be clearly read in the image.",
    "Mention any discernable and legible text present in the given picture.",
)
"""The ten questions of the noisy OCR data, unchanged. Source: arXiv 2306.17107, appendix."""

ATTENTION_LAYERS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS: Final = ("gate_proj", "up_proj", "down_proj")
LINEAR_LAYERS: Final = ATTENTION_LAYERS + MLP_LAYERS
"""The linear layers of each of LLaMA's decoder layers."""

MODEL_TYPE: Final = "llavar"
"""``model_type`` of this package's configuration."""

RELEASED_MODEL_TYPE: Final = "llava"
"""``model_type`` in the flat ``config.json`` of the released layout."""

STOCK_TILES_MODEL_TYPE: Final = "llava_next"
"""``model_type`` of stock transformers' LLaVA-NeXT, a LLaVA that reads tiles."""

STOCK_MODEL_TYPES: Final = (RELEASED_MODEL_TYPE, STOCK_TILES_MODEL_TYPE)
"""The ``model_type`` of stock transformers' LLaVAs, whose ``config.json`` has a ``text_config``."""

PROJECTOR_BIN: Final = "mm_projector.bin"
"""The file of stage 1 in LLaVAR's layout."""
PROJECTOR_SAFETENSORS: Final = "mm_projector.safetensors"
"""The same tensors with the same names, as safetensors."""

METRICS_FILE: Final = "metrics.jsonl"
PROBE_FILE: Final = "probe.jsonl"
RESOLVED_RECIPE_FILE: Final = "recipe.yaml"
VERSIONS_FILE: Final = "versions.json"

MOST_PAGES: Final = 20
"""Pages of a PDF document that are used together, unless some are chosen."""
