"""Scores of the fields that a model extracts from forms."""
