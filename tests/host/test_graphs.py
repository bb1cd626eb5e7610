"""CUDA graphs made for us: torch.cuda.make_graphed_callables and torch.compile(mode="reduce-overhead")."""

import gc
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from cute_attn import device, flash_fwd
from tests.support.attention import inputs

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def several_tiles(head_dim):
    """q, k, v long enough for several tiles per CTA, by a dynamic scheduler where that is planned."""
    gc.collect()  # graphs of earlier tests, which would die, and call CUDA, in the middle of a capture
    return inputs(4, 16, 4, 1024, 1024, head_dim)


@pytest.fixture(params=[64, 128])
def qkv(request):
    return several_tiles(request.param)


def test_graphed_callables():
    """In a process of its own: torch captures here in CUDA's global mode, so that any thread's call may end a capture,
    those of another test's library too.
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["ok"] * 8


def graphed_callables(learns, causal, qkv):
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
    monkeypatch.setattr("cute_attn.call.known", {})
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


if __name__ == "__main__":
    for head_dim, causal, learns in product((64, 128), (False, True), (False, True)):
        graphed_callables(learns, causal, several_tiles(head_dim))
        print("ok")
