"""The guide from receipts to JSON: its commands lead from PDFs and photographs to a model that is right."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import llavar_peft
from llavar_peft import cli
from tests.test_quickstart import LEAST, WHOLE, fewer_images

__all__ = ["fewer_images"]  # a fixture

PAGE = Path(llavar_peft.__file__).parents[1] / "docs/receipts_to_json.md"


def _fields(text: str) -> dict[str, Any]:
    """Return the fields of a receipt or an invoice from its words, as a language model would."""
    words = text.split()
    amounts = [word for word in words if re.fullmatch(r"\d+\.\d\d", word)]
    dates = [word for word in words if re.fullmatch(r"\d\d\.\d\d\.\d\d", word)]
    if dates:
        return {"seller": words[0], "number": words[words.index("NO") + 1], "date": dates[0], "total": amounts[-1]}
    names = [word for word in words[1:] if word not in amounts and word != "TOTAL"]
    return {"shop": words[0], "items": [{"name": names[0], "price": amounts[0]}], "total": amounts[-1]}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve an OpenAI-compatible endpoint that extracts fields by rules."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            read = body["messages"][1]["content"].partition("Read by program 1:\n")[2]
            try:
                content = json.dumps(_fields(read))
            except (IndexError, ValueError):  # a word was not read
                content = "I cannot see the fields."
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            data = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{running.server_port}/v1")
    yield
    running.shutdown()
    running.server_close()


def _run_blocks() -> Iterator[str]:
    """Run the page's blocks in order, and yield each command after it ran."""
    blocks = re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for kind, title, body in blocks:
        if title:
            Path(title).write_text(body, encoding="utf-8")
        elif kind == "python":
            exec(compile(body, PAGE.name, "exec"), {"__name__": "__main__"})
            yield "python"
        for line in body.splitlines() if kind == "bash" else ():
            program, *words = shlex.split(line)
            if program == "llavar-peft":
                assert cli.main(words) == 0, line
            else:
                assert words[:2] == ["install", "-e"]
            yield line


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("fewer_images", "endpoint")
@pytest.mark.skipif(not PAGE.is_file(), reason="needs the repository")
def test_quickstart_with_modern_parts_leads_to_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 documents; the model is right on unseen ones."""
    for package in ("rapidocr", "onnxruntime", "openai", "pypdfium2", "jsonschema", "llguidance"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    printed = dict[str, str]()
    for command in _run_blocks():
        printed[command] = capsys.readouterr().out

    quickstart = json.loads(Path("runs/quickstart/quickstart.json").read_text())
    assert quickstart["parts"] == "modern"
    assert quickstart["before"] <= 0.05
    assert quickstart["blank_exact_match"] <= 0.05
    assert quickstart["exact_match"] >= LEAST["modern"]
    assert "SigLIP and Qwen 2" in Path(quickstart["page"]).read_text()

    for kind in ("receipts", "invoices"):
        _check_labels(kind)

    results = json.loads(Path("runs/receipts/unseen.results.json").read_text())
    figures = {figure["protocol"]: figure for figure in results["figures"]}
    assert figures["valid JSON"]["records"] == 60
    assert figures["valid JSON"]["value"] >= 90
    assert figures["fields right"]["value"] >= (85 if WHOLE else 80)
    page = Path("runs/receipts/report.html").read_text()
    assert "field items.price" in page
    assert "field seller" in page
    assert "held-out images say little" not in page  # 60 documents say more than the run's 16 images

    asked = next(text for command, text in printed.items() if command.startswith("llavar-peft ask"))
    assert set(json.loads(asked)) == {"shop", "items", "total"}
    assert re.search(r"\d", printed["python"])


def _check_labels(kind: str) -> None:
    """Compare the labels that were read with what was drawn."""
    truths = {
        Path(row["image"]).stem: row["fields"]
        for row in map(json.loads, Path(f"drawn/{kind}/truth.jsonl").read_text().splitlines())
    }
    labels = json.loads(Path(f"{kind}.json").read_text())
    documents = {record["image"].partition("#")[0] for record in labels}
    assert {Path(name).suffix for name in documents} == {".jpg", ".pdf"}
    right = [json.loads(one["conversations"][1]["value"]) == truths[Path(one["image"]).stem] for one in labels]
    assert sum(right) >= 0.9 * len(truths), [one for one, fine in zip(labels, right, strict=True) if not fine]
