"""Scores of every size that float32 holds, in each kind of kernel: o and lse against float64.

Keys come in chunks, each of one score that a row multiplies by 1, 0 or -1, exactly; chunks of 0 have random scores too.
So rows of one warp differ, their largest scores come early, late, twice or never, and equal ones must weigh the same.
"""

from itertools import product

import pytest
import torch
from attention import DTYPES, bound, inputs
from conftest import interpreter
from ptx import interpreted
from test_forward import kernels_of, planned_by  # noqa: F401 (a fixture)
from test_interpreted import KINDS, planned
from test_varlen import packed

from cute_attn import flash_fwd, flash_fwd_varlen
from cute_attn.reference import attention, varlen

FINFO = torch.finfo(torch.float32)
CHUNKS = (
    (0, 0, 0, -1e9, -1e9),
    (-1e9, -1e9, 0, 0, 0),
    (0, -300, -1e4, -1e6, -1e9),
    (-1e9, -1e9, -1e9, -1e9, -1e9),
    (1e9, 1e9, 0, -5, 0),
    (1e9, 2e9, 2e9, 0, 0),
    (0, 3e7, 3e7, 1e3, 0),
    (1e30, -1e30, 0, 1e30, 0),
    (-3.3e38, 0, -3.3e38, 3e5, 3e5),
    (1e7, 0, -1e7, 0, -1e7),
)
SMALL = dict(rows=40, chunk=31)  # of each head
LARGE = dict(rows=300, chunk=333)  # on a GPU
pytestmark = pytest.mark.usefixtures("one_thread")


def chunked(head_dim, dtype, device, rows, chunk, heads_kv=None, factor=1.0, unit=1.0):
    """q, k, v with a head for each of CHUNKS; scores are theirs times factor, and unit is in q alone.

    heads_kv: of K/V heads, each with `rows` of q in several heads. fp16 holds up to 65504: q takes a part of the score.
    """
    heads = heads_kv or len(CHUNKS)
    q, k, v = inputs(1, len(CHUNKS), heads, rows, chunk * 5, head_dim, dtype, device)
    base = torch.tensor(CHUNKS, dtype=torch.float64, device=device)[:heads].repeat_interleave(chunk, 1) * factor
    sizes = torch.tensor([1.0, 0.0, -1.0, 1.0], device=device).repeat(rows)[:rows]
    k[..., 1:] *= (base == 0)[..., None]
    if dtype == torch.float16:
        base, sizes = base.clamp(-6e4, 6e4), sizes * 512
    q[..., 0], k[..., 0] = sizes, base.to(dtype)
    return q * unit, k, v


def rounded(q, k, v, scale=1.0, **how):
    """o with no other error than those of P and of o, rounded to q's type."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = torch.eye(k.shape[2], dtype=torch.float64, device=q.device).expand(*k.shape[:2], -1, -1)
    p, _ = attention(q, k, weights, scale=scale, **how)
    return (p.to(q.dtype).double() @ v.double()).to(q.dtype)


def check(q, k, v, *, scale=1.0, layout="bhsd", constant_time=False, row_max=False, **how):
    """The bound of every other test, and lse (and row_max) to a few units of its last place, whatever |q| |k|."""
    parts = [x.transpose(1, 2).contiguous() for x in (q, k, v)] if layout == "bshd" else (q, k, v)
    out = parts[0].new_full(parts[0].shape, torch.nan)
    asked = dict(return_lse=True, return_row_max=row_max, out=out)
    o, *found = flash_fwd(*parts, scale=scale, layout=layout, constant_time=constant_time, **asked, **how)
    o = o.transpose(1, 2) if layout == "bshd" else o
    want, *wanted = attention(q, k, v, scale=scale, return_row_max=row_max, **how)
    theirs = rounded(q, k, v, scale, **how)
    for head in range(q.shape[1]):  # each by its own error
        bound(o[:, head], want[:, head], theirs[:, head])
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=4e-5)


CLASSES = ["d64 full, redo", "d64 causal, drawn", "d64 fp16", "d128 full, long, cluster, Q in registers", "d256 causal"]
CLASSES += ["constant time", "keys split over a cluster", "keys split, causal", "without overlap"]
SELECTED = {name: KINDS[name] for name in CLASSES} | {"d128 fp16": planned(128, batch=16, heads=32, dtype="fp16")}


@interpreter
@pytest.mark.parametrize("config", SELECTED.values(), ids=SELECTED)
def test_every_kind_of_kernel(config):
    """In three blocks of keys."""
    sizes = dict(rows=40, chunk=config.tile_n // 2)
    q, k, v = chunked(config.head_dim, dict(bf16=DTYPES[0], fp16=DTYPES[1])[config.dtype], "cpu", **sizes)
    with interpreted(config):
        check(q, k, v, causal=config.mask.causal, layout=config.layout, constant_time=config.constant_time)


BESIDE = {
    "window": (64, dict(window=(100, 20))),
    "row_max": (64, dict(row_max=True)),
    "row_max, constant time": (64, dict(row_max=True, constant_time=True)),
    "sinks": (128, dict(sinks=torch.linspace(-4, 4, len(CHUNKS)))),
}


@interpreter
@pytest.mark.parametrize(("head_dim", "how"), BESIDE.values(), ids=BESIDE)
def test_beside_what_a_call_asks_for(head_dim, how):
    with interpreted():
        check(*chunked(head_dim, torch.bfloat16, "cpu", **SMALL), **how)


@interpreter
def test_packed_heads():
    with interpreted() as asked:
        check(*chunked(128, torch.bfloat16, "cpu", 1, 31, heads_kv=5))
        check(*chunked(128, torch.bfloat16, "cpu", 5, 31, heads_kv=1))
    assert all(config.pack > 1 for config in asked)


@interpreter
def test_packed_sequences():
    """Of which one has hidden keys at its end, by the first column, and another at its start."""
    q, k, v, lengths = packed(((65, 163), (33, 170)), 2, 2, 64, where="cpu")
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
    assert all(config.redo == (head_dim == 128 and not config.score.mod.arrays) for config in asked)


SCORED = {
    "softcap": dict(softcap=20.0),
    "softcap far above an offset": dict(softcap=1e7),
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
def test_every_kernel(head_dim, causal, dtype, planned_by):  # noqa: F811
    for config in kernels_of(head_dim, causal, dtype):
        planned_by(config)
        check(*chunked(head_dim, dtype, "cuda", **LARGE), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_way(head_dim):
    sinks = torch.linspace(-4, 4, len(CHUNKS), device="cuda")
    for how in (dict(window=(500, 20)), dict(row_max=True), dict(constant_time=True), dict(sinks=sinks)):
        check(*chunked(head_dim, torch.bfloat16, "cuda", **LARGE), **how)
    for how in SCORED.values():
        check_scored(head_dim, "cuda", how, **LARGE)
    for causal in (False, True):
        check_masks(head_dim, "cuda", 300, 1000, causal=causal)
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
