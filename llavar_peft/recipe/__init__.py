"""Recipes: the description of a run as dataclasses and YAML, and its validation."""
