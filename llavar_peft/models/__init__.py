"""The model, its configuration, tokenizer and processor, and how it is built, tuned, merged and exported."""
