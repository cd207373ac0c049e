"""The chat template of a GGUF file, with images as llama.cpp writes them.

llama.cpp puts a marker in the place of an image, ``<__media__>`` or one with random letters (``<__media_x4__>``), and
passes messages whose content is a text with markers, or a list of parts. Unlike LLaVAR's image tokens, its special
tokens do not strip the white space next to them, so that the template has to.

Source: llama.cpp, tools/server/server-common.cpp and common/chat.cpp, of November 2026.
"""

from __future__ import annotations

from typing import Final

from llavar_peft.constants import IMAGE_END_TOKEN, IMAGE_START_TOKEN
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.models.processing_llavar import LlavarProcessor

_BOS: Final = "{{- bos_token -}}"
_TO_TEXT: Final = (
    "{%- set turns = namespace(written=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set turn = namespace(text='', marks='', words='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set turn.text = message['content'] -%}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('text', 'media_marker') -%}"
    "{%- set turn.text = turn.text + part['text'] -%}"
    "{%- else -%}"
    "{%- set turn.text = turn.text + '<__media__>' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "IMAGE_FIRST"
    "{%- set turns.written = turns.written + [dict(message, content=turn.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = turns.written -%}"
)
"""Makes one text of each message."""
_IMAGE_FIRST: Final = (
    "{%- if '<__media' in turn.text -%}"
    "{%- for piece in turn.text.split('<__media') -%}"
    "{%- set cut = piece.split('__>', 1) -%}"
    "{%- if loop.first or cut | length == 1 -%}"
    "{%- set turn.words = turn.words + piece -%}"
    "{%- else -%}"
    "{%- set turn.marks = turn.marks + '<__media' + cut[0] + '__>' -%}"
    "{%- set turn.words = turn.words + cut[1] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turn.text = turn.marks + '\\n' + turn.words.strip() -%}"
    "{%- endif -%}"
)
"""Moves the images of a message to its front, where a model that was trained with them there expects them."""
_WRAP: Final = (
    "{%- for piece in whole.split('<__media') -%}"
    "{%- set cut = piece.split('__>', 1) -%}"
    "{%- set words = piece if loop.first or cut | length == 1 else cut[1] -%}"
    "{%- if not loop.first and cut | length == 2 -%}{{- '<__media' + cut[0] + '__>AFTER' -}}{%- endif -%}"
    "{{- WORDS -}}"
    "{%- if not loop.last -%}{{- 'BEFORE' -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""Writes the tokens around each image, and strips the white space next to it."""


def gguf_chat_template(processor: LlavarProcessor) -> str:
    """Return a processor's chat template for llama.cpp, which begins with the first token of a text if there is one."""
    base = str(processor.chat_template)
    if processor.template != "chat" and processor.tokenizer.bos_token is not None:
        base = _BOS + base
    first = "" if processor.template == "llava_v1" else _IMAGE_FIRST
    encoder, enclosed = text_encoder(processor), processor.use_im_start_end
    words = "words"
    if (encoder.end if encoder.end is not None else encoder.patch) in encoder.strips_after:
        words = f"({words} if loop.first else {words}.lstrip())"
    if (encoder.start if encoder.start is not None else encoder.patch) in encoder.strips_before:
        words = f"({words} if loop.last else {words}.rstrip())"
    wrap = (
        _WRAP.replace("WORDS", words)
        .replace("BEFORE", IMAGE_START_TOKEN if enclosed else "")
        .replace("AFTER", IMAGE_END_TOKEN if enclosed else "")
    )
    return _TO_TEXT.replace("IMAGE_FIRST", first) + "{%- set whole -%}" + base + "{%- endset -%}" + wrap


def writes_bos(processor: LlavarProcessor) -> bool:
    """Return whether a conversation of a processor starts with the first token of a text."""
    bos = processor.tokenizer.bos_token
    if bos is None:
        return False
    if processor.template != "chat":
        return True
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=processor.chat_template, tokenize=False
    )
    return str(text).startswith(bos)
