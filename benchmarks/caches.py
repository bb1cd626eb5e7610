"""K/V caches as serving has them, dense or of pages: what is asked, the tensors, and the truth of attention over them.

K and V come in several sets of the same values in different memory, which calls take in turn: no call finds its keys in
the L2.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_attn import reference
from cute_attn.checks import TORCH_DTYPES
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.cells import Truth
from cute_attn.tools.benchmark.implementations import Inputs, Prepared, first_of
from cute_attn.tools.benchmark.timing import Call
from cute_attn.tools.benchmark.workload import Spec

COLD_BYTES, MOST_SETS = 240e6, 64  # of K and V in all sets, at least; of sets, at most
SEED, SHORTEST, LONGEST = 0, 512, 32768
ALIGNMENT = 1024  # elements
PART = 1 << 28  # elements that are drawn at a time


@dataclass(frozen=True)
class CacheSpec(Spec):
    """New queries of each sequence over all its keys, in a cache with pages of `problem.page` keys, 0: dense."""

    @property
    def keys(self) -> tuple[int, ...]:
        """How many each sequence has."""
        return tuple(k for _, k in self.sequences)

    @property
    def pages(self) -> tuple[int, ...]:
        """How many each sequence has, of a paged cache."""
        return tuple(-(-k // self.problem.page) for k in self.keys)

    @property
    def kv_bytes(self) -> int:
        """Of K and V of all sequences, once."""
        p = self.problem
        return sum(self.keys) * p.heads_kv * (p.head_dim + p.d_v) * TORCH_DTYPES[p.dtype].itemsize

    @property
    def sets(self) -> int:
        return max(1, min(MOST_SETS, math.ceil(COLD_BYTES / self.kv_bytes)))

    @property
    def shape(self) -> str:
        p, keys = self.problem, sorted({min(self.keys), max(self.keys)})
        return f"{p.batch},{p.heads},{p.seqlen_q},{p.head_dim},{p.heads_kv},{'..'.join(map(str, keys))}"

    def facts(self) -> dict[str, Any]:
        facts, page = super().facts(), self.problem.page
        where = {"page_size": page} if page else {}
        return facts | {
            "page": page,
            "kv_bytes": self.kv_bytes,
            "features": {**facts["features"], **where, "sets": self.sets},
        }


def over_keys(
    batch: int, heads: tuple[int, int], tokens: int, keys: int | Sequence[int], head_dim: int = 128, page: int = 0
) -> CacheSpec:
    """So many new tokens, causal where they are several, over as many keys in each sequence, or of each as many."""
    each = () if isinstance(keys, int) else tuple((tokens, k) for k in keys)
    longest = keys if isinstance(keys, int) else max(keys)
    p = Problem(batch, *heads, tokens, longest, head_dim, "bf16", "bshd", causal=tokens > 1, page=page)
    return CacheSpec(p, lengths=each)


def random_lengths(count: int, seed: int = SEED) -> tuple[int, ...]:
    """Log-uniform."""
    rng, ends = random.Random(seed), (math.log(SHORTEST), math.log(LONGEST))
    return tuple(int(math.exp(rng.uniform(*ends))) for _ in range(count))


class Cache(NamedTuple):
    """q (B, Sq, H, D), and sets of K and V: each (B, S, Hk, D), or (pages, page_size, Hk, D)."""

    spec: CacheSpec
    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    seqlens: Tensor  # (B,) int32: the keys of each sequence
    page_table: Tensor | None  # (B, pages_per_seq) int32

    def inputs(self) -> list[Inputs]:
        """Of each set of a dense cache."""
        q, p = self.q.transpose(1, 2), self.spec.problem
        pairs = zip(self.k, self.v, strict=True)
        return [Inputs(q, k.transpose(1, 2), v.transpose(1, 2), p) for k, v in pairs]


class Pool:
    """One buffer that every cell's K and V are views of: to get this much memory anew takes long."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def tensors(self, count: int, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """So many of one shape. Those of an earlier call lie in the same memory."""
        size = math.prod(shape)
        step = -(-size // ALIGNMENT) * ALIGNMENT
        if self._buffer is None or len(self._buffer) < count * step or self._buffer.device != like.device:
            self._buffer = None
            self._buffer = like.new_empty(count * step)
        return [x[:size].view(shape) for x in self._buffer[: count * step].split(step)]


POOL = Pool()


def build(spec: CacheSpec, device: torch.device) -> Cache:
    """Random normal; lengths and page table are on the device."""
    p, random_numbers = spec.problem, torch.Generator(device).manual_seed(SEED)
    shape = p.batch, p.seqlen_q, p.heads, p.head_dim
    q = torch.randn(shape, generator=random_numbers, dtype=TORCH_DTYPES[p.dtype], device=device)
    rows = (sum(spec.pages), p.page) if p.page else (p.batch, max(spec.keys))
    tensors = POOL.tensors(2 * spec.sets, (*rows, p.heads_kv, p.head_dim), q)
    k, v = tensors[0::2], tensors[1::2]
    for first, *others in (k, v):
        for part in first.view(-1).split(PART):
            part.normal_(generator=random_numbers)
        for other in others:
            other.copy_(first)
    seqlens = torch.tensor(spec.keys, dtype=torch.int32, device=device)
    return Cache(spec, q, k, v, seqlens, page_table(spec).to(device) if p.page else None)


def page_table(spec: CacheSpec) -> Tensor:
    """(B, pages_per_seq) int32: all pages of one pool in random order; 0 beyond a sequence's own."""
    order = torch.randperm(sum(spec.pages), generator=torch.Generator().manual_seed(SEED)).int()
    table = torch.zeros(len(spec.pages), max(spec.pages), dtype=torch.int32)
    for row, pages in zip(table, order.split(spec.pages), strict=True):
        row[: len(pages)] = pages
    return table


class CacheTruth:
    """float32 attention of some heads of the first sequence and of the last."""

    def __init__(self, cache: Cache):
        self._of = {b: Truth(sequence(cache, b)) for b in sorted({0, len(cache.q) - 1})}
        self.pairs = [(b, h) for b, truth in self._of.items() for _, h in truth.pairs]

    def errors(self, o: Tensor) -> tuple[float, float]:
        """Of o (B, H, Sq, D): the larger of the two sequences'; inf where o is not finite."""
        if not torch.isfinite(o).all():
            return torch.inf, torch.inf
        every = [truth.errors(o[b : b + 1]) for b, truth in self._of.items()]
        return max(e[0] for e in every), max(e[1] for e in every)


def sequence(cache: Cache, b: int) -> Inputs:
    """The b-th alone, with its keys and values in their order."""
    length = cache.spec.keys[b]
    k, v = (reference.cached(sets[0], b, length, cache.page_table) for sets in (cache.k, cache.v))
    q, k, v = (x[None].transpose(1, 2) for x in (cache.q[b], k, v))
    return Inputs(q, k, v, cache.spec.problem._replace(batch=1, seqlen_k=length, page=None))


class InTurn:
    """Each call makes the next of these calls; after the last one comes the first."""

    def __init__(self, calls: Iterable[Callable[[], Any]]):
        self._calls = cycle(calls)

    def __call__(self) -> Any:
        return next(self._calls)()


def of_sets(cache: Cache, call: Callable[[Tensor, Tensor], Any]) -> Prepared:
    """A call of k and v, whose o is (B, Sq, H, D), on the sets in turn."""
    calls = [partial(call, k, v) for k, v in zip(cache.k, cache.v, strict=True)]
    return Prepared(Call(InTurn(calls)), lambda returned: first_of(returned).transpose(1, 2))
