"""K/V caches, and flash_fwd_kvcache held to float64, sequence by sequence.

NaN is in every row and page that no sequence has, and what is no page stands in page_table beyond each length.
"""

from itertools import cycle
from typing import Any, NamedTuple

import torch

from cute_attn import flash_fwd_kvcache, reference
from tests.support.attention import bound, close_lse, sdpa
from tests.support.mods import by_hand
from tests.support.varlen import MARK, int32, placed
from tests.support.varlen_modifiers import alone

NO_PAGES = -1, 2**31 - 1, -(2**31), 1 << 20


class Case(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    how: dict[str, Any]  # where the sequences lie, as flash_fwd_kvcache takes it
    keys: list[torch.Tensor]  # of each sequence (Sk, Hk, D), as they were written
    values: list[torch.Tensor]

    @property
    def call(self) -> dict[str, Any]:
        return dict(q=self.q, k_cache=self.k_cache, v_cache=self.v_cache, **self.how)


def edges(page_size):
    """Lengths around those of pages, of boxes and of tiles."""
    return [0, 1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 127, 128, 129, 3 * page_size + 5]


# Storage: K and V of so many pages (or sequences), NaN throughout
def separate(pages, rows, heads, d, d_v):
    return [torch.empty(pages, rows, heads, n) for n in (d, d_v)]


def heads_first(pages, rows, heads, d, d_v):
    return [torch.empty(pages, heads, rows, n).transpose(1, 2) for n in (d, d_v)]


def beside(pages, rows, heads, d, d_v):
    """A row of V behind each row of K."""
    both = torch.empty(pages, rows, heads * (d + d_v)).split([heads * d, heads * d_v], dim=-1)
    return [x.unflatten(-1, (heads, n)) for x, n in zip(both, (d, d_v), strict=True)]


def interleaved(pages, rows, heads, d, d_v):
    """In the last axis, heads before rows, as vLLM keeps them."""
    return list(torch.empty(pages, heads, rows, d + d_v).transpose(1, 2).split([d, d_v], dim=-1))


def padded(pages, rows, heads, d, d_v):
    return [torch.empty(pages, rows + 3, heads + 1, n + 8)[:, :rows, :heads, :n] for n in (d, d_v)]


STORAGE = {x.__name__: x for x in (separate, heads_first, beside, interleaved, padded)}


def stored(storage, sizes, dtype, where):
    """Of the same strides in this type, whichever were allocated."""
    found = []
    for x in storage(*sizes):
        base = torch.full((x.untyped_storage().nbytes() // x.itemsize,), torch.nan, dtype=dtype, device=where)
        found.append((base, x.shape, x.stride(), x.storage_offset()))
    if storage in (beside, interleaved):
        found[1] = (found[0][0], *found[1][1:])
    return [base.as_strided(*at) for base, *at in found]


def queries(heads, d, seqlens_q, packed, dtype, where):
    """q and what says how many each sequence has: all as many, or packed with rows of none around them."""
    if not packed:
        return torch.randn(len(seqlens_q), seqlens_q[0], heads, d, device=where).to(dtype), {}
    starts, total = placed(seqlens_q, 2, 0)
    q = torch.randn(total, heads, d, device=where).to(dtype)
    rows = torch.ones(total, dtype=torch.bool, device=where)
    rows[starts[0] : starts[-1]] = False
    return q.masked_fill_(rows[:, None, None], torch.nan), dict(cu_seqlens_q=int32(starts, where))


def paged(
    lengths,
    page_size,
    *,
    heads=4,
    heads_kv=2,
    d=64,
    d_v=None,
    seqlen_q=1,
    packed=None,
    storage=separate,
    shared=0,
    dtype=torch.bfloat16,
    where="cpu",
) -> Case:
    """Pages in a random order, of which the first `shared` are every sequence's that is so long.

    packed: how many queries each sequence has, in place of seqlen_q.
    """
    needed = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    k_cache, v_cache = stored(storage, (len(order), page_size, heads_kv, d, d_v or d), dtype, where)
    table = torch.tensor(NO_PAGES, dtype=torch.int32).repeat(len(lengths), max(needed) // 4 + 2)
    most, owned, keys, values = max(needed) + 2, iter(order), [], []
    common = [next(owned) for _ in range(shared)]
    for n, length in enumerate(lengths):
        whole = min(shared, length // page_size)
        pages = [*common[:whole], *(next(owned) for _ in range(needed[n] - whole))]
        table[n, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for cache, found in ((k_cache, keys), (v_cache, values)):
            found.append(_written(cache, pages, length))
    q, how = queries(heads, d, packed or [seqlen_q] * len(lengths), packed, dtype, where)
    how |= dict(cache_seqlens=int32(lengths, where), page_table=table.to(where)[:, :most])
    return Case(q, k_cache, v_cache, how, keys, values)


def _written(cache, pages, length):
    """The rows of a sequence, written where there is none yet."""
    rows = []
    for i, page in enumerate(pages):
        own = cache[page, : min(length - i * cache.shape[1], cache.shape[1])]
        own.copy_(torch.where(own.isnan(), torch.randn(own.shape, device=own.device), own.float()))
        rows.append(own)
    return torch.cat(rows) if rows else cache.new_empty(0, *cache.shape[2:])


def dense(
    lengths,
    capacity,
    *,
    heads=4,
    heads_kv=2,
    d=64,
    d_v=None,
    seqlen_q=1,
    packed=None,
    storage=separate,
    index=False,
    leftpad=False,
    dtype=torch.bfloat16,
    where="cpu",
) -> Case:
    """A part for each sequence; with `index` in another order, among others; with `leftpad` begun with NaN."""
    rows = torch.randperm(len(lengths) + 3).tolist() if index else list(range(len(lengths)))
    parts = len(lengths) + 3 * index
    k_cache, v_cache = stored(storage, (parts, capacity, heads_kv, d, d_v or d), dtype, where)
    pads = [pad if leftpad else 0 for pad, _ in zip(cycle((0, 3, 70, 1)), lengths, strict=False)]
    keys, values = [], []
    for row, length, pad in zip(rows, lengths, pads, strict=False):
        for cache, found in ((k_cache, keys), (v_cache, values)):
            own = cache[row, pad : max(length, pad)]
            own.copy_(torch.randn(own.shape, device=where))
            found.append(own)
    q, how = queries(heads, d, packed or [seqlen_q] * len(lengths), packed, dtype, where)
    how |= dict(cache_seqlens=int32(lengths, where))
    how |= dict(cache_batch_idx=int32(rows[: len(lengths)], where)) if index else {}
    how |= dict(cache_leftpad=int32(pads, where)) if leftpad else {}
    return Case(q, k_cache, v_cache, how, keys, values)


def marked(case):
    """An out whose rows say whether they were written."""
    out = case.q.new_empty(*case.q.shape[:-1], case.v_cache.shape[-1])
    out.view(torch.int16).fill_(MARK)
    return out


def check(case, *, lse=True, **asked):
    """Against float64; rows of q that no sequence has stay as they were."""
    out = marked(case)
    found = flash_fwd_kvcache(**case.call, **asked, return_lse=lse, out=out)
    o, row_lse = found if lse else (found, None)
    assert o is out
    right(case, o, row_lse, **asked)
    return o, row_lse


def right(case, o, lse, causal=False, **asked):
    """o and lse of such a call; `case.keys` are those that the lengths say."""
    packed = "cu_seqlens_q" in case.how
    places = list(reference.parts(case.how["cu_seqlens_q"], None, len(o))) if packed else range(len(o))
    untouched = torch.ones(len(o), dtype=torch.bool, device=o.device)
    for n, (place, k, v) in enumerate(zip(places, case.keys, case.values, strict=True)):
        untouched[place] = False
        one = [x[None].transpose(1, 2) for x in (case.q[place], k, v)]
        if 0 in one[0].shape:
            continue
        own = dict(causal=bool(causal[n]) if isinstance(causal, torch.Tensor) else causal) | alone(n, **asked)
        want, want_lse = reference.attention(*one, **own)
        theirs = by_hand if {"score_mod", "mask_mod"} & set(own) else sdpa
        bound(o[place][None].transpose(1, 2), want, theirs(*one, **own) if len(k) else want)
        if lse is not None:
            close_lse((lse[:, place] if packed else lse[place])[None], want_lse)
    assert (o[untouched].view(torch.int16) == MARK).all(), "a row of no sequence was written"
