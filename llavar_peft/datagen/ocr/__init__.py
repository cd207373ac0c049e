"""Records from unlabeled images: OCR, paragraph merging, quality filter and conversations."""
