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
        last = self.pieces([("human", ["a"]), ("gpt", ["b"])])
        ends = [piece.text for piece in last if piece.kind == "special" and piece.supervised]
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
        key = (roles, system, answer_next)
        if key not in self._rendered:
            self._rendered[key] = self._render_marks(roles, system, answer_next)
        return self._rendered[key]

    def _render_marks(self, roles: Sequence[Role], system: bool, answer_next: bool) -> _Rendered:
        messages = [{"role": _NAMES[role], "content": _mark(index)} for index, role in enumerate(roles)]
        first = [{"role": "system", "content": _mark(len(roles))}] if system else []
        text = self._apply(first + messages, answer_next)
        places = {int(found.group(1)): found.span() for found in _MARK.finditer(text)}
        missing = [index for index in range(len(roles) + system) if index not in places]
        if missing:
            raise ConfigError.at(
                "chat template",
                f"does not render each message as it is (missing: message {missing[0]})",
                "use a tokenizer with another chat template",
            )
        specials = self._special_tokens
        spans = []
        for index, role in enumerate(roles):
            if role == "gpt":
                prompt = self._apply(first + messages[:index], True)
                spans.append(_answer_span(text, prompt, places, index, specials))
        return _Rendered(text, tuple(spans), self._stripped(text, first + messages, answer_next))

    def _stripped(self, text: str, messages: Sequence[dict[str, str]], answer_next: bool) -> dict[int, tuple[str, str]]:
        """Return, for each message, the characters that the template removes before and after it.

        Args:
            text: The rendering of the messages, which are marks.
            messages: Their roles and contents.
            answer_next: Whether the rendering ends with what comes before an answer.
        """
        removed = {int(found.group(1)): ["", ""] for found in _MARK.finditer(text)}
        for side, space in product((0, 1), _SPACES):
            # One side at a time, because the end of one message can be followed by the beginning of the next.
            before, after = ("", space) if side else (space, "")
            padded = [{**one, "content": f"{before}{one['content']}{after}"} for one in messages]
            plain, spaced = (_count_around_marks(one, space) for one in (text, self._apply(padded, answer_next)))
            for index, sides in removed.items():
                if spaced[index][side] == plain[index][side]:
                    sides[side] += space
        return {index: (before, after) for index, (before, after) in removed.items()}

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
    return f"\ue000{index}\ue001"


def _answer_span(
    text: str, prompt: str, places: dict[int, tuple[int, int]], index: int, specials: re.Pattern[str]
) -> tuple[int, int]:
    """Return the characters that the model produces for an answer: from the prompt's end to the end of the turn."""
    start, end = places[index]
    previous = max((stop for other, (_, stop) in places.items() if stop <= start and other != index), default=0)
    same = next((at for at, (one, other) in enumerate(zip(text, prompt, strict=False)) if one != other), len(prompt))
    first = same if previous <= same <= start else start
    following = min((begin for begin, _ in places.values() if begin >= end), default=len(text))
    closing = specials.search(text, end, following)
    return first, closing.end() if closing is not None else end


def _count_around_marks(text: str, space: str) -> dict[int, tuple[int, int]]:
    """Return how often a character stands directly before and after each mark."""
    counts = {}
    for found in _MARK.finditer(text):
        before, after = text[: found.start()], text[found.end() :]
        counts[int(found.group(1))] = (len(before) - len(before.rstrip(space)), len(after) - len(after.lstrip(space)))
    return counts


def _segments(rendered: _Rendered) -> Iterator[tuple[str, int | None, bool]]:
    """Yield (text, index of a message or None, supervised) in reading order."""
    cuts = {0, len(rendered.text), *(edge for span in rendered.supervised for edge in span)}
    marks = {found.start(): found for found in _MARK.finditer(rendered.text)}
    cuts |= {edge for found in marks.values() for edge in found.span()}
    ordered = sorted(cuts)
    for start, stop in pairwise(ordered):
        supervised = any(first <= start < last for first, last in rendered.supervised)
        mark = int(marks[start].group(1)) if start in marks else None
        yield rendered.text[start:stop], mark, supervised


def _split_specials(text: str, specials: re.Pattern[str], supervised: bool) -> Iterator[Piece]:
    position = 0
    for found in specials.finditer(text):
        yield Piece("text", text[position : found.start()], supervised)
        yield Piece("special", found.group(), supervised)
        position = found.end()
    yield Piece("text", text[position:], supervised)


def _strip(content: Content, before: str, after: str) -> list[str | None]:
    parts = list(content)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip(None if before == _SPACES else before)
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip(None if after == _SPACES else after)
    return parts
