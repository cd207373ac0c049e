"""A rank of ``test_processes.py``, run as ``killed_rank.py RECIPE``: rank 1 is killed in the third forward pass."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from llavar_peft import cli
from llavar_peft.training import stage_trainer


def main(recipe: str) -> int:
    """Train by the command."""
    plain, passes = stage_trainer.supervised_loss, 0

    def watched(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given)

    stage_trainer.supervised_loss = watched
    return cli.main(["train", recipe])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
