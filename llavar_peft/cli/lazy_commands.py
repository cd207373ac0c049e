"""A command line whose commands read their options when they are run.

typer evaluates the annotations of all commands at the start, which takes longer than everything else that ``--help``
or a message about wrong usage needs. Here the list of commands knows only their names and explanations.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo

_OF_COMPLETION = ("install_completion", "show_completion")


class _QuickHelp:
    """Mixin of commands and groups. For a switch without a default, newer versions of typer import pydantic."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the switch ``--help``, which is off by default."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Command(_QuickHelp, TyperCommand):
    """A command with its options."""


class ListedCommand(TyperCommand):
    """A command in the list: its name, its explanation and its place.

    Args:
        info: The command as it was added to a typer application.
    """

    def __init__(self, info: CommandInfo) -> None:
        super().__init__(info.name, help=inspect.getdoc(info.callback), rich_help_panel=info.rich_help_panel)
        self._info = info

    def with_options(self) -> Any:
        """Return the command that can be run, with its options and arguments."""
        info = copy.copy(self._info)
        info.cls = _Command
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.registered_commands.append(info)
        return typer.main.get_command(app)


class LazyGroup(_QuickHelp, TyperGroup):
    """A group whose commands get their options when one is selected, by the user or by the shell's completion."""

    def resolve_command(self, *args: Any) -> Any:
        """Return the name and the command that the arguments select, and the arguments after it."""
        name, command, rest = super().resolve_command(*args)
        return name, command.with_options() if isinstance(command, ListedCommand) else command, rest


def lazy_program(app: typer.Typer) -> TyperGroup:
    """Return an application as a program that runs the same commands.

    Args:
        app: The application. Its ``cls`` is a ``LazyGroup``; each of its groups has a name and a help text only.
    """
    bare = typer.Typer(pretty_exceptions_enable=False)
    bare.info, bare.registered_callback = app.info, app.registered_callback
    program: Any = typer.main.get_command(bare)
    for option in program.params:
        if option.name in _OF_COMPLETION:
            option.default = False  # as in _QuickHelp
    for command in app.registered_commands:
        program.add_command(ListedCommand(command))
    for added in app.registered_groups:
        inner = added.typer_instance
        if inner is not None:
            commands = {str(one.name): ListedCommand(one) for one in inner.registered_commands}
            group = LazyGroup(
                name=added.name, commands=dict(commands), help=inner.info.help, no_args_is_help=True,
                rich_help_panel=added.rich_help_panel,
            )  # fmt: skip
            program.add_command(group)
    return program  # type: ignore[no-any-return]
