"""A base in 8 bits, as ``load_chat`` opens it: what is stored so, what it answers, alone and beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llavar_peft import Chat, cli, load_chat
from llavar_peft.inference.batch_decoder import DecodingBatch, Row, answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Request
from tests.inference.test_decode import by_generate, make_requests


@pytest.fixture(scope="module")
def int8(checkpoint: Path) -> Chat:
    return load_chat(checkpoint, quantize="int8")


def test_only_the_language_models_layers_are_quantized(int8: Chat, engine: Engine) -> None:
    stored = dict(int8.engine.base_model.named_modules())
    eight = [name for name, module in stored.items() if type(module).__name__ == "Linear8bitLt"]
    assert len(eight) == 7 * int8.engine.base_model.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in eight)
    assert all(stored[name].weight.dtype == torch.int8 for name in eight)
    found = dict(int8.engine.base_model.named_parameters())
    for name, whole in engine.base_model.named_parameters():
        if name.removesuffix(".weight") not in eight:
            assert torch.equal(found[name], whole), name
    assert int8.engine.base_model.get_memory_footprint() < engine.base_model.get_memory_footprint()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Without a record in memory for each layer and token."""
    caplog.set_level("ERROR", "bitsandbytes.autograd._functions")


@pytest.mark.usefixtures("quiet")
def test_answers_are_those_of_generate(int8: Chat, images: list[Path]) -> None:
    requests = make_requests(int8.engine, images)
    expected = [by_generate(int8.engine, each) for each in requests]
    assert len({len(ids) for ids in expected}) > 1
    assert [answer.ids for answer in answer_all(int8.engine, requests, batch_size=1)] == expected
    text = int8.engine.processor.tokenizer.decode(expected[4], skip_special_tokens=True)
    assert int8.ask(images[4], "Name the author.", temperature=0.0, max_new_tokens=12) == text.strip()


def _first_logits(engine: Engine, requests: Sequence[Request]) -> torch.Tensor:
    """Those of each prompt's end, ``[B, V]``, answered together."""
    seen: list[torch.Tensor] = []
    hook = engine.base_model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output[:, -1]))
    DecodingBatch(engine).join([Row(each, engine) for each in requests])
    hook.remove()
    return seen[0]


@pytest.mark.usefixtures("quiet")
def test_only_outliers_make_an_answer_depend_on_its_batch(int8: Chat, images: list[Path]) -> None:
    engine = int8.engine
    requests = make_requests(engine, images)

    def apart() -> float:
        alone = torch.cat([_first_logits(engine, [each]) for each in requests])
        return float((alone - _first_logits(engine, requests)).abs().max())

    layers = [module for module in engine.base_model.modules() if type(module).__name__ == "Linear8bitLt"]
    assert {layer.state.threshold for layer in layers} == {6.0}
    # A column in which any row of the batch is beyond 6 is multiplied unrounded for all of them.
    assert 0.01 < apart() < 0.5
    for layer in layers:
        layer.state.threshold = 0.0
    try:
        assert apart() < 1e-4
        alone = [answer.ids for answer in answer_all(engine, requests, batch_size=1)]
        assert [answer.ids for answer in answer_all(engine, requests)] == alone
    finally:
        for layer in layers:
            layer.state.threshold = 6.0


def test_ask_in_8_bits(checkpoint: Path, int8: Chat, images: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["ask", "--model", str(checkpoint), "--quantize", "int8", "--image", str(images[0])]
    assert cli.main([*asked, "--greedy", "--max-new-tokens", "8", "Read."]) == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines()[-1] == int8.ask(images[0], "Read.", temperature=0.0, max_new_tokens=8)
    assert "MatMul8bitLt" not in captured.err  # a line for each layer and token
