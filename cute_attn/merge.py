"""`merge_states`: attention over several sets of keys, one call each, becomes attention over all of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arrays, call, checks, compile, device, notices, reference, states, strides
from .checks import Spec
from .kernels.merge_sm90 import STATES_MAX, MergeConfig
from .request import seen_by_tracer
from .states import States

INSTEAD = "cute_attn.reference.merge_states"


def merge_states(
    o: Tensor | Sequence[Tensor],
    lse: Tensor | Sequence[Tensor],
    *,
    layout: str = "bhsd",
    base2: bool = False,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial results of the same queries, each over keys of its own, merged by one kernel into those over all keys.

    o = sum of w_i o_i with w_i = exp(lse_i - lse), lse = log(sum of exp(lse_i)): FlashInfer's merge_states, vLLM's
    merge_attn_states (FlashDecoding, Dao et al., 2023; FlashInfer, arXiv:2501.01005).

    Args:
        o: a sequence of k >= 1 tensors of one shape, or one tensor (k, ...) of all: bf16, fp16 or float32, on a Hopper
            GPU or the CPU. D is a multiple of 8, or of 4 in float32, up to 512. Any strides with a contiguous last
            dimension and rows at multiples of 16 bytes. More than 8 tensors that lie at no equal distances are copied.
        lse: as many tensors, or one (k, ...), float32 (B, H, S), or (H, total) for "thd", of any strides: the natural
            log of each row's sum of exponentials, as `flash_fwd` returns it. -inf says that a state has no key for the
            row, and so does inf: its o is not used, not even where it is NaN.
        layout: o's: "bhsd" (B, H, S, D), "bshd" (B, S, H, D), or "thd" (total, H, D) of packed sequences.
        base2: lse, and what is returned of it, is to base 2, as FlashInfer's is.
        out, out_lse: written in place and returned. Each may be one of the inputs itself, which it then replaces;
            otherwise it shares no memory with them.

    Returns:
        o, like a state's, summed in float32 in the order of the states and rounded once; and lse, float32. A row for
        which no state has a key gives o = 0, lse = -inf; a NaN among a row's lse gives NaN.

    Differentiable in o and lse, together and without out; `flash_fwd`'s lse is not, so its results are merged without
    gradients. Runs on torch's current stream and may be captured in a CUDA graph. CPU tensors are computed by torch in
    float32.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    arrays.flags(base2=base2)
    if layout not in states.LAYOUTS:
        known = ", ".join(f'"{name}" {words}' for name, words in states.LAYOUTS.items())
        raise ValueError(f"layout: {layout!r} is not known; use {known}")
    return Merge(states.states("o", o), states.states("lse", lse), out, out_lse, layout, base2).run()


class Prepared(NamedTuple):
    """What the shapes, strides, types and devices of a call say."""

    gpu: Any  # device.Device, or None: the CPU
    kernel: Any  # a Callable; None: the CPU, or nothing to compute
    o: tuple  # the result's shape and strides
    lse: tuple[int, ...]  # its shape
    nbytes: tuple[int, ...]  # that each of `Merge.tensors` reaches over


class Merge(NamedTuple):
    o: States
    lse: States
    out: Tensor | None
    out_lse: Tensor | None
    layout: str
    base2: bool

    @property
    def results(self) -> dict[str, Tensor]:
        """Those that are given."""
        return {name: x for name, x in (("out", self.out), ("out_lse", self.out_lse)) if x is not None}

    @property
    def tensors(self) -> tuple:
        return *self.o.tensors, *self.lse.tensors, *self.results.values()

    def named(self) -> dict[str, Any]:
        return self.o.named | self.lse.named | self.results

    def run(self) -> tuple[Tensor, Tensor]:
        """What merge_states returns."""
        if seen_by_tracer(self.named()):
            return self.by_operator()
        found = self.prepared()
        if arrays.learns(*self.o.tensors, *self.lse.tensors):
            for name, x in (self.o.named | self.lse.named).items():
                arrays.tensor(name, x)
            return self.by_operator()
        if self.results:
            states.check_memory(self.o, self.lse, self.results, found.nbytes)
        first = self.o.tensors[0]
        out = first.new_empty_strided(*found.o) if self.out is None else self.out
        out_lse = first.new_empty(found.lse, dtype=torch.float32) if self.out_lse is None else self.out_lse
        if found.gpu is None:
            self.on_cpu(out, out_lse)
        elif found.kernel is not None:
            self.launch(found, out, out_lse)
        return out, out_lse

    @property
    def symbolic(self) -> bool:
        """Of torch.fx: nobody knows if such a tensor learns."""
        return torch.fx.Proxy in [type(x) for x in self.tensors]

    def by_operator(self) -> tuple[Tensor, Tensor]:
        o, lse = self.o.each(), self.lse.each()
        if not self.symbolic and arrays.learns(*self.o.tensors, *self.lse.tensors):
            states.check_gradients(self.o, self.lse, self.results)
        if not self.results:
            return torch.ops.cute_attn.merge_states(o, lse, self.layout, self.base2)
        out = torch.empty_like(o[0]) if self.out is None else self.out
        rows = states.rows_of(o[0], self.layout)
        out_lse = o[0].new_empty(rows, dtype=torch.float32) if self.out_lse is None else self.out_lse
        torch.ops.cute_attn.merge_states_out(o, lse, out, out_lse, self.layout, self.base2)
        return out, out_lse

    def prepared(self) -> Prepared:
        """Checked and compiled; a look-up where the like has come before."""
        return call.looked_up(self.key, self.made)

    def key(self) -> tuple:
        given = self.o.stacked, self.lse.stacked, self.out is None, self.out_lse is None
        seen = [(x.shape, x.stride(), x.dtype, x.get_device()) for x in self.tensors]
        return merge_states, self.layout, given, len(self.o.tensors), *seen

    def made(self) -> Prepared:
        first = states.check(self.o, self.lse, self.out, self.out_lse, self.layout)
        gpu = None if first.device.type == "cpu" else device.get(first.device.index, "o", INSTEAD)
        count = self.o.number
        config = MergeConfig(states.DTYPES[first.dtype], self.layout, count if count <= STATES_MAX else 0)
        kernel = compile.get(config) if gpu is not None and first.shape.numel() else None
        dense = first.shape, strides.dense(first.shape, first.stride)
        nbytes = tuple(Spec.of(x).nbytes for x in self.tensors)
        return Prepared(gpu, kernel, dense, states.rows_of(first, self.layout), nbytes)

    def on_cpu(self, out: Tensor, out_lse: Tensor) -> None:
        notices.once(f"merge_states: {notices.CPU}")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            how = dict(layout=self.layout, base2=self.base2, dtype=torch.float32)
            o, lse = reference.merge_states(self.o.each(), self.lse.each(), **how)
            out.copy_(o)
            out_lse.copy_(lse)

    def launch(self, found: Prepared, out: Tensor, out_lse: Tensor) -> None:
        kernel = device.launcher(found.gpu, found.kernel)
        to_log2, of_log2 = (1.0, 1.0) if self.base2 else (math.log2(math.e), math.log(2))
        if self.o.number <= STATES_MAX:
            tensors = [x for pair in zip(self.o.each(), self.lse.each(), strict=True) for x in pair]
        else:
            tensors = [self.o.stack(alignment=16), self.lse.stack(alignment=4)]
        try:
            kernel(out, out_lse, to_log2, of_log2, *tensors)
        except Exception:
            self.made()
            for name, x in (self.o.named | {"out": out}).items():
                checks.aligned(name, x)
            raise
