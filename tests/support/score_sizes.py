"""Scores of every size that float32 holds, exactly, and what o and lse of them must keep.

Keys come in chunks, each of one score that a row multiplies by 1, 0 or -1; chunks of 0 have random scores too. So rows
of one warp differ, their largest scores come early, late, twice or never, and equal ones must weigh the same.
"""

import torch

from cute_attn import flash_fwd
from cute_attn.reference import attention
from tests.support.attention import bound, inputs

CHUNKS = (
    (0, 0, 0, -1e9, -1e9),
    (-1e9, -1e9, 0, 0, 0),
    (0, -300, -1e4, -1e6, -1e9),
    (-1e9, -1e9, -1e9, -1e9, -1e9),
    (1e9, 1e9, 0, -5, 0),
    (1e9, 2e9, 2e9, 0, 0),
    (0, 3e7, 3e7, 1e3, 0),
    (1e30, -1e30, 0, 1e30, 0),
    (-3.3e38, 0, -3.3e38, 3e5, 3e5),
    (1e7, 0, -1e7, 0, -1e7),
)
SMALL = dict(rows=40, chunk=31)  # of each head
LARGE = dict(rows=300, chunk=333)  # on a GPU


def chunked(head_dim, dtype, device, rows, chunk, heads_kv=None, factor=1.0, unit=1.0):
    """q, k, v with a head for each of CHUNKS; scores are theirs times factor, and unit is in q alone.

    heads_kv: of K/V heads, each with `rows` of q in several heads. fp16 holds up to 65504: q takes a part of the score.
    """
    heads = heads_kv or len(CHUNKS)
    q, k, v = inputs(1, len(CHUNKS), heads, rows, chunk * 5, head_dim, dtype, device)
    base = torch.tensor(CHUNKS, dtype=torch.float64, device=device)[:heads].repeat_interleave(chunk, 1) * factor
    sizes = torch.tensor([1.0, 0.0, -1.0, 1.0], device=device).repeat(rows)[:rows]
    k[..., 1:] *= (base == 0)[..., None]
    if dtype == torch.float16:
        base, sizes = base.clamp(-6e4, 6e4), sizes * 512
    q[..., 0], k[..., 0] = sizes, base.to(dtype)
    return q * unit, k, v


def rounded(q, k, v, scale=1.0, **how):
    """o with no other error than those of P and of o, rounded to q's type."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = torch.eye(k.shape[2], dtype=torch.float64, device=q.device).expand(*k.shape[:2], -1, -1)
    p, _ = attention(q, k, weights, scale=scale, **how)
    return (p.to(q.dtype).double() @ v.double()).to(q.dtype)


def check(q, k, v, *, scale=1.0, layout="bhsd", constant_time=False, row_max=False, **how):
    """The bound of every other test, and lse (and row_max) to a few units of its last place, whatever |q| |k|."""
    parts = [x.transpose(1, 2).contiguous() for x in (q, k, v)] if layout == "bshd" else (q, k, v)
    out = parts[0].new_full(parts[0].shape, torch.nan)
    asked = dict(return_lse=True, return_row_max=row_max, out=out)
    o, *found = flash_fwd(*parts, scale=scale, layout=layout, constant_time=constant_time, **asked, **how)
    o = o.transpose(1, 2) if layout == "bshd" else o
    want, *wanted = attention(q, k, v, scale=scale, return_row_max=row_max, **how)
    theirs = rounded(q, k, v, scale, **how)
    for head in range(q.shape[1]):  # each by its own error
        bound(o[:, head], want[:, head], theirs[:, head])
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=4e-5)
