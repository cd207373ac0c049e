"""Training: runs a recipe's stages on `transformers.Trainer`."""

from llavar_peft.compat.released_names import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "Trainer": "training.trainer",
        "run_recipe": "training.trainer",
    },
)
