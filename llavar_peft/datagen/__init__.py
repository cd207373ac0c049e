"""Generate data sets: OCR of unlabeled images, and synthetic text-rich images."""
