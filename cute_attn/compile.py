"""A kernel's config -> compiled callable: kept in memory, and on disk for the next process.

A file of the disk cache is the object code followed by its SHA-256; whatever does not end in its own digest, or may be
written by others (`cache.refused`), is compiled again. Its name is the digest of the config, the kernel sources, the
DSL's and the FFI's versions and the target, so a file is never stale. `CUTE_ATTN_CACHE_DIR` moves the cache,
`CUTE_ATTN_CACHE=0` turns it off.
"""

import hashlib
import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import cutlass
import platformdirs
from cutlass import cute
from cutlass.cute.runtime import load_module

from . import cache, notices
from .kernels.registry import KernelConfig, kernel_of

ARCH = "sm_90a"
SYMBOL = "cute_attn_fwd"
KERNELS = Path(__file__).parent / "kernels"

_compiled: dict[KernelConfig, Callable] = {}
lock = threading.Lock()  # the DSL compiles in one thread at a time, or it aborts the process


def get(config: KernelConfig) -> Callable:
    """The compiled kernel, on torch's current stream; it takes what its config's `arguments` names, but the stream."""
    function = _compiled.get(config)
    if function is None:
        with lock:
            function = _compiled.get(config) or _load_or_compile(config)
            _compiled[config] = function
    return function


def store(config: KernelConfig) -> Path | None:
    """Compile into the disk cache where it is not there yet, without loading it; its file, None where none serves."""
    path = cache_file(config)
    if path is None:
        return None
    with lock:
        _kept(path, config)
    return path if cache.read(path) is not None else None


def cache_dir() -> Path | None:
    """Where compiled kernels are kept; None where the disk cache is off."""
    if os.environ.get("CUTE_ATTN_CACHE", "1") == "0":
        return None
    named = os.environ.get("CUTE_ATTN_CACHE_DIR")
    folder = Path(named or platformdirs.user_cache_dir("cute_attn"))
    if not named and not folder.is_absolute():  # "~" stays where nobody knows the user
        cache.warn(folder, "this user has no home")
        return None
    return folder


def cache_file(config: KernelConfig) -> Path | None:
    """The config's file in the disk cache, there or not."""
    directory = cache_dir()
    if directory is None:
        return None
    digest = hashlib.sha256(f"{config!r} {fingerprint()}".encode()).hexdigest()
    return directory / f"{config.name}_{digest[:32]}.o"


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Of everything beside the config that the object code depends on."""
    digest = hashlib.sha256()
    for source in sorted(KERNELS.glob("*.py")):  # the symlink itself: rglob from above would not enter it
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(Path(__file__).read_bytes())
    versions = [cutlass.__version__, str(cutlass.CUDA_VERSION), importlib.metadata.version("apache-tvm-ffi")]
    digest.update(" ".join([*versions, ARCH, platform.machine()]).encode())
    return digest.hexdigest()


def compile(config: KernelConfig, options: str = ""):
    """Compile for sm_90a, on any machine; only one call at a time in a process."""
    options = f"--enable-tvm-ffi --gpu-arch {ARCH} {options}"
    return cute.compile(kernel_of(config), *config.arguments(), options=options)


def _load_or_compile(config: KernelConfig) -> Callable:
    path = cache_file(config)
    return _load(_code(config) if path is None else _kept(path, config))


def _kept(path: Path, config: KernelConfig) -> bytes:
    """The object code, from the disk cache, or compiled and put there if that can be."""
    code = cache.read(path)
    if code is None:
        with cache.alone(path):  # many processes: one compiles, the others find it
            code = cache.read(path)
            if code is None:
                code = _code(config)
                cache.write(path, code)
    return code


def _code(config: KernelConfig) -> bytes:
    """Compiled anew."""
    started = time.perf_counter()
    with _in_memory() as path:
        compile(config).export_to_c(path, SYMBOL)
        code = Path(path).read_bytes()
    notices.logger.info("compiled %s for %s in %.1f s", config.name, ARCH, time.perf_counter() - started)
    return code


def _load(code: bytes) -> Callable:
    with _in_memory() as path:
        Path(path).write_bytes(code)
        return getattr(load_module(path, enable_tvm_ffi=True), SYMBOL)


@contextmanager
def _in_memory() -> Iterator[str]:
    """A file's name for the DSL, which takes no bytes: no disk can be full, and nobody else can write it."""
    descriptor = os.memfd_create(SYMBOL)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
