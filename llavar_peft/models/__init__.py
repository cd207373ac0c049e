"""The model: vision tower, projector and language model, their configuration and processor, and how they are built."""
