"""``llavar-peft ask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import say, say_json
from llavar_peft.constants import MOST_PAGES
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def ask(
    model: shared.ModelOption,
    question: Annotated[
        str | None,
        typer.Argument(
            help="The question. With --schema, it may be left out: the fields are asked for as in training records.",
            metavar="QUESTION",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            help="An image file or http(s) URL. Repeat the option to ask about several images, one by one. "
            "The pages of a PDF document are shown together.",
            metavar="FILE|URL",
        ),
    ] = None,
    adapter: shared.AdapterOption = None,
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
    each_page: Annotated[
        bool, typer.Option("--each-page", help="Ask about each page of a PDF document by itself.")
    ] = False,
    as_json: shared.JsonOption = False,
) -> None:
    """Ask a model a question about images."""
    from llavar_peft.inference.chat import load_chat
    from llavar_peft.text_files import check_question

    form = shared.read_schema(schema)
    if question is None:
        if form is None:
            raise ConfigError.at("QUESTION", "missing", "write a question, or give --schema to ask for its fields")
        question = form.question
    check_question(question)
    sampling = shared.make_sampling(max_new_tokens, temperature, greedy, seed)
    opened = [(name, shared.open_image_or_url(name, pages, max_pages)) for name in image or ()]
    if each_page:
        opened = [(page, {page: one}) for _, shown in opened for page, one in shown.items()]
    names: list[str | None] = [name for name, _ in opened]
    images: list[list[Image] | None] = [list(shown.values()) for _, shown in opened]
    if not names:
        names, images = [None], [None]
    chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize)
    requests = [
        chat.request(shown, question, image_mode=image_mode, sampling=sampling, schema=form) for shown in images
    ]
    answers = [answer.text for answer in chat.answer(requests)]
    if as_json:
        say_json([{"image": name, "answer": answer} for name, answer in zip(names, answers, strict=True)])
        return
    for name, answer in zip(names, answers, strict=True):
        say(f"{name}: {answer}" if len(names) > 1 else answer)
