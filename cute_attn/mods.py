"""A user's score_mod or mask_mod, made a kernel's: what is compiled for it, and what it takes at run time.

Each call runs the function once, on symbols (`mod_trace`), and what comes of it is the key: constants are in it by
value, wherever they were read. Tensors that it reads become arguments of the kernel, so other values compile nothing.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .kernels.user_mod import ELEMENT, UserMod
from .mod_torch import call
from .mod_trace import KINDS, Refused, Taken, take
from .mod_types import NUMBER_MAX, PLACES, typed

ARGUMENTS = dict(score_mod="score, b, h, q_idx, kv_idx", mask_mod="b, h, q_idx, kv_idx")
WORDS = {getattr(torch, word): word for word in ELEMENT}
KNOWN_MAX = 4096  # functions looked up; with one more all are forgotten
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Mod(NamedTuple):
    """One call's function: what chooses the kernel, what the kernel takes, the same for the CPU, and what was given."""

    kernel: UserMod
    arguments: tuple
    function: Callable  # of tensors: what the kernel computes
    given: Callable
    aux: tuple


_known: dict[tuple, UserMod] = {}


def prepare(name: str, function, aux: tuple) -> Mod:
    """aux: tensors and numbers that the function takes behind its places, and that are run-time arguments too.

    Raises:
        TypeError, ValueError: it is no function of symbols, or reads or does what a kernel cannot; the message says it.
    """
    if not callable(function):
        raise TypeError(f"{name}: {function!r} came; a function of ({ARGUMENTS[name]}, *aux) is needed")
    given = tuple(_number(i, x) for i, x in enumerate(aux))
    taken = _taken(name, function, given)
    arrays = tuple(_array(name, x) for x in taken.slots)
    key = name, taken.nodes, taken.result, arrays
    kernel = _known.get(key)
    if kernel is None:
        if len(_known) >= KNOWN_MAX:
            _known.clear()
        kernel = _known[key] = _kernel(name, taken, arrays)
    arguments = tuple(x.view(torch.uint8) if getattr(x, "dtype", None) == torch.bool else x for x in taken.slots)
    return Mod(kernel, arguments, partial(call, kernel, taken.slots), function, aux)


def _number(i: int, x):
    """As a Python number, if it is no tensor."""
    if isinstance(x, torch.Tensor) or type(x) in (int, float):
        return x
    for real, number in KINDS:
        if isinstance(x, real) and not isinstance(x, bool):
            return number(x)
    raise TypeError(f"aux: {type(x).__name__} at {i}; tensors and numbers are taken")


def _taken(name: str, function: Callable, aux: tuple) -> Taken:
    try:
        return take(function, len(PLACES[name]), aux)
    except Refused as e:
        raise TypeError(f"{name}: {e}") from e
    except Exception as e:  # the function's own
        called = f"({ARGUMENTS[name]}{', *aux' if aux else ''})"
        raise TypeError(f"{name}: called once with {called}, as symbols, it raised {type(e).__name__}: {e}") from e


def _kernel(name: str, taken: Taken, arrays: tuple) -> UserMod:
    try:
        nodes, result = typed(name, taken, [word for word, *_ in arrays])
    except Refused as e:
        raise TypeError(f"{name}: {e}") from e
    key = hashlib.sha256(repr((name, nodes, result, arrays)).encode()).hexdigest()[:32]
    return UserMod(key, arrays, nodes, result)


def _array(name: str, x) -> tuple[str, int, bool]:
    if isinstance(x, float):
        return "float", 0, False
    if isinstance(x, int):
        if not -(1 << 63) <= x < 1 << 63:
            raise ValueError(f"aux: {x} came, and whole numbers of 64 bits are taken; use a float")
        return "int" if abs(x) <= NUMBER_MAX else "long", 0, False
    _in_memory(name, x)
    word = WORDS.get(x.dtype)
    if word is None:
        raise TypeError(f"{name}: it captures a tensor of {x.dtype}; {', '.join(ELEMENT)} are taken")
    if x.numel() == 0:
        raise ValueError(f"{name}: it captures a tensor of shape {tuple(x.shape)}, of which no element can be read")
    rank = x.dim()
    return word, rank, rank > 0 and x.stride(-1) == 1


def _in_memory(name: str, x: torch.Tensor) -> None:
    """A kernel reads a tensor's memory as it is."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    if type(x) in PLAIN and x.layout is torch.strided and not x.is_neg() and not wrapped:
        return
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: it captures a tensor of {x.layout}; a dense one is needed: use .to_dense()")
    if x.is_neg():
        raise TypeError(f"{name}: it captures a tensor whose sign is kept beside its memory; use .resolve_neg()")
    if wrapped or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise TypeError(f"{name}: a {kind} came, which has no memory of its own; pass the tensor that it wraps")
