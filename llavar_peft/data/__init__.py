"""Records and images on their way to batches for training."""
