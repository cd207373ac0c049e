"""Files and folders that appear completely or not at all, locks against a second writer, and errors of the disk.

A file is written under a temporary name, synchronized to disk, and renamed. The temporary name is always the same, so
that leftovers of a killed run are replaced; a lock on it keeps two processes apart.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS: Final = (
    "No space left on device", "Disk quota exceeded", "File too large", "unexpected pos", "failed writing",
)  # fmt: skip
"""Messages of writers that raise no OSError: safetensors raises its own error, torch.save a RuntimeError."""
_UNITS: Final = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_held: set[str] = set()  # locks of this process, which the operating system does not distinguish


def staging_path(path: Path) -> Path:
    """Return the temporary name of a file."""
    return path.with_name(f".{path.name}.part")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        EnvironmentFaultError: The disk is full, or the folder is not writable; nothing is left behind.
    """
    with disk_errors(path, needed=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = staging_path(path)
        while not _write_staged(staged, path, data):
            pass


def _write_staged(staged: Path, path: Path, data: bytes) -> bool:
    """Write and rename the temporary file; return False if another process renamed it while this one waited for it."""
    with staged.open("ab", buffering=0) as file:
        lock_file(file.fileno(), wait=True)
        if not _is_open_file(staged, file.fileno()):
            return False
        try:
            file.truncate(0)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
            staged.replace(path)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise
    return True


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the temporary name of a file, which is renamed at the end, or removed after an error.

    ``write_bytes`` is for contents that are in memory, and for files that several processes write.
    """
    staged = staging_path(path)
    try:
        yield staged
        staged.replace(path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 atomically; halves of characters, as in file names that are not UTF-8, become escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON atomically."""
    write_text(path, dump_json(value, indent=2) + "\n")


def dump_json(value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """Format a value as JSON; characters outside ASCII are escaped only if the text cannot be encoded otherwise."""
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which has no UTF-8 form
        return json.dumps(value, indent=indent, separators=separators)
    return text


def commit_folder(staged: Path, final: Path, *, journal: Path | None = None) -> None:
    """Move a finished folder to its final name, replacing any folder of that name.

    The caller holds a lock: of two processes that replace a folder at the same time, one would take away the other's.

    Args:
        staged: The finished folder.
        final: Its name.
        journal: A file in ``staged`` that is needed until the last moment, and then removed.
    """
    files = [entry for entry in sorted(staged.rglob("*")) if entry.is_file()]
    mode = _default_mode(staged)
    for entry in files:
        if entry.suffix == ".safetensors":
            # safetensors creates its files for their owner alone, whatever the umask.
            entry.chmod(mode)
        with entry.open("rb") as file:
            os.fsync(file.fileno())
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if journal is not None:
        journal.unlink()
    if final.exists():
        final.rename(old)
    staged.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _default_mode(folder: Path) -> int:
    """Return the permissions that the umask gives a new file; ``os.umask`` can only read them by changing them."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def hold_lock(lock: Path, *, where: Path, what: str = "another process is writing it") -> Iterator[None]:
    """Hold a lock on an output. A process that dies releases it; the file, if it is left, does not block anyone.

    Args:
        lock: The file to lock, beside or in the output; it is removed at the end.
        where: The output, for the message.
        what: What another process is doing, for the message.

    Raises:
        EnvironmentFaultError: Another process holds the lock, and the message names it; or the file cannot be created.
    """
    with disk_errors(where):
        lock.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(lock)
    if key in _held:
        raise EnvironmentFaultError.at(str(where), f"{what} (this one)", "wait until it has finished")
    while True:
        with disk_errors(where):
            file = lock.open("a+b", buffering=0)
        with file:
            if not lock_file(file.fileno()):
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise EnvironmentFaultError.at(
                    str(where), f"{what} ({holder})", "wait until it has finished, or choose another output"
                )
            if not _is_open_file(lock, file.fileno()):
                continue  # the holder released the lock and removed the file in the meantime
            with suppress(OSError):  # the name of the holder is only for messages
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            _held.add(key)
            try:
                yield
            finally:
                _held.discard(key)
                with suppress(OSError):
                    lock.unlink()
            return


def lock_file(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process, and return False if another one has locked it.

    Where files cannot be locked (Windows, some network file systems), nothing prevents a second writer.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        # Not flock: the worker processes of a killed run would hold the lock for a while.
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _is_open_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


# -- errors of the disk -----------------------------------------------------------------------------------------------


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk is full, in any library's words."""
    if isinstance(error, EnvironmentFaultError) and error.__cause__ is not None:
        return is_disk_full(error.__cause__)
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _FULL_TEXTS)


@contextmanager
def disk_errors(path: Path, *, needed: int = 0, only_full: bool = False) -> Iterator[None]:
    """Convert errors of the disk into ours, which name the output and what it needs.

    Args:
        path: The output.
        needed: Number of bytes that it needs; 0 if this is not known.
        only_full: Whether other errors than a full disk are left as they are: the work inside also reads.

    Raises:
        EnvironmentFaultError: The disk is full, or the output is not writable.
    """
    try:
        yield
    except LlavarError:
        raise
    except Exception as error:
        if is_disk_full(error) or (isinstance(error, OSError) and not only_full):
            raise disk_fault(path, error, needed=needed) from error
        raise


def disk_fault(path: Path, error: Exception, *, needed: int = 0) -> LlavarError:
    """Return our error for one of the disk, to be raised from that."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC
    reason = (error.strerror if isinstance(error, OSError) else None) or "No space left on device"
    again = "run the same command again"
    if is_disk_full(error):
        space = f", {_size(_free_bytes(path))} free" if number == errno.ENOSPC else ""
        reason = f"the disk is full: {reason}" if number != errno.EFBIG else f"the limit on the size of files: {reason}"
        reason += f"; it needs {_size(needed)}{space}" if needed else space.replace(",", ";", 1)
        fix = "raise the limit (ulimit -f)" if number == errno.EFBIG else "free some space"
        fix += f", and {again}"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = f"make the folder writable, and {again}; or choose another output"
    elif number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT):
        fix = "choose another output"
    else:
        fix = f"check the disk, and {again}"
    return EnvironmentFaultError.at(str(path), f"cannot be written ({reason})", fix)


def check_output_folder(folder: Path, where: str) -> None:
    """Check that a command can write to a folder, existing or not, before it does any work.

    Args:
        where: The option or field, for the message.

    Raises:
        ConfigError: The path, or a part of it, is a file or a link to nothing.
        EnvironmentFaultError: The folder cannot be created or written.
    """
    existing = _existing_part(folder, where)
    if not existing.is_dir():
        raise ConfigError.at(where, f"{existing} is a file, expected a folder", f"choose another {where}")
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".llavar-peft-"):
            pass
    except OSError as error:
        raise EnvironmentFaultError.at(
            where, f"{existing} cannot be written ({error.strerror or error})", f"choose another {where}"
        ) from error


def check_output_file(path: Path, where: str) -> None:
    """Check that a command can write a file, before it does any work. Arguments and errors as above."""
    if path.is_dir():
        raise ConfigError.at(where, f"{path} is a folder, expected a file", f"choose another {where}")
    check_output_folder(path.absolute().parent, where)


def _existing_part(path: Path, where: str) -> Path:
    for part in (path, *path.absolute().parents):
        if os.path.lexists(part):
            if not part.exists():
                target = ascii(os.readlink(part))[1:-1]
                what = f"{part} is a link to {target}, which does not exist"
                raise ConfigError.at(where, what, f"create that folder, remove the link, or choose another {where}")
            return part
    return Path("/")


def _free_bytes(path: Path) -> int:
    existing = next((part for part in (path, *path.absolute().parents) if part.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return next((f"{count / unit:.1f} {name}" for unit, name in _UNITS if count >= unit), f"{count} bytes")
