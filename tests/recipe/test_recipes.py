"""The shipped recipes have the paper's settings; Python, YAML and overrides produce equal recipes."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavar_peft.errors import ConfigError
from llavar_peft.recipe import resolution, schema
from llavar_peft.recipe.presets import load_recipe, read_recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import DataConfig, Full, Lora, ModelConfig, OptimConfig, Projector, Recipe
from llavar_peft.recipe.shipped_recipes import list_recipes
from llavar_peft.recipe.stages import full_finetuning, lora, projector_pretraining
from llavar_peft.recipe.validate import validate_recipe

PAPER_GPUS = 8
# Source: arXiv 2306.17107 and the released scripts: learning rate, epochs, batch, micro batch, accumulation, length.
PAPER = {"pretrain": (2e-3, 1, 128, 8, 2, 1024), "finetune": (2e-5, 3, 32, 4, 1, 2048)}
DATA = DataConfig(records="r.json", images="images")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["llavar-13b", "llavar-7b"])
def test_the_shipped_recipe_has_the_papers_settings(name: str) -> None:
    recipe = load_recipe(name)
    assert [stage.name for stage in recipe.stages] == list(PAPER)
    for stage in recipe.stages:
        rate, epochs, batch, micro, accumulation, length = PAPER[stage.name]
        assert stage.optim == OptimConfig(learning_rate=rate, schedule="cosine", warmup_ratio=0.03, weight_decay=0.0)
        assert stage.optim.optimizer == "adamw"
        assert stage.epochs == epochs
        assert stage.max_steps is None
        assert stage.global_batch_size == batch == PAPER_GPUS * micro * accumulation
        assert stage.micro_batch_size == micro
        assert stage.max_length == length
        assert stage.precision == "bf16"
        assert stage.gradient_checkpointing
        assert stage.loss_average == "micro_batch"
        assert stage.data.image_mode is None
    assert [type(stage.tune) for stage in recipe.stages] == [Projector, Full]
    assert [stage.data.records for stage in recipe.stages] == [
        "chat_llavar.json",
        "llava_instruct_150k_llavar_16k.json",
    ]
    assert recipe.model.image_mode == "pad"
    assert recipe.model.vision_feature_layer == -2
    assert recipe.model.use_im_start_end
    assert recipe.model.quantize is None


def test_python_and_yaml_describe_the_same_recipe() -> None:
    recipe = Recipe(
        model=ModelConfig(language_model="lmsys/vicuna-13b-v1.1", vision_tower="openai/clip-vit-large-patch14-336"),
        stages=(
            projector_pretraining(DataConfig(records="chat_llavar.json", images="cc3m"), precision="bf16"),
            full_finetuning(
                DataConfig(records="llava_instruct_150k_llavar_16k.json", images="coco/train2017"), precision="bf16"
            ),
        ),
        output_dir="runs/llavar-13b",
    )
    assert recipe == load_recipe("llavar-13b")
    assert validate_recipe(recipe) == recipe


def test_the_7b_recipe_differs_only_in_the_language_model() -> None:
    small, large = load_recipe("llavar-7b"), load_recipe("llavar-13b")
    model = dataclasses.replace(small.model, language_model=large.model.language_model)
    assert dataclasses.replace(small, model=model, output_dir=large.output_dir) == large


def test_lora_has_the_documented_defaults_and_accepts_options() -> None:
    stage = lora(DATA)
    assert stage.tune == Lora(rank=64, alpha=128.0, dropout=0.05)
    assert (stage.optim.learning_rate, stage.epochs, stage.global_batch_size) == (2e-4, 3.0, 32)
    other = lora(DATA, rank=8, alpha=16, dropout=0.0, variant="dora", train_projector=False, train_image_rows=True)
    expected = Lora(rank=8, alpha=16, dropout=0.0, variant="dora", train_projector=False, train_image_rows=True)
    assert other.tune == expected


@pytest.mark.parametrize("make", [projector_pretraining, full_finetuning, lora])
def test_a_stage_function_passes_on_every_argument(make: object) -> None:
    stage = make(  # type: ignore[operator]
        DATA,
        name="n",
        epochs=0.5,
        max_steps=7,
        learning_rate=0.1,
        global_batch_size=6,
        micro_batch_size=3,
        max_length=99,
        precision="fp32",
        gradient_checkpointing=False,
        save_every_steps=5,
        probe=dataclasses.replace(lora(DATA).probe, images=3),
    )
    assert (stage.name, stage.epochs, stage.max_steps, stage.optim.learning_rate) == ("n", 0.5, 7, 0.1)
    assert (stage.global_batch_size, stage.micro_batch_size, stage.max_length) == (6, 3, 99)
    assert (stage.precision, stage.gradient_checkpointing, stage.save_every_steps) == ("fp32", False, 5)
    assert stage.probe.images == 3
    # The paper holds nothing out.
    assert stage.data == (DATA if make is lora else dataclasses.replace(DATA, holdout=0.0))


def test_qlora_is_lora_on_a_quantized_base() -> None:
    recipe = Recipe(
        model=ModelConfig(checkpoint="llavar-13b", quantize="nf4"), stages=(lora(DATA),), output_dir="runs/receipts"
    )
    assert validate_recipe(recipe) == recipe


@pytest.mark.parametrize("name", list(list_recipes()))
def test_shipped_recipes_are_valid_and_survive_a_round_trip_with_comments(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    text = dump_recipe(recipe)
    assert "# Peak learning rate" in text
    assert load_recipe(write(tmp_path, text)) == recipe
    assert load_recipe(write(tmp_path, read_recipe(name))) == recipe
    assert list_recipes()[name].endswith(".")


def _is_no_home(text: str) -> bool:
    return bool(text.strip()) and not text.startswith("~")  # in a path, which is replaced by the user's home


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(_is_no_home))
def test_any_text_survives_the_dump(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    recipe = dataclasses.replace(load_recipe("tiny"), output_dir=text, report_to=(text, "b"))
    path = write(tmp_path_factory.mktemp("dump"), "")
    path.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(path) == recipe


def test_overrides() -> None:
    recipe = load_recipe(
        "tiny",
        [
            "stages.0.optim.learning_rate=1e-3",
            "output_dir=x=y",
            "stages.1.tune=lora",
            "stages.1.tune.rank=16",
            "stages.0.data.images=[a, b]",
            "stages.0.probe.images=2",
            "stages.0.max_steps=null",
            "seed=7",
        ],
    )
    assert recipe.stages[0].optim.learning_rate == 1e-3
    assert recipe.output_dir == "x=y"
    assert recipe.stages[1].tune == Lora(rank=16)
    assert recipe.stages[0].data.images == ("a", "b")
    assert recipe.stages[0].probe.images == 2
    assert recipe.stages[0].max_steps is None
    assert recipe.seed == 7


@pytest.mark.parametrize("text", ["2024", "no", "1e5", "null", "2024-01-01", "a b", "'2024'"])
def test_an_override_of_a_text_field_is_text(text: str) -> None:
    assert load_recipe("tiny", [f"output_dir={text}"]).output_dir == text.strip("'")


def test_all_invalid_overrides_are_reported() -> None:
    wrong = [
        "stages.5.epochs=2",
        "stages.0.epoch=3",
        "stages.epochs=2",
        "seed.x=3",
        "foo",
        "stages.1.tune.rank=2",
        "seed=[",
    ]
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", wrong)
    text = str(caught.value)
    assert text.startswith("overrides: 7 problems\n")
    assert "stages.0.epoch: unknown field; did you mean 'epochs'?" in text
    assert "stages.5: no entry 5; the list has 2 entries, counted from 0" in text
    assert "stages.1.tune.rank: unknown field; only tune: lora has it" in text
    assert len(caught.value.faults) == len(wrong)


def test_override_values_are_validated_with_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"^tiny: 2 problems\n.*\n"):
        load_recipe("tiny", ["seed=true", "stages.0.micro_batch_size=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"recipe\.yaml:2:1: duplicate key 'a'"),
        ("a: 1\n\tb: 2\n", r"recipe\.yaml:2:1: "),
        ("model: !!python/object:os.system {}\n", r"recipe\.yaml:1:8: "),
        ("", r"recipe\.yaml: 1 problem"),
        ("- a\n", r"recipe\.yaml: 1 problem"),
    ],
)
def test_files_that_are_not_recipes_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_merge_keys_are_not_duplicates(tmp_path: Path) -> None:
    body = read_recipe("tiny").replace("  - name: finetune", "  - <<: {epochs: 2}\n    name: finetune")
    assert load_recipe(write(tmp_path, body)).stages[1].name == "finetune"


def test_a_missing_or_unreadable_recipe_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Fix: did you mean 'llavar-13b'\?$"):
        load_recipe("llavar13b")
    with pytest.raises(ConfigError, match="is a folder, expected a file"):
        load_recipe(tmp_path)
    broken = tmp_path / "latin.yaml"
    broken.write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(broken)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + read_recipe("tiny").encode())
    assert load_recipe(path) == load_recipe("tiny")


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_shown_as_readable_python(name: str) -> None:
    recipe = load_recipe(name)
    text = repr(recipe)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 60
    assert "shuffle=" not in text  # at its default
    assert eval(text, {**vars(schema), **vars(resolution)}) == recipe
