"""A user's score_mod or mask_mod, taken apart: its code, the tensors that it captures, and how a kernel calls it.

What a function captures is what its closure, its defaults and the globals that it names hold: tensors become arguments
of the kernel, so other values compile nothing; numbers, strings and functions are part of the code.
"""

import builtins
import functools
import hashlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .kernels.user_mod import ELEMENT, UserMod

ARGUMENTS = dict(score_mod="score, b, h, q_idx, kv_idx", mask_mod="b, h, q_idx, kv_idx")


class Mod(NamedTuple):
    """One call's function: what chooses the kernel, what the kernel takes, and the function itself for torch."""

    kernel: UserMod
    arguments: tuple
    function: Callable


def prepare(name: str, function, aux: tuple) -> Mod:
    """aux: tensors and numbers that the function takes behind its places, and that are run-time arguments too.

    Raises:
        TypeError: it is no Python function, or captures what a kernel cannot hold; the message names it.
    """
    if not callable(function):
        raise TypeError(f"{name}: {function!r} came; a function of ({ARGUMENTS[name]}, *aux) is needed")
    for i, x in enumerate(aux):
        if not isinstance(x, (torch.Tensor, int, float)) or isinstance(x, bool):
            raise TypeError(f"aux: {type(x).__name__} at {i}; tensors and numbers are taken")
    found = _Captured(name)
    code = found.of(function, name)
    tensors = [*found.tensors, *aux]
    arrays = tuple(_array(name, x) for x in tensors)
    key = hashlib.sha256(repr((name, code, len(aux), arrays)).encode()).hexdigest()[:32]
    slots = [Slot() for _ in found.tensors]  # so that a kernel, which is kept, keeps no tensor alive
    empty = _rebuilt(function, {id(x): slot for x, slot in zip(found.tensors, slots, strict=True)})

    def build(stand_ins: list) -> Callable:
        mine, given = stand_ins[: len(slots)], stand_ins[len(slots) :]
        filled = _rebuilt(empty, {id(slot): x for slot, x in zip(slots, mine, strict=True)})
        return lambda *places: filled(*places, *given)

    arguments = tuple(x.view(torch.uint8) if getattr(x, "dtype", None) == torch.bool else x for x in tensors)
    return Mod(UserMod(key, arrays, build), arguments, functools.partial(_call, function, aux))


class Slot:
    """Where a function without its tensors had one."""


def _call(function, aux, *places):
    return function(*places, *aux)


def _array(name: str, x) -> tuple[str, int, bool]:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__, 0, False
    word = str(x.dtype).removeprefix("torch.")
    if word not in ELEMENT:
        raise TypeError(f"{name}: it captures a tensor of {x.dtype}; {', '.join(ELEMENT)} are taken")
    if x.numel() == 0:
        raise ValueError(f"{name}: it captures a tensor of shape {tuple(x.shape)}, of which no element can be read")
    return word, x.dim(), x.dim() > 0 and x.stride(-1) == 1


class _Captured:
    """The tensors that a function holds, and everything else of it as text."""

    def __init__(self, name: str):
        self.name = name
        self.tensors: list[torch.Tensor] = []  # in the order of finding
        self.functions: list[types.FunctionType] = []

    def of(self, x, path: str) -> Any:
        if isinstance(x, torch.Tensor):
            return "tensor", self._place(self.tensors, x)
        if isinstance(x, (int, float, str, bytes, type(None), types.EllipsisType, torch.dtype, torch.device)):
            return repr(x)
        if isinstance(x, types.ModuleType):
            return "module", x.__name__
        if isinstance(x, (tuple, list)):
            return type(x).__name__, [self.of(y, f"{path}[{i}]") for i, y in enumerate(x)]
        if isinstance(x, dict):
            return "dict", [(repr(key), self.of(y, f"{path}[{key!r}]")) for key, y in x.items()]
        if isinstance(x, functools.partial):
            return "partial", [self.of(y, path) for y in (x.func, x.args, x.keywords)]
        if isinstance(x, types.FunctionType):
            return self._function(x, path)
        if isinstance(x, (types.BuiltinFunctionType, type)) or getattr(x, "__module__", "").startswith("torch"):
            return "known", f"{x.__module__}.{getattr(x, '__qualname__', x)}"
        way_out = "capture tensors, numbers and functions"
        raise TypeError(f"{self.name}: {path} is a {type(x).__name__}, which a kernel cannot hold; {way_out}")

    def _function(self, function, path: str) -> Any:
        if any(function is known for known in self.functions):
            return "again", self._place(self.functions, function)
        self.functions.append(function)
        held = {
            **dict(
                zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True)
            ),
            **_globals(function),
            **dict(enumerate((function.__defaults__, function.__kwdefaults__))),
        }
        return "function", _code(function.__code__), [(k, self.of(x, f"{path}'s {k}")) for k, x in held.items()]

    @staticmethod
    def _place(known: list, x) -> int:
        for i, y in enumerate(known):
            if x is y:
                return i
        known.append(x)
        return len(known) - 1


def _globals(function) -> dict[str, Any]:
    """Those that the function's code names, and no builtin hides."""
    return {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}


def _names(code: types.CodeType) -> list[str]:
    inner = [name for x in code.co_consts if isinstance(x, types.CodeType) for name in _names(x)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _code(code: types.CodeType) -> tuple:
    """What it does, whatever the file and line."""
    constants = tuple(_code(x) if isinstance(x, types.CodeType) else repr(x) for x in code.co_consts)
    return code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars


def _rebuilt(x, known: dict[int, Any]) -> Any:
    """The same with a stand-in for each tensor; known: by its id, what stands for a tensor, or a function made anew."""
    if id(x) in known:
        return known[id(x)]
    if isinstance(x, (tuple, list)):
        items = [_rebuilt(y, known) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, dict):
        return {key: _rebuilt(y, known) for key, y in x.items()}
    if isinstance(x, functools.partial):
        function, args, keywords = (_rebuilt(y, known) for y in (x.func, x.args, x.keywords))
        return functools.partial(function, *args, **keywords)
    return _function_anew(x, known) if isinstance(x, types.FunctionType) else x


def _function_anew(x: types.FunctionType, known: dict[int, Any]) -> types.FunctionType:
    namespace: dict[str, Any] = {"__builtins__": builtins}
    cells = tuple(types.CellType() for _ in x.__closure__ or ())
    new = types.FunctionType(x.__code__, namespace, x.__name__, None, cells)
    known[id(x)] = new  # before what it holds, which may be itself
    namespace.update({name: _rebuilt(y, known) for name, y in _globals(x).items()})
    new.__defaults__, new.__kwdefaults__ = _rebuilt(x.__defaults__, known), _rebuilt(x.__kwdefaults__, known)
    for cell, old in zip(cells, x.__closure__ or (), strict=True):
        cell.cell_contents = _rebuilt(old.cell_contents, known)
    return new
