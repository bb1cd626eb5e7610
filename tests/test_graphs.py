"""CUDA graphs made for us: torch.cuda.make_graphed_callables and torch.compile(mode="reduce-overhead")."""

import gc

import pytest
import torch
from attention import inputs

from cute_attn import device, flash_fwd

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[64, 128])
def qkv(request):
    """Long enough for several tiles per CTA, drawn from a counter where that is planned."""
    gc.collect()  # graphs of earlier tests, which would die, and call CUDA, in the middle of a capture
    return inputs(4, 16, 4, 1024, 1024, request.param)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_graphed_callables(learns, causal, qkv):
    """Forward, and backward where the sample inputs require grad, replayed with new data."""
    sample = [x.clone().requires_grad_(learns) for x in qkv]
    graphed = torch.cuda.make_graphed_callables(lambda q, k, v: flash_fwd(q, k, v, causal=causal), tuple(sample))
    for _ in range(3):
        fresh = [torch.randn_like(x).requires_grad_(learns) for x in qkv]
        o, want = graphed(*fresh), flash_fwd(*fresh, causal=causal)
        assert torch.equal(o, want) and o.requires_grad == learns
        if learns:
            grad = torch.randn_like(o)
            got = torch.autograd.grad(o, fresh, grad)
            for dx, other in zip(got, torch.autograd.grad(want, fresh, grad), strict=True):
                torch.testing.assert_close(dx, other, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_reduce_overhead(learns, causal, qkv, monkeypatch):
    """In a process where nothing has run yet: what a call keeps must not lie in the graphs' own memory."""
    monkeypatch.setattr(device, "_devices", {})
    monkeypatch.setattr("cute_attn.api._calls", {})
    model = torch.compile(
        lambda q, k, v: flash_fwd(q * 2, k, v, causal=causal) + 1, mode="reduce-overhead", fullgraph=True
    )
    for _ in range(5):
        fresh = [torch.randn_like(x).requires_grad_(learns) for x in qkv]
        torch.compiler.cudagraph_mark_step_begin()
        o = model(*fresh)
        want = flash_fwd(fresh[0] * 2, *fresh[1:], causal=causal) + 1
        torch.testing.assert_close(o, want)
        if learns:
            for dx, other in zip(
                torch.autograd.grad(o.sum(), fresh), torch.autograd.grad(want.sum(), fresh), strict=True
            ):
                torch.testing.assert_close(dx, other, atol=0.01, rtol=0.02)
