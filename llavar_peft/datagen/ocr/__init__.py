"""Records made from unlabeled images: OCR, paragraph merging, quality filters and conversations."""
