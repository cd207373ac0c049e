"""Training: runs a recipe's stages on `transformers.Trainer`."""
