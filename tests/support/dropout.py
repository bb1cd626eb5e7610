"""flash_fwd with dropout, held to float64."""

import torch

from cute_attn import flash_fwd, reference
from cute_attn.reference import LEVELS, keep_mask, levels_kept
from tests.support.attention import bound, close_lse, sdpa


def check(q, k, v, p, *, layout="bhsd", constant_time=False, rng_state=None, **how):
    """flash_fwd against float64 with the mask computed anew; lse is as without dropout."""
    given = dict(dropout_p=p, rng_state=rng_state, layout=layout, constant_time=constant_time, **how)
    out = torch.full_like(q, torch.nan)
    o, lse, used = flash_fwd(q, k, v, return_lse=True, return_rng_state=True, out=out, **given)
    assert rng_state is None or used is rng_state
    if layout == "bshd":
        q, k, v, o = (x.transpose(1, 2) for x in (q, k, v, o))
    weights = keep_mask(used, p, *q.shape[:3], k.shape[2]) * (LEVELS / levels_kept(p))
    want, want_lse = reference.attention(q, k, v, dropout_p=p, rng_state=used, **how)
    bound(o, want, sdpa(q, k, v, **dict(causal=False) | how, weights=weights))
    close_lse(lse, want_lse)
    close_lse(lse, reference.attention(q, k, v, **how)[1])
