"""Conversations as text, and which parts of them are supervised. Tokens are added in ``encode_record``.

This file has the templates of LLaVAR and LLaVA-1.5; ``chat_template`` has those that tokenizers bring.

Source: LLaVAR and LLaVA, llava/conversation.py (``conv_llava_v1`` and ``conv_vicuna_v1``, ``SeparatorStyle.TWO``).
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
    VICUNA_SYSTEM_PROMPT,
)
from llavar_peft.types import Role, TemplateName

Content = Sequence[str | None]
"""The content of a turn in order: literal text, and None for an image."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a conversation.

    Attributes:
        kind: Plain text, an image, or a special token such as the ``</s>`` after an answer.
        text: The text of a ``text`` piece, which never contains a special token, even if it reads like one; or the
            special token.
        supervised: Whether the model is trained to produce it.
    """

    kind: Literal["text", "image", "special"]
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
        pieces.append(Piece("special", EOS_TOKEN, supervised=True) if answer else Piece("text", " "))
    if answer_next:
        pieces.append(Piece("text", f"{ASSISTANT_ROLE}:"))
    return pieces


@dataclass(frozen=True, slots=True)
class RoleTemplate:
    """A template that writes ``USER:`` and ``ASSISTANT:`` before the turns and ``</s>`` after the answers.

    Attributes:
        name: Its name in a processor's settings.
        system: The text before the first turn.
        image_first: Whether an image precedes the text of its turn.
    """

    name: TemplateName
    system: str
    image_first: bool

    def pieces(
        self, messages: Iterable[tuple[Role, Content]], *, answer_next: bool = False, system: str | None = None
    ) -> list[Piece]:
        """Format a conversation, as ``conversation_pieces`` does.

        Args:
            messages: Turns in order, starting with the human.
            answer_next: Append an open ``ASSISTANT:`` for the model to continue.
            system: The text before the first turn; None is the template's own.
        """
        if self.image_first:
            messages = [(role, _image_first(content)) for role, content in messages]
        return conversation_pieces(messages, answer_next=answer_next, system=self.system if system is None else system)

    def question(self, text: str, images: int) -> Content:
        """Return a question, with its images in the place that they have in this template.

        Source: LLaVAR, llava/eval/run_llava.py, ``eval_model``; LLaVA, the file of that name.
        """
        if not images:
            return [text]
        shown = [None] * images
        return [*shown, f"\n{text}"] if self.image_first else [f"{text}\n", *shown]

    def end_of_answer(self) -> str:
        """Return the special token that ends an answer."""
        return EOS_TOKEN


def _image_first(content: Content) -> Content:
    """Move the image of a turn to its front, followed by a line break and the stripped text.

    Source: LLaVA, llava/train/train.py, ``preprocess_multimodal`` (for one image).
    """
    if sum(part is None for part in content) != 1:
        return content
    text = "".join(part for part in content if part is not None).strip()
    return [None, f"\n{text}"]


LLAVA_V1: Final = RoleTemplate("llava_v1", SYSTEM_PROMPT, image_first=False)
VICUNA_V1: Final = RoleTemplate("vicuna_v1", VICUNA_SYSTEM_PROMPT, image_first=True)


def image_block(tokens: int, *, use_im_start_end: bool, patch: str = IMAGE_PATCH_TOKEN) -> str:
    """Return the text of an image: ``<im_start>`` + ``tokens`` x ``<im_patch>`` + ``<im_end>``, or only the patches."""
    patches = patch * tokens
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

VICUNA_CHAT_TEMPLATE: Final = CHAT_TEMPLATE.replace(SYSTEM_PROMPT, VICUNA_SYSTEM_PROMPT.replace("'", r"\'"))
"""The Jinja template of ``vicuna_v1``; images are written where they stand in the message."""
