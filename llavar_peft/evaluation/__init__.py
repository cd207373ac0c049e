"""Evaluation by the original's protocols."""
