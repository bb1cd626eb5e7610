"""flash_fwd on arrays that are not torch's: of whatever library speaks DLPack, as NumPy, CuPy and JAX do.

No array is copied: torch sees its memory (dmlc.github.io/dlpack), and runs after what the array's library has queued
before; what that library queues next runs after. Eager only: inside `jax.jit` there is no memory to share yet.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..arrays import backwards, type_word

IMMUTABLE = ("jax", "jaxlib")
CUDA = 2  # kDLCUDA


def shared_by(flash_fwd: Callable, q, k, v, *, out=None, **options) -> Any:
    """As `cute_attn.flash_fwd`, which is called on tensors of the same memory. What comes back are arrays of q's
    library, and o is `out` where that is given.

    Raises:
        TypeError: the arrays are of several libraries, or cannot be shared as they are; and whatever flash_fwd raises.
    """
    given = dict(q=q, k=k, v=v) | ({} if out is None else dict(out=out))
    q, k, v, *o = shared(**given)
    from_dlpack = _from_dlpack(given["q"])
    options |= {name: _tensor(name, x) for name, x in options.items() if hasattr(x, "__dlpack__")}
    found = flash_fwd(q, k, v, out=o[0] if o else None, **options)
    several = isinstance(found, tuple)
    results = [_array(x, from_dlpack) for x in (found if several else (found,))]  # its library waits for the kernel
    if out is not None:
        results[0] = out
    return tuple(results) if several else results[0]


def shared(**given) -> list[torch.Tensor]:
    """q, k, v and out as tensors of the same memory, if they are of one library."""
    library = _library(given["q"])
    for name, x in given.items():
        if _library(x) != library:
            came = f"{type_word(x)} came with q of {type_word(given['q'])}"
            raise TypeError(
                f"{name}: {came}; pass arrays of one library, torch.from_dlpack({name}) makes a tensor of one"
            )
    if "out" in given:
        _writable(given["out"], library)
    return [_tensor(name, x) for name, x in given.items()]


def _library(x) -> str:
    return type(x).__module__.partition(".")[0]


def _writable(out, library: str) -> None:
    if library in IMMUTABLE:
        raise TypeError(f"out: {type_word(out)} arrays are immutable; omit it")
    flags = getattr(out, "flags", None)
    if getattr(flags, "writeable", True) is False:
        raise ValueError("out: it is read-only; pass an array that may be written, or omit it")


def _tensor(name: str, x) -> torch.Tensor:
    _forwards(name, x)
    try:
        with _on_its_gpu(x):
            return torch.from_dlpack(x)
    except Exception as error:  # each library says in its own way what it does not share
        came, said = (
            f"{type_word(x)} does not share its memory",
            str(error).strip().splitlines() or [type(error).__name__],
        )
        hint = "flash_fwd runs eagerly, so call it outside of jax.jit; otherwise pass a dense bf16 or fp16 array"
        raise TypeError(f"{name}: {came} ({said[0][:160]}); {hint}") from error


def _forwards(name: str, x) -> None:
    """NumPy and CuPy share views that run backwards, and torch ends the process over them."""
    if backwards(x):
        raise ValueError(
            f"{name}: strides {x.strides} bytes came, which run backwards; torch has none: use {name}.copy()"
        )


def _from_dlpack(q) -> Callable:
    """What makes arrays of q's library: its array API's, or that of q's module or of the package which that is in."""
    if _library(q) == "numpy":  # whose from_dlpack makes read-only arrays
        return torch.Tensor.numpy
    if hasattr(q, "__array_namespace__"):
        return q.__array_namespace__().from_dlpack
    names = type(q).__module__.split(".")
    packages = (sys.modules.get(".".join(names[: n + 1])) for n in range(len(names)))
    found = next((x for package in packages if (x := getattr(package, "from_dlpack", None))), None)
    if found is None:
        came = f"{type_word(q)} came, whose library has no from_dlpack that would make arrays for the results"
        raise TypeError(f"q: {came}; pass torch.from_dlpack(q), and k and v alike")
    return found


def _array(x: torch.Tensor, from_dlpack: Callable) -> Any:
    """x as an array of another library, which then waits for the stream that writes x."""
    if not x.is_cuda:
        return from_dlpack(x)
    with _on_its_gpu(x):
        return from_dlpack(x)


def _on_its_gpu(x) -> AbstractContextManager:
    """x's GPU as the current one: torch exports from no other, and CuPy takes the current one's stream for x's."""
    kind, index = x.__dlpack_device__()
    return torch.cuda.device(index) if kind == CUDA else nullcontext()
