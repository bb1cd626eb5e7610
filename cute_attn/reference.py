"""Attention by its definition, in float32 or float64: the truth for tests and benchmark, and what CPU tensors get."""

import torch

CHUNK_BYTES = 256 << 20  # of scores held at a time


def attention(q, k, v, *, causal=False, scale=None, layout="bhsd", dtype=torch.float64):
    """softmax(scale q k^T) v over every (query, key) pair that the mask leaves, all in `dtype`.

    q (B, H, Sq, D), k and v (B, Hk, Sk, D) with Hk dividing H; layout "bshd" swaps the two middle dimensions. causal
    is aligned to the last key. Returns o like q and lse (B, H, Sq), natural log, both in `dtype`. A row whose every
    score is -inf, which no visible key implies, gives o = 0 and lse = -inf.
    """
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, ratio = k.shape[2], heads // max(k.shape[1], 1)
    scale = head_dim**-0.5 if scale is None else scale
    o = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    rows = max(1, CHUNK_BYTES // (max(seqlen_k, 1) * dtype.itemsize))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // ratio].to(dtype), v[b, h // ratio].to(dtype)
            for start in range(0, seqlen_q, rows):
                part = slice(start, start + rows)
                limit = _limits(start, q[b, h, part].shape[0], seqlen_q, seqlen_k, q.device) if causal else None
                o[b, h, part], lse[b, h, part] = _rows(q[b, h, part].to(dtype), keys, values, scale, limit)
    return (o.transpose(1, 2) if layout == "bshd" else o), lse


def _limits(start, rows, seqlen_q, seqlen_k, device):
    """(rows, 1) keys that each row from `start` on sees."""
    return torch.arange(start + 1, start + 1 + rows, device=device)[:, None] + seqlen_k - seqlen_q


def _rows(q, k, v, scale, limit):
    s = (q @ k.T) * scale
    if limit is not None:
        s.masked_fill_(torch.arange(s.shape[1], device=s.device) >= limit, -torch.inf)
    if s.shape[1] == 0:
        return torch.zeros_like(q), torch.full_like(s.sum(1), -torch.inf)
    top = s.amax(dim=1, keepdim=True)
    empty = top == -torch.inf
    p = torch.exp(s - top.masked_fill(empty, 0.0))
    total = p.sum(dim=1, keepdim=True)
    o = ((p / total) @ v).masked_fill(empty, 0.0)
    return o, (top + total.log()).squeeze(1)
