"""Does it read? The original's protocols (text VQA, MME's OCR questions, GPT-4 as judge), and two runs compared."""
