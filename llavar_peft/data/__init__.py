"""From records and images to the batches of training."""

from llavar_peft.compat.released_names import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "decode_supervision": "data.supervised_text",
        "encode_conversation": "data.encode_record",
        "prepare_image": "data.image_preparation",
    },
)
