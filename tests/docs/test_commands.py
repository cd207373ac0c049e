"""Run every command and Python block of the README and the documentation, in order, on tiny models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import llavar_peft
from llavar_peft import ModelConfig, build_model, make_delta
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from tests.commands import command, python

ROOT = Path(llavar_peft.__file__).parents[1]
PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/data.md",
    "docs/recipes.md",
    "docs/tuning.md",
    "docs/adapters.md",
    "docs/hub.md",
    "docs/evaluation.md",
    "docs/serving.md",
    "docs/engines.md",
    "docs/multi_gpu.md",
    "docs/reproducing.md",
    "docs/troubleshooting.md",
    "docs/coming_from.md",
    "docs/architecture.md",
    "docs/extending.md",
)
ELSEWHERE = {
    "pip install": "the environment is set up already",
    "python -m pytest": "this test is part of it",
    "make ": "continuous integration runs the targets",
    "llavar-peft quickstart": "tests/test_quickstart.py",
    "llavar-peft eval vqa": "tests/evaluation/test_vqa.py; the data is not ours to distribute",
    "llavar-peft eval heights --dataset": "tests/evaluation/test_heights.py; the data is not ours to distribute",
    "llavar-peft eval fields": "tests/evaluation/test_fields.py; needs a trained model",
    "llavar-peft eval mme": "tests/evaluation/test_mme.py; the data is not ours to distribute",
    "llavar-peft eval answer": "tests/evaluation/test_judge.py; needs an endpoint",
    "llavar-peft eval judge": "tests/evaluation/test_judge.py; needs an endpoint",
    "llavar-peft eval summarize": "tests/evaluation/test_judge.py",
    "llavar-peft eval compare": "tests/evaluation/test_vqa.py; needs results",
    "llavar-peft eval diagnose mine.json": "tests/evaluation/test_vqa.py; needs results",
    "llavar-peft report": "tests/evaluation/test_report.py; needs results",
    "lmms-eval": "tests/evaluation/test_lmms.py",
    "llavar-peft ocr": "tests/datagen/ocr; needs OCR engines and an endpoint",
    "llavar-peft serve": "tests/serving; runs until it is stopped",
    "python examples/small_print.py": "tests/test_examples.py; takes 20 minutes",
    "python examples/openai_client.py": "tests/serving/test_api.py; needs a server",
    "accelerate launch": "tests/test_examples.py; these need several GPUs",
    "sbatch": "needs a Slurm cluster",
    "llama-server": "tests/weights/test_gguf.py reads the files; needs llama.cpp",
    "python examples/gptq.py": "needs llmcompressor",
    "llavar-peft push": "tests/hub/test_push.py; needs a token",
    "docker": "tests/test_container_files.py; the images are built elsewhere",
    "python benchmarks": "tests/test_benchmarks.py",
}
"""How commands begin that are not run here, and where they are tested."""


@dataclass(frozen=True)
class Block:
    """A shell command, or a block of Python, with the page it comes from."""

    page: str
    kind: str
    text: str


def _blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for kind, body in re.findall(r"^ *```(bash|python)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL):
        if kind == "python":
            found.append((text.index(body), Block(page, kind, body)))
            continue
        lines = [line.strip() for line in body.replace("\\\n", " ").splitlines()]
        found += [(text.index(body), Block(page, kind, line)) for line in lines if line and not line.startswith("#")]
    # The README's table of goals has one command in each row.
    rows = text if page == "README.md" else ""
    for match in re.finditer(r"^\| [^|]+ \| `((?:llavar-peft|accelerate) [^`]+)` \|", rows, flags=re.MULTILINE):
        found.append((match.start(), Block(page, "bash", match.group(1))))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def _prepare(folder: Path) -> None:
    """Write what the documentation takes for granted: models, records and images under the names it uses."""
    shutil.copytree(PARTS / "language_model", folder / "llama-13b")
    # The tiny model has no tokenizer.model, and LLaMA's is not ours to distribute; `convert` only copies it.
    (folder / "llama-13b.tokenizer.model").write_bytes(b"stand-in")
    for name in ("clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"):
        shutil.copytree(PARTS / "vision_tower", folder / name)
    shutil.copytree(PARTS / "language_model", folder / "lmsys/vicuna-7b-v1.1")
    model, processor = build_model(
        ModelConfig(language_model=str(folder / "llama-13b"), vision_tower=str(PARTS / "vision_tower"), dtype="float32")
    )
    model.save_pretrained(folder / "trained")
    processor.save_pretrained(folder / "trained")
    make_delta(folder / "llama-13b", folder / "trained", folder / "LLaVAR_delta")
    write_synthetic(folder / "drawn-data", 8, SynthSettings(style="plain", seed=1, task="question"))
    drawn = folder / "drawn-data/images"
    for records, images in (
        ("receipts.json", "receipts"),
        ("chat_llavar.json", "cc3m"),
        ("llava_instruct_150k_llavar_16k.json", "coco/train2017"),
    ):
        shutil.copyfile(folder / "drawn-data/records.json", folder / records)
        shutil.copytree(drawn, folder / images)
    shutil.copyfile(next(drawn.iterdir()), folder / "poster.png")
    pages = [Image.open(path) for path in sorted(drawn.iterdir())[:2]]
    pages[0].save(folder / "march.pdf", save_all=True, append_images=pages[1:])
    shutil.copytree(drawn, folder / "images")
    Image.open(folder / "poster.png").convert("RGB").save(folder / "receipt.pdf")
    fields = {"type": "object", "properties": {"total": {"type": "string", "maxLength": 9}}, "required": ["total"]}
    (folder / "receipt.schema.json").write_text(json.dumps(fields))
    name = next(drawn.iterdir()).name
    (folder / "receipts.csv").write_text(f"image,question,answer\n{name},What is the total?,23.80\n")
    question = {"question_id": 0, "image": name, "text": "Read.", "category": "conv"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")


def _run(block: Block, folder: Path) -> None:
    if block.kind == "python":
        done = python(block.text, folder)
    else:
        typed, _, target = block.text.partition(" > ")
        program, *words = shlex.split(typed)
        assert program == "llavar-peft", f"{block.page}: no test runs {block.text!r}"
        if "--tokenizer" in words:
            shutil.copyfile(folder / "llama-13b.tokenizer.model", folder / "llama-13b/tokenizer.model")
        done = command(words, folder)
        (folder / "llama-13b/tokenizer.model").unlink(missing_ok=True)
        if target:
            # A CPU without bfloat16 instructions takes ten times as long with it.
            (folder / target).write_text(done.stdout.replace("precision: bf16", "precision: fp32"), encoding="utf-8")
    assert done.status == 0, f"{block.page}: {block.text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the repository")
def test_every_command_and_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The same command on two pages runs once: the second time it would only find its own output.
    distinct: dict[str, Block] = {}
    for block in (block for page in PAGES for block in _blocks(page)):
        distinct.setdefault(block.text, block)
    run = [
        block for block in distinct.values() if block.kind == "python" or not block.text.startswith(tuple(ELSEWHERE))
    ]
    assert len([block for block in run if block.kind == "bash"]) >= 25
    assert len([block for block in run if block.kind == "python"]) >= 5
    for block in run:
        _run(block, tmp_path)
    for name in ("llavar-13b", "runs/receipts/adapter", "merged", "receipts-delta", "mine-hf", "mine-released"):
        assert (tmp_path / name).is_dir(), name


@pytest.mark.parametrize("page", [*PAGES, "docs/formats.md", "docs/receipts_to_json.md"])
@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the repository")
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing
