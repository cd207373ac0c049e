"""``llavar-peft push``, and the option ``--push`` of commands that write weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from llavar_peft.cli.output import say
from llavar_peft.cli.shared_options import ImagesOption
from llavar_peft.errors import ConfigError

PushOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--push", metavar="OWNER/NAME", help="Publish the result on the Hugging Face hub, in this repository."
    ),
]
PrivateOption: TypeAlias = Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")]
BaseNameOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--base-name",
        metavar="OWNER/NAME",
        help="The base's name on the hub, which the card states, where the base is a folder. Repeat the option for a "
        "vision tower that is one.",
    ),
]


def push(
    source: Annotated[
        Path,
        typer.Argument(help="The folder of a model, adapter, delta or run; or a file of records.", metavar="FOLDER"),
    ],
    name: Annotated[str, typer.Argument(help="The repository on the hub.", metavar="OWNER/NAME")],
    private: PrivateOption = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace other contents of the repository; its history keeps them.")
    ] = False,
    base_name: BaseNameOption = None,
    images: ImagesOption = None,
) -> None:
    """Publish a model, an adapter, a delta or records on the Hugging Face hub, in one commit."""
    from llavar_peft.hub.push_folder import push_to_hub

    say(push_to_hub(source, name, private=private, replace=replace, base_name=base_name or (), images=images or ()))


def check_push_option(
    name: str | None, private: bool, base_name: Sequence[str] | None, bases: Sequence[str] | None
) -> None:
    """Check the option ``--push`` before any work is done.

    Args:
        name: Its value.
        private: Whether ``--private`` is given.
        base_name: The values of ``--base-name``.
        bases: What the result will be made from; None if that is not known yet.

    Raises:
        ConfigError: The name or a base's name is missing or not valid, or the repository has other contents.
        EnvironmentFaultError: There is no token, or one without the rights; or the hub cannot be reached.
    """
    if name is None:
        if private or base_name:
            option = "--private" if private else "--base-name"
            raise ConfigError.at(option, "applies only with --push", "add --push OWNER/NAME, or leave it out")
        return
    from llavar_peft.hub.push_folder import check_push

    check_push(name, bases=bases, private=private, base_name=base_name or ())


def push_result(folder: Path, name: str | None, private: bool, base_name: Sequence[str] | None) -> None:
    """Push a result if ``--push`` is given, and print the address."""
    if name is not None:
        from llavar_peft.hub.push_folder import push_to_hub

        say(push_to_hub(folder, name, private=private, base_name=base_name or ()))
