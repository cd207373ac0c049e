"""The tiny recipe of the training tests."""

from tests.training.conftest import tiny_data, tiny_model, tiny_recipe

__all__ = ["tiny_data", "tiny_model", "tiny_recipe"]
