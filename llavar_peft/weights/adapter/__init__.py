"""Adapters as files: reading, checking and describing them."""
