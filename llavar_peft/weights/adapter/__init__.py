"""Reading, checking and describing adapters on disk."""
