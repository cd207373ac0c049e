"""The page of ``llavar-peft serve --ui``: upload an image, ask questions, and compare two models.

The page is a client of the API, so the same limits apply. Text of models and users is shown as text, never as HTML or
Markdown. The page exchanges no data with other hosts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import gradio as gr
from gradio.data_classes import FileData, ImageData

from llavar_peft.data.pdf_pages import page_name
from llavar_peft.serving.ui.page_client import PageClient, PageClientError
from llavar_peft.serving.ui.page_conversation import Exchange, PageConversation
from llavar_peft.serving.ui.page_theme import COPY, SAVE, WATCH_DROPS

OFF: Final = "(off)"
_KEEP_FILES: Final = 3600  # seconds that an uploaded image stays on disk
_MAX_QUESTION: Final = 8000  # characters


def build_page(client: PageClient, examples: Sequence[tuple[str, str]]) -> gr.Blocks:
    """Build the page, ready to be mounted.

    Args:
        client: A client of the API.
        examples: Image files, each with a question.
    """
    names = client.models
    page = gr.Blocks(title="LLaVAR", analytics_enabled=False, delete_cache=(600, _KEEP_FILES))
    with page:
        conversation = gr.State(PageConversation(), time_to_live=_KEEP_FILES)
        gr.Markdown(
            "# LLaVAR\nUpload an image with text in it, or a PDF document, and ask about it. "
            "A conversation is about one image or document.",
            elem_id="head",
        )
        with gr.Row():
            model = gr.Dropdown(names, value=names[0], label="Model", min_width=140, elem_id="model")
            other = gr.Dropdown([OFF, *names], value=OFF, label="Compare with", min_width=140, elem_id="other")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280,
                    buttons=[], elem_id="image",
                )  # fmt: skip
                # Only the API opens images, with its limits. Gradio would open any kind of file, such as PostScript.
                # A subclass is no way: Gradio writes a file beside each module that has one.
                image.preprocess = _path_of_upload
                several = gr.Button(visible="hidden", elem_id="several")
                with gr.Row():
                    document = gr.File(
                        label="or a PDF document", file_types=[".pdf"], height=116, min_width=160, scale=3,
                        buttons=[], elem_id="document",
                    )  # fmt: skip
                    document.preprocess = _path_of_upload  # Gradio would write an empty file at each question
                    pages = gr.Textbox(
                        label="Pages", placeholder="1-3,7", max_length=100, min_width=90, elem_id="pages"
                    )  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="What does the sign say?", lines=1, max_lines=6, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
                    stop = gr.Button("Stop", min_width=90, elem_id="stop")
            with gr.Column(scale=3, min_width=300):
                with gr.Row(elem_id="answers"):
                    left, right = _window(0, names[0]), _window(1, OFF)
                with gr.Row(elem_id="keep"):
                    new = gr.Button("New conversation", size="sm", elem_id="new")
                    as_text = gr.Button("Save as text", size="sm", elem_id="as_text")
                    as_json = gr.Button("Save as JSON", size="sm", elem_id="as_json")
                    saved = gr.Textbox(visible="hidden", elem_id="saved")
        with gr.Row():
            with gr.Column(scale=2, min_width=300), gr.Accordion("Answer settings", open=False):
                temperature = gr.Slider(
                    0, 2, 0.2, step=0.05, label="Temperature", info="0 gives the same answer every time."
                )
                tokens = gr.Slider(
                    1, client.max_tokens, min(512, client.max_tokens), step=1, label="Tokens", info="Longest answer."
                )
                seed = gr.Textbox(label="Seed", info="The same number gives the same answer.", max_length=18)
            with gr.Column(scale=3, min_width=300):
                gr.Examples([list(pair) for pair in examples], [image, question], label="Examples")

        answering = gr.on(
            [ask.click, question.submit],
            _Answering(client).run,
            [conversation, image, question, model, other, temperature, tokens, seed, document, pages],
            [conversation, question, left, right],
            api_name="ask",
            concurrency_limit=None,
            show_progress="hidden",
        )
        stop.click(None, cancels=[answering], api_visibility="private")
        # Not queued: when a short queued event ends, it closes a stream that a longer event has just started to use.
        direct: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        update = {"inputs": [conversation, model, other], "outputs": [left, right], **direct}
        gr.on([model.change, other.change], _show, **update, api_visibility="private")
        new.click(
            lambda: (PageConversation(), None, "", None, ""),
            None,
            [conversation, image, question, document, pages],
            cancels=[answering],
            api_visibility="private",
            **direct,
        ).then(_show, **update, api_visibility="private")
        page.load(None, js=WATCH_DROPS, api_visibility="private")
        several.click(  # queued: without a queue, Gradio prints the message
            lambda: gr.Info("A conversation is about one image, so only the first of these is used.", duration=8),
            show_progress="hidden",
            api_visibility="private",
        )
        for button, write, suffix in (
            (as_text, PageConversation.as_text, "txt"),
            (as_json, PageConversation.as_json, "json"),
        ):
            button.click(write, conversation, saved, api_name=button.elem_id, **direct).then(
                None, saved, None, js=f"(text) => ({SAVE})(text, 'conversation.{suffix}')", api_visibility="private"
            )
    page.queue(default_concurrency_limit=None, max_size=64)
    return page


def _path_of_upload(payload: ImageData | FileData | None) -> str | None:
    return None if payload is None else payload.path


def _choose_shown(image: str | None, document: str | None, pages: str) -> str | None:
    """Return the path of what a question is about, with the pages of a document."""
    chosen = "".join(pages.split())
    if image is not None and document is not None:
        raise _page_error("Both an image and a PDF document are uploaded. Please remove one of them.")
    if document is None:
        if chosen:
            raise _page_error("Pages are chosen, but no PDF document is uploaded.")
        return image
    if not chosen:
        return document
    if not re.fullmatch(r"[0-9,-]+", chosen):
        raise _page_error("Please write pages as in 1-3,7.")
    return page_name(document, chosen)


def _page_error(message: str) -> gr.Error:
    return gr.Error(message, duration=8, print_exception=False)  # a user's mistake is no fault of the server


def _window(side: int, name: str) -> gr.HTML:
    # Not a gr.Chatbot, which renders images and other HTML even with Markdown turned off.
    return gr.HTML(
        PageConversation().as_html(side, name), visible=name != OFF, min_width=260, js_on_load=COPY,
        autoscroll=True, elem_id=f"window_{side}", elem_classes="window", padding=False,
    )  # fmt: skip


def _show(conversation: PageConversation, model: str, other: str) -> tuple[Any, Any]:
    """Update both windows; the second is visible only when two models are compared."""
    return (
        gr.update(value=conversation.as_html(0, model)),
        gr.update(value=conversation.as_html(1, other), visible=other != OFF),
    )


class _Answering:
    """The event handler of a question."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def run(  # noqa: PLR0913, PLR0917 - Gradio passes the value of each component
        self,
        conversation: PageConversation,
        picture: str | None,  # Gradio's API calls the argument by this name, as in version 0.1
        question: str,
        model: str,
        other: str,
        temperature: float,
        tokens: int,
        seed: str | None,
        document: str | None = None,
        pages: str | None = None,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Show the question, then the answers as they arrive; two models answer at the same time."""
        if not question.strip():
            raise _page_error("Please write a question.")
        # Not `max_length` of the textbox, with which a browser cuts a pasted text silently.
        if len(question) > _MAX_QUESTION:
            raise _page_error(
                f"The question is too long: it has {len(question):,} characters, and {_MAX_QUESTION:,} are the limit. "
                "Please shorten it."
            )
        # Not a gr.Number, whose value is 0 when it is empty.
        if seed and not (seed.strip().isascii() and seed.strip().isdigit()):
            raise _page_error("The seed must be a whole number.")
        picture = _choose_shown(picture, document, pages or "")
        before = conversation
        if before.image != picture:
            conversation = PageConversation(picture)  # a conversation is about one image
        if picture is None and not conversation.exchanges:
            gr.Info("No image was uploaded, so the model answers without one.", duration=6)
        models = (model,) if other == OFF else (model, other)
        sampling = {"temperature": temperature, "max_tokens": tokens, "seed": int(seed) if seed else None}
        streams = [
            self._client.stream(name, conversation.history(side), question, picture, **sampling)
            for side, name in enumerate(models)
        ]
        exchange = Exchange(question, models, [""] * len(models))
        conversation.exchanges.append(exchange)
        yield conversation, "", *_show(conversation, model, other)
        try:
            async for side, piece in _merge_streams(streams):
                exchange.answers[side] += piece
                yield conversation, gr.skip(), *_show(conversation, model, other)
        except PageClientError as error:
            conversation.exchanges.remove(exchange)
            yield before, question, *_show(before, model, other)
            raise _page_error(str(error)) from None
        finally:
            exchange.done = True
        if conversation is not before and before.exchanges:
            gr.Info("A conversation is about one image, so this question has started a new one.", duration=6)
        yield conversation, gr.skip(), *_show(conversation, model, other)


async def _merge_streams(streams: Sequence[AsyncGenerator[str, None]]) -> AsyncGenerator[tuple[int, str], None]:
    """Yield the pieces of several streams as they arrive, each with the index of its stream."""
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
