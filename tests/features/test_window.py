"""flash_fwd(..., window=(left, right)): right, whatever the window; and its work is the window's."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from cute_attn import (
    backward,
    call,
    checks,
    compile,
    device,
    flash_fwd,
    operands,
    plan,
    reference,
    request,
    warmup,
)
from cute_attn.features.window import UNBOUNDED
from cute_attn.features.window import window as bounded
from tests.support.attention import DTYPES, EDGES, bound, check, gradient_bound, inputs, sdpa, visible

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SIDES = (None, 0, 1, 2, 5, 8, 30, 2**40)
SIZES = [(1, 1), (5, 9), (9, 5), (7, 7), (1, 12), (12, 1), (20, 3)]
HEAD_DIMS = (40, 64, 96, 128, 160, 192, 224, 256)
WINDOWS = [(0, 0), (1, 0), (17, 5), (63, 64), (64, 0), (100, 0), (256, 0), (300, 100)]
WINDOWS += [(None, 7), (5, None), (1000, None), (0, 2000)]
OP, OP_OUT, OP_BWD = torch.ops.cute_attn.flash_fwd, torch.ops.cute_attn.flash_fwd_out, torch.ops.cute_attn.flash_bwd
pytestmark = pytest.mark.usefixtures("one_thread")


def sees(i, j, seqlen_q, seqlen_k, causal, window):
    left, right = window
    place = i + seqlen_k - seqlen_q
    return (left is None or j >= place - left) and (right is None or j <= place + right) and not (causal and j > place)


def brute_force(seqlen_q, seqlen_k, causal, window):
    pairs = [[sees(i, j, seqlen_q, seqlen_k, causal, window) for j in range(seqlen_k)] for i in range(seqlen_q)]
    return torch.tensor(pairs).reshape(seqlen_q, seqlen_k)


def asked():
    """(causal, window): all that are allowed."""
    return [
        (causal, (left, right))
        for causal, left, right in product((False, True), SIDES, SIDES)
        if not causal or not right
    ]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_the_reference_against_brute_force(seqlen_q, seqlen_k, monkeypatch):
    """Values and lse, in chunks of a few rows; and the mask that torch gets in other tests."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 3 * 8 * seqlen_k)
    q, k, v = (x.double() for x in inputs(1, 2, 1, seqlen_q, seqlen_k, 8, device="cpu"))
    for causal, window in asked():
        mask = brute_force(seqlen_q, seqlen_k, causal, window)
        assert torch.equal(visible(seqlen_q, seqlen_k, causal, "cpu", window), mask)
        o, lse = reference.attention(q, k, v, causal=causal, window=window)
        scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(o, scores.softmax(-1).nan_to_num() @ v)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_on_the_cpu(seqlen_q, seqlen_k):
    q, k, v = inputs(2, 4, 2, seqlen_q, seqlen_k, 16, device="cpu")
    for causal, window in asked():
        check(q, k, v, causal=causal, window=window)
    check(*(x.transpose(1, 2) for x in (q, k, v)), window=(3, 2), layout="bshd", scale=-0.3)


def test_normalised():
    """None and (None, None) are no window, (None, 0) is causal; what comes out may go in again."""
    assert bounded(None, True) == (True, None)
    for causal, window in asked():
        plain, bounds = got = bounded(window, causal)
        assert bounded(bounds, plain) == got and type(plain) is bool
        left, right = (window[0], 0) if causal else window
        if left is None and right in (None, 0):
            assert got == (right == 0, None)
        else:
            assert plain is False
            assert bounds == tuple(UNBOUNDED if x is None else min(x, UNBOUNDED) for x in (left, right))
    assert bounded([4, None], False) == (False, (4, UNBOUNDED))


PAIR = r"a pair \(left, right\) is needed, each a number of keys, or None for no bound"
WRONG = {
    "an int": (256, False, TypeError, f"window: 256 came; {PAIR}"),
    "a bool": (True, False, TypeError, "window: True came"),
    "text": ("ab", False, TypeError, "window: 'ab' came"),
    "one": ((3,), False, ValueError, rf"window: \(3,\) has 1 of them; {PAIR}"),
    "three": ((1, 2, 3), False, ValueError, "has 3 of them"),
    "none of them": ((), False, ValueError, "has 0 of them"),
    "-1": ((-1, 0), False, ValueError, "window: left -1 is below 0; use a number of keys, or None for no bound"),
    "-1, right": ((3, -1), False, ValueError, "window: right -1 is below 0"),
    "-1, right, causal": ((3, -1), True, ValueError, "window: right -1 is below 0"),
    "bool inside": ((True, 0), False, TypeError, "window: left True came; an int of at least 0 is needed, or None"),
    "float": ((3, 1.0), False, TypeError, "window: right 1.0 came"),
    "infinity": ((float("inf"), 0), False, TypeError, "window: left inf came"),
    "numpys bool": ((np.bool_(True), 0), False, TypeError, "window: left .*True.* came; an int"),
    "numpys float": ((np.float64(3), 0), False, TypeError, "window: left .*3.* came; an int"),
    "causal": (
        (3, 1),
        True,
        ValueError,
        "window: right 1 came with causal=True, which hides later keys; use None or 0",
    ),
    "causal, no left": ((None, 1), True, ValueError, "window: right 1 came with causal=True"),
    "causal type": ((3, 0), 1, TypeError, "causal: a bool is needed, 1 came"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_windows(case):
    """Eagerly, with gradients, from NumPy and in a compiled function."""
    window, causal, error, words = WRONG[case]
    q, k, v = inputs(1, 1, 1, 8, 8, 16, torch.float16, device="cpu")
    call = torch.compile(lambda q, k, v: flash_fwd(q, k, v, causal=causal, window=window), backend="eager")
    for one in (q, q.clone().requires_grad_(), q.numpy()):
        others = (k.numpy(), v.numpy()) if isinstance(one, np.ndarray) else (k, v)
        with pytest.raises(error, match=words):
            flash_fwd(one, *others, causal=causal, window=window)
    with pytest.raises(error, match=words):
        call(q, k, v)


def test_warmup_takes_only_bools():
    with pytest.raises(TypeError, match="window: a bool is needed, 3 came"):
        warmup(64, window=3)


def test_warmup(monkeypatch):
    """One kernel serves every window, with causal and without; it is compiled where it is asked for."""
    compiled = []
    monkeypatch.setattr(compile, "get", compiled.append)
    how = dict(dtype="bf16", layout="bhsd")
    for constant_time in (False, True):
        ready = warmup(64, window=True, constant_time=constant_time, **how)
        assert [(c.mask.name, c.constant_time) for c in ready] == [("window", constant_time)]
    assert {c.mask.name for c in warmup(64, **how)} == {"full", "causal"}
    assert {c.mask.name for c in warmup(64, window=(False, True), **how)} == {"full", "causal", "window"}
    assert compiled[0].mask.windowed


def test_the_problem_says_only_that_there_is_a_window():
    k = checks.Spec(torch.Size((1, 1, 8, 64)), (512, 512, 64, 1), torch.bfloat16, torch.device("cpu"))
    assert not checks.problem(k, k, k, False, "bhsd").features.window
    assert checks.problem(k, k, k, False, "bhsd", features=plan.FeatureKey(window=True)).features.window
    for causal in (False, True):
        problem = checks.warmup_problem(64, "bf16", "bhsd", causal, False, True)
        assert problem.features.window and not problem.causal


def test_every_way_in_passes_it_on(monkeypatch):
    """Eager, differentiated, compiled, by the operators, and from NumPy; constant_time beside it."""
    problems = []
    monkeypatch.setattr(operands, "plan", lambda problem, gpu=None: problems.append(problem) or plan.plan(problem))
    q, k, v = inputs(1, 2, 2, 33, 47, 64, torch.float16, device="cpu")
    want = reference.attention(q, k, v, window=(5, 3))[0].half()
    out, how = torch.empty_like(q), dict(window=(5, 3), constant_time=True)
    learns = q.detach().requires_grad_()
    graph = dict(backend="eager", fullgraph=True)
    for o in (
        flash_fwd(q, k, v, **how),
        flash_fwd(q, k, v, out=out, **how),
        flash_fwd(learns, k, v, **how).detach(),
        torch.compile(lambda q: flash_fwd(q, k, v, **how), **graph)(q),
        torch.compile(lambda q: flash_fwd(q, k, v, out=out.zero_(), **how), **graph)(q),
        OP(q, k, v, False, None, "bhsd", True, True, 5, 3)[0],
        torch.from_numpy(flash_fwd(*(x.numpy() for x in (q, k, v)), **how)),
    ):
        torch.testing.assert_close(o, want, atol=2e-3, rtol=2e-3)
    assert len(problems) >= 7 and all(p.features.window and p.constant_time and not p.causal for p in problems)


def test_a_call_is_known_whatever_its_window(monkeypatch):
    """Its sides reach the kernel behind num_sms; only whether there is a window is part of the key."""
    launched, prepared = [], []
    gpu = SimpleNamespace(index=0, num_sms=132, counters=lambda each: each)

    def made(asked):
        problem, *_ = asked.planned()
        prepared.append((problem.causal, problem.features))
        return call.Call(problem, 0.125, gpu, lambda *args: launched.append(args), 0, True, (0,) * 4, None)

    monkeypatch.setattr(device, "current", lambda: 0)
    monkeypatch.setattr(request.Request, "made", made)
    monkeypatch.setattr(call, "known", {})
    q, k, v = inputs(1, 2, 2, 33, 47, 64, device="cpu")
    for window in ((5, 3), (100, 0), (None, 7), (0, None)):
        flash_fwd(q, k, v, window=window)
        flash_fwd(q, k, v, window=window, causal=window[1] == 0)
    flash_fwd(q, k, v)
    flash_fwd(q, k, v, window=(None, None))
    flash_fwd(q, k, v, causal=True)
    flash_fwd(q, k, v, window=(None, 0))
    windowed, none = plan.FeatureKey(window=True), plan.FeatureKey()
    assert prepared == [(False, windowed), (False, none), (True, none)]
    assert [args[7:] for args in launched[:8:2]] == [
        (132, 5, 3),
        (132, 100, 0),
        (132, UNBOUNDED, 7),
        (132, 0, UNBOUNDED),
    ]
    assert launched[3][7:] == (132, 100, 0)
    assert all(len(args) == 8 for args in launched[8:])


def test_a_new_window_plans_nothing():
    q, k, v = inputs(1, 2, 2, 33, 47, 64, device="cpu")
    flash_fwd(q, k, v, window=(5, 3))
    before = plan.plan.cache_info().misses
    for causal, window in asked():
        flash_fwd(q, k, v, causal=causal, window=window)
    assert plan.plan.cache_info().misses <= before + 2, "at most full and causal"


@DEVICES
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(device, layout):
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device, layout=layout)
    for sides in ((7, 3), (None, 5), (9, None)):
        torch.library.opcheck(OP.default, (q, k, v, False, None, layout, True, False, *sides))
        torch.library.opcheck(OP_OUT.default, (q, k, v, torch.empty_like(q), False, 0.3, layout, True, False, *sides))
        o, lse = OP(q, k, v, False, None, layout, True, False, *sides)
        torch.library.opcheck(OP_BWD.default, (torch.ones_like(o), q, k, v, o, lse, False, None, layout, *sides))
    learns = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OP.default, (*learns, True, None, layout, True, False, 7, None))


@DEVICES
def test_one_graph_for_every_size_and_window(device):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def model(q, k, v, left, right):
        return flash_fwd(q * 2, k, v, window=(left, right), return_lse=True)

    for seqlen, left, right in ((40, 2, 3), (333, 50, 7), (7, 1000, 2000)):
        q, k, v = inputs(2, 4, 2, seqlen, seqlen + 11, 64, device=device)
        want = flash_fwd(q * 2, k, v, window=(left, right), return_lse=True)
        assert all(map(torch.equal, model(q, k, v, left, right), want))
    assert counter.frame_count == 1


@DEVICES
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_compiled_gradients(backend, device):
    step = torch.compile(
        lambda *x: flash_fwd(*x, causal=True, window=(9, None)).sum(), fullgraph=True, dynamic=True, backend=backend
    )
    for seqlens in ((40, 40), (50, 60), (60, 30)):
        qkv = [x.requires_grad_() for x in inputs(2, 4, 2, *seqlens, 64, device=device)]
        want = torch.autograd.grad(flash_fwd(*qkv, causal=True, window=(9, None)).sum(), qkv)
        for dx, other in zip(torch.autograd.grad(step(*qkv), qkv), want, strict=True):
            torch.testing.assert_close(dx, other, atol=1e-3, rtol=0.02)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_fwd(q, k, v, window=(9, 4))

    q, k, v = inputs(2, 4, 2, 40, 40, 64, device="cpu")
    size = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("seqlen", min=2)}
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=(size, size, size))
    assert [str(n.target) for n in program.graph.nodes].count("cute_attn.attention.default") == 1
    q, k, v = inputs(3, 4, 2, 77, 77, 64, device="cpu")
    assert torch.equal(program.module()(q, k, v), flash_fwd(q, k, v, window=(9, 4)))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_the_references_gradients_are_autograds(seqlen_q, seqlen_k, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 3 * 8 * seqlen_k)
    grad, q = torch.randn(2, 1, 4, seqlen_q, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, seqlen_k, 8, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for causal, window in asked():
        mask = brute_force(seqlen_q, seqlen_k, causal, window)
        seen = mask.any(1)
        full = [x.repeat_interleave(2, dim=1) for x in (k, v)]
        o = F.scaled_dot_product_attention(q[:, :, seen], *full, attn_mask=mask[seen])
        want = torch.autograd.grad(o, leaves, grad[:, :, seen])
        with torch.no_grad():
            got = reference.gradients(grad, q, k, v, causal=causal, window=window)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)


def fa2(seqlen_q, seqlen_k, causal, left, right):
    """The pairs that FlashAttention-2's backward takes for visible (torch's flash_api.cpp, mha_bwd)."""
    left = -1 if left is None or left >= seqlen_k else left
    right = -1 if right is None or right >= seqlen_k else right
    right = 0 if causal else right
    if left < 0 and right < 0:
        return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    left, right = (seqlen_k if x < 0 else x for x in (left, right))
    return brute_force(seqlen_q, seqlen_k, False, (left, right))


def test_the_backwards_calls_together_are_the_window():
    for (seqlen_q, seqlen_k), (causal, window) in product([*SIZES, (30, 8), (31, 30)], asked()):
        _, bounds = bounded(window, causal)
        if bounds is not None:
            found = [
                fa2(len(range(seqlen_q)[rows]), seqlen_k, *how)
                for rows, *how in backward._parts(seqlen_q, seqlen_k, *bounds)
            ]
            assert torch.equal(torch.cat(found), brute_force(seqlen_q, seqlen_k, causal, window))


@pytest.mark.parametrize(
    ("window", "times"), [(None, 1), ((None, None), 1), ((None, 0), 1), ((3, 0), 0), ((None, 3), 0)]
)
def test_no_windows_gradients_are_cudnns(window, times, monkeypatch):
    """It is asked only where nothing but causality is left of a window."""
    calls = []
    monkeypatch.setattr(backward, "cudnn_serves", lambda *_: calls.append(None))
    qkv = [x.requires_grad_() for x in inputs(1, 2, 1, 8, 8, 16, device="cpu")]
    flash_fwd(*qkv, window=window).sum().backward()
    OP(*qkv, False, None, "bhsd", True, False, *(window or ()))[0].sum().backward()
    assert len(calls) == 2 * times


def check_gradients(*shape, window, causal=False, layout="bhsd", scale=None, dtype=torch.bfloat16, device="cuda"):
    qkv = [x.requires_grad_() for x in inputs(*shape, dtype, device, layout)]
    o = flash_fwd(*qkv, causal=causal, window=window, scale=scale, layout=layout)
    grad = torch.randn_like(o)
    ours = torch.autograd.grad(o, qkv, grad)
    if layout == "bshd":
        *qkv, grad = (x.detach().transpose(1, 2).requires_grad_() for x in (*qkv, grad))
        ours = [dx.transpose(1, 2) for dx in ours]
    with torch.no_grad():
        wants = reference.gradients(grad, *qkv, causal=causal, window=window, scale=scale)
    q, k, v = qkv
    seen = visible(q.shape[2], k.shape[2], causal, device, window).any(1)
    full = [x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)]
    mask = visible(q.shape[2], k.shape[2], causal, device, window)[seen]
    theirs = F.scaled_dot_product_attention(q[:, :, seen], *full, attn_mask=mask, scale=scale)
    for dx, want, other in zip(ours, wants, torch.autograd.grad(theirs, qkv, grad[:, :, seen]), strict=True):
        gradient_bound(dx, want, other)


@DEVICES
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("seqlens", [(128, 128), (113, 203), (203, 113), (1, 70), (300, 90)])
def test_gradients(seqlens, layout, device):
    for dtype in DTYPES:
        for window in ((0, 0), (17, 5), (50, 0), (None, 7), (5, None), (40, 120), (100, 250)):
            check_gradients(2, 4, 2, *seqlens, 64, window=window, layout=layout, dtype=dtype, device=device)
    check_gradients(2, 4, 2, *seqlens, 64, window=(50, None), causal=True, layout=layout, device=device)
    check_gradients(2, 4, 2, *seqlens, 64, window=(50, 3), scale=-0.3, layout=layout, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 128, 160, 192, 224, 256])
def test_gradients_of_every_head_dim(head_dim):
    for seqlens in ((1000, 1000), (1023, 1536), (1500, 600)):
        for window in ((100, 0), (300, 100), (64, None), (None, 700)):
            check_gradients(1, 4, 2, *seqlens, head_dim, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_right(window, head_dim, dtype):
    for seqlens in [*EDGES, (2000, 2000), (1500, 3000), (3000, 1500)]:
        check(*inputs(1, 4, 2, *seqlens, head_dim, dtype), window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (4, 4), (8, 2), (8, 1), (6, 3)])
def test_heads_layouts_and_scales(heads, heads_kv, layout, head_dim):
    for window, scale in product(((17, 5), (300, 0), (0, 200), (70, None)), (None, 0.0, -0.3)):
        for seqlens in ((300, 300), (77, 333), (1025, 1023)):
            check(
                *inputs(3, heads, heads_kv, *seqlens, head_dim, layout=layout),
                window=window,
                scale=scale,
                layout=layout,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_constant_time(head_dim):
    for dtype, window in product(DTYPES, ((0, 0), (17, 5), (256, 0), (300, 100), (5, None), (None, 7))):
        for seqlens in [*EDGES, (2000, 2000)]:
            check(*inputs(1, 4, 2, *seqlens, head_dim, dtype), window=window, constant_time=True)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_with_causal(head_dim):
    for seqlens, left in product([*EDGES, (2000, 2000)], (0, 1, 63, 100, 700)):
        q, k, v = inputs(1, 4, 2, *seqlens, head_dim)
        o, lse = check(q, k, v, causal=True, window=(left, None))
        again, lse_again = check(q, k, v, window=(left, 0))
        assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_tiles_for_each_cta(head_dim):
    """Persistent CTAs reuse their buffers and barriers, and their tiles differ in how many blocks they take."""
    for window in ((100, 0), (700, 300), (None, 64), (64, None)):
        check(*inputs(4, 16, 4, 1500, 1800, head_dim), window=window)
    check(*inputs(1, 2, 1, 8192 + 64, 8192 + 7, head_dim), window=(1000, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seqlens", [(2000, 2000), (700, 1500), (1500, 700), (129, 127)])
def test_a_window_over_everything_is_none(seqlens, head_dim):
    """To one ulp: blocks come in the same order, but may be of other sizes."""
    q, k, v = inputs(2, 4, 2, *seqlens, head_dim)
    for causal, windows in ((False, ((4000, 4000), (4000, None), (2**40, 2**40))), (True, ((4000, 0), (4000, None)))):
        want, want_lse = flash_fwd(q, k, v, causal=causal, return_lse=True)
        for window in windows:
            o, lse = flash_fwd(q, k, v, causal=causal, window=window, return_lse=True)
            torch.testing.assert_close(o, want, rtol=2**-7, atol=2**-8 * want.abs().max().item())
            torch.testing.assert_close(lse, want_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 160, 256])
def test_maxima_that_grow_or_shrink_along_the_keys(head_dim, dtype):
    """Each block's scores exceed the last's or fall below them, within the window and past its edges."""
    for log2_step, flip, window in product(
        (0.7, 7.9, 17.0, 33.0, 144.0, 1000.0), (False, True), ((300, 0), (700, 100), (64, None), (None, 64), (5, 5))
    ):
        q, k, v = inputs(1, 2, 2, 1024, 2048, head_dim, dtype)
        steps = torch.arange(2048, device="cuda") // 128 * (log2_step / 1.4427)
        q[..., 0] = 1.0
        k[..., 0] = (steps.flip(0) if flip else steps).to(dtype)
        o, lse = flash_fwd(q, k, v, window=window, scale=1.0, return_lse=True)
        want, want_lse = reference.attention(q, k, v, window=window, scale=1.0)
        bound(o, want, sdpa(q, k, v, False, 1.0, window))
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("constant_time", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_that_see_nothing(head_dim, constant_time):
    for (seqlen_q, seqlen_k), (left, right) in product(
        ((333, 77), (512, 1), (700, 64), (130, 129), (64, 0)), ((5, 0), (100, 30), (None, 3), (0, 0), (20, 500))
    ):
        q, k, v = inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim)
        o, lse = flash_fwd(q, k, v, window=(left, right), return_lse=True, constant_time=constant_time)
        blind = seqlen_q if seqlen_k == 0 else min(max(seqlen_q - seqlen_k - right, 0), seqlen_q)
        assert (o[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -torch.inf).all()
        assert lse[:, :, blind:].isfinite().all()
        if seqlen_k:
            check(q, k, v, window=(left, right), constant_time=constant_time)
            v.fill_(torch.nan)
            o = flash_fwd(q, k, v, window=(left, right), constant_time=constant_time)
            assert (o[:, :, :blind] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_before_every_window_are_not_read(head_dim):
    """NaN in the blocks of K and V that no query's window reaches: the result is as without."""
    for seqlen_q, window, poisoned in ((64, (100, 0), 3000), (64, (0, 0), 3700), (1024, (300, 64), 2500)):
        q, k, v = inputs(1, 4, 2, seqlen_q, 4096, head_dim)
        want = flash_fwd(q, k, v, window=window, return_lse=True)
        k[:, :, :poisoned], v[:, :, :poisoned] = torch.nan, torch.nan
        got = flash_fwd(q, k, v, window=window, return_lse=True)
        assert all(map(torch.equal, got, want))


@pytest.mark.gpu
def test_hidden_nan_in_k_reaches_no_row_that_does_not_see_it():
    q, k, v = inputs(1, 2, 2, 400, 400, 128)
    for window, key in product(((30, 10), (100, None), (None, 50)), (7, 201, 390)):
        sees_key, kept = visible(400, 400, False, "cuda", window)[:, key], k[:, :, key].clone()
        k[:, :, key] = torch.nan
        o, lse = flash_fwd(q, k, v, window=window, return_lse=True)
        k[:, :, key] = kept
        assert o[:, :, sees_key].isnan().all() and o[:, :, ~sees_key].isfinite().all()
        assert (lse.isnan() == sees_key).all()


@pytest.mark.gpu
def test_a_new_window_reuses_the_compiled_kernel(monkeypatch):
    got, planned = [], []
    get = compile.get
    monkeypatch.setattr(compile, "get", lambda config: got.append(config) or get(config))
    monkeypatch.setattr(operands, "plan", lambda *args: planned.append(args) or plan.plan(*args))
    monkeypatch.setattr(call, "known", {})
    q, k, v = inputs(1, 2, 2, 300, 400, 64)
    for window in ((5, 3), (100, 0), (None, 7), (0, None), (2000, 2000)):
        check(q, k, v, window=window)
    assert len(planned) == len(got) == 1
    for seqlen in (100, 500):
        check(*inputs(1, 2, 2, seqlen, seqlen, 64), window=(9, 9))
    assert len(set(got)) == 1


@pytest.mark.gpu
def test_run_to_run_bitwise_equal():
    for head_dim in (64, 128, 256):
        q, k, v = inputs(2, 8, 2, 1111, 1234, head_dim)
        first = flash_fwd(q, k, v, window=(200, 30), return_lse=True)
        for _ in range(10):
            assert all(map(torch.equal, first, flash_fwd(q, k, v, window=(200, 30), return_lse=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_work_scales_with_the_window(head_dim):
    """A window of 256 keys of 16,384: of causal's work a thirty-second, and well below a quarter of its time."""
    q, k, v = inputs(1, 16, 16, 16_384, 16_384, head_dim)

    def seconds(**how):
        times = []
        for _ in range(8):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            flash_fwd(q, k, v, **how)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times[2:])[3]

    assert seconds(window=(256, 0)) < seconds(causal=True) / 4
