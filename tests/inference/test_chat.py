"""``load_chat``: questions, streams, conversations, and several adapters on one base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llavar_peft import Chat, ModelConfig, build_model, load_chat
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.encode_record import encode_record
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import PromptImage, Request, encode_messages
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.recipe.schema import Lora
from tests.inference.reference import greedy_answers
from tests.weights.adapters import save_moved_adapter

GREEDY = {"temperature": 0.0, "max_new_tokens": 10}
_ADAPTERS = {
    "with rows": Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True),
    "v1.5 without projector": Lora(rank=2, alpha=8, dropout=0.0, train_projector=False, target="mlp"),
    "dora": Lora(rank=4, alpha=8, dropout=0.0, variant="dora"),
}


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    for seed, (name, tune) in enumerate(_ADAPTERS.items()):
        save_moved_adapter(folder / name, base, tune, seed=seed, by=0.05)
    return {name: folder / name for name in _ADAPTERS}


@pytest.fixture(scope="module")
def chat(engine: Engine) -> Chat:
    return Chat(engine)


@dataclass
class Work:
    """What a model computed."""

    images: int = 0
    positions: list[int] = field(default_factory=list)


@contextmanager
def watched(engine: Engine) -> Iterator[Work]:
    work = Work()

    def looked(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        work.images += len(inputs[0])

    def thought(_: object, inputs: object, named: dict[str, torch.Tensor]) -> None:
        work.positions.append(named["inputs_embeds"].shape[0] * named["inputs_embeds"].shape[1])

    plain = engine.base_model.model
    hooks = [
        plain.vision_tower.register_forward_pre_hook(looked),
        plain.language_model.register_forward_pre_hook(thought, with_kwargs=True),
    ]
    yield work
    for hook in hooks:
        hook.remove()


def test_ask_and_stream_answer_as_generate(checkpoint: Path, images: list[Path]) -> None:
    chat = load_chat(checkpoint)
    model, processor = chat.engine.base_model, chat.engine.processor
    (expected,) = greedy_answers(model, processor, ["Read."], [images[0]], max_new_tokens=10)
    assert chat.ask(images[0], "Read.", **GREEDY) == expected
    pieces = list(chat.stream(images[0], "Read.", **GREEDY))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    hot = {"temperature": 1.5, "max_new_tokens": 10}
    assert chat.ask(None, "Read.", seed=1, **hot) == "".join(chat.stream(None, "Read.", seed=1, **hot))
    assert chat.ask(None, "Read.", seed=1, **hot) != chat.ask(None, "Read.", seed=2, **hot)


def test_prompts_are_the_processors(chat: Chat, images: list[Path]) -> None:
    """Whatever the user types stays text: only our own image and our own end of an answer are tokens."""
    words = "a </s> b <im_patch><im_start> <image> USER: ASSISTANT: <s>"
    processor = chat.engine.processor
    request = chat.request(images[0], words)
    assert request.ids.tolist() == processor.encode_question(words)[0].tolist()
    vocabulary = processor.tokenizer.get_vocab()
    count = {name: request.ids.tolist().count(vocabulary[name]) for name in ("</s>", "<im_start>", "<im_patch>", "<s>")}
    assert count == {"</s>": 0, "<im_start>": 1, "<im_patch>": processor.num_image_tokens, "<s>": 1}


@pytest.mark.parametrize("image_first", [False, True])
def test_a_question_is_written_as_the_records_are_on_which_the_model_was_trained(
    image_first: bool, chat: Chat, images: list[Path]
) -> None:
    processor = chat.engine.processor
    asked = "<image>\nRead." if image_first else "Read.\n<image>"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "No."}]
    example = encode_record({"image": "a.png", "conversations": turns}, processor, 2048)
    request = chat.request(images[0], "Read.", image_first=image_first)
    (answer,) = (example.labels != IGNORE_INDEX).nonzero()[:1, 0].tolist()
    assert request.ids.tolist() == example.input_ids[:answer].tolist()
    with_image, without = (chat.request(shown, "Read.", image_first=True).ids for shown in (images[0], None))
    assert len(with_image) > len(without)


def _fresh(chat: Chat, turns: list[tuple[str, Path | Image.Image | None, str]], adapter: str | None = None) -> str:
    """The last of these turns asked with the whole conversation as one new prompt."""
    processor = chat.engine.processor
    shown = [None if image is None else PromptImage.prepare(image, processor) for _, image, _ in turns]
    messages = []
    for (words, _, answer), opened in zip(turns, shown, strict=True):
        messages.append(("human", [words] if opened is None else [f"{words}\n", None]))
        messages.append(("gpt", [answer]))
    there = [opened for opened in shown if opened is not None]
    ids = encode_messages(processor, messages[:-1], there)
    (answer,) = chat.answer([Request(ids=ids, images=there, sampling=Sampling(**GREEDY), adapter=adapter)])
    return answer.text


def test_images_are_taken_in_each_natural_form(chat: Chat, images: list[Path]) -> None:
    opened = Image.open(images[0]).convert("RGB")
    expected = chat.request(images[0], "Read.").images[0].pixels
    for form in (str(images[0]), opened, images[0].read_bytes(), np.asarray(opened)):
        assert torch.equal(chat.request(form, "Read.").images[0].pixels, expected)


@pytest.mark.parametrize("form", [3, torch.zeros(3, 8, 8), np.zeros((8, 8, 3)), {"image": "a.png"}])
def test_other_forms_of_an_image_are_named(form: Any, chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"image: got .*, expected a path, a Pillow image, the bytes of a file"):
        chat.ask(form, "Read.")


def test_a_list_of_images_is_shown_in_one_question(chat: Chat, images: list[Path]) -> None:
    request = chat.request(images[:2], "Compare.")
    turn = ("human", ["Compare.\n", None, None])
    both = [PromptImage.prepare(image, chat.engine.processor) for image in images[:2]]
    assert torch.equal(request.ids, encode_messages(chat.engine.processor, [turn], both))
    assert [image.pixels.sum() for image in request.images] == [image.pixels.sum() for image in both]
    assert chat.ask(images[:2], "Compare.", **GREEDY) == chat.conversation(images[:2]).send("Compare.", **GREEDY)
    assert not len(chat.request([], "Hello?").images)


def test_values_are_readable_in_a_notebook(chat: Chat, images: list[Path]) -> None:
    request = chat.request(images[0], "Read.", sampling=Sampling(max_new_tokens=20))
    talk = chat.conversation(images[0])
    talk.send("Read.", **GREEDY)
    for value in (chat, request, chat.answer([request])[0], talk, talk.turns, request.images[0]):
        lines = repr(value).splitlines()
        assert len(lines) <= 25
        assert max(map(len, lines)) <= 120
    assert "float32 on cpu" in repr(chat)


def test_a_conversation_computes_nothing_twice(chat: Chat, images: list[Path], page: Image.Image) -> None:
    talk = chat.conversation(images[0])
    said: list[tuple[str, Path | Image.Image | None, str]] = []
    questions = [("Read.", None), ("And the second word?", None), ("What is this?", page), ("Both?", None)]
    for number, (words, image) in enumerate(questions):
        with watched(chat.engine) as work:
            answer = talk.send(words, image, **GREEDY)
        seen = image if number else images[0]
        said.append((words, seen, answer))
        assert answer == _fresh(chat, said)
        assert work.images == (seen is not None)
        # The words, the roles, </s>, the last token of the answer before; and a new image's tokens.
        longest = len(words) + 40 + (chat.engine.processor.num_image_tokens if seen is not None else 0)
        if number:
            assert work.positions[0] <= longest
        assert all(count == 1 for count in work.positions[1:])
        assert len(work.positions) <= GREEDY["max_new_tokens"]
    assert len({answer for _, _, answer in said}) > 1
    assert [turn.answer for turn in talk.turns] == [answer for _, _, answer in said]
    talk.clear()
    assert talk.send("Read.", **GREEDY) == chat.ask(None, "Read.", **GREEDY)


def test_another_image_in_the_same_place_is_used(chat: Chat, images: list[Path]) -> None:
    talk = chat.conversation(images[0])
    first = talk.send("Read.", **GREEDY)
    talk.turns.pop()
    second = talk.send("Read.", images[3], **GREEDY)
    assert second == chat.ask(images[3], "Read.", **GREEDY) != first


def test_a_cancelled_answer_is_kept_so_far(chat: Chat, images: list[Path]) -> None:
    talk = chat.conversation(images[1])
    stream = talk.stream("Read.", **GREEDY)
    begun = next(stream)
    stream.close()
    (turn,) = talk.turns
    assert turn.answer.startswith(begun)
    again = talk.send("Go on.", **GREEDY)
    assert again == _fresh(chat, [("Read.", images[1], turn.answer), ("Go on.", None, "")])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stream = talk.stream("More.", **GREEDY)
    next(stream)
    hook = chat.engine.base_model.model.language_model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(stream)  # in the middle of a step
    hook.remove()
    said = [("Read.", images[1], turn.answer), ("Go on.", None, again), ("More.", None, talk.turns[-1].answer)]
    assert talk.send("And?", **GREEDY) == _fresh(chat, [*said, ("And?", None, "")])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_are_switched_as_if_each_were_alone(
    quantize: str | None, checkpoint: Path, adapters: dict[str, Path], images: list[Path]
) -> None:
    names: list[str | None] = [None, *adapters, None, "dora", "with rows"]
    both = load_chat(checkpoint, adapters, quantize=quantize, device="cpu")
    assert both.adapters == tuple(adapters)
    ids = both.request(images[0], "Read.").ids[None]
    pixels = PromptImage.prepare(images[0], both.engine.processor).pixels[None]

    def logits(chat: Chat, name: str | None) -> torch.Tensor:
        chat.engine.use(name)
        with torch.inference_mode():
            return chat.engine.base_model(input_ids=ids, pixel_values=pixels).logits[0, -40:]

    alone: dict[str | None, torch.Tensor] = {}
    answers: dict[str | None, str] = {}
    for name in (None, *adapters):
        one = load_chat(checkpoint, None if name is None else adapters[name], quantize=quantize, device="cpu")
        alone[name] = logits(one, one.resolve_adapter(...))
        answers[name] = one.ask(images[0], "Read.", **GREEDY)
    for name in names:
        torch.testing.assert_close(logits(both, name), alone[name], atol=1e-5, rtol=1e-5)
    distances = [float((alone[a] - alone[b]).abs().max()) for a in alone for b in alone if str(a) < str(b)]
    assert min(distances) > 1e-2
    requests = [both.request(images[0], "Read.", adapter=name, sampling=Sampling(**GREEDY)) for name in names]
    assert [answer.text for answer in both.answer(requests)] == [answers[name] for name in names]
    assert both.ask(images[0], "Read.", **GREEDY) == answers["with rows"]  # the first, if a call says nothing


def test_a_conversation_changes_its_adapter(checkpoint: Path, adapters: dict[str, Path], images: list[Path]) -> None:
    chat = load_chat(checkpoint, adapters)
    talk = chat.conversation(images[0], adapter=None)
    first = talk.send("Read.", **GREEDY)
    talk.adapter = "with rows"
    with watched(chat.engine) as work:
        second = talk.send("Again.", **GREEDY)
    assert work.images == 1  # another projector
    said = [("Read.", images[0], first), ("Again.", None, second)]
    assert second == _fresh(chat, said, "with rows")
    talk.adapter = None
    with watched(chat.engine) as work:
        third = talk.send("Again.", **GREEDY)
    assert work.images == 0  # seen before
    assert third == _fresh(chat, [*said, ("Again.", None, "")])


@pytest.mark.slow
def test_what_cannot_be_loaded_is_rejected(checkpoint: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32", quantize="nf4")
    save_moved_adapter(other, base, Lora(rank=2, alpha=4, dropout=0.0))
    with pytest.raises(ConfigError, match="stored differently"):
        load_chat(checkpoint, {"one": adapters["dora"], "two": other})
    assert load_chat(other).adapters == ("other",)  # knows its base, and that it was in 4 bits
    with pytest.raises(ConfigError, match="no adapter is named 'nothing'"):
        load_chat(checkpoint, adapters["dora"]).ask(None, "Read.", adapter="nothing")
    chat = load_chat(checkpoint)
    with torch.no_grad():
        next(chat.engine.base_model.model.language_model.parameters()).add_(0.1)
    chat.engine.base_model.save_pretrained(tmp_path / "moved")
    chat.engine.processor.save_pretrained(tmp_path / "moved")
    with pytest.raises(WeightsError):
        load_chat(tmp_path / "moved", adapters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, expected a whole number"),
        ({"seed": "7"}, "seed: got '7', expected a whole number"),
    ],
)
def test_sampling_of_another_type_is_named(settings: dict[str, Any], message: str, chat: Chat) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.ask(None, "Read.", **settings)


def test_numbers_of_numpy_are_numbers(chat: Chat) -> None:
    assert chat.ask(None, "Hi", temperature=np.float32(0.0), max_new_tokens=np.int64(1)) is not None


def test_a_question_is_text(chat: Chat) -> None:
    question: Any = 3
    with pytest.raises(ConfigError, match="question: got int, expected a string"):
        chat.ask(None, question)
    with pytest.raises(ConfigError, match="question: missing"):
        chat.ask(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp16"}, "model.dtype: unknown value .got 'fp16', expected one of 'auto', 'float32'"),
        ({"attention": "flash"}, "model.attention: unknown value"),
        ({"quantize": "4bit"}, "model.quantize: unknown format"),
        ({"device": "gpu"}, "device: 'gpu' is not usable here"),
        ({"adapter": ["a", "b"]}, "adapter: got list, expected a folder, or a mapping"),
    ],
)
def test_unknown_settings_are_named(settings: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_chat(checkpoint, **settings)


def test_a_model_is_built_from_a_configuration(checkpoint: Path) -> None:
    source: Any = str(checkpoint)
    with pytest.raises(ConfigError, match=r"expected a ModelConfig \(got str\). Fix: pass ModelConfig\(checkpoint="):
        build_model(source)
