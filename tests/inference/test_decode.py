"""Decoding: a row gets the same answer in any batch as alone, which is that of ``generate``."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llavar_peft import Chat, load_chat
from llavar_peft.errors import ConfigError, DataError, WeightsError
from llavar_peft.inference.batch_decoder import DecodingBatch, Row, answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer, PromptImage, Request, encode_messages
from llavar_peft.inference.token_sampling import Sampling, choose_tokens, new_generator
from tests.inference.reference import greedy_answers

QUESTIONS = ("Read.", "What does the sign say?", "Total?", "Who wrote it, and when? Be exact.", "Name the author.")
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def make_requests(engine: Engine, images: Sequence[Path], sampling: Sampling = GREEDY) -> list[Request]:
    """Return requests, every third without an image, one with an image of another size, of several lengths."""
    made = []
    for index, question in enumerate(QUESTIONS):
        mode = "keep" if index == 1 else None
        shown = [] if index % 3 == 2 else [PromptImage.prepare(images[index], engine.processor, mode)]
        tokens = shown[0].tokens if shown else None
        ids = engine.processor.encode_question(question, image=bool(shown), num_image_tokens=tokens)[0]
        own = replace(sampling, max_new_tokens=sampling.max_new_tokens if index else 1)
        made.append(Request(ids=ids, images=shown, sampling=own))
    return made


def by_generate(engine: Engine, request: Request) -> tuple[int, ...]:
    shown: dict[str, Any] = {"pixel_values": torch.stack([p.pixels for p in request.images])} if request.images else {}
    with torch.inference_mode():
        ids = engine.base_model.generate(
            input_ids=request.ids[None], do_sample=False, max_new_tokens=request.sampling.max_new_tokens, **shown
        )
    return tuple(ids[0, len(request.ids) :].tolist())


def run(batch: DecodingBatch) -> None:
    while batch.rows:
        batch.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*cache.*:FutureWarning")  # the argument was renamed in transformers
@pytest.mark.parametrize("kind", ["engine", "nf4_engine"])
def test_any_batch_answers_as_generate(kind: str, images: list[Path], request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(kind)
    requests = make_requests(engine, images)
    expected = [by_generate(engine, each) for each in requests]
    assert len({len(ids) for ids in expected}) > 1
    for size in (1, 2, 5):
        answers = answer_all(engine, requests, batch_size=size)
        assert [answer.ids for answer in answers] == expected
    texts = engine.processor.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [answer.text for answer in answers] == [text.strip() for text in texts]
    assert [answer.prompt_tokens for answer in answers] == [len(each.ids) for each in requests]


def test_rows_come_and_go(engine: Engine, images: list[Path]) -> None:
    requests = make_requests(engine, images)
    expected = answer_all(engine, requests, batch_size=1)
    rows = [Row(each, engine) for each in requests]
    batch = DecodingBatch(engine)
    for row in (rows[2], rows[3], rows[0], rows[1], rows[4]):  # short and long prompts, into a running batch
        batch.join([row])
        batch.step()
    run(batch)
    assert [row.answer.ids for row in rows] == [answer.ids for answer in expected]


def test_finished_and_cancelled_rows_are_not_computed(engine: Engine, images: list[Path]) -> None:
    requests = [replace(each, sampling=GREEDY) for each in make_requests(engine, images)]
    requests[1] = replace(requests[1], sampling=replace(GREEDY, max_new_tokens=3))
    expected = answer_all(engine, requests, batch_size=1)
    sizes: list[int] = []
    hook = engine.base_model.lm_head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    rows = [Row(each, engine) for each in requests]
    batch = DecodingBatch(engine)
    batch.join(rows)
    batch.step()
    rows[4].cancelled = True
    run(batch)
    hook.remove()
    assert sum(sizes) == sum(len(row.ids) for row in rows)
    assert [row.answer.ids for row in rows[:4]] == [answer.ids for answer in expected[:4]]
    assert (rows[4].answer.finish_reason, rows[4].answer.ids) == ("cancelled", expected[4].ids[:2])


@pytest.mark.slow
def test_a_seeded_row_does_not_depend_on_its_batch(engine: Engine, images: list[Path]) -> None:
    hot = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=12, seed=3)
    requests = [replace(each, sampling=hot) for each in make_requests(engine, images)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = answer_all(engine, [*requests, make_requests(engine, images)[1]])
    assert torch.equal(before, torch.get_rng_state())
    alone = answer_all(engine, requests[::-1], batch_size=1)[::-1]
    assert [answer.ids for answer in together[:5]] == [answer.ids for answer in alone]
    assert together[5].ids == by_generate(engine, make_requests(engine, images)[1])  # greedy beside sampled
    other = answer_all(engine, [replace(requests[1], sampling=replace(hot, seed=4))])
    assert other[0].ids != alone[1].ids
    narrow = answer_all(engine, [replace(requests[1], sampling=replace(hot, top_p=1e-6))])
    assert narrow[0].ids == together[5].ids


def test_samples_follow_the_nucleus() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    sampling = Sampling(temperature=1.0, top_p=0.8, seed=1)
    generator = new_generator(sampling)
    draws = 4000
    drawn, _ = choose_tokens(probabilities.log().expand(draws, -1), [sampling] * draws, [generator] * draws)
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / draws
    # 0.4 and 0.3 are not enough for 0.8; 0.15 makes it full.
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.4, 0.15, 0.3, 0.0]) / 0.85, atol=0.03, rtol=0)
    # Of the two likeliest alone, 0.4 is less than 0.6.
    for top_p, expected in ((1.0, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]), (0.5, [0.0, 1.0, 0.0, 0.0, 0.0])):
        two = replace(sampling, top_k=2, top_p=top_p)
        drawn, _ = choose_tokens(probabilities.log().expand(draws, -1), [two] * draws, [generator] * draws)
        shares = torch.bincount(torch.tensor(drawn), minlength=5) / draws
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.03, rtol=0)
    tiny = Sampling(temperature=1e-6, seed=1)
    assert choose_tokens(probabilities.log()[None] * 1e3, [tiny], [generator])[0] == [1]


def test_top_k_is_that_of_the_original() -> None:
    """The tokens are those of transformers' filters, with ties at the limit; 0 means all."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    free_BV = torch.randn(3, 200).repeat_interleave(400, 0)
    generator = new_generator(Sampling(seed=2))
    for top_k, top_p in ((50, 1.0), (50, 0.9), (7, 1.0), (0, 1.0), (1000, 1.0)):
        sampling = Sampling(temperature=2.0, top_k=top_k, top_p=top_p)
        # Of tied tokens a nucleus may hold any.
        logits_BV = free_BV if top_p < 1 else free_BV.mul(4).round().div(4)
        drawn, _ = choose_tokens(logits_BV, [sampling] * 1200, [generator] * 1200)
        kept_BV = TopKLogitsWarper(top_k or 200)(None, logits_BV / 2)
        kept_BV = TopPLogitsWarper(top_p)(None, kept_BV) if top_p < 1 else kept_BV
        assert bool(kept_BV.gather(1, torch.tensor(drawn)[:, None]).isfinite().all())
        assert len(set(drawn[:400])) > min(top_k or 200, 50) // 2
    assert Sampling().top_k == 50


def test_logprobs_are_the_models(engine: Engine, images: list[Path]) -> None:
    asked = replace(make_requests(engine, images)[1], sampling=replace(GREEDY, logprobs=True))
    plain = make_requests(engine, images)[2]
    answer, without = answer_all(engine, [asked, plain])
    assert without.logprobs is None
    whole = torch.cat([asked.ids, torch.tensor(answer.ids)])[None]
    with torch.inference_mode():
        logits = engine.base_model(input_ids=whole, pixel_values=torch.stack([p.pixels for p in asked.images])).logits
    expected = logits.log_softmax(-1)[0, len(asked.ids) - 1 : -1].gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)


def _streamed(engine: Engine, request: Request) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    row = Row(request, engine, pieces.append)
    batch = DecodingBatch(engine)
    batch.join([row])
    run(batch)
    assert row.answer is not None
    return row.answer, pieces


def test_stop_texts_end_the_answer_and_are_never_shown(engine: Engine, images: list[Path]) -> None:
    request = replace(make_requests(engine, images)[3], sampling=replace(GREEDY, max_new_tokens=24))
    answer, pieces = _streamed(engine, request)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    stop = answer.text[4:7]
    cut, shown = _streamed(engine, replace(request, sampling=replace(request.sampling, stop=("never", stop))))
    assert cut.text == "".join(shown) == answer.text[: answer.text.find(stop)].rstrip()
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < answer.completion_tokens


def test_the_context_is_a_limit(engine: Engine) -> None:
    full = torch.ones(engine.context, dtype=torch.int64)
    with pytest.raises(DataError, match="has 2048 tokens, the model's context 2048"):
        Row(Request(ids=full), engine)
    (answer,) = answer_all(engine, [Request(ids=full[:-2], sampling=replace(GREEDY, stop=("never",)))])
    assert answer.completion_tokens <= 2


def test_what_cannot_be_answered_is_rejected(engine: Engine, images: list[Path]) -> None:
    request = make_requests(engine, images)[0]
    with pytest.raises(DataError, match="image tokens for images of 0"):
        Row(replace(request, images=()), engine)
    with pytest.raises(ConfigError, match="no adapter is named 'receipts'"):
        Row(replace(request, adapter="receipts"), engine)
    wrong: tuple[dict[str, Any], ...] = (
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    )
    for settings in wrong:
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}: got"):
            Sampling(**settings)


def _changed(engine: Engine) -> Engine:
    """Return an engine on a copy of the model with an adapter in training."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    return Engine(get_peft_model(copy.deepcopy(engine.base_model), config).eval(), engine.processor, training=True)


@pytest.mark.slow
def test_a_model_in_training_answers_as_generate_and_stays_trainable(engine: Engine, images: list[Path]) -> None:
    torch.manual_seed(0)
    training = _changed(engine)
    asked = [(question, None if index % 3 == 2 else images[index]) for index, question in enumerate(QUESTIONS)]
    expected = greedy_answers(training.model, training.processor, *zip(*asked, strict=True), max_new_tokens=12)
    trainable = [name for name, parameter in training.model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    chat = Chat(training)
    requests = [chat.request(image, question, sampling=GREEDY) for question, image in asked]
    for size in (1, 2, 5):
        assert [answer.text for answer in chat.answer(requests, batch_size=size)] == expected
    assert torch.equal(state, torch.get_rng_state())
    assert trainable == [name for name, parameter in training.model.named_parameters() if parameter.requires_grad]
    assert not any(image.features for each in requests for image in each.images)
    training.model(input_ids=requests[2].ids[None]).logits.sum().backward()


def test_ranks_that_are_done_take_part_in_the_steps_of_others(
    engine: Engine, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded model gathers its weights in each step, so the others would wait forever."""
    training = _changed(engine)
    calls: list[int] = []
    left = iter([True, True])
    monkeypatch.setattr(Engine, "any_rank", lambda self, flag: flag or next(left, False))
    monkeypatch.setattr(Engine, "_distributed", lambda self: True)
    (request,) = make_requests(engine, images)[1:2]
    training.model.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    (answer,) = answer_all(training, [request])
    assert len(calls) == len(answer.ids) + 2


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_answers_are_the_originals(batch_size: int, shared_dir: Path) -> None:
    """Ids of LLaVAR's own run_llava: shared/golden/generate."""
    golden = shared_dir / "golden"
    if not golden.is_dir():
        pytest.skip(f"the original's outputs are not at {golden}")
    tower = str(golden / "model/clip-tiny-336")
    chat = load_chat(golden / "model/llava-tiny-v1", vision_tower=tower, dtype="float32", device="cpu")
    cases = json.loads((golden / "generate/generate.json").read_text())
    pixels = np.load(golden / "generate/pixels_fp16.npz")
    processor = chat.engine.processor
    requests = []
    for case in cases:
        image = PromptImage(torch.tensor(pixels[case["pixel_key"]]).float(), processor.num_image_tokens)
        ids = encode_messages(processor, [("human", [f"{case['query']}\n", None])], [image])
        assert ids.tolist() == case["input_ids"]
        requests.append(Request(ids=ids, images=[image], sampling=Sampling(temperature=0.0, max_new_tokens=24)))
    answers = chat.answer(requests, batch_size=batch_size)
    assert [list(answer.ids) for answer in answers] == [case["new_ids"] for case in cases]


def test_logits_that_are_no_numbers_are_named_where_tokens_are_drawn() -> None:
    logits_BV = torch.randn(2, 5)
    logits_BV[1] = torch.nan
    samplings = [Sampling(temperature=1.0)] * 2
    with pytest.raises(WeightsError, match="computes logits that are no numbers"):
        choose_tokens(logits_BV, samplings, [new_generator(one) for one in samplings])
