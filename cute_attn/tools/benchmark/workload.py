"""What a row computes (Spec), how much work that is (Workload), and the least time a GPU needs for it (Roofline).

FLOPs are those of the visible (query, key) pairs. Bytes are the least that must move: q, k and v read once, o and lse
written once. The roofline is max(FLOPs / peak, bytes / bandwidth); operands that lie in the L2 may beat it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from ... import plan
from ...checks import TORCH_DTYPES
from ...problem import Problem

FLOP_FORMULA = "2 (D + Dv) for each visible (query, key) pair of each head"
BYTES_FORMULA = "q, k, v read once, o and lse written once; keys that no query sees are left out"
LSE_BYTES = 4
FIELDS = tuple(
    name for name in Problem._fields if name not in ("features", "page", "packed")
)  # of a problem, in a record


class Peak(NamedTuple):
    """Dense bf16 or fp16, and memory."""

    tflops: float
    tb_per_s: float


PEAKS = {  # by torch's name of the GPU, as published; of a GPU that is not here no roofline is given
    "NVIDIA H200": Peak(989, 4.8),
    "NVIDIA H100 80GB HBM3": Peak(989, 3.35),
}


class Roofline(NamedTuple):
    us: float
    bound: str  # "compute" or "memory"


class Workload(NamedTuple):
    flops: float
    bytes: float

    def roofline(self, gpu: str | None) -> Roofline | None:
        """The least time on a GPU, by torch's name of it; None where its peaks are not known."""
        peak = PEAKS.get(gpu or "")
        if peak is None:
            return None
        compute, memory = self.flops / peak.tflops / 1e6, self.bytes / peak.tb_per_s / 1e6
        return Roofline(max(compute, memory), "compute" if compute >= memory else "memory")


@dataclass(frozen=True)
class Spec:
    """One call: a problem, and of its values those that its work depends on."""

    problem: Problem
    window: tuple[int | None, int | None] = (None, None)  # (left, right), None: no bound
    lengths: tuple[tuple[int, int], ...] = ()  # (Sq, Sk) of each sequence of a varlen call; the problem has the longest
    pairs: int | None = None  # visible pairs in all heads and sequences, where a block list or mask decides
    backward: bool = False  # the gradients too
    features: Mapping[str, Any] = field(default_factory=dict)  # what else is asked, as the JSON has it

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        return self.lengths or ((self.problem.seqlen_q, self.problem.seqlen_k),) * self.problem.batch

    @property
    def shape(self) -> str:
        if not self.lengths:
            return shape_word(self.problem)
        p, queries = self.problem, [q for q, _ in self.lengths]
        return f"{len(queries)},{p.heads},{min(queries)}..{max(queries)},{p.head_dim}"

    def visible(self) -> int:
        """(query, key) pairs that attend, in all heads and sequences."""
        if self.pairs is not None:
            return self.pairs
        left, right = self.window
        right = 0 if self.problem.causal else right
        return self.problem.heads * sum(visible_pairs(q, k, left, right) for q, k in self.sequences)

    def kernel(self, gpu: str | None) -> str | None:
        """The name of ours on a GPU, by that GPU's name; None where what else is asked decides."""
        p = self.problem
        if self.features:
            return None
        if p.page is None:
            return plan.plan(p, gpu).name
        sizes = p.head_dim_v, p.ratio, p.seqlen_q, p.page or None, p.batch, p.heads_kv, p.seqlen_k
        return plan.kvcache(p.head_dim, p.dtype, p.causal, p.features, gpu, *sizes).name

    def workload(self) -> Workload:
        p, (left, _) = self.problem, self.window
        size = TORCH_DTYPES[p.dtype].itemsize
        rows = p.heads * sum(q for q, _ in self.sequences)
        keys = p.heads_kv * sum(k if left is None else min(k, q + left) for q, k in self.sequences)
        q, kv, o = (size * n for n in (rows * p.head_dim, keys * (p.head_dim + p.d_v), rows * p.d_v))
        flops, moved = 2 * (p.head_dim + p.d_v), q + kv + o + LSE_BYTES * rows
        if self.backward:  # S, dP, dV, dQ and dK; q, k, v, o, lse and dO read once, dQ, dK and dV written once
            flops, moved = flops + 6 * p.head_dim + 4 * p.d_v, 2 * moved + o + q + kv
        return Workload(float(flops * self.visible()), float(moved))

    def facts(self) -> dict[str, Any]:
        """As a record has it."""
        fields = {name: getattr(self.problem, name) for name in FIELDS}
        ragged = {"sequences": len(self.lengths), "tokens": sum(q for q, _ in self.lengths)} if self.lengths else {}
        window = {} if self.window == (None, None) else {"window": list(self.window)}
        features = {**ragged, **window, **self.features} | ({"backward": True} if self.backward else {})
        flops, moved = self.workload()
        return {"shape": self.shape, **fields, "features": features, "flops": flops, "bytes": moved}


@cache
def visible_pairs(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> int:
    """Of one head: query i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right."""
    pairs = 0
    for last in range(seqlen_k - seqlen_q, seqlen_k):
        first = 0 if left is None else max(last - left, 0)
        end = seqlen_k if right is None else min(last + right + 1, seqlen_k)
        pairs += max(end - first, 0)
    return pairs


def block_pairs(chosen: torch.Tensor, size: tuple[int, int], seqlen_q: int, seqlen_k: int) -> int:
    """Pairs in the chosen blocks (B, H, blocks of queries, blocks of keys), those at the edges being smaller."""
    rows, keys = (
        [min(step, seqlen - start) for start in range(0, seqlen, step)]
        for seqlen, step in zip((seqlen_q, seqlen_k), size, strict=True)
    )
    counts = chosen.long().sum((0, 1)).tolist()  # of how many heads each block is
    return sum(r * k * n for r, line in zip(rows, counts, strict=True) for k, n in zip(keys, line, strict=True))


def mask_pairs(mask_mod: Callable, p: Problem, device: torch.device) -> int:
    """Pairs of which mask_mod(b, h, q_idx, kv_idx) holds, in all heads and sequences."""
    rows, keys = torch.arange(p.seqlen_q, device=device)[:, None], torch.arange(p.seqlen_k, device=device)
    heads = [(b, h) for b in range(p.batch) for h in range(p.heads)]
    return sum(int(mask_mod(b, h, rows, keys).expand(p.seqlen_q, p.seqlen_k).sum()) for b, h in heads)


def shape_word(problem: Problem) -> str:
    """B,H,S,D, or D/Dv; then Hk where it differs, then Sk where it does (with Hk)."""
    p = problem
    word = f"{p.batch},{p.heads},{p.seqlen_q},{p.head_dim}" + (f"/{p.head_dim_v}" if p.head_dim_v else "")
    if p.heads_kv != p.heads or p.seqlen_k != p.seqlen_q:
        word += f",{p.heads_kv}"
    return word + (f",{p.seqlen_k}" if p.seqlen_k != p.seqlen_q else "")


def cell_word(problem: Problem) -> str:
    return f"{shape_word(problem)} {'causal' if problem.causal else 'full'}"
