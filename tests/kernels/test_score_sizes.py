"""Scores of every size that float32 holds, in each kind of kernel: o and lse against float64.

`test_interpreted.test_right` has them in the plain kernels of every kind.
"""

from itertools import product

import pytest
import torch

from cute_attn import BlockLists, flash_fwd, flash_fwd_varlen
from cute_attn.block_mask import as_lists
from cute_attn.reference import attention, varlen
from tests.interpreter import interpreted
from tests.support.attention import DTYPES, bound, inputs
from tests.support.plans import kernels_of
from tests.support.requirements import interpreter
from tests.support.score_sizes import CHUNKS, LARGE, SMALL, check, chunked, rounded
from tests.support.varlen import varlen_inputs

FINFO = torch.finfo(torch.float32)
pytestmark = pytest.mark.usefixtures("one_thread")


BESIDE = {
    "window": (64, dict(window=(100, 20))),
    "row_max": (64, dict(row_max=True)),
    "row_max, constant time": (64, dict(row_max=True, constant_time=True)),
    "sinks": (128, dict(sinks=torch.linspace(-4, 4, len(CHUNKS)))),
    "dropout": (64, dict(dropout_p=0.3, rng_state=torch.tensor([5, 7]))),
}


@interpreter
@pytest.mark.parametrize(("head_dim", "how"), BESIDE.values(), ids=BESIDE)
def test_beside_what_a_call_asks_for(head_dim, how):
    with interpreted():
        check(*chunked(head_dim, torch.bfloat16, "cpu", **SMALL), **how)


def check_lists(head_dim, device, rows, chunk):
    """Every other block of keys."""
    q, k, v = chunked(head_dim, torch.bfloat16, device, rows, chunk)
    chosen = torch.arange(-(-k.shape[2] // 128), device=device) % 2 == 0
    lists = BlockLists(*as_lists(chosen.expand(1, 1, -(-rows // 128), -1)))
    o, lse = flash_fwd(q, k, v, scale=1.0, block_mask=lists, return_lse=True)
    seen = chosen.repeat_interleave(128)[: k.shape[2]]
    k, v = k[:, :, seen], v[:, :, seen]
    want, exact = attention(q, k, v, scale=1.0)
    theirs = rounded(q, k, v)
    for head in range(q.shape[1]):
        bound(o[:, head], want[:, head], theirs[:, head])
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=4e-5)


@interpreter
def test_lists_of_blocks():
    with interpreted():
        check_lists(128, "cpu", rows=40, chunk=78)


def check_alibi(head_dim, device, causal, rows, chunk):
    """Rows whose scores float32 holds to their fractions, in warps with others, from the last block or the diagonal."""
    q, k, v = chunked(head_dim, torch.bfloat16, device, rows, chunk)
    how = dict(alibi_slopes=torch.full((len(CHUNKS),), 0.25, device=device), causal=causal, scale=1.0)
    o, lse = flash_fwd(q, k, v, return_lse=True, **how)
    want, exact = attention(q, k, v, **how)
    held = exact.abs() < 1e4
    bound(o[held], want[held], rounded(q, k, v, **how)[held])
    torch.testing.assert_close(lse.double(), exact, rtol=4e-6, atol=4e-5)


@interpreter
def test_alibi_from_the_diagonal():
    with interpreted() as asked:
        check_alibi(64, "cpu", False, **SMALL)
    assert all(config.diagonal_first for config in asked)


@interpreter
def test_pack_gqa():
    with interpreted() as asked:
        check(*chunked(128, torch.bfloat16, "cpu", 1, 31, heads_kv=5))
        check(*chunked(128, torch.bfloat16, "cpu", 5, 31, heads_kv=1))
    assert all(config.pack > 1 for config in asked)


@interpreter
def test_varlen():
    """Of which one has hidden keys at its end, by the first column, and another at its start."""
    q, k, v, lengths = varlen_inputs(((65, 163), (33, 170)), 2, 2, 64, where="cpu")
    first, second, _ = (int(x) for x in lengths["cu_seqlens_k"])
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[first + 100 : second, :, 0], k[second : second + 130, :, 0] = -1e9, -1e30
    with interpreted():
        o, lse = flash_fwd_varlen(q, k, v, **lengths, scale=1.0, return_lse=True)
    for rows, want, exact in varlen(q, k, v, **lengths, scale=1.0):
        assert (o[rows] - want).abs().max() < 0.03
        torch.testing.assert_close(lse[:, rows].double(), exact, rtol=2e-6, atol=4e-5)


def biased(device):
    """A score_mod that hides keys by adding values of any size: each head has its own."""
    values = torch.tensor([-1e4, -1e6, -1e9, FINFO.min], device=device)
    return lambda s, b, h, q_idx, kv_idx: s + torch.where(kv_idx >= 130, values[h], 0.0)


def check_masks(head_dim, device, seqlen_q, seqlen_k, **how):
    """Additive masks at the last keys, where a row begins; and where nothing else is seen: then all keys are alike."""
    q, k, v = inputs(1, 4, 4, seqlen_q, seqlen_k, head_dim, device=device)
    mod = biased(device)
    o, lse = flash_fwd(q, k, v, score_mod=mod, return_lse=True, **how)
    want, exact = attention(q, k, v, score_mod=mod, causal=how.get("causal", False))
    assert (o - want).abs().max() < 0.02
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=4e-5)
    values = torch.tensor([-1e4, -1e6, -1e9, FINFO.min], device=device)
    o, lse = flash_fwd(q * 0, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s + values[h], return_lse=True)
    assert (o - v.double().mean(2, keepdim=True)).abs().max() < 0.01
    torch.testing.assert_close(lse, (values + torch.tensor(seqlen_k).log())[None, :, None].expand(lse.shape))


@interpreter
@pytest.mark.parametrize("head_dim", [64, 128])
def test_additive_masks(head_dim):
    """Kernels that ask before the exponentials, and after them."""
    with interpreted() as asked:
        check_masks(head_dim, "cpu", 40, 260)
    assert all(config.speculative == (head_dim == 128 and not config.score.mod.arrays) for config in asked)


SCORED = {
    "softcap": dict(softcap=20.0),
    "softcap far above a running max": dict(softcap=1e7),
    "alibi, causal": dict(alibi_slopes=torch.full((len(CHUNKS),), 0.5), causal=True),
    "softcap, alibi": dict(softcap=20.0, alibi_slopes=torch.full((len(CHUNKS),), 0.5)),
}


def check_scored(head_dim, device, how, **sizes):
    """tanh is right to 1e-6 of the cap, so weights are not where the cap is 1e7: o has the limits of v."""
    q, k, v = chunked(head_dim, torch.bfloat16, device, **sizes)
    how = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
    o, lse = flash_fwd(q, k, v, scale=1.0, return_lse=True, **how)
    _, exact = attention(q, k, v, scale=1.0, **how)
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-6 * how.get("softcap", 50.0))
    assert o.isfinite().all() and (o.abs().amax((2, 3)) <= v.abs().amax((2, 3))).all()


@interpreter
@pytest.mark.parametrize("how", SCORED.values(), ids=SCORED)
def test_scores_that_are_changed(how):
    with interpreted():
        check_scored(128, "cpu", how, **SMALL)


EXTREMES = [
    (1e9, 1e-9),
    (-1e30, 1e-30),
    (2.3e38, 2.0**-125),
    (-2.3e38, 2.0**-125),
    (1e-40, 2.0**120),
    (1e-44, 2.0**121),
]


def check_scale(device, scale, unit, constant_time=False):
    """Products of any size, times a scale that makes moderate scores of them; some products are 0."""
    q, k, v = inputs(1, 2, 2, 70, 200, 64, device=device)
    q[..., 1:], k[..., 1:] = 0.0, 0.0
    half = unit**0.5
    q[..., 0], k[..., 0] = (q[..., 0] * half).bfloat16(), (k[..., 0] * half).bfloat16()
    o, lse = flash_fwd(q, k, v, scale=scale, return_lse=True, constant_time=constant_time)
    want, exact = attention(q, k, v, scale=scale)
    bound(o, want, rounded(q, k, v, scale))
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=4e-5)


@interpreter
@pytest.mark.parametrize("constant_time", [False, True])
def test_scales_of_any_size(constant_time):
    with interpreted():
        for scale, unit in EXTREMES:
            check_scale("cpu", scale, unit, constant_time)


def check_sinks(device, firsts=(0.0, 1e9, -1e9, -3e38, 3e37), seqlen_k=130):
    """The largest and the least sinks, beside scores of any size."""
    q, k, v = inputs(1, 6, 6, 33, seqlen_k, 64, device=device)
    sinks = torch.tensor([3e38, -3e38, 1e9, -1e9, FINFO.max, FINFO.min], device=device)
    for first in firsts:
        q[..., 1:], q[..., 0], k[..., 0] = 0.0, 1.0, first
        o, lse = flash_fwd(q, k, v, scale=1.0, sinks=sinks, return_lse=True)
        want, exact = attention(q, k, v, scale=1.0, sinks=sinks)
        bound(o, want, want.to(q.dtype))
        torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=4e-5)


@interpreter
def test_sinks_of_any_size():
    with interpreted():
        check_sinks("cpu", firsts=(0.0, -1e9, 3e37))


def test_sinks_of_any_size_on_the_cpu():
    check_sinks("cpu")


def test_scores_beyond_float32():
    """As in torch: inf - inf."""
    q = torch.full((1, 1, 4, 64), 1e30).bfloat16()
    assert flash_fwd(q, q, q).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 160, 192, 224, 256])
def test_every_kernel(head_dim, causal, dtype, planned_by):
    for config in kernels_of(head_dim, causal, dtype):
        planned_by(config)
        check(*chunked(head_dim, dtype, "cuda", **LARGE), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_way(head_dim):
    sinks = torch.linspace(-4, 4, len(CHUNKS), device="cuda")
    for how in (dict(window=(500, 20)), dict(row_max=True), dict(constant_time=True), dict(sinks=sinks)):
        check(*chunked(head_dim, torch.bfloat16, "cuda", **LARGE), **how)
    check(*chunked(head_dim, torch.bfloat16, "cuda", **LARGE), dropout_p=0.3, rng_state=torch.tensor([5, 7]).cuda())
    check_lists(head_dim, "cuda", **LARGE)
    for how in SCORED.values():
        check_scored(head_dim, "cuda", how, **LARGE)
    for causal in (False, True):
        check_masks(head_dim, "cuda", 300, 1000, causal=causal)
        check_alibi(head_dim, "cuda", causal, **LARGE)
    check(*chunked(head_dim, torch.bfloat16, "cuda", 5, 333, heads_kv=5))


@pytest.mark.gpu
def test_scales_and_sinks():
    for (scale, unit), constant_time in product(EXTREMES, (False, True)):
        check_scale("cuda", scale, unit, constant_time)
    check_sinks("cuda", seqlen_k=700)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_equal_scores_of_any_size(head_dim, dtype):
    """The mean of v, whatever the inputs: torch's own test has 133,120."""
    _, _, v = inputs(1, 2, 2, 70, 500, head_dim, dtype)
    for value in (3e4,) if dtype == torch.float16 else (1e3, 133_120.0, 1e7, 1e12, 1e15):
        q, k = (torch.full((1, 2, n, head_dim), value, device="cuda").to(dtype) for n in (70, 500))
        o = flash_fwd(q, k, v)
        assert (o - v.double().mean(2, keepdim=True)).abs().max() < 0.01
