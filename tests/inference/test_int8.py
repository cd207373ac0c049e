"""A base in 8 bits, as ``load_chat`` opens it: what is stored so, what it answers, alone and beside others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llavar_peft import Chat, cli, load_chat
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
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


def test_layers_keep_no_inputs_for_the_backward_pass(int8: Chat) -> None:
    """As training uses them: bitsandbytes would keep them where activation checkpointing does not see it."""
    layer = next(one for one in int8.engine.base_model.modules() if type(one).__name__ == "Linear8bitLt")
    node = layer(torch.randn(1, 3, layer.in_features, requires_grad=True)).grad_fn
    # As one of its functions names them, or the other.
    kept = [getattr(node, "A", None), *(getattr(node, "tensors", None) or ())]
    assert [type(one) for one in kept if one is not None] == []


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Without a record in memory for each layer and token."""
    caplog.set_level("ERROR", "bitsandbytes.autograd._functions")


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_answers_are_those_of_generate(int8: Chat, images: list[Path]) -> None:
    requests = make_requests(int8.engine, images)
    expected = [by_generate(int8.engine, each) for each in requests]
    assert len({len(ids) for ids in expected}) > 1
    assert [answer.ids for answer in answer_all(int8.engine, requests, batch_size=1)] == expected
    text = int8.engine.processor.tokenizer.decode(expected[4], skip_special_tokens=True)
    assert int8.ask(images[4], "Name the author.", temperature=0.0, max_new_tokens=12) == text.strip()


@pytest.mark.usefixtures("quiet")
def test_only_outliers_make_an_answer_depend_on_its_batch(int8: Chat) -> None:
    layers = [module for module in int8.engine.base_model.modules() if type(module).__name__ == "Linear8bitLt"]
    assert {layer.state.threshold for layer in layers} == {6.0}
    layer = layers[0]
    inputs_BTD = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs_BTD[1, 0, 3] = 10.0

    def difference() -> float:
        """Return how far the first row's result in the batch is from its result alone."""
        return float((layer(inputs_BTD)[0] - layer(inputs_BTD[:1])[0]).abs().max())

    with torch.inference_mode():
        # A column in which any row of the batch is above 6 is multiplied without rounding, for all rows.
        assert difference() > 1e-5
        layer.state.threshold = 0.0
        try:
            assert difference() < 1e-6
        finally:
            layer.state.threshold = 6.0


def test_ask_in_8_bits(checkpoint: Path, int8: Chat, images: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["ask", "--model", str(checkpoint), "--quantize", "int8", "--image", str(images[0])]
    assert cli.main([*asked, "--greedy", "--max-new-tokens", "8", "Read."]) == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines()[-1] == int8.ask(images[0], "Read.", temperature=0.0, max_new_tokens=8)
    assert "MatMul8bitLt" not in captured.err  # a line for each layer and token
