"""Checks before a run: the environment, the memory and time it needs, and a trial of each stage."""
