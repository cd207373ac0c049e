"""``push_to_hub``: publish a folder on the Hugging Face hub, in one commit, with a complete card."""

from __future__ import annotations

import importlib.metadata
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavar_peft.errors import ConfigError, InterruptedRunError, LlavarError
from llavar_peft.hub.hub_access import Destination, check_bases, check_destination, explain
from llavar_peft.hub.hub_card import finish_card, records_card
from llavar_peft.hub.hub_contents import Contents, hub_names, open_contents
from llavar_peft.hub.hub_files import collect_files
from llavar_peft.hub.hub_records import describe_table, write_table
from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name


def push_to_hub(
    source: str | Path,
    name: str,
    *,
    private: bool = False,
    replace: bool = False,
    base_name: str | Sequence[str] | None = (),
    images: Sequence[str | Path] = (),
) -> str:
    """Publish a model, an adapter, a delta or records on the Hugging Face hub.

    Everything is in one commit: a push that fails leaves the repository as it was, or empty. Paths of this machine are
    replaced by names in what is published. Files that the hub has already are not sent again.

    Args:
        source: The folder of a model, an adapter or a delta, or of a run; or a file of records.
        name: The repository, ``owner/name``. It is created if it does not exist.
        private: Whether no one else may see it.
        replace: Whether other contents of an existing repository may be replaced; its history keeps them.
        base_name: The base's name on the hub, where it is a folder in the settings; for a model of two parts also the
            vision tower's.
        images: Folders of the images, for records.

    Returns:
        The address of the commit, or of the repository if nothing had changed.

    Raises:
        ConfigError: The folder holds nothing of this kind, its base has no name on the hub, or the repository has other
            contents.
        DataError: A record is faulty.
        EnvironmentFaultError: There is no token, or one without the rights; or the hub cannot be reached.
        InterruptedRunError: Ctrl-C.
        WeightsError: Weights are missing or damaged.
    """
    contents = open_contents(source)
    kind = "dataset" if contents.kind == "dataset" else "model"
    if images and kind == "model":
        raise ConfigError.at("images", "apply only to records", "leave them out")
    names = hub_names(contents, [base_name] if isinstance(base_name, str) else base_name or ())
    destination = check_destination(name, kind=kind, private=private, replace=replace)  # type: ignore[arg-type]
    check_bases(names, str(source))
    again = _command(source, name, private=private, replace=replace, names=names, images=images)
    with tempfile.TemporaryDirectory(prefix="llavar-push-") as scratch:
        if kind == "dataset":
            files = _table_files(contents, name, images, Path(scratch))
        else:
            files = collect_files(contents, names, name)
            files[CARD_FILE] = finish_card(contents, name, names).encode()
        try:
            return _commit(destination, files)
        except LlavarError:
            raise
        except KeyboardInterrupt:
            raise InterruptedRunError.at(
                name, f"interrupted before it was pushed; {source} is complete", f"push it again: `{again}`"
            ) from None
        except Exception as error:  # the hub's client passes on any error of its transport
            what = f"not pushed, and nothing of it is visible; {source} is complete"
            raise explain(error, name, what, f"push it again: `{again}`") from error


def check_push(
    name: str, *, bases: Sequence[str | Path] | None, private: bool = False, base_name: Sequence[str] = ()
) -> None:
    """Check everything about a push that can be known before the work whose result is to be pushed.

    Args:
        name: The repository, ``owner/name``.
        bases: What the result will be made from; the first is its base. None if that is not known yet.
        private: Whether no one else may see it.
        base_name: Names on the hub of those that are folders.

    Raises:
        ConfigError: The name is not valid, a base has no name on the hub, or the repository has other contents.
        EnvironmentFaultError: There is no token, or one without the rights; or the hub cannot be reached.
    """
    names = {} if bases is None else hub_names(Contents("model", Path("--push"), tuple(map(str, bases))), base_name)
    check_destination(name, private=private)
    check_bases(names, "--push")


def _table_files(contents: Contents, name: str, images: Sequence[str | Path], scratch: Path) -> dict[str, Path | bytes]:
    records, count = write_table(contents.folder, images, scratch)
    files: dict[str, Path | bytes] = {
        path.relative_to(scratch).as_posix(): path for path in sorted((scratch / "data").glob("*.parquet"))
    }
    import pyarrow.parquet

    columns = pyarrow.parquet.read_schema(next(iter(files.values()))).names
    column = "conversations" if "conversations" in columns else "messages"
    title = name.partition("/")[2]
    card = records_card(name, title, describe_table(records, count), column=column, count=records)
    return {**files, CARD_FILE: card.encode()}


def _commit(destination: Destination, files: Mapping[str, Path | bytes]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    version = importlib.metadata.version("llavar-peft")
    api = HfApi(library_name="llavar-peft", library_version=version)
    if not destination.exists:
        api.create_repo(
            destination.name, private=destination.private or None, repo_type=destination.kind, exist_ok=True
        )
    operations: list[Any] = [
        CommitOperationAdd(path, str(value) if isinstance(value, Path) else value) for path, value in files.items()
    ]
    operations += [CommitOperationDelete(path) for path in destination.files if path not in files]
    done = api.create_commit(
        destination.name,
        operations,
        commit_message=f"Upload with llavar-peft {version}",
        repo_type=destination.kind,
        parent_commit=destination.head,
    )
    return str(done.commit_url)


def _command(
    source: str | Path,
    name: str,
    *,
    private: bool,
    replace: bool,
    names: Mapping[str, str],
    images: Sequence[str | Path],
) -> str:
    """Return the command that pushes a folder again."""
    words = ["llavar-peft", "push", str(source), name]
    words += ["--private"] if private else []
    words += ["--replace"] if replace else []
    for base, hub in names.items():
        words += ["--base-name", hub] if portable_name(base) != hub else []
    for folder in images:
        words += ["--images", str(folder)]
    return shlex.join(words)
