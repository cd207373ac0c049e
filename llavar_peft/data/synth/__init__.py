"""Synthetic text-rich pictures as a tool: receipts, covers, signs and documents with exact ground truth.

``words`` vocabularies · ``faces`` fonts and what they can write · ``scene`` what stands where · ``kinds`` the four
layouts · ``distort`` the camera · ``pages`` one picture · ``write`` many of them. The quickstart's pictures are
``llavar_peft.data.synthetic``'s and stay as they are.
"""
