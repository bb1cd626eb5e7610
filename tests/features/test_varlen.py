"""flash_fwd_varlen: right for every packing, and nothing but the sequences' own rows is read or written."""

import dataclasses
from itertools import accumulate, product
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_attn import (
    backward,
    call,
    compile,
    device,
    flash_fwd,
    flash_fwd_varlen,
    plan,
    reference,
    request,
)
from cute_attn.features.window import UNBOUNDED
from cute_attn.features.window import window as bounded
from cute_attn.kernels import seqlen, varlen_scheduler
from cute_attn.kernels.seqlen import SeqlenInfo, Seqlens
from cute_attn.kernels.varlen_scheduler import Lane, VarlenGrid, VarlenLongest, VarlenScheduler
from cute_attn.plan import FeatureKey
from cute_attn.tools import inspect
from tests.support.attention import DTYPES, gradient_bound, inputs, visible
from tests.support.nightly import HEAD_DIM_OF_EACH_CLASS, sample, where
from tests.support.varlen import EDGES, MARK, check, int32, marked, one_sequence, right, varlen_inputs

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
HEAD_DIMS = (8, 32, 64, 72, 96, 128, 160, 192, 224, 256)
MASKS = {
    "full": dict(),
    "causal": dict(causal=True),
    "window": dict(window=(100, 30)),
    "causal window": dict(causal=True, window=(70, None)),
    "no left": dict(window=(None, 7)),
}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
LONG = [(700, 900), (5, 5), (1500, 600), (64, 2000), (1024, 1024)]
OP, OP_OUT = torch.ops.cute_attn.flash_fwd_varlen, torch.ops.cute_attn.flash_fwd_varlen_out
OP_BWD = torch.ops.cute_attn.flash_bwd_varlen
pytestmark = pytest.mark.usefixtures("one_thread")


# The order of the tiles, without a GPU: a warp is 32 numbers.
LANES = np.arange(32)


def as_written(jitted):
    """The function under cute.jit, which rewrites its code in place when a kernel is compiled."""
    function = jitted.__wrapped__
    code = getattr(function, "_original_code", function.__code__)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


@pytest.fixture
def warp(monkeypatch):
    """varlen_scheduler on plain numbers: what a warp's lanes hold, and what it does together, by numpy."""
    arch = SimpleNamespace(
        warp_redux_sync=lambda x, op: int(dict(add=np.add, **{"or": np.bitwise_or})[op].reduce(x)),
        vote_ballot_sync=lambda x: x,
        popc=lambda x: int(x.sum()),
        shuffle_sync=lambda x, i: int(x[i % 32]),
    )

    def top(x):
        return 1 << max(int(x), 1).bit_length() - 1

    def lane(g, group, tile_m):
        b = group + LANES
        own = np.minimum(b, g.batch - 1)
        q, k = (SeqlenInfo(np.array(p.cu_seqlens)[own], np.diff(p.cu_seqlens)[own]) for p in (g.q, g.k))
        tiles = np.where(b < g.batch, -(-q.length // tile_m) * g.heads, 0)
        return Lane(q, k, tiles, np.where(tiles > 0, [top(n) for n in k.length], 0))

    names = dict(
        cute=SimpleNamespace(arch=arch),
        cutlass=SimpleNamespace(max=max, min=min, range=lambda n, unroll: range(n)),
        Int32=int,
        lane=lane,
        top=top,
        running_sum=np.cumsum,
        turn=lambda own, bits: np.where(own.bit == top(bits), own.tiles, 0),
        **{name: as_written(getattr(varlen_scheduler, name)) for name in ("seek", "_decode")},
    )
    for name, value in names.items():
        monkeypatch.setattr(varlen_scheduler, name, value)


def grid(sizes, heads, ratio, l2_rows):
    q, k = ([0, *accumulate(lengths)] for lengths in zip(*sizes, strict=True))
    return VarlenGrid(Seqlens(q, 0, q[-1]), Seqlens(k, 0, k[-1]), heads, len(sizes), ratio, l2_rows)


def order(scheduler, g, tile_m, ctas=1, turns=None):
    """The tiles in the order of their numbers; CTAs take them in the order that `turns` says."""
    first = as_written(VarlenScheduler.first)
    places = [first(i, g, tile_m) for i in range(ctas)]
    found, taken = {}, ctas
    tiles = places[0].tiles
    while any(place.number < tiles for place in places):
        i = next(turns) % ctas if turns else 0
        place = places[i]
        if place.number < tiles:
            tile = scheduler.decode(place, g, tile_m)
            assert tile.valid
            found[place.number] = tile
            places[i] = varlen_scheduler.seek(place._replace(number=taken), g, tile_m)
            taken += 1
    assert not any(scheduler.decode(place, g, tile_m).valid for place in places)
    assert taken - ctas == tiles, "so many increments, or the counter would not be 0 for the next launch"
    return [found[i] for i in sorted(found)]


SIZES = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 5000)), min_size=1, max_size=100)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 2000, 10**6]), st.integers(1, 9), st.data())
def test_every_tile_once_and_long_sequences_first(warp, sizes, heads_kv, ratio, l2_rows, ctas, data):
    heads = heads_kv * ratio
    g = grid(sizes, heads, ratio, l2_rows)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    turns = iter(lambda: int(rng.integers(ctas)), None)
    for scheduler, tile_m in ((VarlenScheduler, 128), (VarlenLongest, 192)):
        tiles = order(scheduler, g, tile_m, ctas, turns)
        want = [
            (b, h, m) for b, (n, _) in enumerate(sizes) for h in range(heads) for m in range((n + tile_m - 1) // tile_m)
        ]
        assert sorted((t.batch, t.head, t.m_block) for t in tiles) == sorted(want)
        for t in tiles:
            assert (t.seqlen_q, t.seqlen_k) == sizes[t.batch]
            assert (t.start_q, t.start_k) == (g.q.cu_seqlens[t.batch], g.k.cu_seqlens[t.batch])
        bits = [max(t.seqlen_k, 1).bit_length() for t in tiles]
        assert bits == sorted(bits, reverse=True)


def test_within_a_sequence(warp):
    """Head by head; or the longest rows of tiles first, of as many heads as L2 keeps the keys of."""
    g = grid([(512, 1000)], 4, 2, 1000)
    assert [(t.head, t.m_block) for t in order(VarlenScheduler, g, 256)] == list(product(range(4), range(2)))
    found = [(t.head, t.m_block) for t in order(VarlenLongest, g, 256)]
    assert found == [(h + i, m) for h, m, i in product((0, 2), (1, 0), range(2))]


def test_nothing_to_do(warp):
    g = grid([(0, 5)] * 40, 3, 1, 1000)
    assert order(VarlenScheduler, g, 128, 7) == []


def test_ctas():
    q = Seqlens(0, 0, 1000)
    assert VarlenScheduler.grid(VarlenGrid(q, q, 4, 3, 1, 1), 132, 128) == 40
    assert VarlenScheduler.grid(VarlenGrid(q, q, 64, 3, 1, 1), 132, 128) == 132


@given(st.integers(0, 2**30), st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 2**16))
def test_ragged_addresses(start, length, row, rows16):
    """Of a row of a sequence, in bytes modulo 2^64; outside of the rows' size, and only there, beyond its end."""
    stride = 16 * rows16
    coordinates = seqlen.ROWS_MAX - length + row, start + length, seqlen.ROWS_MAX
    strides = stride, stride, 2 * seqlen.WRAP - stride
    assert sum(c * s for c, s in zip(coordinates, strides, strict=True)) % 2**64 == (start + row) * stride
    assert (coordinates[0] >= seqlen.ROWS_MAX) == (row >= length)
    assert coordinates[1] < seqlen.REACH and strides[2] < 2**40, "TMA's own limits"


def test_planned():
    """The tiles that are tuned for the mask, without clusters; one kernel for every window."""
    for d, causal in product((64, 100, 256), (False, True)):
        config = plan.varlen(d, "fp16", causal)
        base = plan.config(-(-d // 32) * 32, "fp16", "bhsd", causal)
        assert (config.tile_m, config.tile_n, config.speculative) == (base.tile_m, base.tile_n, base.speculative)
        assert config.scheduler is (VarlenLongest if causal else VarlenScheduler)
        assert config.varlen and config.cluster == 1 and config.dtype == "fp16"
    assert plan.varlen(64, "bf16", True, FeatureKey(window=True)).mask.windowed
    assert len(set(plan.prebuilt_varlen())) == 48
    assert not any(config.varlen for config in plan.prebuilt())


VARLEN = {dtype: [c for c in plan.prebuilt_varlen() if c.dtype == dtype] for dtype in ("bf16", "fp16")}
BF16 = where(lambda c: c.head_dim in HEAD_DIM_OF_EACH_CLASS, VARLEN["bf16"])


@pytest.mark.machine_code
@pytest.mark.parametrize("config", [*BF16, *sample(3, VARLEN["fp16"])], ids=lambda c: c.name)
def test_machine_code(config):
    """No spills, no serialised WGMMA, a steady loop without a mask; no division stands in it."""
    report = inspect.report(config)
    assert report.problems() == []
    loop = report.steady_loop
    assert loop.wgmma == config.head_dim // 16 + config.tile_n // 16
    assert loop.warpgroup_ops == (3 if config.warpgroups == 4 else 4)
    assert (loop.mufu, loop.maxima) == (config.tile_n // 2, 0) and loop.selects < config.tile_n // 4


@pytest.mark.machine_code
def test_five_dimensions():
    text = inspect.ptx(plan.varlen(64, "bf16", False))
    assert "cp.async.bulk.tensor.5d.shared" in text and "cp.async.bulk.tensor.5d.global" in text
    assert "cp.async.bulk.tensor.4d" not in text


@pytest.mark.parametrize("slack", [0, 4])
@EACH_MASK
def test_on_the_cpu(mask, slack):
    for dtype in DTYPES:
        q, k, v, how = varlen_inputs(EDGES, 4, 2, 16, dtype, "cpu", slack=slack)
        check(q, k, v, how, **mask)
        check(q, k, v, how, scale=-0.3, lse=False, **mask)


def test_the_reference_is_attention_of_each_sequence():
    q, k, v, how = varlen_inputs([(5, 9), (7, 3)], 2, 1, 8, where="cpu", margin=0)
    (a, o, lse), (b, _, _) = reference.varlen(q, k, v, *how.values(), causal=True, dtype=torch.float64)
    assert (a, b) == (slice(0, 5), slice(5, 12))
    want, want_lse = reference.attention(*one_sequence(q, k, v, a, slice(0, 9)), causal=True)
    assert torch.equal(o, want[0].transpose(0, 1)) and torch.equal(lse, want_lse[0])


def test_sequences_end_with_the_tensors():
    """Whatever stands in cu_seqlens, nothing beyond q, k and v is touched."""
    wild = int32([-5, 4, 900, 2, -(2**31), 2**31 - 1], "cpu")
    assert all(0 <= a.start <= a.stop <= 10 for a in reference.parts(wild, None, 10))
    assert all(0 <= a.start <= a.stop <= 10 for a in reference.parts(wild, int32([20] * 5, "cpu"), 10))


Q, KV = torch.zeros(10, 4, 16, dtype=torch.float16), torch.zeros(12, 2, 16, dtype=torch.float16)
CU_Q, CU_K = int32([0, 4, 10], "cpu"), int32([0, 6, 12], "cpu")
FAKE = FakeTensorMode().from_tensor(CU_Q)
WRONG = {
    "fake": (dict(cu_seqlens_q=FAKE), TypeError, "cu_seqlens_q: a .*FakeTensor came beside tensors with memory"),
    "fake used": (dict(seqused_k=FAKE), TypeError, "seqused_k: a .*FakeTensor came beside tensors with memory"),
    "q dims": (dict(q=Q[None]), ValueError, r"q: 4 dimensions, .*; 3 are needed: \(total_q, H, D\)"),
    "k dims": (dict(k=KV[0]), ValueError, r"k: 2 dimensions, .*; 3 are needed: \(total_k, Hk, D\)"),
    "type": (dict(q=Q.float(), k=KV.float(), v=KV.float()), TypeError, "q: torch.float32 is not supported"),
    "types": (dict(k=KV.bfloat16()), TypeError, "k: torch.bfloat16 does not match q's torch.float16"),
    "list": (dict(q=[1]), TypeError, "q: a torch.Tensor is needed, builtins.list came"),
    "numpy": (dict(q=Q.numpy()), TypeError, "q: a torch.Tensor is needed, numpy.ndarray came; torch.from_dlpack"),
    "head dim": (dict(q=Q[..., :12]), ValueError, "q: head_dim 12 is not supported; use a multiple of 8 up to 512"),
    "v": (dict(v=KV[:5]), ValueError, r"v: shape \(5, 2, 16\) does not fit k's \(12, 2, 16\); v is \(total_k"),
    "D": (dict(k=KV[..., :8], v=KV[..., :8]), ValueError, r"k: shape \(12, 2, 8\) does not fit q's \(10, 4, 16\)"),
    "heads": (dict(q=Q[:, :3]), ValueError, "k: 2 heads do not divide q's 3"),
    "cu none": (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q: a torch.Tensor is needed, builtins.NoneType came"),
    "cu list": (dict(cu_seqlens_k=[0, 6, 12]), TypeError, "cu_seqlens_k: a torch.Tensor is needed"),
    "cu int64": (
        dict(cu_seqlens_q=CU_Q.long()),
        TypeError,
        r"cu_seqlens_q: torch.int64 came, torch.int32 is needed; convert it with .to\(torch.int32\)",
    ),
    "cu empty": (dict(cu_seqlens_q=CU_Q[:0]), ValueError, r"cu_seqlens_q: shape \(0,\) came, \(B \+ 1,\) is needed"),
    "cu 2d": (dict(cu_seqlens_q=CU_Q[None]), ValueError, r"cu_seqlens_q: shape \(1, 3\) came, \(B \+ 1,\) is needed"),
    "cu count": (dict(cu_seqlens_k=CU_K[:2]), ValueError, r"cu_seqlens_k: shape \(2,\) came, \(3,\) is needed"),
    "cu stride": (
        dict(cu_seqlens_q=int32(range(6), "cpu")[::2]),
        ValueError,
        r"cu_seqlens_q: stride 2 came, 1 is needed; use cu_seqlens_q.contiguous\(\)",
    ),
    "used count": (dict(seqused_q=CU_Q), ValueError, r"seqused_q: shape \(3,\) came, \(2,\) is needed"),
    "used type": (dict(seqused_k=CU_K[:2].float()), TypeError, "seqused_k: torch.float32 came, torch.int32 is needed"),
    "used list": (dict(seqused_k=[1, 2]), TypeError, "seqused_k: a torch.Tensor is needed, builtins.list came"),
    "max tensor": (dict(max_seqlen_q=CU_Q[0]), TypeError, r"max_seqlen_q: an int or None .* pass its .item\(\)"),
    "max bool": (dict(max_seqlen_k=True), TypeError, "max_seqlen_k: an int or None is needed, True came"),
    "max below 0": (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k: -1 is below 0"),
    "causal": (dict(causal=1), TypeError, "causal: a bool is needed, 1 came"),
    "window": (dict(window=3), TypeError, "window: 3 came; a pair"),
    "scale": (dict(scale=float("nan")), ValueError, "scale: nan is not finite"),
    "out shape": (dict(out=Q[:5].clone()), ValueError, r"out: shape \(5, 4, 16\) is not q's \(10, 4, 16\)"),
    "out dims": (dict(out=Q[0].clone()), ValueError, "out: 2 dimensions"),
    "out is q": (dict(out=Q), ValueError, "out: shares memory with q"),
    "out type": (dict(out=Q.bfloat16()), TypeError, "out: torch.bfloat16 came, q's torch.float16 is needed"),
    "too many": (
        dict(q=Q[:1, :1].expand(2**29, 256, 16), k=KV[:, :1], v=KV[:, :1]),
        ValueError,
        "q: up to 2147484160 tiles of 64 rows in one call",
    ),
}


def asked(**changes):
    return dict(q=Q, k=KV, v=KV.clone(), cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K) | changes


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    changes, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        flash_fwd_varlen(**asked(**changes))


WRONG_GRADIENTS = {
    "max_seqlen_q": (dict(max_seqlen_k=6), "max_seqlen_q: None came with inputs that require grad.*; pass it, or call"),
    "max_seqlen_k": (dict(max_seqlen_q=6), "max_seqlen_k: None came with inputs that require grad"),
    "seqused_k": (dict(seqused_k=CU_K[:2]), "seqused_k: given with inputs that require grad.*; pack the used rows"),
    "seqused_q": (dict(seqused_q=CU_Q[:2]), "seqused_q: given with inputs that require grad"),
    "out": (dict(out=torch.empty_like(Q)), "out: given with inputs that require grad; omit it"),
}


@pytest.mark.parametrize("case", WRONG_GRADIENTS)
def test_wrong_with_gradients(case):
    """At the forward, eager and compiled, and without a launch."""
    changes, words = WRONG_GRADIENTS[case]
    if "max" not in case:
        changes = changes | dict(max_seqlen_q=6, max_seqlen_k=6)
    learns = asked(q=Q.clone().requires_grad_(), **changes)
    with pytest.raises(ValueError, match=words):
        flash_fwd_varlen(**learns)
    with pytest.raises(ValueError, match=words):
        torch.compile(lambda: flash_fwd_varlen(**learns), backend="eager")()
    with torch.no_grad():
        flash_fwd_varlen(**learns)


def test_a_like_call_is_looked_up(monkeypatch):
    """Its kernel gets the addresses of this call's lengths, behind a window's sides; q's look-alike plans nothing."""
    launched, prepared = [], []
    gpu = SimpleNamespace(index=0, num_sms=132, counters=lambda each: 7 * each)

    def made(asked):
        prepared.append(asked)
        return call.Call(None, 0.125, gpu, lambda *args: launched.append(args), 1, True, (0,) * 4, None)

    monkeypatch.setattr(device, "current", lambda: 0)
    monkeypatch.setattr(request.Request, "made", made)
    monkeypatch.setattr(call, "known", {})
    for cu in (CU_Q, CU_Q.clone()):
        flash_fwd_varlen(**asked(cu_seqlens_q=cu))
        assert launched[-1][4:] == (0, 7, 0.125, 132, cu.data_ptr(), CU_K.data_ptr(), 0, 0, 2)
    used = CU_K[:2].clone()
    for sides in ((5, 3), (8, 0)):
        flash_fwd_varlen(**asked(seqused_k=used, window=sides, scale=2.0))
        assert launched[-1][6:] == (2.0, 132, *sides, CU_Q.data_ptr(), CU_K.data_ptr(), 0, used.data_ptr(), 2)
    assert len(prepared) == 2
    others = (dict(cu_seqlens_q=CU_Q.long()), dict(seqused_q=used), dict(causal=True), dict(max_seqlen_q=4))
    for changes in others:
        flash_fwd_varlen(**asked(**changes))
    assert len(prepared) == 2 + len(others)


@DEVICES
def test_opcheck(where):
    q, k, v, how = varlen_inputs([(9, 12), (40, 30)], 4, 2, 64, where=where, margin=0)
    cu = tuple(how.values())
    for sides in ((None, None), (7, 3)):
        torch.library.opcheck(OP.default, (q, k, v, *cu, None, None, 40, 30, False, None, *sides, True))
        out = torch.empty_like(q)
        torch.library.opcheck(OP_OUT.default, (q, k, v, out, *cu, None, None, 40, 30, False, 0.3, *sides, True))
        o, lse = OP(q, k, v, *cu, None, None, 40, 30, False, None, *sides, True)
        torch.library.opcheck(OP_BWD.default, (torch.ones_like(o), q, k, v, o, lse, *cu, 40, 30, False, None, *sides))
    learns = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OP.default, (*learns, *cu, None, None, 40, 30, True, None, None, None, True))


@DEVICES
@EACH_MASK
def test_compiled(mask, where):
    """In one graph; with gradients, and with `out`."""
    torch._dynamo.reset()
    call = torch.compile(lambda *x, **how: flash_fwd_varlen(*x, **how, **mask, return_lse=True), fullgraph=True)
    step = torch.compile(lambda *x, **how: flash_fwd_varlen(*x, **how, **mask).sum(), fullgraph=True)
    for sizes in ([(9, 12), (40, 30)], [(70, 50), (1, 1), (5, 60)]):
        q, k, v, how = varlen_inputs(sizes, 4, 2, 64, where=where, margin=0)
        want = flash_fwd_varlen(q, k, v, **how, **mask, return_lse=True)
        assert all(map(torch.equal, call(q, k, v, **how), want))
        out = torch.empty_like(q)
        call(q, k, v, **how, out=out)
        assert torch.equal(out, want[0])
        how |= dict(max_seqlen_q=70, max_seqlen_k=60)
        qkv = [x.requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(flash_fwd_varlen(*qkv, **how, **mask).sum(), qkv)
        for dx, other in zip(torch.autograd.grad(step(*qkv, **how), qkv), want, strict=True):
            torch.testing.assert_close(dx, other, atol=1e-3, rtol=0.02)


def check_gradients(sizes, *shape, where="cuda", dtype=torch.bfloat16, scale=None, **mask):
    """dq, dk, dv against float64 and torch's own, sequence by sequence; 0 in the rows of no sequence."""
    q, k, v, how = varlen_inputs(sizes, *shape, dtype, where)
    plain, window = bounded(mask.get("window"), mask.get("causal", False))
    qkv = [x.requires_grad_() for x in (q, k, v)]
    longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), map(max, zip(*sizes, strict=True)), strict=True))
    o = flash_fwd_varlen(*qkv, **how, **longest, **mask, scale=scale)
    grad = torch.randn_like(o)
    ours = torch.autograd.grad(o, qkv, grad)
    outside = [torch.ones(len(x), dtype=torch.bool, device=where) for x in (q, k)]
    queries = reference.parts(how["cu_seqlens_q"], None, len(q))
    for a, b in zip(queries, reference.parts(how["cu_seqlens_k"], None, len(k)), strict=True):
        outside[0][a], outside[1][b] = False, False
        one = [x.detach().requires_grad_() for x in one_sequence(q, k, v, a, b)]
        do = grad[None, a].transpose(1, 2)
        mine = [dx[None, rows].transpose(1, 2) for dx, rows in zip(ours, (a, b, b), strict=True)]
        if 0 in (one[0].numel(), one[1].numel()):
            assert all((dx == 0).all() for dx in mine)
            continue
        with torch.no_grad():
            wants = reference.gradients(do, *one, causal=plain, window=window, scale=scale)
        lengths = one[0].shape[2], one[1].shape[2]
        mask_ = visible(*lengths, plain, where, window)
        seen = mask_.any(1)
        full = [x.repeat_interleave(one[0].shape[1] // x.shape[1], dim=1) for x in one[1:]]
        theirs = F.scaled_dot_product_attention(one[0][:, :, seen], *full, attn_mask=mask_[seen], scale=scale)
        theirs = torch.autograd.grad(theirs, one, do[:, :, seen])
        for dx, want, other in zip(mine, wants, theirs, strict=True):
            gradient_bound(dx, want, other)
    for dx, rows in zip(ours, (outside[0], outside[1], outside[1]), strict=True):
        assert (dx[rows] == 0).all()


@DEVICES
@EACH_MASK
def test_gradients(mask, where):
    for dtype in DTYPES:
        check_gradients(EDGES, 4, 2, 64, where=where, dtype=dtype, **mask)
    check_gradients([(50, 60), (3, 90), (70, 20)], 2, 2, 32, where=where, scale=-0.3, **mask)


def test_no_second_derivative():
    q, k, v, how = varlen_inputs([(9, 12)], 2, 1, 16, where="cpu")
    q.requires_grad_()
    o = flash_fwd_varlen(q, k, v, **how, max_seqlen_q=9, max_seqlen_k=12)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="flash_fwd_varlen has no second derivative"):
        dq.sum().backward()


def test_windows_of_the_backward(monkeypatch):
    """It takes a side of max_k keys or more for no bound: so max_k is at least max_q."""
    given = []
    grad, q, k, v = (torch.zeros(8, 2, 16, device="meta", dtype=torch.float16) for _ in range(4))
    cu, lse = torch.zeros(3, dtype=torch.int32, device="meta"), torch.zeros(2, 8, device="meta")
    monkeypatch.setattr(backward, "_within", lambda dx, cu: dx)
    fake = lambda *args, **how: given.append((args, how)) or (q, k, v)  # noqa: E731
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", fake)
    inner = backward.flash_bwd_varlen_op
    inner(grad, q, k, v, q, lse, cu, cu, 8, 5, False, None, 3, None)
    inner(grad, q, k, v, q, lse, cu, cu, 8, 5, True, None, None, None)
    assert [args[8:12] for args, _ in given] == [(8, 8, 0.0, False), (8, 5, 0.0, True)]
    assert given[0][1] == dict(scale=None, window_size_left=3, window_size_right=UNBOUNDED)
    assert given[1][1] == dict(scale=None)


# On the GPU. The first test is of the one thing that no other machine shows: that the driver encodes such a descriptor.
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_ragged_descriptor(head_dim):
    """One sequence that is the whole tensor, then one in its middle: as flash_fwd has it."""
    q, k, v = (x[0].transpose(0, 1) for x in inputs(1, 2, 2, 300, 300, head_dim))  # (S, H, D), heads outermost
    for start, end in ((0, 300), (0, 64), (70, 213), (299, 300)):
        cu = int32([start, end], "cuda")
        o, lse = flash_fwd_varlen(q, k, v, cu, cu, return_lse=True, out=marked(q))
        right(q, k, v, dict(cu_seqlens_q=cu, cu_seqlens_k=cu), o, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@EACH_MASK
def test_right(mask, head_dim, dtype):
    for sizes in (EDGES, LONG):
        check(*varlen_inputs(sizes, 4, 2, head_dim, dtype), **mask)
    check(*varlen_inputs(EDGES, 4, 2, head_dim, dtype, slack=5), **mask)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (4, 4), (8, 1), (6, 3)])
@EACH_MASK
def test_heads_and_scales(heads, heads_kv, mask):
    for head_dim, scale in product((64, 128, 256), (None, 0.0, -0.3)):
        check(*varlen_inputs([(77, 333), (300, 130), (1, 9)], heads, heads_kv, head_dim), scale=scale, **mask)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_strides(head_dim):
    """Parts of a packed qkv, heads outermost, a single row, a single head."""
    sizes = [(130, 130), (64, 64), (1, 1)]
    _, _, _, how = varlen_inputs(sizes, 2, 2, head_dim, margin=0)
    qkv = torch.randn(195, 3, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    check(*qkv.unbind(1), how, causal=True)
    q, k, v = torch.randn(3, 2, 195, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    check(q, k, v, how)
    check(*varlen_inputs([(1, 1)], 1, 1, head_dim, margin=0))
    check(q[:, :1], k[:, :1], v[:, :1], how)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
@EACH_MASK
def test_neighbours_are_not_read(mask, head_dim):
    """NaN in every row of every other sequence changes no bit of a sequence's rows."""
    sizes = [(100, 70), (65, 129), (1, 1), (200, 333), (64, 64), (31, 200)]
    q, k, v, how = varlen_inputs(sizes, 4, 2, head_dim, margin=0)
    o, lse = check(q, k, v, how, **mask)
    rows = list(zip(*(reference.parts(how[f"cu_seqlens_{x}"], None, 10**6) for x in "qk"), strict=True))
    for a, b in rows:
        others = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        for other, x, own in zip(others, (q, k, v), (a, b, b), strict=True):
            other[own] = x[own]
        got, got_lse = flash_fwd_varlen(*others, **how, **mask, return_lse=True)
        assert torch.equal(got[a], o[a]) and torch.equal(got_lse[:, a], lse[:, a])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@EACH_MASK
def test_many_sequences(mask, head_dim):
    """300 of them, of all lengths; one huge among many tiny."""
    rng = np.random.default_rng(0)
    sizes = [(int(a), int(b)) for a, b in zip(rng.integers(0, 400, 300), rng.integers(0, 400, 300), strict=True)]
    check(*varlen_inputs(sizes, 4, 2, head_dim), **mask)
    tiny = [(int(n), int(n)) for n in rng.integers(1, 20, 200)]
    check(*varlen_inputs([*tiny[:90], (8000, 8192), *tiny[90:]], 4, 2, head_dim), **mask)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_tiles_for_each_cta(head_dim):
    for mask in ({}, dict(causal=True), dict(window=(300, 0))):
        check(*varlen_inputs([(1500, 1800), (3000, 3000), (40, 2000), (2222, 1111)], 16, 4, head_dim), **mask)


@pytest.mark.gpu
def test_wild_lengths_touch_nothing_else():
    """Negative, beyond the end and falling: no error on the device, and nothing written outside of out."""
    q, k, v, _ = varlen_inputs([(500, 500)], 4, 2, 128, margin=0)
    most = 2**31 - 1
    for wild in ([-5, 400, 90_000, 2, -most, most], [0, most, 0, 0, 1, 1], [600, 700, 800, 900, 1000, 1100]):
        cu = int32(wild, "cuda")
        for used in (None, int32([10**9, -7, 3, 600, 5], "cuda")):
            memory = torch.zeros(1500, 4, 128, dtype=q.dtype, device="cuda")
            flash_fwd_varlen(q, k, v, cu, cu, seqused_q=used, seqused_k=used, causal=True, out=memory[500:1000])
            torch.cuda.synchronize()
            assert (memory[:500] == 0).all() and (memory[1000:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_counter_is_left_at_0(head_dim):
    """No tiles, fewer than CTAs, more: a launch by the same tile counter afterwards is right."""
    q, k, v = inputs(2, 8, 8, 1000, 1000, head_dim)
    want = flash_fwd(q, k, v, causal=True)
    for sizes in ([(0, 0)] * 40, [(0, 9)], [(5, 9), (0, 0)], [(3000, 3000), (1, 1)]):
        check(*varlen_inputs(sizes, 8, 8, head_dim))
        check(*varlen_inputs(sizes, 8, 8, head_dim), causal=True)
        assert torch.equal(flash_fwd(q, k, v, causal=True), want)
    o = flash_fwd_varlen(q[0], k[0], v[0], int32([5], "cuda"), int32([3], "cuda"))
    assert o.shape == q[0].shape


@pytest.mark.gpu
def test_no_rows_at_all():
    cu = int32([0, 0, 0], "cuda")
    x = torch.empty(0, 2, 64, device="cuda", dtype=torch.float16)
    o, lse = flash_fwd_varlen(x, x, x, cu, cu, return_lse=True)
    assert o.shape == x.shape and lse.shape == (2, 0)
    q = torch.randn(7, 2, 64, device="cuda", dtype=torch.float16)
    o, lse = flash_fwd_varlen(q, x, x, int32([0, 3, 7], "cuda"), cu, return_lse=True)
    assert (o == 0).all() and (lse == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [{}, dict(causal=True), dict(window=(100, 0))], ids=["full", "causal", "window"])
def test_a_graph_follows_the_lengths(mask, head_dim):
    """Captured with some lengths, replayed with others, none of them known to the host; used lengths too."""
    total, batch = 3000, 6
    q, k, v, _ = varlen_inputs([(total, total)], 4, 2, head_dim, margin=0)
    how = {name: int32([0] * (batch + 1), "cuda") for name in ("cu_seqlens_q", "cu_seqlens_k")}
    used = {name: int32([0] * batch, "cuda") for name in ("seqused_q", "seqused_k")}
    rng = np.random.default_rng(1)

    def draw():
        for name in how:
            how[name].copy_(int32(np.sort(rng.integers(0, total + 1, batch + 1)), "cuda"))
        for name in used:
            room = how[name.replace("seqused", "cu_seqlens")].diff()
            used[name].copy_((room * torch.rand(batch, device="cuda")).to(torch.int32))

    for lengths in (how, how | used):
        draw()
        out = marked(q)
        flash_fwd_varlen(q, k, v, **lengths, **mask, return_lse=True, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = flash_fwd_varlen(q, k, v, **lengths, **mask, return_lse=True, out=out)
        for _ in range(4):
            draw()
            out.view(torch.int16).fill_(MARK)
            for _ in range(3):
                graph.replay()
            right(q, k, v, lengths, out, lse, **mask)


@pytest.mark.gpu
def test_lengths_may_come_from_the_stream():
    """Written by the kernel just before, on a stream that is not the default one; and no call waits for the GPU."""
    sizes = [(700, 900), (5, 5), (1500, 600)]
    q, k, v, how = varlen_inputs(sizes, 8, 2, 128)
    check(q, k, v, how, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = {name: torch.zeros_like(x) for name, x in how.items()}
    out = marked(q)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            for _ in range(20):
                for x in late.values():
                    x.zero_()
                torch.cuda._sleep(200_000)
                for name, x in how.items():
                    late[name].copy_(x)
                _, lse = flash_fwd_varlen(q, k, v, **late, causal=True, return_lse=True, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    right(q, k, v, how, out, lse, causal=True)


@pytest.mark.gpu
def test_streams_at_once():
    """Each has a tile counter of its own."""
    cases = [varlen_inputs([(900, 900), (33, 70), (400, 4)], 8, 2, 64) for _ in range(4)]
    want = [flash_fwd_varlen(q, k, v, **how, causal=True) for q, k, v, how in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, (q, k, v, how) in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(flash_fwd_varlen(q, k, v, **how, causal=True))
    torch.cuda.synchronize()
    for i, o in enumerate(found):
        used = ~cases[i % 4][0].isnan().all(-1).all(-1)
        assert torch.equal(o[used], want[i % 4][used])


@pytest.mark.gpu
def test_run_to_run_bitwise_equal():
    for head_dim, mask in product((64, 128, 256), ({}, dict(causal=True), dict(window=(200, 30)))):
        q, k, v, how = varlen_inputs(LONG, 8, 2, head_dim, margin=0)
        first = flash_fwd_varlen(q, k, v, **how, **mask, return_lse=True)
        for _ in range(10):
            assert all(map(torch.equal, first, flash_fwd_varlen(q, k, v, **how, **mask, return_lse=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_equal_lengths_are_flash_fwds(head_dim):
    """To one ulp: the kernels may differ in the size of their blocks."""
    q, k, v = inputs(4, 8, 2, 777, 777, head_dim, layout="bshd")
    cu = int32(range(0, 5 * 777, 777), "cuda")
    for mask in ({}, dict(causal=True), dict(window=(100, 30))):
        want, want_lse = flash_fwd(q, k, v, layout="bshd", return_lse=True, **mask)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        o, lse = flash_fwd_varlen(*flat, cu, cu, return_lse=True, **mask)
        torch.testing.assert_close(o, want.flatten(0, 1), rtol=2**-7, atol=2**-8 * want.abs().max().item())
        torch.testing.assert_close(lse, want_lse.transpose(0, 1).flatten(1), rtol=2e-6, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 128, 160, 192, 224, 256])
@EACH_MASK
def test_gradients_of_every_head_dim(mask, head_dim):
    check_gradients([(1000, 1000), (500, 700), (1, 1), (900, 300), (0, 40), (64, 0)], 4, 2, head_dim, **mask)


@pytest.mark.gpu
def test_the_call_says_what_is_wrong_with_an_address():
    q, k, v, how = varlen_inputs([(64, 64)], 2, 2, 64, margin=0)
    odd = torch.randn(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view_as(q)
    with pytest.raises(ValueError, match="q: its data starts 2 bytes past a multiple of 16"):
        flash_fwd_varlen(odd, k, v, **how)
    with pytest.raises(ValueError, match=f"cu_seqlens_k: on cpu, but q is on {q.device}"):
        flash_fwd_varlen(q, k, v, how["cu_seqlens_q"], how["cu_seqlens_k"].cpu())


@pytest.mark.gpu
def test_new_lengths_reuse_the_compiled_kernel(monkeypatch):
    got = []
    get = compile.get
    monkeypatch.setattr(compile, "get", lambda config: got.append(config) or get(config))
    monkeypatch.setattr(call, "known", {})
    for sizes in ([(5, 9)], [(300, 200), (7, 7)], [(1000, 3)] * 40):
        check(*varlen_inputs(sizes, 4, 2, 64), causal=True)
    assert len(set(got)) == 1
    assert dataclasses.replace(got[0], dtype="fp16").varlen and device.get(0)
