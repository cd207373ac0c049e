"""Text VQA and MME: questions, answers, metrics and results."""
