"""Publishing on the Hugging Face hub: models, adapters, deltas and data sets, each in one commit."""
