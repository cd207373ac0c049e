"""Puts the page together and writes it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.page.figures import (
    describe_stage,
    drop_rows,
    headline,
    look_rows,
    on_other_records,
    percent,
    run_figures,
)
from llavar_peft.page.gallery import MOST_CARDS, Gallery, make_gallery
from llavar_peft.page.looks import Moment, moments
from llavar_peft.page.records import RunLog, read_run

PAGE_NAME = "index.html"
MOST_BYTES = 3_000_000
_LONGEST_RECIPE = 40_000


def write_run_page(
    run_dir: Path,
    *,
    title: str | None = None,
    extra: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    model_dir: str | None = None,
) -> Path:
    """Writes a run's page from the files that the run wrote so far; the same files give the same bytes.

    Args:
        run_dir: The run's folder: ``recipe.yaml``, ``versions.json``, ``stages.json`` and one folder per stage, each
            of which may be missing still.
        title: Heading of the page; the folder's name by default.
        extra: Rows (label, value) for the table of facts.
        notes: Paragraphs under the headline, as plain text.
        model_dir: The model's folder as ``llavar-peft ask`` should be given it.

    Returns:
        The page, ``run_dir/index.html``.

    Raises:
        DataError: There is no such folder, or a file in it holds something else than a run writes.
        EnvironmentFaultError: The page cannot be written there.
    """
    run = read_run(run_dir)
    looks = moments(run.stages)
    most = MOST_CARDS
    while True:
        gallery = make_gallery(looks, most)
        page = _render(run, looks, gallery, title or run_dir.resolve().name, extra, notes, model_dir)
        if len(page) <= MOST_BYTES or not gallery.cards:
            break
        most = len(gallery.cards) // 2
    return _replace(run_dir / PAGE_NAME, page)


def _render(
    run: RunLog,
    looks: Sequence[Moment],
    gallery: Gallery,
    title: str,
    extra: Sequence[tuple[str, str]],
    notes: Sequence[str],
    model_dir: str | None,
) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    text = environment.get_template("run.html.j2").render(
        title=title,
        headline=headline(looks),
        figures=run_figures(run.stages),
        other_records=on_other_records(looks),
        looks=look_rows(looks),
        stages=[describe_stage(stage) for stage in run.stages],
        gallery=gallery,
        dropped=drop_rows(run.stages),
        recipe=run.recipe[:_LONGEST_RECIPE],
        recipe_cut=len(run.recipe) > _LONGEST_RECIPE,
        versions=run.versions,
        facts=tuple(extra),
        notes=[*notes, *run.remarks],
        command=_ask_command(model_dir, gallery),
    )
    return text.encode("utf-8", errors="replace")


def _ask_command(model_dir: str | None, gallery: Gallery) -> str:
    """Returns the command that asks the model further, with a question of this run where there is a short one."""
    questions = (asked.question for card in gallery.cards for asked in card.asked)
    question = next((one for one in questions if one.isprintable() and len(one) <= 80), "What is written here?")
    quoted = shlex.quote(question) if set(question) & set('"$`\\!') else f'"{question}"'
    return f"llavar-peft ask --model {shlex.quote(model_dir) if model_dir else 'DIR'} --image FILE {quoted}"


def _replace(path: Path, page: bytes) -> Path:
    """Writes beside the old page, then puts the new one in its place, so that no reader meets half a page."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with aside.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise EnvironmentFaultError.at(
            str(path), f"the page cannot be written ({error.strerror})", "free space there, or allow writing"
        ) from error
    return path
