"""The model, its configuration, tokenizer and processor, and how it is built, tuned, merged and exported."""

from llavar_peft.compat.released_names import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "LlavarConfig": "models.llavar_config",
        "LlavarForConditionalGeneration": "models.modeling_llavar",
        "LlavarModel": "models.modeling_llavar",
        "LlavarProcessor": "models.processing_llavar",
        "register": "models.build_model",
    },
)
