"""A conversation on the page: how it is shown, and how it is written down."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

# As text, never as a tag; nor as a place in the templates that Gradio runs over HTML in the browser.
_AS_TEXT: Final = str.maketrans({sign: f"&#{ord(sign)};" for sign in "&<>\"'`$\\{}"})


@dataclass(slots=True)
class Exchange:
    """A question, and what one model said, or two.

    Attributes:
        question: The user's words.
        models: Who answers.
        answers: What each has said so far.
        done: Whether nothing more comes.
    """

    question: str
    models: tuple[str, ...]
    answers: list[str]
    done: bool = False


@dataclass(slots=True)
class Talk:
    """What was said about one image.

    Attributes:
        image: The uploaded file's path; None without an image.
        exchanges: In order.
    """

    image: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def history(self, side: int) -> list[tuple[str, str]]:
        """Questions and answers so far, as one side knows them.

        Args:
            side: 0, or 1 for the second of two models; what was asked before there were two, both have seen.

        Returns:
            The pairs, in order.
        """
        return [(one.question, one.answers[min(side, len(one.answers) - 1)]) for one in self.exchanges]

    def as_html(self, side: int, name: str) -> str:
        """What one side's window shows.

        Args:
            side: As in ``history``.
            name: Of the model that answers there.

        Returns:
            HTML in which all words are text.
        """
        said = [_shown(one, side) for one in self.exchanges if side < len(one.models)]
        empty = '<p class="empty">Answers come here.</p>'
        return f'<div role="log"><h2>{_text(name)}</h2>{"".join(said) or empty}</div>'

    def as_json(self) -> str:
        """The conversation for programs."""
        turns = [
            {
                "question": one.question,
                "answers": [
                    {"model": model, "text": answer} for model, answer in zip(one.models, one.answers, strict=True)
                ],
            }
            for one in self.exchanges
        ]
        return json.dumps({"picture": self._image_name(), "turns": turns}, ensure_ascii=False, indent=2) + "\n"

    def as_text(self) -> str:
        """The conversation for people."""
        blocks = [f"Picture: {self._image_name()}\n"] if self.image else []
        for one in self.exchanges:
            answers = (f"{model}: {answer}\n" for model, answer in zip(one.models, one.answers, strict=True))
            blocks.append(f"Q: {one.question}\n{''.join(answers)}")
        return "\n".join(blocks)

    def _image_name(self) -> str | None:
        return None if self.image is None else self.image.replace("\\", "/").rpartition("/")[2]


def _shown(exchange: Exchange, side: int) -> str:
    answer = exchange.answers[side]
    waiting = "" if exchange.done else " waiting"
    copy = '<button class="copy" type="button">copy</button>' if answer else ""
    return (
        f'<div class="said question">{_text(exchange.question)}</div>'
        f'<div class="said answer{waiting}"><span class="words">{_text(answer)}</span>{copy}</div>'
    )


def _text(words: str) -> str:
    return words.translate(_AS_TEXT)
