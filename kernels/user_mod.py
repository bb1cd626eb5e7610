"""A user's function inside the kernel: FlexAttention's score_mod and mask_mod (Dong et al., arXiv:2412.05496).

It comes as a list of nodes, which `cute_attn/mods.py` makes of it, and is worked out once for each score while the
kernel is traced, with a `Value` for each number and an `Array` for each tensor that it reads.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_tensor
from cutlass.cutlass_dsl import select_

from .layout import not_before, within_thread

ELEMENT = {
    "float32": Float32,
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "int64": Int64,
    "int32": Int32,
    "uint8": cutlass.Uint8,
    "bool": cutlass.Uint8,
}
AHEAD = 12  # columns whose tensors' elements are read at once: ptxas would read all, and spill
FAR = 1 << 30  # differences of places and of smaller numbers are int32
NUMBER = {"int": Int32, "long": Int64, "float": Float32}  # arguments that are no tensors
CONSTANT: dict[str, Callable] = {
    "int": partial(int, base=16),
    "float": float.fromhex,
    "bool": "1".__eq__,
}  # from its text


@dataclass(frozen=True)
class UserMod:
    """A function of scores or of places, and what it takes at run time. Two are equal whose keys are.

    A node is ("load", which of `arrays`, *indices) or one of FUNCTIONS and its arguments. An index, an argument or the
    result is the number of a place or, counted on from these, of a node; or a constant: its type and its text.
    """

    key: str  # of all that follows
    arrays: tuple[tuple[str, int, bool], ...]  # element type, rank, last stride of 1; a word of NUMBER: a number
    nodes: tuple[tuple, ...] = field(compare=False, repr=False)
    result: Any = field(compare=False, repr=False)

    def signature(self) -> tuple:
        return tuple(NUMBER[word](0) if word in NUMBER else _fake(word, *how) for word, *how in self.arrays)

    def bind(self, args: tuple, reach: "Reach | None" = None) -> Callable:
        """The function on numbers of the kernel; args: those of `signature`."""
        stand_ins = [_stand_in(x, word, reach) for x, (word, *_) in zip(args, self.arrays, strict=True)]
        return lambda *numbers: number(
            worked_out(self, [x if isinstance(x, Value) else Value(x) for x in numbers], stand_ins, FUNCTIONS)
        )

    @cute.jit
    def of_block(self, S: cute.Tensor, cS: cute.Tensor, at, tile_n: cutlass.Constexpr, args, change: cutlass.Constexpr):
        """S[r, c] (rows, cols) becomes change(function, S[r, c], (q_idx, kv_idx)).

        Where all indices that follow the places lie inside of their tensors, as in most blocks, none is asked again.
        """
        block = Block(S, cS, at.rows, not_before(S, at.n_block), tile_n)
        reach = Reach()
        inside = reach.of(block, self.bind(args, reach), change)
        if cutlass.const_expr(reach.spans):
            if cute.arch.vote_all_sync(inside):
                block.each(self.bind(args, reach), change, reach)
            else:
                block.each(self.bind(args), change)
        else:
            block.each(self.bind(args), change)


def worked_out(mod: UserMod, places: list, arrays, functions: dict[str, Callable]) -> Any:
    """A mod's result; arrays: of each of its own what is indexed, or is a number; functions: of each operation."""
    values = list(places)

    def of(argument):
        return CONSTANT[argument[0]](argument[1]) if isinstance(argument, tuple) else values[argument]

    for operation, *arguments in mod.nodes:
        if operation == "load":
            array, *index = arguments
            values.append(arrays[array][tuple(map(of, index))] if index else arrays[array])
        else:
            values.append(functions[operation](*map(of, arguments)))
    return of(mod.result)


def _fake(word: str, rank: int, contiguous: bool):
    shape, strides = [cute.sym_int() for _ in range(rank)], [cute.sym_int64() for _ in range(rank)]
    return make_fake_tensor(ELEMENT[word], shape, [*strides[:-1], 1] if contiguous else strides)


def _stand_in(x, word: str, reach: "Reach | None"):
    if word in NUMBER:
        return Value(x)
    array = Array(x, word, reach)
    return array[()] if cute.rank(x) == 0 else array


class Block(NamedTuple):
    """Of scores, (rows, cols) of a thread."""

    S: cute.Tensor
    cS: cute.Tensor
    rows: Any
    n_block: Int32
    tile_n: int

    def places(self, r: int, c: int) -> tuple["Place", "Place"]:
        """The query and the key of a score."""
        first, (row, col) = self.cS[0, 0], within_thread(r, c)
        return Place(self.rows.row0 + first[0], row), Place(self.n_block * self.tile_n + first[1], col)

    def one(self, function: Callable, change: Callable, r: int, c: int):
        return change(function, self.S[r, c], self.rows, self.places(r, c))

    def each(self, function: Callable, change: Callable, reach: "Reach | None" = None) -> None:
        block = self
        for c in range(cute.size(self.S, mode=[1])):
            if c and c % AHEAD == 0:
                block = self._replace(n_block=not_before(self.S[None, c - 1], self.n_block))
            for r in range(cute.size(self.S, mode=[0])):
                if reach:
                    reach.begin()
                self.S[r, c] = block.one(function, change, r, c)


class Reach:
    """How far the places that a function takes as indices go beyond what a block of scores shares.

    `spans`: of the n-th index of a call what is shared, the least and the most that is its own, and the last place.
    """

    def __init__(self):
        self.spans: dict[int, tuple] = {}
        self.noting, self.n = True, 0

    def begin(self) -> None:
        """A call of the function."""
        self.n = 0

    def of(self, block: Block, function: Callable, change: Callable):
        """Whether all indices of a block lie inside: sums and differences of places are extreme at its corners."""
        last = [cute.size(block.S, mode=[i]) - 1 for i in range(2)]
        for r, c in ((0, 0), (0, last[1]), (last[0], 0), tuple(last)):
            self.begin()
            block.one(function, change, r, c)
        self.noting, inside = False, Boolean(True)
        for shared, least, most, end in self.spans.values():
            inside = inside & (shared + least >= 0) & (shared + most <= end)
        return inside

    def covers(self, i, last) -> bool:
        """Whether an index is one of those that are asked for all at once; while they are noted, none is."""
        n, own = self.n, i.own if isinstance(i, Place) else None
        self.n += 1
        if not isinstance(own, int):
            return False
        if self.noting:
            shared, least, most, end = self.spans.get(n, (i.shared, own, own, last))
            self.spans[n] = shared, min(least, own), max(most, own), end
            return False
        return n in self.spans and self.spans[n][1] <= own <= self.spans[n][2]


class Array:
    """A tensor that a mod reads. An index beyond its end is taken for the last: nothing is read outside of it."""

    def __init__(self, tensor: cute.Tensor, word: str, reach: Reach | None = None):
        self.tensor, self.word, self.reach = tensor, word, reach

    def __getitem__(self, index: tuple):
        x = self._at([self._inside(i, axis) for axis, i in enumerate(index)])
        if self.word == "bool":
            return Value(x != 0)
        return Value(x.to(Float32) if isinstance(x, cutlass.Float) else x.to(Int32) if x.width < 32 else x)

    def _inside(self, i, axis: int):
        """An index as what is shared by a block and what is its own."""
        last = Int32(self.tensor.shape[axis]) - 1
        if self.reach and self.reach.covers(i, last):
            return i.shared, i.own
        i = number(i)
        if isinstance(i, Int64):
            return Int32(cutlass.max(cutlass.min(i, Int64(last)), Int64(0))), 0
        return cutlass.max(cutlass.min(Int32(i), last), 0), 0

    def _at(self, index: list[tuple]):
        """An element, by an address that the elements of a block share, as far as they do."""
        shared, own = (tuple(part) for part in zip(*index, strict=True)) if index else ((), ())
        if not any(own):
            return self.tensor[shared]
        layout = self.tensor.layout
        at = self.tensor.iterator + cute.crd2idx(shared, layout) + cute.crd2idx(own, layout)
        return cute.make_tensor(at, cute.make_layout(1))[0]


def number(x):
    """What a Value holds, or a Python number as it is."""
    return x.x if isinstance(x, Value) else x


def kind(x) -> int:
    """0: a truth, 1: an integer, 2: a float."""
    if isinstance(x, (bool, Boolean)):
        return 0
    return 1 if isinstance(x, (int, cutlass.Integer)) else 2


def truth(x):
    x = number(x)
    return x if isinstance(x, (bool, Boolean)) else x != 0


def alike(*xs, least: int = 1):
    """Numbers of one type: float32 where one is a float, else int64 or int32."""
    if max(least, *(kind(number(x)) for x in xs)) == 2:
        return [x.as_float() if isinstance(x, Place) else Float32(number(x)) for x in xs]
    xs = tuple(map(number, xs))
    wide = any(isinstance(x, Int64) for x in xs)
    return [(Int64 if wide else Int32)(x) for x in xs]


def arithmetic(op, least: int = 1) -> Callable:
    return lambda a, b: Value(op(*alike(a, b, least=least)))


def logic(op) -> Callable:
    """Of truths; of integers bit by bit."""
    return lambda a, b: Value(op(*(map(Boolean, (number(a), number(b))) if is_truth(a, b) else alike(a, b))))


def is_truth(*xs) -> bool:
    return all(kind(number(x)) == 0 for x in xs)


def quotient(a, b):
    """Rounded down, as torch does; the DSL rounds some whole numbers down, and some towards 0."""
    if isinstance(a, Float32):
        return cute.math.floor(a / b)
    found = a // b
    rest = a - found * b
    return found - type(a)((rest != 0) & ((rest < 0) ^ (b < 0)))


def of_float(function) -> Callable:
    return lambda a: Value(function(*alike(a, least=2)))


def where(condition, a, b) -> "Value":
    condition = truth(condition)
    if isinstance(condition, bool):
        return Value(number(a if condition else b))
    a, b = map(Boolean, (number(a), number(b))) if is_truth(a, b) else alike(a, b)
    return Value(type(a)(select_(condition, a, b)))


def invert(a) -> "Value":
    return Value(Int32(truth(a)) == 0) if is_truth(a) else Value(~number(a))


def power(a, exponent) -> "Value":
    n = number(exponent)
    if isinstance(n, int) and 0 <= n <= 8:
        product = Value(1)
        for _ in range(n):
            product = product * a
        return product
    return Value(cute.math.pow(*alike(a, exponent, least=2)))


def _sigmoid(x):
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(x * -1.4426950408889634, fastmath=True))


def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


minimum, maximum = arithmetic(cutlass.min), arithmetic(cutlass.max)
OPERATORS: dict[str, Callable] = {
    **{name: arithmetic(getattr(operator, name)) for name in ("add", "sub", "mul")},
    "floordiv": arithmetic(lambda a, b: quotient(a, b)),
    "mod": arithmetic(lambda a, b: a - quotient(a, b) * b),
    **{name: arithmetic(getattr(operator, name)) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "truediv": arithmetic(operator.truediv, least=2),
    "pow": power,
    **{name: logic(getattr(operator, f"{name}_")) for name in ("and", "or")},
    "xor": logic(operator.xor),
}
FUNCTIONS: dict[str, Callable] = {
    **{name: OPERATORS[name] for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "pow")},
    "floor_divide": OPERATORS["floordiv"],
    "remainder": OPERATORS["mod"],
    "true_divide": OPERATORS["truediv"],
    **{f"bitwise_{name}": OPERATORS[name] for name in ("and", "or", "xor")},
    "invert": invert,
    "where": where,
    "minimum": minimum,
    "maximum": maximum,
    "abs": lambda a: maximum(a, -a),
    "neg": lambda a: -a,
    "exp": of_float(partial(cute.math.exp, fastmath=True)),
    "exp2": of_float(partial(cute.math.exp2, fastmath=True)),
    "log": of_float(partial(cute.math.log, fastmath=True)),
    "log2": of_float(partial(cute.math.log2, fastmath=True)),
    "sqrt": of_float(cute.math.sqrt),
    "rsqrt": of_float(cute.math.rsqrt),
    "sin": of_float(cute.math.sin),
    "cos": of_float(cute.math.cos),
    "floor": of_float(cute.math.floor),
    "tanh": of_float(_tanh),
    "sigmoid": of_float(_sigmoid),
    "float": of_float(lambda a: a),
    "int": lambda a: Value(Int32(number(a))),
    "long": lambda a: Value(Int64(number(a))),
    "bool": lambda a: Value(truth(a)),
}


class Value:
    """A number of the kernel: a score, a place, or an element of an Array."""

    def __init__(self, x):
        self.x = number(x)

    def __bool__(self):
        raise TypeError("a kernel's number has no value yet")

    def __neg__(self):
        return Value(-alike(self)[0])

    __hash__ = None  # type: ignore[assignment]


class Place(Value):
    """A query's or a key's number, or a sum of such: what the scores of a block share, and what is this score's own.

    A float of it is a float of what is shared, once for all, and a sum: exact below 2^24, and half as much work.
    """

    def __init__(self, shared, own):
        super().__init__(shared + own)
        self.shared, self.own = shared, own

    def as_float(self):
        return Float32(self.shared) + Float32(self.own)


def of_places(op: Callable, value: Callable) -> Callable:
    """op of two places, or of one and a whole number; of anything else `value`."""

    def as_place(x):
        whole = isinstance(x, int) and not isinstance(x, bool) and abs(x) < FAR
        return x if isinstance(x, Place) else Place(x, 0) if whole else None

    def of(a, b):
        x, y = as_place(a), as_place(b)
        return value(a, b) if x is None or y is None else op(x, y)

    return of


def scaled(value: Callable) -> Callable:
    """A place times a Python float: what is shared is multiplied once for a block; of anything else `value`."""

    def of(a, b):
        place, factor = (a, b) if isinstance(a, Place) else (b, a)
        if not (isinstance(place, Place) and isinstance(factor, float)):
            return value(a, b)
        return Value(Float32(place.shared) * factor + place.own * factor)

    return of


def shifted(op) -> Callable:
    """Sums and differences of places are places."""
    return lambda x, y: Place(op(x.shared, y.shared), op(x.own, y.own))


def compared(op) -> Callable:
    """What is shared against what is the score's own, which the compiler knows."""
    return lambda x, y: Value(op(x.shared - y.shared, y.own - x.own))


for _of, _names in (shifted, ("add", "sub")), (compared, ("lt", "le", "gt", "ge", "eq", "ne")):
    for _name in _names:
        OPERATORS[_name] = FUNCTIONS[_name] = of_places(_of(getattr(operator, _name)), OPERATORS[_name])
OPERATORS["mul"] = FUNCTIONS["mul"] = scaled(OPERATORS["mul"])


def _install(name: str, op: Callable) -> None:
    setattr(Value, f"__{name}__", lambda a, b: op(a, b))
    setattr(Value, f"__r{name}__", lambda a, b: op(b, a))


for _name, _op in OPERATORS.items():
    _install(_name, _op)
