"""softcap, alibi_slopes and sinks: right alone and together, taken by every way in, never compiled for a value."""

from itertools import product

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

from cute_attn import compile, flash_fwd, plan, reference
from cute_attn.features.softcap import softcap
from cute_attn.kernels import score
from cute_attn.plan import FeatureKey, Problem
from cute_attn.tools import inspect
from tests.support.attention import DTYPES, EDGES, check, inputs
from tests.support.score import NAMES, score_features

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TOGETHER = [asked for asked in product((False, True), repeat=3) if any(asked)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("asked", TOGETHER)
def test_the_reference_by_definition(asked):
    q, k, v = (x.double() for x in inputs(2, 4, 2, 5, 9, 8, device="cpu"))
    how = score_features(2, 4, "cpu", asked)
    o, lse = reference.attention(q, k, v, causal=True, **how)
    for b, h in product(range(2), range(4)):
        scores = q[b, h] @ k[b, h // 2].T * 8**-0.5
        scores = 1.5 * torch.tanh(scores / 1.5) if "softcap" in how else scores
        for i, j in product(range(5), range(9)):
            scores[i, j] -= how["alibi_slopes"][b, h] * abs(i + 4 - j) if "alibi_slopes" in how else 0.0
            scores[i, j] = scores[i, j] if j <= i + 4 else -torch.inf
        weights = scores.exp()
        total = weights.sum(1) + (how["sinks"][h].double().exp() if "sinks" in how else 0.0)
        torch.testing.assert_close(lse[b, h], total.log())
        torch.testing.assert_close(o[b, h], weights / total[:, None] @ v[b, h // 2])


@DEVICES
@pytest.mark.parametrize("asked", TOGETHER)
def test_small(asked, device):
    """Every combination, with causal, with a window, in both layouts; rows without keys; a negative scale."""
    for (seqlen_q, seqlen_k), how in product([(5, 9), (9, 5), (1, 1)], [{}, dict(causal=True), dict(window=(2, 3))]):
        q, k, v = inputs(2, 4, 2, seqlen_q, seqlen_k, 16, device=device)
        extra = score_features(2, 4, device, asked, per_batch=seqlen_q == 5)
        check(q, k, v, **how, **extra)
        bshd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        check(*bshd, layout="bshd", scale=-0.7, **how, **extra)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("asked", TOGETHER)
def test_at_the_edges(asked, head_dim, dtype):
    for (seqlen_q, seqlen_k), how in product(EDGES, [{}, dict(causal=True), dict(window=(100, 30))]):
        check(*inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim, dtype), **how, **score_features(2, 4, "cuda", asked))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_and_constant_time(head_dim):
    """Clusters and dynamic schedulers; no branch on a score."""
    for causal, constant_time in product((False, True), repeat=2):
        q, k, v = inputs(2, 4, 2, 4100, 4100, head_dim)
        check(q, k, v, causal=causal, constant_time=constant_time, **score_features(2, 4, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.01, 1.0, 30.0, 1000.0])
def test_scores_of_every_size(cap):
    """Far below the cap, about it, and far above it, beside each other and in warps of their own."""
    q, k, v = inputs(1, 2, 2, 300, 700, 64)
    q[:, :, 100:200] *= 30
    q[:, :, 250:260] *= 3000
    q[:, :, 280:] *= 0.01
    check(q, k, v, softcap=cap)
    check(q, k, v, softcap=cap, causal=True, constant_time=True)


@DEVICES
def test_sinks_at_the_extremes(device):
    """-inf is no sink; a row without keys, or with none that counts, has its sink for an lse and o = 0."""
    q, k, v = inputs(1, 3, 1, 9, 5, 16, device=device)
    o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
    sinks = torch.tensor([-torch.inf, 200.0, -200.0], device=device)
    got, got_lse = flash_fwd(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert torch.equal(got[:, 0], o[:, 0])
    torch.testing.assert_close(got_lse[:, 0], lse[:, 0])
    assert (got[:, 1] == 0).all() and (got_lse[:, 1] == 200).all()
    torch.testing.assert_close(got_lse[:, 2, :4], torch.full((1, 4), -200.0, device=device))
    assert (got[:, :, :4] == 0).all()
    o, lse = flash_fwd(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    assert (o == 0).all() and torch.equal(lse, sinks[:, None].expand(1, 3, 9))


@pytest.mark.gpu
def test_values_that_no_row_sees():
    """NaN in V behind the mask stays there, though a sink makes every lse finite."""
    q, k, v = inputs(1, 2, 2, 200, 100, 64)
    o = flash_fwd(q, k, torch.full_like(v, torch.nan), causal=True, sinks=torch.zeros(2, device="cuda"))
    assert (o[:, :, :100] == 0).all()


def test_the_powers_of_tanh():
    """In float32, as the kernel takes them, for |x| < 1/2."""
    x = np.linspace(1e-6, 0.5, 100_001, dtype=np.float32)
    square, total = (4 * x) ** 2, np.float32(score.TANH[-1])
    for c in score.TANH[-2::-1]:
        total = total * square + np.float32(c)
    assert np.abs(4 * x * total / np.tanh(x.astype(np.float64)) - 1).max() < 1e-6


def test_the_two_powers_of_tanh():
    """In float32, for |x| < NEAR; the least that two powers allow is what is allowed."""
    x = np.linspace(1e-6, score.NEAR, 100_001, dtype=np.float32)
    u = x * x - np.float32(score.NEAR**2)
    assert np.abs(x * score.horner([np.float32(c) for c in score.NEAR_TANH], u) - np.tanh(x.astype(float))).max() < 3e-7


def test_which_scored_kernels_question_their_steps_afterwards():
    """Three warpgroups with registers for it; of four those of softcap, with fewer keys where causal."""

    def of(head_dim, causal, **features):
        return plan.with_features(plan.config(head_dim, "bf16", "bhsd", causal), FeatureKey(**features))

    for causal in (False, True):
        assert all(of(d, causal, **{kind: True}).speculative for d in (96, 128) for kind in ("softcap", "alibi"))
        assert of(64, causal, softcap=True).speculative and not of(64, causal, alibi=True).speculative
        assert not any(of(d, causal, softcap=True, alibi=True).speculative for d in plan.HEAD_DIMS)
        assert of(64, causal, softcap=True).tile_n == (48 if causal else 64)
        assert of(128, causal, softcap=True).stages >= 3
        assert of(96, causal, softcap=True).tile_n == plan.config(96, "bf16", "bhsd", causal).tile_n - 16


WRONG = {
    "softcap of 0": (dict(softcap=0.0), ValueError, r"softcap: 0.0 came; use one between .*, or None for no cap"),
    "softcap below 0": (dict(softcap=-30), ValueError, "softcap: -30.0 came"),
    "softcap of NaN": (dict(softcap=float("nan")), ValueError, "softcap: nan came"),
    "softcap as text": (dict(softcap="30"), TypeError, "softcap: '30' came; a positive number is needed"),
    "softcap as bool": (dict(softcap=True), TypeError, "softcap: True came"),
    "slopes as list": (dict(alibi_slopes=[1.0]), TypeError, r"alibi_slopes: a torch.Tensor is needed, float32 \(4,\)"),
    "slopes in bf16": (dict(alibi_slopes=torch.ones(4).bfloat16()), TypeError, "use alibi_slopes.float()"),
    "too few slopes": (
        dict(alibi_slopes=torch.ones(2)),
        ValueError,
        r"shape \(2,\) came; \(4,\) or \(2, 4\) is needed",
    ),
    "slopes turned": (dict(alibi_slopes=torch.ones(4, 2)), ValueError, r"alibi_slopes: shape \(4, 2\) came"),
    "slopes of a column": (dict(alibi_slopes=torch.ones(4, 2).T), ValueError, "use alibi_slopes.contiguous()"),
    "sinks of a batch": (dict(sinks=torch.ones(2, 4)), ValueError, r"sinks: shape \(2, 4\) came; \(4,\) is needed"),
    "sinks elsewhere": (dict(sinks=torch.ones(4, device="meta")), ValueError, "sinks: on meta, but q is on cpu"),
    "sinks that learn": (
        dict(sinks=torch.ones(4).requires_grad_()),
        ValueError,
        "has no gradient for it; pass sinks.d",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    extra, error, words = WRONG[case]
    q, k, v = inputs(2, 4, 2, 8, 8, 16, device="cpu")
    with pytest.raises(error, match=words):
        flash_fwd(q, k, v, **extra)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradients(name):
    q, k, v = inputs(2, 4, 2, 8, 8, 16, device="cpu")
    extra = {name: score_features(2, 4, "cpu")[name]}
    with pytest.raises(ValueError, match=f"{name}: given with inputs that require grad, and its backward is not"):
        flash_fwd(q.requires_grad_(), k, v, **extra)
    with torch.no_grad():
        flash_fwd(q, k, v, **extra)


@DEVICES
def test_every_way_in(device):
    """Compiled whole, by the operator, into `out`, from other arrays: as the eager call."""
    q, k, v = inputs(2, 4, 2, 33, 47, 64, torch.float16, device=device)
    extra, graph = score_features(2, 4, device), dict(backend="eager", fullgraph=True)
    want, lse = flash_fwd(q, k, v, causal=True, return_lse=True, **extra)
    out = torch.full_like(q, torch.nan)
    assert torch.equal(flash_fwd(q, k, v, causal=True, out=out, **extra), want)
    compiled = torch.compile(lambda q: flash_fwd(q, k, v, causal=True, return_lse=True, **extra), **graph)
    assert all(map(torch.equal, compiled(q), (want, lse)))
    compiled = torch.compile(lambda q: flash_fwd(q, k, v, causal=True, out=out.zero_(), **extra), **graph)
    assert torch.equal(compiled(q), want)
    how = (None, None, extra["softcap"], extra["alibi_slopes"], extra["sinks"])
    operator = torch.ops.cute_attn.flash_fwd
    assert torch.equal(operator(q, k, v, True, None, "bhsd", True, False, *how)[0], want)
    torch.library.opcheck(operator.default, (q, k, v, True, None, "bhsd", True, False, *how))
    if device == "cpu":
        arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in extra.items()}
        o = flash_fwd(*(x.numpy() for x in (q, k, v)), causal=True, **arrays)
        assert np.array_equal(o, want.numpy())


@pytest.mark.gpu
def test_new_values_compile_nothing(monkeypatch):
    q, k, v = inputs(2, 4, 2, 100, 100, 64)
    flash_fwd(q, k, v, **score_features(2, 4, "cuda"))
    monkeypatch.setattr(compile, "compile", None)
    for per_batch, cap in ((True, 2.0), (False, 50.0)):
        check(q, k, v, **score_features(2, 4, "cuda", per_batch=per_batch) | dict(softcap=cap))


@given(softcap=st.booleans(), alibi=st.booleans(), sinks=st.booleans(), window=st.booleans(), causal=st.booleans())
def test_the_plan(softcap, alibi, sinks, window, causal):
    key = FeatureKey(window=window, softcap=softcap, alibi=alibi, sinks=sinks)
    config = plan.plan(Problem(1, 1, 1, 512, 512, 64, causal=causal and not window, features=key))
    assert config.score.name == "softcap" * softcap + "alibi" * alibi
    assert config.sinks == sinks and config.mask.windowed == window
    assert len(config.divide(range(9)).score) == softcap + 2 * alibi


def test_the_kernel_says_what_it_takes():
    for key in (FeatureKey(softcap=True), FeatureKey(alibi=True), FeatureKey(sinks=True)):
        config = plan.with_features(plan.config(64, "bf16", "bhsd", True), key)
        report = inspect.report(config)
        assert not report.problems()
        assert report.name.split("_causal_")[1].startswith(config.score.name or "sinks")
    exact = plan.constant_time(plan.with_features(plan.config(64, "bf16", "bhsd", True), FeatureKey(softcap=True)))
    assert exact.score.exact and not inspect.report(exact).problems()


def test_a_symbolic_softcap_is_left_to_the_call():
    assert softcap(None) is None and softcap(30) == 30.0


@pytest.mark.machine_code
@pytest.mark.parametrize(
    "head_dim", [pytest.param(d, marks=() if d == 128 else pytest.mark.nightly) for d in plan.HEAD_DIMS]
)
def test_a_window_s_softcap_does_not_spill(head_dim):
    for dtype in ("bf16", "fp16"):
        config = plan.with_features(plan.config(head_dim, dtype, "bhsd", True), FeatureKey(window=True, softcap=True))
        assert inspect.report(config).problems() == []
