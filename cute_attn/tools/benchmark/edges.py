"""Lengths at the edges of tiles, and the bound that an output must keep: what the tests and `validate` hold us to."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import cute_attn

from ...reference import attention
from .implementations import Inputs

EDGES = [(128, 128), (1, 1), (113, 203), (203, 113), (256, 129), (129, 127), (1, 1025), (1024, 1023), (1023, 1024)]
LSE_RTOL, LSE_ATOL = 2e-6, 2e-5  # float32 sums of exponentials of float32 scores: a few units in the sixth digit
PRODUCT_RTOL = 2**-23  # of |q| |k|: a score that is small since its products cancel has their error all the same


class Edge(NamedTuple):
    """The largest error of o, what is allowed, and whether lse is right."""

    error: float
    allowed: float
    lse: bool

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.lse  # an error of NaN is not


def check(inputs: Inputs) -> Edge:
    """flash_fwd on a poisoned output, against float64."""
    q, k, v, problem = inputs
    o = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    _, lse = cute_attn.flash_fwd(q, k, v, causal=problem.causal, return_lse=True, out=o)
    want, want_lse = attention(q, k, v, causal=problem.causal)
    close = torch.allclose(lse.double(), want_lse, rtol=LSE_RTOL, atol=lse_atol(q, k))
    return Edge(*bound(o, want, sdpa(q, k, v, problem.causal)), close)


def lse_atol(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> float:
    """What lse may be off by: LSE_ATOL, or what float32 sums of products as large as these may be."""
    if 0 in (q.numel(), k.numel()):
        return LSE_ATOL
    largest = math.prod(x.float().norm(dim=-1).max().item() for x in (q, k))
    return max(LSE_ATOL, PRODUCT_RTOL * abs(q.shape[-1] ** -0.5 if scale is None else scale) * largest)


def bound(ours: torch.Tensor, want: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(our error, what is allowed): twice that of torch in the same dtype, and one ulp of the largest output."""
    seen = ~theirs.isnan().any(dim=-1)  # some of torch's kernels give NaN where a row sees no key
    ulp = torch.finfo(ours.dtype).eps * want.abs().max()
    error, allowed = (ours - want).abs().max(), 2 * (theirs - want)[seen].abs().max() + ulp if seen.any() else ulp
    return error.item(), allowed.item()


def sdpa(q, k, v, causal, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, weights=None):
    """torch SDPA in q's dtype, (B, H, S, D); its own choice of backend without a mask, else with an explicit one.

    With what it does not take: the same by hand, float32 but for its operands and for P. weights (B, H, Sq, Sk)
    multiply those of the softmax, as dropout does.
    """
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
    masked = causal or window is not None
    mask = visible(q.shape[2], k.shape[2], causal, q.device, window) if masked else None
    if softcap is alibi_slopes is sinks is weights is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    s = q.float() @ k.float().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        i, j = (torch.arange(n, device=q.device) for n in s.shape[2:])
        s = s - alibi_slopes[..., None, None] * (i[:, None] + len(j) - len(i) - j).abs()
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:3], 1)), dim=3)
    p = s.softmax(dim=3)[..., : k.shape[2]]
    return (p if weights is None else p * weights).to(v.dtype) @ v


def visible(seqlen_q, seqlen_k, causal, device, window=None):
    """(Sq, Sk) bool: the pairs that attend."""
    pairs = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    left, right = window or (None, None)
    for side in (0 if causal else None, right):
        pairs = pairs if side is None else pairs.tril(seqlen_k - seqlen_q + side)
    return pairs if left is None else pairs.triu(seqlen_k - seqlen_q - left)
