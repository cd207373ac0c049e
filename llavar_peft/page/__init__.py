"""HTML pages: each page is one file that needs no other file and no network."""
