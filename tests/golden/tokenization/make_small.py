"""Build ``small/tokenizer.model``: a SentencePiece model with LLaMA's settings, trained on words of this project."""

import random
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llavar_peft.constants import SYSTEM_PROMPT

HERE = Path(__file__).parent
WORDS = (
    f"{SYSTEM_PROMPT} USER: ASSISTANT: What is written on the sign? Who wrote this book? Read the text in the picture. "
    "List all the words. The title is Emma. The total is 12.99. A menu with prices. Open 24 hours. Red, green, blue. "
    "</div> </td> bs> yes> as> is> </b> </i> ds> ts> <s <sun <s: "
    "<im_patch> <im_start> <im_end> <image> \n if (x == 10) { return a[i]; } aaaa ==== ----"
)


def main() -> None:
    """Train and save the model."""
    rng = random.Random(0)
    words = WORDS.split(" ")
    lines = [(" " * rng.choice((1, 1, 1, 2, 4))).join(rng.choices(words, k=12)) for _ in range(3000)]
    lines += [" ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(6)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SYSTEM_PROMPT, *lines]),
        model_prefix=str(HERE / "small" / "tokenizer"),
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=False,  # unlike LLaMA's, to get a piece "s>" that could follow "</"
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    (HERE / "small" / "tokenizer.vocab").unlink()
    path = HERE / "small" / "tokenizer.model"
    model = ModelProto.FromString(path.read_bytes())
    model.trainer_spec.model_prefix = "tokenizer"  # not the path of this machine
    path.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
