"""Records from pictures nobody has labelled: OCR, paragraphs, a filter, one of the ten instructions.

``lines`` what an engine gives · ``engines`` RapidOCR and Tesseract · ``frame``, ``paragraphs``, ``order`` geometry ·
``quality``, ``duplicates`` what is kept · ``journal``, ``reading`` OCR of a folder, resumable · ``build`` the records ·
``grounding``, ``replies``, ``converse`` conversations by a language model.
"""
