"""Attention and its gradients by definition, in float32 or float64: the truth for tests, and what CPU tensors get."""

from itertools import product

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


def gradients(grad, q, k, v, *, causal=False, scale=None, layout="bhsd", dtype=torch.float64):
    """Of `attention`'s o: (dq, dk, dv), like q, k, v and in `dtype`, where `grad` is o's. A row without keys adds 0."""
    if layout == "bshd":
        swapped = (x.transpose(1, 2) for x in (grad, q, k, v))
        found = gradients(*swapped, causal=causal, scale=scale, dtype=dtype)
        return tuple(x.transpose(1, 2) for x in found)
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, ratio = k.shape[2], heads // max(k.shape[1], 1)
    scale = head_dim**-0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    rows = max(1, CHUNK_BYTES // (max(seqlen_k, 1) * dtype.itemsize))
    for b, h in product(range(batch), range(heads if seqlen_k else 0)):
        keys, values = k[b, h // ratio].to(dtype), v[b, h // ratio].to(dtype)
        for start in range(0, seqlen_q, rows):
            part = slice(start, start + rows)
            queries, do = q[b, h, part].to(dtype), grad[b, h, part].to(dtype)
            s = _scores(queries, keys, scale, _limits(start, len(do), seqlen_q, seqlen_k, q.device) if causal else None)
            p = s.softmax(dim=1).masked_fill(s.amax(dim=1, keepdim=True) == -torch.inf, 0.0)
            dp = do @ values.T
            ds = scale * p * (dp - (p * dp).sum(dim=1, keepdim=True))
            dq[b, h, part] = ds @ keys
            dk[b, h // ratio] += ds.T @ queries
            dv[b, h // ratio] += p.T @ do
    return dq, dk, dv


def _limits(start, rows, seqlen_q, seqlen_k, device):
    """(rows, 1) keys that each row from `start` on sees."""
    return torch.arange(start + 1, start + 1 + rows, device=device)[:, None] + seqlen_k - seqlen_q


def _scores(q, k, scale, limit):
    s = (q @ k.T) * scale
    if limit is not None:
        s.masked_fill_(torch.arange(s.shape[1], device=s.device) >= limit, -torch.inf)
    return s


def _rows(q, k, v, scale, limit):
    s = _scores(q, k, scale, limit)
    if s.shape[1] == 0:
        return torch.zeros_like(q), torch.full_like(s.sum(1), -torch.inf)
    top = s.amax(dim=1, keepdim=True)
    empty = top == -torch.inf
    p = torch.exp(s - top.masked_fill(empty, 0.0))
    total = p.sum(dim=1, keepdim=True)
    o = ((p / total) @ v).masked_fill(empty, 0.0)
    return o, (top + total.log()).squeeze(1)
