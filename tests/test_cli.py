"""The command line: its output, its exit statuses, and the modules that it does not import."""

import io
import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from llavar_peft import __version__, cli
from llavar_peft.cli import train_command as train_module
from llavar_peft.cli.app import build_app
from llavar_peft.cli.lazy_commands import lazy_program
from llavar_peft.errors import ConfigError, EnvironmentFaultError, InterruptedRunError, LlavarError
from llavar_peft.recipe.presets import load_recipe, read_recipe
from llavar_peft.recipe.shipped_recipes import list_presets, list_recipes


def run(*arguments: str) -> int:
    return cli.main(arguments)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make ``train`` raise a given exception."""

    def arrange(error: BaseException) -> None:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(train_module, "load_chosen_recipe", load)

    return arrange


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"llavar-peft {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["ask", "--help"],
        ["chat", "--help"],
        ["generate", "--help"],
        ["quickstart", "--help"],
        ["recipe", "--help"],
        ["recipe", "show", "--help"],
        ["data", "check", "--help"],
        ["merge", "--help"],
        ["adapter", "show", "--help"],
        ["adapter", "verify", "--help"],
        ["delta", "make", "--help"],
        ["delta", "apply", "--help"],
        ["delta", "verify", "--help"],
        ["data", "inspect", "--help"],
        ["eval", "--help"],
        ["eval", "vqa", "--help"],
        ["eval", "mme", "--help"],
        ["eval", "answer", "--help"],
        ["eval", "judge", "--help"],
        ["eval", "summarize", "--help"],
        ["eval", "compare", "--help"],
        ["eval", "diagnose", "--help"],
        ["ocr", "build", "--help"],
        ["ocr", "converse", "--help"],
        ["synth", "--help"],
    ],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 0
    assert "Usage: llavar-peft" in capsys.readouterr().out


def test_recipe_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "list") == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    recipes, presets = ([name, kind] for name, kind in lines if kind == "recipe"), lines[len(list_recipes()) :]
    assert [name for name, _ in recipes] == list(list_recipes())
    assert presets == [[name, "preset"] for name in list_presets()]


def test_recipe_show_prints_the_file_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "show", "llavar-13b") == 0
    assert capsys.readouterr().out == read_recipe("llavar-13b")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("qui", ["quickstart"]),
        ("train ti", ["tiny"]),
        ("train --preset ql", ["qlora"]),
        ("recipe show llavar-7", ["llavar-7b", "llavar-7b-highres"]),
        ("ask --quantize i", ["int8"]),
    ],
)
def test_the_shell_completes_names(
    typed: str, found: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"llavar-peft {typed}"
    monkeypatch.setenv("_LLAVAR_PEFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run() == 0
    assert capsys.readouterr().out.split() == found


def test_an_invalid_recipe_is_not_shown_as_if_it_could_be_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("modle: {}\n", encoding="utf-8")
    assert run("recipe", "show", str(tmp_path / "mine.yaml")) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "unknown field; did you mean 'model'?" in captured.err


def test_recipe_show_with_overrides_prints_every_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("recipe", "show", "tiny", "seed=7") == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(shown) == load_recipe("tiny", ["seed=7"])


def test_problems_of_a_recipe_go_to_stderr_with_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(read_recipe("tiny").replace("learning_rate", "learing_rate", 1), encoding="utf-8")
    assert run("train", str(broken)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 problem\n  stages.0.optim.learing_rate: unknown field; did you mean 'learning_rate'?" in captured.err
    assert "Traceback" not in captured.err


def test_the_log_goes_to_the_present_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    before, later = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", before)
    assert run("recipe", "list") == 0
    before.close()
    monkeypatch.setattr(sys, "stderr", later)
    logging.getLogger("llavar_peft.anything").info("%d words", 2)
    assert later.getvalue() == "2 words\n"


def test_a_line_of_the_log_does_not_continue_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("recipe", "list") == 0
    with tqdm(total=2, file=stream) as bar:
        bar.update()
        logging.getLogger("llavar_peft.anything").info("a line")
    assert "a line" in stream.getvalue().replace("\r", "\n").split("\n")


@pytest.mark.parametrize(("options", "shown"), [((), 0), (("--debug",), 1)])
def test_future_warnings_of_libraries_are_shown_with_debug_only(
    options: tuple[str, ...], shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run(*options, "recipe", "list") == 0
        warnings.warn("the argument has another name from version 6 on", FutureWarning, stacklevel=1)
    assert len(seen) == shown


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module"),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
    ],
)
def test_notices_of_libraries_are_shown_with_debug_only(
    logger: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = logging.getLogger(logger)
    for options, shown in (((), False), (("--debug",), True)):
        monkeypatch.setattr(named, "filters", [])
        assert run(*options, "recipe", "list") == 0
        capsys.readouterr()
        named.warning(message)
        named.warning("Something else")
        captured = capsys.readouterr()
        assert not captured.out
        assert (message in captured.err) == shown
        assert "Something else" in captured.err


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["recipe", "show"], ["ask", "what?"], ["train", "x", "--no"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("wrong"), 2),
        (EnvironmentFaultError("full"), 3),
        (InterruptedRunError("saved"), 4),
        (KeyboardInterrupt(), 130),
        (KeyError("surprise"), 1),
    ],
)
def test_exit_status(error: BaseException, status: int, failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(error)
    assert run("train", "tiny") == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if isinstance(error, LlavarError):
        assert captured.err == f"error: {error}\n"


def test_a_message_names_the_option_of_a_command_and_the_setting_of_a_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records = tmp_path / "records.json"
    records.write_text("[]")
    given = [f"stages.0.data.records={records}", f"output_dir={tmp_path / 'run'}"]
    for arguments, named in (
        (["ask", "--model", "gone", "Read."], "--model"),
        (["convert", "gone", str(tmp_path / "out"), "--to", "llavar"], "SRC"),
        (["train", "--preset", "lora", "model.checkpoint=gone", *given], "model.checkpoint"),
    ):
        assert run(*arguments) == 2
        assert f"error: {named}: no such folder (got 'gone')." in capsys.readouterr().err


@pytest.mark.parametrize(("value", "colored"), [("", True), ("1", False)])
def test_no_color_is_respected(value: str, colored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr("typer.style", lambda text, fg: shown.append(fg) or text)
    assert run("recipe", "show", "gone") == 2
    assert (shown != [None]) == colored


def test_an_unexpected_error_says_how_to_get_the_traceback(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyError("surprise"))
    assert run("train", "tiny") == 1
    assert "unexpected KeyError: 'surprise' (run again with llavar-peft --debug" in capsys.readouterr().err
    assert run("--debug", "train", "tiny") == 1
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "run again" not in captured.err


def test_train_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[object] = []

    def run_recipe(recipe, stages=None, *, restart=False, allow_changes=False) -> Path:
        calls.append((recipe, stages, restart, allow_changes))
        return Path("runs/tiny/model")

    monkeypatch.setitem(sys.modules, "llavar_peft.training.trainer", SimpleNamespace(run_recipe=run_recipe))
    assert run("train", "tiny", "seed=3", "--stage", "finetune", "--stage", "pretrain", "--restart") == 0
    assert run("train", "tiny", "--allow-changes") == 0
    assert calls == [
        (load_recipe("tiny", ["seed=3"]), ["finetune", "pretrain"], True, False),
        (load_recipe("tiny"), None, False, True),
    ]
    assert capsys.readouterr().out.splitlines()[0] == str(Path("runs/tiny/model"))


def test_an_unknown_stage_is_reported_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "tiny", "--stage", "finetun") == 2
    assert "the recipe has no stage 'finetun'. Fix: use one of pretrain, finetune." in capsys.readouterr().err


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two records; the image of the second is missing."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Read.\n<image>"}, {"from": "gpt", "value": "Nothing."}]
    rows = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in ("a", "b")]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_data_check(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "check", str(records), "--images", str(records.parent)) == 2
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "2 records, 1 fault"
    assert "b.png" in out
    assert run("data", "check", str(records), "--images", str(records.parent), "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["records"] == 2
    assert [sorted(fault) for fault in found["faults"]] == [["fix", "index", "kind", "mend", "what", "where"]]
    shutil.copy(records.parent / "a.png", records.parent / "b.png")
    assert run("data", "check", str(records), "--images", str(records.parent)) == 0


def test_a_wrong_folder_of_images_is_one_message(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run("data", "check", str(records), "--images", str(tmp_path / "empty")) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "a.png: is in none of the image folders" in lines[0]
    assert "like the images of all 2 records. Fix: give the folder that the image paths start from." in lines[0]
    assert lines[1] == "2 records, 2 faults"


def test_data_inspect_marks_the_supervised_text() -> None:
    import torch

    from llavar_peft.cli.data_command import _example_as_dict, _example_as_text
    from llavar_peft.types import Example

    example = Example(id="a", input_ids=torch.tensor([1, 2, 3]), labels=torch.tensor([-100, -100, 3]))
    spans = [("USER: Read. ASSISTANT: ", False), ("[bold]STOP</s>", True)]
    text = _example_as_text(example, spans)
    assert text.plain == "a (3 tokens, 1 supervised)\nUSER: Read. ASSISTANT: [bold]STOP</s>\n"
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["[bold]STOP</s>"]
    plain = json.loads(json.dumps(_example_as_dict(example, spans)))
    assert plain["labels"] == [-100, -100, 3]
    assert plain["spans"][1] == {"text": "[bold]STOP</s>", "supervised": True}


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        [],
        ["recipe", "list"],
        ["recipe", "show", "llavar-13b", "seed=1"],
        ["train", "--help"],
        ["eval", "vqa", "--help"],
    ],
)
def test_light_commands_do_not_import_torch(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not arguments:  # completion: the shell calls the program without arguments, at each press of the key
        monkeypatch.setenv("_LLAVAR_PEFT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "llavar-peft train --preset q")
        monkeypatch.setenv("COMP_CWORD", "3")
    loaded = modules_after(f"from llavar_peft.cli import main\nassert main({arguments!r}) == 0")
    assert not loaded & {"torch", "transformers", "peft", "datasets", "accelerate", "PIL", "numpy"}
    assert ("llavar_peft.recipe.schema" in loaded) == (arguments[:2] == ["recipe", "show"])


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["trian"], 2), (["train", "--nope"], 2)]
)
def test_help_and_wrong_usage_need_no_schema(arguments: list[str], status: int) -> None:
    """pydantic and what it builds take longer than the answer; typer imports it to check the values of options."""
    loaded = modules_after(f"from llavar_peft.cli import main\nassert main({arguments!r}) == {status}")
    loaded = {name.partition(".")[0] for name in loaded}
    assert not loaded & {"pydantic", "pydantic_core", "yaml", "msgspec", "torch", "numpy"}


def test_a_program_runs_the_commands_of_its_application() -> None:
    """Commands without their options, and complete ones where one is selected, as typer makes them at once."""
    app = build_app()
    eager, lazy = typer.main.get_command(app), lazy_program(app)
    for path in (["ask"], ["eval", "vqa"]):
        found = []
        for program in (eager, lazy):
            command, context = program, None
            for name in path:
                context = command.context_class(command, info_name=name, parent=context)
                command = command.resolve_command(context, [name])[1]
            found.append([(one.name, one.opts, one.default) for one in command.params])
        assert found[0] == found[1] != []
    listed = [(name, one.get_short_help_str(), one.rich_help_panel) for name, one in lazy.commands.items()]
    assert listed == [(name, one.get_short_help_str(), one.rich_help_panel) for name, one in eager.commands.items()]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llavar_peft", "recipe", "show", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nope: no such file or shipped recipe.")
