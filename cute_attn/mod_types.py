"""The types of a score_mod's or mask_mod's numbers, which the kernel and the CPU then have alike.

Places and other whole numbers are int32, and int64 where a tensor is, or where places and constants may give more than
32 bits. Floats are float32. What torch refuses of truths, whole numbers and floats is refused here.
"""

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .kernels.user_mod import CONSTANT
from .mod_trace import Argument, Refused, Taken

PLACE_MAX = (1 << 26) - 1  # places that functions see: so sums of them, and products by small numbers, are int32
NUMBER_MAX = 1 << 24  # of aux's numbers that are int32; others are int64
POWER_MAX = 8  # exponents of whole numbers


class Kind(NamedTuple):
    """A number's type, and of a whole number the least and the most that it is, where that is known."""

    word: str  # "bool", "int32", "int64", "float32"
    span: tuple[int, int] | None = None

    @property
    def extent(self) -> tuple[int, int]:
        return self.span or LIMITS[self.word]


LIMITS = {"bool": (0, 1), "int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1)}
BOOL, FLOAT = Kind("bool", (0, 1)), Kind("float32")
LOADED = {
    **dict.fromkeys(("float32", "float16", "bfloat16", "float"), FLOAT),
    **dict.fromkeys(("int64", "long"), Kind("int64")),
    "int32": Kind("int32"),
    "uint8": Kind("int32", (0, 255)),
    "bool": BOOL,
    "int": Kind("int32", (-NUMBER_MAX, NUMBER_MAX)),
}
PLACE = Kind("int32", (0, PLACE_MAX))
PLACES = dict(score_mod=(FLOAT, PLACE, PLACE, PLACE, PLACE), mask_mod=(PLACE, PLACE, PLACE, PLACE))
CAST = dict(float32="float", int32="int", int64="long", bool="bool")
OF_TRUTHS = dict(add="bitwise_or", maximum="bitwise_or", mul="bitwise_and", minimum="bitwise_and")


def typed(name: str, taken: Taken, words: list[str]) -> tuple[tuple[tuple, ...], Argument]:
    """Its nodes, with what their types need between them, and its result; words: of the slots' elements.

    Raises:
        TypeError: a number has a type that an operation, or the result, cannot have; the message names both.
    """
    typing, at = Typing(PLACES[name]), list[Argument](range(len(PLACES[name])))

    def of(x):
        return typing.constant(x) if isinstance(x, tuple) else at[x]

    for operation, *arguments in taken.nodes:
        if operation == "load":
            slot, *index = arguments
            at.append(typing.load(slot, words[slot], [of(x) for x in index]))
        elif operation == "full":
            like, value, word = arguments
            at.append(RULES[word or CAST[typing.kind(of(like)).word]](typing, of(value)))
        else:
            at.append(RULES[operation](typing, *map(of, arguments)))
    result = of(taken.result)
    word = typing.kind(result).word
    if name == "score_mod":
        result = RULES["float"](typing, result)
    elif word != "bool":
        raise Refused(f"its result is {word}, and a truth is needed: say which pairs attend, as by `!= 0`")
    return tuple(typing.nodes), result


class Typing:
    """Nodes with their kinds, behind those of the places. An argument is as in `mod_trace`."""

    def __init__(self, places: tuple[Kind, ...]):
        self.kinds: list[Kind] = list(places)
        self.nodes: list[tuple] = []

    def kind(self, x: Argument) -> Kind:
        if not isinstance(x, tuple):
            return self.kinds[x]
        value = CONSTANT[x[0]](x[1])
        if x[0] == "int":
            return Kind("int32", (value, value))
        return FLOAT if x[0] == "float" else BOOL

    def node(self, kind: Kind, *node) -> Argument:
        self.nodes.append(node)
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def constant(self, x: tuple[str, str]) -> Argument:
        """A whole number beyond int32 is int64; a float beyond float32 is infinite or 0, as torch has it."""
        value = CONSTANT[x[0]](x[1])
        if x[0] == "float":
            near = ctypes.c_float(value).value
            return ("float", near.hex()) if value and (math.isinf(near) or not near) else x
        if x[0] == "bool":
            return x
        if within((value, value), "int32"):
            return x
        if not within((value, value), "int64"):
            raise Refused(f"the number {value:.3e} came, and whole numbers of 64 bits are taken; use a float")
        return self.node(Kind("int64", (value, value)), "long", x)

    def load(self, slot: int, word: str, index: list[Argument]) -> Argument:
        for x in index:
            if self.kind(x).word not in ("int32", "int64"):
                raise Refused(f"a {self.kind(x).word} came as an index; a whole number is needed: use .int()")
        return self.node(LOADED[word], "load", slot, *index)

    def whole(self, operation: str, *xs: Argument) -> None:
        for x in xs:
            if self.kind(x).word == "float32":
                raise Refused(f"{operation} of a float32 is not known to a kernel; truths and whole numbers are taken")

    def numeric(self, operation: str, *xs: Argument) -> None:
        """No truths alone."""
        if all(self.kind(x).word == "bool" for x in xs):
            raise Refused(f"{operation} of truths is not known to a kernel; use &, | and ~, or .int()")


def within(span: tuple[int, int], word: str) -> bool:
    low, high = LIMITS[word]
    return low <= span[0] and span[1] <= high


def arithmetic(operation: str, span: Callable, typing: Typing, a: Argument, b: Argument) -> Argument:
    x, y = typing.kind(a), typing.kind(b)
    if "float32" in (x.word, y.word):
        return typing.node(FLOAT, operation, a, b)
    if x.word == y.word == "bool" and operation in OF_TRUTHS:
        return typing.node(BOOL, OF_TRUTHS[operation], a, b)
    typing.numeric(operation, a, b)
    found = span(x, y)
    word = "int64" if "int64" in (x.word, y.word) else "int32"
    if found and word == "int32" and not within(found, word):
        a, word = typing.node(x._replace(word="int64"), "long", a), "int64"
    return typing.node(Kind(word, found if found and within(found, word) else None), operation, a, b)


def known(span: Callable) -> Callable:
    """None where one of both is not known: a tensor's int32 stay int32, as torch's do."""
    return lambda x, y: span(x.span, y.span) if x.span and y.span else None


def product(x: Kind, y: Kind) -> tuple[int, int] | None:
    """Two numbers of tensors stay int32; one and a place may be more."""
    if not x.span and not y.span:
        return None
    every = [m * n for m in x.extent for n in y.extent]
    return min(every), max(every)


def divided(operation: str, typing: Typing, a: Argument, b: Argument) -> Argument:
    if isinstance(b, tuple) and b[0] == "int" and CONSTANT["int"](b[1]) == 0 and typing.kind(a).word != "float32":
        raise Refused(f"{operation} of a whole number by 0")
    return arithmetic(operation, SPANS[operation], typing, a, b)


def quotient(x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    most = max(map(abs, x))
    return (min(x[0], 0), max(x[1], 0)) if y[0] > 0 else (-most, most)


def remainder(_, y: tuple[int, int]) -> tuple[int, int]:
    return min(y[0] + 1, 0), max(y[1] - 1, 0)


SPANS: dict[str, Callable] = {
    "add": known(lambda x, y: (x[0] + y[0], x[1] + y[1])),
    "sub": known(lambda x, y: (x[0] - y[1], x[1] - y[0])),
    "mul": product,
    "minimum": known(lambda x, y: (min(x[0], y[0]), min(x[1], y[1]))),
    "maximum": known(lambda x, y: (max(x[0], y[0]), max(x[1], y[1]))),
    "floor_divide": known(quotient),
    "remainder": known(remainder),
}


def compared(operation: str, typing: Typing, a: Argument, b: Argument) -> Argument:
    return typing.node(BOOL, operation, a, b)


def of_floats(operation: str, typing: Typing, *xs: Argument) -> Argument:
    return typing.node(FLOAT, operation, *xs)


def bits(operation: str, typing: Typing, a: Argument, b: Argument) -> Argument:
    typing.whole(operation, a, b)
    x, y = typing.kind(a), typing.kind(b)
    if x.word == y.word == "bool":
        return typing.node(BOOL, operation, a, b)
    word = "int64" if "int64" in (x.word, y.word) else "int32"
    least, most = min(x.extent[0], y.extent[0]), max(x.extent[1], y.extent[1])
    span = (0, (1 << most.bit_length()) - 1) if least >= 0 else None
    return typing.node(Kind(word, span), operation, a, b)


def of_truths(operation: str, typing: Typing, *xs: Argument) -> Argument:
    return typing.node(BOOL, operation, *(cast("bool", "bool", typing, x) for x in xs))


def invert(typing: Typing, a: Argument) -> Argument:
    typing.whole("invert", a)
    kind = typing.kind(a)
    span = kind.span if kind.word == "bool" else kind.span and _mirrored(kind.span, -1)
    return typing.node(kind._replace(span=span), "invert", a)


def _mirrored(span: tuple[int, int], shift: int = 0) -> tuple[int, int]:
    return shift - span[1], shift - span[0]


def signed(operation: str, span: Callable, typing: Typing, a: Argument) -> Argument:
    typing.numeric(operation, a)
    kind = typing.kind(a)
    found = kind.span and span(kind.span)
    if found and kind.word == "int32" and not within(found, "int32"):
        a, kind = typing.node(kind._replace(word="int64"), "long", a), Kind("int64")
    return typing.node(kind._replace(span=found), operation, a)


def power(typing: Typing, a: Argument, b: Argument) -> Argument:
    """Of a whole number, by a constant, by multiplications; else a float's."""
    typing.numeric("pow", a)
    n = CONSTANT["int"](b[1]) if isinstance(b, tuple) and b[0] == "int" else -1
    if typing.kind(a).word == "float32" or not 0 <= n <= POWER_MAX:
        return typing.node(FLOAT, "pow", a, b)
    found: Argument = ("int", "1")
    for i in range(n):
        found = RULES["mul"](typing, found, a) if i else a
    return found


def where(typing: Typing, condition: Argument, a: Argument, b: Argument) -> Argument:
    typing.whole("where", condition)
    x, y = typing.kind(a), typing.kind(b)
    if isinstance(condition, tuple):
        return a if CONSTANT[condition[0]](condition[1]) else b
    if x.word == y.word == "bool":
        return typing.node(BOOL, "where", condition, a, b)
    if "float32" in (x.word, y.word):
        return typing.node(FLOAT, "where", condition, a, b)
    span = x.span and y.span and (min(x.span[0], y.span[0]), max(x.span[1], y.span[1]))
    return typing.node(
        Kind("int64" if "int64" in (x.word, y.word) else "int32", span or None), "where", condition, a, b
    )


def cast(operation: str, word: str, typing: Typing, a: Argument) -> Argument:
    """A whole number of known size is int64 where it must be."""
    kind = typing.kind(a)
    if kind.word == word or (operation == "long" and kind.word == "int32" and kind.span):
        return a
    whole = operation in ("int", "long") and kind.span and within(kind.span, word)
    return typing.node(BOOL if word == "bool" else Kind(word, kind.span if whole else None), operation, a)


RULES: dict[str, Callable[..., Any]] = {
    **{name: partial(arithmetic, name, SPANS[name]) for name in ("add", "sub", "mul", "minimum", "maximum")},
    **{name: partial(divided, name) for name in ("floor_divide", "remainder")},
    **{name: partial(compared, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{name: partial(of_floats, name) for name in ("true_divide", "exp", "exp2", "log", "log2", "sqrt", "rsqrt")},
    **{name: partial(of_floats, name) for name in ("sin", "cos", "floor", "tanh", "sigmoid")},
    **{name: partial(bits, name) for name in ("bitwise_and", "bitwise_or", "bitwise_xor")},
    **{f"logical_{name}": partial(of_truths, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "logical_not": partial(of_truths, "invert"),
    "invert": invert,
    "neg": partial(signed, "neg", _mirrored),
    "abs": partial(signed, "abs", lambda span: (0, max(map(abs, span)))),
    "square": lambda typing, a: RULES["mul"](typing, a, a),
    "relu": lambda typing, a: RULES["maximum"](typing, a, ("int", "0")),
    "pow": power,
    "where": where,
    **{name: partial(cast, name, word) for word, name in CAST.items()},
}
