"""The page of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llavar_peft.atomic_files import staging_path
from llavar_peft.page.findings import find_in_run
from llavar_peft.page.image_gallery import MOST_CARDS, Gallery, make_gallery
from llavar_peft.page.named_probes import NamedProbe, named_probes
from llavar_peft.page.page_templates import MOST_BYTES, render, write_page
from llavar_peft.page.run_figures import (
    describe_stage,
    drop_rows,
    headline,
    on_other_records,
    probe_rows,
    run_figures,
)
from llavar_peft.page.run_log import RunLog, read_run

PAGE_NAME = "index.html"
_LONGEST_RECIPE = 40_000


def has_run_page(run_dir: Path) -> bool:
    """Return whether a run has a complete page; a run that is killed while writing it leaves a temporary file."""
    return (run_dir / PAGE_NAME).is_file() and not staging_path(run_dir / PAGE_NAME).exists()


def write_run_page(
    run_dir: Path,
    *,
    title: str | None = None,
    extra: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    model_dir: str | None = None,
) -> Path:
    """Write the page of a run from the files that the run has written so far; the same files give the same bytes.

    Args:
        run_dir: Folder with ``recipe.yaml``, ``versions.json``, ``stages.json`` and one folder per stage, each of which
            may still be missing.
        title: Heading of the page; the name of the folder by default.
        extra: Rows (label, value) for the table of facts.
        notes: Paragraphs under the headline, as plain text.
        model_dir: Folder of the model for the ``llavar-peft ask`` command on the page; by default that of the run.

    Returns:
        The page, ``run_dir/index.html``.

    Raises:
        DataError: There is no such folder, or a file in it has content that no run writes.
        EnvironmentFaultError: The page cannot be written.
    """
    run = read_run(run_dir)
    probes = named_probes(run.stages)
    most = MOST_CARDS
    while True:
        gallery = make_gallery(probes, most)
        page = render(
            "run.html.j2",
            title=title or run_dir.resolve().name,
            facts=tuple(extra),
            **{**run_values(run, probes, gallery, model_dir), "notes": [*notes, *run.remarks]},
        )
        if len(page) <= MOST_BYTES or not gallery.cards:
            break
        most = len(gallery.cards) // 2
    return write_page(run_dir / PAGE_NAME, page)


def run_values(
    run: RunLog, probes: Sequence[NamedProbe], gallery: Gallery, model_dir: str | None = None
) -> dict[str, object]:
    """Return the values of ``run_stages.html.j2`` and ``run_samples.html.j2`` by name, and those of the headline."""
    return {
        "findings": find_in_run(run.stages),
        "headline": headline(probes),
        "figures": run_figures(run.stages),
        "other_records": on_other_records(probes),
        "probes": probe_rows(probes),
        "stages": [describe_stage(stage) for stage in run.stages],
        "gallery": gallery,
        "dropped": drop_rows(run.stages),
        "recipe": run.recipe[:_LONGEST_RECIPE],
        "recipe_cut": len(run.recipe) > _LONGEST_RECIPE,
        "versions": run.versions,
        "notes": list(run.remarks),
        "command": _ask_command(model_dir or str(run.folder), gallery),
    }


def _ask_command(model_dir: str, gallery: Gallery) -> str:
    """Return a command that asks the model, with a short question of this run if there is one."""
    questions = (asked.question for card in gallery.cards for asked in card.asked)
    question = next((one for one in questions if one.isprintable() and len(one) <= 80), "What is written here?")
    quoted = shlex.quote(question) if set(question) & set('"$`\\!') else f'"{question}"'
    return f"llavar-peft ask --model {shlex.quote(model_dir)} --image FILE {quoted}"
