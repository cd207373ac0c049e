"""Puts the commands together. Nothing here may import torch: ``--help`` has to answer at once."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated

import typer

from llavar_peft import __version__
from llavar_peft.cli import adapter_command, compare_command, eval_command, judge_command, ocr_command
from llavar_peft.cli.ask_command import ask
from llavar_peft.cli.chat_command import chat
from llavar_peft.cli.convert_command import convert
from llavar_peft.cli.data_command import check, inspect
from llavar_peft.cli.delta_command import apply, make, verify
from llavar_peft.cli.doctor_command import doctor
from llavar_peft.cli.estimate_command import estimate
from llavar_peft.cli.generate_command import generate
from llavar_peft.cli.merge_command import merge
from llavar_peft.cli.output import is_first_rank, say
from llavar_peft.cli.quickstart_command import quickstart
from llavar_peft.cli.recipe_command import list_shipped, show
from llavar_peft.cli.report_command import report
from llavar_peft.cli.serve_command import serve
from llavar_peft.cli.synth_command import synth
from llavar_peft.cli.train_command import train

_HELP = "LLaVAR: train, ask and ship a LLaVA that reads text in images."


@dataclass
class Session:
    """What the global options say; ``main`` reads it after the command.

    Attributes:
        debug: Whether errors come with a traceback.
    """

    debug: bool = False


def build_app() -> typer.Typer:
    """Return the command line as a typer application."""
    app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_global_options)
    app.command("quickstart")(quickstart)
    app.command("train")(train)
    app.command("ask")(ask)
    app.command("chat")(chat)
    app.command("generate")(generate)
    app.command("serve")(serve)
    app.command("report")(report)
    app.command("doctor")(doctor)
    app.command("estimate")(estimate)
    app.command("merge")(merge)
    app.command("convert")(convert)
    recipes = typer.Typer(help="Recipes shipped with the package.", no_args_is_help=True)
    recipes.command("list")(list_shipped)
    recipes.command("show")(show)
    app.add_typer(recipes, name="recipe")
    data = typer.Typer(help="Records and images, looked at before they cost GPU time.", no_args_is_help=True)
    data.command("check")(check)
    data.command("inspect")(inspect)
    app.add_typer(data, name="data")
    app.command("synth")(synth)
    readers = typer.Typer(help="Records out of pictures that nobody has labelled.", no_args_is_help=True)
    readers.command("build")(ocr_command.build)
    readers.command("converse")(ocr_command.converse)
    app.add_typer(readers, name="ocr")
    adapters = typer.Typer(help="Adapters on disk: what they are, and whether they are whole.", no_args_is_help=True)
    adapters.command("show")(adapter_command.show)
    adapters.command("verify")(adapter_command.verify)
    app.add_typer(adapters, name="adapter")
    evaluation = typer.Typer(
        help="Does it read? The original's protocols, and two runs compared.", no_args_is_help=True
    )
    evaluation.command("vqa")(eval_command.vqa)
    evaluation.command("mme")(eval_command.mme)
    evaluation.command("answer")(judge_command.answer)
    evaluation.command("judge")(judge_command.judge)
    evaluation.command("summarize")(judge_command.summarize)
    evaluation.command("compare")(compare_command.compare)
    evaluation.command("diagnose")(compare_command.diagnose)
    app.add_typer(evaluation, name="eval")
    delta = typer.Typer(help="The released delta format: weights as a difference to LLaMA's.", no_args_is_help=True)
    delta.command("make")(make)
    delta.command("apply")(apply)
    delta.command("verify")(verify)
    app.add_typer(delta, name="delta")
    return app


def _print_version(expected: bool) -> None:
    if expected:
        say(f"llavar-peft {__version__}")
        raise typer.Exit


def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show debug messages, and tracebacks of errors.")] = False,
    version: Annotated[  # noqa: ARG001 - the callback answers it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if isinstance(context.obj, Session):
        context.obj.debug = debug
    _configure_logging(debug)


def _configure_logging(debug: bool) -> None:
    if not debug and not sys.warnoptions:
        # What libraries tell one another of their next versions is nothing that a user of this command can fix.
        warnings.filterwarnings("ignore", category=FutureWarning)
    level = logging.DEBUG if debug else logging.INFO
    layout = "%(levelname)s %(name)s: %(message)s" if debug else "%(message)s"
    logging.basicConfig(format=layout, handlers=[_StandardError()], force=True)
    # Only this package speaks at INFO: a library's lines would bury its progress. Other ranks report problems only.
    logging.getLogger("llavar_peft").setLevel(level if is_first_rank() else logging.WARNING)
    # Where it is installed, accelerate imports it, and it logs to standard output, where our results go.
    logging.getLogger("DeepSpeed").addFilter(_to_standard_error)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)


class _StandardError(logging.Handler):
    """Writes to what standard error is by then: logging's own handler keeps to one that may be closed meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201
        except Exception:  # noqa: BLE001 - as every handler: a line that cannot be written ends nothing
            self.handleError(record)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what bitsandbytes says of each layer at each token, and what 8 bits are."""
    return not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")


def _to_standard_error(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING and is_first_rank():
        print(f"DeepSpeed: {record.getMessage()}", file=sys.stderr)  # noqa: T201 - its handler writes elsewhere
    return False
