"""The tokenizer of the tiny modern language model: Qwen's form, byte-level BPE with ChatML.

It is trained on the questions and instructions alone. Words in capitals and numbers are no part of them except for
single letters and digits, so that the strings to be read are encoded letter by letter.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llavar_peft.constants import OCR_INSTRUCTIONS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's division of text into the words within which pieces are merged."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_byte_level_tokenizer(directory: Path, questions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer and write it as a Hugging Face folder.

    Args:
        directory: Folder for `tokenizer.json` and `tokenizer_config.json`.
        questions: The text to train on, with the names of ChatML's roles and the instructions.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    text = ["system user assistant", "You are a helpful assistant.", *OCR_INSTRUCTIONS, *questions]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML,
        padding_side="right", clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    # The template goes where transformers 4 reads it too, and the class gets the name that both versions have.
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer
