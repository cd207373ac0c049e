"""``llavar-peft chat``."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import complain, say, say_piece
from llavar_peft.constants import MOST_PAGES
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from llavar_peft.data.json_schema import AnswerSchema
    from llavar_peft.inference.chat import Chat
    from llavar_peft.inference.token_sampling import Sampling

_HELP = """\
/image FILE|URL   Choose the image of the next question, or pages: FILE.pdf#page=1-3.
/adapter [NAME]   Switch to an adapter, or to 'base' for the model without one. Without a name, list the adapters.
/clear            Forget the conversation and its images.
/help             Print this help.
/exit             Exit, as Ctrl-D does. Ctrl-C stops an answer."""
_BASE = "base"
_EXIT = ("/exit", "/quit")


def chat(
    model: shared.ModelOption,
    image: Annotated[
        str | None, typer.Option("--image", help="The image to start with: a file or http(s) URL.", metavar="FILE|URL")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="The folder of an adapter to select with /adapter. Repeat the option for several.",
            metavar="[NAME=]DIR",
        ),
    ] = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    image_mode: shared.ImageModeOption = None,
    max_new_tokens: shared.MaxNewTokensOption = 512,
    temperature: shared.TemperatureOption = None,
    greedy: shared.GreedyOption = False,
    seed: shared.SeedOption = None,
    schema: shared.SchemaOption = None,
    pages: shared.PagesOption = None,
    max_pages: shared.MaxPagesOption = MOST_PAGES,
) -> None:
    """Chat with a model about images, in a terminal or through a pipe with one question per line."""
    from llavar_peft.inference.chat import load_chat

    sampling = shared.make_sampling(max_new_tokens, temperature, greedy, seed)
    adapters = shared.parse_adapters(adapter or [])
    if _BASE in adapters:
        raise ConfigError.at(
            "--adapter", f"{_BASE!r} is reserved for the model without an adapter", "write NAME=FOLDER"
        )
    form = shared.read_schema(schema)
    loaded = load_chat(model, adapters, vision_tower=vision_tower, quantize=quantize)
    terminal = _Terminal(loaded, sampling, image_mode, form, max_pages)
    if image is not None:
        terminal.show(image, pages)
    terminal.run()


class _Terminal:
    """Reads questions and prints answers. Answers go to stdout, everything else to stderr."""

    def __init__(
        self,
        chat: Chat,
        sampling: Sampling,
        image_mode: ImageMode | None,
        schema: AnswerSchema | None = None,
        max_pages: int = MOST_PAGES,
    ) -> None:
        self._schema = schema
        self._max_pages = max_pages
        self._conversation = chat.conversation()
        self._chat = chat
        self._sampling = sampling
        self._image_mode = image_mode
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Answer until the input ends."""
        if self._interactive:
            with suppress(ImportError):  # not available on Windows
                import readline  # noqa: F401 - gives input() line editing and a history
            say(_HELP)
        while (line := self._read()) is not None and line.strip() not in _EXIT:
            try:
                self._handle(line.strip())
            except LlavarError as error:
                complain(str(error))

    def show(self, source: str, pages: str | None = None) -> None:
        """Choose the image, or the pages of a PDF document, of the next question."""
        if not source:
            raise ConfigError.at("/image", "no image is given", "type /image and a file or an http(s) URL")
        shown = shared.open_image_or_url(source, pages, self._max_pages)
        self._conversation.show(list(shown.values()), self._image_mode)

    def _read(self) -> str | None:
        if not self._interactive:
            return sys.stdin.readline().removeprefix("\ufeff") or None
        while True:
            try:
                return input("> ")
            except EOFError:
                say("")
                return None
            except KeyboardInterrupt:
                say("")  # discards the unfinished line

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            self.show(rest.strip())
        elif command == "/adapter":
            self._switch(rest.strip())
        elif command == "/clear":
            self._conversation.clear()
        elif command == "/help":
            say(_HELP)
        elif command.startswith("/"):
            raise ConfigError.at(command, "there is no such command", "type /help for the list")
        elif line:
            self._answer(line)

    def _switch(self, name: str) -> None:
        if name:
            self._conversation.adapter = self._chat.resolve_adapter(None if name == _BASE else name)
            return
        for known in (None, *self._chat.adapters):
            say(f"{'*' if known == self._conversation.adapter else ' '} {known or _BASE}")

    def _answer(self, question: str) -> None:
        sampling = self._sampling
        stream = self._conversation.stream(
            question,
            schema=self._schema,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
        )
        try:
            for piece in stream:
                say_piece(piece)
        except KeyboardInterrupt:
            stream.close()
            complain("stopped")
        say("")
