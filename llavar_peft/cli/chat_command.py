"""``llavar-peft chat``: a conversation in a terminal, or through a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.output import complain, say, say_piece
from llavar_peft.cli.shared_options import (
    GreedyOption,
    ImageModeOption,
    MaxNewTokensOption,
    ModelOption,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    VisionTowerOption,
    make_sampling,
    name_adapters,
    open_image,
)
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from llavar_peft.inference.chat import Chat
    from llavar_peft.inference.token_sampling import Sampling

_HELP = """\
/image FILE|URL   show a picture with the next question
/adapter NAME     let another adapter answer; 'base' is the model without one; no name lists them
/clear            forget what was said and shown
/help             this
Ctrl-C stops an answer, Ctrl-D leaves."""
_BASE = "base"


def chat(
    model: ModelOption,
    image: Annotated[
        str | None, typer.Option("--image", help="The picture that it is about.", metavar="FILE|URL")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="An adapter to choose with /adapter; may be given again.", metavar="[NAME=]DIR"),
    ] = None,
    vision_tower: VisionTowerOption = None,
    quantize: QuantizeOption = None,
    image_mode: ImageModeOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
) -> None:
    """Talk with a trained model about images. Reads questions line by line, from a terminal or a pipe."""
    from llavar_peft.inference.chat import load_chat

    sampling = make_sampling(max_new_tokens, temperature, greedy, seed)
    adapters = name_adapters(adapter or [])
    if _BASE in adapters:
        raise ConfigError.at("--adapter", f"{_BASE!r} is the model without an adapter", "write NAME=FOLDER")
    terminal = _Terminal(load_chat(model, adapters, vision_tower=vision_tower, quantize=quantize), sampling, image_mode)
    if image is not None:
        terminal.show(image)
    terminal.run()


class _Terminal:
    """The loop of reading and answering. Answers go to stdout, everything else to stderr."""

    def __init__(self, chat: Chat, sampling: Sampling, image_mode: ImageMode | None) -> None:
        self._talk = chat.conversation()
        self._chat = chat
        self._sampling = sampling
        self._image_mode = image_mode
        self._typed = sys.stdin.isatty()

    def run(self) -> None:
        """Answer until the input ends."""
        if self._typed:
            with suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 - input() then edits lines and remembers them
            say(_HELP)
        while (line := self._read()) is not None:
            try:
                self._take(line.strip())
            except LlavarError as error:
                complain(str(error))

    def show(self, source: str) -> None:
        """Apply an image beside the next question."""
        self._talk.show(open_image(source), self._image_mode)

    def _read(self) -> str | None:
        if not self._typed:
            return sys.stdin.readline() or None
        while True:
            try:
                return input("> ")
            except EOFError:
                say("")
                return None
            except KeyboardInterrupt:
                say("")  # drops the line that was begun

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            self.show(rest.strip())
        elif command == "/adapter":
            self._switch(rest.strip())
        elif command == "/clear":
            self._talk.clear()
        elif command == "/help":
            say(_HELP)
        elif command.startswith("/"):
            raise ConfigError.at(command, "is no command", "see /help")
        elif line:
            self._answer(line)

    def _switch(self, name: str) -> None:
        if name:
            self._talk.adapter = self._chat.resolve_adapter(None if name == _BASE else name)
            return
        for known in (None, *self._chat.adapters):
            say(f"{'*' if known == self._talk.adapter else ' '} {known or _BASE}")

    def _answer(self, question: str) -> None:
        sampling = self._sampling
        stream = self._talk.stream(
            question, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=sampling.seed
        )
        try:
            for piece in stream:
                say_piece(piece)
        except KeyboardInterrupt:
            stream.close()
            complain("stopped")
        say("")
