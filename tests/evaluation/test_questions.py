"""Every form of data set that is known, and what a faulty one is answered with."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.vqa_questions import read_predictions, read_vqa_questions

TURNS = [{"from": "human", "value": "<image>\nWhat is sold?"}, {"from": "gpt", "value": " TEA "}]


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    text = "\n".join(json.dumps(row) for row in content) if name.endswith("l") else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (  # MultimodalOCR's predictions
            [
                {
                    "question": "Q?",
                    "answer": "said",
                    "gt_answers": ["A", "B"],
                    "image_path": "./data/x.jpg",
                    "model_name": "M",
                }
            ],
            ("0", "Q?", ("A", "B"), "./data/x.jpg", "said"),
        ),
        (
            [{"question": "Q?", "answer": "said", "gt_answers": "A", "image_path": "x.jpg"}],
            ("0", "Q?", ("A",), "x.jpg", "said"),
        ),
        (  # ST-VQA
            {
                "data": [
                    {"question_id": 7, "question": "Q?", "answers": ["A"], "dataset": "coco-text", "file_name": "x.jpg"}
                ]
            },
            ("7", "Q?", ("A",), "coco-text/x.jpg", None),
        ),
        (
            {
                "data": [
                    {
                        "question": "Q?",
                        "answers": ["A"],
                        "dataset": "icdar",
                        "file_path": "icdar/x.jpg",
                        "file_name": "x",
                    }
                ]
            },
            ("0", "Q?", ("A",), "icdar/x.jpg", None),
        ),
        (  # TextVQA
            {"data": [{"question_id": 3, "question": "Q?", "answers": ["A"] * 10, "image_id": "0054c91397f2fe05"}]},
            ("3", "Q?", ("A",) * 10, "0054c91397f2fe05.jpg", None),
        ),
        (  # VQA
            [{"question_id": 3, "question": "Q?", "answers": [{"answer": "A", "answer_id": 1}], "image": "x.jpg"}],
            ("3", "Q?", ("A",), "x.jpg", None),
        ),
        (  # DocVQA
            {"data": [{"questionId": 5, "question": "Q?", "answers": ["0.28", "28"], "image": "documents/x.png"}]},
            ("5", "Q?", ("0.28", "28"), "documents/x.png", None),
        ),
        (  # ChartQA
            [{"imgname": "415.png", "query": "Q?", "label": "14"}],
            ("0", "Q?", ("14",), "415.png", None),
        ),
        (  # ScienceQA
            {
                "3": {
                    "question": "Which is it?",
                    "choices": ["a fish", "a bird"],
                    "answer": 1,
                    "hint": "It flies.",
                    "image": "image.png",
                    "split": "test",
                    "subject": "natural science",
                    "lecture": "L",
                }
            },
            (
                "3",
                "Which is it?\nContext: It flies.\nOptions: (A) a fish (B) a bird",
                ("B",),
                "3/image.png",
                None,
            ),
        ),
        (
            {"4": {"question": "Q?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None}},
            ("4", "Q?\nContext: N/A\nOptions: (A) x (B) y", ("A",), None, None),
        ),
        (  # OCR-VQA
            {
                "159": {
                    "questions": ["Q?"],
                    "answers": ["A"],
                    "imageURL": "http://x.org/a.gif",
                    "genre": "Law",
                    "split": 3,
                }
            },
            ("159/0", "Q?", ("A",), "159.gif", None),
        ),
        ([{"question": "Q?", "answer": "A", "image": "x.jpg"}], ("0", "Q?", ("A",), "x.jpg", None)),
        ([{"question": "Q?", "answers": 2019, "image": "x.jpg"}], ("0", "Q?", ("2019",), "x.jpg", None)),
        ([{"question": "Q?", "answers": "A", "predict": ""}], ("0", "Q?", ("A",), None, "")),
        ([{"question": "Q?", "answers": "A", "answer": 5}], ("0", "Q?", ("A",), None, "5")),
        ([{"question_id": 0, "id": "x", "question": "Q?", "answers": "A"}], ("0", "Q?", ("A",), None, None)),
        ([{"id": "r", "image": "x.jpg", "conversations": TURNS}], ("r", "What is sold?", ("TEA",), "x.jpg", None)),
    ],
)
def test_forms(content: Any, expected: tuple[Any, ...], tmp_path: Path) -> None:
    files = [write(tmp_path, content)]
    if isinstance(content, list):
        files.append(write(tmp_path, content, "data.jsonl"))
    for file in files:
        (read,) = read_vqa_questions(file)
        assert (read.id, read.question, read.truths, read.image, read.answer) == expected


def test_fields_and_text_sizes(tmp_path: Path) -> None:
    row = {
        "question": "Q?", "answers": ["A"], "image": "x.jpg", "dataset": "icdar", "question_types": ["table", "form"],
        "url": "http://" + "x" * 50, "box": [10, 20, 30, 28], "text_height": 7.5, "image_width": 640,
        "image_height": 480,
    }  # fmt: skip
    (read,) = read_vqa_questions(write(tmp_path, [row]))
    assert read.fields == {"dataset": "icdar", "question_types": "form + table"}
    assert (read.box, read.text_height, read.size) == ((10, 20, 30, 28), 7.5, (640, 480))


def test_duplicate_ids_are_replaced_by_indices(tmp_path: Path) -> None:
    rows = [{"id": "same", "question": "Q?", "answers": ["A"]}] * 2
    assert [question.id for question in read_vqa_questions(write(tmp_path, rows))] == ["0", "1"]
    assert len(read_vqa_questions(write(tmp_path, rows), limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no questions"),
        ({"questions": 1}, "has an unknown format"),
        ([1], r":0: is int, expected an object"),
        ([{"question": " ", "answers": ["A"]}], "has no question"),
        ([{"question": "Q?", "answers": [""]}], r"has no correct answers \(answers is empty\)"),
        (
            [{"question": "Q?", "answers": [" ", {"answer": "\u200b"}]}] * 7,
            r":4: has no(.|\n)*and 2 more",
        ),
        ([{"question": "Q?", "answer": ""}], r"has no correct answers \(answer is empty\)"),
        (
            [{"id": "r", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": " "}]}],
            r"has no correct answers \(the answer is empty\)",
        ),
        ([{"question": "Q?", "answers": []}], r"has no correct answers \(answers is empty\)"),
        ([{"question": "Q?", "gt_answers": [], "answer": "said"}], r"no correct answers \(gt_answers is empty\)"),
        ([{"question": "Q?", "gt_answers": ["A"], "answer": True}], "answer: is not a text"),
        ([{"question": "Q?", "answers": [None]}], "are not texts"),
        ([{"question": "Q?", "answers": ["A"], "image": 3.5}], "image: is not a text"),
        ([{"question": "Q?", "answers": ["A"], "box": [1, 2, 1, 4]}], "has no area"),
        ([{"question": "Q?", "answers": ["A"], "text_height": -1}], "expected a positive number"),
        ({"1": {"questions": ["Q?"], "answers": []}}, "the number of answers is not the number of questions"),
    ],
)
def test_faults_are_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_vqa_questions(write(tmp_path, content))
    assert "Fix: " in str(caught.value)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_vqa_questions(tmp_path / "none.json")
    (tmp_path / "bad.jsonl").write_text('{"question": "Q?", "answers": ["A"]}\n{"question', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not valid JSON"):
        read_vqa_questions(tmp_path / "bad.jsonl")


def test_predictions_are_joined_to_their_data_set(tmp_path: Path) -> None:
    rows = [{"question_id": number, "question": "Q?", "answers": ["A"], "image": "x.jpg"} for number in (1, 2)]
    dataset = write(tmp_path, {"data": rows}, "dataset.json")
    said = [{"question_id": 2, "answer": "two"}, {"question_id": 1, "answer": "one"}]
    joined = read_predictions(write(tmp_path, said, "said.json"), dataset)
    assert [(question.id, question.answer) for question in joined] == [("1", "one"), ("2", "two")]
    with pytest.raises(DataError, match=r"answers 1 of 2 questions .*missing: 1"):
        read_predictions(write(tmp_path, said[:1], "said.json"), dataset)
    with pytest.raises(DataError, match="has no answer"):
        read_predictions(dataset)


def test_the_id_0_is_an_id(tmp_path: Path) -> None:
    rows = [{"question_id": number, "question": f"{number}?", "answers": ["A"]} for number in (2, 1, 0)]
    said = [{"question_id": number, "answer": f"to {number}"} for number in range(3)]
    joined = read_predictions(write(tmp_path, said, "said.json"), write(tmp_path, rows))
    assert [(one.id, one.question, one.answer) for one in joined] == [
        ("2", "2?", "to 2"), ("1", "1?", "to 1"), ("0", "0?", "to 0"),
    ]  # fmt: skip


def test_duplicate_ids_are_rejected(tmp_path: Path) -> None:
    rows = [{"question_id": number, "question": "Q?", "answers": ["A"]} for number in (0, 1, 1)]
    said = [{"question_id": number, "answer": "said"} for number in (0, 1, 2)]
    dataset, predictions = write(tmp_path, rows), write(tmp_path, said, "said.json")
    with pytest.raises(DataError, match=r"data\.json:2: has the same id '1' as .*data\.json:1"):
        read_predictions(predictions, dataset)
    assert len(read_predictions(predictions, dataset, limit=2)) == 2
    with pytest.raises(DataError, match=r"said\.json:1: is a second answer to the question '0'"):
        read_predictions(write(tmp_path, said[:1] * 2, "said.json"), dataset, limit=2)


def test_the_original_s_files_of_answers_are_joined(tmp_path: Path) -> None:
    """``text``, as its model_vqa and ``llavar-peft generate`` write it; a number is its text."""
    dataset = write(tmp_path, [{"question_id": number, "question": "Q?", "answers": ["A"]} for number in (5, 6)])
    rows = [
        {"question_id": 5, "prompt": "Q?", "text": "said", "answer_id": "u", "model_id": "m", "metadata": {}},
        {"question_id": 6, "answer": 7.5},
    ]
    joined = read_predictions(write(tmp_path, rows, "answers.jsonl"), dataset)
    assert [one.answer for one in joined] == ["said", "7.5"]
    with pytest.raises(DataError, match=r":1: has no answer"):
        read_predictions(write(tmp_path, [rows[0], {"question_id": 6, "answer": None}], "answers.jsonl"), dataset)


def test_a_split_of_a_data_set(tmp_path: Path) -> None:
    book = {"questions": ["Q?"], "answers": ["A"], "imageURL": "http://x.org/a.gif"}
    ocr_vqa = write(tmp_path, {str(number): {**book, "split": number % 3 + 1} for number in range(4)})
    assert [one.id for one in read_vqa_questions(ocr_vqa, split="train")] == ["0/0", "3/0"]
    assert [one.id for one in read_vqa_questions(ocr_vqa, split="test")] == ["2/0"]
    rows = [{"question": f"{name}?", "answers": ["A"], "set_name": name} for name in ("train", "val")]
    assert [one.question for one in read_vqa_questions(write(tmp_path, rows), split="val")] == ["val?"]
    with pytest.raises(DataError, match="holds no questions of the split 'test'"):
        read_vqa_questions(write(tmp_path, rows), split="test")
    with pytest.raises(DataError, match="does not give its split"):
        read_vqa_questions(write(tmp_path, [{"question": "Q?", "answers": ["A"]}]), split="test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image/1.jpg COFFEE\nimage/2.jpg\tTWO WORDS\n\n", [
            ("image/1.jpg", "what is written in the image?", ("COFFEE",), "image/1.jpg"),
            ("image/2.jpg", "what is written in the image?", ("TWO WORDS",), "image/2.jpg"),
        ]),
        ('{"file_name": "a/1.jpg", "entity_dict": {"CE-PS": "230kcal(960kJ)", "SS": "30 g", "XX": "(1)"}}\n', [
            ("a/1.jpg/CE-PS", "what is Calories/Energy of per serving in the image?", ("960kJ", "230kcal"), "a/1.jpg"),
            ("a/1.jpg/SS", "what is Serving size in the image?", ("30 g",), "a/1.jpg"),
            ("a/1.jpg/XX", "what is XX in the image?", ("1",), "a/1.jpg"),
        ]),
    ],
)  # fmt: skip
def test_files_of_lines(tmp_path: Path, text: str, expected: list[tuple[Any, ...]]) -> None:
    """CT80's and POIE's, as MultimodalOCR asks them."""
    file = tmp_path / "test_label.txt"
    file.write_text(text, encoding="utf-8")
    assert [(one.id, one.question, one.truths, one.image) for one in read_vqa_questions(file)] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "image/1.jpg\n", "has no text after the image"),
        ("a.txt", '{"file_name": "a.jpg"}\n', "has no entity_dict"),
        ("a.txt", "\n", "holds no questions"),
        ("a.json", '{"1": {"question": "Q?", "choices": ["x"], "answer": 1}}', "none of the options"),
        ("a.json", '{"1": {"question": "Q?", "choices": [], "answer": 0}}', "choices is not a list"),
        ("a.json", '[{"query": "Q?", "label": [], "imgname": "x.png"}]', "has no correct answers"),
    ],
)
def test_faults_of_the_appendix_benchmarks(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_vqa_questions(file)
