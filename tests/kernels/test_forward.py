"""flash_fwd's numbers on the GPU, against float64."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cute_attn import device, flash_fwd, plan
from cute_attn.plan import Problem
from cute_attn.reference import attention
from tests.support.attention import DTYPES, EDGES, bound, check, close_lse, inputs, sdpa, visible
from tests.support.plans import kernels_of

pytestmark = pytest.mark.gpu
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@CAUSAL
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 96, 120, 128, 136, 160, 192, 200, 224, 248, 256])
def test_head_dims_at_edge_shapes(head_dim, causal, dtype, planned_by):
    """Every kernel that a problem of the kind may get, whatever its size: few tiles get others than many."""
    for config in kernels_of(head_dim, causal, dtype):
        planned_by(config)
        for seqlen_q, seqlen_k in EDGES:
            check(*inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim, dtype), causal=causal)


@CAUSAL
@pytest.mark.parametrize("head_dim", [56, 64, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "seqlen_q", "seqlen_k"), [(1, 8, 1, 8192), (2, 2, 64, 3100), (1, 4, 300, 1024), (3, 6, 130, 500)]
)
def test_keys_split_over_a_cluster(batch, heads, seqlen_q, seqlen_k, head_dim, causal):
    problem = Problem(batch, heads, heads // 2, seqlen_q, seqlen_k, head_dim, "bf16", "bhsd", causal)
    assert plan.plan(problem, device.name()).split > 1
    for scale in (None, -0.3):
        check(*inputs(batch, heads, heads // 2, seqlen_q, seqlen_k, head_dim), causal=causal, scale=scale)


def test_split_keys_whose_parts_differ_by_much():
    """One CTA's keys outweigh the others' beyond float32, or are hidden: what is merged is still exact."""
    q, k, v = inputs(1, 4, 4, 64, 4096, 64)
    for part in range(4):
        scaled = k.clone()
        scaled[:, :, 1024 * part : 1024 * (part + 1)] *= 60
        check(q, scaled, v)
    k[:, :, :2048] = -1000.0  # scores of about -6,000, and those of the other half above 0
    check(q.abs(), k.where(k < -999, k.abs()), v)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@CAUSAL
@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (4, 4), (8, 2), (8, 1), (6, 3)])
def test_heads_and_layouts(heads, heads_kv, causal, layout):
    for seqlen_q, seqlen_k in [(128, 128), (300, 300), (77, 333), (1025, 1023)]:
        check(*inputs(3, heads, heads_kv, seqlen_q, seqlen_k, 64, layout=layout), causal=causal, layout=layout)


@CAUSAL
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_tiles_for_each_cta(head_dim, causal):
    """Persistent CTAs reuse their buffers and barriers; the ring's phase carries over from tile to tile."""
    check(*inputs(4, 16, 4, 1500, 1800, head_dim), causal=causal)
    check(*inputs(1, 2, 1, 8192 + 64, 8192 + 7, head_dim), causal=causal)


@CAUSAL
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.125, -3.0, 1e-30, -1e-40, 2.0, 30.0])
def test_scale(scale, causal):
    q, k, v = inputs(2, 4, 2, 200, 333, 64)
    o, lse = flash_fwd(q, k, v, scale=scale, causal=causal, return_lse=True)
    want, want_lse = attention(q, k, v, scale=scale, causal=causal)
    bound(o, want, sdpa(q, k, v, causal, scale))
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-5)


def test_scale_of_every_head_dim_reaches_q_in_registers_and_in_shared_memory():
    for head_dim in (32, 64, 96, 128, 160, 192, 224, 256):
        q, k, v = inputs(1, 2, 2, 130, 200, head_dim)
        bound(flash_fwd(q, k, v, scale=-0.2), attention(q, k, v, scale=-0.2)[0], sdpa(q, k, v, False, -0.2))


@pytest.mark.parametrize("dtype", DTYPES)
@CAUSAL
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 160, 256])
def test_growing_maximum(head_dim, causal, dtype, planned_by):
    """Each block's scores exceed the last's: every lazy rescale and every recomputed step is taken, or just not."""
    kernels = kernels_of(head_dim, causal, dtype)
    for log2_step in (0.7, 2.9, 7.9, 8.1, 14.0, 17.0, 29.0, 33.0, 144.0, 1000.0):
        q, k, v = inputs(1, 2, 2, 256, 2048, head_dim, dtype)
        q[..., 0], k[..., 0] = 1.0, 0.0
        k[..., 0] += (torch.arange(2048, device="cuda").flip(0) // 128 * (log2_step / 1.4427)).to(k.dtype)
        want, want_lse = attention(q, k, v, causal=causal, scale=1.0)
        theirs = sdpa(q, k, v, causal, 1.0)
        for config in kernels:
            planned_by(config)
            o, lse = flash_fwd(q, k, v, causal=causal, scale=1.0, return_lse=True)
            bound(o, want, theirs)
            torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)


def test_a_late_sink():
    """The first key, which comes last, outweighs all others, or none: in some rows, for either sign of the scale."""
    for head_dim, causal in product((40, 64, 96, 128), (False, True)):
        q, k, v = inputs(2, 16, 4, 1100, 1500, head_dim)
        k[:, :, 0] = 20.0 * q[:, ::4, 500]
        for scale in (None, -0.4):
            check(q, k, v, causal=causal, scale=scale)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rows_whose_first_blocks_count_for_nothing(head_dim, planned_by):
    """Scores of -inf up to the block in the middle: the running max is found late, and the first keys are not lost."""
    for config in kernels_of(head_dim, False, torch.bfloat16):
        planned_by(config)
        q, k, v = inputs(1, 2, 2, 300, 1600, head_dim)
        q[..., 0], k[..., 0] = 1.0, 0.0
        k[:, :, 700:, 0] = -torch.inf
        k[:, :, :700, 0] = -300.0
        check(q, k, v, scale=1.0)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(333, 77), (512, 1), (700, 64), (130, 129), (64, 0), (1, 0)])
def test_rows_without_keys(seqlen_q, seqlen_k, head_dim):
    q, k, v = inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim)
    v[:, :, 1:].nan_to_num_()
    o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
    blind = max(seqlen_q - seqlen_k, 0)
    assert (o[:, :, :blind] == 0).all()
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert lse[:, :, blind:].isfinite().all()
    if seqlen_k:
        check(q, k, v, causal=True)


def test_rows_without_keys_are_zero_beside_nan_values():
    q, k, v = inputs(1, 2, 2, 300, 20, 128)
    v.fill_(torch.nan)
    o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :280] == 0).all()
    assert (lse[:, :, :280] == -torch.inf).all()
    assert o[:, :, 280:].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@CAUSAL
def test_nan_in_the_input_is_not_hidden(causal, head_dim):
    q, k, v = inputs(1, 2, 2, 400, 400, head_dim)
    sees = visible(400, 400, causal, "cuda")
    for x, rows in ((q, torch.arange(400, device="cuda") == 137), (k, sees[:, 301]), (v, sees[:, 301])):
        row = 137 if x is q else 301
        kept = x[:, :, row, 3].clone()
        x[:, :, row, 3] = torch.nan
        o, lse = flash_fwd(q, k, v, causal=causal, return_lse=True)
        x[:, :, row, 3] = kept
        wrong = o[..., 3] if x is v else o[..., 0]
        assert wrong[:, :, rows].isnan().all()
        if x is not v:  # 0 * NaN: a hidden key's V may reach its tile, a hidden score may not
            assert o[:, :, ~rows].isfinite().all()
            assert (lse.isnan() == rows).all()


def test_infinite_scores():
    """A key at -inf has no weight, in whichever block; a score of +inf gives NaN, as inf - inf does."""
    q, k, v = inputs(1, 1, 1, 130, 700, 64)
    q[..., 0] = 1.0
    k[:, :, 150:690, 0] = -torch.inf
    o, lse = flash_fwd(q, k, v, return_lse=True)
    want, want_lse = attention(q, k, v)
    bound(o, want, sdpa(q, k, v, False))
    close_lse(lse, want_lse)
    k[:, :, 5, 0] = torch.inf
    assert flash_fwd(q, k, v).isnan().all()


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 256])
@CAUSAL
def test_nothing_outside_the_tensors_is_read_or_written(causal, head_dim):
    """Each tensor is a window of a larger buffer, poisoned around it on every side."""

    def window(heads, seqlen):
        whole = torch.full((4, heads + 2, seqlen + 9, head_dim + 16), torch.nan, dtype=torch.bfloat16, device="cuda")
        inner = whole[1:3, 1:-1, 3:-6, 8:-8]
        inner.copy_(torch.randn(inner.shape, device="cuda"))
        return whole, inner

    (_, q), (_, k), (_, v), (whole, o) = window(4, 203), window(2, 331), window(2, 331), window(4, 203)
    o.fill_(torch.nan)
    assert whole.isnan().all()
    check(q, k, v, causal=causal, out=o)
    assert int(whole.isfinite().sum()) == o.numel()


def test_strides():
    """Packed qkv, transposed, expanded and sliced tensors, and sizes of 1 with any stride."""
    qkv = torch.randn(2, 150, 3, 4, 64, device="cuda").bfloat16()
    check(*qkv.unbind(2), layout="bshd")
    check(*(x.transpose(1, 2) for x in qkv.unbind(2)), causal=True)
    q, k, v = inputs(1, 1, 1, 150, 200, 64)
    check(q.expand(3, 4, -1, -1), k.expand(3, 2, -1, -1), v.expand(3, 2, -1, -1), causal=True)
    check(q.expand(3, 4, -1, -1), k.expand(3, 4, -1, -1), v.expand(3, 4, 200, 64))
    q, k, v = inputs(4, 6, 6, 300, 400, 128)
    check(q[::2, ::3, ::5], k[::2, ::3, 7:399:2], v[::2, ::3, :196])
    odd = torch.randn(7 * 64 * 150, device="cuda").bfloat16()
    q = odd.as_strided((1, 1, 150, 64), (3, 5, 64, 1))
    k = odd.as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    check(q, k, k)
    check(k, q, q, out=torch.empty_like(odd).as_strided((1, 1, 1, 64), (1, 1, 1, 1)))


def test_o_may_lie_in_a_larger_buffer_and_interleave_with_the_inputs():
    buffer = torch.randn(2, 150, 4, 4, 64, device="cuda").bfloat16()
    q, k, v, o = buffer.unbind(2)
    before = buffer[:, :, :3].clone()
    check(q, k, v, layout="bshd", out=o)
    assert (buffer[:, :, :3] == before).all()


def test_output_is_like_q():
    q, k, v = inputs(2, 4, 4, 100, 100, 64, layout="bshd")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = flash_fwd(q, k, v, return_lse=True)
    assert (o.shape, o.dtype, o.device, o.stride()) == (q.shape, q.dtype, q.device, q.stride())
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 100), torch.float32, True)
    assert not o.requires_grad


def test_empty():
    for shape in [(0, 4, 5), (2, 0, 5), (2, 4, 0)]:
        q = torch.randn(*shape, 64, device="cuda").bfloat16()
        k = torch.randn(shape[0], max(shape[1], 1), 7, 64, device="cuda").bfloat16()
        o, lse = flash_fwd(q, k, k, return_lse=True)
        assert (o.shape, lse.shape) == (q.shape, q.shape[:3])
    q, k, v = inputs(2, 4, 4, 5, 0, 64)
    o, lse = flash_fwd(q, k, v, return_lse=True, out=torch.full_like(q, torch.nan))
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


def test_run_to_run_bitwise_equal():
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            q, k, v = inputs(2, 8, 2, 1111, 1234, head_dim)
            first = flash_fwd(q, k, v, causal=causal, return_lse=True)
            for _ in range(10):
                again = flash_fwd(q, k, v, causal=causal, return_lse=True)
                assert torch.equal(first[0], again[0])
                assert torch.equal(first[1], again[1])


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    seqlens=st.tuples(st.integers(1, 700), st.integers(0, 900)),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["bhsd", "bshd"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, 0.02, 1.0, -0.3]),
)
def test_generated(batch, heads, seqlens, head_dim, dtype, layout, causal, scale):
    q, k, v = inputs(batch, *heads, *seqlens, head_dim, dtype, layout=layout)
    if seqlens[1] == 0:
        assert (flash_fwd(q, k, v, causal=causal, layout=layout, scale=scale) == 0).all()
    else:
        check(q, k, v, causal=causal, layout=layout, scale=scale)


def test_beyond_2_31_elements_and_65535_heads():
    batch, seqlen, head_dim = 70_001, 248, 128  # 2.2e9 elements
    q, k, v = (torch.randn(batch, 1, seqlen, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() > 2**31
    for causal in (False, True):
        o, lse = flash_fwd(q, k, v, causal=causal, return_lse=True, out=torch.full_like(q, torch.nan))
        assert not o.isnan().any()
        for b in (0, 1, 65_535, 65_536, 67_650, batch - 1):
            part = [x[b : b + 1] for x in (q, k, v)]
            want, want_lse = attention(*part, causal=causal)
            bound(o[b : b + 1], want, sdpa(*part, causal))
            close_lse(lse[b : b + 1], want_lse)


def test_one_stride_beyond_2_31_elements():
    q, k, v = inputs(1, 2, 2, 300, 400, 64)
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    apart = far.as_strided((1, 2, 400, 64), (1, 2**31, 64, 1))
    apart.copy_(k)
    check(q, apart, v, causal=True)
    check(q, k, apart, out=far[1 << 19 :].as_strided((1, 2, 300, 64), (1, 2**31, 64, 1)))
