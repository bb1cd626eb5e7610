"""Inputs, and the bound that an output must keep: error(ours) <= 2 * error(torch SDPA in the same dtype) + 1 ulp."""

import torch
import torch.nn.functional as F

from cute_attn import flash_fwd
from cute_attn.reference import attention

EDGES = [(128, 128), (1, 1), (113, 203), (203, 113), (256, 129), (129, 127), (1, 1025), (1024, 1023), (1023, 1024)]
DTYPES = (torch.bfloat16, torch.float16)


def inputs(batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, dtype=torch.bfloat16, device="cuda", layout="bhsd"):
    """Fresh random q, k, v."""

    def one(h, s):
        shape = (batch, h, s, head_dim) if layout == "bhsd" else (batch, s, h, head_dim)
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    return one(heads, seqlen_q), one(heads_kv, seqlen_k), one(heads_kv, seqlen_k)


def visible(seqlen_q, seqlen_k, causal, device):
    """(Sq, Sk) bool: the pairs that attend."""
    pairs = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return pairs.tril(seqlen_k - seqlen_q) if causal else pairs


def sdpa(q, k, v, causal, scale=None):
    """torch SDPA in q's dtype, (B, H, S, D); its own choice of backend without a mask, else with an explicit one."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
    mask = visible(q.shape[2], k.shape[2], True, q.device) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def check(q, k, v, *, causal=False, scale=None, layout="bhsd", lse=True, **call):
    """flash_fwd on a poisoned output, against float64; returns o and lse."""
    out = call.pop("out", None)
    if out is None:
        out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    o = flash_fwd(q, k, v, causal=causal, scale=scale, layout=layout, return_lse=lse, out=out, **call)
    o, row_lse = o if lse else (o, None)
    assert o is out
    if layout == "bshd":
        q, k, v, o = (x.transpose(1, 2) for x in (q, k, v, o))
    want, want_lse = attention(q, k, v, causal=causal, scale=scale)
    bound(o, want, sdpa(q, k, v, causal, scale))
    if lse:
        close_lse(row_lse, want_lse)
    return o, row_lse


def bound(ours, want, torch_s):
    """No worse than twice torch in the same dtype, plus one unit in the last place of the largest output."""
    assert not ours.isnan().any()
    seen = ~torch_s.isnan().any(dim=-1)  # some of torch's kernels give NaN where a row sees no key
    ulp = torch.finfo(ours.dtype).eps * want.abs().max()
    error, allowed = (ours - want).abs().max(), 2 * (torch_s - want)[seen].abs().max() + ulp if seen.any() else ulp
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def close_lse(ours, want):
    """float32 sums of exponentials of float32 scores: a few units in the sixth digit."""
    assert ours.dtype == torch.float32
    assert ours.shape == want.shape
    torch.testing.assert_close(ours.double(), want, rtol=2e-6, atol=2e-5)
