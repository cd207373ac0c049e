"""The original's method of answering a file of questions: one record at a time, without any cache.

Source: LLaVAR, llava/eval/model_vqa.py, ``eval_model``, on current ``transformers``. As there, the prompt is
tokenized as one text, ``generate`` runs on one row, the whole answer is decoded after each token to find ``</s>``, and
each line is flushed. So that answers can be compared, sampling is greedy and images are prepared by this package, and a
model whose conversation template is not LLaVAR's gets the ids of this package, and ends at its tokenizer's end token.
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
from llavar_peft.inference.generation_request import PromptImage, encode_messages

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.inference.engine import Engine
    from llavar_peft.models.processing_llavar import LlavarProcessor

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
    with answers.open("w", encoding="utf-8") as file:
        for line in (json.loads(text) for text in questions.read_text(encoding="utf-8").splitlines()):
            image = open_image(images / line["image"])
            ids = _encode_prompt(processor, line["text"], image).to(engine.device)
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


def _encode_prompt(processor: LlavarProcessor, question: str, image: Image) -> torch.Tensor:
    """Return the ids ``[1, T]`` of a question about an image."""
    if processor.template == "chat":
        prepared = PromptImage.prepare(image, processor)
        asked = processor.conversation_template.question(question, 1)
        return encode_messages(processor, [("human", asked)], [prepared])[None]
    place = image_block(processor.num_image_tokens, use_im_start_end=processor.use_im_start_end)
    prompt = f"{processor.tokenizer.bos_token}{SYSTEM_PROMPT} USER: {question}\n{place} ASSISTANT:"
    ids: torch.Tensor = processor.tokenizer([prompt], add_special_tokens=False, return_tensors="pt").input_ids
    return ids
