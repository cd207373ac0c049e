"""The commands ``ask`` and ``chat``."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llavar_peft import ModelConfig, cli, load_chat
from llavar_peft.recipe.schema import Lora
from tests.weights.adapters import save_moved_adapter

GREEDY = {"temperature": 0.0, "max_new_tokens": 8}
OPTIONS = ("--greedy", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "moved"
    save_moved_adapter(folder, ModelConfig(checkpoint=str(checkpoint)), Lora(rank=4, alpha=8, dropout=0.0), by=0.05)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_ask(checkpoint: Path, adapter: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    chat = load_chat(checkpoint, adapter)
    both = [chat.ask(opened, "Read.", **GREEDY) for opened in images[:2]]
    named = ("--image", images[0], "--image", images[1])
    assert run("ask", "--model", checkpoint, "--adapter", adapter, *named, *OPTIONS, "Read.") == 0
    assert capsys.readouterr().out.splitlines() == [f"{p}: {a}" for p, a in zip(images, both, strict=False)]
    assert run("ask", "--model", checkpoint, "--image", images[0], *OPTIONS, "--json", "Read.") == 0
    expected = [{"image": str(images[0]), "answer": chat.ask(images[0], "Read.", adapter=None, **GREEDY)}]
    assert json.loads(capsys.readouterr().out) == expected
    seeded = ("ask", "--model", checkpoint, "--temperature", "2", "--max-new-tokens", "8", "--seed")
    outputs = []
    for seed in (1, 1, 2):
        assert run(*seeded, seed, "Read.") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image", "file:///etc/passwd"), "expected https or http"),
        (("--image", "nothing.png"), "no such file"),
        (("--greedy", "--temperature", "1"), "--greedy: it means temperature 0"),
        (("--adapter", "nothing"), "no such folder"),
    ],
)
def test_ask_rejects(
    options: tuple[str, ...], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ask", "--model", checkpoint, *options, "Read.") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_chat_through_a_pipe(
    checkpoint: Path,
    adapter: Path,
    images: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["Read.", "", "And then?", "/image nothing.png", f"/image {images[1]}", "What is it?", "/adapter",
             "/adapter moved", "Read.", "/adapter nobody", "/what", "/clear", "/adapter base", "Read."]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run("chat", "--model", checkpoint, "--adapter", adapter, "--image", images[0], *OPTIONS) == 0
    captured = capsys.readouterr()
    talk = load_chat(checkpoint, adapter).conversation(images[0])
    expected = [talk.send("Read.", **GREEDY), talk.send("And then?", **GREEDY)]
    expected += [talk.send("What is it?", images[1], **GREEDY), "  base", "* moved", talk.send("Read.", **GREEDY)]
    talk.clear()
    talk.adapter = None
    expected.append(talk.send("Read.", **GREEDY))
    assert captured.out.splitlines() == expected
    assert [line.split(":")[1] for line in captured.err.splitlines() if line.startswith("error")] == [
        " nothing.png", " adapter", " /what"
    ]  # fmt: skip


@pytest.fixture
def endless(checkpoint: Path, tmp_path: Path) -> Path:
    """A model that generates letters without end, so that answers stop at their limit."""
    folder = tmp_path / "endless"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    head = torch.zeros_like(tensors["lm_head.weight"])
    either = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["A", "B"])
    direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0)) * 1e3
    head[either] = torch.stack([direction, -direction])
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_stops_the_answer_but_not_the_program(endless: Path) -> None:
    command = [sys.executable, "-m", "llavar_peft", "chat", "--model", str(endless)]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1500"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Go on and on.\n")
    process.stdin.flush()
    begun = process.stdout.read(1)  # it streams
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/help\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert begun
    assert b"error: stopped" in err
    answer, _, rest = out.partition(b"\n/image FILE|URL")
    assert rest
    assert len(answer) < 1500
