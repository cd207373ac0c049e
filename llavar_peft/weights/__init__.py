"""Weights as files: deltas, adapters, merges and conversions, without a whole model in memory."""
