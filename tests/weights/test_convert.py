"""A LLaVAR in three layouts: conversions are bit-equal, and stock transformers gives the same answers."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llavar_peft import ModelConfig, build_model, cli, export
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.errors import ConfigError, LlavarError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.engine_support import rotary_fields_of_4
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import to_one_layer, to_two_layers
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_wide_model

LAYOUTS = ("llavar", "original", "hf-llava")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model, fp16, in each layout."""
    root = tmp_path_factory.mktemp("layouts")
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float16")
    model, processor = build_model(parts)
    model.save_pretrained(root / "llavar")
    processor.save_pretrained(root / "llavar")
    for layout in LAYOUTS[1:]:
        export(root / "llavar", root / layout, to=layout)  # type: ignore[arg-type]
    return {layout: root / layout for layout in LAYOUTS}


def _tower(layout: str) -> Path | None:
    return VISION_TOWER if layout == "original" else None


@pytest.mark.slow
@pytest.mark.parametrize(("start", "end"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_conversions_are_bit_equal(start: str, end: str, layouts: dict[str, Path], tmp_path: Path) -> None:
    export(layouts[start], tmp_path / "out", to=end, vision_tower=_tower(start))  # type: ignore[arg-type]
    expected, got = open_weights(layouts[end]), open_weights(tmp_path / "out")
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype
        assert torch.equal(tensor, got[name]), name
    ids = torch.tensor([[1, 40, 41, 861, *[860] * 144, 862, 43]])
    pixels = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (layouts["llavar"], tmp_path / "out"):
        chat = load_chat(folder, vision_tower=str(VISION_TOWER) if end == "original" else None, dtype="float32")
        with torch.no_grad():
            logits.append(chat.engine.model(input_ids=ids, pixel_values=pixels).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("layout", ["llavar", "original"])
def test_an_export_warns_if_images_are_prepared_differently(
    layout: str, layouts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The released layout prepares images with black padding on one side, which stock LLaVA does not support."""
    export(layouts[layout], tmp_path / "out", to="hf-llava", vision_tower=_tower(layout))
    assert ("stock LLaVA does not support the mode pad_black" in caplog.text) == (layout == "original")


_PLAIN = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="_."), min_size=1, max_size=20)


@given(
    _PLAIN, st.sampled_from(["model.language_model.", "model.vision_tower.", "lm_head.", tensor_names.STOCK_PROJECTOR])
)
def test_stock_names_can_be_converted_back(rest: str, stem: str) -> None:
    name = stem + rest
    if "inv_freq" not in name and "position_ids" not in name and not rest.startswith("vision_model."):
        assert tensor_names.from_stock(tensor_names.to_stock(name)) == name
        assert tensor_names.from_stock(name) == name  # the names of the modules of transformers 5


# -- stock transformers -------------------------------------------------------------------------

_STOCK_SCRIPT = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline
folder, path, question = sys.argv[1:4]
image = Image.open(path)
processor = AutoProcessor.from_pretrained(folder)
model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32", output_loading_info=True)
message = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image", "image": image}]}]
batch = processor.apply_chat_template(
    message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1]:]
    logits = model(**batch).logits[0, -1]
reader = pipeline("image-text-to-text", model=model, processor=processor)
text = reader(text=message, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
assert "llavar_peft" not in sys.modules
print(json.dumps({
    "type": type(processor).__name__, "info": {k: sorted(v) for k, v in info.items() if v},
    "ids": batch["input_ids"][0].tolist(), "pixels": batch["pixel_values"].double().sum().item(),
    "answer": answer.tolist(), "text": text, "logits": logits.tolist()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linear", "two-sided"])
def test_stock_transformers_gives_the_same_answers(form: str, layouts: dict[str, Path], tmp_path: Path) -> None:
    source = layouts["llavar"]
    if form == "two-sided":
        source = save_wide_model(tmp_path / "wide")
    folder = tmp_path / "stock"
    export(source, folder, to="hf-llava", projector=form, dtype="float32")  # type: ignore[arg-type]
    image = draw_page(SynthSettings(style="plain", kinds=("signs",), seed=3), 1).image
    image.save(tmp_path / "sign.png")
    question = "What does the sign say?"
    done = subprocess.run(
        [sys.executable, "-c", _STOCK_SCRIPT, str(folder), str(tmp_path / "sign.png"), question],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["type"], result["info"]) == ("LlavaProcessor", {})
    chat = load_chat(source, dtype="float32")
    ids = chat.engine.processor.encode_question(question)
    pixels = prepare_image(image, "pad", chat.engine.processor)[None]
    assert result["ids"] == ids[0].tolist()
    assert result["pixels"] == pytest.approx(float(pixels.double().sum()), abs=1e-3)
    with torch.no_grad():
        answer = chat.engine.model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )[0, ids.shape[1] :]
        logits = chat.engine.model(input_ids=ids, pixel_values=pixels).logits[0, -1]
    assert result["answer"] == answer.tolist()
    assert torch.allclose(torch.tensor(result["logits"]), logits, atol=1e-5)
    tokenizer = chat.engine.processor.tokenizer
    assert result["text"].strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_the_export_has_the_fields_of_transformers_4(layouts: dict[str, Path]) -> None:
    tokenizer, config = (
        json.loads((layouts["hf-llava"] / f"{name}config.json").read_text()) for name in ("tokenizer_", "")
    )
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    images, processor = (
        json.loads((layouts["hf-llava"] / name).read_text())
        for name in ("preprocessor_config.json", "processor_config.json")
    )
    assert "image_processor" not in processor
    assert images["image_processor_type"] == "LlavaImageProcessor"
    assert images["processor_class"] == processor["processor_class"] == "LlavaProcessor"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
    ],
)
def test_rotary_fields_of_both_versions_say_the_same(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rotary_fields_of_4({"rope_parameters": settings}) == expected
    if "rope_theta" in settings:
        both = LlamaConfig.from_dict({"rope_parameters": dict(settings), **expected})
        assert both.rope_parameters == settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["linear", "two-sided"])
def test_two_layers_are_equal_to_one(form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((40, 16), (40,), (9, 16)))
    layers = to_two_layers(weight, bias, form)  # type: ignore[arg-type]
    first, second = (
        [layers[f"{tensor_names.STOCK_PROJECTOR}{number}.{part}"] for part in ("weight", "bias")] for number in (1, 2)
    )
    middle = torch.nn.functional.linear(x, *first)
    got = torch.nn.functional.linear(middle.relu() if form == "two-sided" else middle, *second)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.allclose(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    back = to_one_layer(layers, "relu" if form == "two-sided" else "linear", "here")
    assert torch.equal(back[0], weight)
    assert torch.equal(back[1], bias)


# -- errors ----------------------------------------------------------------------------


def test_two_sided_requires_a_wide_language_model(layouts: dict[str, Path], tmp_path: Path) -> None:
    words = (
        r"twice as wide as the tower \(got 128 and 192\).*Fix: use the form 'linear', and start vLLM with .*Identity"
    )
    with pytest.raises(ConfigError, match=words):
        export(layouts["llavar"], tmp_path / "out", to="hf-llava", projector="two-sided")
    assert not (tmp_path / "out").exists()


def test_other_llavas_are_rejected(layouts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(layouts["hf-llava"], tmp_path / "mlp")
    config = json.loads((tmp_path / "mlp/config.json").read_text())
    for key, value, message in (
        ("projector_hidden_act", "silu", "not one linear map"),
        ("image_token_index", 5, "is not the id of an image token .*<im_patch>"),
    ):
        (tmp_path / "mlp/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(LlavarError, match=message):
            export(tmp_path / "mlp", tmp_path / "out", to="llavar")
    (tmp_path / "mlp/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "mlp/model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"][3, 4] = 0.5
    save_file(tensors, tmp_path / "mlp/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "mlp/weights_checksums.json").unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="not one linear map"):
        export(tmp_path / "mlp", tmp_path / "out", to="llavar")
    assert not (tmp_path / "out").exists()


def test_damage_is_reported(layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lm_head.weight"
    for damage, message in (("nan", "NaN"), ("cut", "model.safetensors"), ("lost", name), ("shape", name)):
        folder = tmp_path / damage
        shutil.copytree(layouts["llavar"], folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            if damage == "nan":
                tensors[name][3, 4] = torch.nan
            elif damage == "lost":
                del tensors[name]
            else:
                tensors[name] = tensors[name][:, :-1].contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
        assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf-llava"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.part").exists()


def test_command(layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(layouts["original"]), str(tmp_path / "out")
    assert cli.main(["convert", source, out, "--to", "llavar"]) == 2
    assert "--vision-tower" in capsys.readouterr().err
    tower = ["--vision-tower", str(VISION_TOWER)]
    assert (
        cli.main(["convert", source, out, "--to", "llavar", "--dtype", "bfloat16", "--shard-gb", "0.002", *tower]) == 0
    )
    assert {tensor.dtype for tensor in open_weights(out).values()} == {torch.bfloat16}
    assert len(list(Path(out).glob("model-*.safetensors"))) > 1
    assert json.loads(Path(out, "config.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(["convert", source, out, "--to", "llavar", *tower]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_original_needs_its_tokenizer(
    layouts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(layouts["llavar"], tmp_path / "without", to="original")
    assert "no tokenizer.model" in caplog.text
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/tokenizer.model").write_bytes(b"LLaMA's")
    export(layouts["llavar"], tmp_path / "with", to="original", tokenizer=tmp_path / "llama")
    assert (tmp_path / "with/tokenizer.model").read_bytes() == b"LLaMA's"
    assert json.loads((tmp_path / "with/added_tokens.json").read_text())["<im_patch>"] == 860


def test_a_stock_llava_saved_by_transformers_is_read(layouts: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 saves tensors by other names than those on the hub."""
    stock = LlavaForConditionalGeneration.from_pretrained(layouts["hf-llava"])
    shutil.copytree(layouts["hf-llava"], tmp_path / "again")
    (tmp_path / "again/model.safetensors").unlink()
    (tmp_path / "again/weights_checksums.json").unlink()
    stock.save_pretrained(tmp_path / "again")
    assert isinstance(stock.config, LlavaConfig)
    export(tmp_path / "again", tmp_path / "ours", to="llavar")
    expected = open_weights(layouts["llavar"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_weights(tmp_path / "ours").items())


def test_images_are_prepared_as_in_training(layouts: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    stock = AutoProcessor.from_pretrained(layouts["hf-llava"])
    ours = load_chat(layouts["llavar"]).engine.processor
    for size in ((300, 200), (200, 300), (90, 90), (640, 333), (50, 49)):
        image = Image.effect_noise(size, 90).convert("RGB")
        got = stock.image_processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(got, prepare_image(image, "pad", ours))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "llava"}, r"to: unknown layout .got 'llava', expected one of 'llavar', "),
        ({"to": "hf-llava", "projector": "two_sided"}, "projector: unknown value .got 'two_sided'"),
        ({"to": "original", "form": "zip"}, "form: unknown value .got 'zip'"),
        ({"to": "llavar", "dtype": "int8"}, r"dtype: not a dtype of weights .got 'int8', expected one of float16, "),
        ({"to": "original", "projector": "two-sided"}, "projector: applies only to the layout hf-llava"),
        ({"to": "gguf", "tokenizer": "llama"}, "tokenizer: applies only to the layout original"),
        ({"to": "llavar", "base": "llama"}, "base: applies only to the conversion into an adapter"),
        ({"to": "adapter", "dtype": "float16"}, "dtype: does not apply to the layout adapter"),
        ({"to": "gguf", "form": "bin"}, "form: does not apply to the layout gguf"),
    ],
)
def test_options_of_other_layouts_are_rejected_before_anything_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}.*Fix: "):
        export(tmp_path / "nowhere", tmp_path / "out", **options)
