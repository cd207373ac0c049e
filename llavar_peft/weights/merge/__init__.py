"""Merging adapters into their base, from disk to disk."""
