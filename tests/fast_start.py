"""Run a module as the command line starts, which imports faster: ``python -m tests.fast_start MODULE ARGUMENTS``."""

from __future__ import annotations

import gc
import runpy
import sys

from llavar_peft.compat.deferred_compilation import defer_compilation

if __name__ == "__main__":
    gc.set_threshold(10_000)
    defer_compilation()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
