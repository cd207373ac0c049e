"""The protocols of the paper's appendices: hand-computed cases, and the published predictions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from llavar_peft.errors import DataError, MissingDependencyError
from llavar_peft.evaluation.vqa import caption_metrics
from llavar_peft.evaluation.vqa.answer_metrics import PROTOCOLS
from llavar_peft.evaluation.vqa.benchmark_protocols import (
    BENCHMARK_PROTOCOLS,
    check_packages,
    read_option,
    score_column,
)
from llavar_peft.evaluation.vqa.caption_metrics import tokenize
from llavar_peft.evaluation.vqa.protocol_lines import PROTOCOL_NAMES, explain_protocol, protocol_anchor
from llavar_peft.evaluation.vqa.scored_results import Setting, score_answers
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion


def value(protocol, answer: str, *truths: str) -> float:
    return score_column(protocol, [answer], [truths])[0].value


def meteor(precision: float, recall: float, chunks: float, matches: int, words: int) -> float:
    """METEOR 1.5's formula with its parameters for English. Source: Denkowski and Lavie 2014, section 2."""
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    return mean * (1 - (0 if matches == words and chunks == 1 else 0.6 * (chunks / matches) ** 0.2))


@pytest.mark.parametrize(
    ("protocol", "answer", "truths", "expected"),
    [
        ("rouge-l", "The sign says STOP.", ["stop"], 2.44 * 0.25 * 1 / (1 + 1.44 * 0.25)),
        ("rouge-l", "a b", ["b a"], 0.5),  # the order counts
        ("rouge-l", "a b c d", ["a b", "a b c d e f g h"], 2.44 / 2.44 * 1.0),  # each side takes its best truth
        ("rouge-l", "tea", ["coffee"], 0),
        ("rouge-l", "", ["coffee"], 0),
        ("rouge-l", "!", ["!"], 1),  # nothing else is in it
        ("rouge-l", "No, it isn't.", ["it isn't, no"], 2 / 3 * 0 + 0.75),  # no | it | is n't: 3 of 4 in order
        ("meteor", "chess club", ["Chess Club"], 1),
        ("meteor", "the club of chess", ["chess club"], meteor(1.5 / 2, 1, 2, 2, 99)),
        ("meteor", "clubs", ["club"], meteor(0.6, 0.6, 1, 1, 1)),  # a stem
        ("meteor", "the", ["club"], 0),
        ("meteor", "", ["club"], 0),
        ("long-correct", "It is by Agatha Christie, I think", ["AGATHA CHRISTIE"], 1),
        ("long-partial", "It is by Agatha Christie, I think", ["AGATHA CHRISTIE"], 0),
        ("long-partial", "It is by Agata Christi, I think", ["AGATHA CHRISTIE"], 1),
        ("long-partial", "abcdef______", ["abcdefghijkl"], 1),  # exactly half
        ("long-partial", "abcde_______", ["abcdefghijkl"], 0),
        ("long-partial", "abcdefg", ["abcdefghijkl"], 1),  # a short answer is compared as a whole
        ("long-partial", "short, then abcdefghijkX", ["short", "abcdefghijkl"], 1),  # the short truth does not count
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "95.0", ["100"], 1),
        ("relaxed", "105.1", ["100"], 0),
        ("relaxed", "-100", ["-104"], 1),
        ("relaxed", "12 %", ["0.12"], 1),
        ("relaxed", "12", ["12%"], 0),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "0", ["0"], 1),
        ("relaxed", "nan", ["5"], 0),
        ("relaxed", "inf", ["inf"], 1),  # a text
        ("relaxed", "Yes", ["no", "yes"], 1),
        ("relaxed", "It is yes", ["yes"], 0),
        ("scienceqa", "LECTURE: water flows.\nThe answer is B.", ["B"], 1),
        ("scienceqa", "The answer is A. The answer is B.", ["B"], 0),
        ("scienceqa", "", ["A"], 0),
    ],
)  # fmt: skip
def test_protocols(protocol, answer: str, truths: list[str], expected: float) -> None:
    assert value(protocol, answer, *truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"), (" C \n", "C"), ("C.", "C"), ("(C)", "C"), ("C. Because", "C"), ("C\nBecause", "C"),
        ("The answer is C", "C"), ("So The answer is C. Right?", "C"), ("Cats", None), ("c", None), ("F", None),
        ("I think A or C", None), ("The answer is Cats", None), ("The answer is C. The answer is C.", "C"),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert read_option(answer) == letter


def test_cider_of_three_records() -> None:
    """Computed by hand: the rarity of a word in one record of three is log 3, in two log 3/2; lengths are equal."""
    rare, known = math.log(3), math.log(3 / 2)
    found = score_column("cider", ["red tea", "red cup", "nothing"], [["red tea"], ["red cup"], ["blue"]])
    whole = 10 / 4 * 2  # single words and pairs agree; there are no longer ones
    assert [one.value for one in found] == pytest.approx([whole, whole, 0])
    one, _, _ = score_column("cider", ["red cup", "red cup", "x"], [["red tea"], ["red cup"], ["blue"]])
    assert one.value == pytest.approx(10 / 4 * known**2 / (known**2 + rare**2))
    twice, _, _ = score_column("cider", ["tea", "x", "x"], [["tea", "green tea"], ["a"], ["b"]])
    shorter = math.exp(-1 / 72) * rare**2 / (rare * math.sqrt(2 * rare**2))
    assert twice.value == pytest.approx(10 / 4 * (1 + shorter) / 2)
    assert score_column("cider", ["red"], [["red"]])[0].value == 0  # one record has no rare words


def test_words_are_those_of_the_tokenizer() -> None:
    assert tokenize("It's $5.99 (or \"less\")... isn't it?") == [
        "it", "'s", "$", "5.99", "(", "or", "less", ")", "is", "n't", "it",
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", BENCHMARK_PROTOCOLS)
def test_truths_that_a_protocol_cannot_use_are_named(protocol) -> None:
    with pytest.raises(DataError, match="without a truth"):
        score_column(protocol, ["a", "b"], [["right"], [" "]])
    needed = {"long-correct": "longer than 10", "long-partial": "longer than 10", "scienceqa": "letter of an option"}
    if protocol in needed:
        with pytest.raises(DataError, match=needed[protocol]):
            score_column(protocol, ["a"], [["right"]])


def test_figures() -> None:
    """Only long truths count; letters of listed options are scored by their own protocol alone."""
    questions = [
        VqaQuestion(str(number), "Q?", (truth,), answer=said)
        for number, (said, truth) in enumerate(
            [("a lighthouse", "lighthouses"), ("the lighthouses", "lighthouses"), ("x", "x")]
        )
    ]
    figures = score_answers(questions, "d", Setting(), ("long-correct", "long-partial")).figures
    assert [(one.value, one.records) for one in figures] == [(50, 2), (50, 2)]
    assert {one.protocol for one in score_answers(questions, "d", Setting()).figures}.isdisjoint(BENCHMARK_PROTOCOLS)
    for asked, found in (("Q?\nOptions: (A) x (B) y", "scienceqa"), ("Q?\nA. x\nB. y", "scienceqa"), ("Q?", "")):
        letters = [VqaQuestion(str(number), asked, (truth,), answer="A") for number, truth in enumerate("ABCA")]
        figures = score_answers(letters, "d", Setting()).figures
        assert [(one.protocol, one.value) for one in figures if one.protocol == "scienceqa"] == [(found, 50)] * bool(
            found
        )
        assert (len(figures) == 1) == bool(found)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    caption_metrics._nltk.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    with pytest.raises(MissingDependencyError, match=r"need the package nltk.*\n?.*llavar-peft\[eval\]"):
        check_packages(["exact", "cider"])
    check_packages(["exact"])
    monkeypatch.undo()
    assert tokenize("text") == ["text"]


@pytest.mark.parity
@pytest.mark.slow
def test_the_published_predictions(shared_dir: Path) -> None:
    """The figures of ``docs/reproducing.md``. Source of the paper's: arXiv 2306.17107, appendix D."""
    file = shared_dir / "reference" / "vqa" / "STVQA.json"
    if not file.is_file():
        pytest.skip(f"the published predictions are not at {file}")
    records = json.loads(file.read_text(encoding="utf-8"))
    answers, truths = [one["answer"] for one in records], [one["gt_answers"] for one in records]
    found = {
        name: round(100 * sum(one.points for one in score_column(name, answers, truths)) / len(records), 1)
        for name in ("meteor", "rouge-l", "cider")
    }
    assert found == {"meteor": 11.9, "rouge-l": 14.3, "cider": 30.1}  # the paper's: 12.8, 14.3, 30.9


def test_each_protocol_has_a_line_and_an_anchor() -> None:
    """What the report shows beside a protocol's name, and where the documentation explains it."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {*PROTOCOLS, *BENCHMARK_PROTOCOLS} <= set(PROTOCOL_NAMES)
    for name in PROTOCOL_NAMES:
        assert f'<span id="{protocol_anchor(name)}">`{name}`</span>' in page, name
        assert "\n" not in explain_protocol(name)
        assert explain_protocol(name)
    assert explain_protocol("mme accuracy+") == explain_protocol("mme")
    assert explain_protocol("mme-first-word score") == explain_protocol("mme-first-word")
    assert explain_protocol("field a.b c") == explain_protocol("field NAME")
    assert explain_protocol("field a.b c F1") == explain_protocol("field NAME F1")
    assert explain_protocol("own") == ""
