"""Scores of fields: normalized values, the published protocols, and the command with its report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llavar_peft.cli import main
from llavar_peft.errors import DataError
from llavar_peft.evaluation.fields.field_values import flatten, normalize_value
from llavar_peft.evaluation.fields.score_fields import compare_fields, score_forms
from llavar_peft.evaluation.fields.tree_distance import (
    FormNode,
    make_tree,
    normalize_form,
    tree_accuracy,
    tree_distance,
)
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

SAME = (
    ("1.234,50", "1,234.50 EUR", "$1234.5", 1234.5, "1 234,50 €", "1'234.50", "USD 1,234.50"),
    ("12", "12.00", "12,0", 12, 12.0, "€12"),
    ("1,234", "1.234", 1234, "1234"),
    ("0.125", "0,125", 0.125, ".125"),
    ("-3.50", "3.50-", -3.5, "-$3.50"),
    ("2024-03-07", "07.03.2024", "7/3/24", "7-3-2024", "7 March 2024", "Mar 7, 2024", "7th mar 2024", "2024/3/7"),
    ("2024-03-17", "17.03.2024", "03/17/2024"),
    ("1999-12-31", "31.12.99"),
    (" Caf\u0065\u0301  Uno ", "caf\u00e9 uno", "CAFÉ\u00a0UNO"),
    (None, "", "  "),
    (True, "true"),
)
OTHER = (
    "0042", "42", "4.2", "31.02.2024", "2024-03-07", "2024-07-03", "KD-4821", "19 %", "19", "Total 12", "7 Maybe",
    "-19", "1e5",
)  # fmt: skip


@pytest.mark.parametrize("values", SAME, ids=str)
def test_values_that_mean_the_same(values: tuple[Any, ...]) -> None:
    assert len({normalize_value(value) for value in values}) == 1


def test_values_that_differ() -> None:
    assert len({normalize_value(value) for value in OTHER}) == len(OTHER)


@given(
    st.text(max_size=50)
    | st.floats(allow_nan=False)
    | st.integers()
    | st.from_regex(r"[$€]?[0-9., ']{1,9}-?", fullmatch=True)
)
@example("1.0010")
@settings(max_examples=200)
def test_normalization_is_stable(value: Any) -> None:
    once = normalize_value(value)
    assert normalize_value(once) == once or not re.search(r"\d", once)


def _brute(first: list[FormNode], second: list[FormNode]) -> int:
    """Return the distance of two forests by its recursive definition (Zhang and Shasha, lemma 4)."""
    if not first and not second:
        return 0
    if not first:
        return sum(node.cost + _brute([], node.children) for node in second)
    if not second:
        return sum(node.cost + _brute(node.children, []) for node in first)
    one, other = first[-1], second[-1]
    return min(
        _brute([*first[:-1], *one.children], second) + one.cost,
        _brute(first, [*second[:-1], *other.children]) + other.cost,
        _brute(first[:-1], second[:-1]) + _brute(one.children, other.children) + one.cost_to(other),
    )


LABELS = st.sampled_from(["a", "b", "total"])
TREES = st.recursive(
    st.builds(FormNode, LABELS, st.just(True)),
    lambda inner: st.builds(FormNode, LABELS, st.just(False), st.lists(inner, max_size=3)),
    max_leaves=4,
)


@given(TREES, TREES)
@settings(max_examples=60)
def test_the_distance_is_that_of_its_definition(first: FormNode, second: FormNode) -> None:
    assert tree_distance(first, second) == _brute([first], [second])
    assert tree_distance(first, first) == 0


def test_cords_accuracy() -> None:
    """By hand: the truth has the keys menu, total, name, price (each twice) and entries: 2 + 2 + 4, and 15 letters."""
    truth = {"menu": [{"name": "tea", "price": "2.50"}, {"name": "soup", "price": "4"}], "total": "6.5"}
    empty = tree_distance(make_tree({}), make_tree(normalize_form(truth)))
    assert empty == 2 + 2 + 4 + len("tea2.50soup46.5")
    assert tree_accuracy(truth, truth) == 1
    assert tree_accuracy({}, truth) == tree_accuracy(None, truth) == tree_accuracy("tea", truth) == 0
    one_letter = json.loads(json.dumps(truth).replace("soup", "soap"))
    assert tree_accuracy(one_letter, truth) == pytest.approx(1 - 1 / empty)
    renamed = {"menu": truth["menu"], "whole": "6.5"}
    assert tree_accuracy(renamed, truth) == pytest.approx(1 - 1 / empty)
    assert tree_accuracy({**truth, "other": "x" * 99}, truth) == 0
    # Donut's ``normalize_dict`` drops 0 and false, except 0 in a list.
    assert tree_accuracy({**truth, "discount": 0, "paid": False, "left": None, "note": ""}, truth) == 1
    assert tree_accuracy({**truth, "discount": [0]}, truth) == pytest.approx(1 - 2 / empty)
    assert normalize_form({"b": {"x": ""}, "aa": [" k ", 3, None], "a": None}) == {"aa": ["k", "3"]}


def form(number: int, truth: Any, answer: str) -> VqaQuestion:
    return VqaQuestion(str(number), "Return JSON.", (json.dumps(truth),), f"{number}.png", answer)


TRUTH = {
    "shop": "ARGON",
    "items": [{"name": "TEA", "price": "2.50"}, {"name": "SOUP", "price": "4.00"}],
    "total": "6.50",
}


def test_figures() -> None:
    answers = (
        json.dumps(TRUTH),
        json.dumps({**TRUTH, "total": 6.5, "shop": "argon"}),  # the same after normalization
        json.dumps({**TRUTH, "items": [TRUTH["items"][0]], "tax": "1"}),  # two fields missing, one too many
        json.dumps(TRUTH)[:-5],  # cut off
        '["ARGON"]',
    )
    results = score_forms([form(n, TRUTH, one) for n, one in enumerate(answers)], "forms", Setting())
    figures = {one.protocol: one for one in results.figures}
    values = {name: round(one.value, 2) for name, one in figures.items()}
    assert all(one.records == 5 for one in results.figures)
    assert values["valid JSON"] == 80
    assert values["documents right"] == 40
    assert values["fields right"] == pytest.approx(100 * (6 + 6 + 4) / 30, abs=0.01)
    assert values["fields F1"] == pytest.approx(200 * 16 / (6 + 6 + 5 + 0 + 1 + 30), abs=0.01)
    assert values["SROIE precision"] == pytest.approx(100 * (6 + 4 + 4) / (6 + 6 + 5 + 1), abs=0.01)
    assert values["SROIE recall"] == pytest.approx(100 * 14 / 30, abs=0.01)
    assert values["field total"] == 60
    assert values["field items.name"] == 40
    assert values["field items.name F1"] == pytest.approx(200 * (2 + 2 + 1) / (2 + 2 + 1 + 10), abs=0.01)
    assert next(iter(figures)) == "fields F1"
    low, high = figures["documents right"].low, figures["documents right"].high
    assert (low, high) == pytest.approx((11.8, 76.9), abs=0.1)  # Wilson's, of 2 of 5


def test_an_interval_says_that_few_records_mean_little() -> None:
    """0 of 20 is 0 to 16 %, and 20 of 20 is 84 to 100 %, for ratios of several points too."""
    wrong = score_forms([form(n, TRUTH, "no") for n in range(20)], "forms", Setting())
    right = score_forms([form(n, TRUTH, json.dumps(TRUTH)) for n in range(20)], "forms", Setting())
    for name in ("documents right", "fields F1", "CORD nTED", "field total"):
        (none,) = (one for one in wrong.figures if one.protocol == name)
        (all_right,) = (one for one in right.figures if one.protocol == name)
        assert (none.value, none.low, none.high) == pytest.approx((0, 0, 16.1), abs=0.1)
        assert (all_right.value, all_right.low, all_right.high) == pytest.approx((100, 83.9, 100), abs=0.1)


def test_wrong_fields_are_marked() -> None:
    answer = json.dumps({"shop": "ARGUN", "items": [{"name": "soup", "price": 4}], "total": "6.50", "extra": None})
    marked = [text.strip() for text, wrong in compare_fields(answer, json.dumps(TRUTH)) if wrong]
    missing = ["shop: missing (argon)", "items.name: missing (tea)", "items.price: missing (2.5)"]
    assert marked == ["shop: ARGUN", *missing]
    assert [wrong for _, wrong in compare_fields("nothing", json.dumps(TRUTH))] == [True]


def test_a_truth_that_is_no_json_is_named() -> None:
    with pytest.raises(DataError, match=r"7: the correct answer is no JSON object \(got 'six'\)"):
        score_forms([VqaQuestion("7", "?", ("six",), None, "{}")], "forms", Setting())
    with pytest.raises(DataError, match="no form has a field"):
        score_forms([form(0, {"a": None}, "{}")], "forms", Setting())


def test_flatten_names_fields_by_their_path() -> None:
    assert [*flatten(TRUTH)][1:3] == [("items.name", "TEA"), ("items.price", "2.50")]


@pytest.mark.slow
def test_the_command_and_the_report(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, schema, results, page = (tmp_path / name for name in ("forms", "s.json", "r.json", "page.html"))
    assert main(["synth", "--out", str(drawn), "--n", "2", "--style", "plain", "--task", "extract"]) == 0
    fields = {name: {"type": "string", "maxLength": 3} for name in ("shop", "total")}
    schema.write_text(json.dumps({"type": "object", "properties": fields, "required": list(fields)}))
    arguments = ["eval", "fields", "--dataset", str(drawn / "records.json"), "--images", str(drawn / "images")]
    arguments += ["--model", str(checkpoint), "--schema", str(schema), "--out", str(results)]
    assert main(arguments) == 0
    written = json.loads(results.read_text())
    assert all(4 < record["letter_height"] < 60 for record in written["records"])
    figures = {one["protocol"]: one["value"] for one in written["figures"]}
    assert figures["valid JSON"] == 100
    assert figures["documents right"] == 0
    assert "field total F1" in capsys.readouterr().out
    assert main(["report", "--results", str(results), "--images", str(drawn / "images"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "field total" in text
    assert "total: missing" in text or "total: " in text
    assert main(["eval", "fields", "--dataset", str(drawn / "records.json")]) == 2
