"""Decoding with flash-attention, replaced by the same sums in PyTorch, gives the answers that SDPA gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from tests.flash_attention import put_flash_attention, use_attention
from tests.inference.test_decode import by_generate, make_requests

FLOAT32 = (torch.float32,)


@pytest.mark.parametrize("after_training", [False, True])
def test_answers_are_those_of_sdpa(
    engine: Engine, images: list[Path], after_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, cached steps, unequal prompts in a batch, a second turn on a kept prefix, and ``generate``."""

    def answers(one: Engine) -> tuple[list[Answer], list[Answer]]:
        requests = [replace(each, keep_prefix=True) for each in make_requests(one, images)]
        made = answer_all(one, requests)
        ids = torch.cat([requests[1].ids, torch.tensor([*made[1].ids[:-1], 5, 6, 7])])
        prefix = made[1].prefix
        assert prefix is not None
        shared = prefix.shared_with(ids, requests[1].images, one.processor.image_token_id)
        return made, answer_all(one, [replace(requests[1], ids=ids, prefix=shared)])

    expected, expected_second = answers(engine)
    model = copy.deepcopy(engine.base_model)
    calls = put_flash_attention(monkeypatch, dtypes=FLOAT32)
    use_attention(model, "flash_attention_2")
    if after_training:
        assert enable_packing(model)
        row = {"input_ids": torch.arange(3, 10)[None], "use_cache": False}
        model(**row, **packed_arguments((3, 4), model, torch.device("cpu")))
    other = Engine(model, engine.processor)
    got, second = answers(other)
    assert [answer.ids for answer in got] == [answer.ids for answer in expected]
    assert [answer.ids for answer in second] == [answer.ids for answer in expected_second]
    assert any(answer.ids for answer in second)
    requests = make_requests(other, images)
    for index in (1, 2):
        assert by_generate(other, requests[index]) == expected[index].ids
    # A batch of unequal prompts is computed without its padding.
    assert any(ends is not None for ends in calls.of(causal=True))
    assert all(ends is None for ends in calls.of(causal=False))
