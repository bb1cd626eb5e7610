"""FwdConfig -> compiled callable: kept in memory, and on disk for the next process.

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
from itertools import chain
from pathlib import Path

import cutlass
import platformdirs
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import load_module, make_fake_stream, make_fake_tensor

from . import cache, notices
from .kernels.config import FwdConfig
from .kernels.flash_fwd_columns_sm90 import SharedRows
from .kernels.flash_fwd_constant_sm90 import FlashFwdConstantSm90
from .kernels.flash_fwd_diagonal_sm90 import FromDiagonal
from .kernels.flash_fwd_dropout_sm90 import Dropout
from .kernels.flash_fwd_maxima_sm90 import Maxima
from .kernels.flash_fwd_pack_sm90 import PackedHeads
from .kernels.flash_fwd_redo_sm90 import FlashFwdRedoSm90
from .kernels.flash_fwd_score_sm90 import Scored, Sinks
from .kernels.flash_fwd_serial_sm90 import FlashFwdSerialSm90
from .kernels.flash_fwd_sm90 import ELEMENT, FlashFwdSm90
from .kernels.flash_fwd_sparse_sm90 import Sparse
from .kernels.flash_fwd_split_sm90 import FlashFwdSplitSm90
from .kernels.flash_fwd_timeline_sm90 import Timeline
from .kernels.flash_fwd_varlen_sm90 import Varlen
from .kernels.flash_fwd_window_sm90 import Windowed

ARCH = "sm_90a"
SYMBOL = "cute_attn_fwd"
KERNELS = Path(__file__).parent / "kernels"

_compiled: dict[FwdConfig, Callable] = {}
lock = threading.Lock()  # the DSL compiles in one thread at a time, or it aborts the process


def get(config: FwdConfig) -> Callable:
    """The compiled `FlashFwdSm90.__call__`: (q, k, v, o, lse, ticket, scale, num_sms) on torch's current stream.

    What the config's mask, score and mixins take, `FwdConfig.signature`, follows behind.
    """
    function = _compiled.get(config)
    if function is None:
        with lock:
            function = _compiled.get(config) or _load_or_compile(config)
            _compiled[config] = function
    return function


def store(config: FwdConfig) -> Path | None:
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


def cache_file(config: FwdConfig) -> Path | None:
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


def compile(config: FwdConfig, options: str = ""):
    """Compile for sm_90a, on any machine; only one call at a time in a process."""
    b, h, h_kv, s_q, s_k, d, d_v = (cute.sym_int() for _ in range(7))

    def tensor(heads, seqlen, d):
        shapes = {"bhsd": (b, heads, seqlen, d), "bshd": (b, seqlen, heads, d), "thd": (seqlen, heads, d)}
        shape = shapes[config.layout]
        strides = (*(cute.sym_int64(divisibility=8) for _ in shape[1:]), 1)
        return make_fake_tensor(ELEMENT[config.dtype], shape, strides, assumed_align=16)

    return cute.compile(
        kernel(config)(config),
        *(tensor(h, s_q, d), tensor(h_kv, s_k, d), tensor(h_kv, s_k, d_v), tensor(h, s_q, d_v)),
        *(Int64(0), Int64(0), Float32(1.0), Int32(1)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *chain(*config.signature()),
        options=f"--enable-tvm-ffi --gpu-arch {ARCH} {options}",
    )


def kernel(config: FwdConfig) -> type[FlashFwdSm90]:
    """The class that is compiled for a config."""
    asked = {
        Timeline: config.timeline,
        SharedRows: config.parts_v > 1,
        Scored: config.score.name,
        Sinks: config.sinks,
        Dropout: config.dropout,
        Maxima: config.row_max,
        Windowed: config.mask.windowed and not config.sparse,
        FromDiagonal: config.from_diagonal,
        Sparse: config.sparse,
        Varlen: config.packed,
        PackedHeads: config.pack > 1,
    }
    mixins = [mixin for mixin, wanted in asked.items() if wanted]
    plain = _plain(config)
    return type("".join(x.__name__ for x in (plain, *mixins)), (*mixins, plain), {}) if mixins else plain


def _plain(config: FwdConfig) -> type[FlashFwdSm90]:
    if config.split > 1:
        return FlashFwdSplitSm90
    if not config.overlap:
        return FlashFwdSerialSm90
    if config.constant_time:
        return FlashFwdConstantSm90
    return FlashFwdRedoSm90 if config.redo else FlashFwdSm90


def _load_or_compile(config: FwdConfig) -> Callable:
    path = cache_file(config)
    return _load(_code(config) if path is None else _kept(path, config))


def _kept(path: Path, config: FwdConfig) -> bytes:
    """The object code, from the disk cache, or compiled and put there if that can be."""
    code = cache.read(path)
    if code is None:
        with cache.alone(path):  # many processes: one compiles, the others find it
            code = cache.read(path)
            if code is None:
                code = _code(config)
                cache.write(path, code)
    return code


def _code(config: FwdConfig) -> bytes:
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
