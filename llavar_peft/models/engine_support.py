"""What other engines need of an export: fields that transformers 4 reads, and limits of vLLM's own LLaVA.

transformers 5 writes fields that transformers 4 does not read: with them alone, it rejects the class of the tokenizer,
gives the model ``token_type_ids``, and silently computes with a default base of the rotary embeddings; and before 4.57,
it rejects the settings of images among those of the processor. All versions read the fields and files below.

Source: transformers 4.49.0 and 4.57.6, ``configuration_*.py`` and ``tokenization_utils_base.py``; vLLM 0.32.0,
``vllm/model_executor/models/llava.py`` (``init_vision_tower_for_llava``, ``LlavaMultiModalProjector``) and
``vllm/model_executor/layers/activation.py`` (``get_act_fn``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import ConfigError
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.weights.io.companion_files import IMAGES_FILE, PROCESSOR_FILE

_CLASSES_OF_5 = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of one class in transformers 5; transformers 4 has the second."""
_CLASS_OF_BOTH = "PreTrainedTokenizerFast"
_INPUTS = ["input_ids", "attention_mask"]
_VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model")


def add_fields_of_4(staged: Path) -> None:
    """Write the configurations of the tokenizer, model and processor in a folder as transformers 4 reads them, too."""
    path = staged / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") in _CLASSES_OF_5:
        tokenizer["tokenizer_class"] = _CLASS_OF_BOTH
    tokenizer.setdefault("model_input_names", _INPUTS)
    write_json(path, tokenizer)
    path = staged / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"] = {**config["text_config"], **rotary_fields_of_4(config["text_config"])}
    write_json(path, config)
    path = staged / PROCESSOR_FILE
    processor = json.loads(path.read_text(encoding="utf-8"))
    images = processor.pop("image_processor")
    write_json(path, processor)
    write_json(staged / IMAGES_FILE, {**images, "processor_class": processor["processor_class"]})


def rotary_fields_of_4(text_config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embeddings' settings as transformers 4 reads them, from ``rope_parameters`` of transformers 5.

    Settings that differ between kinds of layers (Gemma 3) are left as they are.
    """
    settings = dict(text_config.get("rope_parameters") or {})
    if not settings or any(isinstance(one, dict) for one in settings.values()):
        return {}
    apart = {name: settings.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in settings}
    return apart if settings.get("rope_type", "default") == "default" else {**apart, "rope_scaling": settings}


def check_vllm(parts: ModelParts) -> None:
    """Reject a model that vLLM's own LLaVA would reject.

    Raises:
        ConfigError: States vLLM's reason.
    """
    vision = parts.config.vision_config
    if vision.model_type not in _VLLM_TOWERS:
        raise ConfigError.at(
            "projector",
            f"the form 'two-sided' is for vLLM, whose LLaVA has no such vision tower (got {vision.model_type!r}, "
            f"expected one of {', '.join(map(repr, _VLLM_TOWERS))})",
            "use the form 'linear', with stock transformers",
        )
    side = parts.processor().image_side
    if side != vision.image_size:
        raise ConfigError.at(
            "projector",
            f"the form 'two-sided' is for vLLM, whose LLaVA takes images of the tower's size only (got {side} pixels, "
            f"expected {vision.image_size})",
            "use the form 'linear', with stock transformers",
        )
