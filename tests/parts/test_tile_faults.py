"""Bad input around tiles is named, with the fix, before weights are loaded."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavar_peft import (
    DataConfig,
    Full,
    Lora,
    ModelConfig,
    OptimConfig,
    Recipe,
    Stage,
    build_model,
    cli,
    export,
    load_chat,
)
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.inference import engine
from llavar_peft.models import build_model as building
from llavar_peft.models.adapter_loading import load_adapter
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.merge_adapter import merge_adapter
from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.recipe.resolution import CrossAttention, Tiles
from llavar_peft.recipe.validate import validate_recipe
from llavar_peft.weights.adapter.adapter_report import describe_adapter, verify_adapter
from llavar_peft.weights.delta.delta_files import make_delta
from tests.parts.tiled_parts import draw_image, save_llama, save_llava_next, save_tuned
from tests.parts.tiny_parts import save_tower

TILES = Tiles(grid=((1, 2), (2, 1)))
LORA = Lora(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and an adapter, each with and without tiles."""
    root = tmp_path_factory.mktemp("faults")
    parts = ModelConfig(
        language_model=str(save_llama(root / "vicuna")), vision_tower=str(save_tower("clip_vision_model", root / "t"))
    )
    save_tuned(parts, Full(), root / "plain")
    save_tuned(dataclasses.replace(parts, resolution=TILES), Full(), root / "tiled")
    save_tuned(ModelConfig(checkpoint=str(root / "plain")), LORA, root / "plain_adapter")
    save_tuned(ModelConfig(checkpoint=str(root / "plain"), resolution=TILES), LORA, root / "tiled_adapter")
    # The same weights as those that the plain adapter was trained on, and tiles.
    model, processor = build_model(ModelConfig(checkpoint=str(root / "plain"), resolution=TILES))
    model.save_pretrained(root / "plain_with_tiles")
    processor.save_pretrained(root / "plain_with_tiles")
    save_llava_next(root / "stock")
    return root


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "check_stored_values", lambda *_, **__: pytest.fail("the weights are read"))


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("resolution", "words"),
    [
        (Tiles(grid=(0, 2)), r"model\.resolution: .*expected \(rows, columns\)"),  # type: ignore[arg-type]
        (Tiles(grid=((2, 2), (1,))), r"model\.resolution: .*expected \(rows, columns\)"),  # type: ignore[arg-type]
        (Tiles(grid=(9, 9)), r"model\.resolution: .*at most 64 tiles"),  # type: ignore[arg-type]
        (Tiles(grid=((1, 1),) * 301), r"model\.resolution: .*at most 300 grids"),
        (Tiles(max_tiles=0), r"model\.resolution: .*max_tiles"),
        (Tiles(pool=3), r"model\.resolution: .*pool"),  # type: ignore[arg-type]
        (Tiles(max_image_tokens=0), r"model\.resolution: .*max_image_tokens"),
        ("tiles", r"model\.resolution: .*'tiles'.*Fix: write for example Tiles"),
        (Tiles(max_image_tokens=35), r"max_image_tokens: .*got 35, expected at least 36.*Fix: set it to 36"),
        (Tiles(grid=(2, 2), max_image_tokens=60), r"got 60, expected at least 88"),  # type: ignore[arg-type]
        (Tiles(grid=(2, 2), pool=2, max_image_tokens=23), r"got 23, expected at least 24"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_settings_that_no_model_can_have_are_named(resolution: Any, words: str, root: Path) -> None:
    config = ModelConfig(checkpoint=str(root / "plain"), resolution=resolution)
    for use in (build_model, lambda one: estimate_stage(one, _stage())):
        with pytest.raises(ConfigError, match=words):
            use(config)


def _stage(**settings: Any) -> Stage:
    return Stage(
        name="one", data=settings.pop("data", DataConfig(records="x")), optim=OptimConfig(learning_rate=1e-3),
        global_batch_size=2, micro_batch_size=1, **settings,
    )  # fmt: skip


def test_a_limit_that_just_fits_is_accepted(root: Path) -> None:
    config = ModelConfig(checkpoint=str(root / "plain"), resolution=Tiles(max_tiles=4, max_image_tokens=36))
    _, processor = build_model(config)
    inputs = processor(images=draw_image(56, 56), text="<image>", return_tensors="pt")
    assert inputs["image_layouts"].tolist() == [[1, 1, 4, 4]]


@pytest.mark.parametrize("use", ["load_chat", "load_adapter", "merge", "verify", "delta"])
def test_an_adapter_of_a_model_without_tiles_is_rejected_by_one_with_them(
    use: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "build_model", lambda *_, **__: pytest.fail("the weights are loaded"))
    base, adapter = root / "plain_with_tiles", root / "plain_adapter"
    uses: dict[str, Callable[[], object]] = {
        "load_chat": lambda: load_chat(base, adapter),
        "load_adapter": lambda: load_adapter(base, adapter),
        "merge": lambda: merge_adapter(base, adapter, tmp_path / "merged"),
        "verify": lambda: verify_adapter(adapter, base=base),
        "delta": lambda: make_delta(root / "vicuna", base, tmp_path / "delta", adapter=adapter),
    }
    words = (
        "plain_adapter: the adapter was trained on a model that reads the whole image only, and this one reads tiles"
    )
    with pytest.raises(LlavarError, match=f"{words}.*Fix: give the base that it was trained on"):
        uses[use]()
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_tiles_on_a_built_model_without_is_named(root: Path) -> None:
    model, _ = build_model(ModelConfig(checkpoint=str(root / "plain")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"that reads tiles, and this one reads the whole image only.*base\.json"):
        load_adapter(model, root / "tiled_adapter")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    settings = json.loads((root / "tiled_adapter" / "base.json").read_text())["resolution"]
    assert settings.pop("type") == "tiles"
    model, _ = build_model(ModelConfig(checkpoint=str(root / "plain"), resolution=Tiles(**settings)))
    load_adapter(model, root / "tiled_adapter")


def test_the_description_of_an_adapter_says_that_it_has_tiles(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("tiled_adapter", True), ("plain_adapter", False)):
        assert cli.main(["adapter", "show", str(root / name)]) == 0
        assert (f"{root / 'plain'}, with tiles" in capsys.readouterr().out) == expected


def test_adapters_with_different_tiles_are_not_loaded_together(root: Path, tmp_path: Path) -> None:
    other = ModelConfig(checkpoint=str(root / "plain"), resolution=Tiles(grid=((2, 2),)))
    save_tuned(other, LORA, tmp_path / "other")
    with pytest.raises(ConfigError, match="were trained with different resolutions"):
        load_chat(root / "plain", {"a": root / "tiled_adapter", "b": tmp_path / "other"})


@pytest.mark.parametrize("layout", ["tiled", "stock", "original"])
def test_a_missing_newline_is_named(layout: str, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / layout
    if layout == "original":
        export(root / "tiled", folder, to="original", tokenizer=root / "vicuna", form="safetensors")
    else:
        _copy(root / layout, folder)
    (folder / "weights_checksums.json").unlink(missing_ok=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: one for name, one in tensors.items() if not name.endswith("image_newline")}, file)
    tower = str(root / "t") if layout == "original" else None
    words = r"model\.multi_modal_projector\.image_newline is missing.*Fix: download or copy the weights again"
    with pytest.raises(LlavarError, match=f"{re.escape(str(folder))}: {words}"):
        build_model(ModelConfig(checkpoint=str(folder), vision_tower=tower))
    # Nor is it drawn where the same resolution is set.
    with pytest.raises(LlavarError, match=words):
        build_model(ModelConfig(checkpoint=str(folder), vision_tower=tower, resolution=TILES))
    if layout == "tiled":  # the fix
        for name in ("config.json", "processor_config.json"):
            _change(folder / name, resolution=None)
        build_model(ModelConfig(checkpoint=str(folder), resolution=TILES))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "damaged", ["tiles", 3, [], {"type": "x"}, {}, {"type": "tiles", "grid": [[0, 1]]}, {"type": "tiles", "pool": 7}]
)
def test_a_damaged_resolution_is_named(file: str, damaged: Any, root: Path, tmp_path: Path) -> None:
    folder = _copy(root / "tiled", tmp_path / "model")
    _change(folder / file, resolution=damaged)
    for use in (build_model, config_without_weights) if file == "config.json" else (build_model,):
        with pytest.raises(ConfigError, match=rf"{file}.*resolution") as error:
            use(ModelConfig(checkpoint=str(folder)))
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("damaged", ["tiles", 3, {"type": "x"}, {"type": "tiles", "grid": [[0, 1]]}])
def test_a_damaged_resolution_of_an_adapter_is_named(damaged: Any, root: Path, tmp_path: Path) -> None:
    adapter = _copy(root / "tiled_adapter", tmp_path / "adapter")
    _change(adapter / "config.json", resolution=damaged)
    where = re.escape(str(adapter / "config.json"))
    with pytest.raises(ConfigError, match=f"{where}:resolution"):
        load_chat(root / "plain", adapter)
    if not isinstance(damaged, dict) or damaged["type"] == "x":
        with pytest.raises(ConfigError, match=f"{where}:resolution"):
            describe_adapter(adapter)


@pytest.mark.usefixtures("no_weights")
def test_images_that_keep_their_shape_have_no_tiles(root: Path, tmp_path: Path) -> None:
    parts = {"language_model": str(root / "vicuna"), "vision_tower": str(root / "t")}
    with pytest.raises(ConfigError, match=r"model\.resolution: .*got image_mode 'keep'.*Fix: set model\.image_mode"):
        build_model(ModelConfig(**parts, image_mode="keep", resolution=TILES))
    folder = _copy(root / "plain", tmp_path / "model")
    _change(folder / "processor_config.json", image_mode="keep")
    with pytest.raises(ConfigError, match=r"model\.resolution: .*got image_mode 'keep'"):
        build_model(ModelConfig(checkpoint=str(folder), resolution=TILES))
    for model, data in (
        (ModelConfig(**parts, image_mode="keep", resolution=TILES), DataConfig(records="x")),
        (ModelConfig(**parts, resolution=TILES), DataConfig(records="x", image_mode="keep")),
    ):
        with pytest.raises(ConfigError, match="image_mode: keep has no images of one size"):
            validate_recipe(Recipe(model=model, stages=(_stage(data=data),), output_dir="x"))


def test_keep_in_a_question_is_named(root: Path) -> None:
    _, processor = build_model(ModelConfig(checkpoint=str(root / "tiled")))
    with pytest.raises(ConfigError, match="image_mode: keep is for models without a resolution"):
        processor(images=draw_image(56, 56), text="<image>", image_mode="keep")


def test_a_question_needs_the_number_of_its_image_tokens(root: Path) -> None:
    _, processor = build_model(ModelConfig(checkpoint=str(root / "tiled")))
    with pytest.raises(LlavarError, match="num_image_tokens is missing, and with tiles it depends on the image"):
        processor.encode_question("What?")
    assert len(processor.encode_question("What?", image=False))
    assert int((processor.encode_question("What?", num_image_tokens=7) == processor.image_token_id).sum()) == 7


def test_a_new_newline_has_to_be_trained(root: Path) -> None:
    model = ModelConfig(checkpoint="x", resolution=TILES)
    frozen = _stage(tune=dataclasses.replace(LORA, train_projector=False))
    with pytest.raises(ConfigError, match=r"train_projector: false, and the embedding that tiles add"):
        validate_recipe(Recipe(model=model, stages=(frozen,), output_dir="x"))
    first = dataclasses.replace(_stage(tune=LORA), name="first")
    validate_recipe(Recipe(model=model, stages=(first, frozen), output_dir="x"))
    validate_recipe(Recipe(model=dataclasses.replace(model, resolution=None), stages=(frozen,), output_dir="x"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"image_grid_pinpoints": [[56, 100]]}, r"pinpoints: .*got \[56, 100\].*multiples of 56"),
        ("config.json", {"image_grid_pinpoints": [[0, 56]]}, r"image_grid_pinpoints: .*got \[0, 56\]"),
        ("config.json", {"image_grid_pinpoints": [[5600, 5600]]}, r"image_grid_pinpoints: .*at most 64 tiles"),
        ("config.json", {"image_grid_pinpoints": [[56]]}, r"image_grid_pinpoints"),
        ("config.json", {"image_grid_pinpoints": [[56, 56]] * 9999}, r"image_grid_pinpoints: too many .*got 9999"),
    ],
)  # fmt: skip
def test_sizes_of_a_stock_model_that_are_no_tiles_are_named(
    file: str, changes: dict[str, Any], words: str, root: Path, tmp_path: Path
) -> None:
    folder = _copy(root / "stock", tmp_path / "stock")
    _change(folder / file, **changes)
    for use in (build_model, config_without_weights):
        with pytest.raises(ConfigError, match=words):
            use(ModelConfig(checkpoint=str(folder)))


def test_a_stock_model_that_resizes_its_tiles_is_named(root: Path, tmp_path: Path) -> None:
    folder = _copy(root / "stock", tmp_path / "stock")
    path = folder / "processor_config.json"
    described = json.loads(path.read_text())
    described["image_processor"]["size"] = {"shortest_edge": 70}
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"size: not the size of a tile .*70.*expected 56"):
        build_model(ModelConfig(checkpoint=str(folder)))


@pytest.mark.parametrize("to", ["hf-llava", "original"])
def test_what_a_layout_cannot_express_of_a_resolution_is_named(to: Any, root: Path, tmp_path: Path) -> None:
    config = ModelConfig(checkpoint=str(root / "plain"), resolution=Tiles(pool=2))
    save_tuned(config, Full(), tmp_path / "pooled")
    with pytest.raises(ConfigError, match="pool"):
        export(tmp_path / "pooled", tmp_path / "out", to=to)
    export(tmp_path / "pooled", tmp_path / "llavar", to="llavar")


def test_another_kind_of_resolution_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"not that of the checkpoint .got 'cross_attention', expected 'tiles'"):
        build_model(ModelConfig(checkpoint=str(root / "tiled"), resolution=CrossAttention()))
