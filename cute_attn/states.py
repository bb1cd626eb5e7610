"""What `merge_states` takes: o and lse of several states, and where the results go. Everything wrong raises here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arrays, checks
from .checks import Spec
from .kernels.config import HEAD_DIM_MAX

DTYPES = checks.DTYPES | {torch.float32: "fp32"}
LAYOUTS = {"bhsd": "(B, H, S, D)", "bshd": "(B, S, H, D)", "thd": "(total, H, D)"}
LSE_LAYOUTS = {"bhsd": "(B, H, S)", "bshd": "(B, H, S)", "thd": "(H, total)"}


class States(NamedTuple):
    """o or lse of all states: a tensor of each, or one tensor of all, the states' dimension first."""

    name: str
    given: Any

    @property
    def stacked(self) -> bool:
        return isinstance(self.given, Tensor)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As they came."""
        return (self.given,) if self.stacked else tuple(self.given)

    @property
    def named(self) -> dict[str, Tensor]:
        return {self.name: self.given} if self.stacked else {f"{self.name}[{i}]": x for i, x in enumerate(self.given)}

    @property
    def number(self) -> int:
        return self.given.shape[0] if self.stacked else len(self.given)

    def each(self) -> list[Tensor]:
        return list(self.given.unbind() if self.stacked else self.given)

    def stack(self, alignment: int) -> Tensor:
        """(k, ...): a view where they lie at equal distances, multiples of so many bytes, else a copy."""
        if self.stacked:
            return self.given
        view = _stack_of(self.given, alignment)
        return torch.stack(list(self.given)) if view is None else view

    def specs(self) -> dict[str, Spec]:
        """Of each state; those of one tensor have the same."""
        for name, x in self.named.items():
            arrays.tensor(name, x)
        if not self.stacked:
            return {name: Spec.of(x) for name, x in self.named.items()}
        whole = Spec.of(self.given)
        return {f"{self.name}[i]": whole._replace(shape=whole.shape[1:], stride=whole.stride[1:])}


def states(name: str, given) -> States:
    """
    Raises:
        TypeError: neither a tensor nor a sequence.
    """
    if not isinstance(given, (Tensor, tuple, list)):
        arrays.tensor(name, given)
    return States(name, given)


def check(o: States, lse: States, out: Tensor | None, out_lse: Tensor | None, layout: str) -> Spec:
    """A state's o, if everything fits together."""
    if o.stacked and not o.given.dim():
        raise ValueError("o: a tensor without dimensions came; pass one of each state, or a stack of them")
    first = next(iter(_check_o(o, layout).values()), None)
    if not o.number or first is None:
        raise ValueError("o: no state came; pass at least one")
    rows = first.shape[:-1].numel()
    if rows > checks.SIZE_MAX:
        raise ValueError(f"o: {rows} rows of all heads; split them over several calls, of {checks.SIZE_MAX} at most")
    _check_lse(lse, o.number, first, layout)
    if out is not None:
        _check_out(out, first, layout)
    if out_lse is not None:
        arrays.tensor("out_lse", out_lse)
        _one_lse("out_lse", Spec.of(out_lse), first, layout)
        checks.distinct("out_lse", Spec.of(out_lse))
    return first


def rows_of(o: Spec | Tensor, layout: str) -> tuple[int, ...]:
    """lse's shape."""
    return tuple(o.shape[layout.index(x)] for x in ("ht" if layout == "thd" else "bhs"))


def check_memory(o: States, lse: States, out: Tensor | None, out_lse: Tensor | None) -> None:
    """A result replaces an input, or shares no element with any."""
    inputs = o.named | lse.named
    for name, result in (("out", out), ("out_lse", out_lse)):
        if result is None:
            continue
        arrays.memory(name, result)
        if result.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires grad; pass {name}.detach(), or call under torch.no_grad()")
        for whose, x in inputs.items():
            for part in _states_meeting(result, x, whose in ("o", "lse")):
                if not _same(result, part) and checks.overlap(result, part):
                    what = f"shares memory with {whose}, and is none of its tensors"
                    hint = f"pass a state's own to replace it, a {name} that shares nothing, or omit it"
                    raise ValueError(f"{name}: {what}; {hint}")
    if out is not None and out_lse is not None and _meet(out, out_lse) and checks.overlap(out, out_lse):
        raise ValueError("out_lse: shares memory with out; pass one of its own, or omit it")


def check_gradients(o: States, lse: States, out: Tensor | None, out_lse: Tensor | None) -> None:
    """The results depend on o and on lse: a gradient that leaves out one of them is none."""
    for name, x in (("out", out), ("out_lse", out_lse)):
        if x is not None:
            raise ValueError(f"{name}: given with inputs that require grad; omit it, or call under torch.no_grad()")
    for name, x in lse.named.items():
        if not x.requires_grad and arrays.learns(*o.tensors):
            what = "does not require grad, but o does, and its gradient by way of lse would be lost; flash_fwd's lse"
            hint = "call under torch.no_grad(), or pass lse.detach().requires_grad_() where it is a constant"
            raise ValueError(f"{name}: {what} has none: {hint}")


def _check_o(o: States, layout: str) -> dict[str, Spec]:
    specs = o.specs()
    first = next(iter(specs.values()), None)
    for name, x in specs.items():
        _one_o(name, x, layout, " (one tensor is a stack of states: pass [o] for a single one)" if o.stacked else "")
        if first is not None:
            _like(name, x, "o[0]", first)
    if o.stacked:
        checks.placed("o", Spec.of(o.given))  # whose strides have one more
    return specs


def _one_o(name: str, x: Spec, layout: str, hint: str = "") -> None:
    checks.dense(name, x.storage)
    if len(x.shape) != len(layout):
        what = f"{len(x.shape)} dimensions, shape {tuple(x.shape)}; {len(layout)} are needed: {LAYOUTS[layout]}{hint}"
        raise ValueError(f"{name}: {what}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: {x.dtype} is not supported; use torch.bfloat16, torch.float16 or torch.float32")
    d, multiple = x.shape[-1], 16 // x.dtype.itemsize
    if d % multiple or not 0 < d <= HEAD_DIM_MAX:
        what = f"a multiple of {multiple} (16 bytes of {x.dtype}) up to {HEAD_DIM_MAX}"
        raise ValueError(f"{name}: head_dim {d} is not supported; use {what}")
    checks.placed(name, x)


def _like(name: str, x: Spec, whose: str, other: Spec) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)} is not {whose}'s {tuple(other.shape)}; all have one shape")
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: {x.dtype} does not match {whose}'s {other.dtype}; convert one with .to(dtype)")
    if x.device != other.device:
        raise ValueError(f"{name}: on {x.device}, but {whose} is on {other.device}; move one with .to(device)")


def _check_lse(lse: States, number: int, o: Spec, layout: str) -> None:
    if lse.stacked and not lse.given.dim():
        raise ValueError("lse: a tensor without dimensions came; pass one of each state, or a stack of them")
    specs = lse.specs()
    if lse.number != number:
        raise ValueError(f"lse: {lse.number} came with {number} of o; pass one for each")
    for name, x in specs.items():
        _one_lse(name, x, o, layout)


def _one_lse(name: str, x: Spec, o: Spec, layout: str) -> None:
    want = rows_of(o, layout)
    checks.dense(name, x.storage)
    if tuple(x.shape) != want:
        turned = len(want) > 1 and tuple(x.shape) == (*want[:-2], want[-1], want[-2])
        hint = f"; use {name}.transpose(-1, -2)" if turned else ""
        what = f"shape {tuple(x.shape)} does not fit o's {tuple(o.shape)}"
        raise ValueError(f"{name}: {what}; {LSE_LAYOUTS[layout]} is needed, {want}{hint}")
    if x.dtype != torch.float32:
        raise TypeError(f"{name}: {x.dtype} is not supported; use torch.float32")
    if x.device != o.device:
        raise ValueError(f"{name}: on {x.device}, but o[0] is on {o.device}; move one with .to(device)")


def _check_out(out: Tensor, o: Spec, layout: str) -> None:
    arrays.tensor("out", out)
    x = Spec.of(out)
    _one_o("out", x, layout)
    _like("out", x, "o[0]", o)
    checks.distinct("out", x)


def _states_meeting(result: Tensor, x: Tensor, stacked: bool) -> list[Tensor]:
    """Of an input, the states whose range of addresses a result's meets."""
    if not _meet(result, x):
        return []
    return [part for part in x.unbind() if _meet(result, part)] if stacked else [x]


def _meet(a: Tensor, b: Tensor) -> bool:
    (a_start, a_size), (b_start, b_size) = ((x.data_ptr(), Spec.of(x).nbytes) for x in (a, b))
    return a_start < b_start + b_size and b_start < a_start + a_size


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both have each element at the same address."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and Spec.of(a).dims == Spec.of(b).dims


def _stack_of(tensors, alignment: int) -> Tensor | None:
    """The tensor of which these are the first dimension's parts, if they lie so."""
    first, second = tensors[:2]
    step = second.data_ptr() - first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for i, x in enumerate(tensors):
        here = x.data_ptr() == first.data_ptr() + i * step and x.stride() == first.stride()
        if not here or x.untyped_storage().data_ptr() != storage:
            return None
    if step < 0 or step % alignment:
        return None
    return first.as_strided((len(tensors), *first.shape), (step // first.itemsize, *first.stride()))
