"""Read the messages of OpenAI's format as turns.

A message is ``{"role": "user", "content": ...}``. The content is a string, or a list of parts: ``{"type": "text",
"text": ...}``, ``{"type": "image_url", "image_url": ...}``, and ``{"type": "image"}``, which is the next image of the
record's keys, or has its own under ``image``, ``path`` or ``url``.

The texts of a message's parts, and of messages of one role in a row, are joined by a line break, as by the server; next
to an image stands one too. A line break that is there already counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.record_images import read_image, type_name
from llavar_peft.errors import Fault
from llavar_peft.types import Conversation, ImageSource, Role, Turn

_ROLES: Final[dict[str, Role]] = {"user": "human", "assistant": "gpt"}
_CALL_KEYS: Final = ("tool_calls", "function_call")
_SHOWN: Final = 80  # characters of a value in a message
_EXAMPLE: Final = '{"role": "user", "content": "..."}'


@dataclass(frozen=True, slots=True)
class _ImagePart:
    """An image in a message; ``source`` is None for the next one of the record's keys."""

    source: ImageSource | None


_Part = str | _ImagePart


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages of a record.

    Attributes:
        turns: Alternating turns; the first may be the assistant's.
        images: The images in their order in the messages.
        system: The system message, if there is one.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    system: str | None


def is_message(value: object) -> bool:
    """Return whether an element of a list is a message, and not a turn of LLaVA's format."""
    return isinstance(value, Mapping) and value.get("role") is not None and value.get("from") is None


def read_messages(listed: Sequence[Any], images: tuple[ImageSource, ...], where: str, faults: list[Fault]) -> Messages:
    """Read a record's messages.

    Args:
        listed: The messages as they are stored.
        images: The images of the record's keys.
        where: Name of the list in error messages, such as ``records.json:17: messages``.
        faults: Gets everything that is wrong.
    """
    faults_before = len(faults)
    messages = [_read_message(message, f"{where}[{number}]", faults) for number, message in enumerate(listed)]
    if len(faults) > faults_before:
        return Messages((), images, None)
    valid = [message for message in messages if message is not None]
    num_system = next((number for number, (role, _) in enumerate(valid) if role != "system"), len(valid))
    for number, (role, parts) in enumerate(valid):
        if role == "system" and number > num_system:
            what = "the system message follows other messages, expected it first"
            faults.append(Fault(f"{where}[{number}]", what, "move it to the beginning, or make it a user's message"))
        if role != "user" and any(isinstance(part, _ImagePart) for part in parts):
            what = f"an image in a message of the {role}, expected images in messages of the user only"
            faults.append(Fault(f"{where}[{number}]", what, "move the image to the user's message before it"))
    if len(faults) > faults_before:
        return Messages((), images, None)
    # Messages of one role in a row are one turn.
    turns_as_parts = [
        (role, [part for _, parts in group for part in parts])
        for role, group in groupby(valid[num_system:], key=lambda message: message[0])
    ]
    image_parts = [part for _, parts in turns_as_parts for part in parts if isinstance(part, _ImagePart)]
    if image_parts:
        images = _images_in_order(image_parts, images, where, faults)
    system = _join([part for _, parts in valid[:num_system] for part in parts])[0]
    turns = [_turn(role, _join(parts), literal=bool(image_parts)) for role, parts in turns_as_parts]
    return Messages(tuple(turns), images, system or None)


def written_turns(listed: Sequence[Any]) -> list[str]:
    """Return the texts of messages, valid or not, as the equal conversation has them: with ``<image>`` for images."""
    texts = []
    for _, group in groupby(listed, key=lambda message: message.get("role") if isinstance(message, Mapping) else None):
        parts: list[_Part] = []
        for message in group:
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list | tuple) else [content]:
                if isinstance(part, Mapping) and part.get("type") != "text":
                    parts.append(_ImagePart(None))
                    continue
                text = part.get("text") if isinstance(part, Mapping) else part
                if isinstance(text, str):
                    parts.append(text)
        texts.append("".join(IMAGE_PLACEHOLDER if part is None else part for part in _join(parts)))
    return texts


def as_record(conversation: Conversation, images: Sequence[str]) -> dict[str, Any]:
    """Return a record in JSON's types that ``parse_record`` reads as the same conversation.

    Args:
        conversation: The conversation.
        images: The paths of its images.
    """
    record: dict[str, Any] = {"id": conversation.id}
    if images:
        record["image"] = list(images)
    if conversation.system is None and all(turn.parts is None for turn in conversation.turns):
        return {**record, "conversations": [{"from": turn.role, "value": turn.text} for turn in conversation.turns]}
    role_names = {role: name for name, role in _ROLES.items()}
    messages: list[dict[str, Any]] = [
        {"role": role_names[turn.role], "content": _as_content(turn)} for turn in conversation.turns
    ]
    if conversation.system is not None:
        messages.insert(0, {"role": "system", "content": conversation.system})
    return {**record, "messages": messages}


def _as_content(turn: Turn) -> str | list[dict[str, str]]:
    """Return a turn as the content of a message."""
    if turn.parts is None:
        return turn.text
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]


def _images_in_order(
    image_parts: Sequence[_ImagePart], images: tuple[ImageSource, ...], where: str, faults: list[Fault]
) -> tuple[ImageSource, ...]:
    """Return the images in the order of the parts that show them. A single one may be shown by any number of parts."""
    without_source = sum(part.source is None for part in image_parts)
    if len(images) == 1 and without_source == len(image_parts):
        return images
    if len(images) not in (1 if without_source else 0, without_source):
        what = (
            f"the number of image parts without an image of their own is wrong (got {without_source}, expected "
            f"{len(images)}: one for each image of the record)"
        )
        faults.append(Fault(where, what, "write one part for each image, or the image into its part"))
        return ()
    remaining = iter(images * without_source if len(images) == 1 else images)
    return tuple(part.source if part.source is not None else next(remaining) for part in image_parts)


def _turn(role: str, parts: list[str | None], *, literal: bool) -> Turn:
    """Return a message as a turn.

    Args:
        role: The message's role.
        parts: Its texts and images, from ``_join``.
        literal: Whether an image is where a part is one, so that ``<image>`` in a text is ordinary text.
    """
    text = "".join(IMAGE_PLACEHOLDER if part is None else part for part in parts)
    return Turn(_ROLES[role], text, tuple(parts) if literal and role == "user" else None)


def _join(parts: Sequence[_Part]) -> list[str | None]:
    """Return the texts before, between and after the images, which are None.

    Parts are separated by a line break, unless one of them has it already.
    """
    joined: list[str | None] = []
    text = ""  # since the last image
    is_first = True
    for part in parts:
        if part == "":
            continue
        has_break = text.endswith("\n") or (isinstance(part, str) and part.startswith("\n"))
        if not is_first and not has_break:
            text += "\n"
        if isinstance(part, str):
            text += part
        else:
            joined += [text, None]
            text = ""
        is_first = False
    return [*joined, text]


def _read_message(message: object, where: str, faults: list[Fault]) -> tuple[str, list[_Part]] | None:
    """Return a message's role and parts; None if it is faulty."""
    if not isinstance(message, Mapping):
        what = f"the message has the wrong type (got {type_name(message)}, expected an object)"
        faults.append(Fault(where, what, f"write the message as {_EXAMPLE}"))
        return None
    role = message.get("role")
    call_key = next((key for key in _CALL_KEYS if message.get(key)), None)
    if call_key is not None or role in ("tool", "function"):
        what = f"{call_key!r} is set" if call_key else f"has the role {role!r}"
        what += ", and calls of tools are not supported"
        faults.append(Fault(where, what, "remove the call and its result, or leave the record out"))
        return None
    if role not in (*_ROLES, "system"):
        what = f"unknown role (got {repr(role)[:_SHOWN]}, expected 'system', 'user' or 'assistant')"
        fix = "write 'system'" if role == "developer" else "set 'role' to one of these"
        if role is None:
            what = "has no 'role'"
            if message.get("from") is not None:
                what, fix = "has 'from' as in LLaVA's format, expected 'role'", "rename 'messages' to 'conversations'"
        faults.append(Fault(where, what, fix))
        return None
    return str(role), _read_content(message.get("content"), where, faults)


def _read_content(content: object, where: str, faults: list[Fault]) -> list[_Part]:
    """Return the parts of a message's content."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list | tuple):
        what = f"'content' has the wrong type (got {type_name(content)}, expected a string or a list of parts)"
        faults.append(Fault(where, what, "write the text of the message as a string"))
        return []
    parts = [_read_part(part, f"{where}.content[{number}]", faults) for number, part in enumerate(content)]
    return [part for part in parts if part is not None]


def _read_part(part: object, where: str, faults: list[Fault]) -> _Part | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        what = f"the part has the wrong type (got {type_name(part)}, expected an object)"
        faults.append(Fault(where, what, 'write the part as {"type": "text", "text": "..."}'))
        return None
    part_type = part.get("type")
    if part_type == "text":
        text = part.get("text")
        if text is None or isinstance(text, str):
            return text or ""
        what = f"'text' has the wrong type (got {type_name(text)}, expected a string)"
        faults.append(Fault(where, what, "write the text as a string"))
        return None
    if part_type in ("image", "image_url"):
        return _read_image_part(part, str(part_type), where, faults)
    what = f"unknown type of part (got {repr(part_type)[:_SHOWN]}, expected 'text', 'image' or 'image_url')"
    faults.append(Fault(where, what, "set 'type' to one of these, or remove the part"))
    return None


def _read_image_part(part: Mapping[str, Any], part_type: str, where: str, faults: list[Fault]) -> _ImagePart | None:
    """Read an image part. An ``image`` without a source is the next of the record's images."""
    keys = ("image_url",) if part_type == "image_url" else ("image", "path", "url")
    key = next((key for key in keys if part.get(key) is not None), None)
    if key is None and part_type == "image_url":
        faults.append(Fault(where, "has no 'image_url'", "write the path of the image under 'image_url'"))
        return None
    if key is None:
        return _ImagePart(None)
    name = where.rpartition(": ")[2]
    image = read_image(part[key], f"{where}.{key}", f"{name}.{key}", faults)
    return None if image is None else _ImagePart(image)
