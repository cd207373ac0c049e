"""The contenders of ``weights.py``, each of which runs in a separate process.

    python weights_contenders.py TASK NAME INPUTS OUT TINY

runs a contender on INPUTS and prints its figures as JSON. It is run on TINY before, so that everything is imported when
the measurement starts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llavar_peft.weights.io.tensor_table import TensorEntry

PIECE = 1 << 23
"""Number of bytes that the contender ``copy`` moves at once."""


def make_ours(inputs: Path, out: Path) -> None:
    """Run ``make_delta``."""
    from llavar_peft import make_delta

    make_delta(inputs / "base", inputs / "target", out)


def apply_ours(inputs: Path, out: Path) -> None:
    """Run ``apply_delta``."""
    from llavar_peft import apply_delta

    apply_delta(inputs / "base", inputs / "delta", out)


def apply_released(inputs: Path, out: Path) -> None:
    """Run ``apply_delta`` on a delta without fingerprints, whose base is checked by statistics."""
    from llavar_peft import apply_delta

    apply_delta(inputs / "base", inputs / "released", out)


def merge_ours(inputs: Path, out: Path) -> None:
    """Run ``merge_adapter``."""
    from llavar_peft import merge_adapter

    merge_adapter(inputs / "checkpoint", inputs / "adapter", out)


def merge_without_comparison(inputs: Path, out: Path) -> None:
    """Run ``merge_adapter`` without comparing the logits before and after."""
    from llavar_peft import merge_adapter

    merge_adapter(inputs / "checkpoint", inputs / "adapter", out, probe=False)


def in_memory(base: Path, other: Path, out: Path, *, sign: int) -> None:
    """Run the original's algorithm: load both models, change one in place and save it.

    Omitted, in favour of the original: building modules, loading the tokenizer, writing configuration and index.

    Source: LLaVA, llava/model/make_delta.py and apply_delta.py.
    """
    import torch

    old, new = _load_whole(base), _load_whole(other)
    for name, tensor in new.items():
        if name in old:
            known = tensor[: len(old[name])]
            known.add_(old[name]) if sign > 0 else known.sub_(old[name])
    out.mkdir()
    torch.save(new, out / "pytorch_model.bin")


def _load_whole(folder: Path) -> dict[str, Tensor]:
    import torch

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        tensors.update(torch.load(path, map_location="cpu", weights_only=True))
    return tensors


def make_in_memory(inputs: Path, out: Path) -> None:
    """Run the original's ``make_delta``."""
    in_memory(inputs / "base", inputs / "target", out, sign=-1)


def apply_in_memory(inputs: Path, out: Path) -> None:
    """Run the original's ``apply_delta``."""
    in_memory(inputs / "base", inputs / "delta", out, sign=1)


def merge_peft(inputs: Path, out: Path) -> None:
    """Load, ``merge_and_unload`` and save, as in ``peft``'s documentation."""
    import torch
    from peft import PeftModel

    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration

    model = LlavarForConditionalGeneration.from_pretrained(inputs / "checkpoint", dtype=torch.float16)
    PeftModel.from_pretrained(model, str(inputs / "adapter")).merge_and_unload().save_pretrained(out)


def loop(whole: dict[str, TensorEntry], base: dict[str, TensorEntry], out: Path, *, form: str) -> None:
    """Run our loop without the arithmetic: the same readers, writers, checksums and syncs.

    Args:
        whole: Tensors with the shapes of the result, which are copied.
        base: Tensors that are read only.
        out: Folder to create.
        form: Format of the files.
    """
    from llavar_peft.weights.io.folder_writer import FolderWriter
    from llavar_peft.weights.io.shard_layout import TensorSpec
    from llavar_peft.weights.io.tensor_blocks import read_blocks
    from llavar_peft.weights.io.write_weights import write_tensors

    def blocks(name: str) -> Iterator[Tensor]:
        read_only = read_blocks(base[name]) if name in base else iter(())
        for block in read_blocks(whole[name]):
            next(read_only, None)
            yield block
        next(read_only, None)  # the checksum is compared after the last block

    specs = [TensorSpec(name, entry.shape, entry.dtype) for name, entry in whole.items()]
    writer = FolderWriter(out, specs, form=form, shard_size=10**10, plan="loop")  # type: ignore[arg-type]
    write_tensors(writer, {name: partial(blocks, name) for name in whole})
    writer.finish()
    writer.commit()


def make_loop(inputs: Path, out: Path) -> None:
    """Run the loop of ``make_delta``."""
    from llavar_peft.weights.delta.released_layout import view_as_released

    old, new = (view_as_released(inputs / name).table for name in ("base", "target"))
    loop(new, old, out, form="bin")


def apply_loop(inputs: Path, out: Path) -> None:
    """Run the loop of ``apply_delta``."""
    from llavar_peft.weights.delta.released_layout import view_as_released

    old, step = (view_as_released(inputs / name).table for name in ("base", "delta"))
    loop(step, old, out, form="bin")


def merge_loop(inputs: Path, out: Path) -> None:
    """Run the loop of ``merge_adapter``."""
    from llavar_peft.weights.io.tensor_blocks import read_blocks
    from llavar_peft.weights.io.tensor_table import read_tensor_table

    for entry in read_tensor_table(inputs / "adapter/adapter_model.safetensors").values():
        for _ in read_blocks(entry):
            pass
    loop(read_tensor_table(inputs / "checkpoint"), {}, out, form="safetensors")


def copy(written: Path, read: Path, out: Path) -> None:
    """Read and write files, without tensors and checksums, and with one sync at the end.

    Args:
        written: Folder whose weights are copied.
        read: Folder whose weights are read only.
        out: Folder to create.
    """
    out.mkdir()
    jobs = [job for pair in zip_longest(_pieces(written, out), _pieces(read, None)) for job in pair if job is not None]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(_move, jobs):
            pass
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _pieces(folder: Path, out: Path | None) -> Iterator[tuple[Path, int, Path | None]]:
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        target = out / path.name if out is not None else None
        yield from ((path, start, target) for start in range(0, path.stat().st_size, PIECE))


def _move(job: tuple[Path, int, Path | None]) -> None:
    path, start, target = job
    with path.open("rb", buffering=0) as file:
        data = memoryview(os.pread(file.fileno(), PIECE, start))
    if target is not None:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT)
        try:
            while data:
                count = os.pwrite(handle, data, start)
                data, start = data[count:], start + count
        finally:
            os.close(handle)


CONTENDERS: dict[str, dict[str, Callable[[Path, Path], None]]] = {
    "make": {
        "ours": make_ours, "in memory": make_in_memory, "loop": make_loop,
        "copy": lambda inputs, out: copy(inputs / "target", inputs / "base", out),
    },
    "apply": {
        "ours": apply_ours, "in memory": apply_in_memory, "ours, as released": apply_released, "loop": apply_loop,
        "copy": lambda inputs, out: copy(inputs / "delta", inputs / "base", out),
    },
    "merge": {
        "ours": merge_ours, "peft": merge_peft, "ours, without comparison": merge_without_comparison,
        "loop": merge_loop,
        "copy": lambda inputs, out: copy(inputs / "checkpoint", inputs / "adapter", out),
    },
}  # fmt: skip
"""By task and name; each reads a folder written by ``write_inputs``, and writes another one."""


def counters() -> dict[str, float]:
    """Return what this process has used so far, and its resident memory (Linux), in seconds and bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "clock": time.perf_counter(),
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "asked": int(moved["rchar"]),
        "read": int(moved["read_bytes"]),
        "written": int(moved["write_bytes"]),
    }


def main(arguments: Sequence[str]) -> None:
    """Measure one contender and print its figures."""
    task, name, inputs, out, tiny = arguments
    contender = CONTENDERS[task][name]
    rehearsal = Path(out).with_name("rehearsal")
    contender(Path(tiny), rehearsal)
    shutil.rmtree(rehearsal)
    before = counters()
    contender(Path(inputs), Path(out))
    after = counters()
    figures = {key: after[key] - before[key] for key in ("clock", "cpu", "asked", "read", "written")}
    figures |= {"peak": after["peak"], "over_imports": max(resource.getpagesize(), after["peak"] - before["resident"])}
    figures["process_cpu"] = after["cpu"]
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
