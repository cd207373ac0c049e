"""Estimates of memory, compute and time for a recipe, made without a GPU."""
