"""Sliding windows: each query sees some keys to its left and some to its right."""

from typing import Any

from ..arrays import flags
from ..scalars import integer
from .feature import Feature

UNBOUNDED = 1 << 30  # of a side: no query is further from a key


class WindowFeature(Feature):
    """The value is (left, right), both bounded."""

    name, keywords, part = "window", ("window",), "mask"
    schema = "SymInt? window_left=None", "SymInt? window_right=None"
    differentiable = True

    def given(self, asked):
        asked["causal"], value = window(asked.get("window"), asked["causal"])
        return value

    def arguments(self, value):
        return value

    def operator_arguments(self, value):
        return value or (None, None)

    def of_operator(self, arguments):
        return dict(window=(arguments["window_left"], arguments["window_right"]))


def window(sides: Any, causal: Any) -> tuple[bool, tuple[int, int] | None]:
    """(causal, (left, right)) of the kernel that a call's window and causal ask for together; None: it has no window.

    What comes out may go in again, and comes out as it is.
    """
    if type(causal) is not bool:
        flags(causal=causal)
    if sides is None:
        return causal, None
    pair = "a pair (left, right) is needed, each a number of keys, or None for no bound"
    if not isinstance(sides, (tuple, list)):
        raise TypeError(f"window: {sides!r} came; {pair}")
    if len(sides) != 2:
        raise ValueError(f"window: {sides!r} has {len(sides)} of them; {pair}")
    left, right = _side("left", sides[0]), _side("right", sides[1])
    if causal:
        if right is not None and right > 0:
            raise ValueError(f"window: right {right} came with causal=True, which hides later keys; use None or 0")
        right = 0
    if left is None and (right is None or right == 0):
        return right is not None, None
    return False, (UNBOUNDED if left is None else left, UNBOUNDED if right is None else right)


def _side(name, given):
    if given is None:
        return None
    keys = integer(given)
    if keys is None:
        raise TypeError(f"window: {name} {given!r} came; an int of at least 0 is needed, or None for no bound")
    if keys < 0:
        raise ValueError(f"window: {name} {keys} is below 0; use a number of keys, or None for no bound")
    return keys if keys < UNBOUNDED else UNBOUNDED
