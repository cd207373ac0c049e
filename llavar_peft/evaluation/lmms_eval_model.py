"""Our models in lmms-eval: ``lmms-eval --model llavar --model_args pretrained=DIR --tasks ocrbench,textvqa_val``.

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
from llavar_peft.inference.reader import load_reader
from llavar_peft.models.generate import answer_images
from llavar_peft.weights.adapter.model_hash import identify_model

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from PIL.Image import Image

    from llavar_peft.recipe.schema import Quantization
    from llavar_peft.types import ImageMode

_TOKENS: Final = 256  # at most, where a task does not say


def manifest() -> ModelManifest:
    """Tell lmms-eval of the model ``llavar``."""
    return ModelManifest(model_id="llavar", simple_class_path=f"{__name__}.LlavarForLmmsEval")


class LlavarForLmmsEval(lmms):
    """A model that lmms-eval asks. It reads one image a question, the question first, as in the original.

    Args:
        pretrained: A checkpoint's folder, an adapter's, or a run's.
        adapter: Laid over it.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        quantize: How the base is stored.
        image_mode: How images are prepared; None is the model's own way.
        device: None, or plain ``"cuda"``, is this process's own GPU where there is one.
        batch_size: Questions asked at once.
        seed: Of the sampling, where a task samples.
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
        self._join(int(os.environ.get("WORLD_SIZE", "1")))
        place = self._place(device)
        self._reader = load_reader(
            pretrained, adapter=adapter, vision_tower=vision_tower, quantize=quantize, device=place
        )
        self.device = next(self._reader.model.parameters()).device
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.image_mode = image_mode
        self.model_hash = identify_model(pretrained, adapter)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions.

        Args:
            requests: lmms-eval's.

        Returns:
            The answers, in order, each up to the first of its task's ``until``.

        Raises:
            DataError: A question has several images.
            ConfigError: A task wants a beam.
        """
        answers: list[str] = []
        # One batch is generated in one way, and requests come task by task.
        for _, same in groupby(
            (request.args for request in requests), key=lambda asked: sorted(asked[1].items(), key=str)
        ):
            rows = list(same)
            for start in range(0, len(rows), self.batch_size):
                answers += self._ask(rows[start : start + self.batch_size], len(answers))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Is not there. Raises ``ConfigError``."""
        raise ConfigError.at("lmms-eval", "the task scores given answers by likelihood", "choose tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Is not there. Raises ``ConfigError``."""
        raise ConfigError.at("lmms-eval", "the task asks in several rounds", "choose tasks that ask once")

    def _ask(self, rows: Sequence[tuple[Any, ...]], number: int) -> list[str]:
        how = cast("Mapping[str, Any]", rows[0][1])
        if int(how.get("num_beams") or 1) > 1:
            raise ConfigError.at("num_beams", f"got {how['num_beams']}, expected 1", "ask without a beam")
        sampled = bool(how.get("do_sample", how.get("temperature")))
        said = answer_images(
            self._reader.model,
            self._reader.processor,
            [str(row[0]).replace(IMAGE_PLACEHOLDER, "").strip() for row in rows],
            [self._image(*row[2:6]) for row in rows],
            max_new_tokens=int(how.get("max_new_tokens") or _TOKENS),
            image_mode=self.image_mode,
            temperature=float(how.get("temperature") or 0.0) if sampled else 0.0,
            top_p=float(how.get("top_p") or 1.0),
            seed=self.seed + number,
        )
        until = how.get("until") or []
        return [_cut(answer, [until] if isinstance(until, str) else until) for answer in said]

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Image | None:
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) > 1:
            raise DataError.at(
                f"{task}:{doc_id}", f"has {len(images)} pictures", "choose tasks of one picture a question"
            )
        return cast("Image", images[0]) if images else None

    def _join(self, processes: int) -> None:
        """Shares the questions with other processes, where a launcher started several."""
        if processes > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _place(self, device: str | None) -> str | None:
        return str(self.accelerator.device) if self._world_size > 1 and device in (None, "cuda") else device


def _cut(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        answer = answer.partition(stop)[0] if stop else answer
    return answer.strip()
