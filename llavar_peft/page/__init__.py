"""HTML pages that are single files and need no network."""
