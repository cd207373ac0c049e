"""Weights as files: shards, names, the stage-1 projector file."""
