"""Chunked attention, as Llama 4 has it: keys and queries lie in chunks of equal size, and a query sees its own."""

from typing import NamedTuple

from ..kernels.mask import Chunks
from ..scalars import integer
from .feature import Feature

LARGEST = 1 << 30  # no sequence is longer


class Chunked(NamedTuple):
    size: int
    causal: bool


class ChunksFeature(Feature):
    """The value is Chunked."""

    name, keywords, part = "chunks", ("attention_chunk",), "mask"
    schema, later = ("SymInt? attention_chunk=None",), True

    def given(self, asked):
        size = integer(asked["attention_chunk"])
        if size is None:
            raise TypeError(f"attention_chunk: {asked['attention_chunk']!r} came; a number of keys is needed, or None")
        if size < 1:
            raise ValueError(f"attention_chunk: {size} came; a number of keys of at least 1 is needed, or None")
        alone("attention_chunk", asked, "window", "spans", "draft_mask")
        return Chunked(min(size, LARGEST), asked["causal"])

    def key(self, value):
        return Chunks(value.causal)

    def arguments(self, value):
        return (value.size,)

    def by_name(self, value):
        return dict(attention_chunk=value.size)

    def operator_arguments(self, value):
        return (None if value is None else value.size,)


def alone(name: str, asked: dict, *others: str) -> None:
    """ValueError where one of the others is given too."""
    for other in others:
        if given(asked, other):
            raise ValueError(f"{name}: given with {other}; no kernel has both, omit one of them")


def given(asked: dict, name: str) -> bool:
    """A window without bounds is none, as the operator passes it."""
    value = asked.get(name)
    return value is not None and not (name == "window" and tuple(value) == (None, None))
