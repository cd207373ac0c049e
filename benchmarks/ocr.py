"""OCR: CPU time of a page and the words found, by the builder and by RapidOCR as it is set by default.

    python benchmarks/ocr.py [--pages 4] [--rounds 5] [--manual FILE.pdf] [--out STEM]

* ours: the builder's reader, as ``llavar-peft ocr build`` runs it;
* as before: the same with denormal numbers, and with short lines padded to 320 pixels;
* RapidOCR: its defaults in one thread, at the size that the builder reads: batches of 6 lines, and its test of the
  direction of each line.

Each contender reads all pages in a new process, one after the other in each round, because ONNX Runtime keeps the mode
of its first session. The pages are drawn, and those of running text of a PDF document whose own text is known; without
``--manual`` it is that of Debian's package libtasn1-doc, where it is installed. Words count in any order.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ocr_table import table
from rounds import ratios, spread
from weights import about, run

CONTENDERS = ("ours", "as before", "RapidOCR")
KINDS = ("documents", "receipts", "covers", "signs")
MANUAL = Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf")
SEED, WIDTH, DPI = 5, 768, 150


def write_pages(folder: Path, count: int, manual: Path) -> None:
    """Write ``count`` pages of each kind, and ``truth.json`` with the text of each."""
    from llavar_peft.datagen.synth.drawn_page import draw_page
    from llavar_peft.datagen.synth.synth_settings import SynthSettings

    truth: dict[str, str] = {}
    for kind in KINDS:
        settings = SynthSettings(kinds=(kind,), seed=SEED, distort="light", width=WIDTH)
        for number in range(count):
            page = draw_page(settings, number)
            page.image.save(folder / f"{kind}_{number}.png")
            truth[f"{kind}_{number}.png"] = page.transcript
    if manual.is_file():
        truth |= _render_manual(folder, count, manual)
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")


def _render_manual(folder: Path, count: int, manual: Path) -> dict[str, str]:
    """Render pages of running text, neither titles nor tables of contents, and return their text."""
    import pypdfium2

    truth: dict[str, str] = {}
    with pypdfium2.PdfDocument(manual) as document:
        for number in range(len(document)):
            text = document[number].get_textpage().get_text_bounded()
            if 800 <= len(text) <= 2500 and ". . ." not in text and text.isascii() and len(truth) < count:
                name = f"manual_{number}.png"
                document[number].render(scale=DPI / 72).to_pil().convert("RGB").save(folder / name)
                truth[name] = text
    return truth


def read_pages(contender: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Read all pages in this process; return by kind the CPU seconds of a page, the words found and the words there."""
    read = _reader(contender, folder)
    truth: dict[str, str] = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    read(next(iter(truth)))  # loads the models
    found: dict[str, dict[str, Any]] = {}
    for name, text in truth.items():
        began = time.process_time()
        said = read(name)
        seconds = time.process_time() - began
        kind = found.setdefault(name.split("_")[0], {"seconds": [], "found": 0, "there": 0})
        kind["seconds"].append(seconds)
        kind["found"] += (_words(said) & _words(text)).total()
        kind["there"] += _words(text).total()
    return {name: {**kind, "seconds": sum(kind["seconds"]) / len(kind["seconds"])} for name, kind in found.items()}


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W_]+", re.sub(r"\x02\s*|-\n", "", text)))


def _reader(contender: str, folder: Path) -> Any:
    """Return a function from a page's name to the text that a contender reads."""
    from llavar_peft.datagen.ocr import ocr_engines
    from llavar_peft.datagen.ocr.ocr_lines import OcrLine
    from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, judge_quality
    from llavar_peft.datagen.ocr.read_image_folder import OcrReader, ReadingSettings

    if contender == "RapidOCR":
        return _default_reader(folder)
    if contender == "as before":
        vars(ocr_engines).update({"_ask_for_flushing": lambda: None, "_LINE_SHAPE": [3, 48, 320]})
    reader = OcrReader(folder, ReadingSettings())

    def read(name: str) -> str:
        lines = [OcrLine.from_json(line) for line in reader(name)["lines"]["rapidocr"]]
        return judge_quality(lines, QualityLimits(), None).text

    return read


def _default_reader(folder: Path) -> Any:
    import numpy as np
    from PIL import Image
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    engine = RapidOCR(params={"Global.log_level": "error", **threads})

    def read(name: str) -> str:
        with Image.open(folder / name) as image:
            return "\n".join(engine(np.asarray(image.convert("RGB"))[:, :, ::-1]).txts or ())

    return read


def compare(rounds: list[dict[str, dict[str, dict[str, Any]]]]) -> dict[str, Any]:
    """Return by kind and contender the seconds of a page, how many times slower than ours, and the share of words."""
    found: dict[str, Any] = {}
    for kind in rounds[0]["ours"]:
        ours = [one["ours"][kind]["seconds"] for one in rounds]
        found[kind] = {}
        for name in CONTENDERS:
            seconds = [one[name][kind]["seconds"] for one in rounds]
            recall = min(one[name][kind]["found"] / one[name][kind]["there"] for one in rounds)
            found[kind][name] = {"seconds": spread(seconds), "ratio": ratios(seconds, ours), "recall": recall}
    return found


def main() -> None:
    """Print the table; with ``--out``, write it and the figures."""
    if sys.argv[1:2] == ["--read"]:
        sys.stdout.write(json.dumps(read_pages(sys.argv[2], Path(sys.argv[3]))) + "\n")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4, help="pages of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--manual", type=Path, default=MANUAL, help="a PDF document")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    report = {"date": datetime.now(timezone.utc).date().isoformat(), **about(), "threads": 1}
    report["command"] = " ".join(["python", "benchmarks/ocr.py", *sys.argv[1:]])
    report["packages"] |= {name: version(name) for name in ("rapidocr", "onnxruntime")}
    report |= {"load_before": os.getloadavg(), "rounds": options.rounds, "pages": options.pages}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ocr-") as name:
        folder = Path(name)
        write_pages(folder, options.pages, options.manual)
        rounds = [{one: run("ocr.py", "--read", one, folder) for one in CONTENDERS} for _ in range(options.rounds)]
    report |= {"kinds": compare(rounds), "seconds": time.perf_counter() - began, "load_after": os.getloadavg()}
    text = table(report)
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
