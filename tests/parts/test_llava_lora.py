"""LoRA folders of LLaVA's own code: converted into adapters whose logits are those of LLaVA's merge."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llavar_peft import ModelConfig, build_model, cli, export, merge_adapter
from llavar_peft.errors import LlavarError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.weights.adapter.adapter_report import verify_adapter
from llavar_peft.weights.io import tensor_names
from tests.parts.test_flat_layout import LLAVA
from tests.parts.tiled_parts import logits_of_two_images

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization" / "small"
RANK, ALPHA, LAYERS = 4, 8, 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
# As peft 0.4 wrote it for liuhaotian/llava-v1.5-7b-lora.
SETTINGS = {
    "auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layers_pattern": None, "layers_to_transform": None, "lora_alpha": ALPHA, "lora_dropout": 0.05,
    "modules_to_save": None, "peft_type": "LORA", "r": RANK, "revision": None, "target_modules": list(TARGETS),
    "task_type": "CAUSAL_LM",
}  # fmt: skip
Folder = Callable[[str], str]


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vicuna")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(load_tokenizer(GOLDEN)), pad_token_id=0)).save_pretrained(
        folder
    )
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return folder


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def _save_lora(folder: Path, base: Path, tower: str, *, form: str = "bin", prefix: str = PREFIX + "model.") -> Path:
    """Write the files of LLaVA's train_mem.py, with an adapter for each linear layer of the decoder."""
    folder.mkdir(parents=True)
    shapes = {
        name.removesuffix(".weight"): one.shape
        for name, one in LlamaForCausalLM.from_pretrained(base).state_dict().items()
        if "_proj." in name
    }
    tensors = {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _draw(RANK, columns, seed=2 * number)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _draw(rows, RANK, seed=2 * number + 1)
    if form == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    projector = {f"{prefix}mm_projector.{name}": one for name, one in _projector().items()}
    torch.save(projector, folder / "non_lora_trainables.bin")
    config = json.loads((base / "config.json").read_text())
    llava = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps({**config, **LLAVA, **llava}))
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, "base_model_name_or_path": str(base)}))
    return folder


def _projector() -> dict[str, Tensor]:
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {name: _draw(*shape, seed=100 + number) for number, (name, shape) in enumerate(shapes.items())}


def _merge_by_hand(lora: Path, base: Path, tower: str, image_token: int) -> LlavaForConditionalGeneration:
    """Merge as LLaVA, llava/model/builder.py, does: base + B A alpha / r, and then the other trained tensors."""
    stored = torch.load(lora / "adapter_model.bin", weights_only=True)
    language = LlamaForCausalLM.from_pretrained(base)
    state = language.state_dict()
    for name in state:
        a = f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight"
        if a in stored:
            state[name] += ALPHA / RANK * stored[a.replace("lora_A", "lora_B")] @ stored[a]
    vision = CLIPVisionModel.from_pretrained(tower)
    config = LlavaConfig(text_config=language.config, vision_config=vision.config, image_token_index=image_token)
    made = LlavaForConditionalGeneration(config).eval()
    made.model.language_model.load_state_dict(
        {n.removeprefix("model."): t for n, t in state.items() if "lm_head" not in n}
    )
    made.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    made.model.vision_tower.load_state_dict(vision.state_dict())
    layers = {"0": "linear_1", "2": "linear_2"}
    projector = {f"{layers[name[0]]}{name[1:]}": one for name, one in _projector().items()}
    made.model.multi_modal_projector.load_state_dict(projector)
    made.resize_token_embeddings(image_token + 1)
    return made


@pytest.mark.parametrize(("form", "prefix"), [("bin", PREFIX + "model."), ("safetensors", "model.")])
def test_the_adapter_has_the_logits_of_llavas_merge(
    form: str, prefix: str, vicuna: Path, tower: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tower("clip_vision_model")
    lora = _save_lora(tmp_path / "lora", vicuna, clip, form=form, prefix=prefix)
    out = tmp_path / "adapter"
    arguments = [] if form == "bin" else ["--base", str(vicuna), "--vision-tower", clip]
    assert cli.main(["convert", str(lora), str(out), "--to", "adapter", *arguments]) == 0
    assert not list(out.glob("*.bin"))
    assert verify_adapter(out, base=vicuna).base == "fingerprint"
    chat = load_chat(out, dtype="float32")
    processor = chat.engine.processor
    assert (processor.template, processor.image_mode) == ("vicuna_v1", "pad")
    inputs = {
        "input_ids": processor.encode_question("What is written?"),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
    }
    _save_lora(tmp_path / "known", vicuna, clip)
    by_hand = _merge_by_hand(tmp_path / "known", vicuna, clip, processor.image_token_id)
    merge_adapter(vicuna, out, tmp_path / "merged", dtype="float32")
    merged, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "merged"), dtype="float32"))
    with torch.no_grad():
        expected = by_hand(**inputs).logits[..., :-1]
        assert not torch.allclose(
            LlamaForCausalLM.from_pretrained(vicuna)(inputs["input_ids"][:, :5]).logits, expected[:, :5], atol=1e-3
        )
        for model in (chat.engine.model, merged):
            assert torch.allclose(model(**inputs).logits[..., :-1], expected, atol=1e-5)


GRIDS = [[112, 56], [56, 112]]  # (width, height), as LLaVA's code has them
TILED = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": GRIDS}
NEWLINE = f"{PREFIX}model.image_newline"


def test_a_lora_with_tiles_has_the_logits_of_its_weights(vicuna: Path, tower: Folder, tmp_path: Path) -> None:
    """With a newline of its own, on a language model; and without, on a base that has one."""
    clip = tower("clip_vision_model")
    lora = _save_lora(tmp_path / "lora", vicuna, clip)
    _config(**TILED)(lora)
    with pytest.raises(LlavarError, match=r"has no model\.image_newline; neither has its base"):
        export(lora, tmp_path / "no", to="adapter")
    stored = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    torch.save({**stored, NEWLINE: _draw(32, seed=7)}, lora / "non_lora_trainables.bin")
    export(lora, tmp_path / "adapter", to="adapter")
    assert verify_adapter(tmp_path / "adapter", base=vicuna).base == "fingerprint"
    engine = load_chat(tmp_path / "adapter", dtype="float32").engine
    assert engine.processor.tile_geometry.grids == ((1, 2), (2, 1))  # (rows, columns) of tiles of 56 pixels
    assert torch.equal(engine.base_model.model.multi_modal_projector.image_newline, _draw(32, seed=7))
    found = logits_of_two_images(engine.model, engine.processor)

    merge_adapter(vicuna, tmp_path / "adapter", tmp_path / "merged", dtype="float32", vision_tower=clip)
    merged = ModelConfig(checkpoint=str(tmp_path / "merged"), dtype="float32")
    torch.testing.assert_close(logits_of_two_images(*build_model(merged)), found, atol=1e-5, rtol=1e-5)

    torch.save(stored, lora / "non_lora_trainables.bin")
    export(lora, tmp_path / "again", to="adapter", base=tmp_path / "merged")
    again = load_chat(tmp_path / "again", dtype="float32").engine
    assert torch.equal(again.base_model.model.multi_modal_projector.image_newline, _draw(32, seed=7))
    plain = _save_lora(tmp_path / "plain", vicuna, clip)
    with pytest.raises(LlavarError, match=r"trained on the whole image only, and its base .* has the resolution tiles"):
        export(plain, tmp_path / "no", to="adapter", base=tmp_path / "merged")


def test_other_commands_suggest_the_conversion_and_it_works(
    vicuna: Path, tower: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = str(_save_lora(tmp_path / "my lora", vicuna, tower("clip_vision_model")))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    commands = (
        ["ask", "--model", lora, "--image", "a.png", "What?"],
        ["merge", "--base", str(vicuna), "--adapter", lora, "--out", "out"],
        ["delta", "make", "--base", str(vicuna), "--target", str(vicuna), "--adapter", lora, "--out", "out"],
        ["convert", lora, "out", "--to", "hf-llava"],
    )
    for command in commands:
        assert cli.main(command) == 2, command
        said = capsys.readouterr().err
        suggested = re.search(r"`(llavar-peft convert .* --to adapter[^`]*)`", said.replace("\n", " "))
        assert suggested is not None, said
        assert not Path("out").exists()
        assert cli.main(shlex.split(suggested[1])[1:]) == 0, suggested[1]
        capsys.readouterr()
        assert verify_adapter("my lora-adapter", base=vicuna).base == "fingerprint"
        shutil.rmtree("my lora-adapter")
    assert cli.main(["adapter", "show", lora]) == 0


def _no_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _trained_rows(folder: Path) -> None:
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    stored[f"{PREFIX}model.embed_tokens.weight"] = torch.zeros(640, 32)
    torch.save(stored, folder / "non_lora_trainables.bin")


def _no_projector(folder: Path) -> None:
    torch.save({}, folder / "non_lora_trainables.bin")


def _other_base(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    changed = {**settings, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(changed))


def _code_in_pickle(folder: Path) -> None:
    torch.save({"x": LlamaConfig()}, folder / "non_lora_trainables.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_file("config.json"), "config.json"),
        (_no_file("adapter_model.bin"), "no adapter_model"),
        (_config(mm_use_im_start_end=True), "trained with image tokens"),
        (_config(image_aspect_ratio="anyres"), "mm_patch_merge_type: not supported"),
        (_config(mm_projector_type="linear"), "multi_modal_projector"),
        (_config(model_type="llama"), "not the configuration of a LLaVA"),
        (_trained_rows, "besides the projector were trained in full"),
        (_no_projector, "it has no projector, and neither has its base"),
        (_other_base, "the LoRA's files name a folder that cannot be used.*--base"),
        (_code_in_pickle, "non_lora_trainables.bin"),
    ],
)
def test_what_cannot_be_converted_is_named(
    damage: Callable[[Path], None], words: str, vicuna: Path, tower: Folder, tmp_path: Path
) -> None:
    lora = _save_lora(tmp_path / "lora", vicuna, tower("clip_vision_model"))
    damage(lora)
    with pytest.raises(LlavarError, match=words) as error:
        export(lora, tmp_path / "out", to="adapter")
    assert "Fix:" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_an_adapter_of_this_package_needs_no_conversion(vicuna: Path, tower: Folder, tmp_path: Path) -> None:
    lora = _save_lora(tmp_path / "lora", vicuna, tower("clip_vision_model"))
    export(lora, tmp_path / "adapter", to="adapter")
    with pytest.raises(LlavarError, match="not a LoRA of LLaVA's code"):
        export(tmp_path / "adapter", tmp_path / "out", to="adapter")
    names = json.loads((tmp_path / "adapter" / "weights_checksums.json").read_text())
    assert {name for name in names if "projector" in name} == {
        PREFIX + name for name in tensor_names.projector_names("gelu")
    }
