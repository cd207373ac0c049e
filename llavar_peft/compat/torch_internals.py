"""Private parts of PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which new tensors have a device, a dtype and a shape, but no memory.

    Replaces ``torch.device("meta")``, which does not suffice: autocast does not support the device type ``meta``.
    PyTorch documents fake tensors but exports them under no public name. Needed since torch 2.0; checked with 2.13.
    """
    return FakeTensorMode()
