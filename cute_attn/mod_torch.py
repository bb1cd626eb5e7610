"""A score_mod or mask_mod on the CPU: the kernel's nodes, worked out by torch in the kernel's types."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.user_mod import UserMod, worked_out

WHOLE = {word: torch.iinfo(word) for word in (torch.int32, torch.int64)}


def call(mod: UserMod, slots: list, *places) -> Any:
    """Its result of a score, if it takes one, and of places: tensors that broadcast, or numbers.

    slots: the tensors and numbers that it reads.
    """
    device = next(x.device for x in reversed(places) if isinstance(x, Tensor))
    kinds = [torch.float32] * (len(places) - 4) + [torch.int32] * 4
    given = [torch.as_tensor(x, dtype=kind, device=device) for x, kind in zip(places, kinds, strict=True)]
    arrays = [_array(x, word, device) for x, (word, *_) in zip(slots, mod.arrays, strict=True)]
    return worked_out(mod, given, arrays, FUNCTIONS)


class Array:
    """As `user_mod.Array`: an index beyond the end is taken for the last, and one below 0 for the first."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getitem__(self, index: tuple) -> Tensor:
        inside = (torch.as_tensor(i).long().clamp(0, n - 1) for i, n in zip(index, self.tensor.shape, strict=True))
        return element(self.tensor[tuple(inside)])


def _array(x, word: str, device: torch.device):
    if isinstance(x, Tensor):
        return Array(x) if x.dim() else element(x)
    kind = dict(int=torch.int32, long=torch.int64, float=torch.float32)[word]
    return torch.tensor(x, dtype=kind, device=device)


def element(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x.int() if x.dtype == torch.uint8 else x


def alike(*xs, least: torch.dtype = torch.int32) -> list[Tensor]:
    """Of one type: float32 where one is a float, else int64 or int32."""
    xs = tuple(x if isinstance(x, Tensor) else _constant(x) for x in xs)
    kinds = [x.dtype for x in xs] + [least]
    kind = next(k for k in (torch.float32, torch.int64, torch.int32) if k in kinds)
    return [x.to(kind) for x in xs]


def _constant(x: bool | int | float) -> Tensor:
    kinds = {
        bool: torch.bool,
        float: torch.float32,
        int: torch.int64 if abs(x) > WHOLE[torch.int32].max else torch.int32,
    }
    return torch.tensor(x, dtype=kinds[type(x)])


def arithmetic(function: Callable, least: torch.dtype = torch.int32) -> Callable:
    return lambda *xs: function(*alike(*xs, least=least))


def of_float(function: Callable) -> Callable:
    return arithmetic(function, torch.float32)


def bits(function: Callable) -> Callable:
    """Of truths; of whole numbers bit by bit."""

    def of(*xs):
        truths = all(isinstance(x, bool) or getattr(x, "dtype", None) == torch.bool for x in xs)
        return function(*(map(torch.as_tensor, xs) if truths else alike(*xs)))

    return of


def quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.floor(a / b) if a.is_floating_point() else torch.div(a, b, rounding_mode="floor")


def where(condition, a, b) -> Tensor:
    return bits(lambda a, b: torch.where(truth(condition), a, b))(a, b)


def truth(x) -> Tensor:
    return torch.as_tensor(x) != 0


def whole(kind: torch.dtype) -> Callable:
    """Of a float: towards 0, the nearest that there is, and 0 of NaN, as the hardware does it."""

    def of(x) -> Tensor:
        x = torch.as_tensor(x)
        if not x.is_floating_point():
            return x.to(kind)
        least, most = WHOLE[kind].min, WHOLE[kind].max
        beyond = torch.where(x >= float(most), most, torch.where(x < float(least), least, 0))
        fits = (x >= float(least)) & (x < float(most))
        return torch.where(fits, x.where(fits, 0.0).to(kind), beyond.to(kind))

    return of


FUNCTIONS: dict[str, Callable] = {
    **{name: arithmetic(getattr(operator, name)) for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne")},
    "floor_divide": arithmetic(quotient),
    "remainder": arithmetic(lambda a, b: a - quotient(a, b) * b),
    "true_divide": of_float(operator.truediv),
    "pow": of_float(torch.pow),
    **{f"bitwise_{name}": bits(getattr(torch, f"bitwise_{name}")) for name in ("and", "or", "xor")},
    "invert": bits(torch.bitwise_not),
    "where": where,
    **{name: arithmetic(getattr(torch, name)) for name in ("minimum", "maximum", "abs", "neg")},
    **{name: of_float(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt")},
    **{name: of_float(getattr(torch, name)) for name in ("sin", "cos", "floor", "tanh", "sigmoid")},
    "float": of_float(lambda a: a),
    "int": whole(torch.int32),
    "long": whole(torch.int64),
    "bool": truth,
}
