"""q, k, v and out of a call, as they lie in memory: dense, or ragged (varlen). What a call asks of either.

Those whose keys lie in a cache are in `kvcache_operands`.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import arrays, checks, device, reference, strides
from .checks import Spec
from .kernels.config import FwdConfig
from .plan import plan
from .plan import varlen as plan_varlen
from .problem import Problem

LENGTHS = "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"
HINTS = "max_seqlen_q", "max_seqlen_k"
TENSORS = "q", "k", "v", "out"


class Operands(Protocol):
    """A NamedTuple of q, k, v, out, and what says where their sequences lie."""

    @property
    def tensors(self) -> tuple:
        """q, k, v and out."""

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Of these four, as `function` has them."""

    @property
    def function(self) -> str:
        """The name of cute_attn's function that takes them."""

    @property
    def layout(self) -> str:
        """As FwdConfig has it."""

    def all_causal(self) -> "Operands":
        """The same, where all sequences are causal, whatever is asked of each."""

    def key(self) -> Hashable:
        """All that decides the kernel and its results' shapes, but for what the compiled call itself holds against q,
        k and v before it launches: out's shape, and every type and device but q's.

        Raises:
            AttributeError, IndexError, RuntimeError, TypeError: no tensor, one without strides or with too few
                dimensions, or what has no hash.
        """

    def specs(self) -> tuple[Spec, Spec, Spec, Spec]:
        """Of q, k, v and out, or of q where there is none, each checked by itself."""

    def problem(self, specs: tuple, causal: bool, constant_time: bool, features: Any) -> Problem:
        """What they state together. Of varlen sequences, seqlen_q and seqlen_k are all rows, batch how many sequences.

        Raises:
            TypeError, ValueError: they do not fit together.
        """

    def config(self, problem: Problem, gpu: str | None) -> FwdConfig | None:
        """The kernel that serves them on a GPU of this name; of the CPU, which runs none, there may be no answer."""

    def check(self) -> None:
        """What `key` leaves out and no kernel asks: each has memory of its own."""

    def rows(self) -> tuple[int, ...]:
        """The shape of lse: one number for each row and head."""

    def nothing(self, problem: Problem) -> bool:
        """Whether no kernel is needed: there is nothing to multiply, or nothing to write."""

    def plain(self) -> bool:
        """Whether TMA takes q, k, v and out as they are."""

    def for_tma(self, o: Tensor) -> list[Tensor]:
        """Views of q, k, v and o whose sizes of 1 have strides that TMA takes."""

    def arguments(self, o: Tensor) -> tuple:
        """Of the compiled kernel, behind those of the features."""

    def compute(self, o: Tensor | None, how: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """o, lse and row_max by `reference`, in `how`; o is written in place where it is given."""

    def operator_arguments(self) -> tuple:
        """layout, and the six of varlen, as torch.ops.cute_attn.attention takes them."""

    def operator_keywords(self) -> dict[str, Any]:
        """What else it takes."""

    def differentiable(self) -> None:
        """ValueError where such operands have no backward at all."""

    def lacks_gradient(self) -> None:
        """ValueError where these have none."""


class Dense(NamedTuple):
    """(B, H, S, D) tensors, or (B, S, H, D)."""

    q: Any
    k: Any
    v: Any
    out: Any
    layout: str

    @property
    def names(self) -> tuple[str, str, str, str]:
        return TENSORS

    @property
    def function(self) -> str:
        return "flash_fwd"

    @property
    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.out

    def all_causal(self) -> "Dense":
        return self

    def key(self) -> Hashable:
        return dense_key(self.q, self.k, self.v, self.out, self.layout)

    def check(self) -> None:
        """out's memory is asked for where it is held against q's."""

    def specs(self) -> tuple[Spec, Spec, Spec, Spec]:
        checks.words(False, self.layout)
        return specs_of(self)

    def problem(self, specs: tuple, causal: bool, constant_time: bool, features: Any) -> Problem:
        q, k, v, o = specs
        problem = checks.problem(q, k, v, causal, self.layout, constant_time, features)
        if self.out is not None:
            checks.out(o, q, v, self.layout)
        return problem

    def config(self, problem: Problem, gpu: str | None) -> FwdConfig:
        return plan(problem, gpu)

    def rows(self) -> tuple[int, ...]:
        h, s = self.layout.index("h"), self.layout.index("s")
        return self.q.shape[0], self.q.shape[h], self.q.shape[s]

    def nothing(self, problem: Problem) -> bool:
        return problem.empty

    def plain(self) -> bool:
        return not any(checks.odd(x.stride()) for x in self.tensors if x is not None)

    def for_tma(self, o: Tensor) -> list[Tensor]:
        return [with_strides(x, (8, 8, 8, 1)) for x in (self.q, self.k, self.v, o)]

    def arguments(self, o: Tensor) -> tuple:
        return ()

    def compute(self, o: Tensor | None, how: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q.detach(), self.k.detach(), self.v.detach()
        found, lse, row_max = reference.attention(q, k, v, layout=self.layout, return_row_max=True, **how)
        return (o_like(self.q, self.v) if o is None else o).copy_(found), lse, row_max

    def operator_arguments(self) -> tuple:
        return self.layout, *(None,) * 6

    def operator_keywords(self) -> dict[str, Any]:
        return {}

    def differentiable(self) -> None:
        """They are."""

    def lacks_gradient(self) -> None:
        checks.grid(self.q, self.layout)


class Ragged(NamedTuple):
    """(total, H, D) tensors of varlen sequences, whose lengths the device knows."""

    q: Any
    k: Any
    v: Any
    out: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    max_seqlen_q: Any
    max_seqlen_k: Any

    @property
    def names(self) -> tuple[str, str, str, str]:
        return TENSORS

    @property
    def function(self) -> str:
        return "flash_fwd_varlen"

    @property
    def layout(self) -> str:
        return "thd"

    @property
    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.out

    @property
    def lengths(self) -> tuple:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k

    @property
    def hints(self) -> tuple:
        return self.max_seqlen_q, self.max_seqlen_k

    def all_causal(self) -> "Ragged":
        return self

    def key(self) -> Hashable:
        q, k, v, out, cu_q, cu_k, used_q, used_k, max_q, max_k = self
        return (
            *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), None if out is None else out.stride()),
            *(q.dtype, q.get_device(), max_q, max_k, type(max_q), type(max_k)),
            *(cu_q.shape, cu_q.stride(), cu_q.dtype, cu_q.get_device()),
            *(cu_k.shape, cu_k.stride(), cu_k.dtype, cu_k.get_device()),
            None if used_q is None else (used_q.shape, used_q.stride(), used_q.dtype, used_q.get_device()),
            None if used_k is None else (used_k.shape, used_k.stride(), used_k.dtype, used_k.get_device()),
        )

    def check(self) -> None:
        if type(self.cu_seqlens_q) is type(self.cu_seqlens_k) is Tensor and self.seqused_q is self.seqused_k is None:
            return
        for name, x in zip(LENGTHS, self.lengths, strict=True):
            if isinstance(x, Tensor):
                arrays.real(name, x)

    def specs(self) -> tuple[Spec, Spec, Spec, Spec]:
        for name, x in zip("qkv", self.tensors, strict=False):
            arrays.tensor(name, x)
        for name, x in zip(LENGTHS, self.lengths, strict=True):
            if x is not None or name in LENGTHS[:2]:
                arrays.tensor(name, x)
        for name, value in zip(HINTS, self.hints, strict=True):
            checks.max_seqlen(name, value)
        return specs_of(self)

    def problem(self, specs: tuple, causal: bool, constant_time: bool, features: Any) -> Problem:
        q, k, v, o = specs
        checks.lengths(LENGTHS[0], Spec.of(self.lengths[0]), None, q)
        batch = self.lengths[0].shape[0] - 1
        for name, x, count in zip(LENGTHS, self.lengths, (None, batch + 1, batch, batch), strict=True):
            if x is not None:
                checks.lengths(name, Spec.of(x), count, q)
        checks.varlen(q, k, v, batch)
        if self.out is not None:
            checks.out(o, q, v, self.layout)
        _no_kernel_of_varlen(constant_time, features)
        sizes = batch, q.shape[1], k.shape[1], q.shape[0], k.shape[0], q.shape[2]
        kind = checks.DTYPES[q.dtype], self.layout, causal, constant_time, features
        return Problem(*sizes, *kind, checks.other_head_dim(q, v), packed="qk")

    def config(self, problem: Problem, gpu: str | None) -> FwdConfig:
        p, hint = problem, self.max_seqlen_q
        return plan_varlen(p.head_dim, p.dtype, p.causal, p.features, gpu, p.head_dim_v, p.ratio, hint)

    def rows(self) -> tuple[int, ...]:
        return self.q.shape[1], self.q.shape[0]

    def nothing(self, problem: Problem) -> bool:
        return 0 in (problem.batch, problem.seqlen_q, problem.heads)

    def plain(self) -> bool:
        return self.k.shape[0] > 0 and not any(checks.odd(x.stride()) for x in self.tensors if x is not None)

    def for_tma(self, o: Tensor) -> list[Tensor]:
        """Without keys, k and v are others, of which no sequence has a row."""
        q, k, v, _ = self.tensors
        if k.shape[0] == 0:
            k, v = q[:1, : k.shape[1]], o[:1, : k.shape[1]]
        return [with_strides(x, (8, 8, 1)) for x in (q, k, v, o)]

    def arguments(self, o: Tensor) -> tuple:
        cu_q, cu_k, used_q, used_k = self.lengths
        used = 0 if used_q is None else used_q.data_ptr(), 0 if used_k is None else used_k.data_ptr()
        return cu_q.data_ptr(), cu_k.data_ptr(), *used, cu_q.shape[0] - 1

    def compute(self, o: Tensor | None, how: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of no sequence are not written: lse and row_max are as a kernel finds them."""
        q, k, v = (x.detach() for x in (self.q, self.k, self.v))
        o = o_like(self.q, self.v) if o is None else o
        lse = self.q.new_empty(self.rows(), dtype=torch.float32)
        row_max = torch.full_like(lse, -torch.inf)
        used = dict(seqused_q=self.seqused_q, seqused_k=self.seqused_k, return_row_max=True)
        for rows, *found in reference.varlen(q, k, v, self.cu_seqlens_q, self.cu_seqlens_k, **used, **how):
            o[rows] = found[0].to(o.dtype)
            lse[:, rows], row_max[:, rows] = found[1:]
        return o, lse, row_max

    def operator_arguments(self) -> tuple:
        return self.layout, *self.lengths, *map(checks.max_seqlen, HINTS, self.hints)

    def operator_keywords(self) -> dict[str, Any]:
        return {}

    def differentiable(self) -> None:
        """They are."""

    def lacks_gradient(self) -> None:
        checks.varlen_gradients(*self.hints, *self.lengths[2:])


def _no_kernel_of_varlen(constant_time: bool, features: Any) -> None:
    """What flash_fwd_varlen does not take, and the operator's arguments can say."""
    asked = dict(constant_time=constant_time, dropout_p=features.dropout, block_mask=features.sparse)
    given = [name for name, value in asked.items() if value]
    if given:
        raise ValueError(
            f"{', '.join(given)}: given with cu_seqlens, and packed sequences have no such kernel; omit it"
        )


def dense_key(q, k, v, out, layout) -> tuple:
    """See `Operands.key`."""
    o = None if out is None else out.stride()
    return q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), o, q.dtype, q.get_device(), layout


def o_like(q: Tensor, v: Tensor) -> Tensor:
    """Empty, of q's shape with v's head dim: q's dimensions in their order in memory."""
    return q.new_empty_strided(*strides.of_output(q, v.shape[-1]))


def gpu_of(q: Spec) -> device.Device | None:
    """None: the CPU."""
    return None if q.device.type == "cpu" else device.get(q.device.index)


def specs_of(operands: Operands) -> tuple[Spec, Spec, Spec, Spec]:
    """Of q, k, v and out, or of q where there is none: dense tensors, if nothing else."""
    q, k, v, out = operands.tensors
    given = q, k, v, q if out is None else out
    for name, x in zip(operands.names, given, strict=True):
        arrays.tensor(name, x)
    q, k, v, o = map(Spec.of, given)
    return q, k, v, o


def with_strides(x: Tensor, strides_of_one: tuple[int, ...]) -> Tensor:
    """x, whose sizes of 1 have these strides instead of what may be none of TMA's."""
    return x.as_strided(
        x.shape, [s if n > 1 else d for n, s, d in zip(x.shape, x.stride(), strides_of_one, strict=True)]
    )
