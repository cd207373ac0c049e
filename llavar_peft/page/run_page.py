"""Puts the page together and writes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llavar_peft.atomic_files import staging_path
from llavar_peft.page.image_gallery import MOST_CARDS, Gallery, make_gallery
from llavar_peft.page.page_templates import MOST_BYTES, render, write_page
from llavar_peft.page.probe_moments import ProbeMoment, moments
from llavar_peft.page.run_figures import (
    describe_stage,
    drop_rows,
    headline,
    look_rows,
    on_other_records,
    run_figures,
)
from llavar_peft.page.run_log import RunLog, read_run

PAGE_NAME = "index.html"
_LONGEST_RECIPE = 40_000


def has_run_page(run_dir: Path) -> bool:
    """Whether a run has its page, whole: a run that was killed while it wrote it has not."""
    return (run_dir / PAGE_NAME).is_file() and not staging_path(run_dir / PAGE_NAME).exists()


def write_run_page(
    run_dir: Path,
    *,
    title: str | None = None,
    extra: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    model_dir: str | None = None,
) -> Path:
    """Write a run's page from the files that the run wrote so far; the same files give the same bytes.

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
        page = render(
            "run.html.j2",
            title=title or run_dir.resolve().name,
            facts=tuple(extra),
            **{**run_values(run, looks, gallery, model_dir), "notes": [*notes, *run.remarks]},
        )
        if len(page) <= MOST_BYTES or not gallery.cards:
            break
        most = len(gallery.cards) // 2
    return write_page(run_dir / PAGE_NAME, page)


def run_values(
    run: RunLog, looks: Sequence[ProbeMoment], gallery: Gallery, model_dir: str | None = None
) -> dict[str, object]:
    """Gathers what the templates of a run's sections show.

    Args:
        run: What it wrote.
        looks: Its looks.
        gallery: Images of them.
        model_dir: The model's folder as ``llavar-peft ask`` should be given it.

    Returns:
        Values by their names in ``run_stages.html.j2`` and ``run_rest.html.j2``, and the headline's.
    """
    return {
        "headline": headline(looks),
        "figures": run_figures(run.stages),
        "other_records": on_other_records(looks),
        "looks": look_rows(looks),
        "stages": [describe_stage(stage) for stage in run.stages],
        "gallery": gallery,
        "dropped": drop_rows(run.stages),
        "recipe": run.recipe[:_LONGEST_RECIPE],
        "recipe_cut": len(run.recipe) > _LONGEST_RECIPE,
        "versions": run.versions,
        "notes": list(run.remarks),
        "command": _ask_command(model_dir, gallery),
    }


def _ask_command(model_dir: str | None, gallery: Gallery) -> str:
    """Return the command that asks the model further, with a question of this run where there is a short one."""
    questions = (asked.question for card in gallery.cards for asked in card.asked)
    question = next((one for one in questions if one.isprintable() and len(one) <= 80), "What is written here?")
    quoted = shlex.quote(question) if set(question) & set('"$`\\!') else f'"{question}"'
    return f"llavar-peft ask --model {shlex.quote(model_dir) if model_dir else 'DIR'} --image FILE {quoted}"
