"""Dropout: weights are left out at random after the softmax, and the others scaled up."""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arrays import memory, type_word
from ..reference import LEVELS, levels_kept
from .feature import Feature

SEEDS = (1 << 63) - 1
NO_DROPOUT = 0.0  # this very object, the default, is not looked at


class Dropout(NamedTuple):
    p: float
    generator: torch.Generator | None
    rng_state: Tensor | None  # (2,) int64, seed and offset; None: to be drawn


class DropoutFeature(Feature):
    """The value is a Dropout."""

    name, part = "dropout", "dropout"
    keywords, defaults = ("dropout_p", "generator", "rng_state"), dict(dropout_p=NO_DROPOUT)
    schema = "float dropout_p=0.0", "Tensor? rng_state=None"

    def given(self, asked):
        return dropout(asked.get("dropout_p", 0.0), asked.get("generator"), asked.get("rng_state"))

    def fitted(self, value, problem, device):
        _random_state(value, device)
        return value

    def started(self, value, q):
        """With its random state, drawn on q's device: nothing is read back, and a CUDA graph draws anew."""
        if value.rng_state is not None:
            return value
        if isinstance(q, torch.fx.Proxy):
            raise TypeError("dropout_p: torch.fx's proxies have no device to draw on; pass rng_state")
        state = torch.randint(SEEDS, (2,), dtype=torch.int64, device=q.device, generator=value.generator)
        return value._replace(rng_state=state)

    def arguments(self, value):
        kept = levels_kept(value.p)
        return value.rng_state.data_ptr(), kept, LEVELS / kept if kept else 0.0

    def reference(self, value, how):
        how |= dict(dropout_p=value.p, rng_state=value.rng_state)

    def by_name(self, value):
        return dict(zip(self.keywords, value, strict=True))

    def operator_arguments(self, value):
        return (0.0, None) if value is None else (value.p, value.rng_state)

    def of_operator(self, arguments):
        return dict(dropout_p=arguments["dropout_p"], rng_state=arguments["rng_state"])

    def untraceable(self, value):
        return None if value.generator is None else "generator"

    def no_gradient(self, value):
        return (
            f"dropout_p: {value.p} came with inputs that require grad, and torch's backward cannot redo "
            "our mask; call under torch.no_grad(), or use torch.nn.functional.scaled_dot_product_attention"
        )


def dropout(p: Any, generator: Any, rng_state: Any) -> Dropout | None:
    """None where, to 16 bits, nothing is left out."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"dropout_p: {p!r} came; a number from 0 to 1 is needed")
    p = float(p)
    if not 0 <= p <= 1:  # also NaN
        raise ValueError(f"dropout_p: {p} came; use a probability, from 0 to 1")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: {type_word(generator)} came; a torch.Generator is needed, or None for torch's own")
    if generator is not None and rng_state is not None:
        raise ValueError("generator: given with rng_state, which is used as it is; omit one of them")
    if generator is not None and torch.compiler.is_compiling():
        raise TypeError(
            "generator: it cannot pass the operator that torch.compile sees; draw rng_state from it instead"
        )
    if levels_kept(p) < LEVELS:
        return Dropout(p, generator, rng_state)
    for name, given in (("generator", generator), ("rng_state", rng_state)):
        if given is not None:
            raise ValueError(f"{name}: given with dropout_p {p}, by which nothing is left out; omit it, or dropout")
    return None


def _random_state(given: Dropout, device: torch.device) -> None:
    """What is drawn from, or was drawn, is where q is."""
    _, generator, state = given
    if generator is not None and not _for_device(generator, device):
        raise ValueError(
            f"generator: it is for {generator.device}, but q is on {device}; use torch.Generator({str(device)!r})"
        )
    if state is None:
        return
    if not isinstance(state, torch.Tensor):
        raise TypeError(f"rng_state: a torch.Tensor is needed, int64 (2,): seed, offset; {type_word(state)} came")
    memory("rng_state", state)
    if state.dtype != torch.int64 or state.shape != (2,) or state.stride(0) != 1:
        what = f"{state.dtype} of shape {tuple(state.shape)} and strides {state.stride()} came"
        raise ValueError(f"rng_state: {what}; int64 (2,), contiguous, is needed: seed, offset")
    if state.device != device:
        raise ValueError(f"rng_state: on {state.device}, but q is on {device}; move it with .to(device)")


def _for_device(generator: torch.Generator, device: torch.device) -> bool:
    """torch asks for the type alone; in a CUDA graph its kernel reads the seed where the generator is."""
    return generator.device.type == device.type and generator.device.index in (None, device.index)
