"""Write a report: the curves of a run, its figures next to the previous run's and the paper's, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llavar_peft.atomic_files import check_output_file
from llavar_peft.constants import RESOLVED_RECIPE_FILE
from llavar_peft.errors import ConfigError, DataError, count_of
from llavar_peft.evaluation.heights.height_results import read_height_results
from llavar_peft.evaluation.heights.heights_view import view_heights
from llavar_peft.evaluation.judge.judge_reviews import read_reviews, summarize_reviews
from llavar_peft.evaluation.report.report_view import Images, Labelled, bar_share, view_dataset
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER
from llavar_peft.evaluation.vqa.results_findings import find_in_all
from llavar_peft.evaluation.vqa.scored_results import Results, read_results
from llavar_peft.page.findings import choose_findings, find_in_run
from llavar_peft.page.report_page import REPORT_NAME, DatasetView, Head, write_report_page
from llavar_peft.page.run_log import RunLog, read_run
from llavar_peft.recipe.recipe_yaml import parse_yaml

RESULTS: Final = "*.results.json"
"""Results files in the folder of a run."""
HEIGHTS: Final = "*.heights.json"
"""Figures by letter height in the folder of a run."""
REVIEWS: Final = "*.reviews.jsonl"
"""A judge's reviews in the folder of a run."""
_MIN_SHARED: Final = 0.5  # share of the smaller result's questions that makes two results one data set


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """The content of a report.

    Attributes:
        results: Results files in order, in addition to those in the run's folder.
        reviews: Files of a judge's reviews in order, in addition to those in the run's folder.
        heights: Files of figures by letter height in order, in addition to those in the run's folder.
        before: Results of the previous run: files or a run's folder.
        images: Folders of images; by default those of the run's recipe.
        metric: The protocol that orders the examples and decides what changed; by default each result's first.
        images_per_row: Number of examples in each row; fewer if the page would grow beyond 3 MB.
        title: Title of the page; by default the name of the run.
    """

    results: Sequence[Path] = ()
    reviews: Sequence[Path] = ()
    heights: Sequence[Path] = ()
    before: Sequence[Path] = ()
    images: Sequence[Path] = ()
    metric: str | None = None
    images_per_row: int = 6
    title: str | None = None


def write_report(run_dir: Path | None, out: Path | None = None, settings: ReportSettings | None = None) -> Path:
    """Write the report of a run, of results, or of both. The same files give the same bytes.

    Args:
        run_dir: Folder of the run; None for results alone.
        out: The page; by default ``report.html`` in the folder of the run.
        settings: Content of the report.

    Returns:
        The path of the page.

    Raises:
        ConfigError: There is nothing to report, no path to write to, or no result has the metric.
        DataError: A file is invalid, or results on one data set contradict each other.
        EnvironmentFaultError: The page cannot be written.
    """
    settings = settings or ReportSettings()
    run = read_run(run_dir) if run_dir is not None else None
    page = out or (run_dir / REPORT_NAME if run_dir is not None else None)
    if page is None:
        raise ConfigError.at("report", "has neither a run nor an output file", "give the folder of a run, or --out")
    check_output_file(page, "--out")
    found = [path for path in _results_of(run) if path.resolve() not in {one.resolve() for one in settings.results}]
    now = [_labelled(path, run) for path in [*found, *settings.results]]
    before = [_labelled(path, None, before=True) for path in _previous(settings.before)]
    reviews = [*(sorted(run_dir.glob(REVIEWS)) if run_dir is not None else ()), *settings.reviews]
    given = [*(sorted(run_dir.glob(HEIGHTS)) if run_dir is not None else ()), *settings.heights]
    heights = [view_heights(read_height_results(path)) for path in dict.fromkeys(path.resolve() for path in given)]
    if (
        not now
        and not reviews
        and not heights
        and (run is None or not any(stage.steps or stage.probes for stage in run.stages))
    ):
        raise ConfigError.at(
            "report" if run_dir is None else str(run_dir), f"holds neither steps of a run nor results ({RESULTS})",
            "give the folder of a run (its output_dir), or --results",
        )  # fmt: skip
    chains = [_make_labels_unique([*_previous_of(before, chain), *chain]) for chain in _by_dataset(now)]
    chosen = [_metric(chain, settings.metric) for chain in chains]
    images = Images(settings.images or _images_of(run))

    def views(shown: int) -> list[DatasetView]:
        return [view_dataset(chain, protocol, images, shown) for chain, protocol in zip(chains, chosen, strict=True)]

    heads = [_head(chain, protocol) for chain, protocol in zip(chains, chosen, strict=True)]
    heads += [_judge_head(path) for path in dict.fromkeys(path.resolve() for path in reviews)]
    title = settings.title or (run_dir.resolve().name if run_dir is not None else "Evaluation")
    latest = [(chain[-1].results, protocol) for chain, protocol in zip(chains, chosen, strict=True)]
    in_run = find_in_run(run.stages) if run is not None else ()
    if latest:  # which have more records than the few images that a run looks at
        in_run = tuple(one for one in in_run if one.kind != "few")
    findings = choose_findings([*in_run, *find_in_all(latest)])
    return write_report_page(page, title, heads, views, run, settings.images_per_row, heights, findings)


def _results_of(run: RunLog | None) -> list[Path]:
    """Return results in the folders of a run and its stages, ordered by the stage whose model answered."""
    if run is None:
        return []
    folders = [run.folder, *(stage.folder for stage in run.stages)]
    paths = sorted({path for folder in folders for path in folder.glob(RESULTS)})
    names = [stage.name for stage in run.stages]

    def place(path: Path) -> tuple[int, str]:
        stage = _stage_of(read_results(path), run)
        return (len(names) if stage is None else names.index(stage), path.name)

    return sorted(paths, key=place)


def _stage_of(results: Results, run: RunLog) -> str | None:
    """Return the stage whose model answered, if its folder is in the run; the last stage's is at the top."""
    if results.setting.model is None:
        return None
    # The name may continue with " + ADAPTER" or " (QUANTIZATION)".
    model = Path(results.setting.model.split(" + ")[-1].split(" (")[0]).resolve()
    if not model.is_relative_to(run.folder.resolve()) or not run.stages:
        return None
    first = (*model.relative_to(run.folder.resolve()).parts, "")[0]
    return next((stage.name for stage in run.stages if stage.name == first), run.stages[-1].name)


def _labelled(path: Path, run: RunLog | None, *, before: bool = False) -> Labelled:
    results = read_results(path)
    stage = _stage_of(results, run) if run is not None else None
    name = path.name.removesuffix(".json").removesuffix(".results")
    if before:
        label = "previous run" if name in ("before", "previous") else f"previous run: {name}"
    else:
        label = name if stage is None else f"after {stage}"
    return Labelled(label, name, results)


def _previous(given: Sequence[Path]) -> list[Path]:
    """Return the given files, and the results in the given folders of runs."""
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = _results_of(read_run(path))
        if not inside:
            raise ConfigError.at(str(path), f"holds no results ({RESULTS})", "give files written by 'eval vqa --out'")
        paths += inside
    return paths


def _keys(results: Results) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(record.id, record.question, tuple(sorted(record.truths))) for record in results.records}


def _same_dataset(one: Results, other: Results) -> bool:
    keys, others = _keys(one), _keys(other)
    return len(keys & others) >= _MIN_SHARED * min(len(keys), len(others))


def _by_dataset(results: Sequence[Labelled]) -> list[list[Labelled]]:
    """Group results that answer the same questions, in order."""
    chains: list[list[Labelled]] = []
    for one in results:
        chain = next((chain for chain in chains if _same_dataset(chain[0].results, one.results)), None)
        if chain is None:
            chains.append([one])
        else:
            chain.append(one)
    return chains


def _previous_of(before: Sequence[Labelled], chain: Sequence[Labelled]) -> list[Labelled]:
    """Return the latest of the previous run's results on the same questions."""
    return [one for one in before if _same_dataset(one.results, chain[0].results)][-1:]


def _make_labels_unique(chain: Sequence[Labelled]) -> list[Labelled]:
    """Add the file's name to equal labels, and a number if the names are equal too."""
    labels = [one.label for one in chain]
    named = [one.label if labels.count(one.label) == 1 else f"{one.label} ({one.name})" for one in chain]
    numbered = [
        label if named.count(label) == 1 else f"{label} {named[: place + 1].count(label)}"
        for place, label in enumerate(named)
    ]
    return [Labelled(label, one.name, one.results) for label, one in zip(numbered, chain, strict=True)]


def _metric(chain: Sequence[Labelled], expected: str | None) -> str:
    """Return a protocol that all results were scored by."""
    shared = [name for name in _protocols(chain[-1]) if all(name in _protocols(one) for one in chain)]
    if expected in shared:
        return expected
    if expected is not None or not shared:
        have = ", ".join(shared) or "none in common"
        raise ConfigError.at(
            "--metric", f"{chain[-1].name} was not scored by {expected!r} (has {have})", "choose another metric"
        )
    return shared[0]


def _protocols(one: Labelled) -> list[str]:
    return list(one.results.records[0].scores)


def _head(chain: Sequence[Labelled], protocol: str) -> Head:
    latest = chain[-1].results
    figure = next(one for one in latest.figures if one.protocol.startswith(protocol))
    note = f"{figure.protocol}, {figure.low:.1f} to {figure.high:.1f}, {count_of(figure.records, 'record')}"
    if protocol in LOWER_IS_BETTER:
        note += ", lower is better"
    return Head(Path(latest.dataset).stem, f"{figure.value:.1f}", bar_share(figure.value), note)


def _judge_head(path: Path) -> Head:
    """Return the figure of a judge's reviews: our score in percent of the reference's."""
    summary = summarize_reviews(read_reviews(path))
    *kinds, whole = summary.categories
    judges = dict.fromkeys(str(how["judge_model"]) for how in summary.settings if "judge_model" in how)
    by = f" by {', '.join(judges)}" if judges else ""
    parts = [f"{kind.name} {kind.ratio:.1f}" for kind in kinds if len(kinds) > 1 and kind.ratio is not None]
    if whole.ratio is None or whole.low is None or whole.high is None:
        raise DataError.at(str(path), "gives the reference no points", "check the judge's replies")
    if summary.unscored:
        parts.append(f"{len(summary.unscored)} without scores")
    note = [
        f"judged{by} against the reference, {whole.low:.1f} to {whole.high:.1f}",
        count_of(whole.reviews, "review"),
        *parts,
    ]
    return Head(path.name.split(".")[0], f"{whole.ratio:.1f}", bar_share(whole.ratio), ", ".join(note))


def _images_of(run: RunLog | None) -> list[Path]:
    """Return the existing folders of images of a run's recipe."""
    recipe = parse_yaml(run.recipe, str(run.folder / RESOLVED_RECIPE_FILE)) if run is not None and run.recipe else None
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    named: list[str] = []
    for stage in stages if isinstance(stages, list) else ():
        data = stage.get("data") if isinstance(stage, dict) else None
        images = data.get("images") if isinstance(data, dict) else None
        named += [one for one in (images if isinstance(images, list) else [images]) if isinstance(one, str)]
    return [Path(name) for name in dict.fromkeys(named) if Path(name).is_dir()]
