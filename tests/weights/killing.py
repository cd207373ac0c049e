"""Kill a resumable job at random moments, until one attempt may finish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from llavar_peft.weights.io.tensor_blocks import open_weights

_KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from llavar_peft.weights.io import folder_writer

first, second, out = sys.argv[1:]
torch.set_num_threads(1)  # a forked child has no threads of its parent
rng = random.Random(0)
{job}

def start(folder):
    child = os.fork()
    if child == 0:
        work(folder, lambda done, total: time.sleep(0.02))
        os._exit(0)
    return child

work(out + "-first", None)  # so that no child has to import anything
started = time.perf_counter()
os.waitpid(start(out + "-whole"), 0)
whole = time.perf_counter() - started
journal = Path(out).with_name("." + Path(out).name + ".part") / ".journal"
kept = []
for _ in range(20):
    child = start(out)
    time.sleep(rng.uniform(0.0, whole))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept.append(len(journal.read_text().splitlines()) if journal.is_file() else 0)
    if Path(out).exists():
        os.rename(out, out + str(len(kept)))  # it finished before the kill; the next attempt starts again
work(out, None)
print(json.dumps(kept))
"""


def kill_twenty_times(job: str, first: Path, second: Path, tmp_path: Path) -> None:
    """Check that the result of a job does not depend on how often it was killed.

    Args:
        job: Python that defines ``work(folder, progress)``, which reads ``first`` and ``second``.
        first: A folder that the job reads.
        second: Another folder that it reads.
        tmp_path: The folder that it writes to.
    """
    command = [sys.executable, "-c", _KILLER.format(job=job), str(first), str(second), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    assert max(kept) > 1, kept  # some attempts left work that the next ones resumed
    whole = tmp_path / "out-whole"
    expected = open_weights(whole)
    for folder in tmp_path.glob("out*"):
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
        got = open_weights(folder)
        assert sorted(got) == sorted(expected)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not (tmp_path / ".out.part").exists()
