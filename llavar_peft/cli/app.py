"""The table of commands, and the options of the program. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from llavar_peft import __version__
from llavar_peft.cli.adapter_command import adapter_bake, adapter_show, adapter_verify
from llavar_peft.cli.ask_command import ask
from llavar_peft.cli.chat_command import chat
from llavar_peft.cli.compare_command import eval_compare, eval_diagnose
from llavar_peft.cli.convert_command import convert
from llavar_peft.cli.data_command import data_check, data_convert, data_inspect
from llavar_peft.cli.delta_command import delta_apply, delta_make, delta_verify
from llavar_peft.cli.eval_command import eval_mme, eval_vqa
from llavar_peft.cli.fields_command import eval_fields
from llavar_peft.cli.generate_command import generate
from llavar_peft.cli.heights_command import eval_heights
from llavar_peft.cli.judge_command import eval_answer, eval_judge, eval_summarize
from llavar_peft.cli.lazy_commands import LazyGroup
from llavar_peft.cli.merge_command import merge
from llavar_peft.cli.ocr_command import ocr_build, ocr_converse, ocr_select
from llavar_peft.cli.output import is_first_rank, make_safe, say
from llavar_peft.cli.preflight_command import doctor, estimate
from llavar_peft.cli.push_command import push
from llavar_peft.cli.recipe_command import recipe_list, recipe_show
from llavar_peft.cli.report_command import report
from llavar_peft.cli.serve_command import serve
from llavar_peft.cli.synth_command import synth
from llavar_peft.cli.train_command import quickstart, train
from llavar_peft.errors import LlavarError
from llavar_peft.types import expand_home

_HELP = """Train, evaluate and serve LLaVAR models, which read text in images.

Run 'llavar-peft COMMAND --help' for the options of a command, and 'llavar-peft quickstart' to see it all work on a CPU.
"""
_TRAIN, _ASK, _DATA, _EVALUATE, _WEIGHTS = "Train", "Ask and serve", "Prepare data", "Evaluate", "Convert weights"


@dataclass
class Session:
    """The program's options, which ``main`` reads after the command.

    Attributes:
        debug: Print a traceback with each error.
    """

    debug: bool = False


_WITH_RECIPE = ("train", "estimate")
_OPTIONS = {
    "model": "--model",
    "model.checkpoint": "--model",
    "model.quantize": "--quantize",
    "model.vision_tower": "--vision-tower",
    "vision_tower": "--vision-tower",
    "adapter": "--adapter",
    "adapters": "--adapter",
    "onto": "--onto",
    "source": "SRC",
    "quantize": "--quantize",
    "images": "--images",
    "weights": "--weight",
    "to": "--to",
    "base": "--base",
    "tokenizer": "--tokenizer",
    "outtype": "--outtype",
    "dtype": "--dtype",
}


class _SafeGroup(LazyGroup):
    """The program. Messages about its arguments, which may be names of files, do not control the terminal."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Read the program's own options."""
        with _safe_messages():
            return super().make_context(*args, **settings)

    def invoke(self, *args: Any) -> Any:
        """Run a command."""
        with _safe_messages():
            return super().invoke(*args)


@contextmanager
def _safe_messages() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):  # click's errors about arguments
            error.message = make_safe(message.removeprefix("Value error, "))  # type: ignore[attr-defined]
        raise


class _CommandGroup(_SafeGroup):
    """Names the options of commands in messages about the settings that they set, instead of those of a recipe."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EOFError as error:  # which click would report as "Aborted."
            raise RuntimeError(f"the end of a file came too early: {error}") from error
        except LlavarError as error:
            setting, _, rest = str(error).partition(": ")
            if ctx.invoked_subcommand in _WITH_RECIPE or setting not in _OPTIONS:
                raise
            raise type(error)(f"{_OPTIONS[setting]}: {rest}", error.faults) from error


def build_app() -> typer.Typer:
    """Return the command line as a typer application."""
    app = typer.Typer(cls=_CommandGroup, help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_global_options)

    def group(name: str, panel: str, text: str, **commands: Callable[..., None]) -> None:
        sub_app = typer.Typer(help=text, no_args_is_help=True)
        for command, function in commands.items():
            sub_app.command(command)(_with_homes(function))
        app.add_typer(sub_app, name=name, rich_help_panel=panel)

    def command(name: str, panel: str, function: Callable[..., None]) -> None:
        app.command(name, rich_help_panel=panel)(_with_homes(function))

    command("quickstart", _TRAIN, quickstart)
    command("train", _TRAIN, train)
    group("recipe", _TRAIN, "List and print the shipped recipes.", list=recipe_list, show=recipe_show)
    command("estimate", _TRAIN, estimate)
    command("doctor", _TRAIN, doctor)
    command("ask", _ASK, ask)
    command("chat", _ASK, chat)
    command("generate", _ASK, generate)
    command("serve", _ASK, serve)
    group(
        "data", _DATA, "Check and convert records and images before training.",
        check=data_check, inspect=data_inspect, convert=data_convert,
    )  # fmt: skip
    group(
        "ocr", _DATA, "Make training records from unlabeled images.",
        build=ocr_build, converse=ocr_converse, select=ocr_select,
    )  # fmt: skip
    command("synth", _DATA, synth)
    group(
        "eval", _EVALUATE, "Evaluate a model with the original protocols, and compare results.",
        vqa=eval_vqa, mme=eval_mme, answer=eval_answer, judge=eval_judge, summarize=eval_summarize,
        compare=eval_compare, diagnose=eval_diagnose, heights=eval_heights, fields=eval_fields,
    )  # fmt: skip
    command("report", _EVALUATE, report)
    group(
        "adapter", _WEIGHTS, "Describe, verify and split adapters.",
        show=adapter_show, verify=adapter_verify, bake=adapter_bake,
    )  # fmt: skip
    command("merge", _WEIGHTS, merge)
    command("convert", _WEIGHTS, convert)
    group(
        "delta", _WEIGHTS, "Make, apply and verify deltas: weights stored as the difference to LLaMA's.",
        make=delta_make, apply=delta_apply, verify=delta_verify,
    )  # fmt: skip
    command("push", _WEIGHTS, push)
    return app


def _with_homes(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose paths may begin with ``~``, which shells do not replace in ``--option=~/path``."""

    @wraps(command)
    def run(**options: Any) -> None:
        command(**{name: _expand(value) for name, value in options.items()})

    return run


def _expand(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand(one) for one in value]
    return expand_home(value) if isinstance(value, Path) else value


def _print_version(requested: bool) -> None:
    if requested:
        say(f"llavar-peft {__version__}")
        raise typer.Exit


def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Print debug messages, and tracebacks of errors.")] = False,
    version: Annotated[  # noqa: ARG001 - handled by the callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if isinstance(context.obj, Session):
        context.obj.debug = debug
    _configure_logging(debug)


def _configure_logging(debug: bool) -> None:
    if not debug and not sys.warnoptions:
        # Libraries announce future changes to each other, which users of this command cannot act on.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters in them is an error of ours
    level = logging.DEBUG if debug else logging.INFO
    layout = "%(levelname)s %(name)s: %(message)s" if debug else "%(message)s"
    logging.setLogRecordFactory(_SafeRecord)
    logging.basicConfig(format=layout, handlers=[_StandardError()], force=True)
    # Only this package logs at INFO, and only in the first process of a run.
    logging.getLogger("llavar_peft").setLevel(level if is_first_rank() else logging.WARNING)
    # accelerate imports DeepSpeed where it is installed, and DeepSpeed logs to stdout, which is for our results.
    logging.getLogger("DeepSpeed").addFilter(_redirect_to_stderr)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_for_users)
    if not debug:
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_for_users)


class _SafeRecord(logging.LogRecord):
    """A message of any library's logger without characters that control the terminal."""

    def getMessage(self) -> str:
        """Return the message."""
        return make_safe(super().getMessage())


class _StandardError(logging.Handler):
    """Writes to the present ``sys.stderr``; logging's StreamHandler keeps the first one, which may be closed."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            bars = sys.modules.get("tqdm")  # what shows progress in training; a line would continue that of its bar
            write = print if bars is None else bars.tqdm.write
            write(make_safe(self.format(record)), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - as in every handler, a line that cannot be written must not end the program
            self.handleError(record)


_NOT_FOR_USERS = (
    "MatMul8bitLt: inputs will be cast",  # bitsandbytes, for each layer and token
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes, whose other kernel gives the same numbers
    "Setting accelerator to CPU",  # DeepSpeed, which accelerate imports and which does nothing here
)
"""Beginnings of messages that users cannot act on."""


def _is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOT_FOR_USERS)


def _redirect_to_stderr(record: logging.LogRecord) -> bool:
    if not _is_for_users(record) and not logging.getLogger("llavar_peft").isEnabledFor(logging.DEBUG):
        return False
    if record.levelno >= logging.WARNING and is_first_rank():
        print(f"DeepSpeed: {record.getMessage()}", file=sys.stderr)  # noqa: T201 - its handler writes to stdout
    return False
