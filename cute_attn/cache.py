"""Files that processes and users share: read where only trusted users may write, written where that can be.

A file is what was put there, followed by its SHA-256. Where the folder, a file or the disk does not serve, a warning
names the folder once, and its user goes on without it.
"""

import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

DIGEST = hashlib.sha256().digest_size
_named: set[Path] = set()


def read(path: Path) -> bytes | None:
    """What was put there; None where there is nothing, nothing whole, or nothing that may be trusted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            refusal = refused(os.fstat(descriptor), path)
            data = b"" if refusal else file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        refusal, data = f"{path.name} cannot be read: {error.strerror}", b""
    if refusal:
        warn(path.parent, refusal)
    whole = len(data) > DIGEST and hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]
    return data[:-DIGEST] if whole else None


def refused(status: os.stat_result, path: Path) -> str | None:
    """Why a file is not used, which anybody may have written who is neither this user nor trusted by them."""
    if not stat.S_ISREG(status.st_mode):
        return f"{path.name} is no regular file"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path.name} may be written by others, its mode is {stat.S_IMODE(status.st_mode):o}"
    if status.st_uid not in trusted(path.parent):
        return f"{path.name} was written by user {status.st_uid}"
    return None


def trusted(folder: Path) -> set[int]:
    """This user, root, whoever owns this package, and whoever owns the folder, if not anybody could have made it."""
    users = {os.geteuid(), 0, os.stat(__file__).st_uid}
    folder = folder.resolve()
    made_by_anybody = any(parent.stat().st_mode & stat.S_IWOTH for parent in folder.parents)
    return users if made_by_anybody else users | {folder.stat().st_uid}


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes this file, where the folder takes a lock; the others then find it."""
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):  # without a lock each makes it for itself
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(path.with_suffix(".lock")))
        yield


def write(path: Path, data: bytes) -> None:
    """Put there, whole or not at all, for every user to read whom the umask allows it."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with open(descriptor, "wb") as file:
                file.write(data + hashlib.sha256(data).digest())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        warn(path.parent, f"it cannot be written: {error.strerror}")


def warn(folder: Path, reason: str) -> None:
    """Names the folder, once in a process."""
    if folder in _named:
        return
    _named.add(folder)
    what = f"{folder}: this cache of compiled kernels is of no use ({reason}), and they are compiled anew"
    hint = "CUTE_ATTN_CACHE_DIR names another folder, and with CUTE_ATTN_CACHE=0 there is none"
    warnings.warn(f"{what}; {hint}", RuntimeWarning, stacklevel=2)
