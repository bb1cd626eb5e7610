"""Varlen sequences, and flash_fwd_varlen held to float64, sequence by sequence."""

from itertools import accumulate

import torch

from cute_attn import flash_fwd_varlen, reference
from cute_attn.features.window import window as bounded
from tests.support.attention import bound, close_lse, sdpa

# (Sq, Sk) of each sequence: one row, one tile, its edges, several tiles, none at all on one side or both
EDGES = [(1, 1), (0, 0), (64, 64), (65, 63), (0, 17), (128, 300), (33, 0), (200, 1), (1, 500), (257, 255), (0, 0)]
MARK = 0x7FC1  # a NaN in either type, and none that arithmetic gives


def int32(values, where):
    return torch.tensor(list(values), dtype=torch.int32, device=where)


def placed(lengths, margin, slack):
    """(starts, total): sequences with `slack` rows behind each, and `margin` rows around them all."""
    *starts, end = accumulate((n + slack for n in lengths), initial=margin)
    return [*starts, end], end + margin


def varlen_inputs(sizes, heads, heads_kv, head_dim, dtype=torch.bfloat16, where="cuda", margin=3, slack=0):
    """q, k, v with NaN in every row that is in no sequence, or not used; and the lengths as flash_fwd_varlen's."""
    sides = []
    for lengths in zip(*sizes, strict=True):
        starts, total = placed(lengths, margin, slack)
        used = torch.zeros(total, dtype=torch.bool, device=where)
        for start, n in zip(starts, lengths, strict=False):
            used[start : start + n] = True
        sides.append((starts, total, used, lengths))

    def one(h, side):
        x = torch.randn((side[1], h, head_dim), device=where).to(dtype)
        return x.masked_fill_(~side[2][:, None, None], torch.nan)

    q, k, v = one(heads, sides[0]), one(heads_kv, sides[1]), one(heads_kv, sides[1])
    how = {f"cu_seqlens_{name}": int32(side[0], where) for name, side in zip("qk", sides, strict=True)}
    if slack:
        how |= {f"seqused_{name}": int32(side[3], where) for name, side in zip("qk", sides, strict=True)}
    return q, k, v, how


def one_sequence(q, k, v, a, b):
    """(1, H, S, D) of the rows a of q, and b of k and v."""
    return [x[None, rows].transpose(1, 2) for x, rows in ((q, a), (k, b), (v, b))]


def right(q, k, v, how, o, lse, scale=None, **mask):
    """o and lse against float64, sequence by sequence; rows of none, or not used, are as they were: MARK."""
    plain, window = bounded(mask.get("window"), mask.get("causal", False))
    untouched = torch.ones(len(q), dtype=torch.bool, device=q.device)
    queries = reference.parts(how["cu_seqlens_q"], how.get("seqused_q"), len(q))
    keys = reference.parts(how["cu_seqlens_k"], how.get("seqused_k"), len(k))
    for a, b in zip(queries, keys, strict=True):
        untouched[a] = False
        one = one_sequence(q, k, v, a, b)
        asked = dict(causal=plain, scale=scale, window=window)
        want, want_lse = reference.attention(*one, **asked)
        if a.stop > a.start:
            bound(o[None, a].transpose(1, 2), want, sdpa(*one, **asked) if b.stop > b.start else want)
            if lse is not None:
                close_lse(lse[None, :, a], want_lse)
    assert (o[untouched].view(torch.int16) == MARK).all(), "a row of no sequence was written"


def marked(q):
    out = torch.empty_like(q)
    out.view(torch.int16).fill_(MARK)
    return out


def check(q, k, v, how, *, lse=True, scale=None, **mask):
    out = marked(q)
    found = flash_fwd_varlen(q, k, v, **how, **mask, scale=scale, return_lse=lse, out=out)
    o, row_lse = found if lse else (found, None)
    assert o is out
    right(q, k, v, how, o, row_lse, scale, **mask)
    return o, row_lse
