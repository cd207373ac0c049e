"""The protocols: the published figures, the ways they are known for, and what must hold for any text."""

import json
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavar_peft.data.text_metrics import is_blank
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import (
    LOWER_IS_BETTER,
    PROTOCOLS,
    Protocol,
    Score,
    normalize_answer,
    score,
)
from llavar_peft.evaluation.vqa.confidence_intervals import difference_interval, ratio_intervals, sign_test, sum_by_name
from llavar_peft.evaluation.vqa.scored_results import Answered, Setting, rate, score_answers
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

texts = st.one_of(
    st.text(max_size=30), st.text("ab $.,'-5\nÀß中", max_size=12), st.sampled_from(["", "...", "$5", "a"])
)
visible_texts = texts.filter(lambda text: not is_blank(text))
truth_lists = st.tuples(visible_texts, st.lists(texts, max_size=3)).map(lambda parts: [parts[0], *parts[1]])
TEN_NEEDED: Protocol = "vqa-accuracy"


@pytest.mark.parity
@pytest.mark.parametrize(("protocol", "expected"), [("multimodalocr", 39.16), ("substring", 40.02)])
def test_the_published_predictions_have_the_published_figure(
    shared_dir: Path, protocol: Protocol, expected: float
) -> None:
    """Source: arXiv 2306.17107, Table 2 (39.2 on ST-VQA); the predictions are MultimodalOCR's."""
    file = shared_dir / "reference" / "vqa" / "STVQA.json"
    if not file.is_file():
        pytest.skip(f"the published predictions are not at {file}")
    records = json.loads(file.read_text(encoding="utf-8"))
    points = sum(score(protocol, record["answer"], record["gt_answers"]).points for record in records)
    assert round(100 * points / len(records), 2) == expected


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Answer.", "answer"),
        ("It costs 1,000 dollars!", "it costs 1000 dollars"),
        ("well-known", "well known"),
        ("well- known", "well known"),
        ("a-b c- d", "ab c d"),  # the sign stands beside a space somewhere, so that it is dropped everywhere
        ("3.50", "3.50"),
        ("v. 3.5.", "v 3.5"),
        ("two cats", "2 cats"),
        ("None", "0"),
        ("dont", "don't"),
        ("Im here", "im here"),
        ("girl's", "girl's"),
        ("2:50 PM", "2:50 pm"),
        ("line\nbreak\tand  spaces ", "line break and spaces"),
        ("." * 40, "." * 8),  # only 32 of them go
        ("{}", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("protocol", "answer", "truths", "value"),
    [
        ("multimodalocr", "The name on the cake is Chris.", ["Chris"], 1),
        ("multimodalocr", "Christopher", ["Chris"], 0),
        ("multimodalocr", "It says STOP!", ["go", "stop"], 1),
        ("multimodalocr", "It is $5", ["$5"], 0),  # no border of a word before a sign that no letter touches
        ("multimodalocr", "US$5", ["$5"], 1),
        ("multimodalocr", "anything", ["{}"], 1),
        ("multimodalocr", "", ["{}"], 0),
        ("multimodalocr", "there are two", ["2"], 1),
        ("substring", "Christopher", ["CHRIS "], 1),
        ("substring", "It is $5", ["$5"], 1),
        ("vqa-accuracy", "yes", ["yes"] * 10, 1),
        ("vqa-accuracy", "yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),
        ("vqa-accuracy", "Yes.", ["yes"] + ["no"] * 9, 9 / 30),
        ("vqa-accuracy", "maybe", ["yes"] * 10, 0),
        ("anls", "hello", ["Hello"], 1),
        ("anls", "helo", ["hello"], 0.8),
        ("anls", "ab", ["abcd"], 0),
        ("exact", " STOP  HERE ", ["STOP HERE"], 1),
        ("exact", "stop here", ["STOP HERE"], 0),
        ("cer", "STOB", ["STOP", "NOTHING ELSE"], 0.25),
        ("cer", "abcdef", ["ab"], 2),
        ("wer", "one too three", ["one two three"], 1 / 3),
    ],
)
def test_protocols(protocol: Protocol, answer: str, truths: list[str], value: float) -> None:
    assert score(protocol, answer, truths).value == pytest.approx(value)


@given(answer=texts, truths=truth_lists, order=st.randoms(use_true_random=False))
def test_the_order_of_the_truths_does_not_matter(answer: str, truths: list[str], order) -> None:
    shuffled = truths[:]
    order.shuffle(shuffled)
    ten, ten_shuffled = (truths * 10)[:10], (truths * 10)[:10]
    order.shuffle(ten_shuffled)
    for protocol in PROTOCOLS:
        one, other = (ten, ten_shuffled) if protocol == TEN_NEEDED else (truths, shuffled)
        assert score(protocol, answer, one) == score(protocol, answer, other)


@given(answer=texts, truths=truth_lists)
def test_scores_are_bounded(answer: str, truths: list[str]) -> None:
    for protocol in PROTOCOLS:
        value = score(protocol, answer, (truths * 10)[:10] if protocol == TEN_NEEDED else truths).value
        assert value >= 0
        assert value <= 1 or protocol in LOWER_IS_BETTER


@given(truth=visible_texts, others=st.lists(texts, max_size=3))
def test_a_truth_itself_gets_full_marks(truth: str, others: list[str]) -> None:
    for protocol in PROTOCOLS:
        given_truths = [truth] * 10 if protocol == TEN_NEEDED else [*others, truth]
        value = score(protocol, truth, given_truths).value
        if protocol in LOWER_IS_BETTER:
            assert value == 0
        elif protocol != "multimodalocr":
            assert value == 1


@given(words=st.lists(st.text("bcdÀß中59", min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_truth_of_letters_is_found_by_the_paper_s_protocol(words: list[str]) -> None:
    """Symbols at its ends are what hides a truth there; see ``contains_words``."""
    truth = " ".join(words)
    assert score("multimodalocr", truth, [truth]).value == 1
    assert score("multimodalocr", f"It says: {truth}, I think", [truth]).value == 1


words_of_letters = st.lists(st.text("bcdÀß中59", min_size=1, max_size=5), min_size=1, max_size=4).map(" ".join)


@given(truth=words_of_letters, blank=st.sampled_from(["", " ", "\n\t"]))
def test_an_empty_answer_gets_nothing(truth: str, blank: str) -> None:
    for protocol in PROTOCOLS:
        value = score(protocol, blank, [truth] * 10).value
        assert value == (1 if protocol in LOWER_IS_BETTER else 0), protocol


@given(truth=words_of_letters, before=st.text('.!?()[]"*~', max_size=3), after=st.text('.!?()[]"*~', max_size=3))
def test_signs_at_the_ends_of_an_answer(truth: str, before: str, after: str) -> None:
    """They are nothing to protocols that look for words, and errors to those that count letters."""
    said, signs = f"{before}{truth}{after}", len(before) + len(after)
    for protocol in ("multimodalocr", "substring"):
        assert score(protocol, said, [truth]).value == 1, protocol
    assert score("exact", said, [truth]).value == (signs == 0)
    assert score("cer", said, [truth]) == Score(signs, len(truth))
    assert score("wer", said, [truth]).points == bool(before) + bool(after) - (
        bool(before) and bool(after) and " " not in truth
    )
    distance = signs / len(said)
    assert score("anls", said, [truth]).value == pytest.approx(1 - distance if distance < 0.5 else 0)


@given(truth=words_of_letters, sign=st.sampled_from("$€£#%"))
def test_signs_at_the_ends_of_a_truth(truth: str, sign: str) -> None:
    """The paper's protocol asks for a word's border beside them, which a space or an end is not."""
    for marked in (f"{sign}{truth}", f"{truth}{sign}"):
        assert score("substring", f"it is {marked} in all", [marked]).value == 1
        assert score("exact", marked, [marked]).value == 1
        hidden = normalize_answer(marked) != normalize_answer(truth)
        assert score("multimodalocr", f"it is {marked} in all", [marked]).value == (not hidden)


@given(truth=words_of_letters, sign=st.sampled_from("$€£#%"), before=st.booleans())
def test_a_sign_that_an_answer_leaves_out(truth: str, sign: str, before: bool) -> None:
    marked = f"{sign}{truth}" if before else f"{truth}{sign}"
    for protocol in ("multimodalocr", "substring", "vqa-accuracy", "exact"):
        assert score(protocol, truth, [marked] * 10).value == 0, protocol
    assert score("cer", truth, [marked]) == Score(1, len(marked))
    assert score("wer", truth, [marked]) == Score(1, len(truth.split()))
    distance = 1 / len(marked)
    assert score("anls", truth, [marked]).value == pytest.approx(1 - distance if distance < 0.5 else 0)


@given(truth=words_of_letters, before=st.text('!?()[]",;-', max_size=3), after=st.text('!?()[]",;-', max_size=3))
def test_signs_of_writing_at_the_ends_are_nothing_to_vqa_accuracy(truth: str, before: str, after: str) -> None:
    """Its normalisation drops these; ``*``, ``$`` and the like it keeps."""
    assert score("vqa-accuracy", f"{before}{truth}{after}", [truth] * 10).value == 1
    assert score("vqa-accuracy", truth, [f"{before}{truth}{after}"] * 10).value == 1
    assert score("vqa-accuracy", f"{truth}*", [truth] * 10).value == 0


BLANK = ("", " ", "\n\t", "\u00a0", "\u200b", "\ufeff", "\u200d", "\u00ad \u3000", "\x00")


@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_truth_is_never_right(blank: str) -> None:
    for protocol in PROTOCOLS:
        for answer in ("word", "", blank):
            with pytest.raises(DataError, match="without a truth cannot be scored"):
                score(protocol, answer, [blank] * 10)
            both = [blank] * 6 + ["STOP"] * 4
            assert score(protocol, answer, both).value == (protocol in LOWER_IS_BETTER), (protocol, answer)
            assert score(protocol, "STOP", both).value == (protocol not in LOWER_IS_BETTER), protocol


def test_a_rate_without_a_length_is_finite() -> None:
    """Results of version 0.1 may contain empty truths."""
    records = [Answered("a", "Q?", "word", ("",), scores={"cer": Score(4.0, 0.0)})]
    assert all(0 <= value <= 400 for value in rate(records, "cer"))


@given(word=st.text("éñçüÅ한ệ", min_size=1, max_size=6))
def test_composed_and_decomposed_letters(word: str) -> None:
    """The published programs compare code points. The other protocols compare what an image shows."""
    apart = normalize("NFD", word)
    for answer, truth in ((word, apart), (apart, word)):
        for protocol in ("multimodalocr", "substring", "vqa-accuracy"):
            assert score(protocol, answer, [truth] * 10).value == 0, protocol
        for protocol in ("anls", "exact", "cer", "wer"):
            assert score(protocol, answer, [truth]) == score(protocol, word, [word]), protocol


@pytest.mark.parametrize(
    ("answer", "truth", "values"),  # in the order of PROTOCOLS
    [
        ("cafe\u0301", "caf\u00e9", (0, 0, 0, 1, 1, 0, 0)),
        ("caf\u00e9", "cafe\u0301", (0, 0, 0, 1, 1, 0, 0)),
        ("di\u00advi\u200bde\ufeff", "divide", (0, 0, 0, 1, 1, 0, 0)),  # without a shape
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e", (0, 0, 0, 0.75, 0, 1 / 3, 1)),  # a joiner shapes letters
        ("x\u3000y\u2009z", "x y z", (1, 0, 1, 1, 1, 0, 0)),
        ("cafe\u0301", "cafe", (1, 1, 0, 0.75, 0, 1 / 4, 1)),  # a mark is no letter: the word ends before it
        ("STRASSE", "stra\u00dfe", (0, 0, 0, 5 / 7, 0, 7 / 6, 1)),
        ("x\u00a0y", "x y", (1, 0, 1, 1, 1, 0, 0)),  # a space that does not break
        ("\uff15", "5", (0, 0, 0, 0, 0, 1, 1)),
        ("\u4e2d", "\u4e2d\u6587", (0, 0, 0, 0, 0, 1 / 2, 1)),
    ],
)
def test_unicode_as_each_protocol_has_it(answer: str, truth: str, values: tuple[float, ...]) -> None:
    found = [score(protocol, answer, [truth] * 10).value for protocol in PROTOCOLS]
    assert found == pytest.approx(list(values))


@given(word=st.text("bcdàéяж", min_size=1, max_size=8))
def test_case_in_any_script(word: str) -> None:
    for protocol in PROTOCOLS:
        value = score(protocol, word.upper(), [word] * 10).value
        assert value == (protocol not in {"exact"}), protocol  # and every letter, the only word, is an error


@given(rows=st.lists(st.tuples(texts, visible_texts), min_size=1, max_size=8), order=st.randoms(use_true_random=False))
@settings(max_examples=8)  # each takes a bootstrap
def test_the_order_of_records_does_not_matter(rows: list[tuple[str, str]], order) -> None:
    questions = [VqaQuestion(str(n), "Q?", (truth,), answer=said) for n, (said, truth) in enumerate(rows)]
    figures = score_answers(questions, "d", Setting()).figures
    order.shuffle(questions)
    for one, other in zip(figures, score_answers(questions, "d", Setting()).figures, strict=True):
        assert (one.protocol, one.records) == (other.protocol, other.records)
        assert one.value == pytest.approx(other.value)


@given(text=texts)
def test_normalization_adds_no_spaces(text: str) -> None:
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split())
    assert not {"a", "an", "the"} & set(normal.split())


def test_vqa_accuracy_needs_ten_answers() -> None:
    with pytest.raises(DataError, match=r"vqa-accuracy: needs the answers of 10 annotators \(got 1\)"):
        score("vqa-accuracy", "yes", ["yes"])
    with pytest.raises(DataError, match="without a truth"):
        score("anls", "yes", [])


def test_the_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(0, 6) == sign_test(6, 0)
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert sign_test(2000, 1500) < 1e-15


def test_intervals_match_theory_and_widen_where_questions_share_an_image() -> None:
    """Of 400 fair coins: 50 +- 1.96 * 2.5 points; of 100 images with four equal answers each, twice as wide."""
    coins = np.random.default_rng(3).permutation(np.repeat([0.0, 1.0], 200))[:, None]
    ((low, high),) = ratio_intervals(coins, np.ones_like(coins))
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)
    assert ratio_intervals(coins, np.ones_like(coins)) == [(low, high)]
    alike = np.repeat(np.repeat([0.0, 1.0], 50), 4)
    rows = sum_by_name(np.stack([alike, np.ones(400)], axis=1), [number // 4 for number in range(400)])
    assert rows.shape == (100, 2)
    ((low, high),) = ratio_intervals(rows[:, :1], rows[:, 1:])
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.02)


def test_the_paired_interval_of_equal_runs_is_zero() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (50, 1)).astype(float)
    ones = np.ones_like(rows)
    assert difference_interval(np.concatenate([rows, ones, rows, ones], axis=1)) == (0, 0)
    low, high = difference_interval(np.concatenate([ones, ones, 0 * ones, ones], axis=1))
    assert (low, high) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "independent"),  # (right answers, answers) of each image; Wilson's interval of how many answers
    [
        ([(0, 1)] * 20, 20),  # 0 to 16 %
        ([(0, 5)] * 20, 20),  # the answers on an image may be alike
        ([(1, 1)] * 3 + [(0, 1)] * 37, 40),
        ([(4, 4)] * 3 + [(0, 4)] * 37, 40),  # and are
        ([(1, 2), (0, 2)] * 20, 80),  # less alike than by chance: never more than the answers
        ([(3, 3), (0, 1), (1, 1), (0, 3)], 0.25 / (2 * (1.5**2 + 0.5**2) / 8**2)),
        ([(2, 4)], 1),
        ([(1, 1), (0, 1), (0, 0)], 2),  # an image without an answer
    ],
)
def test_proportions_have_one_interval(rows: list[tuple[int, int]], independent: float) -> None:
    table = np.array(rows, dtype=float)
    ((low, high),) = ratio_intervals(table[:, :1], table[:, 1:])
    share = table[:, 0].sum() / table[:, 1].sum()
    z = 1.959964  # Wilson's formula, as its two roots
    roots = np.roots([1 + z * z / independent, -(2 * share + z * z / independent), share**2])
    assert (low, high) == pytest.approx((min(roots), max(roots)), abs=1e-9)


def test_ratings_are_no_proportions() -> None:
    """Whole ratings that happen to be below the reference's are not numbers of right answers."""
    ours, reference = np.array([[8.0], [6], [9], [7]]), np.full((4, 1), 10.0)
    low, high = ratio_intervals(ours, reference, counts=False)[0]
    assert low > 0.6
    assert ratio_intervals(ours, reference)[0] != (low, high)
