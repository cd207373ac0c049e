"""Pack what the original's training, model and generation gave into two archives that the parity tests unpack.

The original's ``tokenizer.model`` is not ours to distribute. It is replaced by a ``tokenizer.json`` with only the
pieces that occur in the recorded ids and the pieces they are merged from, under their original ids. Byte-pair
encoding gives the same ids for these texts, because every merge that was applied is kept in its order. All other ids
are placeholders.

Usage: python tests/golden/original/make_archives.py GOLDEN_FOLDER
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from llavar_peft.models.llama_tokenizer import load_tokenizer

HERE = Path(__file__).parent
ARCHIVES = {
    "training": ["train", "model/clip-tiny-336"],
    "model": ["model/llava-tiny-v1", "model/batches.json", "model/outputs.npz", "model/pixels_fp16.npz",
              "model/vision_features.npz", "generate"],
}  # fmt: skip
LEFT_OUT = ("tokenizer.model", "README.txt", "pixels_fp32.npz", "batches.npz")


def recorded_ids(golden: Path) -> set[int]:
    """Return every token id in the recorded batches and answers."""
    ids: set[int] = set()
    for path in (*golden.glob("train/stage*_out/batches.npz"), golden / "model/outputs.npz"):
        arrays = np.load(path)
        for name in arrays.files:
            if name.endswith("input_ids"):
                ids |= set(arrays[name].reshape(-1).tolist())
    for one in json.loads((golden / "generate/generate.json").read_text()):
        ids |= set(one["input_ids"]) | set(one["new_ids"])
    return ids


def reduced_tokenizer(folder: Path, ids: set[int]) -> str:
    """Return the ``tokenizer.json`` of a folder with no other pieces than these ids need."""
    form = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    vocabulary, merges = form["model"]["vocab"], form["model"]["merges"]
    by_id = {index: piece for piece, index in vocabulary.items()}
    rank = {tuple(pair): number for number, pair in enumerate(merges)}
    kept = {by_id[index] for index in ids if index in by_id} | {
        piece for piece in by_id.values() if piece.startswith("<0x")
    }
    kept |= {"<unk>", "<s>", "</s>", "▁"}
    for piece in sorted(kept):
        parts = list(piece)
        while not piece.startswith("<") and len(parts) > 1:
            pairs = [(rank[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in rank]
            if not pairs:
                break
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            kept.add(parts[at])
        kept |= {letter for letter in piece if letter in vocabulary}
    form["model"]["vocab"] = {
        (piece if piece in kept else f"<unused{index}>"): index
        for piece, index in sorted(vocabulary.items(), key=lambda i: i[1])
    }
    form["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= kept]
    return json.dumps(form, ensure_ascii=False)


def pack(golden: Path, name: str, roots: list[str]) -> None:
    """Write one archive; the same files give the same bytes."""
    ids = recorded_ids(golden)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:

        def add(path: str, data: bytes) -> None:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))

        for root in roots:
            place = golden / root
            for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                where = str(path.relative_to(golden))
                if path.name == "tokenizer.model":
                    add(where.replace(".model", ".json"), reduced_tokenizer(path.parent, ids).encode())
                elif path.is_file() and path.name not in LEFT_OUT:
                    add(where, path.read_bytes())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27}]
    (HERE / f"{name}.tar.xz").write_bytes(lzma.compress(out.getvalue(), filters=filters))


if __name__ == "__main__":
    for archive_name, folders in ARCHIVES.items():
        pack(Path(sys.argv[1]), archive_name, folders)
        print(archive_name, (HERE / f"{archive_name}.tar.xz").stat().st_size)
