"""Synthetic text-rich pictures as a tool, with exact ground truth, in two styles.

``detailed`` is small print in eight languages, as a camera may see it; ``plain`` is few large letters on flat colours,
which a tower of 12 x 12 patches can read: the quickstart's.

``settings`` what is drawn · ``words`` vocabularies · ``faces`` fonts and what they can write · ``scene`` what stands
where · ``detailed`` and ``plain`` the kinds of picture · ``distort`` the camera · ``pages`` one picture · ``records``
its conversation · ``write`` many of them.
"""
