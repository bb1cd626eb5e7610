"""Inputs, and the bound that an output must keep: error(ours) <= 2 * error(torch SDPA in the same dtype) + 1 ulp."""

import torch

from cute_attn import flash_fwd
from cute_attn.reference import attention
from cute_attn.tools.benchmark import edges
from cute_attn.tools.benchmark.edges import EDGES as EDGES
from cute_attn.tools.benchmark.edges import LSE_ATOL, LSE_RTOL, sdpa
from cute_attn.tools.benchmark.edges import visible as visible

DTYPES = (torch.bfloat16, torch.float16)


def inputs(
    batch,
    heads,
    heads_kv,
    seqlen_q,
    seqlen_k,
    head_dim,
    dtype=torch.bfloat16,
    device="cuda",
    layout="bhsd",
    head_dim_v=None,
):
    """Fresh random q, k, v."""

    def one(h, s, d=head_dim):
        shape = (batch, h, s, d) if layout == "bhsd" else (batch, s, h, d)
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    return one(heads, seqlen_q), one(heads_kv, seqlen_k), one(heads_kv, seqlen_k, head_dim_v or head_dim)


def check(q, k, v, *, causal=False, scale=None, layout="bhsd", lse=True, constant_time=False, **call):
    """flash_fwd on a poisoned output, against float64; returns o and lse. call: `out`, and features."""
    out = call.pop("out", None)
    if out is None:
        out = q.new_full((*q.shape[:3], v.shape[3]), torch.nan)
    how = dict(causal=causal, scale=scale, **call)
    o = flash_fwd(q, k, v, layout=layout, return_lse=lse, out=out, constant_time=constant_time, **how)
    o, row_lse = o if lse else (o, None)
    assert o is out
    if layout == "bshd":
        q, k, v, o = (x.transpose(1, 2) for x in (q, k, v, o))
    want, want_lse = attention(q, k, v, **how)
    bound(o, want, sdpa(q, k, v, **how))
    if lse:
        close_lse(row_lse, want_lse, edges.lse_atol(q, k, scale))
    return o, row_lse


def bound(ours, want, torch_s, slack=1, floor=0.0):
    """No worse than twice torch in the same dtype, plus one ulp of the largest output; slack times that, plus floor."""
    assert not ours.isnan().any()
    error, allowed = edges.bound(ours, want, torch_s)
    allowed = slack * allowed + floor
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def gradient_bound(ours, want, torch_s):
    """Of torch's backward fed with our o and lse, beside another of torch's: theirs to answer for, not ours.

    Where a row sees one key its gradient is 0, and what both make of it are a few units of 1e-7.
    """
    bound(ours, want, torch_s, slack=2, floor=1e-5)


def close_lse(ours, want, atol=LSE_ATOL):
    assert ours.dtype == torch.float32
    assert ours.shape == want.shape
    torch.testing.assert_close(ours.double(), want, rtol=LSE_RTOL, atol=atol)
