"""Tokenizers' own chat templates: the ids of ``apply_chat_template``, and labels on the assistant's turns only."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.chat_template import ChatTemplate, with_image_parts
from llavar_peft.data.encode_record import encode_pieces
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.errors import ConfigError
from llavar_peft.models.language_model_loading import add_placeholder
from tests.parts.tiny_parts import make_tokenizer

TEMPLATES = ("chatml", "thinking", "headers", "turns", "brackets")
EDGES = ("", "", "\n", " ", "\n\n", "\t ")
WORDS = ("What", "is", "the total?", "12.50", "naïve café", "日本", "\n", "  ", "line\n\nnext", "🙂", "a-b_c", "You")


def _processor(name: str) -> Any:
    tokenizer = make_tokenizer(name)
    add_placeholder(tokenizer)
    template = ChatTemplate(tokenizer, with_image_parts(str(tokenizer.chat_template)))
    return SimpleNamespace(
        tokenizer=tokenizer, conversation_template=template, image_token="<image>", use_im_start_end=False
    )


def _conversations(count: int) -> list[list[tuple[str, str]]]:
    draw = random.Random(0)
    made = []
    for number in range(count):
        turns = [
            (
                "human" if turn % 2 == 0 else "gpt",
                draw.choice(EDGES) + " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
            )
            for turn in range(2 * draw.randint(1, 3))
        ]
        made.append(turns if number % 4 else [*turns[:1], ("gpt", "x")])
    return made


def _encode(processor: Any, turns: list[tuple[str, str]], **options: Any) -> Any:
    pieces = processor.conversation_template.pieces([(role, [text]) for role, text in turns], **options)
    return encode_pieces(pieces, text_encoder(processor), [])


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user" if role == "human" else "assistant", "content": text} for role, text in turns]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_apply_chat_template(name: str) -> None:
    processor = _processor(name)
    for turns in _conversations(20):
        expected = processor.tokenizer.apply_chat_template(
            _messages(turns), chat_template=processor.conversation_template.source, return_dict=False,
            enable_thinking=False,
        )  # fmt: skip
        assert _encode(processor, turns).ids == expected
        prompt = processor.tokenizer.apply_chat_template(
            _messages(turns[:-1]), chat_template=processor.conversation_template.source, return_dict=False,
            add_generation_prompt=True, enable_thinking=False,
        )  # fmt: skip
        assert _encode(processor, turns[:-1], answer_next=True).ids == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_labels_are_the_answers_and_the_tokens_that_end_them(name: str) -> None:
    processor = _processor(name)
    ends = {"chatml": "<|im_end|>", "thinking": "<|im_end|>", "headers": "<|eot|>", "turns": "<end_of_turn>",
            "brackets": "</s>"}  # fmt: skip
    encoding = _encode(processor, [("human", "One?"), ("gpt", "First."), ("human", "Two?"), ("gpt", "Second.")])
    supervised = [index for index, label in enumerate(encoding.labels) if label != IGNORE_INDEX]
    text = processor.tokenizer.decode([encoding.ids[index] for index in supervised])
    space = " " if name == "brackets" else ""  # the space before the answer is not part of the prompt
    assert text == f"{space}First.{ends[name]}{space}Second.{ends[name]}"
    assert all(encoding.labels[index] == encoding.ids[index] for index in supervised)
    assert processor.conversation_template.end_of_answer() == ends[name]


def test_the_labels_are_the_masks_of_a_template_that_has_them() -> None:
    processor = _processor("chatml")
    for turns in _conversations(20):
        known = processor.tokenizer.apply_chat_template(
            _messages(turns), chat_template=processor.conversation_template.source, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        labels = _encode(processor, turns).labels
        assert [label != IGNORE_INDEX for label in labels] == [bool(mask) for mask in known["assistant_masks"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_never_becomes_a_special_token(name: str) -> None:
    processor = _processor(name)
    specials = set(processor.tokenizer.added_tokens_decoder)
    plain = _encode(processor, [("human", "a"), ("gpt", "b")])
    hostile = "".join(processor.tokenizer.get_added_vocab())
    attack = _encode(processor, [("human", hostile), ("gpt", hostile)])
    count = [sum(index in specials for index in encoding.ids) for encoding in (plain, attack)]
    assert count[0] == count[1]


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_an_image_is_placed_where_its_placeholder_stands(name: str) -> None:
    processor = _processor(name)
    pieces = processor.conversation_template.pieces([("human", [None, "\nWhat?"]), ("gpt", ["A cat."])])
    encoding = encode_pieces(pieces, text_encoder(processor), [4])
    (start, stop), image = encoding.images[0], processor.tokenizer.convert_tokens_to_ids("<image>")
    assert encoding.ids[start:stop] == [image] * 4
    assert encoding.ids.count(image) == 4
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rendered = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}],
        chat_template=processor.conversation_template.source, return_dict=False,
    )  # fmt: skip
    assert rendered == [*encoding.ids[: start + 1], *encoding.ids[stop:]]


def test_a_space_before_the_first_word_only_is_added_to_no_later_text() -> None:
    """As in Mistral's and Phi-3's tokenizers (``Metaspace`` with the scheme ``first``)."""
    processor = _processor("brackets")
    backend = processor.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first", split=False)
    turns = [("human", "What is it?"), ("gpt", "A sign.")]
    expected = processor.tokenizer.apply_chat_template(
        _messages(turns), chat_template=processor.conversation_template.source, return_dict=False
    )
    assert _encode(processor, turns).ids == expected
    encoder = text_encoder(processor)
    assert encoder.pieces.encode("a").ids != encoder.later_pieces.encode("a").ids


def test_the_date_in_a_template_is_always_the_same() -> None:
    processor = _processor("headers")
    assert "26 Jul 2024" in processor.tokenizer.decode(_encode(processor, [("human", "a")]).ids)


def test_a_conversation_that_the_template_rejects_is_named() -> None:
    processor = _processor("chatml")
    template = ChatTemplate(processor.tokenizer, "{{ raise_exception('One turn only') }}")
    with pytest.raises(ConfigError, match="One turn only"):
        template.pieces([("human", ["a"])])


# As Gemma 3 and SmolLM 3 do: the system message is part of the first turn, or loses the white space after it.
_IN_FIRST_TURN = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_CUT_AT_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'].rstrip() if message['role'] == 'system' else message['content'].lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize("source", [_IN_FIRST_TURN, _CUT_AT_END])
@pytest.mark.parametrize("system", ["Be brief.", "\n Be\tbrief. \n\t"])
def test_white_space_is_removed_where_the_template_removes_it(source: str, system: str) -> None:
    processor = _processor("chatml")
    processor.conversation_template = ChatTemplate(processor.tokenizer, source)
    for turns in _conversations(20):
        expected = processor.tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, *_messages(turns)], chat_template=source, return_dict=False
        )
        assert _encode(processor, turns, system=system).ids == expected


# As Mistral does: only a conversation that ends with a question has the system message.
_DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' }}"
    "{% if loop.last and message['role'] == 'user' and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["turns", "drops"])
def test_a_system_message_that_the_template_does_not_render_precedes_the_first_question(name: str) -> None:
    processor = _processor("turns" if name == "turns" else "chatml")
    if name == "drops":
        processor.conversation_template = ChatTemplate(processor.tokenizer, _DROPS_SYSTEM)
    turns = [("human", "One?"), ("gpt", "First.")]
    expected = _encode(processor, [("human", "Be brief.\n\nOne?"), ("gpt", "First.")])
    assert _encode(processor, turns, system="Be brief.") == expected
    prompt, whole = _encode(processor, turns[:1], answer_next=True, system="Be brief.").ids, expected.ids
    assert whole[: len(prompt)] == prompt
