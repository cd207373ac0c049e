"""The ``llava_v1`` conversation as text: what stands where, and which of it is supervised. No tokens here.

Source: LLaVAR, llava/conversation.py (``conv_llava_v1``, ``SeparatorStyle.TWO``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from llavar_peft.constants import (
    ASSISTANT_ROLE,
    EOS_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PATCH_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    SYSTEM_PROMPT,
    USER_ROLE,
)
from llavar_peft.types import Role

Content = Sequence[str | None]
"""A turn's words in order; None stands for an image. Strings are literal, whatever they spell."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a conversation's text.

    Attributes:
        kind: Plain text, an image's place, or the ``</s>`` after an answer.
        text: The characters of a ``text`` piece, in which nothing is ever a special token.
        supervised: Whether the model is trained to say it.
    """

    kind: Literal["text", "image", "end"]
    text: str = ""
    supervised: bool = False


def split_placeholders(text: str) -> list[str | None]:
    """Split a record's text at each ``<image>``."""
    content: list[str | None] = []
    for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        content += [None, part] if index else [part]
    return content


def images_to_front(content: Content) -> list[str | None]:
    """Move a first turn's images before a second ``USER:``, as the original does under ``sep_image_conv_front``.

    Args:
        content: The first human turn.

    Returns:
        The images, then ``" USER: "`` and the stripped words; ``content`` itself where it has no image.

    Source: LLaVAR, llava/train/train.py, ``preprocess_multimodal`` (there for one image).
    """
    images = sum(part is None for part in content)
    if images == 0:
        return list(content)
    words = "".join(part for part in content if part is not None).strip()
    return [None] * images + [f" {USER_ROLE}: {words}"]


def conversation_pieces(
    messages: Iterable[tuple[Role, Content]], *, answer_next: bool = False, system: str = SYSTEM_PROMPT
) -> list[Piece]:
    """Apply a conversation out.

    An empty message gives the role and a colon only, without a separator, and an empty answer no ``</s>``: the
    original's rule, kept so that the ids are the original's.

    Args:
        messages: Turns in order, beginning with the human.
        answer_next: Whether an open ``ASSISTANT:`` follows, for the model to go on from.
        system: The text before the first turn.

    Returns:
        The pieces in reading order. Answers, with the space before them and the ``</s>`` after them, are supervised;
        images never are.
    """
    pieces = [Piece("text", f"{system} ")]
    for role, content in messages:
        answer = role == "gpt"
        pieces.append(Piece("text", f"{ASSISTANT_ROLE if answer else USER_ROLE}:"))
        if all(part == "" for part in content):
            continue
        pieces.append(Piece("text", " ", answer))
        pieces += [Piece("image") if part is None else Piece("text", part, answer) for part in content]
        pieces.append(Piece("end", supervised=True) if answer else Piece("text", " "))
    if answer_next:
        pieces.append(Piece("text", f"{ASSISTANT_ROLE}:"))
    return pieces


def prompt_text(pieces: Iterable[Piece], image: str = IMAGE_PLACEHOLDER) -> str:
    """Write pieces out as the one string that the original would tokenize.

    Args:
        pieces: From ``conversation_pieces``.
        image: What to write for an image.

    Returns:
        The prompt, without the ``<s>`` that begins its ids.
    """
    spelled = {"image": image, "end": EOS_TOKEN}
    return "".join(spelled.get(piece.kind, piece.text) for piece in pieces)


def image_block(tokens: int, *, use_im_start_end: bool) -> str:
    """Spell an image's place: ``<im_start>`` + ``tokens`` x ``<im_patch>`` + ``<im_end>``, or the patches only."""
    patches = IMAGE_PATCH_TOKEN * tokens
    return f"{IMAGE_START_TOKEN}{patches}{IMAGE_END_TOKEN}" if use_im_start_end else patches


CHAT_TEMPLATE: Final = (
    """\
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if not loop.first and 'image' in (part['type'], loop.previtem['type']) -%}{{- '\\n' -}}{%- endif -%}
            {{- '"""
    + IMAGE_PLACEHOLDER
    + """' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {{- words(messages[0]['content']) + ' ' -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- '"""
    + SYSTEM_PROMPT
    + """ ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') -}}
    {%- endif -%}
    {%- set text = words(message['content']) -%}
    {%- if message['role'] == 'user' -%}
        {{- '"""
    + USER_ROLE
    + """:' + (' ' + text + ' ' if text else '') -}}
    {%- else -%}
        {{- '"""
    + ASSISTANT_ROLE
    + """:' -}}
        {%- generation -%}{{- ' ' + text + '"""
    + EOS_TOKEN
    + """' if text else '' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '"""
    + ASSISTANT_ROLE
    + """:' -}}{%- endif -%}
"""
)
"""The same layout for ``apply_chat_template``: Jinja, with the answers marked for ``return_assistant_tokens_mask``.

A message's content is a string (``<image>`` marks an image) or a list of ``{"type": "image"}`` and ``{"type": "text",
"text": ...}`` parts, which are joined in the order given, with a line break beside each image.
"""
