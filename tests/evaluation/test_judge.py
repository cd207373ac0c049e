"""The judge at a local endpoint: failures, rate limits, refusals, malformed replies, and resumed runs."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft import cli
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.evaluation.judge.judge_cases import read_cases
from llavar_peft.evaluation.judge.judge_reviews import Review, read_reviews, summarize_reviews, write_reviews
from llavar_peft.evaluation.judge.judge_scores import is_refusal, parse_scores

pytest.importorskip("openai")

forms = (
    "{} {}", "{}, {}", "{}/10 {}/10", "**{} {}**", "({}, {})", "Scores: {} and {}.", "Scores:\n{} {}", "{}\n{}",
    "```\n{} {}\n```", "1. {}\n2. {}", "Assistant 1: {}, Assistant 2: {}", "Score of Assistant 1: {}\nAssistant 2: {}",
)  # fmt: skip
score_texts = st.sampled_from([*map(str, range(1, 11)), "7.5", "8.0"])
parts = st.sampled_from(
    ["8", "9", "1", "2", "1.", "2)", "10", "11", "/10", " ", "\n", ":", "-", ".", "Assistant 1", "Assistant 2",
     "Scores:", "points", "```", "**", "\u2028", "\ud83d", "\u0665", "\u00b2"]
)  # fmt: skip

Answer = tuple[int, dict[str, str], Any]


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server whose replies the test defines."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.reply: Callable[[str, int], Answer] = lambda prompt, number: ok("8 9\nBecause.")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][1]["content"]
        with self.server.lock:
            self.server.requests.append({**request, "path": self.path, "key": self.headers["Authorization"]})
            number = self.server.seen[prompt]
            self.server.seen[prompt] += 1
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        status, headers, body = self.server.reply(prompt, number)
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        with self.server.lock:
            self.server.under_way -= 1
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def ok(content: str | None, **message: Any) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


def fail(status: int, **headers: str) -> Answer:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {"error": {"message": "no"}}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def released(tmp_path: Path) -> list[str]:
    """Return options for files in the released form: a ``read`` question and two about objects."""
    write_lines(
        tmp_path / "questions.jsonl",
        [
            {"question_id": 0, "image": "1.png", "text": "Which book?", "category": "read"},
            {"question_id": 1, "image": "coco.jpg", "text": "Which animal?", "category": "conv"},
            {"question_id": 2, "image": "coco.jpg", "text": "Why?", "category": "complex"},
        ],
    )
    write_lines(
        tmp_path / "contexts.jsonl",
        [
            {"id": "1", "image": "1.png", "captions": "A cover.\n\nTHE BOOK"},
            {
                "id": "000", "image": "coco.jpg", "captions": ["A dog.", "A cat."],
                "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}],
            },
        ],
    )  # fmt: skip
    rule = {"role": "Assistant", "prompt": "Rate them."}
    (tmp_path / "rules.json").write_text(json.dumps({"read": rule, "conv": rule, "complex": rule}))
    write_lines(tmp_path / "gpt4.jsonl", [{"question_id": n, "text": f"reference {n}"} for n in range(3)])
    said = [{"question_id": n, "text": f"ours {n}", "answer_id": f"id{n}"} for n in (2, 1, 0)]
    write_lines(tmp_path / "ours.jsonl", said)
    names = {"questions": "questions.jsonl", "contexts": "contexts.jsonl", "rules": "rules.json"}
    names |= {"reference": "gpt4.jsonl", "answers": "ours.jsonl", "out": "reviews.jsonl"}
    return [part for option, name in names.items() for part in (f"--{option}", str(tmp_path / name))]


def judge(endpoint: Endpoint, released: list[str], *more: str) -> int:
    return cli.main(["eval", "judge", *released, "--judge-model", "judge", "--base-url", endpoint.url, *more])


def test_prompts_equal_the_originals(endpoint: Endpoint, released: list[str], tmp_path: Path) -> None:
    assert judge(endpoint, released) == 0
    first = next(one for one in endpoint.requests if "Which animal?" in one["messages"][1]["content"])
    assert first["messages"][0]["content"] == (
        "You are a helpful and precise assistant for checking the quality of the answer."
    )
    assert first["messages"][1]["content"] == (
        "[Context]\nA dog.\nA cat.\n\ndog: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nWhich animal?\n\n"
        "[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n[Assistant 2]\nours 1\n\n[End of Assistant 2]\n\n"
        "[System]\nRate them.\n\n"
    )
    read = next(one for one in endpoint.requests if "Which book?" in one["messages"][1]["content"])
    assert read["messages"][1]["content"].startswith("[Context]\nA cover.\n\nTHE BOOK\n\n[Question]\nWhich book?\n\n")
    assert (first["temperature"], first["max_tokens"], first["key"]) == (0.2, 1024, "Bearer secret")
    lines = [json.loads(line) for line in (tmp_path / "reviews.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "id": 2, "question_id": 1, "answer1_id": 1, "answer2_id": "id1", "category": "conv", "content": "8 9\nBecause.",
        "tuple": [8, 9],
        "metadata": {"judge_model": "judge", "judge_temperature": 0.2, "judge_max_tokens": 1024},
    }  # fmt: skip


def test_rate_limits_and_failures_are_retried(endpoint: Endpoint, released: list[str], tmp_path: Path) -> None:
    first_tries = [fail(429, Retry_After="0.05"), fail(500, Retry_After="0.01"), fail(503, retry_after_ms="10")]
    endpoint.reply = lambda prompt, number: first_tries[number] if number < 3 else ok("7, 8")
    assert judge(endpoint, released) == 0
    assert set(endpoint.seen.values()) == {4}
    assert [review.scores for review in read_reviews(tmp_path / "reviews.jsonl")] == [(7, 8)] * 3


def test_malformed_replies_and_refusals_are_repeated_and_counted(
    endpoint: Endpoint, released: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(prompt: str, number: int) -> Answer:
        if "Which book?" in prompt:
            return ok("I would rather talk first.") if number == 0 else ok("Assistant 1: 9\nAssistant 2: 6.5\nWell.")
        if "Which animal?" in prompt:
            return ok(None, refusal="I cannot help with that.")
        return ok("") if number < 2 else ok("8/10 4/10")

    endpoint.reply = reply
    assert judge(endpoint, released, "--json") == 3
    output = json.loads(capsys.readouterr().out)
    assert (output["sent"], output["malformed"], output["refused"], output["unscored"]) == (8, 1 + 2, 3, [1])
    reviews = read_reviews(tmp_path / "reviews.jsonl")
    assert [review.scores for review in reviews] == [(9, 6.5), None, (8, 4)]
    assert '"tuple": null' in (tmp_path / "reviews.jsonl").read_text()
    # Replies with scores are kept; only the one without is requested again.
    endpoint.reply = lambda prompt, number: ok("5 5")
    endpoint.requests.clear()
    assert judge(endpoint, released, "--json") == 0
    assert len(endpoint.requests) == 1
    assert [review.scores for review in read_reviews(tmp_path / "reviews.jsonl")] == [(9, 6.5), (5, 5), (8, 4)]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_request_costs_only_its_question(
    endpoint: Endpoint, released: list[str], status: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """For example, a context that is too long. A refusal in words is counted separately from malformed replies."""

    def reply(prompt: str, number: int) -> Answer:
        if "Which book?" in prompt:
            return fail(status)
        if "Which animal?" in prompt and number == 0:
            return ok("I'm sorry, I can't judge that.")
        return ok("8 9")

    endpoint.reply = reply
    assert judge(endpoint, released, "--json") == 3
    output = json.loads(capsys.readouterr().out)
    assert (output["sent"], output["malformed"], output["refused"], output["unscored"]) == (4, 0, 2, [0])
    assert str(status) in read_reviews(tmp_path / "reviews.jsonl")[0].content


@pytest.mark.parametrize(("questions", "asked"), [(3, 3), (9, 5)])
def test_several_rejected_requests_in_a_row_stop_the_run(
    endpoint: Endpoint, released: list[str], questions: int, asked: int, tmp_path: Path, capsys
) -> None:
    """For example, because of an unknown parameter; with fewer questions, fewer rejections suffice."""
    row = {"image": "1.png", "text": "Which book?", "category": "read"}
    write_lines(tmp_path / "questions.jsonl", [{**row, "question_id": number} for number in range(questions)])
    for name in ("gpt4", "ours"):
        said = [{"question_id": number, "text": f"{name} {number}"} for number in range(questions)]
        write_lines(tmp_path / f"{name}.jsonl", said)
    endpoint.reply = lambda prompt, number: fail(400)
    assert judge(endpoint, released, "--concurrency", "1") == 2
    assert "rejects the request" in capsys.readouterr().err
    assert asked <= len(endpoint.requests) <= max(asked, questions - 1)


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Type": "text/html"}, "<html>Please log in</html>"),
        (200, {}, '{"choices": [{"mess'),
        (200, {}, {}),
        (200, {}, []),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": None}]}),
        (200, {}, {"choices": [{"message": {"content": 7}}]}),
    ],
)
def test_responses_without_a_message_are_repeated(
    endpoint: Endpoint, released: list[str], reply: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda prompt, number: reply if number == 0 else ok("8 9")
    assert judge(endpoint, released, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["sent"], output["malformed"], output["refused"], output["unscored"]) == (6, 3, 0, [])


def test_an_interrupted_run_pays_for_nothing_twice(
    endpoint: Endpoint, released: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda prompt, number: fail(401) if "Why?" in prompt else ok("8 8")
    assert judge(endpoint, released, "--concurrency", "1") == 2
    assert "rejects the request" in capsys.readouterr().err
    assert not (tmp_path / "reviews.jsonl").exists()
    kept = sorted((tmp_path / "reviews.replies").glob("*.json"))
    assert len(kept) == 2
    assert "secret" not in kept[0].read_text()
    kept[0].write_text(kept[0].read_text()[:30])  # damaged: requested again
    endpoint.requests.clear()
    endpoint.reply = lambda prompt, number: ok("9 9")
    assert judge(endpoint, released) == 0
    assert len(endpoint.requests) == 2
    assert judge(endpoint, released) == 0
    assert len(endpoint.requests) == 2
    assert judge(endpoint, released, "--temperature", "0") == 0  # another request
    assert len(endpoint.requests) == 5


def test_a_reply_kept_by_version_0_1_is_not_paid_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    name = "0f146f7f62f6a88589bb8ed65ca28494948ff9cab4d89169bfe384d6e31c8203.json"
    (tmp_path / name).write_text('{\n  "request": {"model": "judge"},\n  "reply": "8 9"\n}\n')
    judge = Judge(JudgeConfig(model="judge", base_url="http://127.0.0.1:9/v1", retries=0, timeout=2), tmp_path)
    verdict = judge.ask("Which?")
    assert (verdict.scores, verdict.sent) == ((8, 9), 0)


def test_an_unreachable_endpoint(released: list[str], monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    from llavar_peft.errors import EnvironmentFaultError
    from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = JudgeConfig(model="judge", base_url="http://127.0.0.1:9/v1", retries=0, timeout=2)
    with pytest.raises(EnvironmentFaultError, match="the judge cannot be reached"):
        Judge(config, tmp_path).ask("?")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: is not set"):
        Judge(config, tmp_path)


def test_swapped_order_and_its_agreement(
    endpoint: Endpoint, released: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that prefers the reference, the first answer and ours on one question each."""

    def reply(prompt: str, number: int) -> Answer:
        ours_first = prompt.index("ours") < prompt.index("reference")
        if "Which book?" in prompt:
            return ok("4 9" if ours_first else "9 4")
        if "Which animal?" in prompt:
            return ok("8 6")
        return ok("10 5" if ours_first else "5 10")

    endpoint.reply = reply
    assert judge(endpoint, released, "--swap", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    whole = output["categories"][-1]
    assert (whole["name"], whole["reviews"], whole["agreement"]) == ("all", 3, 66.7)
    assert whole["ratio"] == round(100 * 6.667 / 7.333, 1)
    assert whole["swapped_ratio"] == round(100 * 7.333 / 6.667, 1)
    assert [review.swapped_scores for review in read_reviews(tmp_path / "reviews.jsonl")] == [(9, 4), (6, 8), (5, 10)]
    assert judge(endpoint, released, "--swap") == 0
    assert "agreement %" in capsys.readouterr().out
    assert len(endpoint.requests) == 6


def test_a_swapped_review_without_scores_is_reported(
    endpoint: Endpoint, released: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(prompt: str, number: int) -> Answer:
        ours_first = prompt.index("ours") < prompt.index("reference")
        return ok("no idea") if ours_first and "Which animal?" in prompt else ok("8 9")

    endpoint.reply = reply
    assert judge(endpoint, released, "--swap", "--json") == 3
    output = json.loads(capsys.readouterr().out)
    assert output["unscored"] == [1]
    assert (output["categories"][-1]["reviews"], output["categories"][-1]["both_orders"]) == (3, 2)
    assert summarize_reviews(read_reviews(tmp_path / "reviews.jsonl")).unscored == (1,)


def test_figures_include_the_settings(
    endpoint: Endpoint, released: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"model_hash": "abc", "prompt": "{question}", "image_mode": "pad", "temperature": 0.7}
    said = [{"question_id": n, "text": f"ours {n}", "model_id": "m", "metadata": how} for n in range(3)]
    write_lines(tmp_path / "ours.jsonl", said)
    assert judge(endpoint, released, "--temperature", "0") == 0
    assert "judge model: judge; judge temperature: 0.0;" in capsys.readouterr().out
    assert cli.main(["eval", "summarize", str(tmp_path / "reviews.jsonl"), "--json"]) == 0
    (output,) = json.loads(capsys.readouterr().out)
    expected = {"judge_model": "judge", "judge_temperature": 0.0, "judge_max_tokens": 1024, "model": "m", **how}
    assert output["settings"] == [expected]


def test_unusual_characters_are_kept_and_a_reference_mean_of_zero_has_no_ratio(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    reviews = [Review(1, 0, 0, 1, "conv", "0 9\nHe said \u2028 x \x85 y \ud83d", (0.0, 9.0))]
    write_reviews(reviews, path)
    assert list(read_reviews(path)) == reviews
    (_, whole) = summarize_reviews(reviews).categories
    assert (whole.reference, whole.ours, whole.ratio, whole.low) == (0, 9, None, None)
    assert cli.main(["eval", "summarize", str(path)]) == 0


def test_an_unpaired_surrogate_is_sent_and_kept(endpoint: Endpoint, released: list[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "ours.jsonl", [{"question_id": n, "text": f"ours \ud83d {n}"} for n in range(3)])
    endpoint.reply = lambda prompt, number: ok("8 9\nWell \ud83d")
    assert judge(endpoint, released) == 0
    assert judge(endpoint, released) == 0
    assert len(endpoint.requests) == 3
    assert read_reviews(tmp_path / "reviews.jsonl")[0].content == "8 9\nWell \ud83d"


def test_several_requests_are_sent_at_once(endpoint: Endpoint, released: list[str]) -> None:
    together = threading.Barrier(3, timeout=120)

    def reply(prompt: str, number: int) -> Answer:
        together.wait()
        return ok("8 9")

    endpoint.reply = reply
    assert judge(endpoint, released, "--concurrency", "3") == 0
    assert endpoint.most_under_way == 3


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9\nBecause.", (8, 9)),
        ("8, 7.5", (8, 7.5)),
        ("\n\n 10 10 \n", (10, 10)),
        ("8/10 9/10", (8, 9)),
        ("**8 9**", (8, 9)),
        ("(8.0, 9.0)", (8, 9)),
        ("Scores: 8 and 9.", (8, 9)),
        ("Assistant 1: 8, Assistant 2: 9", (8, 9)),
        ("Assistant 1: 8\nAssistant 2: 9\nBecause.", (8, 9)),
        ("Assistant 2: 8, Assistant 1: 9", None),
        ("The image shows 2 dogs and 3 cats.", None),
        ("I'm sorry, I can't help with that.", None),
        ("8", None),
        ("8 9 7", None),
        ("80 90", None),
        ("-1 -1", None),
        ("", None),
        ("nan inf", None),
        ("1. 8\n2. 9", (8, 9)),
        ("1) 8\n2) 9\nBecause.", (8, 9)),
        ("1: 8\n\n2: 9", (8, 9)),
        ("1. Assistant 1: 8\n2. Assistant 2: 9", (8, 9)),
        ("1. 8", None),
        ("1. 8 9", None),
        ("1. 8 2. 9", None),
        ("1 8\n2 9", None),
        ("2. 9\n1. 8", None),
        ("Scores:\n8 9", (8, 9)),
        ("Here are the scores:\n\n8 9\nBecause.", (8, 9)),
        ("8\n9", (8, 9)),
        ("8\n9\nBecause of 3 things.", (8, 9)),
        ("8\n9\n7", None),
        ("8 9\n7 6", None),
        ("8 9 Both are good.", None),  # rejected by the original too
        ("8 9. Both are good.", None),
        ("```\n8 9\n```\nBecause.", (8, 9)),
        ("```text\n8 9\n```", (8, 9)),
        ("Assistant 1: 8 points\nAssistant 2: 9 points", (8, 9)),
        ("Assistant 1: 8 points, since it is right.\nAssistant 2: 9 points.", None),
        ("Score of Assistant 1: 8\nScore of Assistant 2: 9", (8, 9)),
        ("Assistant 1's score: 8/10\nAssistant 2's score: 9/10", (8, 9)),
        ("8 for Assistant 1, 9 for Assistant 2", (8, 9)),
        ("Assistant 1 and Assistant 2: 8 9", (8, 9)),
        ("Assistant 1: 8 9 Assistant 2:", None),
        ("Assistant 1: 8\nAssistant 1: 9", None),
        ("In the picture there are:\n2 3", None),
        ("10/10.5 9", None),
        ("- 8\n- 9", (8, 9)),
        ("8 9\n\nAssistant 1:\nIt is right.", (8, 9)),
        ("Assistant 1:\n8\nAssistant 2:\n9", (8, 9)),
    ],
)
def test_scores_are_parsed(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(reply) == scores


@given(reply=st.one_of(st.text(max_size=40), st.lists(parts, max_size=12).map("".join)))
def test_parsed_scores_are_within_the_scale(reply: str) -> None:
    scores = parse_scores(reply)
    assert scores is None or all(0 <= score <= 10 for score in scores)
    is_refusal(reply)


@given(
    first=score_texts, second=score_texts, form=st.sampled_from(forms), after=st.sampled_from(["", "\nBecause 3 < 4."])
)
def test_scores_are_parsed_in_every_form_that_judges_use(first: str, second: str, form: str, after: str) -> None:
    assert parse_scores(form.format(first, second) + after) == (float(first), float(second))


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("I'm sorry, but I can\u2019t assist with that.", True),
        ("I cannot help with this request.", True),
        ("Sorry, no.", True),
        ("Unfortunately, I am not able to see it.", True),
        ("As an AI, I have no opinion.", True),
        ("I would rather talk first.", False),
        ("The answer says that it is sorry.", False),
        ("", False),
    ],
)
def test_refusals_in_words_are_recognized(reply: str, refused: bool) -> None:
    assert is_refusal(reply) == refused


@pytest.mark.parity
def test_the_published_reviews_give_the_papers_figures(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Source: arXiv 2306.17107, the table of COCO's 90 questions."""
    file = shared_dir / "reference" / "reviews" / "review_p1f1.json"
    if not file.is_file():
        pytest.skip(f"the published reviews are not at {file}")
    assert cli.main(["eval", "summarize", str(file), "--json"]) == 0
    ((output),) = json.loads(capsys.readouterr().out)
    ratios = {category["name"]: category["ratio"] for category in output["categories"]}
    assert ratios == {"conv": 84.5, "detail": 78.9, "complex": 96.5, "all": 86.7}
    assert output["unscored"] == []
    assert cli.main(["eval", "summarize", str(file)]) == 0
    assert "84.5" in capsys.readouterr().out
    for review in read_reviews(file):
        assert parse_scores(review.content) == review.scores


@pytest.mark.parity
@pytest.mark.parametrize(
    ("questions", "contexts", "rules", "reference", "count"),
    [
        ("qa50_questions", "caps_laion_50_val", "rule_read_v3", "qa50_gpt4_answer", 50),
        ("qa90_questions", "caps_boxes_coco2014_val_80", "rule", "qa90_gpt4_answer", 90),
    ],
)
def test_released_questions_can_be_judged(
    shared_dir: Path, questions: str, contexts: str, rules: str, reference: str, count: int
) -> None:
    folder = shared_dir / "reference" / "judge"
    if not folder.is_dir():
        pytest.skip(f"the released questions are not at {folder}")
    answers = folder / f"{reference}.jsonl"
    names = (f"{questions}.jsonl", f"{contexts}.jsonl", f"{rules}.json", f"{reference}.jsonl")
    cases = read_cases(*(folder / name for name in names), answers)
    assert len(cases) == count
    for case in cases:
        prompt = case.prompt()
        assert prompt.startswith(f"[Context]\n{case.context}\n\n[Question]\n{case.question}")
        if case.category == "read":
            assert "\n".join(case.context[:5]) not in prompt  # the caption is not joined character by character
    if count == 50:
        assert cases[0].question_id == 0
        assert 'written by "Daryn Kagan"' in cases[0].context  # the context with the id 1


@pytest.mark.slow
def test_a_model_s_answers_can_be_judged(
    endpoint: Endpoint, released: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name in ("1.png", "COCO_val2014_coco.jpg"):
        Image.new("RGB", (60, 40), (200, 200, 190)).save(tmp_path / "pictures" / name)
    command = ["eval", "answer", *released[:2], "--images", str(tmp_path / "pictures"), "--model", str(checkpoint)]
    assert cli.main([*command, "--max-new-tokens", "4", "--out", str(tmp_path / "ours.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [0, 1, 2]
    assert answers[0]["metadata"]["temperature"] == 0.7
    assert judge(endpoint, released) == 0
    reviews = read_reviews(tmp_path / "reviews.jsonl")
    assert [review.answer2_id for review in reviews] == [answer["answer_id"] for answer in answers]


def test_reviews_without_scores_enter_no_figure(tmp_path: Path) -> None:
    row = {"id": 1, "question_id": 5, "answer1_id": 0, "answer2_id": 0, "category": "conv", "content": "?"}
    path = write_lines(
        tmp_path / "reviews.json", [{**row, "tuple": [-1, -1]}, {**row, "question_id": 6, "tuple": [8, 4]}]
    )
    summary = summarize_reviews(read_reviews(path))
    assert summary.unscored == (5,)
    assert [(one.name, one.reviews, one.ratio) for one in summary.categories] == [("conv", 1, 50), ("all", 1, 50)]
    with pytest.raises(DataError, match="none of 1 has scores"):
        summarize_reviews(read_reviews(write_lines(path, [{**row, "tuple": None}])))
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"reviews\.json:1: is not a review"):
        read_reviews(path)


def test_files_that_do_not_belong_together_are_rejected(released: list[str], tmp_path: Path) -> None:
    paths = {option: Path(value) for option, value in zip(released[::2], released[1::2], strict=True)}
    order = [paths[f"--{name}"] for name in ("questions", "contexts", "rules", "reference", "answers")]
    assert len(read_cases(*order)) == 3
    for place, (keep, message) in {
        1: (1, "no context for 'coco.jpg'"),
        3: (2, "no answer in"),
        4: (1, "no answer in"),
    }.items():
        old = order[place].read_text()
        order[place].write_text("".join(old.splitlines(keepends=True)[:keep]))
        with pytest.raises(DataError, match=message):
            read_cases(*order)
        order[place].write_text(old)
    order[3].write_text(order[3].read_text().replace('"text": "', '"text": "", "was": "'))
    with pytest.raises(DataError, match="is empty, so that nothing can be compared"):
        read_cases(*order)
    order[2].write_text("{}")
    with pytest.raises(DataError, match="no rule for 'read'"):
        read_cases(*order)
