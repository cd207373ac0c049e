"""The model ``llavar`` of lmms-eval: ``lmms-eval --model llavar --model_args pretrained=DIR --tasks ocrbench``.

lmms-eval finds ``manifest`` by the entry point ``lmms_eval.models``; nothing else imports this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, cast

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.inference.chat import load_chat
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.weights.adapter.model_hash import identify_model

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from PIL.Image import Image

    from llavar_peft.types import ImageMode, Quantization

_MAX_NEW_TOKENS: Final = 256  # if the task sets no limit


def manifest() -> ModelManifest:
    """Register the model ``llavar`` with lmms-eval."""
    return ModelManifest(model_id="llavar", simple_class_path=f"{__name__}.LlavarForLmmsEval")


class LlavarForLmmsEval(lmms):
    """A LLaVAR for lmms-eval. It accepts one image per question; the question comes first, as in the original.

    Args:
        pretrained: Folder of a checkpoint, an adapter or a run.
        adapter: Folder of an adapter to apply to ``pretrained``.
        vision_tower: Folder or name of the tower, for a checkpoint in the released layout.
        quantize: How the base is stored.
        image_mode: How images are prepared; None is the model's default.
        device: None and ``"cuda"`` are the GPU of this process, if there is one.
        batch_size: Number of questions per batch.
        seed: Seed of sampled answers.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        vision_tower: str | None = None,
        quantize: Quantization | None = None,
        image_mode: ImageMode | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._join_processes(int(os.environ.get("WORLD_SIZE", "1")))
        if self._world_size > 1 and device in (None, "cuda"):
            device = str(self.accelerator.device)
        self._chat = load_chat(
            pretrained, adapter, vision_tower=vision_tower, quantize=quantize, device=device or "auto"
        )
        self.device = self._chat.engine.device
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.image_mode = image_mode
        self.model_hash = identify_model(pretrained, adapter)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions.

        Returns:
            The answers in order, each cut at the first of its task's ``until``.

        Raises:
            DataError: A question has several images.
            ConfigError: A task asks for beam search.
        """
        answers: list[str] = []
        # Requests come task by task; those of a batch share their generation settings.
        for _, same in groupby(
            (request.args for request in requests), key=lambda asked: sorted(asked[1].items(), key=str)
        ):
            rows = list(same)
            for start in range(0, len(rows), self.batch_size):
                answers += self._ask(rows[start : start + self.batch_size], len(answers))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise ``ConfigError``: scoring given answers is not supported."""
        raise ConfigError.at("lmms-eval", "the task scores given answers by likelihood", "choose tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise ``ConfigError``: several rounds are not supported."""
        raise ConfigError.at("lmms-eval", "the task asks in several rounds", "choose tasks that ask once")

    def _ask(self, rows: Sequence[tuple[Any, ...]], number: int) -> list[str]:
        settings = cast("Mapping[str, Any]", rows[0][1])
        if int(settings.get("num_beams") or 1) > 1:
            raise ConfigError.at("num_beams", f"got {settings['num_beams']}, expected 1", "do not use beam search")
        sampled = bool(settings.get("do_sample", settings.get("temperature")))
        requests = [
            self._chat.request(
                self._image(*row[2:6]),
                str(row[0]).replace(IMAGE_PLACEHOLDER, "").strip(),
                image_mode=self.image_mode,
                sampling=Sampling(
                    max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
                    temperature=float(settings.get("temperature") or 0.0) if sampled else 0.0,
                    top_p=float(settings.get("top_p") or 1.0),
                    seed=self.seed + index,
                ),
            )
            for index, row in enumerate(rows, number)
        ]
        until = settings.get("until") or []
        answers = self._chat.answer(requests, batch_size=self.batch_size)
        return [_cut(answer.text, [until] if isinstance(until, str) else until) for answer in answers]

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Image | None:
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) > 1:
            raise DataError.at(
                f"{task}:{doc_id}", f"has {len(images)} images", "choose tasks with one image per question"
            )
        return cast("Image", images[0]) if images else None

    def _join_processes(self, processes: int) -> None:
        """Share the questions with the other processes of the launcher."""
        if processes > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes


def _cut(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        answer = answer.partition(stop)[0] if stop else answer
    return answer.strip()
