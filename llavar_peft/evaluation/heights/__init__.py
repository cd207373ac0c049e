"""Accuracy against the height of letters, as in the paper's figure 3."""
