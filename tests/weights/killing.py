"""Kill a resumable job twenty times, half of them at random calls of its progress and half at random times."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.commands import python

_KILLER = """
import json, os, random, signal, time
from pathlib import Path
import torch
from llavar_peft.weights.io import folder_writer

first, second, out = {paths!r}
torch.set_num_threads(1)  # a forked child has no threads of its parent
rng = random.Random(0)
{job}

def start(folder, last):
    child = os.fork()
    if child == 0:
        calls = 0

        def progress(done, total):
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0 if last else 0.02)

        work(folder, progress)
        os._exit(0)
    return child

calls = []
work(out + "-first", lambda done, total: calls.append(done))  # so that no child has to import anything
started = time.perf_counter()
os.waitpid(start(out + "-whole", None), 0)
whole = time.perf_counter() - started
journal = Path(out).with_name("." + Path(out).name + ".part") / ".journal"
kept = []
for number in range(20):
    child = start(out, rng.randint(1, len(calls)) if number % 2 else None)
    if number % 2 == 0:
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
    paths = [str(first), str(second), str(tmp_path / "out")]
    done = python(_KILLER.format(job=job, paths=paths), tmp_path)
    assert done.status == 0, done.stderr
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
