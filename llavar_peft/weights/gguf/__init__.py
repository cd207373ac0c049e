"""GGUF files for llama.cpp: the vocabulary, and tensors that are written from disk to disk."""
