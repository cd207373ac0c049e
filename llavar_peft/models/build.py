"""The names of ``build_model.py`` under the path that it had in version 0.1."""

from llavar_peft.compat.released_names import moved_names

_NAMES = ("build_model", "expected_shapes", "load_processor", "register")
__getattr__ = moved_names(__name__, dict.fromkeys(_NAMES, "models.build_model"))
