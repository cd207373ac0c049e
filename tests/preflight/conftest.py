"""The tiny recipe of the training tests."""

from tests.training.conftest import short_model, tiny_data, tiny_model, tiny_recipe

__all__ = ["short_model", "tiny_data", "tiny_model", "tiny_recipe"]
