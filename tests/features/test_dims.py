"""Head dims: v and o have their own, and each goes up to 512."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import (
    BlockLists,
    call,
    checks,
    compile,
    flash_attn_interface,
    flash_fwd,
    flash_fwd_varlen,
    plan,
    request,
    warmup,
)
from cute_attn.integrations import sdpa, transformers
from cute_attn.kernels.config import SMEM_BYTES, FwdConfig, SparseBlocks
from cute_attn.operands import Dense
from cute_attn.plan import HEAD_DIMS, FeatureKey, Problem
from cute_attn.tools import bench, inspect
from cute_attn.tools.benchmark.implementations import make_inputs
from cute_attn.tools.benchmark.workload import shape_word
from tests.support import varlen
from tests.support.attention import DTYPES, EDGES, check, inputs
from tests.support.nightly import sample

# Named by their users (DeepSeek's prefill first), then edges: the smallest, columns that are padded, either side large.
PAIRS = [(192, 128), (64, 128), (64, 256), (96, 64), (128, 256), (128, 64), (256, 64)]
ODD = [(8, 256), (256, 8), (40, 72), (136, 200)]
LARGE = [(320, 320), (384, 384), (512, 512), (264, 264), (504, 504), (64, 512), (512, 64), (296, 264), (248, 408)]
MASKS = {"full": dict(), "causal": dict(causal=True), "window": dict(window=(70, 30))}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(dims):
    return pytest.mark.parametrize("dims", dims, ids=lambda dims: f"{dims[0]}-{dims[1]}")


def of(dims, *sizes, **how):
    """q, k, v of these head dims."""
    return inputs(*sizes, dims[0], head_dim_v=dims[1], **how)


def problem(dims, **how):
    head_dim, head_dim_v = dims
    other = 0 if head_dim == head_dim_v else head_dim_v
    return Problem(4, 8, 8, 4096, 4096, head_dim, head_dim_v=other)._replace(**how)


# The CPU


@pairs([*PAIRS[:5], (512, 512), (64, 512)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@EACH_MASK
def test_on_the_cpu(mask, layout, dims):
    for seqlen_q, seqlen_k in [(1, 1), (37, 65), (65, 37)]:
        check(*of(dims, 2, 4, 2, seqlen_q, seqlen_k, device="cpu", layout=layout), layout=layout, **mask)


def test_modifiers_on_the_cpu():
    q, k, v = of((48, 96), 2, 4, 2, 30, 40, device="cpu")
    check(q, k, v, causal=True, softcap=5.0, alibi_slopes=torch.rand(4), sinks=torch.randn(4), constant_time=True)
    seen = flash_fwd(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 10)
    torch.testing.assert_close(seen, flash_fwd(q, k, v, causal=True), atol=0, rtol=0)
    first = BlockLists(*(torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)))
    torch.testing.assert_close(flash_fwd(q, k, v, block_mask=first), flash_fwd(q, k, v), atol=0, rtol=0)


@DEVICES
def test_the_default_scale_is_of_q_and_k(where):
    q, k, v = of((64, 256), 1, 2, 2, 50, 60, device=where)
    assert torch.equal(flash_fwd(q, k, v), flash_fwd(q, k, v, scale=64**-0.5))


@DEVICES
def test_o_lies_as_q_does(where):
    q, k, v = of((64, 128), 2, 4, 2, 10, 12, device=where)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for x, strides in ((q, (5120, 1280, 128, 1)), (swapped[0], (5120, 128, 512, 1)), (q.expand_as(q), None)):
        o = flash_fwd(x, k, v)
        assert o.shape == (2, 4, 10, 128) and strides in (None, o.stride())
    assert torch.equal(flash_fwd(*swapped), flash_fwd(q, k, v))
    assert flash_fwd(q[:, :, :1], k, v).stride()[3] == 1
    assert flash_fwd(q[:, :1].transpose(1, 2), k[:, :1].transpose(1, 2), v[:, :1].transpose(1, 2), layout="bshd").shape


@DEVICES
def test_empty(where):
    q, k, v = of((64, 128), 2, 4, 4, 5, 0, device=where)
    o, lse = flash_fwd(q, k, v, return_lse=True)
    assert o.shape == (2, 4, 5, 128) and (o == 0).all() and (lse == -torch.inf).all()
    assert flash_fwd(q[:, :, :0], k, v).shape == (2, 4, 0, 128)


@DEVICES
@pairs([(64, 128), (192, 128), (320, 320), (64, 512)])
@EACH_MASK
def test_varlen(mask, dims, where):
    if where == "cpu" and dims[1] == 512:
        pytest.skip("as the others, and slow there")
    q, k, v, how = varlen.varlen_inputs(varlen.EDGES, 4, 2, dims[0], where=where)
    v = torch.randn(*v.shape[:2], dims[1], device=where).to(v.dtype).masked_fill_(v[..., :1].isnan(), torch.nan)
    out = varlen.marked(v.new_empty(q.shape[0], 4, dims[1]))
    o, lse = flash_fwd_varlen(q, k, v, **how, **mask, return_lse=True, out=out)
    varlen.right(q, k, v, how, o, lse, **mask)
    again = flash_fwd_varlen(q, k, v, **how, **mask)
    rows = ~q[:, 0, 0].isnan()
    assert again.shape == out.shape and torch.equal(again[rows], o[rows])


def test_varlen_without_keys():
    q, k, v = torch.randn(5, 2, 64).bfloat16(), torch.empty(0, 2, 64).bfloat16(), torch.empty(0, 2, 128).bfloat16()
    ends = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    assert (flash_fwd_varlen(q, k, v, *ends) == 0).all()


def test_other_ways_in():
    q, k, v = of((64, 128), 2, 4, 2, 20, 30, device="cpu", dtype=torch.float16)
    o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
    got = flash_fwd(*(x.numpy() for x in (q, k, v)), causal=True)
    assert isinstance(got, np.ndarray) and np.array_equal(got, o.numpy())
    bshd = [x.transpose(1, 2) for x in (q, k, v)]
    got, got_lse = flash_attn_interface.flash_attn_func(*bshd, causal=True, return_attn_probs=True)
    assert torch.equal(got.transpose(1, 2), o) and torch.equal(got_lse, lse)
    module = SimpleNamespace(is_causal=True)
    got, _ = transformers.attention(module, *(x[:, :, :20] for x in (q, k, v)), None)
    assert torch.equal(got.transpose(1, 2), flash_fwd(*(x[:, :, :20] for x in (q, k, v)), causal=True))


def test_transformers_trains_what_torch_trains():
    q, k, v = of((64, 128), 1, 2, 2, 8, 8, device="cpu")
    assert transformers.unserved(q, k, v, 0.0, {}) is None
    assert "gradients" in transformers.unserved(q.requires_grad_(), k, v, 0.0, {})
    q, k, v = of((320, 320), 1, 2, 2, 8, 8, device="cpu")
    assert transformers.unserved(q, k, v, 0.0, {}) is None
    assert "gradients" in transformers.unserved(q, k, v.requires_grad_(), 0.0, {})
    assert "up to 512" in transformers.unserved(*of((520, 64), 1, 2, 2, 8, 8, device="cpu"), 0.0, {})


@pairs([(64, 128), (320, 320)])
def test_torchs_own_attention_is_left_what_its_flash_attention_refuses(dims, monkeypatch):
    monkeypatch.setattr(sdpa, "torchs", lambda *_: "torch's")
    assert sdpa.attention(*of(dims, 1, 2, 2, 8, 8, device="cpu")) == "torch's"


# What raises

Q, K, V = of((64, 128), 2, 4, 2, 10, 12, device="cpu")
WIDE = of((320, 320), 2, 4, 2, 10, 12, device="cpu")
ENDS = torch.tensor([0, 4, 10], dtype=torch.int32)
VARLEN = Q[0].transpose(0, 1), K[0].transpose(0, 1)[:10], V[0].transpose(0, 1)[:10]
WRONG = {
    "520": (
        lambda: flash_fwd(*of((520, 64), 1, 1, 1, 1, 1, device="cpu")),
        "q: head_dim 520 .* multiple of 8 up to 512",
    ),
    "v's 520": (lambda: flash_fwd(*of((64, 520), 1, 1, 1, 1, 1, device="cpu")), "v: head_dim 520 .* up to 512"),
    "v's 60": (lambda: flash_fwd(*of((64, 60), 1, 1, 1, 1, 1, device="cpu")), "v: head_dim 60 .* multiple of 8"),
    "k's": (lambda: flash_fwd(Q, V, V), r"k: shape \(2, 2, 12, 128\) does not fit q's .* with q's B and D"),
    "v's rows": (
        lambda: flash_fwd(Q, K, V[:, :, :5]),
        r"v: shape \(2, 2, 5, 128\) does not fit k's \(2, 2, 12, 64\); v is \(B, Hk, Sk, Dv\) with k's B, Hk, Sk",
    ),
    "out like q": (
        lambda: flash_fwd(Q, K, V, out=torch.empty_like(Q)),
        r"out: shape \(2, 4, 10, 64\) is not q's with v's head_dim, \(2, 4, 10, 128\)",
    ),
    "varlen out": (
        lambda: flash_fwd_varlen(*VARLEN, ENDS, ENDS, out=torch.empty_like(VARLEN[0])),
        r"out: shape \(10, 4, 64\) is not q's with v's head_dim, \(10, 4, 128\)",
    ),
    "varlen v": (
        lambda: flash_fwd_varlen(*VARLEN[:2], VARLEN[2][:9], ENDS, ENDS),
        r"v: shape \(9, 2, 128\) does not fit k's \(10, 2, 64\); v is \(total_k, Hk, Dv\) with k's total_k, Hk",
    ),
    "gradients": (lambda: flash_fwd(Q.clone().requires_grad_(), K, V), "v: head_dim 128 beside q's 64 came .*no_grad"),
    "gradients of v": (lambda: flash_fwd(Q, K, V.clone().requires_grad_()), "v: head_dim 128 .* require grad"),
    "gradients above 256": (
        lambda: flash_fwd(WIDE[0].clone().requires_grad_(), *WIDE[1:]),
        "v: head_dim 320 beside q's 320 .* up to 256",
    ),
    "gradients of varlen": (
        lambda: flash_fwd_varlen(
            *(VARLEN[0].clone().requires_grad_(), *VARLEN[1:], ENDS, ENDS), max_seqlen_q=6, max_seqlen_k=6
        ),
        "v: head_dim 128 beside q's 64 came with inputs that require grad",
    ),
    "warmup": (lambda: warmup(64, head_dim_v=12), "v: head_dim 12 is not supported"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_no_grad_is_the_way_out():
    with torch.no_grad():
        assert flash_fwd(Q.clone().requires_grad_(), K, V).shape == (2, 4, 10, 128)


def test_a_call_that_differs_in_vs_columns_alone_is_another(monkeypatch):
    """Slices of one buffer have equal strides: neither takes the other's kernel, nor its output."""
    whole = torch.randn(1, 2, 9, 256).bfloat16()
    prepared, made = [], call.Call(None, 1.0, None, len, 0, True, (), None)
    monkeypatch.setattr(request.Request, "made", lambda asked: prepared.append(asked.operands.v.shape[3]) or made)
    monkeypatch.setattr(call, "known", {})
    for columns in (64, 128, 64):
        operands = Dense(whole[..., :64], whole[..., :64], whole[..., :columns], None, "bhsd")
        request.request(operands, request.Outputs(), False, None, False, {}).prepared()
    assert prepared == [64, 128]


# torch's operators


@DEVICES
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout, where):
    q, k, v = of((64, 128), 2, 4, 2, 20, 30, device=where, layout=layout)
    out = q.new_empty(*q.shape[:3], 128)
    torch.library.opcheck(torch.ops.cute_attn.flash_fwd.default, (q, k, v, True, None, layout, True))
    torch.library.opcheck(torch.ops.cute_attn.flash_fwd_out.default, (q, k, v, out, True, None, layout, True))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.library.opcheck(torch.ops.cute_attn.flash_fwd.default, (*transposed, True, None, layout, True))


@DEVICES
def test_compile(where):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def model(q, k, v):
        return flash_fwd(q * 2, k, v, causal=True) + 1

    for seqlen in (40, 41):
        q, k, v = of((64, 128), 2, 4, 2, seqlen, seqlen + 3, device=where)
        assert torch.equal(model(q, k, v), flash_fwd(q * 2, k, v, causal=True) + 1)
    with pytest.raises(ValueError, match="v: head_dim 128 beside q's 64"):
        torch.compile(lambda q, k, v: flash_fwd(q, k, v), backend="eager")(q.requires_grad_(), k, v)


def test_the_varlen_operator_makes_o_of_vs_columns():
    how = (ENDS, ENDS, None, None, None, None, False, None, None, None, True)
    torch.library.opcheck(torch.ops.cute_attn.flash_fwd_varlen.default, (*VARLEN, *how), test_utils="test_faketensor")


# Plan, without a GPU

DIM = st.integers(1, 64).map(lambda n: 8 * n)


@settings(max_examples=300)
@given(
    dims=st.tuples(DIM, DIM),
    seqlens=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    heads_kv=st.sampled_from([1, 2, 8]),
    causal=st.booleans(),
    constant_time=st.booleans(),
    key=st.sampled_from(
        [FeatureKey(), FeatureKey(window=True), FeatureKey(softcap=True, alibi=True, sinks=True)]
        + [FeatureKey(sparse=SparseBlocks(m, n, True)) for m, n in ((64, 64), (128, 192), (192, 128))]
    ),
)
def test_every_pair_has_a_kernel(dims, seqlens, heads_kv, causal, constant_time, key):
    found = plan.plan(
        problem(
            dims,
            seqlen_q=seqlens[0],
            seqlen_k=seqlens[1],
            heads_kv=heads_kv,
            causal=causal,
            constant_time=constant_time and not key.sparse,
            features=key,
        )
    )
    assert found.smem_bytes <= SMEM_BYTES and found.registers_held <= 192
    for asked, have in zip(dims, (found.head_dim, found.d_v), strict=True):
        assert 0 <= have - asked < (32 if asked <= 256 else 64)
    assert (found.head_dim_splits, found.columns_v) == ((1, found.d_v) if found.d_v <= 256 else (2, found.d_v // 2))
    of_varlen = plan.varlen(dims[0], "fp16", causal, head_dim_v=dims[1])
    assert (of_varlen.head_dim, of_varlen.d_v) == (found.head_dim, found.d_v) and of_varlen.varlen


def test_equal_dims_have_the_kernels_that_they_had():
    """And a pair that runs on one of them: no kernel for 72 beside 96."""
    for d in HEAD_DIMS:
        for kernel in (plan.plan(problem((d, d))), plan.plan(problem((d - 24, d))), plan.plan(problem((d, d - 8)))):
            assert kernel == plan.plan(Problem(4, 8, 8, 4096, 4096, d)) and f"_d{d}_" in kernel.name
    assert all(config.head_dim_v == 0 and config.head_dim <= 256 for config in plan.prebuilt())


def test_a_pairs_tiles_are_those_of_the_wider_one():
    wide, found = plan.plan(problem((192, 192))), plan.plan(problem((192, 128)))
    assert found == dataclasses.replace(wide, head_dim_v=128)
    assert found.name == "flash_fwd_sm90_bf16_d192v128_full_128x96_static_cluster2"
    assert found.smem_bytes < wide.smem_bytes or found.stages_o > wide.stages_o


def test_warmup_compiles_a_pairs_kernels(monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(compile, "get", compiled.append)
    with caplog.at_level("INFO", "cute_attn"):
        ready = warmup(192, head_dim_v=128, dtype="bf16", layout="bhsd", causal=True)
    told = [f"warmup: {i} of {len(ready)} kernels, {config.name}" for i, config in enumerate(ready, 1)]
    assert [record.getMessage() for record in caplog.records] == told
    assert ready == compiled and {(c.head_dim, c.d_v) for c in ready} == {(192, 128)}
    assert plan.plan(problem((192, 128), causal=True)) in ready
    large = warmup((512, 384), head_dim_v=(None, 64), dtype="fp16", layout="bshd", causal=False)
    assert {(c.head_dim, c.d_v) for c in large} == {(512, 512), (384, 384), (512, 64), (384, 64)}


def test_inputs_of_a_pair():
    p = problem((192, 128), seqlen_q=10, seqlen_k=20)
    q, k, v, _ = make_inputs(p, torch.device("cpu"))
    assert (q.shape, k.shape, v.shape) == ((4, 8, 10, 192), (4, 8, 20, 192), (4, 8, 20, 128))


def test_roofline_of_two_warpgroups_that_share_rows():
    """Each multiplies QK, and half of PV's columns: 1.5 times the MMAs of one."""
    config = FwdConfig(512, tile_m=64, tile_n=32)
    report = SimpleNamespace(steady_loop=inspect.LoopReport(100))
    assert inspect.bounds(config, report).mma == 1.5 * (64 * 32 * 512 * 4 / 4096)


# Machine code, without a GPU


@pytest.mark.machine_code
@pytest.mark.parametrize(
    ("dims", "causal"),
    sample(3, [*PAIRS, (320, 320), (384, 384), (512, 512), (64, 512), (512, 64)], [False, True]),
    ids=str,
)
def test_machine_code(dims, causal):
    report = inspect.report(plan.plan(problem(dims, causal=causal)))
    assert report.problems() == []
    assert report.steady_loop.warpgroup_ops == inspect.LOOP_WARPGROUP_OPS


OTHERS = {
    "constant time": dict(constant_time=True),
    "window": dict(features=FeatureKey(window=True)),
    "scores": dict(features=FeatureKey(softcap=True, alibi=True, sinks=True)),
    "lists": dict(features=FeatureKey(sparse=SparseBlocks(128, 128, True))),
    "PackGQA": dict(heads_kv=1, seqlen_q=4, causal=True),
    "split": dict(batch=1, seqlen_q=64),
}


@pytest.mark.machine_code
@pytest.mark.parametrize(("dims", "other"), sample(3, [(192, 128), (64, 128), (512, 512)], OTHERS), ids=str)
def test_machine_code_with_more(dims, other):
    config = plan.plan(problem(dims, **OTHERS[other]))
    assert inspect.report(config).problems() == []


@pytest.mark.machine_code
@pytest.mark.parametrize("dims", sample(1, [(192, 128), (64, 256), (512, 512)]), ids=str)
def test_machine_code_of_varlen_sequences(dims):
    assert inspect.report(plan.varlen(dims[0], "bf16", True, head_dim_v=dims[1])).problems() == []


@pytest.mark.machine_code
def test_both_halves_load_v_and_one_of_them_stores_lse():
    """A stage of V comes as two boxes of its own columns each; fp16 and the other layout are the same machine code."""
    config = plan.plan(problem((512, 512)))
    assert (config.warpgroups, config.row_blocks, config.head_dim_splits, config.stages_o) == (2, 1, 2, False)
    report = inspect.report(config)
    assert report.registers_asked == (40, 232) and report.tma_stores == 0
    assert inspect.sass(dataclasses.replace(config, layout="bshd")) == inspect.sass(config)


# The GPU, against float64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@CAUSAL
@pairs([*PAIRS, *ODD, *LARGE])
def test_edge_shapes(dims, causal, dtype):
    for seqlen_q, seqlen_k in EDGES:
        check(*of(dims, 2, 4, 2, seqlen_q, seqlen_k, dtype=dtype), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@EACH_MASK
@pairs([*PAIRS[:3], (320, 320), (512, 512), (64, 512), (512, 64)])
def test_masks_and_layouts(dims, mask, layout):
    for seqlen_q, seqlen_k in [(300, 300), (77, 333), (1025, 1023)]:
        check(*of(dims, 3, 8, 2, seqlen_q, seqlen_k, layout=layout), layout=layout, **mask)


@pytest.mark.gpu
@CAUSAL
@pairs([*PAIRS, (320, 320), (512, 512), (96, 384), (384, 96)])
def test_many_tiles_and_few(dims, causal):
    """Persistent CTAs reuse buffers and barriers; few tiles split keys, few queries pack heads."""
    for sizes in ((4, 16, 4, 1500, 1800), (1, 2, 1, 64, 4100), (1, 32, 2, 3, 2000), (2, 6, 2, 16, 700)):
        check(*of(dims, *sizes), causal=causal)


@pytest.mark.gpu
@CAUSAL
@pytest.mark.parametrize("scale", [0.0, -0.125, -3.0, 1e-30, 30.0])
@pairs([(64, 128), (192, 128), (320, 320), (512, 512), (64, 512)])
def test_scale(dims, scale, causal):
    """Two warpgroups that share rows multiply a sign into Q once between them."""
    check(*of(dims, 2, 4, 2, 200, 333), scale=scale, causal=causal)
    check(*of(dims, 8, 16, 16, 300, 70), scale=scale, causal=causal)


@pytest.mark.gpu
@EACH_MASK
@pairs([(192, 128), (64, 256), (384, 384), (512, 512)])
def test_modifiers(dims, mask):
    q, k, v = of(dims, 2, 4, 2, 333, 500)
    given = dict(softcap=20.0, alibi_slopes=torch.rand(4, device="cuda"), sinks=torch.randn(4, device="cuda"))
    for name, value in given.items():
        check(q, k, v, **{name: value}, **mask)
    check(q, k, v, **given, **mask)
    check(q, k, v, constant_time=True, **mask)
    check(q, k, v, constant_time=True, **given, **mask)


@pytest.mark.gpu
@pairs([(192, 128), (64, 128), (384, 384), (512, 512)])
def test_functions_and_lists(dims):
    q, k, v = of(dims, 2, 4, 2, 333, 500)
    want = flash_fwd(q, k, v, causal=True).float()
    seen = flash_fwd(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 167)
    torch.testing.assert_close(seen.float(), want, atol=0.02, rtol=0.02)
    hidden = flash_fwd(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(j <= i + 167, s, -float("inf")))
    torch.testing.assert_close(hidden.float(), want, atol=0.02, rtol=0.02)
    for block in (64, 128):
        rows, columns = -(-333 // block), -(-500 // block)
        counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device="cuda")
        places = torch.arange(columns, dtype=torch.int32, device="cuda").expand(1, 1, rows, columns).contiguous()
        o = flash_fwd(q, k, v, causal=True, block_mask=BlockLists(counts, places, block_size=(block, block)))
        torch.testing.assert_close(o.float(), want, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("log2_step", [0.7, 8.1, 17.0, 33.0, 1000.0])
@CAUSAL
@pairs([(96, 64), (64, 128), (192, 128), (320, 320), (512, 512)])
def test_growing_maximum(dims, causal, log2_step):
    """Each block's scores exceed the last's: both halves of a row rescale alike."""
    q, k, v = of(dims, 1, 2, 2, 256, 2048)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[..., 0] += (torch.arange(2048, device="cuda").flip(0) // 128 * (log2_step / 1.4427)).to(k.dtype)
    check(q, k, v, causal=causal, scale=1.0)


@pytest.mark.gpu
@pairs([*PAIRS[:3], (512, 512), (64, 512)])
def test_rows_without_keys(dims):
    for seqlen_q, seqlen_k in [(333, 77), (512, 1), (64, 0)]:
        q, k, v = of(dims, 2, 4, 2, seqlen_q, seqlen_k)
        o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
        blind = seqlen_q - seqlen_k
        assert (o[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -torch.inf).all()
        assert lse[:, :, blind:].isfinite().all()


@pytest.mark.gpu
@CAUSAL
@pairs([*PAIRS[:4], *ODD, (264, 264), (512, 512), (72, 296)])
def test_nothing_outside_the_tensors_is_read_or_written(dims, causal):
    """Each tensor is a window of a larger buffer, poisoned around it on every side."""

    def window(heads, seqlen, d):
        whole = torch.full((4, heads + 2, seqlen + 9, d + 16), torch.nan, dtype=torch.bfloat16, device="cuda")
        inner = whole[1:3, 1:-1, 3:-6, 8:-8]
        inner.copy_(torch.randn(inner.shape, device="cuda"))
        return whole, inner

    (_, q), (_, k), (_, v) = window(4, 203, dims[0]), window(2, 331, dims[0]), window(2, 331, dims[1])
    whole, o = window(4, 203, dims[1])
    o.fill_(torch.nan)
    check(q, k, v, causal=causal, out=o)
    assert int(whole.isfinite().sum()) == o.numel()


@pytest.mark.gpu
def test_slices_of_one_buffer_one_after_the_other():
    """Equal strides, other columns: the call that is looked up is its own."""
    whole = torch.randn(2, 2, 200, 512, device="cuda").bfloat16()
    for columns in (64, 128, 64, 256, 512, 64):
        check(whole[..., :64], whole[..., 64:128], whole[..., :columns])
        with pytest.raises(ValueError, match="out: shape"):
            flash_fwd(whole[..., :64], whole[..., 64:128], whole[..., :columns], out=whole[..., :72].clone())


@pytest.mark.gpu
@pairs([(192, 128), (512, 512)])
def test_runs_repeat_bit_for_bit(dims):
    q, k, v = of(dims, 2, 8, 2, 700, 900)
    first = flash_fwd(q, k, v, causal=True, return_lse=True)
    for _ in range(5):
        assert all(map(torch.equal, flash_fwd(q, k, v, causal=True, return_lse=True), first))


@pytest.mark.gpu
def test_both_halves_of_a_row_agree():
    """V's right half as its left: so is o's, to the bit."""
    for dims in ((512, 512), (320, 640 // 2), (64, 512)):
        q, k, v = of(dims, 2, 4, 2, 300, 500)
        half = plan.kernel_dims(dims[1])[0] // 2
        v[..., half:] = v[..., : dims[1] - half]
        o = flash_fwd(q, k, v, causal=True)
        assert torch.equal(o[..., half:], o[..., : dims[1] - half])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--shape 1,2,128,520", "head_dim 520 is not supported; use a multiple of 8 up to 512"),
        ("--head-dim-v 60", "--head-dim-v: '60': head_dim 60 is not supported"),
        ("--head-dim-v 128 --ladder", "--head-dim-v: not allowed with --ablation"),
    ],
)
def test_bench_says_what_it_does_not_take(options, words, capsys):
    with pytest.raises(SystemExit):
        bench.main(options.split())
    assert words in capsys.readouterr().err


def test_bench_takes_vs_head_dim():
    _, (found,) = bench.parse(["--shape", "1,2,128,192", "--head-dim-v", "128"])
    assert (found.head_dim, found.d_v, shape_word(found)) == (192, 128, "1,2,128,192/128")
    _, (equal,) = bench.parse(["--shape", "1,2,128,128", "--head-dim-v", "128"])
    assert equal == Problem(1, 2, 2, 128, 128, 128, "bf16", "bshd")


def test_a_check_knows_both_dims():
    assert checks.other_head_dim(Q, V) == 128 and checks.other_head_dim(Q, K) == 0
    assert checks.warmup_problem(192, "bf16", "bhsd", True, False, False, 128).d_v == 128
