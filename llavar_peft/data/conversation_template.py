"""The ``llava_v1`` conversation as text, and which parts of it are supervised. Tokens are added in ``encode_record``.

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
"""The content of a turn in order: literal text, and None for an image."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a conversation.

    Attributes:
        kind: Plain text, an image, or the ``</s>`` after an answer.
        text: The text of a ``text`` piece; it never contains a special token, even if it reads like one.
        supervised: Whether the model is trained to produce it.
    """

    kind: Literal["text", "image", "end"]
    text: str = ""
    supervised: bool = False


def split_placeholders(text: str) -> list[str | None]:
    """Split the text of a turn at each ``<image>``."""
    content: list[str | None] = []
    for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        content += [None, part] if index else [part]
    return content


def images_to_front(content: Content) -> list[str | None]:
    """Move the images of the first human turn to its front, followed by ``" USER: "`` and the stripped text.

    A turn without images is returned unchanged.

    Source: LLaVAR, llava/train/train.py, ``preprocess_multimodal`` under ``sep_image_conv_front`` (for one image).
    """
    images = sum(part is None for part in content)
    if images == 0:
        return list(content)
    text = "".join(part for part in content if part is not None).strip()
    return [None] * images + [f" {USER_ROLE}: {text}"]


def conversation_pieces(
    messages: Iterable[tuple[Role, Content]], *, answer_next: bool = False, system: str = SYSTEM_PROMPT
) -> list[Piece]:
    """Format a conversation.

    An empty message is formatted as its role and a colon without a separator, and an empty answer has no ``</s>``, as
    in the original.

    Args:
        messages: Turns in order, starting with the human.
        answer_next: Append an open ``ASSISTANT:`` for the model to continue.
        system: The text before the first turn.

    Returns:
        The pieces in reading order. Each answer is supervised with the space before and the ``</s>`` after it; images
        never are.
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


def image_block(tokens: int, *, use_im_start_end: bool) -> str:
    """Return the text of an image: ``<im_start>`` + ``tokens`` x ``<im_patch>`` + ``<im_end>``, or only the patches."""
    patches = IMAGE_PATCH_TOKEN * tokens
    return f"{IMAGE_START_TOKEN}{patches}{IMAGE_END_TOKEN}" if use_im_start_end else patches


CHAT_TEMPLATE: Final = (
    r"""{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if not loop.first and 'image' in (part['type'], loop.previtem['type']) -%}{{- '\n' -}}{%- endif -%}
            {{- 'IMAGE_PLACEHOLDER' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {{- words(messages[0]['content']) + ' ' -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- 'SYSTEM_PROMPT ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') -}}
    {%- endif -%}
    {%- set text = words(message['content']) -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER_ROLE:' + (' ' + text + ' ' if text else '') -}}
    {%- else -%}
        {{- 'ASSISTANT_ROLE:' -}}
        {%- generation -%}{{- ' ' + text + 'EOS_TOKEN' if text else '' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT_ROLE:' -}}{%- endif -%}
""".replace("SYSTEM_PROMPT", SYSTEM_PROMPT)
    .replace("IMAGE_PLACEHOLDER", IMAGE_PLACEHOLDER)
    .replace("USER_ROLE", USER_ROLE)
    .replace("ASSISTANT_ROLE", ASSISTANT_ROLE)
    .replace("EOS_TOKEN", EOS_TOKEN)
)
"""The same format as a Jinja template for ``apply_chat_template``; answers are marked as generated.

The content of a message is a string (``<image>`` marks an image) or a list of ``{"type": "image"}`` and ``{"type":
"text", "text": ...}`` parts, which are joined in their order, with a line break next to each image.
"""
