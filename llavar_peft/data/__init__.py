"""From records and images to the batches of training."""
