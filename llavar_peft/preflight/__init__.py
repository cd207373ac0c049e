"""Checks before a run: the environment, the memory and time it needs, and a dry run of each stage."""
