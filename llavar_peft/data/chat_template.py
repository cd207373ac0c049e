"""A tokenizer's own chat template as a conversation template of this package.

The Jinja template is rendered once for each sequence of roles, with marks in the places of the messages. The text
around the marks may contain special tokens; the messages, which replace the marks, never do. What the model is trained
to produce are the assistant's messages with the token that ends each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Final

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.conversation_template import Content, Piece
from llavar_peft.errors import ConfigError
from llavar_peft.types import Role, TemplateName

_MARK: Final = re.compile("\ue000(\\d+)\ue001")  # private characters, which no template treats in a special way
_SPACES: Final = " \n\t"  # a template that removes all of them removes all white space
_NAMES: Final[dict[Role, str]] = {"human": "user", "gpt": "assistant"}
_CALL_OF_TODAY: Final = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# Options that templates look for. A date that changes would give other tokens on each day.
_OPTIONS: Final[dict[str, Any]] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_FIXED_DATE: Final = (2024, 7, 26)

_PARTS_TO_TEXT: Final = (
    "{%- set joined = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set joined.messages = joined.messages + [message] -%}"
    "{%- else -%}"
    "{%- set words = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- set words.text = words.text + ('IMAGE\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=words.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
).replace("IMAGE", IMAGE_PLACEHOLDER)
_TEXT_TO_PARTS: Final = (
    "{%- set parted = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content'] or ''}] -%}"
    "{%- set parted.messages = parted.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}"
    "{%- set messages = parted.messages -%}"
)
# A template of a model with images, such as LLaVA-NeXT's, that does not accept a text in the place of a list of parts.
_CONTENT: Final = r"""(\[['"]content['"]\]|\.content)"""
_READS_PARTS: Final = re.compile(
    rf"""{_CONTENT}\s*\|\s*selectattr|{_CONTENT}\[0\](\[['"]|\.)text|\bin\s+\w+{_CONTENT}\s*(-?%}}|\|)"""
)
_READS_TEXT: Final = re.compile(r"\bis\s+string\b")
# For programs that render the template without options: the prompts are then those of the training.
_DEFAULTS: Final = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
    "{%- if date_string is not defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}"
)


def with_image_parts(template: str) -> str:
    """Return a Jinja template for messages whose content may be a text, or a list of image and text parts.

    The template is that of a text model, or one that reads lists of parts only: it gets the text as the only part.
    ``strftime_now`` is replaced by a fixed date, so that a conversation has the same tokens on each day. Thinking is
    off unless it is asked for.
    """
    if template.startswith(_PARTS_TO_TEXT):
        return template
    from datetime import date

    fixed = _CALL_OF_TODAY.sub(lambda call: repr(date(*_FIXED_DATE).strftime(call.group(2))), template)
    only_parts = _READS_PARTS.search(template) is not None and _READS_TEXT.search(template) is None
    return _PARTS_TO_TEXT + (_TEXT_TO_PARTS if only_parts else "") + _DEFAULTS + fixed


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation of marks.

    Attributes:
        text: The rendering.
        supervised: The ranges of characters that the model is trained to produce.
        stripped: For each message, the white space that the template removes before and after it.
    """

    text: str
    supervised: tuple[tuple[int, int], ...]
    stripped: Mapping[int, tuple[str, str]]


@dataclass(eq=False)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A fast tokenizer.
        source: Its Jinja template.

    Attributes:
        name: ``"chat"``.
    """

    tokenizer: Any
    source: str
    name: TemplateName = "chat"
    _rendered: dict[tuple[Any, ...], _Rendered] = field(default_factory=dict, init=False, repr=False)

    def pieces(
        self, messages: Iterable[tuple[Role, Content]], *, answer_next: bool = False, system: str | None = None
    ) -> list[Piece]:
        """Format a conversation.

        Args:
            messages: Turns in order, starting with the human.
            answer_next: Append what comes before the assistant's answer.
            system: The system message; None is the template's default. Where the template rejects or drops system
                messages (Gemma 2, Mistral), it is placed before the first message.

        Raises:
            ConfigError: The template rejects the conversation.
        """
        turns = list(messages)
        if system is not None and turns and not self._renders_system:
            turns[0] = (turns[0][0], [f"{system}\n\n", *turns[0][1]])
            system = None
        contents = [content for _, content in turns] + ([[system]] if system is not None else [])
        rendered = self._render(tuple(role for role, _ in turns), system is not None, answer_next)
        specials = self._special_tokens
        pieces: list[Piece] = []
        for text, mark, supervised in _segments(rendered):
            if mark is None:
                pieces += _split_specials(text, specials, supervised)
            else:
                content = _strip(contents[mark], *rendered.stripped[mark])
                pieces += [Piece("image") if part is None else Piece("text", part, supervised) for part in content]
        return [piece for piece in pieces if piece.kind != "text" or piece.text]

    def question(self, text: str, images: int) -> Content:
        """Return a question about images, which come first, as in LLaVA-1.5."""
        return [*[None] * images, f"\n{text}"] if images else [text]

    def end_of_answer(self) -> str | None:
        """Return the special token that ends an answer; None if the template has none."""
        pieces = self.pieces([("human", ["a"]), ("gpt", ["b"])])
        ends = [piece.text for piece in pieces if piece.kind == "special" and piece.supervised]
        return ends[-1] if ends else None

    @cached_property
    def _renders_system(self) -> bool:
        """Whether the template renders a system message in a conversation that ends with an answer."""
        try:
            self._render(("human", "gpt"), True, False)
        except ConfigError:
            return False
        return True

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        names = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _render(self, roles: tuple[Role, ...], system: bool, answer_next: bool) -> _Rendered:
        """Return the rendering of marks for a sequence of roles, which is kept for the next such conversation."""
        key = (roles, system, answer_next)
        if key not in self._rendered:
            self._rendered[key] = self._render_marks(roles, system, answer_next)
        return self._rendered[key]

    def _render_marks(self, roles: Sequence[Role], system: bool, answer_next: bool) -> _Rendered:
        """Render a mark in the place of each message, and find out what the template does around them."""
        messages = [{"role": _NAMES[role], "content": _mark(index)} for index, role in enumerate(roles)]
        system_message = [{"role": "system", "content": _mark(len(roles))}] if system else []
        text = self._apply(system_message + messages, answer_next)
        mark_spans = {int(mark.group(1)): mark.span() for mark in _MARK.finditer(text)}
        missing = [index for index in range(len(roles) + system) if index not in mark_spans]
        if missing:
            raise ConfigError.at(
                "chat template",
                f"does not render each message as it is (missing: message {missing[0]})",
                "use a tokenizer with another chat template",
            )
        specials = self._special_tokens
        answer_spans = []
        for index, role in enumerate(roles):
            if role == "gpt":
                prompt = self._apply(system_message + messages[:index], True)
                answer_spans.append(_answer_span(text, prompt, mark_spans, index, specials))
        stripped = self._stripped_characters(text, system_message + messages, answer_next)
        return _Rendered(text, tuple(answer_spans), stripped)

    def _stripped_characters(
        self, text: str, messages: Sequence[dict[str, str]], answer_next: bool
    ) -> dict[int, tuple[str, str]]:
        """Return, for each message, the characters that the template removes before and after it.

        Args:
            text: The rendering of the messages, which are marks.
            messages: Their roles and contents.
            answer_next: Whether the rendering ends with what comes before an answer.
        """
        before_after = {int(mark.group(1)): ["", ""] for mark in _MARK.finditer(text)}
        for side, space in product((0, 1), _SPACES):
            # One side at a time, because the end of one message can be followed by the beginning of the next.
            before, after = ("", space) if side else (space, "")
            padded = [{**message, "content": f"{before}{message['content']}{after}"} for message in messages]
            plain = _count_around_marks(text, space)
            spaced = _count_around_marks(self._apply(padded, answer_next), space)
            for index, removed in before_after.items():
                if spaced[index][side] == plain[index][side]:
                    removed[side] += space
        return {index: (before, after) for index, (before, after) in before_after.items()}

    def _apply(self, messages: Sequence[dict[str, str]], answer_next: bool) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=answer_next,
                **_OPTIONS,
            )
        except Exception as error:  # a template can raise whatever it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError.at(
                "chat template", f"rejects a conversation of {roles} ({reason})", "change the order of the turns"
            ) from error
        return rendered


def _mark(index: int) -> str:
    """Return the text that stands for a message."""
    return f"\ue000{index}\ue001"


def _answer_span(
    text: str, prompt: str, mark_spans: dict[int, tuple[int, int]], index: int, specials: re.Pattern[str]
) -> tuple[int, int]:
    """Return the characters that the model produces for an answer: from the prompt's end to the end of the turn.

    Args:
        text: The rendering of the conversation.
        prompt: The rendering of the messages before the answer, ready for it.
        mark_spans: Where the mark of each message is in the text.
        index: The answer.
        specials: Matches the special tokens.
    """
    mark_start, mark_end = mark_spans[index]
    others = [span for other, span in mark_spans.items() if other != index]
    end_of_previous = max((end for _, end in others if end <= mark_start), default=0)
    start_of_next = min((start for start, _ in others if start >= mark_end), default=len(text))
    # Where the renderings differ before the end of the previous message, or agree past the mark, the mark is the start.
    prompt_end = _length_of_common_start(text, prompt)
    answer_start = prompt_end if end_of_previous <= prompt_end <= mark_start else mark_start
    closing_token = specials.search(text, mark_end, start_of_next)
    return answer_start, closing_token.end() if closing_token is not None else mark_end


def _length_of_common_start(text: str, prompt: str) -> int:
    """Return the number of characters with which both begin, which are all of the prompt if the text begins with it."""
    pairs = enumerate(zip(text, prompt, strict=False))
    return next((position for position, (one, other) in pairs if one != other), len(prompt))


def _count_around_marks(text: str, space: str) -> dict[int, tuple[int, int]]:
    """Return how often a character stands directly before and after each mark."""
    counts = {}
    for mark in _MARK.finditer(text):
        before, after = text[: mark.start()], text[mark.end() :]
        counts[int(mark.group(1))] = (len(before) - len(before.rstrip(space)), len(after) - len(after.lstrip(space)))
    return counts


def _segments(rendered: _Rendered) -> Iterator[tuple[str, int | None, bool]]:
    """Yield (text, index of a message or None, supervised) in reading order."""
    marks = {mark.start(): mark for mark in _MARK.finditer(rendered.text)}
    spans = [*rendered.supervised, *(mark.span() for mark in marks.values())]
    cuts = {0, len(rendered.text), *(edge for span in spans for edge in span)}
    for start, stop in pairwise(sorted(cuts)):
        supervised = any(first <= start < last for first, last in rendered.supervised)
        mark = int(marks[start].group(1)) if start in marks else None
        yield rendered.text[start:stop], mark, supervised


def _split_specials(text: str, specials: re.Pattern[str], supervised: bool) -> Iterator[Piece]:
    """Yield the special tokens in a text, and the texts before, between and after them."""
    position = 0
    for token in specials.finditer(text):
        yield Piece("text", text[position : token.start()], supervised)
        yield Piece("special", token.group(), supervised)
        position = token.end()
    yield Piece("text", text[position:], supervised)


def _strip(content: Content, before: str, after: str) -> list[str | None]:
    """Remove the white space at both ends of a message that the template removes there."""
    parts = list(content)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip(None if before == _SPACES else before)
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip(None if after == _SPACES else after)
    return parts
