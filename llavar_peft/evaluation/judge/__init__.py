"""GPT-4, or another language model, as a judge of answers."""
