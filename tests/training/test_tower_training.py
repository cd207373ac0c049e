"""Runs that train the vision tower: what follows uses their result, and never the original tower."""

from __future__ import annotations

import dataclasses
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavar_peft import (
    DataConfig,
    Full,
    Lora,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Recipe,
    Stage,
    Trainer,
    build_model,
    export,
    load_adapter,
    make_delta,
    merge_adapter,
)
from llavar_peft.errors import ConfigError, InterruptedRunError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.tuning import trained_names
from llavar_peft.recipe.schema import Tune
from llavar_peft.weights.adapter.adapter_report import describe_adapter, verify_adapter
from llavar_peft.weights.adapter.model_hash import identify_model
from tests.training.test_resume import SignalAt

TOWER = "model.vision_tower."
FULL, LORA = Full(train_tower=True), Lora(rank=4, alpha=8, dropout=0.0, tower_rank=2)


def _recipe(model: ModelConfig, data: Path, out: Path, *tunes: Tune, steps: int = 2, **optim: Any) -> Recipe:
    config = DataConfig(records=str(data / "records.json"), images=str(data / "images"), holdout=2, workers=0)
    stages = tuple(
        Stage(
            name=f"stage{number}",
            data=config,
            tune=tune,
            optim=OptimConfig(learning_rate=1e-3, **optim),
            max_steps=steps,
            global_batch_size=4,
            micro_batch_size=2,
            max_length=512,
            precision="fp32",
            probe=ProbeConfig(images=1, max_new_tokens=2),
        )
        for number, tune in enumerate(tunes)
    )
    return Recipe(model=model, stages=stages, output_dir=str(out), seed=3)


def _train(recipe: Recipe, *callbacks: Any) -> tuple[Trainer, Path]:
    trainer = Trainer(*build_model(recipe.model, seed=recipe.seed), recipe, callbacks=callbacks)
    return trainer, trainer.train()


def _logits(model: Any, processor: Any) -> Tensor:
    inputs = processor(images=Image.linear_gradient("L").convert("RGB"), text="<image>", return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model.eval()(
            input_ids=processor.encode_question("What is written?"), pixel_values=inputs["pixel_values"]
        ).logits
    return logits


def _tower(folder: Path | str) -> dict[str, Tensor]:
    stored = load_file(Path(folder) / "model.safetensors")
    return {name: tensor for name, tensor in stored.items() if name.startswith(TOWER)}


@dataclass(frozen=True)
class Runs:
    """A run that trained the tower in full, and one on its result that trained adapters.

    Attributes:
        parts: The parts of the first run.
        model: The first run's result.
        logits: Those of the first run's model after its last step.
        adapter: The second run's result.
        adapted: The logits of the second run's model.
        merged: The second run's result, merged.
    """

    parts: ModelConfig
    model: Path
    logits: Tensor
    adapter: Path
    adapted: Tensor
    merged: Path


@pytest.fixture(scope="module")
def runs(short_model: ModelConfig, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("towers")
    first, model = _train(_recipe(short_model, tiny_data, folder / "full", FULL))
    logits = _logits(first.model, first.processor)
    second, adapter = _train(_recipe(ModelConfig(checkpoint=str(model)), tiny_data, folder / "lora", LORA))
    merge_adapter(model, adapter, folder / "merged")
    return Runs(short_model, model, logits, adapter, _logits(second.model, second.processor), folder / "merged")


def _loaded(**source: Any) -> Tensor:
    return _logits(*build_model(ModelConfig(dtype="float32", **source)))


@pytest.mark.slow
def test_the_checkpoint_contains_the_trained_tower_and_is_loaded_with_it(runs: Runs) -> None:
    original = build_model(runs.parts)[0].model.vision_tower.state_dict()
    stored = _tower(runs.model)
    changed = {name for name, tensor in stored.items() if not torch.equal(tensor, original[name.removeprefix(TOWER)])}
    assert {name for name in stored if "encoder.layers.0" in name} < changed
    assert not any("encoder.layers.1" in name or "post_layernorm" in name for name in changed)  # not computed
    torch.testing.assert_close(_loaded(checkpoint=str(runs.model)), runs.logits)
    chat = load_chat(runs.model)
    torch.testing.assert_close(_logits(chat.engine.model, chat.engine.processor), runs.logits)


@pytest.mark.slow
def test_the_groups_have_their_rates_and_the_probe_sees_the_tower(runs: Runs) -> None:
    for run, expected in ((runs.model, {"language_model": 1.0, "projector": 1.0, "tower": 0.2}), (runs.adapter, {})):
        lines = [json.loads(line) for line in (run.parent / "stage0/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["learning_rate"]]
        shares = {
            name: rate / step["learning_rate"]
            for step in steps
            for name, rate in step.get("learning_rates", {}).items()
        }
        assert shares == pytest.approx(expected)
        before, after = [json.loads(line) for line in (run.parent / "stage0/probe.jsonl").read_text().splitlines()]
        assert before["held_out_loss"] != after["held_out_loss"]


@pytest.mark.slow
def test_the_adapter_opens_everywhere_with_the_tower(runs: Runs) -> None:
    model, processor = build_model(ModelConfig(checkpoint=str(runs.model), dtype="float32"))
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(model, str(runs.adapter)), processor), runs.adapted)
    torch.testing.assert_close(_logits(load_adapter(str(runs.model), runs.adapter), processor), runs.adapted)
    chat = load_chat(runs.adapter)
    torch.testing.assert_close(_logits(chat.engine.model, processor), runs.adapted)
    report = describe_adapter(runs.adapter)
    assert (report.rank, report.tower_rank, report.target) == (4, 2, "all-linear")
    assert report.tower_fingerprint is not None
    names = {kind.name for kind in report.kinds}
    assert {"q_proj", "vision_tower q_proj", "vision_tower fc1"} <= names
    assert verify_adapter(runs.adapter, base=runs.model).base == "fingerprint"


@pytest.mark.slow
def test_a_merge_and_an_export_contain_the_merged_tower(runs: Runs, tmp_path: Path) -> None:
    torch.testing.assert_close(_loaded(checkpoint=str(runs.merged)), runs.adapted, atol=1e-4, rtol=1e-4)
    changed = [name for name, one in _tower(runs.merged).items() if not torch.equal(one, _tower(runs.model)[name])]
    assert len(changed) == 6
    assert all("encoder.layers.0" in name for name in changed)
    export(runs.merged, tmp_path / "stock", to="hf-llava")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype="float32")
    pixels = AutoProcessor.from_pretrained(tmp_path / "stock")(
        images=[Image.linear_gradient("L").convert("RGB")], text=["<im_patch>"], return_tensors="pt"
    )["pixel_values"]
    _, processor = build_model(ModelConfig(checkpoint=str(runs.merged)))
    with torch.no_grad():
        logits = stock(input_ids=processor.encode_question("What is written?"), pixel_values=pixels).logits
    torch.testing.assert_close(logits, runs.adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_layout_without_a_tower_cannot_hold_a_trained_one(runs: Runs, tmp_path: Path) -> None:
    stock, tower = tmp_path / "stock", str(runs.parts.vision_tower)
    export(runs.merged, stock, to="hf-llava")
    for source in (runs.model, runs.merged, stock):
        with pytest.raises(
            ConfigError, match=r"vision tower was trained, and the released layout has none.*Fix: publish"
        ):
            export(source, tmp_path / "original", to="original")
        with pytest.raises(ConfigError, match=r"vision tower was trained.*Fix: leave it out"):
            build_model(ModelConfig(checkpoint=str(source), vision_tower=tower))
        with pytest.raises(ConfigError, match="leave it out"):
            export(source, tmp_path / "again", to="llavar", vision_tower=tower)
        with pytest.raises(ConfigError, match=r"the released layout has none"):
            make_delta(str(runs.parts.language_model), source, tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@pytest.mark.slow
def test_adapters_on_parts_are_merged_with_the_tower_or_rejected(
    short_model: ModelConfig, tiny_data: Path, tmp_path: Path
) -> None:
    trainer, adapter = _train(_recipe(short_model, tiny_data, tmp_path / "run", LORA))
    adapted = _logits(trainer.model, trainer.processor)
    language_model = str(short_model.language_model)
    merge_adapter(language_model, adapter, tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(_loaded(checkpoint=str(tmp_path / "merged")), adapted, atol=1e-4, rtol=1e-4)
    assert build_model(ModelConfig(checkpoint=str(tmp_path / "merged")))[0].config.tuned_vision_tower
    assert verify_adapter(adapter, base=language_model).base == "fingerprint"
    with pytest.raises(
        ConfigError, match=r"changes the vision tower.*Fix: write the whole model with `llavar-peft merge`"
    ):
        make_delta(language_model, language_model, tmp_path / "delta", adapter=adapter)

    # A released checkpoint has no tower: it is converted first, as the message says.
    build, processor = build_model(short_model, seed=3)
    build.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "released", to="original")
    with pytest.raises(
        ConfigError, match=r"changes the vision tower.*Fix: merge into a base that `llavar-peft convert"
    ):
        merge_adapter(tmp_path / "released", adapter, tmp_path / "no", force=True)
    export(tmp_path / "released", tmp_path / "base", to="llavar", vision_tower=short_model.vision_tower)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "yes", force=True, probe=False)
    assert _tower(tmp_path / "yes").keys() == _tower(tmp_path / "own").keys()
    assert json.loads((tmp_path / "yes/config.json").read_text())["tuned_vision_tower"] is True


@pytest.mark.slow
def test_another_tower_is_not_the_base_of_an_adapter(runs: Runs, tmp_path: Path) -> None:
    base, processor = build_model(ModelConfig(checkpoint=str(runs.model)))
    with torch.no_grad():
        base.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    base.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsError, match=r"fingerprint differs in model\.vision_tower\.encoder\.layers\.0\.mlp"):
        load_adapter(str(tmp_path / "other"), runs.adapter)
    with pytest.raises(WeightsError, match=r"fingerprint differs in model\.vision_tower"):
        merge_adapter(tmp_path / "other", runs.adapter, tmp_path / "merged")
    with pytest.raises(WeightsError, match=r"fingerprint differs in model\.vision_tower"):
        verify_adapter(runs.adapter, base=tmp_path / "other")
    assert identify_model(tmp_path / "other") != identify_model(runs.model)
    assert identify_model(runs.model, runs.adapter) == identify_model(runs.adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "quantize"),
    [(dataclasses.replace(FULL, tower_learning_rate=1e-3), None), (dataclasses.replace(LORA, dropout=0.1), "nf4")],
    ids=["full", "qlora"],
)
def test_a_resumed_run_is_bit_exact(
    tune: Tune, quantize: Any, short_model: ModelConfig, tiny_data: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(short_model, quantize=quantize)
    whole, halved = (_recipe(model, tiny_data, tmp_path / name, tune, steps=3) for name in ("whole", "halved"))
    trainer, result = _train(whole)
    if quantize is not None:
        kinds = {name: type(one).__name__ for name, one in trainer.model.named_modules()}
        assert [kind for name, kind in kinds.items() if "vision_tower" in name and "4bit" in kind] == []
        assert any("vision_tower" in name for name in trained_names(trainer.model))
    with pytest.raises(InterruptedRunError):
        _train(halved, SignalAt(1, signal.SIGINT))
    _, resumed = _train(halved)
    for path in result.glob("*.safetensors"):
        ours, expected = load_file(resumed / path.name), load_file(path)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    losses = [
        [json.loads(line)["loss"] for line in (Path(each.output_dir) / "stage0/metrics.jsonl").open()]
        for each in (whole, halved)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_second_stage_starts_from_the_tower_of_the_first(
    short_model: ModelConfig, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = _recipe(short_model, tiny_data, tmp_path / "run", LORA, Full())
    Trainer(*build_model(recipe.model, seed=recipe.seed), recipe).train(["stage0"])
    trainer, _ = _train(recipe)  # loads the result of the first stage
    own = trainer.model.model.vision_tower.state_dict()
    merged = _tower(tmp_path / "run/stage0/model")
    original = build_model(short_model)[0].model.vision_tower.state_dict()
    assert all(torch.equal(own[name.removeprefix(TOWER)], tensor) for name, tensor in merged.items())
    assert not all(torch.equal(own[name], original[name]) for name in own)
    assert _tower(tmp_path / "run/model").keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in _tower(tmp_path / "run/model").items())
    assert json.loads((tmp_path / "run/model/config.json").read_text())["tuned_vision_tower"] is True
