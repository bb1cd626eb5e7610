"""return_row_max and return_max_logit: the largest scores by every way in, and free for who does not ask."""

from itertools import product

import numpy as np
import pytest
import torch

from cute_attn import flash_fwd, flash_fwd_varlen, plan, reference
from cute_attn.kernels.config import FwdConfig, SparseBlocks
from cute_attn.kernels.outputs import RowMax, Sinks
from cute_attn.kernels.parts import parts_of
from cute_attn.plan import HEAD_DIMS, FeatureKey, Problem
from cute_attn.tools import inspect
from tests.support.attention import DTYPES, EDGES, close_lse, inputs, visible
from tests.support.maxima import ASKED, check
from tests.support.nightly import sample

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("window", [None, (2, 1)])
@CAUSAL
def test_the_reference_by_definition(causal, window):
    q, k, v = (x.double() for x in inputs(2, 4, 2, 7, 5, 8, device="cpu"))
    window = window and (2, 0 if causal else 1)
    scores = -0.4 * q @ k.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~visible(7, 5, causal, "cpu", window), -torch.inf)
    how = dict(causal=causal, window=window, scale=-0.4, sinks=torch.full((4,), 99.0))
    *_, row_max, max_logit = reference.attention(q, k, v, return_row_max=True, return_max_logit=True, **how)
    torch.testing.assert_close(row_max, scores.amax(3))
    torch.testing.assert_close(max_logit, scores.amax((0, 2, 3)))


@DEVICES
def test_small(device):
    """Masks, signs of the scale, layouts; rows without keys, which no sink helps."""
    calls = [{}, dict(causal=True), dict(window=(2, 3)), dict(softcap=1.5, sinks=torch.full((4,), 50.0, device=device))]
    for sizes, scale, how in product([(5, 9), (9, 5), (1, 1)], (None, -0.7, 0.0), calls):
        check(*inputs(2, 4, 2, *sizes, 16, device=device), scale=scale, **how)
        check(*inputs(2, 4, 2, *sizes, 16, device=device, layout="bshd"), scale=scale, layout="bshd", **how)


@DEVICES
def test_what_comes_back_and_in_which_order(device):
    q, k, v = inputs(2, 4, 2, 6, 9, 16, device=device)
    everything = dict(zip(("o", "lse", "row_max", "max_logit"), flash_fwd(q, k, v, **ASKED), strict=True))
    assert [x.shape for x in everything.values()] == [(2, 4, 6, 16), (2, 4, 6), (2, 4, 6), (4,)]
    for asked in product((False, True), repeat=3):
        names = ["o", *(name for name, wanted in zip(("lse", "row_max", "max_logit"), asked, strict=True) if wanted)]
        found = flash_fwd(q, k, v, **{f"return_{name}": True for name in names[1:]})
        found = found if len(names) > 1 else (found,)
        assert isinstance(found, tuple) and len(found) == len(names)
        for name, x in zip(names, found, strict=True):
            torch.testing.assert_close(x, everything[name], atol=0.02, rtol=0.02)


@DEVICES
def test_empty(device):
    for shape, seqlen_k in [((0, 4, 5), 7), ((2, 0, 5), 7), ((2, 4, 0), 7), ((2, 4, 5), 0)]:
        q = torch.randn(*shape, 64, device=device).bfloat16()
        k = torch.randn(shape[0], max(shape[1], 1), seqlen_k, 64, device=device).bfloat16()
        _, _, row_max, max_logit = flash_fwd(q, k, k, **ASKED)
        assert row_max.shape == shape and max_logit.shape == shape[1:2]
        assert (row_max == -torch.inf).all() and (max_logit == -torch.inf).all()


@DEVICES
def test_nan_and_infinities(device):
    """A NaN among a row's scores is not passed over, hidden it does not count, and +inf is the largest of all."""
    q, k, v = inputs(1, 1, 1, 130, 130, 16, device=device)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 100, 0] = torch.nan
    _, row_max = flash_fwd(q, k, v, causal=True, return_row_max=True)
    assert row_max[:, :, :100].isfinite().all() and row_max[:, :, 100:].isnan().all()
    for value, rows in ((torch.inf, slice(100, None)), (-torch.inf, slice(0, 0))):
        k[:, :, 100, 0] = value
        _, row_max = flash_fwd(q, k, v, causal=True, return_row_max=True)
        infinite = torch.zeros(130, dtype=torch.bool, device=device)
        infinite[rows] = True
        assert (row_max[0, 0, infinite] == torch.inf).all() and row_max[0, 0, ~infinite].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@CAUSAL
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 160, 192, 224, 256])
def test_at_the_edges(head_dim, causal, dtype):
    for sizes, scale in product(EDGES, (None, -0.3)):
        check(*inputs(2, 4, 2, *sizes, head_dim, dtype), causal=causal, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_everything_together(head_dim):
    """Windows, scores, sinks, long sequences, constant time; and layouts of few queries, with PackGQA."""
    slopes, sinks = torch.randn(4, device="cuda") / 8, torch.linspace(-30, 30, 4, device="cuda")
    for how in (dict(window=(100, 30)), dict(softcap=1.5, alibi_slopes=slopes), dict(sinks=sinks, causal=True)):
        for sizes in (*EDGES, (2100, 2100)):
            check(*inputs(2, 4, 2, *sizes, head_dim), **how)
        check(*inputs(2, 4, 2, 300, 1000, head_dim), constant_time=True, **how)
    for layout, queries in product(("bhsd", "bshd"), (1, 5)):
        check(*inputs(3, 32, 4, queries, 5000, head_dim, layout=layout), layout=layout, causal=True)
        check(*inputs(3, 21, 7, queries, 5000, head_dim, layout=layout), layout=layout, window=(999, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_growing_maximum(head_dim):
    """Each block's scores exceed the last's, or are far below: the running max has a margin, row_max does not."""
    for log2_step in (0.7, 7.9, 8.1, 33.0, 1000.0, -33.0):
        q, k, v = inputs(1, 2, 2, 256, 2048, head_dim)
        q[..., 0], k[..., 0] = 1.0, 0.0
        k[..., 0] += (torch.arange(2048, device="cuda").flip(0) // 128 * (log2_step / 1.4427)).to(k.dtype)
        for causal in (False, True):
            *_, row_max = flash_fwd(q, k, v, causal=causal, scale=1.0, return_row_max=True)
            *_, want = reference.attention(q, k, v, causal=causal, scale=1.0, return_row_max=True)
            torch.testing.assert_close(row_max.double(), want, rtol=2e-6, atol=1e-4)


@pytest.mark.gpu
def test_lists_of_blocks_and_functions():
    from torch.nn.attention.flex_attention import create_block_mask

    def prefix(b, h, q_idx, kv_idx):
        return (kv_idx < 70) | (kv_idx <= q_idx - 200)

    def farther(score, b, h, q_idx, kv_idx):
        return score - 0.01 * (q_idx - kv_idx)

    q, k, v = inputs(2, 4, 2, 700, 900, 64)
    lists = create_block_mask(prefix, None, None, 700, 900, device="cuda", BLOCK_SIZE=128)
    want = reference.attention(q, k, v, mask_mod=prefix, score_mod=farther, return_row_max=True)[2]
    for how in (dict(block_mask=lists), dict(mask_mod=prefix)):
        close_lse(flash_fwd(q, k, v, score_mod=farther, return_row_max=True, **how)[1], want)


@DEVICES
@CAUSAL
def test_varlen(device, causal):
    """As each sequence for itself; -inf where a row is of no sequence."""
    lengths_q, lengths_k = (5, 0, 130, 64), (7, 3, 200, 0)
    cu_q, cu_k = (torch.tensor([2, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k))
    q = torch.randn(int(cu_q[-1]) + 3, 4, 64, device=device).bfloat16()
    k, v = torch.randn(2, int(cu_k[-1]) + 3, 2, 64, device=device).bfloat16()
    how = dict(causal=causal, scale=-0.2)
    _, row_max, max_logit = flash_fwd_varlen(q, k, v, cu_q, cu_k, return_row_max=True, return_max_logit=True, **how)
    want = torch.full((4, len(q)), -torch.inf, dtype=torch.float64, device=device)
    for rows, *_, found in reference.varlen(q, k, v, cu_q, cu_k, return_row_max=True, **how):
        want[:, rows] = found
    close_lse(row_max, want)
    assert torch.equal(max_logit, row_max.amax(1))


@DEVICES
def test_every_way_in(device):
    """Compiled whole, by the operator, with gradients, from other arrays: as the eager call."""
    q, k, v = inputs(2, 4, 2, 33, 47, 64, torch.float16, device=device)
    want = flash_fwd(q, k, v, causal=True, **ASKED)
    compiled = torch.compile(lambda q: flash_fwd(q, k, v, causal=True, **ASKED), backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(q), want))
    operator, args = torch.ops.cute_attn.flash_fwd_row_max, (q, k, v, True, None, "bhsd", True)
    assert all(map(torch.equal, operator(*args), want[:3]))
    assert operator(*args[:-1], False)[1].numel() == 0
    torch.library.opcheck(operator.default, args)
    learning = [x.clone().requires_grad_() for x in (q, k, v)]
    o, row_max, max_logit = flash_fwd(*learning, causal=True, return_row_max=True, return_max_logit=True)
    assert o.requires_grad and not row_max.requires_grad and not max_logit.requires_grad
    torch.testing.assert_close(row_max, want[2])
    grads = torch.autograd.grad(o.sum(), learning)
    for ours, plain in zip(grads, torch.autograd.grad(flash_fwd(*learning, causal=True).sum(), learning), strict=True):
        torch.testing.assert_close(ours, plain, atol=0.01, rtol=0.01)
    if device == "cpu":
        found = flash_fwd(*(x.numpy() for x in (q, k, v)), causal=True, **ASKED)
        assert all(np.array_equal(ours, x.numpy()) for ours, x in zip(found, want, strict=True))


def test_wrong():
    q, k, v = inputs(2, 4, 2, 8, 8, 16, device="cpu")
    for name in ("return_row_max", "return_max_logit"):
        with pytest.raises(TypeError, match=f"{name}: a bool is needed, 1 came"):
            flash_fwd(q, k, v, **{name: 1})
    with pytest.raises(AssertionError, match="RowMax sees each S once"):
        FwdConfig(64, speculative=True, row_max=True)


@DEVICES
def test_compiled_into_an_output_and_varlen(device):
    q, k, v = inputs(2, 4, 2, 40, 40, 64, device=device)
    cu = torch.tensor([0, 40], dtype=torch.int32, device=device)
    sequences = [x[0].transpose(0, 1) for x in (q, k, v)]

    def dense(out):
        return flash_fwd(q, k, v, out=out, return_lse=True, return_row_max=True, return_max_logit=True)

    def of_varlen(out):
        return flash_fwd_varlen(*sequences, cu, cu, softcap=3.0, return_row_max=True, return_max_logit=True)

    for function in (dense, of_varlen):
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(torch.full_like(q, torch.nan))
        want = function(torch.full_like(q, torch.nan))
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_a_maximum_hinders_no_gradient():
    q, k, v = inputs(1, 2, 2, 40, 40, 64, device="cpu")
    sequences = [x[0].transpose(0, 1).clone().requires_grad_() for x in (q, k, v)]
    cu = torch.tensor([0, 40], dtype=torch.int32)
    how = dict(max_seqlen_q=40, max_seqlen_k=40, causal=True)
    o, max_logit = flash_fwd_varlen(*sequences, cu, cu, **how, return_max_logit=True)
    assert not max_logit.requires_grad
    found, want = (torch.autograd.grad(x.sum(), sequences) for x in (o, flash_fwd_varlen(*sequences, cu, cu, **how)))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.machine_code
@pytest.mark.parametrize(("head_dim", "causal"), sample(2, HEAD_DIMS, [False, True]))
def test_healthy(head_dim, causal):
    config = plan.plan(Problem(4, 16, 16, 4096, 4096, head_dim, causal=causal, features=FeatureKey(row_max=True)))
    report = inspect.report(config)
    assert config.row_max and "_row_max_" in config.name and report.problems() == []
    assert report.steady_loop.maxima >= config.tile_n // 2, "one for each of a thread's scores"


def with_the_rest() -> dict[str, FwdConfig]:
    keys = (
        dict(softcap=True, sinks=True),
        dict(window=True),
        dict(sparse=SparseBlocks(128, 128, True)),
        dict(alibi=True),
    )
    configs = [
        plan.with_features(plan.config(128, "bf16", "bhsd", True), FeatureKey(row_max=True, **key)) for key in keys
    ]
    configs += [plan.constant_time(configs[0]), plan.varlen(128, "bf16", True, FeatureKey(row_max=True))]
    configs += [plan.plan(Problem(4, 32, 4, 1, 8192, 128, features=FeatureKey(row_max=True)))]
    assert configs[-1].pack == 8 and all(config.row_max and config.split == 1 for config in configs)
    return {config.name: config for config in configs}


@pytest.mark.machine_code
@pytest.mark.parametrize("name", sample(2, with_the_rest()))
def test_healthy_with_the_rest(name):
    assert inspect.report(with_the_rest()[name]).problems() == []


def test_it_is_not_asked_for_in_plain_calls():
    """Neither kernel nor arguments know of it."""
    for causal in (False, True):
        config = plan.plan(Problem(4, 16, 16, 4096, 4096, 64, causal=causal))
        assert not config.row_max and parts_of(config).outputs == () == config.signature().row_max
    asked = plan.with_features(config, FeatureKey(sinks=True, row_max=True))
    assert [type(output) for output in parts_of(asked).outputs] == [RowMax, Sinks]
    assert len(asked.signature().row_max) == len(asked.signature().sinks) == 1
