"""The tiny language model's tokenizer: LLaMA's form, with a vocabulary of a few hundred tokens.

Like LLaMA's it puts `▁` before the text, writes spaces as `▁`, has no pre-tokenizer and falls back to bytes, so that it
can encode any text. Every letter and digit has a token with a leading `▁`, and the words of the conversation template
and of the questions are tokens. Each word is merged from the left, starting with its `▁`, so that random strings are
encoded letter by letter.
"""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from llavar_peft.constants import ASSISTANT_ROLE, OCR_INSTRUCTIONS, SYSTEM_PROMPT, USER_ROLE

SPECIAL = ("<unk>", "<s>", "</s>")


def template_words(questions: Iterable[str]) -> list[str]:
    """Return the words that become tokens, in order of first use; of words in capitals, only the roles do."""
    text = " ".join((USER_ROLE, ASSISTANT_ROLE, SYSTEM_PROMPT, *OCR_INSTRUCTIONS, *questions))
    words = dict.fromkeys(re.findall(r"[A-Za-z]+", text))
    roles = {USER_ROLE, ASSISTANT_ROLE}
    return [word for word in words if len(word) > 1 and (word in roles or not re.search("[A-Z].*[A-Z]", word))]


def make_tokenizer(directory: Path, questions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer and write it as a Hugging Face folder.

    Args:
        directory: Folder for `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
        questions: Texts whose words become tokens.
    """
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(code) for code in range(0x21, 0x7F))]
    merges: list[tuple[str, str]] = []
    known = set(pieces)
    starts = string.ascii_letters + string.digits
    for word in (*starts, *template_words(questions)):
        for end in range(1, len(word) + 1):
            left, right = "▁" + word[: end - 1], word[end - 1]
            if left + right not in known:
                known.add(left + right)
                pieces.append(left + right)
                merges.append((left, right))
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="right", clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    # transformers 5 writes a class name that version 4 does not have; both have this one.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return tokenizer
