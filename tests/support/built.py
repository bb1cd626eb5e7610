"""What the compiler made of each kernel, kept on disk: built once, by whichever worker asks first.

An entry's name is the digest of the config, and its folder's of the kernels' sources and the tools' versions, so none
is ever stale. They lie in pytest's cache folder (.pytest_cache/d/kernels; --cache-clear empties it), for the next run.
"""

import hashlib
import importlib.metadata
import shutil
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import filelock

from cute_attn import compile
from cute_attn.tools import inspect

FOLDERS_KEPT = 3  # of this state of the sources, and of those used last

_build = inspect.build.__wrapped__
_folder: Path | None = None  # None: nothing is kept


def keep_in(folder: Path) -> None:
    """From now on. `inspect.build`, and so every report, looks here first."""
    global _folder
    _folder = folder / fingerprint()
    _folder.mkdir(parents=True, exist_ok=True)
    _folder.touch()
    inspect.build = lru_cache(maxsize=128)(_built)


def _built(config) -> inspect.Build:
    return inspect.Build(*(part.decode() for part in get("sass", config, lambda: _build(config))))


def forget_old(folder: Path) -> None:
    """All but the folders that were used last."""
    used = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in used[FOLDERS_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def fingerprint() -> str:
    """Of everything beside the config that an entry depends on."""
    digest = hashlib.sha256(compile.fingerprint().encode())
    for source in (inspect.__file__, __file__):
        digest.update(Path(source).read_bytes())
    try:
        nvdisasm = importlib.metadata.version("nvidia-cuda-nvdisasm")
    except importlib.metadata.PackageNotFoundError:
        nvdisasm = str(shutil.which("nvdisasm"))
    digest.update(nvdisasm.encode())
    return digest.hexdigest()[:32]


def get(kind: str, config, make: Callable[[], tuple[str | bytes, ...]]) -> tuple[bytes, ...]:
    """The entry of a kind for a config: what is kept, or else what `make` gives."""
    if _folder is None:
        return _as_bytes(make())
    path = _folder / f"{kind}_{hashlib.sha256(repr(config).encode()).hexdigest()[:32]}.zip"
    with filelock.FileLock(path.with_suffix(".lock")):  # a second worker waits for the first one's build
        try:
            return _read(path)
        except (OSError, zipfile.BadZipFile):
            parts = _as_bytes(make())
            _write(path, parts)
            return parts


def _as_bytes(parts) -> tuple[bytes, ...]:
    return tuple(part.encode() if isinstance(part, str) else part for part in parts)


def _read(path: Path) -> tuple[bytes, ...]:
    with zipfile.ZipFile(path) as archive:
        return tuple(archive.read(name) for name in archive.namelist())


def _write(path: Path, parts: tuple[bytes, ...]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i, part in enumerate(parts):
            archive.writestr(str(i), part)
