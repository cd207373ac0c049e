"""The original's method of answering a file of questions: one record at a time, without any cache.

Source: LLaVAR, llava/eval/model_vqa.py, ``eval_model``, on current ``transformers``. As there, the prompt is
tokenized as one text, ``generate`` runs on one row, the whole answer is decoded after each token to find ``</s>``, and
each line is flushed. So that answers can be compared, sampling is greedy and images are prepared by this package.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from llavar_peft.constants import SYSTEM_PROMPT
from llavar_peft.data.conversation_template import image_block
from llavar_peft.data.image_files import open_image
from llavar_peft.data.image_preparation import prepare_image

if TYPE_CHECKING:
    from llavar_peft.inference.engine import Engine

END = "</s>"


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops when the answer contains a keyword, like the original's class of this name.

    Args:
        keywords: Texts that end the answer.
        tokenizer: Decodes the answer.
        prompt_length: Number of tokens of the prompt.
    """

    def __init__(self, keywords: list[str], tokenizer: Any, prompt_length: int) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start = prompt_length

    def __call__(self, output_ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        """Return True if the answer so far contains a keyword; ``output_ids`` is ``[1, T]`` and includes the prompt."""
        said = self.tokenizer.batch_decode(output_ids[:, self.start :], skip_special_tokens=True)[0]
        return any(keyword in said for keyword in self.keywords)


@torch.inference_mode()
def answer_file(engine: Engine, questions: Path, images: Path, answers: Path, *, max_new_tokens: int) -> None:
    """Answer a file of questions.

    Args:
        engine: The loaded model.
        questions: JSON lines with ``question_id``, ``image`` and ``text``.
        images: The folder of the images.
        answers: The file to write.
        max_new_tokens: Largest number of tokens in an answer.
    """
    processor, model = engine.processor, engine.base_model
    tokenizer = processor.tokenizer
    place = image_block(processor.num_image_tokens, use_im_start_end=processor.use_im_start_end)
    with answers.open("w", encoding="utf-8") as file:
        for line in (json.loads(text) for text in questions.read_text(encoding="utf-8").splitlines()):
            prompt = f"{tokenizer.bos_token}{SYSTEM_PROMPT} USER: {line['text']}\n{place} ASSISTANT:"
            ids = tokenizer([prompt], add_special_tokens=False, return_tensors="pt").input_ids.to(engine.device)
            image = open_image(images / line["image"])
            pixels = prepare_image(image, processor.inference_image_mode, processor)[None].to(engine.device)
            stopping = KeywordsStoppingCriteria([END], tokenizer, ids.shape[1])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels.to(model.dtype),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([stopping]),
            )
            said = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)[0]
            record = {
                "question_id": line["question_id"], "prompt": line["text"], "text": said.split(END)[0].strip(),
                "answer_id": uuid.uuid4().hex, "model_id": "original", "metadata": {},
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
            file.flush()
