"""Weights as files: deltas, adapters, merges and conversions that never hold a whole model in memory."""
