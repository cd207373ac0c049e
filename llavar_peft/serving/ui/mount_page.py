"""Puts the page into the API's application: one process, one address."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

PREFIX: Final = "/ui"
_LARGEST_FILE: Final = 14 * 2**20  # bytes; in base64 it still fits the API's 20 MB
_EXAMPLES_SEED: Final = 3_000_017


def mount_page(app: FastAPI, *, models: Sequence[str], most_tokens: int, api_key: str | None = None) -> None:
    """Add the page under ``PREFIX``, before the application starts.

    Args:
        app: The API's application, whose models the page asks.
        models: Their names.
        most_tokens: That an answer can have.
        api_key: The API's key, which then guards the page as well.
    """
    # Gradio keeps uploads in a folder that all users of a machine share, unless it is told of another when imported.
    files = TemporaryDirectory(prefix="llavar-peft-page-")
    os.environ["GRADIO_TEMP_DIR"] = files.name
    app.state.page_files = files  # removed with the application
    import gradio as gr
    from starlette.middleware import Middleware

    from llavar_peft.serving.ui.chat_page import build_page
    from llavar_peft.serving.ui.page_client import PageClient
    from llavar_peft.serving.ui.page_guard import PageGuard
    from llavar_peft.serving.ui.page_theme import STYLE, make_theme

    with TemporaryDirectory() as folder:  # Gradio makes copies
        page = build_page(PageClient(app, models, most_tokens, api_key), draw_examples(Path(folder)))
    gr.mount_gradio_app(
        app, page, PREFIX, footer_links=[], run_history=False, show_error=False, max_file_size=_LARGEST_FILE,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, root_path=PREFIX,
        theme=make_theme(), css=STYLE,
    )  # fmt: skip
    # Not ``add_middleware``, which puts it outermost: the gate names, logs and counts what the guard refuses.
    app.user_middleware.append(Middleware(PageGuard, prefix=PREFIX, files=Path(files.name), api_key=api_key))


def draw_examples(folder: Path) -> list[tuple[str, str]]:
    """Draw an image of each kind.

    Args:
        folder: Gets the files.

    Returns:
        Files, each with a question about it.
    """
    examples = []
    settings = SynthSettings(style="plain", seed=_EXAMPLES_SEED, width=320)
    for number, kind in enumerate(settings.turns):
        drawn = draw_page(settings, number)
        path = folder / f"{kind.removesuffix('s')}.png"
        drawn.image.save(path)
        examples.append((str(path), drawn.questions[0][0]))
    return examples
