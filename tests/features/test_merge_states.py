"""merge_states: the kernels on every type, layout and number of states; the CPU; gradients; tracers; errors."""

from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cute_attn import device, flash_fwd, flash_fwd_varlen, merge_states, reference
from cute_attn.kernels.merge_sm90 import STATES_AT_ONCE, STATES_MAX, MergeConfig
from cute_attn.states import LAYOUTS, States
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.attention import DTYPES, inputs
from tests.support.requirements import interpreter

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (*DTYPES, torch.float32)
ULPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
INF, NAN = torch.inf, torch.nan
OP, OP_OUT = torch.ops.cute_attn.merge_states, torch.ops.cute_attn.merge_states_out


def states(k=2, layout="bhsd", dtype=torch.bfloat16, sizes=(2, 3, 7), d=64, device="cpu"):
    """o and lse of k states of (B, H, S); packed sequences have S rows in all."""
    size = dict(zip("bhs", sizes, strict=True), t=sizes[2], d=d)
    o = [torch.randn([size[x] for x in layout], device=device).to(dtype) for _ in range(k)]
    rows = [size[x] for x in ("ht" if layout == "thd" else "bhs")]
    return o, [3 * torch.randn(rows, device=device) for _ in range(k)]


def by_definition(o, lse, layout="bhsd", base2=False):
    """In float64, with nothing of the reference's: each state by its exp(lse) beside the largest."""
    lse = torch.stack(list(lse)).double() * (np.log(2) if base2 else 1)
    lse = torch.where(lse == INF, -INF, lse)
    top = lse.amax(0).clamp(min=-1e300)
    weights = (lse - top).exp()
    total = weights.sum(0)
    weights = torch.where(weights == 0, weights, weights / total)
    beside = weights if layout == "bhsd" else weights.transpose(-1, -2)
    parts = [torch.where(w[..., None] == 0, 0, w[..., None] * x.double()) for w, x in zip(beside, o, strict=True)]
    return sum(parts), (top + total.log()).clamp(min=-INF) / (np.log(2) if base2 else 1)


def check(o, lse, found=None, **how):
    """merge_states, or what it has found, against float64: o within a rounding, lse within a few of float32's."""
    want, want_lse = by_definition(o, lse, **{name: x for name, x in how.items() if name in ("layout", "base2")})
    got, got_lse = merge_states(o, lse, **how) if found is None else found
    assert got.dtype == o[0].dtype and got_lse.dtype == torch.float32
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got_lse.isnan(), want_lse.isnan())
    largest = want.nan_to_num().abs().max() if want.numel() else 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=ULPS[o[0].dtype] * largest + 1e-6, equal_nan=True)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-6, atol=2e-6, equal_nan=True)
    return got, got_lse


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("k", [1, 2, 3, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16", "fp32"])
def test_interpreted(dtype, layout, k):
    with interpreted() as asked:
        check(*states(k, layout, dtype), layout=layout)
        check(*map(torch.stack, states(k, layout, dtype)), layout=layout)
    word = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    assert set(asked) == {MergeConfig(word, layout, k if k <= STATES_MAX else 0)}


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("d", [8, 40, 72, 264, 512])
def test_interpreted_head_dims(d):
    """One vector, an odd number of them, and rows of which a CTA has few; more rows than one CTA has."""
    with interpreted():
        check(*states(2, d=d, sizes=(1, 2, 33)))
        check(*states(9, d=d, sizes=(1, 2, 5)))
    if d == 8:
        with interpreted():
            check(*states(2, d=4, dtype=torch.float32, sizes=(2, 5, 41)))


def strided(layout, k=2, d=64, device="cpu", sizes=(2, 3, 5)):
    """Two states that lie in different ways, none contiguous, and FlashInfer's lse (n, h)."""
    o, lse = states(k, layout, d=d, device=device, sizes=sizes)
    wide = [torch.full((*x.shape[:-1], d + 24), NAN, dtype=x.dtype, device=device) for x in o]
    o = [w[..., 8 : d + 8].copy_(x) for w, x in zip(wide, o, strict=True)]
    o[1] = o[1].transpose(0, 1).contiguous().transpose(0, 1)
    return o, [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in lse]


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpreted_strides(layout):
    with interpreted():
        o, lse = strided(layout)
        assert not any(x.is_contiguous() for x in (*o, *lse))
        check(o, lse, layout=layout)
        check([o[0], o[0][:1].expand(o[0].shape)], lse, layout=layout)
        out, out_lse = strided(layout)
        found = check(o, lse, layout=layout, out=out[1], out_lse=out_lse[1])
        assert found[0] is out[1] and found[1] is out_lse[1]
        many = [torch.stack(x).transpose(0, 1).contiguous().transpose(0, 1) for x in states(9, layout)]
        check(*many, layout=layout)


def with_empty_ones(device="cpu", **how):
    """Rows of which a state has no keys, by either sign, with NaN for o, or no state has; and one with NaN for lse."""
    o, lse = states(3, sizes=(1, 2, 6), device=device, **how)
    lse[0][0, 0, :3], lse[1][0, 0, 1:4], lse[2][0, 0, 2], lse[2][0, 1, 0] = -INF, INF, -INF, NAN
    for x, y in zip(o, lse, strict=True):
        x[y.isinf()] = NAN
    return o, lse


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16", "fp32"])
def test_interpreted_empty_states(dtype):
    """The same rows of eight states and of more."""
    o, lse = with_empty_ones(dtype=dtype)
    with interpreted():
        for k in (1, 3):
            got, got_lse = check(o * k, lse * k)
            assert (got[0, 0, 2] == 0).all() and got_lse[0, 0, 2] == -INF, "no state has keys"
            assert got[0, 1, 0].isnan().all() and got_lse[0, 1, 0].isnan()
            assert got.isnan().sum() == got.shape[-1] and got_lse.isnan().sum() == 1


def of_any_size(device="cpu"):
    """lse as large as a float32 is, and 0."""
    o, lse = states(2, sizes=(1, 2, 6), device=device)
    lse[0][0, 0] = torch.tensor([1e30, -1e30, 3.4e38, -3.4e38, 1e30, 0.0])
    lse[1][0, 0] = torch.tensor([1e30, -1e30, -3.4e38, -3.4e38, 5.0, -INF])
    return o, lse


@interpreter
@pytest.mark.machine_code
def test_interpreted_lse_of_any_size():
    o, lse = of_any_size()
    with interpreted():
        got, got_lse = check(o, lse)
        assert got.isfinite().all() and got_lse.isfinite().all()
        check(o * 5, lse * 5)


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("k", [2, 9])
def test_interpreted_base_2(k):
    o, lse = states(k)
    with interpreted():
        got, got_lse = check(o, lse, base2=True)
        natural, natural_lse = merge_states(o, [x * np.log(2) for x in lse])
    torch.testing.assert_close(got, natural, rtol=0, atol=0.02)
    torch.testing.assert_close(got_lse * np.log(2), natural_lse)


def in_place(o, lse, which, **how):
    """The one state is replaced by what all become, the others stay."""
    want, want_lse = merge_states(o, lse, **how)
    kept = [x.clone() for x in (*o, *lse)]
    found = merge_states(o, lse, out=o[which], out_lse=lse[which], **how)
    assert found[0].data_ptr() == o[which].data_ptr() and found[1].data_ptr() == lse[which].data_ptr()
    assert torch.equal(o[which], want) and torch.equal(lse[which], want_lse)
    for i, (x, y) in enumerate(zip((*o, *lse), kept, strict=True)):
        assert torch.equal(x, y) or i in (which, which + len(o))


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("k", "which"), [(2, 0), (2, 1), (10, 4)])
def test_interpreted_in_place(k, which):
    with interpreted():
        in_place(*states(k, d=40), which)  # of its five vectors one thread has one
        in_place(*(list(torch.stack(x)) for x in states(k)), which)
        in_place(*map(torch.stack, states(k)), which)
        in_place(*states(k, "thd"), which, layout="thd")


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 512), (torch.bfloat16, 264)], ids=["two warps", "parts"])
def test_interpreted_in_any_order_of_warps(dtype, d, k):
    """In place, where several warps have parts of a row: none writes what another one has still to read."""
    for seed in range(3):
        with interpreted(seed=seed):
            in_place(*map(torch.stack, states(k, dtype=dtype, d=d, sizes=(1, 2, 15))), 0)


@interpreter
@pytest.mark.machine_code
def test_interpreted_attention_over_both_halves():
    """The whole way: two of our kernels, and the merge."""
    q, k, v = inputs(1, 2, 1, 40, 150, 64, device="cpu")
    with interpreted():
        parts = [flash_fwd(q, k[:, :, rows], v[:, :, rows], return_lse=True) for rows in HALVES]
        o, lse = merge_states(*zip(*parts, strict=True))
    want, want_lse = reference.attention(q, k, v)
    assert (o - want).abs().max() < 0.02
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-5)


HALVES = slice(0, 63), slice(63, None)


def test_only_what_lies_at_equal_distances_is_read_in_place():
    """Of more states than have an address each."""
    stack = torch.randn(10, 3, 8)
    given = States("o", stack.unbind())
    assert given.stack(4).data_ptr() == stack.data_ptr() and torch.equal(given.stack(4), stack)
    assert given.stack(128).data_ptr() != stack.data_ptr(), "96 bytes"
    for others in (stack.unbind()[::-1], [x.clone() for x in stack], [*stack[:9], stack[8]]):
        found = States("o", others).stack(4)
        assert torch.equal(found, torch.stack(list(others))) and found.data_ptr() != others[0].data_ptr()
    assert torch.equal(States("o", [stack[0]] * 9).stack(4), stack[:1].expand(9, 3, 8))


@pytest.mark.parametrize(("k", "base2"), [*product([1, 2, 9], [False, True])])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu(layout, k, base2):
    for dtype in TYPES:
        o, lse = states(k, layout, dtype, d=40)
        got, got_lse = check(o, lse, layout=layout, base2=base2)
        stacked = merge_states(torch.stack(o), torch.stack(lse), layout=layout, base2=base2)
        assert torch.equal(stacked[0], got) and torch.equal(stacked[1], got_lse)
        if not base2:
            in_place(o, lse, k - 1, layout=layout)


def test_cpu_edges():
    o, lse = with_empty_ones()
    check(o, lse)
    check(*of_any_size())
    check(*strided("bshd"), layout="bshd")
    v, s = torch.randn(7, 3, 4, 64), torch.randn(7, 3, 4)  # FlashInfer's (n, k, h, d) and (n, k, h)
    check(v.transpose(0, 1), s.permute(1, 2, 0), layout="thd", base2=True)
    for sizes in ((0, 3, 7), (2, 0, 7), (2, 3, 0)):
        found = merge_states(*states(sizes=sizes))
        assert found[0].shape == (*sizes, 64) and found[1].shape == sizes


def test_no_rows_launch_nothing():
    with interpreted() as asked:
        found = merge_states(*states(sizes=(2, 3, 0)))
    assert not asked and found[0].shape == (2, 3, 0, 64) and found[1].shape == (2, 3, 0)


def test_the_second_call_is_a_look_up():
    """Of the same shapes, strides and types; others are prepared anew, and checked."""
    launched = []
    kernel = type("Kernel", (), dict(__call__=lambda self, *tensors: launched.append(tensors)))()
    with interpreted(kernel=kernel) as asked:
        for _ in range(3):
            merge_states(*states())
        assert len(asked) == 1 and len(launched) == 3
        o, lse = states()
        merge_states(o, lse, out=o[0])
        merge_states(torch.stack(o), torch.stack(lse))
        assert len(asked) == 3 and len(launched) == 5
        with pytest.raises(ValueError, match="is not o"):
            merge_states([o[0], o[1][:, :, :1]], lse)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_both_halves(causal):
    """Of keys: causal sees the last half alone."""
    q, k, v = inputs(2, 4, 2, 40, 150, 64, torch.float16, "cpu")
    parts = [
        flash_fwd(q, k[:, :, r], v[:, :, r], causal=causal and i > 0, return_lse=True) for i, r in enumerate(HALVES)
    ]
    o, lse = merge_states(*zip(*parts, strict=True))
    want, want_lse = flash_fwd(q, k, v, causal=causal, return_lse=True)
    torch.testing.assert_close(o, want, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, want_lse)


def test_a_cascade_of_packed_sequences():
    """A shared prefix, of which every query sees all, and each sequence's own keys."""
    lengths_q, lengths_k = (
        torch.tensor([0, 5, 5, 12], dtype=torch.int32),
        torch.tensor([0, 6, 9, 16], dtype=torch.int32),
    )
    q, (k, v) = torch.randn(12, 4, 32).bfloat16(), torch.randn(2, 16, 2, 32).bfloat16()
    prefix_k, prefix_v = torch.randn(2, 20, 2, 32).bfloat16()
    whole = lengths_q[[0, -1]], torch.tensor([0, 20], dtype=torch.int32)
    prefix = flash_fwd_varlen(q, prefix_k, prefix_v, *whole, return_lse=True)
    own = flash_fwd_varlen(q, k, v, lengths_q, lengths_k, causal=True, return_lse=True)
    o, lse = merge_states(*zip(prefix, own, strict=True), layout="thd")
    for i in (0, 2):
        a, b = slice(*lengths_q[i : i + 2]), slice(*lengths_k[i : i + 2])
        keys, values = torch.cat([prefix_k, k[b]]), torch.cat([prefix_v, v[b]])
        bhsd = [x[None].transpose(1, 2) for x in (q[a], keys, values)]
        want, want_lse = flash_fwd(*bhsd, causal=True, return_lse=True)
        torch.testing.assert_close(o[a], want[0].transpose(0, 1), rtol=0, atol=0.02)
        torch.testing.assert_close(lse[:, a], want_lse[0], rtol=1e-4, atol=1e-4)


def attention(q, k, v, base2=False):
    """o and lse, both differentiable."""
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1) / (np.log(2) if base2 else 1)


@pytest.mark.parametrize(("layout", "base2"), [*product(LAYOUTS, [False]), ("bhsd", True)])
def test_gradients_as_of_all_keys(layout, base2):
    """Of q, k and v, through three parts, against float64's through one softmax."""
    qkv = [torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (5, 12, 12)]
    grad, grad_lse = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5)
    exact = [x.clone().requires_grad_() for x in qkv]
    wanted = torch.autograd.grad(attention(*exact, base2), exact, (grad.double(), grad_lse.double()))

    def turned(x):  # between (B, H, S, D) and the layout
        return x if layout == "bhsd" else x.transpose(1, 2) if layout == "bshd" else x.flatten(0, 1).transpose(0, 1)

    learns = [x.float().requires_grad_() for x in qkv]
    parts = [attention(learns[0], *(x[:, :, s] for x in learns[1:]), base2) for s in map(slice, (0, 3, 7), (3, 7, 12))]
    o, lse = ([*x] for x in zip(*parts, strict=True))
    if layout == "thd":  # the batch's heads are heads
        lse = [x.flatten(0, 1) for x in lse]
    merged, merged_lse = merge_states([turned(x) for x in o], lse, layout=layout, base2=base2)
    found = torch.autograd.grad((merged, merged_lse), learns, (turned(grad), grad_lse.view(merged_lse.shape)))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_empty_states():
    """0 where a state has no keys, whatever its o; NaN where a lse is NaN."""
    o, lse = ([x.float() for x in y] for y in with_empty_ones())
    for x in (*o, *lse):
        x.requires_grad_()
    grads = torch.autograd.grad(merge_states(o, lse), (*o, *lse), (torch.ones(1, 2, 6, 64), torch.ones(1, 2, 6)))
    for x, dx, dlse in zip(lse, grads[:3], grads[3:], strict=True):
        assert (dx[x.isinf()] == 0).all() and (dlse[x.isinf()] == 0).all()
        usable = torch.ones(1, 2, 6, dtype=torch.bool)
        usable[0, 1, 0] = False
        assert dx[usable].isfinite().all() and dlse[usable].isfinite().all() and dx[0, 1, 0].isnan().all()


def test_gradients_of_one_result_alone_and_of_large_lse():
    o, lse = of_any_size()
    o = [x.float().requires_grad_() for x in o]
    lse = [x.requires_grad_() for x in lse]
    merged, merged_lse = merge_states(o, lse)
    (grad,) = torch.autograd.grad(merged_lse.sum(), lse[:1], retain_graph=True)
    assert grad[0, 0].tolist() == [0.5, 0.5, 1, 0.5, 1, 1]
    (grad,) = torch.autograd.grad(merged.sum(), o[:1])
    assert grad[0, 0, :, 0].tolist() == [0.5, 0.5, 1, 0.5, 1, 1]


def test_a_gradient_that_would_be_wrong_raises():
    """flash_fwd's lse is not differentiable, and o's gradient is not all of a merge's."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 8, 16, 64, device="cpu"))
    parts = [flash_fwd(q, k[:, :, r], v[:, :, r], return_lse=True) for r in (slice(8), slice(8, None))]
    o, lse = zip(*parts, strict=True)
    with pytest.raises(ValueError, match=r"lse\[0\]: does not require grad, but o\[0\] does.*torch.no_grad\(\)"):
        merge_states(o, lse)
    with torch.no_grad():
        assert not merge_states(o, lse)[0].requires_grad
    constant = [x.detach() for x in o[:1]], [x.detach() for x in lse[:1]]
    assert merge_states([*constant[0], o[1]], [*constant[1], lse[1].detach().requires_grad_()])[0].requires_grad
    learning = [[x.detach().requires_grad_() for x in y] for y in (o, lse)]
    for name in ("out", "out_lse"):
        how = {name: torch.empty_like((o if name == "out" else lse)[0])}
        with pytest.raises(ValueError, match=f"^{name}: given with inputs that require grad"):
            merge_states(*learning, **how)
    with pytest.raises(ValueError, match=r"out: requires grad; pass out.detach\(\)"):
        merge_states(*states(), out=torch.empty(2, 3, 7, 64).bfloat16().requires_grad_())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    o, lse = states(3, layout, torch.float32)
    torch.library.opcheck(OP.default, (*([x.requires_grad_() for x in y] for y in (o, lse)), layout, True))
    o, lse = strided(layout)
    torch.library.opcheck(OP.default, (o, lse, layout, False))
    torch.library.opcheck(OP_OUT.default, (o, lse, torch.empty_like(o[0]), torch.empty_like(lse[0]), layout, False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    def model(o, lse, out=None, out_lse=None):
        o, lse = merge_states(o, lse, out=out, out_lse=out_lse)
        return o + 1, lse

    torch._dynamo.reset()  # the function is compiled anew for each backend
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    o, lse = states()
    want = merge_states(o, lse)
    for given in ((o, lse), (torch.stack(o), torch.stack(lse))):
        got = compiled(*given)
        assert torch.equal(got[0], want[0] + 1) and torch.equal(got[1], want[1])
    compiled(o, lse, o[1], lse[1])
    assert torch.equal(o[1], want[0]) and torch.equal(lse[1], want[1])
    o, lse = states()
    want = merge_states(o, lse)
    assert torch.equal(compiled(o, lse, o[0])[1], want[1]) and torch.equal(o[0], want[0])


def test_compile_with_gradients():
    o, lse = ([x.requires_grad_() for x in y] for y in states(3, dtype=torch.float32))
    compiled = torch.compile(merge_states, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(o, lse)[0].sum(), o + lse) for f in (compiled, merge_states)]
    assert all(map(torch.equal, *grads))


def test_tracers():
    (a, b), (c, d) = states()
    want = merge_states([a, b], [c, d])

    class Model(torch.nn.Module):
        def forward(self, a, b, c, d):
            return merge_states([a, b], [c, d])

    for traced in (
        make_fx(Model())(a, b, c, d),
        make_fx(Model(), tracing_mode="symbolic")(a, b, c, d),
        torch.fx.symbolic_trace(Model()),
        torch.export.export(Model(), (a, b, c, d)).module(),
        torch.jit.trace(Model(), (a, b, c, d)),
    ):
        assert "merge_states" in str(traced.graph)
        assert all(map(torch.equal, traced(a, b, c, d), want))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a.float(), b.float())
        with pytest.raises(NotImplementedError, match=r"o\[0\]: a dual tensor"):
            merge_states([dual, b.float()], [c, d])


O, LSE = states()
ERRORS = {
    "o: a torch.Tensor is needed, builtins.dict came": lambda: merge_states({}, LSE),
    r"o\[1\]: a torch.Tensor is needed, builtins.NoneType came": lambda: merge_states([O[0], None], LSE),
    r"o\[0\]: a torch.Tensor is needed, numpy.ndarray came; torch.from_dlpack\(o\[0\]\) shares its memory": lambda: (
        merge_states([np.ones((1, 1, 1, 8), np.float16)], LSE)
    ),
    "lse: a torch.Tensor is needed, numpy.ndarray came": lambda: merge_states(O, np.ones((2, 2, 3, 7), np.float32)),
    "out: a torch.Tensor is needed": lambda: merge_states(O, LSE, out=np.ones(8)),
    "o: no state came; pass at least one": lambda: merge_states([], []),
    "o: no state came; pass at least": lambda: merge_states(O[0][None][:0], LSE[0][None][:0]),
    "o: a tensor without dimensions came": lambda: merge_states(torch.tensor(1.0), LSE),
    "lse: 1 came with 2 of o; pass one for each": lambda: merge_states(O, LSE[:1]),
    r"o\[i\]: 3 dimensions, shape \(3, 7, 64\); 4 are needed: \(B, H, S, D\) .*pass \[o\]": lambda: merge_states(
        O[0], LSE[0]
    ),
    r"o\[0\]: 4 dimensions.*3 are needed: \(total, H, D\)": lambda: merge_states(O, LSE, layout="thd"),
    "layout: 'hsd' is not known; use \"bhsd\"": lambda: merge_states(O, LSE, layout="hsd"),
    "base2: a bool is needed, 2 came": lambda: merge_states(O, LSE, base2=2),
    r"o\[0\]: torch.float64 is not supported; use": lambda: merge_states([x.double() for x in O], LSE),
    r"o\[1\]: torch.float32 does not match o\[0\]'s": lambda: merge_states([O[0], O[1].float()], LSE),
    r"o\[1\]: shape \(2, 3, 6, 64\) is not o\[0\]'s": lambda: merge_states([O[0], O[1][:, :, :6]], LSE),
    r"o\[0\]: head_dim 60 is not supported; use a multiple of 8 .* up to 512": lambda: merge_states(
        [x[..., :60] for x in O], LSE
    ),
    r"o\[0\]: head_dim 62 is not supported; use a multiple of 4 ": lambda: merge_states(
        [x[..., :62].float() for x in O], LSE
    ),
    r"o\[0\]: head_dim 520 ": lambda: merge_states(*states(d=520)),
    r"lse\[1\]: shape \(2, 7, 3\) does not fit.*\(B, H, S\) is needed, \(2, 3, 7\); use lse\[1\].transpose": lambda: (
        merge_states(O, [LSE[0], LSE[1].mT])
    ),
    r"lse\[0\]: torch.float16 is not supported; use torch.float32": lambda: merge_states(O, [x.half() for x in LSE]),
    r"out: shape \(2, 3, 7, 32\) is not o\[0\]'s": lambda: merge_states(O, LSE, out=O[0][..., :32].clone()),
    r"out: torch.float32 does not match o\[0\]'s": lambda: merge_states(O, LSE, out=O[0].float()),
    "out: strides .* more than once": lambda: merge_states(O, LSE, out=O[0][:, :1].clone().expand(O[0].shape)),
    "out_lse: shape": lambda: merge_states(O, LSE, out_lse=torch.empty(2, 3, 6)),
    "out_lse: strides .* more than once": lambda: merge_states(O, LSE, out_lse=torch.empty(1).expand(2, 3, 7)),
    r"o\[0\]: device meta is not supported": lambda: merge_states(
        [x.to("meta") for x in O], [x.to("meta") for x in LSE]
    ),
    r"o\[0\]: a dense tensor is needed, torch.sparse_coo": lambda: merge_states([O[0].to_sparse(), O[1]], LSE),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ERRORS[message]()


def test_errors_of_a_gpu_alone():
    """Strides, addresses and devices, before anything is launched."""
    narrow = torch.zeros(2, 3, 7, 68).bfloat16()[..., :64]
    odd = torch.zeros(2 * 3 * 7 * 64 + 4).bfloat16()[4:].view(2, 3, 7, 64)
    stack = torch.zeros(2, 2 * 3 * 7 * 64 + 4).bfloat16()[:, :-4].unflatten(1, (2, 3, 7, 64))
    with interpreted():
        with pytest.raises(ValueError, match=r"^o\[1\]: stride 68 .*a multiple of 8 elements \(16 bytes\) is needed"):
            merge_states([O[0], narrow], LSE)
        with pytest.raises(ValueError, match=r"^o\[0\]: stride 66 .*a multiple of 4 elements \(16 bytes\) is needed"):
            merge_states([torch.zeros(2, 3, 7, 66)[..., :64]] * 2, LSE)
        with pytest.raises(ValueError, match=r"^o: stride 2692 in dimension 0"):
            merge_states(stack, LSE)
        for given, i in (([odd, O[1]], 0), ([O[0], odd], 1)):
            with pytest.raises(ValueError, match=rf"^o\[{i}\]: its data starts 8 bytes past a multiple of 16"):
                merge_states(given, LSE)
        with pytest.raises(ValueError, match=r"^out: its data starts 8 bytes past"):
            merge_states(O, LSE, out=odd)
        assert (odd == 0).all()


def test_another_gpu_is_named(monkeypatch):
    ampere = SimpleNamespace(major=8, minor=0, name="NVIDIA A100", multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: ampere)
    monkeypatch.setattr(device, "_devices", {})
    own = device.get
    there = pytest.raises(ValueError, match=r"^o: on cuda:0, NVIDIA A100 .*cute_attn.reference.merge_states there")
    with interpreted(), patch.object(device, "get", own), there:  # put back before `interpreted` does
        merge_states(O, LSE)


def test_results_that_share_memory():
    """With an input, not as that input itself, or with each other."""
    rows = torch.zeros(2, 3, 8, 64).bfloat16()
    o, lse = [rows[:, :, :7], O[1]], LSE
    with pytest.raises(ValueError, match=r"^out: shares memory with o\[0\], and is none of its tensors; for out pass"):
        merge_states(o, lse, out=rows[:, :, 1:])
    stack = torch.zeros(3, 2, 3, 7, 64).bfloat16()
    merge_states(stack[:2], torch.stack(LSE), out=stack[2])
    merge_states(stack[:2], torch.stack(LSE), out=stack[1])
    with pytest.raises(ValueError, match=r"^out: shares memory with o, "):
        merge_states(stack[:2], torch.stack(LSE), out=stack.view(-1)[64 : 64 + stack[0].numel()].view(2, 3, 7, 64))
    numbers = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"^out_lse: shares memory with lse\[1\], "):
        merge_states(O, [LSE[0], numbers[..., :7]], out_lse=numbers[..., 1:])
    with pytest.raises(ValueError, match=r"^out_lse: shares memory with out, "):
        merge_states(*states(dtype=torch.float32, sizes=(1, 1, 8)), **in_one_buffer(4))
    merge_states(*states(dtype=torch.float32, sizes=(1, 1, 8)), **in_one_buffer(64))
    bf16 = torch.zeros(8, 68, dtype=torch.bfloat16)
    beside = dict(out=bf16[None, None, :, :64], out_lse=bf16.view(torch.float32)[None, None, :, 33])
    merge_states(*states(sizes=(1, 1, 8)), **beside)
    with pytest.raises(ValueError, match=r"^out_lse: shares memory with out, "):
        merge_states(*states(sizes=(1, 1, 8)), **(beside | dict(out_lse=bf16.view(torch.float32)[None, None, :, 3])))


def in_one_buffer(column):
    """Rows of 64 of o, and lse in a column of them or behind."""
    buffer = torch.zeros(1, 1, 8, 68)
    return dict(out=buffer[..., :64], out_lse=buffer[..., column])


CONFIGS = [MergeConfig(dtype, layout, k) for dtype, layout, k in product(("bf16", "fp32"), LAYOUTS, (0, 1, 2, 8))]


@pytest.mark.machine_code
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_machine_code(config):
    """16 bytes at a time, all of a thread's on their way at once, and no registers in memory."""
    build = inspect.build(config)
    assert inspect.spill_stores(build.log) == 0 and "0 bytes stack frame" in build.log
    kinds = [x.opcode for x in inspect.parse(build.sass)]
    wide = kinds.count("LDG.E.128")
    assert wide == 2 * (config.states or STATES_AT_ONCE) and kinds.count("STG.E.128") == 2
    assert kinds.index("ACQBULK") < kinds.index("LDG.E"), "before global memory is touched"
    assert not {"LDL", "STL", "CALL"} & {kind.split(".")[0] for kind in kinds}
    loads = [i for i, kind in enumerate(kinds) if kind == "LDG.E.128"]
    assert not {"FFMA", "MUFU.EX2"} & set(kinds[loads[0] : loads[-1]])


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16", "fp32"])
def test_gpu(dtype, layout, k):
    for d, sizes in ((64, (3, 5, 999)), (128, (2, 8, 513)), (40, (1, 3, 77)), (512, (1, 2, 130)), (264, (2, 1, 65))):
        o, lse = states(k, layout, dtype, sizes, d, "cuda")
        found = check(o, lse, layout=layout)
        again = merge_states(torch.stack(o), torch.stack(lse), layout=layout)
        assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
        check(o, lse, layout=layout, base2=True)
        in_place(o, lse, k // 2, layout=layout)


@pytest.mark.gpu
def test_gpu_edges():
    for k in (1, 4):
        o, lse = with_empty_ones("cuda")
        check(o * k, lse * k)
        o, lse = of_any_size("cuda")
        check(o * k, lse * k)
    for layout in LAYOUTS:
        check(*strided(layout, device="cuda", sizes=(3, 4, 300)), layout=layout)
    assert merge_states(*states(sizes=(2, 0, 7), device="cuda"))[0].numel() == 0


@pytest.mark.gpu
def test_gpu_beyond_32_bits():
    """Offsets of more than 2^32 bytes, and of as many elements."""
    rows, d = 70_000_000, 64
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs a GPU of 60 GB")
    o = torch.zeros(2, rows, 1, d, dtype=torch.bfloat16, device="cuda")
    lse = torch.zeros(2, 1, rows, device="cuda")
    o[1, -1], o[0, 3], o[1, 67_108_900] = 2, 4, 6
    merged, merged_lse = merge_states(o, lse, layout="thd", out=o[0], out_lse=lse[0])
    assert (merged[-1] == 1).all() and (merged[3] == 2).all() and (merged[67_108_900] == 3).all()
    assert merged.count_nonzero() == 3 * d
    torch.testing.assert_close(merged_lse[:, -1:], torch.full((1, 1), np.log(2), device="cuda"))


@pytest.mark.gpu
def test_gpu_attention_over_both_halves():
    q, k, v = inputs(2, 8, 2, 500, 2000, 128)
    parts = [flash_fwd(q, k[:, :, r], v[:, :, r], return_lse=True) for r in (slice(777), slice(777, None))]
    o, lse = merge_states(*zip(*parts, strict=True))
    want, want_lse = flash_fwd(q, k, v, return_lse=True)
    torch.testing.assert_close(o, want, rtol=0, atol=4e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.gpu
def test_gpu_in_a_graph():
    """Captured between other kernels, in place, and replayed on new values: the same bits each time."""
    o, lse = states(3, device="cuda", sizes=(2, 8, 600))
    merge_states(o, lse)
    merged, merged_lse = torch.empty_like(o[0]), torch.empty_like(lse[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = [x * 2 for x in o]
        merge_states(twice, lse, out=twice[1])
        merged.copy_(twice[1])
        merge_states(o, lse, out=o[2], out_lse=merged_lse)
    for _ in range(3):
        new_o, new_lse = states(3, device="cuda", sizes=(2, 8, 600))
        for x, y in zip(o + lse, new_o + new_lse, strict=True):
            x.copy_(y)
        want, (plain, want_lse) = merge_states([x * 2 for x in o], lse)[0], merge_states(o, lse)
        graph.replay()
        assert torch.equal(merged, want) and torch.equal(o[2], plain) and torch.equal(merged_lse, want_lse)


@pytest.mark.gpu
def test_gpu_gradients_and_compile():
    o, lse = ([x.requires_grad_() for x in y] for y in states(3, dtype=torch.float32, device="cuda"))
    grads = torch.autograd.grad(merge_states(o, lse)[0].square().sum(), o + lse)
    exact = [x.detach().double().requires_grad_() for x in (*o, *lse)]
    wanted = torch.autograd.grad(reference.merge_states(exact[:3], exact[3:])[0].square().sum(), exact)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(merge_states, fullgraph=True)
    assert all(map(torch.equal, compiled(o, lse), merge_states(o, lse)))
