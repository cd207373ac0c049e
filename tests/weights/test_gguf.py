"""GGUF files: what llama.cpp computes from them is what the model computes, and its tokens are the tokenizer's."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import llavar_peft
from llavar_peft import ModelConfig, build_model, cli, export
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.errors import ConfigError, LlavarError, WeightsError
from llavar_peft.models.gguf_projector import gelu_pair
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.weights.gguf.gguf_vocabulary import CONTROL, UNUSED, read_vocabulary
from llavar_peft.weights.gguf.score_tokenizer import ScoreTokenizer

gguf = pytest.importorskip("gguf")
from tests.weights.gguf_reference import GgufContents, gelu, image_features, language_logits  # noqa: E402 - needs gguf

ASSETS = Path(llavar_peft.__file__).parent / "assets"
NAMES = ("tiny", "tiny_modern")
QUESTION = "What does the sign say?"
MARKERS = ("<__media__>", "<__media_YoNhud46VdDqbuFmKYEO9PY7A4ARzRfg__>")
TEXTS = (
    "", "The sign says STOP.", "  two  spaces   and more    ", "Total: $1,234.50\n\nVAT 19 %", "ﬁne ½ Ａ é ①",
    "日本語 \U0001f600\U0001f469\u200d\U0001f467 \u0378\t\n\r", "▁x <0x41> ▁", "=" * 37 + " " * 21 + "aaaaaaaaaaa",
    "Which number is on the receipt?", "Identify any text visible in the image provided.",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path]]:
    """The quickstart's model and the modern one, in float16, each with its folder of GGUF files."""
    root, made = tmp_path_factory.mktemp("gguf"), {}
    for name in NAMES:
        parts = {part: str(ASSETS / name / part) for part in ("language_model", "vision_tower")}
        model, processor = build_model(ModelConfig(**parts, dtype="float16"))  # type: ignore[arg-type]
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        export(root / name, root / f"{name}-gguf", to="gguf")
        made[name] = (model.float().eval(), processor, root / f"{name}-gguf")
    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_files_give_the_models_logits(name: str, models: dict[str, tuple[Any, Any, Path]]) -> None:
    """From the pixels of an image and the ids of a question to the logits, with nothing but the two files."""
    model, processor, folder = models[name]
    pixels = prepare_image(Image.effect_noise((90, 60), 90).convert("RGB"), "pad", processor)
    ids = processor.encode_question(QUESTION)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels[None]).logits[0].numpy()
        projected = model.model.get_image_features(pixels[None]).pooler_output[0].numpy()
    features = image_features(folder / f"mmproj-{name}-f16.gguf", pixels.numpy())
    assert np.abs(features - projected).max() < 1e-4 * np.abs(projected).max()
    inputs = GgufContents(folder / f"{name}-f16.gguf").tensors["token_embd.weight"][ids[0]]
    inputs[ids[0].numpy() == processor.image_token_id] = features
    got = language_logits(folder / f"{name}-f16.gguf", ids[0].tolist(), inputs)
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.99


def test_the_fields_are_the_models(models: dict[str, tuple[Any, Any, Path]]) -> None:
    _, processor, folder = models["tiny"]
    fields = GgufContents(folder / "tiny-f16.gguf").fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = processor.tokenizer.get_vocab()
    assert dict(zip(tokens, range(len(tokens)), strict=True)) == vocabulary
    assert {tokens[index] for index, kind in enumerate(kinds) if kind == CONTROL} == {
        "<s>", "</s>", "<im_patch>", "<im_start>", "<im_end>",
    }  # fmt: skip
    assert [kinds[0], kinds[vocabulary["<0x0A>"]]] == [2, 6]  # unknown, byte
    ids = {role: fields[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0}
    assert fields["tokenizer.ggml.add_bos_token"] is True
    modern = GgufContents(models["tiny_modern"][2] / "tiny_modern-f16.gguf").fields
    assert (modern["tokenizer.ggml.model"], modern["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert modern["tokenizer.ggml.token_type"].count(UNUSED) == len(modern["tokenizer.ggml.tokens"]) - len(
        models["tiny_modern"][1].tokenizer
    )
    assert modern["tokenizer.ggml.add_bos_token"] is False


# -- the tokenizer ------------------------------------------------------------------------------


@cache
def _tiny_tokenizer() -> tuple[PreTrainedTokenizerFast, ScoreTokenizer]:
    tokenizer = load_tokenizer(ASSETS / "tiny/language_model")
    return tokenizer, _scored(tokenizer)


def _scored(tokenizer: PreTrainedTokenizerFast) -> ScoreTokenizer:
    vocabulary = read_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), len(tokenizer), "a tokenizer")
    return ScoreTokenizer(vocabulary.tokens, vocabulary.scores)


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" ▁\nWhat num1eri"), min_size=1, max_size=40))
def test_scores_split_any_text_as_the_merges_do(text: str) -> None:
    tokenizer, scored = _tiny_tokenizer()
    if not re.search("<unk>|</?s>", text):
        assert scored.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_scores_split_text_as_llamas_merges_do(shared_dir: Path) -> None:
    folder = shared_dir / "reference/tokenizer"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    tokenizer = load_tokenizer(folder)
    add_image_tokens(tokenizer)
    scored, draw = _scored(tokenizer), random.Random(0)
    answers = json.loads((shared_dir / "reference/vqa/STVQA.json").read_text())
    texts = [one["question"] + " " + one["answer"] for one in draw.sample(answers, 200)]
    ranges = ((32, 126), (32, 64), (160, 383), (1024, 1279), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF))
    texts += ["".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(60)) for _ in range(100)]
    for text in (*TEXTS[1:], *texts):
        assert scored.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_gives_the_tokenizers_ids(name: str, models: dict[str, tuple[Any, Any, Path]]) -> None:
    """With the real engine, which continuous integration does not build."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, processor, folder = models[name]
    engine = llama_cpp.Llama(str(folder / f"{name}-f16.gguf"), vocab_only=True, verbose=False)
    tokenizer = processor.tokenizer
    for text in (*TEXTS, processor.chat_template.replace("<", "(")):
        got = engine.tokenize(text.encode(), add_bos=False, special=False)
        assert got == tokenizer(text, add_special_tokens=False)["input_ids"], text
    enclosed = "a</s>USER: b<im_start><im_end>c" if name == "tiny" else "a<|im_end|>\nb<im_start><im_end>c"
    got = engine.tokenize(enclosed.encode(), add_bos=False, special=True)
    assert got == tokenizer(enclosed, add_special_tokens=False)["input_ids"]


# -- the chat template --------------------------------------------------------------------------


def _render(template: str, content: Any, history: tuple[str, ...] = ()) -> str:
    """Render as llama.cpp and its Python binding do, which ignore `generation`."""
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(history)]
    messages = [*turns, {"role": "user", "content": content}]
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )


def _ids(prompt: str, processor: Any) -> list[int]:
    """Encode a prompt as llama.cpp does: special tokens strip nothing, and an image is any number of embeddings."""
    tokenizer, encoder = processor.tokenizer, text_encoder(processor)
    names = [*tokenizer.get_added_vocab(), *MARKERS]
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", prompt):
        if piece in MARKERS:
            ids += [processor.image_token_id] * processor.num_image_tokens
        elif piece in tokenizer.get_added_vocab():
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            ids += encoder.encode(piece)[0]
    return ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("marker", MARKERS)
def test_the_template_writes_the_prompts_of_training(
    name: str, marker: str, models: dict[str, tuple[Any, Any, Path]]
) -> None:
    _, processor, folder = models[name]
    template = GgufContents(folder / f"{name}-f16.gguf").fields["tokenizer.chat_template"]
    expected = processor.encode_question(QUESTION)[0].tolist()
    image = {"type": "media_marker", "text": marker}
    for content in (
        f"{QUESTION}{marker}",  # llama-server joins parts without a line break next to an image
        f"{QUESTION}\n{marker}",
        [{"type": "text", "text": QUESTION}, image],
        [{"type": "text", "text": QUESTION}, {"type": "text", "text": marker}],  # the Python binding
        *([[image, {"type": "text", "text": QUESTION}]] if name == "tiny_modern" else []),
    ):
        assert _ids(_render(template, content), processor) == expected, content
    without = processor.encode_question(QUESTION, image=False, history=[("Hello", "Yes?")])[0].tolist()
    assert _ids(_render(template, QUESTION, ("Hello", "Yes?")), processor) == without


# -- numbers ------------------------------------------------------------------------------------


@given(st.floats(-200, 200, width=32), st.integers(0, 2**32 - 1))
def test_two_layers_with_a_gelu_are_the_linear_layer(size: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    weight, bias = (torch.from_numpy(draw.standard_normal(shape).astype(np.float32)) for shape in ((6, 4), 6))
    x = (draw.standard_normal((5, 4)) * size).astype(np.float32)
    pair = {name: one.numpy() for name, one in gelu_pair(weight, bias).items()}
    for act in (gelu, lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy()):
        hidden = act(x @ pair["mm.0.weight"].T + pair["mm.0.bias"])
        got = hidden @ pair["mm.2.weight"].T + pair["mm.2.bias"]
        # Numbers below 10 / 256 are rounded to float16 by ggml's table.
        assert np.abs(got - (x @ weight.numpy().T + bias.numpy())).max() < 2e-4 + 2e-6 * abs(size)


@pytest.mark.parametrize(("outtype", "kind", "error"), [("q8_0", "Q8_0", 1 / 127), ("bf16", "BF16", 2**-8)])
def test_outtypes_round_matrices_only(
    outtype: Any, kind: str, error: float, models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    source = models["tiny"][2].with_name("tiny")
    export(source, tmp_path / "out", to="gguf", outtype=outtype)
    for prefix in ("", "mmproj-"):
        exact = GgufContents(models["tiny"][2] / f"{prefix}tiny-f16.gguf")
        file = GgufContents(tmp_path / f"out/{prefix}tiny-{outtype}.gguf")
        for name, tensor in exact.tensors.items():
            rounded = exact.kinds[name] == "F16"
            assert file.kinds[name] == (kind if rounded else "F32"), name
            assert np.abs(file.tensors[name] - tensor).max() <= (error * np.abs(tensor).max() if rounded else 0), name


# -- what goes wrong ----------------------------------------------------------------------------


def test_the_command_and_bad_input(
    models: dict[str, tuple[Any, Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(models["tiny"][2].with_name("tiny")), str(tmp_path / "out")

    def run(*options: str) -> tuple[int, str]:
        status = cli.main(["convert", source, out, *options])
        return status, capsys.readouterr().err

    assert "outtype: applies only to the layout gguf" in run("--to", "hf-llava", "--outtype", "f16")[1]
    assert "dtype: does not apply to the layout gguf" in run("--to", "gguf", "--dtype", "float16")[1]
    status, text = run("--to", "gguf", "--outtype", "q4_k_m")
    assert status == 2
    assert "'f16'" in text
    assert "q8_0" in text
    with pytest.raises(ConfigError, match=r"outtype: unknown .got 'f32', expected one of f16, q8_0, bf16"):
        export(source, out, to="gguf", outtype="f32")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert run("--to", "gguf", "--outtype", "bf16")[0] == 0
    assert sorted(path.name for path in Path(out).iterdir()) == ["mmproj-tiny-bf16.gguf", "tiny-bf16.gguf"]
    status, text = run("--to", "gguf")
    assert status == 2
    assert f"{out}: exists already. Fix: delete it, or give another folder." in text


def test_a_missing_package_is_named(
    models: dict[str, tuple[Any, Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    source = str(models["tiny"][2].with_name("tiny"))
    assert cli.main(["convert", source, str(tmp_path / "out"), "--to", "gguf"]) == 3
    assert "pip install 'llavar-peft[gguf]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_kept_of_an_incomplete_export(
    error: BaseException, models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        assert (tmp_path / ".out.part").is_dir()
        if done > total // 2:
            raise error

    with pytest.raises(LlavarError, match=r"interrupted|the disk is full") as caught:
        export(models["tiny"][2].with_name("tiny"), tmp_path / "out", to="gguf", progress=stop)
    assert caught.value.exit_code == (4 if isinstance(error, KeyboardInterrupt) else 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "words"), [(float("nan"), "1 of .* are NaN"), (1e5, "exceeds the range.*or outtype bf16")]
)
def test_numbers_that_a_file_cannot_hold_are_named(
    number: float, words: str, models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    shutil.copytree(models["tiny"][2].with_name("tiny"), tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged/model.safetensors")
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].float()
    weights[name][3, 4] = number
    save_file(weights, tmp_path / "damaged/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=words) as error:
        export(tmp_path / "damaged", tmp_path / "out", to="gguf")
    assert name in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_tokenizer_that_scores_cannot_express_is_rejected(
    models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    """Its merges make a piece from one pair, and text is split into another; by scores, every pair is joined."""
    source = shutil.copytree(models["tiny"][2].with_name("tiny"), tmp_path / "m")
    described = json.loads((source / "tokenizer.json").read_text())
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in described["model"]["merges"]]
    model = described["model"]
    model["vocab"]["gn"] = model["vocab"].pop("▁wrote")
    model["merges"] = [("▁si", "gn") if pair == ("▁sig", "n") else pair for pair in merges if pair != ("▁wrot", "e")]
    (source / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"m: llama\.cpp would split text into other tokens .*expected \["):
        export(source, tmp_path / "out", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_names_that_are_no_text_and_places_that_are_no_new_folder(
    models: dict[str, tuple[Any, Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(models["tiny"][2].with_name("tiny"), tmp_path / "m ü")
    before = sorted(source.rglob("*"))
    assert cli.main(["convert", str(source), str(source / "gguf"), "--to", "gguf"]) == 2
    assert "is in the folder that it is made from" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for out in (".", "/"):
        assert cli.main(["convert", str(source), out, "--to", "gguf"]) == 2
        assert f"error: {out}: exists already. Fix: " in capsys.readouterr().err
    export(source, tmp_path / "out", to="gguf", outtype="q8_0")
    assert GgufContents(tmp_path / "out/m ü-q8_0.gguf").fields["general.name"] == "m ü"
    assert sorted(source.rglob("*")) == before
    source = source.rename(tmp_path / os.fsdecode(b"m\xff"))
    with pytest.raises(ConfigError, match=r"its path is not UTF-8, .*Fix: rename the folder"):
        export(source, tmp_path / "again", to="gguf")


def test_a_tokenizer_with_more_tokens_than_rows_is_rejected(
    models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    source = shutil.copytree(models["tiny"][2].with_name("tiny"), tmp_path / "m")
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(str(source))
    for to in ("gguf", "hf-llava"):
        with pytest.raises(WeightsError, match="the tokenizer and the embeddings do not belong together"):
            export(source, tmp_path / "out", to=to)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_token_index", 5, r"config\.json:image_token_index: not the id of the tokenizer's <im_patch> .got 5, "),
        ("vision_feature_layer", -99, "vision_feature_layer: no such hidden state .got -99"),
    ],
)
def test_settings_that_contradict_the_files_are_rejected(
    key: str, value: int, message: str, models: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    """Such a model answered nonsense, and was exported as it is."""
    source = shutil.copytree(models["tiny"][2].with_name("tiny"), tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(LlavarError, match=message):
        export(source, tmp_path / "out", to="hf-llava")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "Text is answered rightly"), ("0.3.36", "0.3.36 is one of these"), ("0.4.0", "0.4.0 is newer")],
)
def test_the_engines_error_with_clip_is_stated(
    version: str | None,
    words: str,
    models: dict[str, tuple[Any, Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if version is not None:
        described = tmp_path / f"site/llama_cpp_python-{version}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(described.parent))
    export(models["tiny"][2].with_name("tiny"), tmp_path / "clip", to="gguf")
    assert "25814" in caplog.text
    assert words in caplog.text
    if version is None:
        caplog.clear()
        export(models["tiny_modern"][2].with_name("tiny_modern"), tmp_path / "siglip", to="gguf")
        assert "25814" not in caplog.text
