"""A user's score_mod or mask_mod written down: Python runs it once, on symbols that note what is done to them.

Whatever it reads on its way (globals, closures, attributes of modules, classes and objects, what helpers read in turn)
is read by Python itself, at that moment. So the nodes are all that the function decides, and nothing else is.
"""

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

Argument = int | tuple[str, str]  # the number of a place or a node; or a constant, its type and its text
UNARY = "neg abs square relu exp exp2 log log2 sqrt rsqrt sin cos floor tanh sigmoid float int long bool logical_not"
BINARY = (
    "add sub mul pow lt le gt ge eq ne minimum maximum bitwise_and bitwise_or bitwise_xor logical_and logical_or "
    "logical_xor floor_divide remainder true_divide"
)
MEANS = dict(min="minimum", max="maximum", div="true_divide", bitwise_not="invert")  # operations by another name
OPERATORS = {name: name for name in ("add", "sub", "mul", "pow", "lt", "le", "gt", "ge", "eq", "ne")} | {
    **dict(floordiv="floor_divide", mod="remainder", truediv="true_divide"),
    **{name: f"bitwise_{name}" for name in ("and", "or", "xor")},
}
DUNDERS = {f"__{name}__": function for name, function in OPERATORS.items()} | {"__invert__": "bitwise_not"}
REFLECTED = {f"__r{name}__": function for name, function in OPERATORS.items()} | {"__rdiv__": "true_divide"}
KINDS: tuple[tuple[type, Callable], ...] = (numbers.Integral, int), (numbers.Real, float)
CASTS = {torch.float32: "float", torch.int32: "int", torch.int64: "long", torch.bool: "bool"}
OF_TENSORS = """__get__ __len__ size dim numel stride element_size is_floating_point is_contiguous get_device detach
select narrow view view_as expand expand_as transpose permute movedim t squeeze unsqueeze unflatten alias positive"""
UNREAD = frozenset(OF_TENSORS.split())  # nothing is copied, and no element is read
READ = frozenset(
    ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__")
)


class Refused(Exception):
    """What a kernel cannot hold or do. No TypeError, which torch's operators would take for an operand not theirs."""


class Taken(NamedTuple):
    """A function's nodes, (operation, *arguments), its result, and the tensors and numbers that it reads."""

    nodes: tuple[tuple, ...]
    result: Argument
    slots: list


def take(function: Callable, places: int, aux: tuple) -> Taken:
    """Of function(*places, *aux)."""
    trace = Trace(places)
    given = [trace.number(x) if not isinstance(x, torch.Tensor) else x for x in map(trace.slot, aux)]
    with trace:
        result = trace.result(function(*(Symbol(trace, i) for i in range(places)), *given))
    return Taken(tuple(trace.nodes), result, trace.slots)


class Trace(TorchFunctionMode):
    """Of one run. As a mode it sees what torch is asked to do with tensors that the function reads."""

    def __init__(self, places: int):
        self.places = places
        self.nodes: list[tuple] = []
        self.slots: list = []
        self._known: dict[int, int] = {}  # a tensor's slot, by its id

    def node(self, *node) -> "Symbol":
        self.nodes.append(node)
        return Symbol(self, self.places + len(self.nodes) - 1)

    def slot(self, x):
        self._known[id(x)] = len(self.slots)
        self.slots.append(x)
        return x

    def number(self, x) -> "Symbol":
        """An element of what has no dimensions: a tensor without, or a number among aux, the last that came."""
        if not isinstance(x, torch.Tensor):
            return self.node("load", len(self.slots) - 1)
        return self.load(x, ())

    def load(self, tensor: torch.Tensor, index: tuple) -> "Symbol":
        if id(tensor) not in self._known:
            self.slot(tensor)
        return self.node("load", self._known[id(tensor)], *index)

    def argument(self, x) -> Argument:
        kind = type(x)
        if kind is Symbol:
            if x._trace is not self:
                raise Refused("a number of an earlier call was kept, and used in this one")
            return x._ref
        if kind is float:
            return "float", x.hex()
        if kind is int:
            return "int", format(x, "x")
        return self._seldom(x)

    def _seldom(self, x) -> Argument:
        if isinstance(x, bool):
            return "bool", format(x, "x")
        if isinstance(x, Row):
            rank = len(x._index)
            raise Refused(f"a tensor with {rank} of its {x._tensor.dim()} indices came where a number is needed")
        if isinstance(x, torch.Tensor):
            if x.dim():
                hint = "index it to one element, or compute with it before the call"
                raise Refused(f"a tensor of shape {tuple(x.shape)} came where a number is needed; {hint}")
            return self.load(x, ())._ref
        if type(x).__module__ == "numpy" and getattr(x, "ndim", 1) == 0:
            return self.argument(x.item())
        for real, kind in KINDS:
            if isinstance(x, real):
                return self.argument(kind(x))
        raise Refused(f"{type(x).__module__}.{type(x).__name__} came where a number is needed")

    def result(self, x) -> Argument:
        try:
            return self.argument(x)
        except Refused as e:
            raise Refused(f"of its result: {e}") from e

    def indexed(self, tensor: torch.Tensor, index: tuple, more) -> "Symbol":
        """index: of the first dimensions, arguments; more: of the next."""
        for i in more if isinstance(more, tuple) else (more,):
            if isinstance(i, (Symbol, torch.Tensor)):
                index = (*index, self.argument(i))
            elif isinstance(i, numbers.Integral) and not isinstance(i, bool):
                tensor = tensor.select(len(index), int(i))
            else:
                raise Refused(f"{i!r} came as an index beside a kernel's number; a number for each dimension is needed")
        if len(index) > tensor.dim():
            raise Refused(f"{len(index)} indices came for a tensor of {tensor.dim()} dimensions")
        return self.load(tensor, index) if len(index) == tensor.dim() else Row(self, tensor, index)

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        name = func.__name__
        if name == "__getitem__":
            return self._item(*args)
        whole = bool(args) and isinstance(args[0], torch.Tensor)
        if whole and name in UNREAD:
            return func(*args, **(kwargs or {}))
        if whole and name in READ:
            hint = "compute with the tensor itself, or pass a Python number"
            raise Refused(f"{name.strip('_')} would read a tensor's value back in every call; {hint}")
        swapped = name in REFLECTED
        known = FUNCTIONS.get(REFLECTED.get(name) or DUNDERS.get(name, name))
        if known is None:
            raise Refused(f"torch.{name} {UNKNOWN}")
        return known(self, *(reversed(args) if swapped else args), **(kwargs or {}))

    def _item(self, tensor, index):
        items = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, (Symbol, torch.Tensor)) for i in items):
            return self.indexed(tensor, (), items)
        if not all(i is None or i is ... or isinstance(i, (numbers.Integral, slice)) for i in items):
            raise Refused(f"{index!r} came as an index, which copies; index the tensor before the call")
        return tensor[index]


class Symbol:
    """A number of the kernel, which has no value yet: a score, a place, an element of a tensor, or made of these."""

    __slots__ = ("_ref", "_trace")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # NumPy's numbers leave operators to it
    device = None  # FlexAttention's own mods ask for it

    def __init__(self, trace: Trace, ref: int):
        self._trace, self._ref = trace, ref

    def __pos__(self):
        return self

    def __getattr__(self, name: str):
        raise AttributeError(f"{name} {UNKNOWN}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        raise Refused(f"torch.{func.__name__} came outside of the call, of a number that was kept")

    def _unknown(self, *_):
        raise Refused("a kernel's number has no value yet: use torch.where for `if`, & and | for `and` and `or`")

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __iter__ = __len__ = __contains__ = __round__ = _unknown


class Row(Symbol):
    """A tensor of which the first dimensions have an index."""

    __slots__ = ("_index", "_tensor")

    def __init__(self, trace: Trace, tensor: torch.Tensor, index: tuple):
        super().__init__(trace, -1)
        self._tensor, self._index = tensor, index

    def __getitem__(self, index):
        return self._trace.indexed(self._tensor, self._index, index)


def _function(name: str, parameters: tuple[str, ...]) -> Callable:
    operation = MEANS.get(name, name)

    def of(trace: Trace, *args, **named) -> Symbol:
        if named:
            args = _positional(name, parameters, args, named)
        if len(args) != len(parameters):
            raise Refused(
                f"torch.{name} of {len(args)} arguments is not known to a kernel; {len(parameters)} are taken"
            )
        return trace.node(operation, *map(trace.argument, args))

    return of


def _positional(name: str, parameters: tuple[str, ...], args: tuple, named: dict) -> tuple:
    rest = parameters[len(args) :]
    for word, value in named.items():
        if word not in rest and value is not None and value is not False:  # as out=None, inplace=False
            raise Refused(f"torch.{name}: the argument {word} is not known to a kernel")
    return *args, *(named[word] for word in rest if word in named)


def _clamp(trace: Trace, input, min=None, max=None) -> Symbol:  # noqa: A002 - torch's names
    found = input
    for bound, operation in ((min, "maximum"), (max, "minimum")):
        if bound is not None:
            found = trace.node(operation, trace.argument(found), trace.argument(bound))
    return found


def _cast(dtype) -> str:
    if dtype not in CASTS:
        words = ", ".join(map(str, CASTS))
        raise Refused(f"{dtype} came as a type, and a kernel's numbers have {words} alone (floats are float32)")
    return CASTS[dtype]


def _to(trace: Trace, input, dtype=None) -> Symbol:  # noqa: A002
    return trace.node(_cast(dtype), trace.argument(input))


def _full(trace: Trace, like, value, dtype=None, *, device=None, layout=None, requires_grad=False, **_) -> Symbol:
    """A constant, of the type of `like` where none is given."""
    word = None if dtype is None else _cast(dtype)
    return trace.node("full", trace.argument(like), trace.argument(value), word)


def _new(value: float, trace: Trace, like, size=(), *more, **how) -> Symbol:
    if more or not isinstance(size, (tuple, list)) or len(size):
        raise Refused(f"new_ones, new_zeros of {(size, *more)} came; a kernel's numbers have no dimensions: pass ()")
    return _full(trace, like, value, **how)


def _like(value: float, trace: Trace, input, **how) -> Symbol:  # noqa: A002
    return _full(trace, input, value, **how)


def _full_like(trace: Trace, input, fill_value, **how) -> Symbol:  # noqa: A002
    return _full(trace, input, fill_value, **how)


FUNCTIONS: dict[str, Callable] = {
    **{name: _function(name, ("input",)) for name in (*UNARY.split(), "bitwise_not")},
    **{name: _function(name, ("input", "other")) for name in (*BINARY.split(), "min", "max", "div")},
    "pow": _function("pow", ("input", "exponent")),
    "where": _function("where", ("condition", "input", "other")),
    "clamp": _clamp,
    "to": _to,
    "new_ones": partial(_new, 1),
    "new_zeros": partial(_new, 0),
    "ones_like": partial(_like, 1),
    "zeros_like": partial(_like, 0),
    "full_like": _full_like,
}
UNKNOWN = f"is not known to a kernel; known are {', '.join(FUNCTIONS)}"


def _install(name: str, function: str) -> None:
    operation = MEANS.get(function, function)

    def of(a, b):
        trace = a._trace
        return trace.node(operation, trace.argument(a), trace.argument(b))

    def reflected(a, b):
        trace = a._trace
        return trace.node(operation, trace.argument(b), trace.argument(a))

    setattr(Symbol, f"__{name}__", of)
    setattr(Symbol, f"__r{name}__", reflected)


def _method(function: Callable) -> Callable:
    return lambda x, *args, **named: function(x._trace, x, *args, **named)


for _name, _word in OPERATORS.items():
    _install(_name, _word)
for _name, _of in FUNCTIONS.items():
    setattr(Symbol, _name, _method(_of))
for _name in ("neg", "abs", "invert"):
    setattr(Symbol, f"__{_name}__", _method(FUNCTIONS["bitwise_not" if _name == "invert" else _name]))
