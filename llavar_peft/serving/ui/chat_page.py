"""The page of ``llavar-peft serve --ui``: drop an image, ask, watch the answer come, compare two models.

It asks as a client of the API does, so that the same limits hold. What models and users write is shown as
text, never as HTML or Markdown. Nothing is loaded from, or sent to, any other host.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr
from gradio.utils import get_upload_folder

from llavar_peft.serving.ui.page_client import PageClient, PageRefusedError
from llavar_peft.serving.ui.page_talk import Exchange, Talk
from llavar_peft.serving.ui.page_theme import COPY, SAVE

NOBODY: Final = "(nobody)"
_KEEP_FILES: Final = 3600  # seconds that an uploaded image stays on the disk
_LONGEST_QUESTION: Final = 8000  # characters


class ChatPage(gr.Blocks):
    """Gradio's blocks, which take files only from where uploads are kept.

    By itself, Gradio 6.31 in a mounted page copies any file of this machine that a client names in any field, and
    fetches any address (``processing_utils._check_allowed`` looks only in pages that were launched).
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Reject files that were not uploaded before Gradio looks at them.

        Args:
            block_fn: As the parent's.
            inputs: From the client.
            *args: As the parent's.
            **kwargs: As the parent's.

        Returns:
            The inputs for the function.
        """
        uploads = Path(get_upload_folder()).resolve()
        for file in _files_in(inputs):
            path = file["path"]
            if path is not None and not (isinstance(path, str) and Path(path).resolve().is_relative_to(uploads)):
                raise gr.Error("A picture has to be uploaded.")
        prepared: list[Any] = await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        return prepared


def _files_in(value: Any) -> Iterator[dict[str, Any]]:
    """Whatever Gradio could take for a file, at any depth."""
    if isinstance(value, dict):
        if "path" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _files_in(part)


def build_page(client: PageClient, examples: Sequence[tuple[str, str]]) -> ChatPage:
    """Apply the page out.

    Args:
        client: Asks the API.
        examples: Files of images, with a question about each.

    Returns:
        The page, ready to be mounted.
    """
    names = client.models
    page = ChatPage(title="LLaVAR", analytics_enabled=False, delete_cache=(600, _KEEP_FILES))
    with page:
        talk = gr.State(Talk(), time_to_live=_KEEP_FILES)
        gr.Markdown("# LLaVAR\nDrop a picture that holds text, and ask about it.", elem_id="head")
        with gr.Row():
            model = gr.Dropdown(names, value=names[0], label="Model", min_width=140, elem_id="model")
            other = gr.Dropdown([NOBODY, *names], value=NOBODY, label="Compare with", min_width=140, elem_id="other")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280,
                    buttons=[], elem_id="picture",
                )  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="What does the sign say?", lines=1, max_lines=6,
                    max_length=_LONGEST_QUESTION, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
                    stop = gr.Button("Stop", min_width=90, elem_id="stop")
            with gr.Column(scale=3, min_width=300):
                with gr.Row(elem_id="answers"):
                    left, right = _window(0, names[0]), _window(1, NOBODY)
                with gr.Row(elem_id="keep"):
                    new = gr.Button("New conversation", size="sm", elem_id="new")
                    as_text = gr.Button("Save as text", size="sm", elem_id="as_text")
                    as_json = gr.Button("Save as JSON", size="sm", elem_id="as_json")
                    saved = gr.Textbox(visible="hidden", elem_id="saved")
        with gr.Row():
            with gr.Column(scale=2, min_width=300), gr.Accordion("How the answer is drawn", open=False):
                temperature = gr.Slider(0, 2, 0.2, step=0.05, label="Temperature", info="0: always the likeliest token")
                tokens = gr.Slider(1, client.most_tokens, min(512, client.most_tokens), step=1, label="Tokens at most")
                seed = gr.Textbox(label="Seed", info="a number; empty: another each time", max_length=18)
            with gr.Column(scale=3, min_width=300):
                gr.Examples([list(pair) for pair in examples], [image, question], label="Examples")

        answering = gr.on(
            [ask.click, question.submit],
            _Answering(client).run,
            [talk, image, question, model, other, temperature, tokens, seed],
            [talk, question, left, right],
            api_name="ask",
            concurrency_limit=None,
            show_progress="hidden",
        )
        stop.click(None, cancels=[answering], api_visibility="private")
        # Past the queue: a quick event that ends on its stream takes a long one along that begins in this moment.
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        choice = {"inputs": [talk, model, other], "outputs": [left, right], **quick}
        gr.on([model.change, other.change], _show, **choice, api_visibility="private")
        new.click(
            lambda: (Talk(), None, ""),
            None,
            [talk, image, question],
            cancels=[answering],
            api_visibility="private",
            **quick,
        ).then(_show, **choice, api_visibility="private")
        for button, write, name in ((as_text, Talk.as_text, "txt"), (as_json, Talk.as_json, "json")):
            button.click(write, talk, saved, api_name=button.elem_id, **quick).then(
                None, saved, None, js=f"(text) => ({SAVE})(text, 'conversation.{name}')", api_visibility="private"
            )
    page.queue(default_concurrency_limit=None, max_size=64)
    return page


def _window(side: int, name: str) -> gr.HTML:
    # Not a gr.Chatbot: that one lets images and other HTML through, whatever it is told of Markdown.
    return gr.HTML(
        Talk().as_html(side, name), visible=name != NOBODY, min_width=260, js_on_load=COPY, autoscroll=True,
        elem_id=f"window_{side}", elem_classes="window", padding=False,
    )  # fmt: skip


def _show(talk: Talk, model: str, other: str) -> tuple[Any, Any]:
    """Both windows, the second only where two are compared."""
    return (
        gr.update(value=talk.as_html(0, model)),
        gr.update(value=talk.as_html(1, other), visible=other != NOBODY),
    )


class _Answering:
    """What happens when somebody asks.

    Args:
        client: Asks the API.
    """

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def run(
        self,
        talk: Talk,
        image: str | None,
        question: str,
        model: str,
        other: str,
        temperature: float,
        tokens: int,
        seed: str | None,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Show the question, then the answers as they come; of two models, both at once."""
        if not question.strip():
            raise gr.Error("Write a question first.", duration=4)
        # Not a gr.Number: where that one is empty, it says 0.
        if seed and not (seed.strip().isascii() and seed.strip().isdigit()):
            raise gr.Error("The seed is a whole number.", duration=4)
        if talk.image != image:
            talk = Talk(image)  # a conversation is about one image
        models = (model,) if other == NOBODY else (model, other)
        sampling = {"temperature": temperature, "max_tokens": tokens, "seed": int(seed) if seed else None}
        streams = [
            self._client.stream(name, talk.history(side), question, image, **sampling)
            for side, name in enumerate(models)
        ]
        exchange = Exchange(question, models, [""] * len(models))
        talk.exchanges.append(exchange)
        yield talk, "", *_show(talk, model, other)
        try:
            async for side, piece in _together(streams):
                exchange.answers[side] += piece
                yield talk, gr.skip(), *_show(talk, model, other)
        except PageRefusedError as error:
            talk.exchanges.remove(exchange)
            yield talk, question, *_show(talk, model, other)
            raise gr.Error(str(error), duration=8) from None
        finally:
            exchange.done = True
        yield talk, gr.skip(), *_show(talk, model, other)


async def _together(streams: Sequence[AsyncGenerator[str, None]]) -> AsyncGenerator[tuple[int, str], None]:
    """The pieces of several streams as they come, each with its stream's number."""
    waiting = {asyncio.ensure_future(anext(stream, None)): side for side, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                side = waiting.pop(one)
                piece = one.result()
                if piece is not None:
                    yield side, piece
                    waiting[asyncio.ensure_future(anext(streams[side], None))] = side
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
