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
from tests.weights.adapters import LANGUAGE_MODEL, save_moved_adapter

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "{model}/config.json"),
            "--model: a file, expected a folder (got '{model}/config.json').",
        ),
        (("--model", "{model}/modle"), "--model: no such folder"),
        (("--model", "{parts}/language_model"), "Fix: a plain language model sees no images: train a LLaVAR from it"),
        (("--model", "{parts}/vision_tower"), "Fix: give a LLaVAR as the model, and this folder as its vision tower."),
        (("--model", "{run}/shelf"), "no config.json in this folder. Fix: did you mean '{run}/shelf/llavar'?"),
        (("--model", "{model}", "--adapter", "{adapter}/adapter_config.json"), "a file, expected a folder. Fix: give"),
        (("--model", "{model}", "--adapter", "{run}/more"), "Fix: did you mean '{run}/more/adapter'?"),
        (("--model", "{adapter}", "--adapter", "{adapter}"), "--model: an adapter, expected the base of the adapter"),
        (("--model", "{model}", "--greedy", ""), "question: is empty."),
    ],
)
def test_what_is_no_model_or_adapter_is_named_before_it_is_loaded(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/adapter").symlink_to(adapter)
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf/llavar").symlink_to(checkpoint)
    if message.startswith("Fix: did you mean '{run}"):
        (adapter / "config.json").rename(adapter / "moved.json")  # not the result of a finished run
    places = {
        "model": checkpoint, "adapter": adapter, "run": tmp_path, "parts": LANGUAGE_MODEL.parent,
    }  # fmt: skip
    try:
        assert run("ask", *(word.format(**places) for word in arguments), *([] if "" in arguments else ["Read."])) == 2
    finally:
        if (adapter / "moved.json").exists():
            (adapter / "moved.json").rename(adapter / "config.json")
    captured = capsys.readouterr().err
    assert message.format(**places) in captured
    assert "weights," not in captured  # what is logged when a model has been loaded


def test_ask_says_which_adapter_is_on(checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--model", adapter), ("--model", checkpoint, "--adapter", adapter)):
        assert run("ask", *arguments, *OPTIONS, "Read.") == 0
        assert f"the adapter {adapter} is on; its base: {checkpoint}\n" in capsys.readouterr().err
    assert run("ask", "--model", checkpoint, *OPTIONS, "Read.") == 0
    assert "adapter" not in capsys.readouterr().err


def test_the_base_of_a_moved_adapter_is_found_by_its_name(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "elsewhere/tuned")
    base = tmp_path / "elsewhere/tuned/base.json"
    fields = json.loads(base.read_text())
    monkeypatch.chdir(tmp_path)
    for source, status, shown in (
        ("/gone/model", 2, "--model BASE --adapter elsewhere/tuned"),
        ("someone/model", 3, "no such folder, and "),  # the reason depends on HF_HUB_OFFLINE
    ):
        base.write_text(json.dumps({**fields, "checkpoint": source}))
        assert run("ask", "--model", "elsewhere/tuned", *OPTIONS, "Read.") == status
        assert shown in capsys.readouterr().err
    (tmp_path / "model").symlink_to(checkpoint)
    assert run("ask", "--model", "elsewhere/tuned", *OPTIONS, "Read.") == 0


def test_commands_of_the_chat_that_need_more(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image\n/adapter x\n/exit\nNever answered"))
    assert run("chat", "--model", checkpoint, *OPTIONS) == 0
    captured = capsys.readouterr()
    assert not captured.out
    assert "/image: no image is given. Fix: type /image and a file" in captured.err
    assert "no adapter is named 'x'. Fix: load the adapter with the model." in captured.err


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


# Slower, so that the answer is under way when the signal comes.
_SLOW_CHAT = """
import sys, time
from llavar_peft.cli import run
from llavar_peft.inference.batch_decoder import DecodingBatch

plain = DecodingBatch.step
DecodingBatch.step = lambda batch: (time.sleep(0.1), plain(batch))[1]
run()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_stops_the_answer_but_not_the_program(endless: Path) -> None:
    command = [sys.executable, "-c", _SLOW_CHAT, "chat", "--model", str(endless)]
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
