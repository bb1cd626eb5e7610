"""Times what surrounds attention in a decode step: appending, rotary embeddings, trees of drafts.

python benchmarks/append.py [--out FILE] [--only WORD] [--rounds N]

bf16, 64 heads on 8, D 128, CUDA-graph replays with K and V from memory. `decode`: attention over 8k keys, alone, with a
new token appended, and rotated too, beside FlashAttention-3's function for the same. `tree`: so many drafts by
draft_mask, beside a causal call of as many tokens. `append_kv`: new tokens to random slots of a cache, beside a copy of
as many bytes. Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from caches import COLD_BYTES, Cache, CacheSpec, CacheTruth, InTurn, build, of_sets, over_keys
from script import main

from cute_attn import append_kv, flash_fwd_kvcache
from cute_attn.tools.benchmark import frame
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import BASELINES, OURS, CuteAttn, Prepared
from cute_attn.tools.benchmark.timing import Call
from cute_attn.tools.benchmark.workload import Workload

HEADS, KEYS, PAGE = (64, 8), 8192, 64
BATCHES, DRAFTS, TOKENS = (1, 8, 32, 128), (8, 64), (1024, 4096, 16384)


# A new token
def with_new(cache: Cache, function: Callable, rotary: bool, new: bool) -> Prepared:
    """The last key of each sequence is the new one; angles of 0, so that the truth is attention's."""
    p = cache.spec.problem
    sin = cache.q.new_zeros(p.seqlen_k, p.head_dim // 2)
    turn = dict(rotary_cos=torch.ones_like(sin), rotary_sin=sin, rotary_interleaved=False) if rotary else {}
    how: dict[str, Any] = dict(causal=True, page_table=cache.page_table, cache_seqlens=cache.seqlens - int(new)) | turn
    page = cache.page_table[:, -1].long()  # type: ignore[index]
    row = (cache.seqlens - 1).long() % PAGE
    last = dict(k=cache.k[0][page, row][:, None], v=cache.v[0][page, row][:, None]) if new else {}
    return of_sets(cache, lambda k, v: function(cache.q, k, v, **how, **last))


def fa3(cache: Cache, rotary: bool, new: bool) -> Prepared:
    return with_new(cache, BASELINES["fa3"].function("flash_attn_with_kvcache"), rotary, new)


def decode_rows(spec: CacheSpec, device: torch.device) -> list[Row]:
    cache = build(spec, device)
    kinds = {"": (False, False), "_append": (False, True), "_append_rotary": (True, True)}
    made: dict[str, Callable[[], Prepared]] = {
        **{OURS + end: partial(with_new, cache, flash_fwd_kvcache, *how) for end, how in kinds.items()},
        **{"fa3" + end: partial(fa3, cache, *how) for end, how in kinds.items()},
    }
    why = BASELINES["fa3"].absent()
    absent = {name: why for name in made if name.startswith("fa3")} if why else {}
    return [Row(spec, made, CacheTruth(cache), "decode", baseline=OURS, absent=absent, sets=spec.sets)]


# Trees
def tree_rows(spec: CacheSpec, device: torch.device) -> list[Row]:
    """A chain of drafts, whose truth is causal attention's."""
    cache = build(spec, device)
    n = spec.problem.seqlen_q
    bits = torch.ones(n, -(-n // 32) * 32, dtype=torch.int64).tril().unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32)).sum(-1).to(torch.int32).expand(spec.problem.batch, -1, -1).contiguous()
    where = dict(cache_seqlens=cache.seqlens, page_table=cache.page_table)
    made: dict[str, Callable[[], Prepared]] = {
        OURS: lambda: of_sets(cache, partial(flash_fwd_kvcache, cache.q, draft_mask=words.to(device), **where)),
        "causal": lambda: of_sets(cache, partial(flash_fwd_kvcache, cache.q, causal=True, **where)),
    }
    return [Row(spec, made, CacheTruth(cache), "tree", baseline="causal", sets=spec.sets)]


# append_kv
@dataclass(frozen=True)
class Tokens(CacheSpec):
    """New tokens, each in seqlen_q's place: K and V are read once and written once."""

    def workload(self) -> Workload:
        return Workload(1.0, 2 * self.kv_bytes)


def token_rows(count: int, device: torch.device) -> list[Row]:
    spec = Tokens(over_keys(1, HEADS, 1, count, page=PAGE).problem)
    sets = max(1, round(COLD_BYTES / spec.kv_bytes))
    shape = count, HEADS[1], spec.problem.head_dim
    new = [[torch.randn(shape, device=device).bfloat16() for _ in range(2)] for _ in range(sets)]
    caches = [
        [torch.zeros(2 * count // PAGE, PAGE, *shape[1:], device=device).bfloat16() for _ in range(2)] for _ in new
    ]
    slots = torch.randperm(2 * count, device=device)[:count]

    def ours() -> Prepared:
        calls = [partial(append_kv, *kv, *cache, slots) for kv, cache in zip(new, caches, strict=True)]
        append_kv(*new[0], *caches[0], slots)
        for x, cache in zip(new[0], caches[0], strict=True):
            assert torch.equal(cache.flatten(0, 1)[slots], x), "append_kv wrote something else"
        return Prepared(Call(InTurn(calls)), lambda returned: caches[0][0])

    def copy() -> Prepared:
        pairs = [(torch.stack(kv), torch.stack(kv)) for kv in new]
        return Prepared(Call(InTurn([partial(to.copy_, x) for to, x in pairs])), lambda returned: returned)

    return [Row(spec, {OURS: ours, "copy": copy}, None, "append_kv", baseline="copy", sets=sets)]


class Run(frame.Run):
    ours = OURS, f"{OURS}_append", f"{OURS}_append_rotary"


GROUPS = {
    **{f"decode B{b}": partial(decode_rows, over_keys(b, HEADS, 1, KEYS, page=PAGE)) for b in BATCHES},
    **{
        f"tree of {n} B{b}": partial(tree_rows, over_keys(b, HEADS, n, KEYS, page=PAGE))
        for b, n in product((1, 8, 32), DRAFTS)
    },
    **{f"append_kv {n}": partial(token_rows, n) for n in TOKENS},
}

if __name__ == "__main__":
    sys.exit(main("append", __doc__, GROUPS, make=Run, baselines=[CuteAttn(), BASELINES["fa3"]]))
