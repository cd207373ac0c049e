"""Other language models on a GPU's attention and kernels, and in batches with caches longer than their windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llavar_peft import ModelConfig, build_model
from llavar_peft.compat.dependency_internals import attention_implementation
from llavar_peft.errors import ConfigError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Request
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models import build_model as building
from llavar_peft.models import packed_attention
from llavar_peft.models.layer_kernels import apply_kernels
from llavar_peft.models.packed_attention import enable_packing, packed_arguments, replace_flash_attention
from tests.flash_attention import put_flash_attention, use_attention, varlen_kernels
from tests.models.test_layer_kernels import (  # noqa: F401 - liger is a fixture
    LigerRMSNorm,
    LigerSwiGLUMLP,
    compile_without_code,
    liger,
)

Folder = Callable[[str], str]
CPU = torch.device("cpu")
TEXTS = ("What is written on the sign? " * 2, "The total?", "a " * 30)
WINDOW = 16


@pytest.fixture
def built(language_model: Folder, tower: Folder) -> Callable[..., tuple[Any, Any]]:
    """Return a function that builds a model of a kind."""

    def build(kind: str, **settings: Any) -> tuple[Any, Any]:
        return build_model(
            ModelConfig(language_model=language_model(kind), vision_tower=tower("clip_vision_model"), **settings)
        )

    return build


def _rows(processor: Any) -> list[Tensor]:
    rows = [processor.encode_question(text, image=False)[0] for text in TEXTS]
    assert max(map(len, rows)) > 2 * WINDOW
    return rows


def _step(model: Any, batches: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = sum(model(input_ids=ids[None], targets=targets[None], **more).loss for ids, targets, more in batches)
    loss.backward()  # type: ignore[union-attr]
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return float(loss.detach()), gradients  # type: ignore[union-attr]


def _assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(float(one.abs().max()) for one in expected[1].values())
    for name, one in expected[1].items():
        torch.testing.assert_close(found[1][name], one, atol=1e-5 * largest, rtol=1e-4, msg=name)


@pytest.fixture
def on_varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda device: True)
    monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", (torch.float32,))
    with varlen_kernels() as calls:
        yield calls


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("mistral", [(WINDOW - 1, 0.0)] * 2),
        ("qwen2", [(-1, 0.0), (WINDOW - 1, 0.0)]),
        ("gemma2", [(WINDOW - 1, 50.0), (-1, 50.0)]),
        ("gemma3_text", [(WINDOW - 1, 0.0), (-1, 0.0)]),
    ],
)
@pytest.mark.parametrize("kernel", ["flash", "varlen"])
def test_the_kernels_of_packed_rows_get_windows_and_caps(
    kernel: str,
    kind: str,
    limits: list[tuple[int, float]],
    built: Callable[..., tuple[Any, Any]],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = built(kind)
    rows = _rows(processor)
    targets = [torch.cat([row[1:], torch.tensor([-100])]) for row in rows]
    expected = _step(model, [(row, goal, {}) for row, goal in zip(rows, targets, strict=True)])
    if kernel == "flash":
        calls = put_flash_attention(monkeypatch, dtypes=(torch.float32,))
        use_attention(model, "flash_attention_2")
    else:
        calls = request.getfixturevalue("on_varlen")
    assert enable_packing(model)
    arguments = packed_arguments(tuple(map(len, rows)), model, CPU)
    found = _step(model, [(torch.cat(rows), torch.cat(targets), arguments)])
    _assert_same(found, expected)
    # varlen_attn has no cap, so that Gemma 2 is computed without it.
    assert calls.limits == ([] if kernel == "varlen" and kind == "gemma2" else limits)


def test_in_float32_flash_attention_is_replaced_by_one_that_caps(built: Callable[..., tuple[Any, Any]]) -> None:
    model, processor = built("gemma2")
    ids = processor.encode_question(TEXTS[0], image=False)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    use_attention(model, "flash_attention_2")
    assert replace_flash_attention(model)
    configs = (model.config.text_config, model.config.vision_config)
    assert [attention_implementation(config) for config in configs] == ["eager", "sdpa"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_a_batch_and_a_kept_prefix_answer_as_a_row_alone_beyond_the_window(
    kind: str, built: Callable[..., tuple[Any, Any]]
) -> None:
    model, processor = built(kind)
    engine, sampling = Engine(model, processor), Sampling(temperature=0.0, max_new_tokens=WINDOW + 4)
    asked = [Request(ids=row, sampling=sampling, keep_prefix=True) for row in _rows(processor)]
    together = answer_all(engine, asked)
    for request, answer in zip(asked, together, strict=True):
        assert answer_all(engine, [request])[0].ids == answer.ids
        _assert_greedy(model, request.ids, answer.ids)
        more = torch.cat([request.ids, torch.tensor(answer.ids), *_rows(processor)[:1]])
        assert answer.prefix is not None
        prefix = answer.prefix.shared_with(more, (), processor.image_token_id)
        assert prefix is not None
        assert len(prefix.ids) >= len(request.ids)
        following = answer_all(engine, [Request(ids=more, sampling=sampling, prefix=prefix), asked[0]])
        _assert_greedy(model, more, following[0].ids)


def _assert_greedy(model: Any, prompt: Tensor, answer: tuple[int, ...]) -> None:
    """Check an answer against the logits of one pass without a cache."""
    ids = torch.cat([prompt, torch.tensor(answer)])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert bool((logits.max(dim=1).values - chosen < 1e-4).all())


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_ligers_kernels_compute_the_same_in_models_like_llama(
    kind: str,
    built: Callable[..., tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = built(kind)
    ids = processor.encode_question(TEXTS[0], image=False)
    decoder = model.get_decoder()
    modeling = __import__(type(decoder).__module__, fromlist=["_"])
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apply_kernels(model, "liger")
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert isinstance(decoder.norm, LigerRMSNorm)
    assert all(isinstance(layer.mlp, LigerSwiGLUMLP) for layer in decoder.layers)
    assert modeling.apply_rotary_pos_emb.__module__ != modeling.__name__


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "phi3", "olmo2"])
def test_ligers_kernels_are_rejected_for_other_models_before_weights_are_read(
    kind: str, built: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "check_tensors", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ConfigError, match=rf"liger is not supported .*got '{kind}'.*") as error:
        built(kind, kernels="liger")
    assert "Fix: use 'compile', or 'none'" in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["gemma3_text", "phi3", "olmo2"])
def test_compiled_norms_and_mlps_compute_the_same(
    kind: str, built: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four norms in a layer, with a fused MLP, and without a norm before the attention."""
    compiled = compile_without_code(monkeypatch)
    model, processor = built(kind)
    rows = _rows(processor)[:1]
    batch = [(row, torch.cat([row[1:], torch.tensor([-100])]), {}) for row in rows]
    expected = _step(model.train(), batch)
    apply_kernels(model, "compile")
    _assert_same(_step(model, batch), expected)
    torch.compiler.reset()
    assert len(compiled) == 2  # a norm and an MLP, which all layers share
