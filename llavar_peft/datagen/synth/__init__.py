"""Synthetic text-rich images with exact ground truth."""
