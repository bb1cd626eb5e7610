"""What `merge_states` takes: o and lse of several states, and where the results go. Everything wrong raises here."""

from collections.abc import Sequence
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
        if not self.given.dim():
            raise ValueError(
                f"{self.name}: a tensor without dimensions came; pass one of each state, or a stack of them"
            )
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
    first = _check_o(o, layout)
    _check_lse(lse, o.number, first, layout)
    for name, x in (("out", out), ("out_lse", out_lse)):
        if x is not None:
            arrays.tensor(name, x)
            checks.distinct(name, Spec.of(x))
    if out is not None:
        _one_o("out", Spec.of(out), layout)
        _like("out", Spec.of(out), "o[0]", first)
    if out_lse is not None:
        _one_lse("out_lse", Spec.of(out_lse), first, layout)
    return first


def rows_of(o: Spec | Tensor, layout: str) -> tuple[int, ...]:
    """lse's shape."""
    return tuple(o.shape[layout.index(x)] for x in ("ht" if layout == "thd" else "bhs"))


def check_memory(o: States, lse: States, results: dict[str, Tensor], nbytes: tuple[int, ...]) -> None:
    """A result replaces an input, or shares no element with any. nbytes: what all of them reach over, in this order."""
    tensors = *o.tensors, *lse.tensors, *results.values()
    starts = [x.data_ptr() for x in tensors]
    for i, (name, result) in enumerate(results.items(), len(tensors) - len(results)):
        arrays.memory(name, result)
        if result.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires grad; pass {name}.detach(), or call under torch.no_grad()")
        for j in range(i):
            meet = starts[i] < starts[j] + nbytes[j] and starts[j] < starts[i] + nbytes[i]
            if meet and tensors[j] is not result:
                whose = [*o.named, *lse.named, *results][j]
                _check_apart(name, result, whose, tensors[j].unbind() if whose in ("o", "lse") else (tensors[j],))


def check_gradients(o: States, lse: States, results: dict[str, Tensor]) -> None:
    """The results depend on o and on lse: a gradient that leaves out one of them is none."""
    for name in results:
        raise ValueError(f"{name}: given with inputs that require grad; omit it, or call under torch.no_grad()")
    for i, (x, y) in enumerate(zip(o.each(), lse.each(), strict=True)):
        if x.requires_grad and not y.requires_grad:
            what = f"lse[{i}]: does not require grad, but o[{i}] does, whose gradient is wrong without that of lse"
            hint = "call under torch.no_grad(), or pass .requires_grad_() of an lse that is constant"
            raise ValueError(f"{what} (flash_fwd's has none); {hint}")


def _check_o(o: States, layout: str) -> Spec:
    """The first one."""
    specs = o.specs()
    first = next(iter(specs.values()), None)
    if not o.number or first is None:
        raise ValueError("o: no state came; pass at least one")
    for name, x in specs.items():
        _one_o(name, x, layout, " (one tensor is a stack of states: pass [o] for a single one)" if o.stacked else "")
        _like(name, x, "o[0]", first)
    if o.stacked:
        checks.placed("o", Spec.of(o.given))  # whose strides have one more
    rows = first.shape[:-1].numel()
    if rows > checks.SIZE_MAX:
        raise ValueError(f"o: {rows} rows of all heads; split them over several calls, of {checks.SIZE_MAX} at most")
    return first


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


def _check_apart(name: str, result: Tensor, whose: str, states: Sequence[Tensor]) -> None:
    """From those that a result does not replace."""
    for x in states:
        replaced = whose != "out" and _same(result, x)
        if not replaced and _meet(result, x) and checks.overlap(result, x):
            hint = f"for {name} pass a state's own to replace it, or a tensor that shares nothing, or omit it"
            raise ValueError(f"{name}: shares memory with {whose}, and is none of its tensors; {hint}")


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether their ranges of addresses do."""
    (first, size), (other, other_size) = ((x.data_ptr(), Spec.of(x).nbytes) for x in (a, b))
    return first < other + other_size and other < first + size


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
