"""The tiny model, the records and the original's outputs of the other tests."""

from tests.parity.conftest import golden
from tests.training.conftest import short_model, tiny_data, tiny_model, tiny_recipe

__all__ = ["golden", "short_model", "tiny_data", "tiny_model", "tiny_recipe"]
