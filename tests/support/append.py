"""New tokens for a K/V cache, and what becomes of the cache and of attention, by hand in float64."""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from cute_attn import flash_fwd_kvcache
from tests.support.kvcache import Case, dense, marked, paged, right
from tests.support.varlen import int32

PLACES = 500  # of a rotary table


class New(NamedTuple):
    case: Case  # as before: NaN in every row that no sequence has
    before: list[int]
    new: list[int]  # of each sequence
    given: dict[str, Any]  # k, v, cu_seqlens_k_new, and what rotates


def room(lengths, new, page_size, **how):
    """Pages with room for so many new rows of each sequence."""
    case = paged([n + m for n, m in zip(lengths, new, strict=True)], page_size, **how)
    for b, (n, m) in enumerate(zip(lengths, new, strict=True)):
        for row in range(n, n + m):
            page = case.how["page_table"][b, row // page_size]
            case.k_cache[page, row % page_size] = case.v_cache[page, row % page_size] = torch.nan
    keys, values = ([x[:n] for x, n in zip(every, lengths, strict=True)] for every in (case.keys, case.values))
    return made(case._replace(keys=keys, values=values), lengths, new, **how)


def beside(lengths, new, capacity, **how):
    """A dense cache, in which a sequence may have no room for all of them."""
    return made(dense(lengths, capacity, **how), lengths, new, **how)


def made(case, lengths, new, where="cpu", **how):
    case.how.update(cache_seqlens=int32(lengths, where))
    (heads_kv, d), d_v = case.k_cache.shape[2:], case.v_cache.shape[3]
    equal = len(set(new)) == 1
    shape = (len(new), new[0]) if equal else (sum(new),)
    k, v = (torch.randn(*shape, heads_kv, n, device=where).to(case.q.dtype) for n in (d, d_v))
    given = dict(k=k, v=v) | ({} if equal else dict(cu_seqlens_k_new=int32([0, *accumulate(new)], where)))
    return New(case, list(lengths), list(new), given)


def rotary(columns, where, *, interleaved=True, dtype=torch.float32):
    angles = torch.rand(PLACES, columns // 2, device=where) * 6
    return dict(rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype), rotary_interleaved=interleaved)


def turned(x, first, rotary_cos=None, rotary_sin=None, rotary_interleaved=True, rotary_seqlens=None, step=1):
    """x (s, h, d) at the places from the first on, rounded as it is written."""
    if rotary_cos is None or not len(x):
        return x
    half, found = rotary_cos.shape[1], x.double().clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rotary_interleaved else (i, i + half)
        at = (first + step * torch.arange(len(x), device=x.device)).clamp(0, len(rotary_cos) - 1)
        cos, sin = (t[at, i, None].double() for t in (rotary_cos, rotary_sin))
        found[..., a], found[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return found.to(x.dtype)


def split(x, sizes, cu_seqlens=None):
    """Of each sequence its rows."""
    return list(x) if cu_seqlens is None else [x[a:b] for a, b in pairwise(cu_seqlens.tolist())]


def check(new, *, lse=True, **asked):
    """The cache: its new rows, and nothing else; and attention over it, by the rotated q."""
    case, given = new.case, new.given
    rotates = {name: x for name, x in (given | asked).items() if name.startswith("rotary")}
    asked = {name: x for name, x in asked.items() if name not in rotates}
    starts = rotates.get("rotary_seqlens", torch.tensor(new.before)).tolist()
    before = case.k_cache.clone(), case.v_cache.clone()
    found = flash_fwd_kvcache(**case.call | given | rotates | asked, return_lse=lse, out=(out := marked(case)))
    capacity = case.k_cache.shape[1] * (case.how["page_table"].shape[1] if "page_table" in case.how else 1)
    keys, values = list(case.keys), list(case.values)
    for name, cache, rows in (("k", case.k_cache, keys), ("v", case.v_cache, values)):
        parts = split(given[name], new.new, given.get("cu_seqlens_k_new"))
        for b, (n, x) in enumerate(zip(new.before, parts, strict=True)):
            x = turned(x, starts[b], **rotates) if name == "k" else x
            x = x[: max(capacity - n, 0)]
            rows[b] = torch.cat((rows[b], x))
            for i, row in enumerate(x):
                close(place(case, cache, b, n + i), row)
                place(case, cache, b, n + i).copy_(place(case, before[name == "v"], b, n + i))
    for cache, was in zip((case.k_cache, case.v_cache), before, strict=True):
        assert torch.equal(cache.view(torch.int16), was.view(torch.int16)), "a row changed that is none of the new ones"
    spread = bool(asked.get("causal", False) is not False or asked.get("window"))
    q = case.q.clone()
    cu = case.how.get("cu_seqlens_q")
    for part, first in zip(split(q, None, cu), starts, strict=True):
        part.copy_(turned(part, first, **rotates, step=int(spread)))
    o, found_lse = found if lse else (found, None)
    assert o is out
    asked.pop("max_seqlen_q", None)
    found_lse = None if rotates else found_lse  # of a q whose roundings may be others by one unit
    right(case._replace(q=q, keys=keys, values=values), o, found_lse, **asked)


def place(case, cache, b, row):
    """Where a sequence's row lies."""
    if "page_table" in case.how:
        return cache[case.how["page_table"][b, row // cache.shape[1]], row % cache.shape[1]]
    return cache[b if "cache_batch_idx" not in case.how else case.how["cache_batch_idx"][b], row]


def close(found, want):
    """To a rounding: sums of two products, in float32."""
    torch.testing.assert_close(found.float(), want.float(), atol=2**-8, rtol=2**-7)
