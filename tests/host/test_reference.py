"""The truth itself, against torch's float64 SDPA and against a loop over single rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from cute_attn import reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 9), (9, 5), (7, 7), (3, 0)])
def test_against_a_loop(seqlen_q, seqlen_k, causal):
    q, k, v = torch.randn(1, 2, seqlen_q, 8), torch.randn(1, 1, seqlen_k, 8), torch.randn(1, 1, seqlen_k, 8)
    o, lse = reference.attention(q, k, v, causal=causal, scale=0.7)
    for h in range(2):
        for i in range(seqlen_q):
            keys = [j for j in range(seqlen_k) if not causal or j <= i + seqlen_k - seqlen_q]
            weights = [math.exp(0.7 * float(q[0, h, i].double() @ k[0, 0, j].double())) for j in keys]
            want = sum((w * v[0, 0, j].double() for w, j in zip(weights, keys, strict=True)), torch.zeros(8))
            assert torch.allclose(o[0, h, i], want / sum(weights) if keys else want.double(), atol=1e-12)
            assert math.isclose(lse[0, h, i], math.log(sum(weights)) if keys else -math.inf, abs_tol=1e-12)


def test_against_sdpa_in_small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 50 * 8 * 7)
    q, k, v = (torch.randn(2, 3, 50, 16, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(reference.attention(q, k, v, causal=causal)[0], want)
        shuffled = [x.transpose(1, 2) for x in (q, k, v)]
        o = reference.attention(*shuffled, causal=causal, layout="bshd")[0]
        torch.testing.assert_close(o.transpose(1, 2), want)


def test_nan_is_kept():
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    k[0, 0, 2, 0] = torch.nan
    o, lse = reference.attention(q, k, v, causal=True)
    assert o[0, 0, 2:].isnan().all()
    assert lse[0, 0, 2:].isnan().all()
    assert o[0, 0, :2].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 20, 40])
def test_gradients_are_autograds(seqlen_q, causal, monkeypatch):
    """torch differentiates its own float64 attention; a query that sees no key is left out of that."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 20 * 8 * 7)
    q, grad = (torch.randn(2, 4, seqlen_q, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, 20, 8, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first = max(0, seqlen_q - 20) if causal else 0
    mask = torch.ones(seqlen_q, 20, dtype=torch.bool).tril(20 - seqlen_q)[first:] if causal else None
    full = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    o = F.scaled_dot_product_attention(q[:, :, first:], *full, attn_mask=mask, scale=0.3)
    want = torch.autograd.grad(o, leaves, grad[:, :, first:])
    with torch.no_grad():
        got = reference.gradients(grad, q, k, v, causal=causal, scale=0.3)
        swapped = [x.transpose(1, 2) for x in (grad, q, k, v)]
        other = reference.gradients(*swapped, causal=causal, scale=0.3, layout="bshd")
    for ours, theirs, bshd in zip(got, want, other, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(bshd.transpose(1, 2), ours)


def test_gradients_without_keys_are_zero():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    dq, dk, dv = reference.gradients(q, q, k, k)
    assert (dq == 0).all() and dk.shape == dv.shape == k.shape
