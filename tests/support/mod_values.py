"""Functions of scores and places that read values in every way that Python has, and that do all that they may."""

import enum
import functools
import operator
import types
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

settings = types.ModuleType("settings")
WINDOW, TABLE = 3, {"windows": [0, 3]}


class Config:
    window = 3
    table = None


class Widths(enum.IntEnum):
    NARROW = 3
    WIDE = 9


@dataclass
class Data:
    window: int


class Pair(NamedTuple):
    other: int
    window: int


class Layer(torch.nn.Module):
    """A module of a model, whose method or itself is the function."""

    def __init__(self, n: int):
        super().__init__()
        self._n = n
        self.register_buffer("slopes", torch.arange(4) * 0.1)

    @property
    def window(self):
        return self._n

    @classmethod
    def near(cls, n, i, j):
        return (i - j).abs() <= n

    def mask(self, b, h, i, j):
        return self.near(self.window, i, j)

    def forward(self, b, h, i, j):
        return self.mask(b, h, i, j)

    def bias(self, score, b, h, i, j):
        return score + self.slopes[h] * (i - j)


class Asked:
    def __getattr__(self, name):
        return {"window": settings.window}[name]


def by_global(b, h, i, j):
    return (i - j).abs() <= WINDOW


def helper(i, j):
    return (i - j).abs() <= Config.window


def by_default(b, h, i, j, n=3, *, more=0):
    return (i - j).abs() <= n + more


def changed(n: int) -> None:
    """All that functions below read."""
    global WINDOW
    WINDOW = settings.window = Config.window = TABLE["windows"][1] = n
    settings.near = lambda i, j: (i - j).abs() <= n
    settings.config = Config
    by_default.__defaults__ = (n - 1,)
    by_default.__kwdefaults__ = dict(more=1)


def readers(n: int) -> dict:
    """Mask mods of a window of n, which read it in every way that Python has."""
    changed(n)
    data, pair, width, asked, array = Data(n), Pair(0, n), Widths(n), Asked(), np.array([n])
    return {
        "closure": lambda b, h, i, j: (i - j).abs() <= n,
        "global": by_global,
        "defaults": by_default,
        "partial": functools.partial(lambda n, b, h, i, j: (i - j).abs() <= n, n),
        "module": lambda b, h, i, j: (i - j).abs() <= settings.window,
        "module of a class": lambda b, h, i, j: (i - j).abs() <= settings.config.window,
        "class": lambda b, h, i, j: (i - j).abs() <= Config.window,
        "by its name": lambda b, h, i, j: (i - j).abs() <= getattr(Config, "win" + "dow"),
        "helper's class": lambda b, h, i, j: helper(i, j),
        "module's helper": lambda b, h, i, j: settings.near(i, j),
        "items": lambda b, h, i, j: (i - j).abs() <= TABLE["windows"][-1],
        "dataclass": lambda b, h, i, j: (i - j).abs() <= data.window,
        "named tuple": lambda b, h, i, j: (i - j).abs() <= pair.window,
        "enum": lambda b, h, i, j: (i - j).abs() <= width,
        "asked object": lambda b, h, i, j: (i - j).abs() <= asked.window,
        "numpy": lambda b, h, i, j: (i - j).abs() <= array[0],
        "loop": lambda b, h, i, j: functools.reduce(operator.or_, [(i - j).abs() == m for m in range(n + 1)]),
        "method": Layer(n).mask,
        "nn.Module": Layer(n),
    }


FACTOR, SHIFT = torch.tensor(0.75), torch.tensor(2, dtype=torch.int32)
FLAG, BYTES = torch.tensor(True), torch.tensor([3, 200, 7, 8, 9, 255, 0], dtype=torch.uint8)
WHOLE = ["add", "sub", "mul", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor"]
UNARY = "exp exp2 log log2 sqrt rsqrt sin cos floor tanh sigmoid square relu neg abs"
OPERANDS = {  # of each operator of whole numbers, from the query's number
    "number, int": lambda i: (i + 1, 3),
    "number, tensor": lambda i: (i + 1, SHIFT),
    "int, number": lambda i: (7, i + 1),
    "tensor, number": lambda i: (SHIFT, i + 1),
    "tensor, int": lambda i: (SHIFT, 3),
    "int, tensor": lambda i: (3, SHIFT),
    "tensor, tensor": lambda i: (SHIFT, SHIFT),
}


def operated(name: str, operands: str):
    operation, of = getattr(operator, name), OPERANDS[operands]
    return lambda s, b, h, i, j: s + operation(*of(i)).float()


def of_float(name: str):
    return lambda s, *_: getattr(torch, name)(s.abs() + 0.5)


OPERATED = {
    **{f"{name} of {operands}": operated(name, operands) for name in WHOLE for operands in OPERANDS},
    **{name: of_float(name) for name in UNARY.split()},
    "division": lambda s, b, h, i, j: s / FACTOR + 2 / FACTOR + FACTOR / 2 + 1 / (i + 1) + torch.div(s, 2),
    "powers": lambda s, b, h, i, j: s**2 + 2**FACTOR + FACTOR**3 + (i + 1) ** 0.5 + j**3 + torch.pow(s, exponent=2),
    "signs": lambda s, b, h, i, j: -s + abs(i - j) + -FACTOR + abs(FACTOR) + +s + +FACTOR,
    "truths": lambda s, b, h, i, j: torch.where(~(i > j) & (FLAG ^ (j == 3)) | ~FLAG, s, input_of(i, j)),
    "logic": lambda s, b, h, i, j: torch.where(torch.logical_xor(i, j % 2).logical_or(i > 3).logical_and(j), s, 0),
    "sums of truths": lambda s, b, h, i, j: torch.where((i > j) + (j > 4), s, 1) * torch.where((i > 1) * (j > 1), 2, 3),
    "clamp": lambda s, b, h, i, j: s.clamp(-1, 1) + torch.clamp(i - j, min=-2) + (i - j).clamp(max=FACTOR),
    "bounds": lambda s, b, h, i, j: torch.maximum(s, FACTOR) + torch.min(i, j) + (i - j).maximum(SHIFT),
    "casts": lambda s, b, h, i, j: (
        s.int() + s.long() * 2 + s.bool() + (i > j).to(torch.int32) + j.to(dtype=torch.float32)
    ),
    "constants": lambda s, b, h, i, j: (
        s * torch.ones_like(s) + torch.zeros_like(i) + torch.full_like(s, 2.5) + s.new_ones((), dtype=torch.int64)
    ),
    "bytes": lambda s, b, h, i, j: s + BYTES[j] + BYTES[-2] + BYTES[:2].size(0) + BYTES.shape[0],
    "rounding down": lambda s, b, h, i, j: (
        s
        + SIGNED[j] // 4
        + SIGNED[j] % 4
        + (i - j).clamp(min=-3) // 2
        + torch.where(i > j, -5, -7) % 3
        + -SIGNED[i] % -5
    ),
    "rows": lambda s, b, h, i, j: s + TABLES[1][h][j] + TABLES[1, h, j] + TABLES[b, 2][j] + TABLES[b][0, -1],
    "wide": lambda s, b, h, i, j: s + (i + 3_000_000_000) % 7 + (i - 2**40) // 2**39 + (i < 2**33),
    "products": lambda s, b, h, i, j: s + ((i + 100) * 77_777 * (j + 50) * 999) % 1009 + (i + 90_000) ** 2 % 101,
    "float from far": lambda s, b, h, i, j: s + (s < 1e300) + s * 1e-300 + (s - 1e300).sigmoid(),
    "a score that is a number": lambda s, b, h, i, j: 1.5,
    "a score that is whole": lambda s, b, h, i, j: j - i,
    "a score that is a truth": lambda s, b, h, i, j: i > j,
    "a score that is True": lambda s, b, h, i, j: True,
    "a score that is a tensor": lambda s, b, h, i, j: FACTOR,
}
SIGNED = torch.tensor([-5, 7, -8, 3, -1, 0, 11], dtype=torch.int32)
TABLES = torch.arange(2 * 3 * 8, dtype=torch.float32).view(2, 3, 8)


TOGETHER = {  # each some of OPERATED, in one kernel; sin and cos have local memory, which is not interpreted
    "floats": ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "floor", "tanh", "sigmoid", "relu", "square", "neg"],
    "whole numbers": [*(f"{x} of tensor, number" for x in WHOLE), "division", "powers", "signs"],
    "of tensors": ["bytes", "rows", "rounding down", "float from far"],
    "wide ones": ["wide", "products"],
    "truths": ["truths", "logic", "sums of truths", "clamp", "bounds", "casts", "constants"],
    "a truth": ["a score that is a truth"],
}


def together(names):
    """One function, whose scores stay small."""
    if len(names) == 1:
        return OPERATED[names[0]]

    def mod(score, *places):
        for name in names:
            score = score + OPERATED[name](score.tanh(), *places) * (0.01 if name != "products" else 0.001)
        return score

    return mod


def input_of(i, j):
    return torch.where(i > 1, 1.0, (j + 0.5))
