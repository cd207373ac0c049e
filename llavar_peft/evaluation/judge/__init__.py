"""GPT-4, or another model, as a judge of answers."""
