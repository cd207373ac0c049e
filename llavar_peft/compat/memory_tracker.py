"""The bytes of all live tensors, counted storage by storage. Tensors may be fake, so that no memory is needed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Counts storages from the operation that makes them until the last tensor that uses them is released.

    Replaces: nothing public. PyTorch documents ``TorchDispatchMode`` but exports it under no public name, and its own
    ``torch.distributed._tools.MemTracker`` visits every module at every operation, which takes minutes for 40 layers.
    Both give the same peaks (tests/compat/test_memory_tracker.py). Checked with torch 2.13.

    FSDP frees and allocates the storage of a gathered parameter by resizing it, which no operation shows. While the
    tracker is active, ``UntypedStorage.resize_`` is therefore replaced by one that is counted, as PyTorch's tracker
    does.

    Attributes:
        now: Bytes of the storages that are alive.
        peak: Largest number of bytes since the last ``reset_peak``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def add(self, values: Iterable[Any]) -> None:
        """Count the tensors among some values; those that are counted already change nothing."""
        for value in values:
            if isinstance(value, Tensor):
                # A subclass such as DTensor has no storage of its own but holds other tensors.
                inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
                if inner:
                    self.add(getattr(value, name) for name in inner)
                else:
                    self._add(value.untyped_storage())

    def reset_peak(self) -> int:
        """Return the peak, and start the next one at the current number of bytes."""
        peak, self.peak = self.peak, self.now
        return peak

    def __enter__(self) -> MemoryTracker:
        resize, tracker = self._resize, self

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in tracker._sizes:
                tracker._set(id(storage), size)
            return result

        setattr(torch.UntypedStorage, "resize_", counted)  # noqa: B010 - mypy rejects the assignment to a method
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        setattr(torch.UntypedStorage, "resize_", self._resize)  # noqa: B010
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add((result,) if isinstance(result, Tensor) else tree_leaves(result))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        # A storage is one Python object as long as any tensor uses it.
        if id(storage) not in self._sizes:
            weakref.finalize(storage, self._remove, id(storage))
            self._sizes[id(storage)] = 0
            self._set(id(storage), storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
