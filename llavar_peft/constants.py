"""Names and numbers of LLaVAR that more than one module needs (the only copy).

Source: LLaVAR, llava/conversation.py (``conv_llava_v1``) and llava/train/train.py.
"""

from typing import Final

IGNORE_INDEX: Final = -100
"""Label of a position that carries no loss."""

IMAGE_PLACEHOLDER: Final = "<image>"
"""What a record's text holds where an image stands. Never a token."""

IMAGE_PATCH_TOKEN: Final = "<im_patch>"
IMAGE_START_TOKEN: Final = "<im_start>"
IMAGE_END_TOKEN: Final = "<im_end>"
ADDED_TOKENS: Final = (IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
"""In the order of their ids: 32000, 32001, 32002 on LLaMA's vocabulary."""

BOS_TOKEN: Final = "<s>"
EOS_TOKEN: Final = "</s>"
UNK_TOKEN: Final = "<unk>"
PAD_TOKEN: Final = UNK_TOKEN
"""The original pads with ``<unk>`` (id 0)."""

TOP_K: Final = 50
"""Tokens that are drawn from at most, which the original leaves to its library.

Source: transformers 4.28, ``GenerationConfig``.
"""

SYSTEM_PROMPT: Final = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
"""Byte for byte the original's; there is no space between its sentences."""

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
"""The ten questions of the noisy OCR data. Source: arXiv 2306.17107, appendix; the spelling is the original's."""

ATTENTION_LAYERS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS: Final = ("gate_proj", "up_proj", "down_proj")
LINEAR_LAYERS: Final = ATTENTION_LAYERS + MLP_LAYERS
"""The linear layers of each of LLaMA's decoder layers."""

MODEL_TYPE: Final = "llavar"
"""``model_type`` of our configuration."""

RELEASED_MODEL_TYPE: Final = "llava"
"""``model_type`` that the released, flat ``config.json`` carries."""

PROJECTOR_BIN: Final = "mm_projector.bin"
"""Stage 1's file in the original's layout."""
PROJECTOR_SAFETENSORS: Final = "mm_projector.safetensors"
"""The same tensors under the same names, as safetensors."""

METRICS_FILE: Final = "metrics.jsonl"
PROBE_FILE: Final = "probe.jsonl"
RESOLVED_RECIPE_FILE: Final = "recipe.yaml"
VERSIONS_FILE: Final = "versions.json"
