"""Check a name, a token and a repository of the hub before anything long begins, and explain what the hub rejects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError, describe_reason
from llavar_peft.weights.io.weights_card import portable_name

RepositoryType = Literal["model", "dataset"]
_OWN_FILES = (".gitattributes", ".gitignore")
"""Files that the hub puts into a new repository."""
_LOGIN = "run `hf auth login` with a token that may write, or set HF_TOKEN to one"
_SHOWN = 3
_PART = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_LONGEST_NAME = 96  # characters
_UNAUTHORIZED, _FORBIDDEN = 401, 403


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository that may be pushed to.

    Attributes:
        name: ``owner/name``.
        kind: Whether it is of a model or of a data set.
        private: Whether it is created as a private one.
        exists: Whether it exists.
        head: Its last commit; None for a new one.
        files: The files in it, apart from those of every repository.
    """

    name: str
    kind: RepositoryType
    private: bool
    exists: bool = False
    head: str | None = None
    files: tuple[str, ...] = ()


def check_destination(
    name: str, *, kind: RepositoryType = "model", private: bool = False, replace: bool = False
) -> Destination:
    """Check that a repository can be pushed to: the name, the token and its rights, and what is there already.

    Args:
        name: ``owner/name``.
        kind: Whether it is of a model or of a data set.
        private: Whether no one else may see it.
        replace: Whether it may have other contents, which a new commit then replaces.

    Raises:
        ConfigError: The name is not valid; or the repository has other contents, or is public and should be private.
        EnvironmentFaultError: There is no token, or one without the rights; or the hub cannot be reached.
    """
    _check_name(name)
    _check_token(name)
    found = _find(name, kind)
    if found is None:
        return Destination(name, kind, private)
    files = tuple(sorted({one.rfilename for one in found.siblings or ()} - set(_OWN_FILES)))
    if private and not found.private:
        what = "exists and is public, expected a private repository"
        raise ConfigError.at(name, what, "make it private on its page, give another name, or leave --private out")
    if files and not replace:
        shown = ", ".join(files[:_SHOWN]) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
        raise ConfigError.at(
            name,
            f"exists already with other contents ({shown})",
            "give another name; or push with `llavar-peft push --replace`, whose commit replaces all files",
        )
    return Destination(name, kind, private, exists=True, head=found.sha, files=files)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not is_repository_name(name):
        fix = f"write OWNER/NAME, with letters, digits, '-', '_' and '.', each of at most {_LONGEST_NAME} characters"
        raise ConfigError.at("--push", f"no name of a repository (got {str(name)[:200]!r}, expected OWNER/NAME)", fix)


def is_repository_name(name: str) -> bool:
    """Return whether a name is ``owner/name`` as the hub accepts it.

    Source: huggingface_hub, utils/_validators.py, ``validate_repo_id``.
    """
    parts = name.split("/")
    valid = all(_PART.fullmatch(part) and len(part) <= _LONGEST_NAME for part in parts)
    return len(parts) == 2 and valid and not ("--" in name or ".." in name or name.endswith(".git"))


def _check_token(name: str) -> None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise EnvironmentFaultError.at(name, "HF_HUB_OFFLINE is set, so nothing can be pushed", "unset it")
    if get_token() is None:
        raise EnvironmentFaultError.at(name, "there is no token for the Hugging Face hub", _LOGIN)
    try:
        user: dict[str, Any] = HfApi().whoami()
    except Exception as error:  # the hub's client passes on any error of its transport
        raise explain(error, name) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise EnvironmentFaultError.at(name, "the token for the Hugging Face hub may only read", _LOGIN)
    owner = name.partition("/")[0]
    teams = {one["name"]: one.get("roleInOrg") for one in user.get("orgs", ())}
    if owner != user.get("name") and teams.get(owner, "read") == "read":
        known = ", ".join([str(user.get("name")), *(team for team, right in teams.items() if right != "read")])
        what = f"the token may not write for {owner!r} (expected one of {known})"
        raise EnvironmentFaultError.at(name, what, "give a name of one of these owners, or use another token")


def _find(name: str, kind: RepositoryType) -> Any:
    """Return what the hub says about a repository; None if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().repo_info(name, repo_type=kind)
    except GatedRepoError as error:
        raise explain(error, name) from error
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # the hub's client passes on any error of its transport
        raise explain(error, name) from error


def check_bases(names: Mapping[str, str], where: str) -> None:
    """Check that the hub has the models that settings name by hub names: a relative path looks like one.

    Args:
        names: Hub name of each base, by what the settings call it; other names were given by the user.
        where: What is pushed, for the message.

    Raises:
        ConfigError: The hub shows no model of a name.
        EnvironmentFaultError: The hub cannot be reached.
    """
    for name in (hub for source, hub in names.items() if portable_name(source) == hub):
        if not _is_model(name):
            what = (
                f"its card would name the base {name!r}, and the hub has no model of this name that the token may see"
            )
            fix = (
                "add --base-name OWNER/NAME if it is the path of a folder; push the base first if it is not on the hub"
            )
            raise ConfigError.at(where, what, fix)


def _is_model(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name)
    except RepositoryNotFoundError as error:
        return isinstance(error, GatedRepoError)
    except Exception as error:  # the hub's client passes on any error of its transport
        raise explain(error, name, "cannot be looked up on the hub") from error
    return True


def explain(error: Exception, name: str, what: str = "cannot be pushed to", fix: str = "") -> LlavarError:
    """Return the error for a request that the hub did not fulfil.

    Args:
        error: The error of the hub's client.
        name: The repository.
        what: What could not be done.
        fix: What to do besides; empty says only what the error asks for.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == _UNAUTHORIZED:
        reason, own = "the hub does not accept the token", _LOGIN
    elif status == _FORBIDDEN:
        reason, own = "the token has not the right to write there", _LOGIN
    else:
        reason = describe_reason(error)
        own = "check the connection" if fix else "check the connection, and try again"
    return EnvironmentFaultError.at(name, f"{what} ({reason})", "; then ".join(filter(None, (own, fix))))
