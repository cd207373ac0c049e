"""Decoders of other constructions than LLaMA's, and mixtures of experts: what parts promise, or a refusal by name.

``LLAVAR_DECODERS=all`` tests every family that ``AutoModelForCausalLM`` opens; with ``-s`` it prints the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llavar_peft import Full, Lora, ModelConfig, build_model, export, load_adapter, merge_adapter
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.errors import ConfigError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import PromptImage, Request
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.chunked_loss import summed_cross_entropy
from llavar_peft.models.decoder_structure import check_length, check_linear
from llavar_peft.models.linear_layers import choose_targets, find_linear_layers
from llavar_peft.models.packed_attention import disable_packing, enable_packing, packed_arguments
from llavar_peft.models.packing_probe import keeps_segments_apart
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.training.save_weights import save_trained
from tests.parts.tiny_decoders import make_config, save_decoder

Folder = Callable[[str], str]
# Whether rows are packed, and whether stock LLaVA opens the model.
EXPECTED = {
    "mixtral": (True, True),  # experts that are stored one by one
    "deepseek_v3": (True, True),  # latent attention, a buffer that decides about experts, a first layer without them
    "gpt_oss": (False, True),  # experts of a layer that are stored as one, a bias in each; attention with sinks
    "gpt_neox": (True, True),  # other names, of which one is not that of its module
    "phi": (True, False),  # a head with a bias
    "opt": (True, False),  # learned positions, in a decoder within the decoder
    "qwen3_next": (False, True),  # a state in some layers, which cannot be cut: rows are computed again for each token
    "falcon": (False, False),  # attention of its own, embeddings that are tied under another name
}
_ALL = os.environ.get("LLAVAR_DECODERS") == "all"
_TEXTS = ("What is written on the sign? The sign?", "The total?", "What is total?")
_LORA = Lora(rank=2, alpha=4, dropout=0.0)


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if _ALL else EXPECTED)
def test_what_parts_promise(kind: str, tower: Folder, tmp_path: Path) -> None:
    expected = EXPECTED.get(kind)
    try:
        folder = save_decoder(kind, tmp_path / "language_model")
    except Exception as error:
        if expected is not None:
            raise
        pytest.skip(f"{kind} cannot be made tiny: {error}")
    parts = ModelConfig(language_model=str(folder), vision_tower=tower("clip_vision_model"), dtype="float32")
    try:
        built = build_model(parts)
    except ConfigError as error:
        if expected is not None:
            raise
        print(f"{kind}: {error}")  # noqa: T201
        return
    found = _check_decoder(parts, built, tmp_path)
    print(f"{kind}: packed {found[0]}, in stock LLaVA {found[1]}")  # noqa: T201
    assert expected in (None, found)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "doge", "minimax"])
def test_rows_are_padded_where_a_decoder_would_mix_conversations(kind: str) -> None:
    """Attention of its own; layers that lose arguments; a mask of its own; a state. The first two were packed."""
    assert not keeps_segments_apart(make_config(kind))


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [("mixtral", "experts.gate_up_proj"), ("falcon", "dense_h_to_4h"), ("gpt2", "c_fc"), ("qwen2", None)],
)
def test_a_format_that_would_leave_matrices_as_they_are_is_rejected(kind: str, matrix: str | None) -> None:
    if matrix is None:
        check_linear(make_config(kind), "nf4")
        return
    with pytest.raises(ConfigError, match=f"nf4 quantizes linear layers only.*{kind}.*{matrix}"):
        check_linear(make_config(kind), "nf4")


def test_adapters_are_added_neither_to_routers_nor_to_experts() -> None:
    """Phi's routers are linear layers that return a choice of experts."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(make_config("phimoe"))
    blocks = find_linear_layers(decoder)
    assert list(blocks) == ["self_attn"]
    with pytest.raises(ConfigError, match=r"no linear layers of the language model belong to this group .got 'mlp'"):
        choose_targets(Lora(target="mlp"), blocks)


def test_records_that_are_longer_than_the_learned_positions_are_rejected() -> None:
    with torch.device("meta"):
        learned, rotary = (AutoModel.from_config(make_config(kind)) for kind in ("opt", "gpt_neox"))
    check_length(learned, 512)
    check_length(rotary, 5000)
    with pytest.raises(ConfigError, match=r"'opt' has learned positions for .got 513, expected at most 512"):
        check_length(learned, 513)


def test_the_loss_of_a_head_with_a_bias_is_that_of_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    bias, targets = torch.randn(11, requires_grad=True), torch.randint(0, 11, (7,))
    loss = summed_cross_entropy(hidden, weight, targets, bias_V=bias, chunk=3)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def _check_decoder(parts: ModelConfig, built: tuple[Any, Any], folder: Path) -> tuple[bool, bool]:
    model, processor = built
    rows = [processor.encode_question(text)[0] for text in _TEXTS]
    pixels = torch.randn(len(rows), 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = processor.encode_question(_TEXTS[0] * 2, image=False)
    stock = AutoModelForCausalLM.from_pretrained(parts.language_model, attn_implementation="eager", dtype="float32")
    theirs = _logits(stock, {"input_ids": ids})
    torch.testing.assert_close(_logits(model, {"input_ids": ids})[..., : theirs.shape[-1]], theirs, atol=1e-5, rtol=0)
    packed = _check_batches(model, rows, pixels)
    _check_answers(model, processor, rows, pixels)
    inputs = {"input_ids": rows[0][None], "pixel_values": pixels[:1]}
    if any(isinstance(module, torch.nn.Linear) for module in model.model.language_model.modules()):
        _check_lora(parts, inputs, folder)
    return packed, _check_full(model, processor, inputs, folder)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model.eval()(**inputs, use_cache=False).logits
    return found


def _targets(row: Tensor) -> Tensor:
    return torch.cat([row[1:], torch.tensor([IGNORE_INDEX])])


def _loss_of(model: Any, arguments: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**arguments, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def _check_batches(model: Any, rows: list[Tensor], pixels: Tensor) -> bool:
    """Check loss and gradients of padded rows and, where there are any, packed ones against those of single rows."""
    singles = [
        {"input_ids": row[None], "pixel_values": pixels[i : i + 1], "targets": _targets(row)[None]}
        for i, row in enumerate(rows)
    ]
    found = [_loss_of(model, one) for one in singles]
    loss = sum(one for one, _ in found)
    expected = {
        name: torch.stack([gradients[name] for _, gradients in found if name in gradients]).sum(dim=0)
        for name in {name for _, gradients in found for name in gradients}
    }
    width = max(map(len, rows))

    def padded(row: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(row, (0, width - len(row)), value=value)

    batches: list[dict[str, Any]] = [
        {
            "input_ids": torch.stack([padded(row, 0) for row in rows]),
            "targets": torch.stack([padded(_targets(row), IGNORE_INDEX) for row in rows]),
            "attention_mask": torch.stack([padded(torch.ones_like(row), 0) for row in rows]),
        }
    ]
    can_pack = enable_packing(model)
    if can_pack:
        lengths = tuple(map(len, rows))
        batches.append(
            {
                "input_ids": torch.cat(rows)[None],
                "targets": torch.cat([_targets(row) for row in rows])[None],
                **packed_arguments(lengths, model, torch.device("cpu")),
            }
        )
    largest = max(float(one.abs().max()) for one in expected.values())
    for batch in batches:
        got, gradients = _loss_of(model, {**batch, "pixel_values": pixels})
        assert got == pytest.approx(loss, rel=1e-5)
        for name, one in expected.items():
            torch.testing.assert_close(gradients[name], one, atol=2e-5 * largest, rtol=1e-4, msg=name)
    disable_packing(model)
    return can_pack


def _check_answers(model: Any, processor: Any, rows: list[Tensor], pixels: Tensor) -> None:
    """Check that rows that are decoded together get the answers that each gets alone, without a cache."""
    sampling = Sampling(temperature=0.0, max_new_tokens=3)
    requests = [
        Request(ids=row, images=[PromptImage(pixels[i], processor.num_image_tokens)], sampling=sampling)
        for i, row in enumerate(rows)
    ]
    for i, answer in enumerate(answer_all(Engine(model.eval(), processor), requests)):
        sequence = rows[i]
        for token in answer.ids:
            logits = _logits(model, {"input_ids": sequence[None], "pixel_values": pixels[i : i + 1]})
            assert int(logits[0, -1].argmax()) == token
            sequence = torch.cat([sequence, torch.tensor([token])])


def _step(model: Any, inputs: dict[str, Any]) -> None:
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the first step of an adapter moves its second matrix only
        _loss_of(model.train(), {**inputs, "targets": _targets(inputs["input_ids"][0])[None]})
        optimizer.step()


def _check_full(model: Any, processor: Any, inputs: dict[str, Any], folder: Path) -> bool:
    """Check a step of full tuning, the saved model, and its export. Return whether stock LLaVA can have the model."""
    before = {name: one.clone() for name, one in model.state_dict().items()}
    tuned = apply_tuning(model, Full())
    _step(tuned, inputs)
    moved = {name for name, one in tuned.state_dict().items() if not torch.equal(one, before[name])}
    matrices = {name for name, one in before.items() if one.ndim > 1 and "language_model" in name}
    assert matrices - moved <= {name for name in matrices if "embed_positions" in name or "wpe" in name}
    logits = _logits(tuned, inputs)
    tuned.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    saved = ModelConfig(checkpoint=str(folder / "model"), dtype="float32")
    assert torch.equal(_logits(build_model(saved)[0], inputs), logits)
    try:
        export(folder / "model", folder / "stock", to="hf-llava")
    except ConfigError:
        return False
    stock, loading = AutoModelForImageTextToText.from_pretrained(
        folder / "stock", dtype="float32", output_loading_info=True
    )
    assert not any(loading.values())
    text = model.config.text_config
    if model.lm_head.factor is None and getattr(text, "final_logit_softcapping", None) is None:
        torch.testing.assert_close(_logits(stock, inputs), logits, atol=1e-4, rtol=1e-4)
    again = build_model(ModelConfig(checkpoint=str(folder / "stock"), dtype="float32"))[0]
    torch.testing.assert_close(_logits(again, inputs), logits, atol=1e-4, rtol=1e-4)
    return True


def _check_lora(parts: ModelConfig, inputs: dict[str, Any], folder: Path) -> None:
    """Check an adapter's steps, that it is loaded, and its merge onto the language model as it is on the hub."""
    base, processor = build_model(parts)
    wrapped = apply_tuning(base, _LORA)
    before = _logits(wrapped, inputs)
    _step(wrapped, inputs)
    logits = _logits(wrapped, inputs)
    assert not torch.allclose(logits, before, atol=1e-3)
    (folder / "adapter").mkdir()
    save_trained(wrapped, processor, folder / "adapter", state=wrapped.state_dict(), tune=_LORA, base=parts)
    assert torch.equal(_logits(load_adapter(parts, folder / "adapter"), inputs), logits)
    report = merge_adapter(base=str(parts.language_model), adapter=folder / "adapter", out=folder / "merged")
    assert report.gaps["result"].relative < 1e-4
    merged = build_model(ModelConfig(checkpoint=str(folder / "merged"), dtype="float32"))[0]
    torch.testing.assert_close(_logits(merged, inputs), logits, atol=1e-4, rtol=1e-4)
