"""Recipes: what a run is, as frozen dataclasses and as YAML, validated in one place."""
