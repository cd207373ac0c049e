"""The script of each rank in ``test_sharded_kernels.py``: that of ``sharded.py``, with kernels that run on CPUs.

Liger's are PyTorch definitions, and ``torch.compile`` traces without making machine code.
"""

from __future__ import annotations

import sys

import pytest

from llavar_peft.models import build_model, layer_kernels
from tests.models.test_layer_kernels import compile_without_code, liger_modules
from tests.training import sharded


def main() -> None:
    patch = pytest.MonkeyPatch()
    for name, module in liger_modules().items():
        patch.setitem(sys.modules, name, module)
    for module in (build_model, layer_kernels):
        patch.setattr(module, "check_kernels", lambda *_: None)
    compiled = compile_without_code(patch)
    sharded.main()
    if not compiled:
        raise AssertionError("nothing was compiled")


if __name__ == "__main__":
    main()
