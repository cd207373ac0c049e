"""Questions of ChartQA, ScienceQA, CT80 and POIE, the data sets of the paper's appendix E, from the published files.

========== ============================================ ===========================================================
Data set   File                                         Images (``--images``)
========== ============================================ ===========================================================
ChartQA    ``test_human.json``, ``test_augmented.json`` the folder ``png`` of the split
ScienceQA  ``problems.json``                            the folder of the split, ``images/test``
CT80       ``test_label.txt``, an image and its word    the folder of ``test_label.txt``
POIE       ``test.txt``, JSON Lines with entities       the folder of ``test.txt``
========== ============================================ ===========================================================

Source: vis-nlp/ChartQA; lupantech/ScienceQA, with LLaVA's question (``QCM``) and paths; MultimodalOCR, whose questions
on CT80 and POIE the paper's figures were measured with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.benchmark_protocols import OPTIONS
from llavar_peft.text_files import read_json_lines, read_text

_WORD_QUESTION: Final = "what is written in the image?"
_NUTRIENTS: Final = {
    "CE": "Calories/Energy", "TF": "Total fat", "CAR": "Total carbohydrate", "PRO": "Protein", "SO": "Sodium",
}  # fmt: skip
_AMOUNTS: Final = {
    "PS": "per serving", "D": "daily value", "P1": "per 100g/ml", "PP": "per 100g/ml percentage",
}  # fmt: skip
_IN_BRACKETS: Final = re.compile(r"\((.*?)\)")


def is_chart_row(row: Mapping[str, Any]) -> bool:
    """Return whether a record is ChartQA's."""
    return "query" in row and "label" in row


def read_chart_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of ChartQA as one with question, answers and image."""
    label = row["label"]
    rest = {key: value for key, value in row.items() if key not in ("query", "label", "imgname")}
    return {
        "question": row["query"],
        "answers": label if isinstance(label, list) else [label],
        **({"image": row["imgname"]} if row.get("imgname") else {}),
        **rest,
    }


def is_science_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a file is that of ScienceQA's ``problems.json``."""
    return bool(content) and all(isinstance(one, Mapping) and "choices" in one for one in content.values())


def read_science_file(path: Path, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the problems of ScienceQA as records; the answer is the letter of the right option.

    Raises:
        DataError: A problem has no options, or an answer that is none of them.
    """
    for name, problem in content.items():
        options, answer = problem["choices"], problem.get("answer")
        if not isinstance(options, Sequence) or isinstance(options, str) or not 0 < len(options) <= len(OPTIONS):
            raise DataError.at(
                f"{path}:{name}", f"choices is not a list of at most {len(OPTIONS)} texts", "download the file again"
            )
        if not isinstance(answer, int) or not 0 <= answer < len(options):
            raise DataError.at(
                f"{path}:{name}",
                f"the answer is none of the options (got {answer!r}, expected 0 to {len(options) - 1})",
                "download the file again",
            )
        listed = " ".join(f"({letter}) {option}" for letter, option in zip(OPTIONS, options, strict=False))
        hint, image = str(problem.get("hint") or "").strip(), problem.get("image")
        asked = f"{problem.get('question') or ''}\nContext: {hint or 'N/A'}\nOptions: {listed}"
        yield {
            "id": name,
            "question": asked.replace("  ", " ").strip(),
            "answers": [OPTIONS[answer]],
            **({"image": f"{name}/{image}"} if image else {}),
            "context": "image" if image else "text" if hint else "none",
            **{key: problem[key] for key in ("split", "subject", "grade") if key in problem},
        }


def read_label_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a ``.txt`` file: POIE's entities as JSON Lines, or else an image and its text per line.

    Raises:
        DataError: The file cannot be read, or a line has no text.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("{"):
        yield from _read_entities(path)
        return
    for number, line in lines:
        image, *text = line.split(maxsplit=1)
        if not text:
            raise DataError.at(f"{path}:{number}", "has no text after the image", "write the image and its text")
        yield {"id": image, "question": _WORD_QUESTION, "answers": [text[0].strip()], "image": image}


def _read_entities(path: Path) -> Iterator[dict[str, Any]]:
    fix = "give POIE's test.txt, with file_name and entity_dict in each line"
    for where, row in read_json_lines(path, fix=fix, lenient=True):
        entities = row.get("entity_dict") if isinstance(row, Mapping) else None
        if not isinstance(entities, Mapping) or not all(isinstance(value, str) for value in entities.values()):
            raise DataError.at(where, "has no entity_dict of texts", fix)
        for key, value in entities.items():
            # "230kcal(960kJ)" is answered by either.
            answers = [*_IN_BRACKETS.findall(value), _IN_BRACKETS.sub("", value)]
            yield {
                "id": f"{row.get('file_name')}/{key}",
                "question": f"what is {_entity_name(key)} in the image?",
                "answers": [text for answer in answers if (text := answer.strip())] or [value],
                "image": row.get("file_name"),
                "entity": key,
            }


def _entity_name(key: str) -> str:
    nutrient, _, amount = key.partition("-")
    if nutrient in _NUTRIENTS and amount in _AMOUNTS:
        return f"{_NUTRIENTS[nutrient]} of {_AMOUNTS[amount]}"
    return "Serving size" if key == "SS" else key
