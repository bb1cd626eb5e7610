"""Times varlen sequences of random lengths beside equal ones of the same work, and beside others' varlen.

python benchmarks/varlen.py [--out FILE] [--only WORD]

64 sequences, lengths from 64 to 8192 with a fixed seed, 16 heads, bf16, full and causal; the baseline is torch's
FlashAttention-2. Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import inspect
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, product
from typing import NamedTuple

import torch
from script import absent, main

from cute_attn import flash_fwd, flash_fwd_varlen
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.cells import Truth
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import BASELINES, OURS, FlashAttention, Inputs, plain
from cute_attn.tools.benchmark.workload import Spec

BATCH, SHORTEST, LONGEST, HEADS, HEAD_DIMS, SEED = 64, 64, 8192, 16, (64, 128), 0
CHECKED = 4  # sequences that are compared
PACKAGES = FlashAttention("fa2", "flash_attn"), BASELINES["fa3"], BASELINES["fa4"]


class Packing(NamedTuple):
    """Varlen sequences of these lengths: q, k and v are (total, H, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    def spec(self, causal: bool) -> Spec:
        _, heads, head_dim = self.q.shape
        longest = max(self.lengths)
        p = Problem(len(self.lengths), heads, heads, longest, longest, head_dim, "bf16", "bshd", causal)
        return Spec(p, lengths=tuple((n, n) for n in self.lengths))


class VarlenTruth:
    """float32 attention of some heads of some sequences, the shortest and the longest among them."""

    def __init__(self, p: Packing, causal: bool):
        order = sorted(range(len(p.lengths)), key=lambda i: p.lengths[i])
        count = min(CHECKED, len(order))
        starts = [0, *accumulate(p.lengths)]
        self._of = {}
        for i in {order[n * (len(order) - 1) // max(count - 1, 1)] for n in range(count)}:
            part = slice(starts[i], starts[i + 1])
            q, k, v = (x[None, part].transpose(1, 2) for x in p[:3])
            problem = Problem(1, q.shape[1], k.shape[1], p.lengths[i], p.lengths[i], q.shape[3], causal=causal)
            self._of[i] = part, Truth(Inputs(q, k, v, problem))
        self.pairs = [(i, h) for i, (_, truth) in self._of.items() for _, h in truth.pairs]

    def errors(self, o: torch.Tensor) -> tuple[float, float]:
        """Of o (total, H, D): the largest of the sequences'; inf where o is not finite."""
        if not torch.isfinite(o).all():
            return torch.inf, torch.inf
        every = [truth.errors(o[None, part].transpose(1, 2)) for part, truth in self._of.values()]
        return max(e[0] for e in every), max(e[1] for e in every)


def random_lengths(seed: int = SEED) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(SHORTEST, LONGEST) for _ in range(BATCH))


def equal(lengths: Sequence[int]) -> tuple[int, ...]:
    """As many sequences of one length, of the same work but for rounding."""
    return (round(math.sqrt(sum(n * n for n in lengths) / len(lengths))),) * len(lengths)


def pack(lengths: tuple[int, ...], head_dim: int, device: torch.device) -> Packing:
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (sum(lengths), HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device) for _ in range(3))
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    return Packing(q, k, v, lengths, cu_seqlens)


def ours(p: Packing, causal: bool) -> torch.Tensor:
    return flash_fwd_varlen(p.q, p.k, p.v, p.cu_seqlens, p.cu_seqlens, causal=causal)


def dense(p: Packing, causal: bool) -> torch.Tensor:
    """flash_fwd, for equal lengths."""
    q, k, v = (x.unflatten(0, (len(p.lengths), -1)) for x in p[:3])
    return flash_fwd(q, k, v, causal=causal, layout="bshd").flatten(0, 1)


def flash(p: Packing, causal: bool) -> torch.Tensor:
    """torch's FlashAttention-2."""
    how = (p.cu_seqlens, p.cu_seqlens, max(p.lengths), max(p.lengths), 0.0, causal, False)
    return torch.ops.aten._flash_attention_forward(p.q, p.k, p.v, *how)[0]


def torch_varlen(p: Packing, causal: bool) -> torch.Tensor:
    """torch.nn.attention.varlen, of whatever version."""
    from torch.nn.attention.varlen import varlen_attn

    old = "is_causal" in inspect.signature(varlen_attn).parameters
    how = dict(is_causal=causal) if old else dict(window_size=(-1, 0 if causal else -1))
    return varlen_attn(p.q, p.k, p.v, p.cu_seqlens, p.cu_seqlens, max(p.lengths), max(p.lengths), **how)


def package(one: FlashAttention, p: Packing, causal: bool):
    """FlashAttention-2's, -3's or -4's own package."""
    call = one.function("flash_attn_varlen_func")
    known = inspect.signature(call).parameters
    lengths = {f"cu_seqlens_{x}": p.cu_seqlens for x in "qk"}
    hints = {name: max(p.lengths) for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
    return call(p.q, p.k, p.v, **lengths, **hints, causal=causal)


def row(case: str, p: Packing, causal: bool, calls: dict[str, Callable]) -> Row:
    prepared = {name: plain(partial(call, p, causal)) for name, call in calls.items()}
    return Row(p.spec(causal), prepared, VarlenTruth(p, causal), case, "flash", absent(PACKAGES))


def rows(head_dim: int, causal: bool, device: torch.device) -> list[Row]:
    mixed = pack(random_lengths(), head_dim, device)
    even = pack(equal(mixed.lengths), head_dim, device)
    baselines = {"flash": flash, "torch varlen": torch_varlen, **{one.name: partial(package, one) for one in PACKAGES}}
    return [
        row("drawn", mixed, causal, {OURS: ours, **baselines}),
        row("equal lengths", even, causal, {OURS: ours, "dense": dense}),
    ]


GROUPS = {
    f"d{head_dim} {'causal' if causal else 'full'}": partial(rows, head_dim, causal)
    for head_dim, causal in product(HEAD_DIMS, (False, True))
}

if __name__ == "__main__":
    sys.exit(main("varlen", __doc__, GROUPS, baselines=PACKAGES, lengths=random_lengths()))
