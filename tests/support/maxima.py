"""flash_fwd with all its outputs, held to float64."""

import torch

from cute_attn import flash_fwd, reference
from tests.support.attention import bound, close_lse, sdpa

ASKED = dict(return_lse=True, return_row_max=True, return_max_logit=True)


def check(q, k, v, *, layout="bhsd", constant_time=False, **how):
    """flash_fwd with all outputs, against float64; the maxima are as exact as lse."""
    out = torch.full_like(q, torch.nan)
    o, lse, row_max, max_logit = flash_fwd(q, k, v, layout=layout, constant_time=constant_time, out=out, **how, **ASKED)
    if layout == "bshd":
        q, k, v, o = (x.transpose(1, 2) for x in (q, k, v, o))
    want, want_lse, *want_max = reference.attention(q, k, v, **how, return_row_max=True, return_max_logit=True)
    bound(o, want, sdpa(q, k, v, **dict(causal=False) | how))
    for ours, theirs in zip((lse, row_max, max_logit), (want_lse, *want_max), strict=True):
        close_lse(ours, theirs)
    assert torch.equal(max_logit, row_max.amax((0, 2)))
