"""The process in which cases run on the simulated device. It runs one case after the other, as ``Simulation`` asks.

A request is a line of JSON on standard input, ``{"case": "module:function", "arguments": {...}}``; the answer is a line
on the original standard output, ``{"result": ...}`` or ``{"traceback": "..."}``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from typing import Any

from tests.gpu_sim import library_support, simulated_device


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a case on the simulated device."""
    module, _, function = request["case"].partition(":")
    try:
        case = getattr(importlib.import_module(module), function)
        with simulated_device.simulated_gpu():
            simulated_device.SYNCS.clear()
            return {"result": case(**request["arguments"])}
    except BaseException:  # noqa: BLE001 - the test that asked shows it
        return {"traceback": traceback.format_exc()}


def main() -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library_support.announce_device()
    simulated_device.install()
    library_support.support_half_precision()
    library_support.support_4_bits()
    gc.freeze()  # each stage collects garbage twice
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
