"""Mounting the page in the API's application, so that one process serves both."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from llavar_peft.atomic_files import disk_errors
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.errors import EnvironmentFaultError

if TYPE_CHECKING:
    from fastapi import FastAPI

PREFIX: Final = "/ui"
_MAX_FILE_BYTES: Final = 14 * 2**20  # base64 of it is below the API's limit of 20 MB
_EXAMPLES_SEED: Final = 3_000_017


class PageFiles:
    """The private folder of a page's images, which is removed at the end, and the examples in it.

    Raises:
        EnvironmentFaultError: No folder for temporary files can be written, or the disk is full.
    """

    def __init__(self) -> None:
        try:
            parent = tempfile.gettempdir()
        except FileNotFoundError as error:
            raise EnvironmentFaultError.at(
                "--ui", "no folder for temporary files can be written", "set TMPDIR to a folder that can be written"
            ) from error
        with disk_errors(Path(parent)):
            self._folder = TemporaryDirectory(prefix="llavar-peft-page-", dir=parent)
            self.path = Path(self._folder.name)
            self.examples = draw_examples(self.path)

    def remove(self) -> None:
        """Remove the folder, also if the process does not end as Python processes do."""
        self._folder.cleanup()


def mount_page(
    app: FastAPI, *, models: Sequence[str], max_tokens: int, api_key: str | None = None, files: PageFiles | None = None
) -> None:
    """Add the page at ``PREFIX`` to an application that has not started.

    Args:
        app: The application from ``create_app``.
        models: The models that users can choose.
        max_tokens: Largest number of tokens in an answer.
        api_key: The API's key, which is then required for the page as well.
        files: The folder of the page's images; None creates one.
    """
    # By default, Gradio keeps uploads in a folder that all users of the machine share. It reads this variable when it
    # is imported and when a page is built.
    files = files or PageFiles()
    os.environ["GRADIO_TEMP_DIR"] = str(files.path)
    app.state.page_files = files  # removed with the application
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import RedirectResponse

    from llavar_peft.serving.ui.chat_page import build_page
    from llavar_peft.serving.ui.page_client import PageClient
    from llavar_peft.serving.ui.page_guard import PageGuard
    from llavar_peft.serving.ui.page_theme import STYLE, make_theme

    with disk_errors(files.path, only_full=True):  # Gradio copies the examples
        page = build_page(PageClient(app, models, max_tokens, api_key), files.examples)
    gr.mount_gradio_app(
        app, page, PREFIX, footer_links=[], run_history=False, show_error=False, max_file_size=_MAX_FILE_BYTES,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, root_path=PREFIX,
        theme=make_theme(), css=STYLE,
    )  # fmt: skip
    # Clients need no more of the version than its first number.
    page.config["version"] = page.config["version"].partition(".")[0]
    app.add_api_route("/", lambda: RedirectResponse(f"{PREFIX}/"), methods=["GET", "HEAD"], include_in_schema=False)
    # `add_middleware` would put the guard outermost. Behind RequestMiddleware, requests that it rejects have an ID and
    # are logged and counted.
    guard = Middleware(
        PageGuard, prefix=PREFIX, files=files.path, api_key=api_key, budget=app.state.body_budget
    )  # fmt: skip
    app.user_middleware.append(guard)


def draw_examples(folder: Path) -> list[tuple[str, str]]:
    """Draw one image of each kind into a folder, and return each file with a question about it."""
    examples = []
    settings = SynthSettings(style="plain", seed=_EXAMPLES_SEED, width=320)
    for number, kind in enumerate(settings.turns):
        drawn = draw_page(settings, number)
        path = folder / f"{kind.removesuffix('s')}.png"
        drawn.image.save(path)
        examples.append((str(path), drawn.questions[0][0]))
    return examples
