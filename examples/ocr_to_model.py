"""Go from unlabeled images to a model, its scores and its report. Every step is a command of the package.

    python examples/ocr_to_model.py --out runs/ocr --pages 120

``synth`` draws images (``--images`` adds a folder of yours), ``ocr build`` reads them, ``data check`` checks the records,
the tiny model is trained on them in two stages, ``eval vqa`` asks the models of both stages, and ``eval diagnose`` and
``report`` show the results. For a real model, give your images and replace the recipe ``tiny`` by ``llavar-7b``.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from llavar_peft.cli import main as llavar_peft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--pages", type=int, default=120, help="number of images to draw")
    parser.add_argument("--images", "--pictures", type=Path, help="folder of further images")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each stage")
    parser.add_argument("--workers", type=int, default=1, help="number of OCR processes")
    args = parser.parse_args()
    out, took = args.out, dict[str, float]()

    def run(step: str, *arguments: object) -> None:
        began = time.perf_counter()
        status = llavar_peft([str(argument) for argument in arguments])
        if status:
            raise SystemExit(f"{step} ended with status {status}")
        took[step] = round(time.perf_counter() - began, 1)

    images, records, model = out / "drawn/images", out / "records.json", out / "run"
    run("draw", "synth", "--out", out / "drawn", "--n", args.pages, "--distort", "light", "--workers", args.workers)
    if args.images:
        shutil.copytree(args.images, images / "more", dirs_exist_ok=True)
    run("build", "ocr", "build", images, "--out", records, "--short-edge", 0, "--workers", args.workers)
    run("check", "data", "check", records, "--images", images)
    train, held_out = split(records)
    run("train", "train", "tiny", *settings(train, images, model, args.steps))
    run("look ahead", "eval", "diagnose", "--records", train, "--model", model / "model", "--max-length", 512)
    asked = ("eval", "vqa", "--dataset", held_out, "--images", images, "--greedy", "--max-new-tokens", 64)
    run("ask stage 1", *asked, "--model", model / "pretrain/model", "--out", model / "before.results.json")
    run("ask stage 2", *asked, "--model", model / "model", "--out", model / "held_out.results.json")
    run("diagnose", "eval", "diagnose", model / "held_out.results.json", "--metric", "cer")
    run("report", "report", model, "--metric", "cer", "--images", images)
    (out / "summary.json").write_text(json.dumps(summary(out, took), indent=2) + "\n", encoding="utf-8")
    print(out / "summary.json")


def split(records: Path) -> tuple[Path, Path]:
    """Hold out every fifth record, so that all kinds are in both parts."""
    rows = json.loads(records.read_text(encoding="utf-8"))
    parts = {
        records.with_name("train.json"): [row for number, row in enumerate(rows) if number % 5],
        records.with_name("held_out.json"): rows[::5],
    }
    for path, part in parts.items():
        path.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    train, held_out = parts
    return train, held_out


def settings(train: Path, images: Path, out: Path, steps: int) -> Sequence[str]:
    """Return the overrides that run the recipe ``tiny`` on these records."""
    parts = files("llavar_peft") / "assets/tiny"
    shared = [f"model.{part}={parts / part}" for part in ("language_model", "vision_tower")]
    of_stages = {
        "data.records": train,
        "data.images": images,
        "data.holdout": 4,
        "data.max_bad_share": 0.5,
        "max_steps": steps,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "probe.images": 4,
        "probe.loss_records": 4,
    }
    return [
        *shared,
        f"output_dir={out}",
        *(f"stages.{n}.{key}={value}" for n in (0, 1) for key, value in of_stages.items()),
    ]


def summary(out: Path, took: dict[str, float]) -> dict[str, object]:
    """Return what was kept and why, the scores, and the seconds of each step."""
    build = json.loads((out / "records.report.json").read_text(encoding="utf-8"))
    figures = {
        when: {
            figure["protocol"]: [round(figure[key], 2) for key in ("value", "low", "high")]
            for figure in json.loads((out / f"run/{name}.results.json").read_text(encoding="utf-8"))["figures"]
        }
        for when, name in (("after stage 1", "before"), ("after stage 2", "held_out"))
    }
    kept = {key: build[key] for key in ("images", "kept", "dropped", "lines", "lines_left_out", "letters", "reading")}
    return {"build": kept, "percent, 95 % interval": figures, "seconds": took}


if __name__ == "__main__":
    main()
