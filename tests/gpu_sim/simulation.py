"""Run cases on the simulated device in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.accelerate_examples import launch_environment

ROOT = Path(__file__).parents[2]


class Simulation:
    """A process with the simulated device, started with the first case as ``examples/accelerate/one_gpu.yaml`` says.

    A case is a function that takes and returns what JSON can hold. It runs once for the same arguments, so that several
    tests can look at one run.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._results: dict[str, Any] = {}

    def run(self, case: str, **arguments: Any) -> Any:
        """Run a case and return its result.

        Args:
            case: ``module:function``.
            **arguments: The arguments of the function.

        Raises:
            AssertionError: The case failed; the message is its traceback.
        """
        request = json.dumps({"case": case, "arguments": arguments}, sort_keys=True)
        if request not in self._results:
            self._results[request] = self._ask(request)
        answer = self._results[request]
        if "traceback" in answer:
            raise AssertionError(f"{case} failed on the simulated device:\n{answer['traceback']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()

    def _ask(self, request: str) -> Any:
        if self._process is None:
            environment = {**os.environ, **launch_environment("one_gpu.yaml"), "OMP_NUM_THREADS": "1"}
            with self.log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.fast_start", "tests.gpu_sim.case_server"],
                    cwd=ROOT, env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"traceback": f"the process ended:\n{self.log.read_text()[-4000:]}"}
