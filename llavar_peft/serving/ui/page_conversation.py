"""A conversation on the page: its HTML, and its files as text and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

# Escapes HTML, and the template syntax that Gradio evaluates in a browser.
_ESCAPES: Final = str.maketrans({character: f"&#{ord(character)};" for character in "&<>\"'`$\\{}"})


@dataclass(slots=True)
class Exchange:
    """A question and its answers, one per model.

    Attributes:
        question: The user's text.
        models: One model, or two that are compared.
        answers: The text of each model so far.
        done: True when the answers are complete.
    """

    question: str
    models: tuple[str, ...]
    answers: list[str]
    done: bool = False


@dataclass(slots=True)
class PageConversation:
    """All questions and answers about one image.

    Attributes:
        image: The uploaded file's path; None without an image.
        exchanges: Questions and answers in order.
    """

    image: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def history(self, side: int) -> list[tuple[str, str]]:
        """Return the questions and answers so far.

        Args:
            side: 0, or 1 for the second of two models. Exchanges with one model belong to both.
        """
        return [(one.question, one.answers[min(side, len(one.answers) - 1)]) for one in self.exchanges]

    def as_html(self, side: int, name: str) -> str:
        """Return the content of one window, with all text escaped.

        Args:
            side: As in ``history``.
            name: The model's name, for the title.
        """
        shown = [_exchange_html(one, side) for one in self.exchanges if side < len(one.models)]
        empty = '<p class="empty">The answer will appear here.</p>'
        return f'<div role="log"><h2>{_escape(name)}</h2>{"".join(shown) or empty}</div>'

    def as_json(self) -> str:
        """Return the conversation as JSON."""
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
        """Return the conversation as plain text."""
        blocks = [f"Image: {self._image_name()}\n"] if self.image else []
        for one in self.exchanges:
            answers = (f"{model}: {answer}\n" for model, answer in zip(one.models, one.answers, strict=True))
            blocks.append(f"Q: {one.question}\n{''.join(answers)}")
        return "\n".join(blocks)

    def _image_name(self) -> str | None:
        return None if self.image is None else self.image.replace("\\", "/").rpartition("/")[2]


def _exchange_html(exchange: Exchange, side: int) -> str:
    answer = exchange.answers[side]
    waiting = "" if exchange.done else " waiting"
    copy = '<button class="copy" type="button">Copy</button>' if answer else ""
    return (
        f'<div class="said question">{_escape(exchange.question)}</div>'
        f'<div class="said answer{waiting}"><span class="words">{_escape(answer)}</span>{copy}</div>'
    )


def _escape(text: str) -> str:
    return text.translate(_ESCAPES)
