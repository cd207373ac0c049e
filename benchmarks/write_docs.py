"""Write docs/benchmarks.md and tables of other pages from benchmarks/results, so that no figure is typed by hand.

python benchmarks/write_docs.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SECTIONS = {
    "Hardware requirements": ("hardware", "Estimated memory of the fullest GPU, by `python benchmarks/hardware.py`."),
    "Training speed and memory": (
        "train",
        (
            "Training steps on the same records, with equal losses, in turn with the original's step and TRL's. A "
            "ratio above 1 means that this library is faster or needs less memory; one below 1.15 counts as no result."
        ),
    ),
    "What limits training on a CPU": (
        "train_limit",
        (
            "Ours and the original's step multiply the same matrices. The last column is how many times faster than "
            "the original's step ours would be if everything else took no time, measured with a profiler, which slows "
            "both steps."
        ),
    ),
    "Data loading": (
        "data",
        "Opening a million records, and preparing text and images, compared with the original's code.",
    ),
    "Inference": (
        "inference_quickstart",
        (
            "Files of questions, conversations, and the server, with the model of the quickstart. Most of the time of "
            "a batch of 32 is spent on the preparation of images, the vision tower and the prompts, whose cost for "
            "each question is the same as without a batch; only the decoding of the answers becomes cheaper."
        ),
    ),
    "Inference with a Qwen 2 and a SigLIP": (
        "inference_modern",
        "The same for files of questions, with the model of `llavar-peft quickstart --parts modern`.",
    ),
    "Inference with a larger model": ("inference", "The same with a model with random weights."),
    "Deltas and merges": (
        "weights",
        (
            "From disk to disk, compared with the original's in-memory scripts, peft, and loops that only read and "
            "write. A merge needs more time than such a loop because it computes the updates and, to compare the "
            "logits, multiplies each matrix with the activations of a short text before and after the merge; peft "
            "computes only the updates. The memory of whole processes includes the imports of PyTorch."
        ),
    ),
    "A 13B delta": ("weights_13b", "A dry run over sparse files of the size of a 13B model."),
    "Resolution": (
        "resolution",
        "A small model with tiles or cross-attention, compared with the same model that sees only the whole image.",
    ),
    "Resolution of LLaVAR-7B and 13B": ("resolution_estimates", "By `python benchmarks/resolution_estimates.py`."),
    "Start-up and busy machines": (
        "startup",
        (
            "The time of commands in addition to that of a bare interpreter, and the time of a training step while "
            "other processes use the cores. Typer imports pydantic to report a missing argument, and a typo in a "
            "recipe is found by pydantic too. Most of the time until the first token is spent on importing "
            "transformers' model classes."
        ),
    ),
    "Opening a model in 4 bits": (
        "open_quantized",
        (
            "`llavar-peft convert --quantize nf4` against `quantize: nf4` for the model in 16 bits. The time is that "
            "of `build_model` after all imports."
        ),
    ),
    "OCR": (
        "ocr",
        (
            "Reading drawn pages and those of a manual, compared with RapidOCR's defaults and the earlier builder. The "
            "rest of the time is the recognition of long lines, which a batch does not make faster."
        ),
    ),
    "From unlabeled images to a model": ("ocr_to_model", "The example `examples/ocr_to_model.py` from start to end."),
}
"""Title: (file under results, introduction)."""

RESOLUTION_COLUMNS = (0, 1, 3, 4, 5)
"""Of the estimates' tables, in docs/resolution.md."""
README_TABLES = {"hardware": ("hardware", 0, None), "results": ("train", 0, None)}


def tables(name: str) -> list[list[str]]:
    """Return the Markdown tables in a result, each as its lines."""
    found: list[list[str]] = []
    previous = ""
    for line in (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            found[-1].append(line)
        previous = line
    return found


def benchmarks_page() -> str:
    """Return the text of docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        "",
        "This page is written by `python benchmarks/write_docs.py` from the files in `benchmarks/results`, which the",
        "benchmark scripts write. Each result starts with its date, command and machine. All results come from two CPU",
        "cores; `benchmarks/gpu` has not been run on a GPU yet.",
    ]
    for title, (name, introduction) in SECTIONS.items():
        if not (RESULTS / f"{name}.md").is_file():  # it was not measured yet
            continue
        text = re.sub(r"^#", "###", (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip(), flags=re.MULTILINE)
        parts += ["", f"## {title}", "", introduction, "", text]
    return "\n".join(parts) + "\n"


def readme(text: str) -> str:
    """Return the README with its tables replaced by those of the results."""
    for marker, (name, number, _) in README_TABLES.items():
        table = "\n".join(tables(name)[number])
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def resolution_page(text: str) -> str:
    """Return docs/resolution.md with the table of its costs replaced by that of the estimates for 7B."""
    rows = [line.strip("|").split("|") for line in tables("resolution_estimates")[0]]
    table = "\n".join("|" + "|".join(row[column] for column in RESOLUTION_COLUMNS) + "|" for row in rows)
    pattern = r"(<!-- costs -->\n).*?(<!-- /costs -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.DOTALL)


def engines_page(text: str) -> str:
    """Return docs/engines.md with the table of engines replaced by that of the results."""
    table = "\n".join(tables("engines")[0])
    pattern = r"(<!-- engines -->\n).*?(<!-- /engines -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Write all files."""
    (ROOT / "docs/benchmarks.md").write_text(benchmarks_page(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "docs/resolution.md"
    path.write_text(resolution_page(path.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "docs/engines.md"
    path.write_text(engines_page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
