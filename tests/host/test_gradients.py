"""flash_fwd's gradients against float64 and beside SDPA's; training with it beside training with SDPA."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cute_attn import flash_fwd, reference
from cute_attn.integrations import by_operator, torch_op
from tests.support.attention import DTYPES, gradient_bound, inputs, sdpa

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OP, OP_BWD, OP_CUDNN = torch.ops.cute_attn.flash_fwd, torch.ops.cute_attn.flash_bwd, torch.ops.cute_attn.cudnn_bwd
SEQLENS = pytest.mark.parametrize("seqlen_k", [50, 40])  # of 40 queries; 40 keys: cuDNN's backward
pytestmark = pytest.mark.usefixtures("one_thread")


def leaves(*shape, dtype=torch.bfloat16, device="cpu", layout="bhsd"):
    return [x.requires_grad_() for x in inputs(*shape, dtype, device, layout)]


def gradients(qkv, grad=None, **options):
    o = flash_fwd(*qkv, **options)
    return torch.autograd.grad(o, qkv, torch.ones_like(o) if grad is None else grad)


def sdpa_gradients(q, k, v, grad, causal, scale):
    """Without the rows that see no key: some of torch's kernels make every gradient NaN of them."""
    first = max(0, q.shape[2] - k.shape[2]) if causal else 0
    o = sdpa(q[:, :, first:], k, v, causal, scale)
    return torch.autograd.grad(o, (q, k, v), grad[:, :, first:])


def check(*shape, causal, dtype, device, layout="bhsd", scale=None):
    """Each gradient keeps the bound that an output must keep."""
    qkv = leaves(*shape, dtype=dtype, device=device, layout=layout)
    grad = torch.randn_like(qkv[0])
    ours = gradients(qkv, grad, causal=causal, scale=scale, layout=layout)
    for x, dx in zip(qkv, ours, strict=True):
        assert (dx.shape, dx.dtype, dx.device) == (x.shape, x.dtype, x.device)
    if layout == "bshd":
        *qkv, grad = (x.detach().transpose(1, 2).requires_grad_() for x in (*qkv, grad))
        ours = [dx.transpose(1, 2) for dx in ours]
    with torch.no_grad():
        wants = reference.gradients(grad, *qkv, causal=causal, scale=scale)
    theirs = sdpa_gradients(*qkv, grad.detach(), causal, scale)
    for dx, want, other in zip(ours, wants, theirs, strict=True):
        gradient_bound(dx, want, other)


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("seqlens", [(128, 128), (113, 203), (203, 113), (1, 70)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal, seqlens, heads, layout, dtype, device):
    check(2, *heads, *seqlens, 64, causal=causal, dtype=dtype, device=device, layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 128, 160, 192, 224, 256])
def test_head_dims(head_dim, causal):
    for seqlens in ((300, 300), (1023, 1024), (500, 200)):
        check(2, 4, 2, *seqlens, head_dim, causal=causal, dtype=torch.bfloat16, device="cuda")


@DEVICES
@pytest.mark.parametrize("scale", [0.02, 0.0, -0.3])
def test_scale(scale, device):
    check(2, 4, 2, 100, 120, 64, causal=True, dtype=torch.bfloat16, device=device, scale=scale)


@DEVICES
def test_nothing_to_multiply(device):
    for shape in ((2, 4, 4, 5, 0, 64), (2, 4, 4, 0, 5, 64), (0, 4, 4, 5, 5, 64)):
        qkv = leaves(*shape, device=device)
        for x, dx in zip(qkv, gradients(qkv), strict=True):
            assert dx.shape == x.shape and (dx == 0).all()


@DEVICES
@SEQLENS
def test_whatever_the_strides_of_grad(seqlen_k, device):
    qkv = leaves(2, 4, 2, 40, seqlen_k, 64, device=device)
    want = gradients(qkv)
    o = flash_fwd(*qkv)
    assert all(map(torch.equal, torch.autograd.grad(o.sum(), qkv, retain_graph=True), want))  # expanded
    columns = torch.ones_like(o.transpose(2, 3)).contiguous().transpose(2, 3)
    assert all(map(torch.equal, torch.autograd.grad(o, qkv, columns, retain_graph=True), want))
    odd = torch.ones(o.numel() + 1, dtype=o.dtype, device=device)[1:].view(o.shape)  # 2 bytes past a multiple of 16
    assert all(map(torch.equal, torch.autograd.grad(o, qkv, odd), want))


@DEVICES
@SEQLENS
def test_whatever_the_strides_of_the_inputs(seqlen_k, device):
    """Slices of one packed buffer, then one K/V head expanded over all: as with copies of their own."""
    packed = torch.randn(2, 40, 3, 4, 64, device=device).bfloat16().requires_grad_()
    copies = [x.detach().clone().requires_grad_() for x in packed.unbind(2)]
    (dpacked,) = torch.autograd.grad(flash_fwd(*packed.unbind(2), causal=True, layout="bshd").sum(), packed)
    for dx, want in zip(dpacked.unbind(2), gradients(copies, causal=True, layout="bshd"), strict=True):
        torch.testing.assert_close(dx, want, atol=1e-3, rtol=0.02)
    q, k, v = leaves(2, 4, 1, 40, seqlen_k, 64, device=device)
    got = torch.autograd.grad(flash_fwd(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)).sum(), (q, k, v))
    for dx, want in zip(got, gradients((q, k, v)), strict=True):
        torch.testing.assert_close(dx, want, atol=0.02, rtol=0.02)


@DEVICES
def test_only_what_is_asked_for(device):
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device)
    v.requires_grad_()
    o, lse = flash_fwd(q, k, v, return_lse=True)
    assert o.requires_grad and not lse.requires_grad
    o.sum().backward()
    assert v.grad is not None and q.grad is None and k.grad is None
    with torch.no_grad():
        assert not flash_fwd(q, k, v).requires_grad


@DEVICES
def test_gradients_leave_the_output_as_it_is(device):
    q, k, v = leaves(2, 4, 2, 40, 50, 64, device=device)
    for got, want in zip(
        flash_fwd(q, k, v, causal=True, scale=0.2, return_lse=True),
        flash_fwd(q.detach(), k.detach(), v.detach(), causal=True, scale=0.2, return_lse=True),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_without_gradients_there_is_no_operator(monkeypatch):
    monkeypatch.setattr(by_operator, "dense", None)
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device="cpu")
    flash_fwd(q, k, v)
    with torch.no_grad():
        flash_fwd(q.requires_grad_(), k, v)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_in_none_out():
    """Nothing is computed, nor zeros made, for what nobody asks."""
    qkv = leaves(1, 2, 2, 8, 8, 16)
    o = NoGradient.apply(flash_fwd(*qkv))
    assert torch.autograd.grad(o.sum(), qkv, allow_unused=True) == (None,) * 3


def test_a_kernel_that_others_register_may_call_us():
    """There the mode says that gradients are recorded, and nobody records them."""
    q, k, v = leaves(1, 2, 2, 8, 8, 16)
    with torch._C._AutoDispatchBelowAutograd():
        assert not flash_fwd(q, k, v).requires_grad


def test_what_has_no_gradient_says_so():
    q, k, v = leaves(1, 2, 2, 8, 8, 16)
    (dq,) = torch.autograd.grad(flash_fwd(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; for one use"):
        dq.sum().backward()
    with pytest.raises(ValueError, match="return_lse: False came, and gradients need lse"):
        OP(q, k, v, False, None, "bhsd", False)


@DEVICES
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout, device):
    q, k, v = leaves(2, 4, 2, 40, 50, 64, device=device, layout=layout)
    torch.library.opcheck(OP.default, (q, k, v, True, None, layout, True))
    *qkv, o, lse = (x.detach() for x in (q, k, v, *OP(q, k, v, True, None, layout, True)))
    torch.library.opcheck(OP_BWD.default, (torch.ones_like(o), *qkv, o, lse, True, None, layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_of_cudnns_backward(layout):
    q, k, v = inputs(2, 4, 2, 40, 40, 64, device="cuda", layout=layout)
    o, lse = OP(q, k, v, True, None, layout, True)
    torch.library.opcheck(OP_CUDNN.default, (torch.ones_like(o), q, k, v, o, lse, True, None, layout))


@DEVICES
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    """The graph of a compiled step holds the operator's forward and backward."""
    step = torch.compile(
        lambda *x: (flash_fwd(*x, causal=True) * 2).sum(), fullgraph=True, dynamic=True, backend=backend
    )
    for seqlen in (40, 50):
        qkv = leaves(2, 4, 2, seqlen, seqlen, 64, device=device)
        got = torch.autograd.grad(step(*qkv), qkv)
        want = gradients(qkv, torch.full_like(qkv[0], 2), causal=True)
        for dx, other in zip(got, want, strict=True):
            torch.testing.assert_close(dx, other, atol=1e-3, rtol=0.02)


@DEVICES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    qkv = leaves(2, 4, 2, 40, 50, 64, device=device)
    o = checkpoint(lambda *x: flash_fwd(*x, causal=True) * 2, *qkv, use_reentrant=use_reentrant)
    got, want = torch.autograd.grad(o.sum(), qkv) if not use_reentrant else None, None
    if use_reentrant:  # it knows backward() alone
        o.sum().backward()
        got = [x.grad for x in qkv]
    want = gradients(qkv, torch.full_like(qkv[0], 2), causal=True)
    for dx, other in zip(got, want, strict=True):
        torch.testing.assert_close(dx, other, atol=1e-3, rtol=0.02)


@DEVICES
def test_autocast_changes_nothing(device):
    """What is computed in float32 stays so; the types are the caller's."""
    qkv = leaves(2, 4, 2, 40, 50, 64, dtype=torch.float16, device=device)
    o, lse = flash_fwd(*qkv, return_lse=True)
    grads = gradients(qkv)
    with torch.autocast(device, torch.bfloat16):
        again, lse_again = flash_fwd(*qkv, return_lse=True)
        grads_again = gradients(qkv)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)
    for dx, other in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(dx, other, atol=1e-4, rtol=2e-3)


@pytest.mark.gpu
def test_deterministic_where_torch_is():
    qkv = leaves(2, 8, 2, 1000, 1000, 64, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(qkv, causal=True)
        for _ in range(5):
            assert all(map(torch.equal, first, gradients(qkv, causal=True)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seqlen_k", "scale", "cudnn", "name"),
    [
        (1000, None, True, "bprop"),
        (1000, None, False, "flash_bwd"),
        (1000, -0.1, True, "flash_bwd"),
        (900, None, True, "flash_bwd"),
    ],
    ids=["cudnn", "cudnn_off", "scale", "lengths"],
)
def test_the_kernels_are_ours_and_torchs(seqlen_k, scale, cudnn, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)
    qkv = leaves(2, 8, 2, 1000, seqlen_k, 64, device="cuda")
    gradients(qkv, scale=scale)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(qkv, scale=scale)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any(event.startswith("flash_fwd") and "sm90" in event for event in names), names
    assert any(name in event for event in names), names


class OnGpu(NamedTuple):
    """What `cudnn_serves` looks at."""

    shape: tuple[int, ...]
    is_cuda: bool = True

    def numel(self):
        return math.prod(self.shape)


@pytest.mark.parametrize(
    ("want", "q", "seqlen_k", "scale"),
    [
        (True, (2, 4, 8, 64), 8, None),
        (True, (2, 4, 8, 64), 8, 0.1),
        (False, (2, 4, 8, 64), 9, None),
        (False, (2, 4, 1, 64), 1, None),
        (False, (0, 4, 8, 64), 8, None),
        (False, (2, 4, 8, 64), 8, 0.0),
        (False, (2, 4, 8, 64), 8, -0.1),
    ],
)
def test_what_cudnns_backward_serves(want, q, seqlen_k, scale):
    k = OnGpu((*q[:2], seqlen_k, q[3]))
    assert torch_op.cudnn_serves(OnGpu(q), k, scale, "bhsd") is want
    assert not torch_op.cudnn_serves(OnGpu(q, is_cuda=False), k, scale, "bhsd")


def test_cudnns_backward_gives_way(monkeypatch):
    """To determinism, to torch's switch, and, above a head dim of 128, to its own age."""
    q, wide = OnGpu((2, 4, 8, 64)), OnGpu((2, 4, 8, 136))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_000)
    assert torch_op.cudnn_serves(q, q, None, "bhsd") and not torch_op.cudnn_serves(wide, wide, None, "bhsd")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_100)
    assert torch_op.cudnn_serves(wide, wide, None, "bhsd")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not torch_op.cudnn_serves(q, q, None, "bhsd")
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    try:
        assert not torch_op.cudnn_serves(q, q, None, "bhsd")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_more_heads_than_the_backward_takes():
    qkv = leaves(1, 65_536, 1, 8, 8, 8, device="cuda")
    with pytest.raises(ValueError, match="q: 65536 heads; with gradients at most 65535"):
        flash_fwd(*qkv)
    with torch.no_grad():
        flash_fwd(*qkv)


@pytest.mark.gpu
def test_transforms_of_torch_func_raise_where_the_call_is_known_too():
    q, k, v = inputs(2, 4, 2, 40, 50, 64)
    flash_fwd(q, k, v)
    for _ in range(2):
        with pytest.raises(TypeError, match="q: a tensor inside a transform"):
            torch.vmap(lambda q: flash_fwd(q, k, v))(q.expand(3, -1, -1, -1, -1))
        with pytest.raises(TypeError, match="q: a tensor inside a transform"):
            torch.func.grad(lambda q: flash_fwd(q, k, v).sum())(q)


class Block(torch.nn.Module):
    """A causal transformer of two layers, attention given."""

    def __init__(self, attention, vocabulary=64, length=64, width=64, heads=4):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.embed, self.position = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(length, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                dict(
                    norm=torch.nn.LayerNorm(width),
                    qkv=torch.nn.Linear(width, 3 * width),
                    out=torch.nn.Linear(width, width),
                    mlp=torch.nn.Sequential(
                        torch.nn.LayerNorm(width),
                        torch.nn.Linear(width, 2 * width),
                        torch.nn.GELU(),
                        torch.nn.Linear(2 * width, width),
                    ),
                )
            )
            for _ in range(2)
        )
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            q, k, v = (
                y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for y in layer["qkv"](layer["norm"](x)).chunk(3, dim=-1)
            )
            o = self.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
            x = x + layer["out"](o.transpose(1, 2).flatten(2).to(x.dtype))
            x = x + layer["mlp"](x)
        return self.head(x)


def losses(attention, steps, device):
    """Each text repeats 8 tokens drawn anew in each step: what comes next is known by attention alone."""
    torch.manual_seed(0)
    model = Block(attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = []
    for _ in range(steps):
        tokens = torch.randint(0, 64, (16, 8)).repeat(1, 8).to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


@pytest.mark.parametrize(
    ("device", "steps"), [("cpu", 20), pytest.param("cuda", 200, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_training_follows_sdpas_loss_curve(device, steps):
    ours = losses(lambda q, k, v: flash_fwd(q, k, v, causal=True), steps, device)
    theirs = losses(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), steps, device)
    assert theirs[-1] < (0.2 if steps == 200 else 0.97) * theirs[0]  # 200 steps without attention: 0.93
    print("largest difference:", float((ours - theirs).abs().max()), "loss:", float(theirs[0]), "to", float(theirs[-1]))
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0.01)
