"""F.scaled_dot_product_attention through us: what is taken, what is left to torch, and that it is undone."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from cute_attn import flash_fwd, reference
from cute_attn.integrations import by_operator, sdpa
from tests.support.attention import DTYPES, bound, inputs

OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention
registry = torch.nn.attention
needs_registry = pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason="this torch has no registry of flash attention"
)


def state():
    """What we change: the CUDA kernel, as registered from Python or not, and the backends' order."""
    dump = torch._C._dispatch_dump(f"aten::{sdpa.OPERATOR}")
    mine = any(line.startswith("CUDA:") and "sdpa.py" in line for line in dump.splitlines())
    return mine, torch._C._get_sdp_priority_order()


@pytest.fixture
def before():
    sdpa._priorities()  # torch may set them on the first call
    found = state()
    assert not found[0]
    return found


def test_use_is_undone(before):
    with sdpa.use():
        mine, order = state()
        assert mine and order[0] == sdpa.FLASH and sorted(order) == sorted(before[1])
    assert state() == before
    with pytest.raises(ZeroDivisionError), sdpa.use():
        raise ZeroDivisionError
    assert state() == before
    held = sdpa.Active()
    held.remove()
    assert state() == before


@needs_registry
def test_torchs_registry(before):
    assert sdpa.register() == "cute_attn"
    assert "cute_attn" in registry.list_flash_attention_impls()
    assert state() == before
    for _ in range(2):  # activating it anew is no harm
        registry.activate_flash_attention_impl("cute_attn")
        assert registry.current_flash_attention_impl() == "cute_attn"
        assert state()[0] and state()[1][0] == sdpa.FLASH
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    assert state() == before


def test_a_torch_without_registry(monkeypatch):
    monkeypatch.delattr(registry, "restore_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match=r"no registry of flash attention; use `with sdpa.use\(\):`"):
        sdpa.register()


@pytest.fixture
def on_cpu():
    """torch has no kernel for the operator on the CPU, and ours runs there too."""
    active = sdpa.Active("CPU")
    yield
    active.remove()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(40, 40), (40, 50), (50, 40), (5, 0)])
def test_the_operator_is_flash_fwd(seqlens, causal, on_cpu):
    """Causal to the last key; a row without keys marked as FlashAttention-2 does; the rest as torch's fakes say."""
    qkv = inputs(2, 4, 2, *seqlens, 64, device="cpu")
    found = OPERATOR(*qkv, 0.0, causal, False, scale=0.2)
    o, lse = flash_fwd(*qkv, causal=causal, scale=0.2, return_lse=True)
    assert torch.equal(found[0], o)
    assert torch.equal(found[1], lse.masked_fill(lse == -torch.inf, torch.inf))
    for x, fake in zip(found, OPERATOR(*(x.to("meta") for x in qkv), 0.0, causal, False, scale=0.2), strict=True):
        if isinstance(fake, torch.Tensor):
            assert (x.shape, x.dtype, x.stride()) == (fake.shape, fake.dtype, fake.stride())
        else:
            assert x == fake
    dense = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    assert OPERATOR(*dense)[0].stride() == dense[0].stride()


def test_its_backward_is_torchs(on_cpu, monkeypatch):
    monkeypatch.setattr(by_operator, "dense", None)  # ours
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 4, 40, 40, 64, device="cpu"))
    o, lse, *_ = OPERATOR(q, k, v)
    assert type(o.grad_fn).__name__ == "ScaledDotProductFlashAttentionBackward0" and not lse.requires_grad


def test_its_backward_has_the_strides_that_torchs_fake_kernel_tells(monkeypatch):
    """torch's own kernel orders expanded heads otherwise, and what torch.compile made asserts."""
    like = torch.empty_like
    kernel = lambda grad, q, k, v, *_, scale: (like(q), like(k), like(v))  # noqa: E731
    kernel.default = torch.ops.aten._flash_attention_backward.default
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", kernel)
    o, lse = torch.randn(2, 4, 6, 64).bfloat16(), torch.zeros(2, 4, 6)
    more = None, None, 6, 6, 0.0, False, torch.empty(0), torch.empty(0)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    for x in (o, o.transpose(1, 2).contiguous().transpose(1, 2), o[:, :1].expand_as(o), o[:1].expand_as(o)):
        found = sdpa.backward(o, x, x, x, o, lse, *more)
        fakes = backward(*(y.to("meta") for y in (o, x, x, x, o, lse)), *more)
        assert [dx.stride() for dx in found] == [dx.stride() for dx in fakes]


@pytest.mark.gpu
def test_compiled_layouts():
    """Of q, k and v: compiled, with gradients, as eagerly; none asserts."""

    def rnd(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    k, v = rnd(2, 4, 40, 64), rnd(2, 4, 40, 64)
    queries = dict(
        packed=rnd(2, 40, 3, 4, 64)[:, :, 0].transpose(1, 2),
        heads=rnd(2, 1, 40, 64).expand(2, 4, 40, 64),
        batch=rnd(1, 40, 4, 64).expand(2, 40, 4, 64).transpose(1, 2),
        sbhd=rnd(40, 2, 4, 64).permute(1, 2, 0, 3),
        hsbd=rnd(4, 40, 2, 64).permute(2, 0, 1, 3),
        cut=rnd(2, 4, 40, 128)[..., :64],
    )
    with sdpa.use():
        call = torch.compile(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True) * 2 + 1, dynamic=False)
        for q in queries.values():
            torch._dynamo.reset()
            q = q.detach().requires_grad_()
            got, want = call(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2 + 1
            torch.testing.assert_close(got, want, atol=0.03, rtol=0.02)
            found = [torch.autograd.grad(x.float().sum(), q)[0] for x in (got, want)]
            torch.testing.assert_close(*found, atol=1e-2, rtol=0.02)


Q, K, V = inputs(2, 4, 4, 10, 10, 64, device="cpu")


@pytest.mark.parametrize(
    ("args", "scale"),
    [
        ((Q, K, V, 0.5), None),
        ((Q, K, V, 0.0, False, True), None),
        ((Q.detach().requires_grad_(), K, V), -0.1),
        ((Q, K, V.detach().requires_grad_()), 0.0),
        ((Q.float(), K.float(), V.float()), None),
        (inputs(1, 1, 1, 4, 4, 264, device="cpu"), None),
        ((Q, K, inputs(2, 4, 4, 10, 10, 32, device="cpu")[0]), None),
    ],
    ids=[
        "dropout",
        "debug mask",
        "learns, negative scale",
        "learns, scale 0",
        "float32",
        "head_dim 264",
        "v's head_dim",
    ],
)
def test_the_rest_is_torchs(args, scale, on_cpu, monkeypatch):
    def refuse(q, k, v, dropout_p, is_causal, return_debug_mask, scale):
        raise ZeroDivisionError

    monkeypatch.setattr(sdpa, "torchs", refuse)
    OPERATOR(Q, K, V, scale=-0.1)
    with pytest.raises(ZeroDivisionError):
        OPERATOR(*args, scale=scale)


def test_the_cpus_attention_is_left_alone():
    want = F.scaled_dot_product_attention(Q, K, V)
    with sdpa.use():
        assert torch.equal(F.scaled_dot_product_attention(Q, K, V), want)


def kernels(call):
    """Names of the CUDA kernels of a call."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


def is_ours(call):
    return any(name.startswith("flash_fwd") and "sm90" in name for name in kernels(call))


@pytest.fixture(params=["use", pytest.param("registry", marks=needs_registry)])
def ours(request):
    if request.param == "use":
        with sdpa.use():
            yield
    else:
        registry.activate_flash_attention_impl(sdpa.register())
        yield
        registry.restore_flash_attention_impl()


def both(*shape, causal, dtype=torch.bfloat16, scale=None):
    """F.scaled_dot_product_attention's o, dq, dk, dv, and the truth."""
    q, k, v = (x.requires_grad_() for x in inputs(*shape, dtype))
    gqa = {} if q.shape[1] == k.shape[1] else dict(enable_gqa=True)

    def call():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, **gqa)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), grad)

    grad = torch.randn_like(q)
    with torch.no_grad():
        want = reference.attention(q, k, v, causal=causal, scale=scale)[0]
        return call, [want, *reference.gradients(grad, q, k, v, causal=causal, scale=scale)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen", "head_dim"), [(128, 64), (113, 128), (1024, 256), (300, 72), (200, 20)])
def test_outputs_and_gradients(seqlen, head_dim, causal, heads, dtype):
    call, wants = both(2, *heads, seqlen, seqlen, head_dim, causal=causal, dtype=dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = call()
    with sdpa.use():
        found = call()
        assert is_ours(call)
    for x, want, other in zip(found, wants, theirs, strict=True):
        bound(x, want, other)


@pytest.mark.gpu
def test_it_is_used_where_it_is_active_and_nowhere_else(before, ours):
    call, _ = both(2, 4, 4, 128, 128, 64, causal=True)
    assert is_ours(call)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert is_ours(call)
    for other in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(other):
            assert not is_ours(call)


@pytest.mark.gpu
def test_after_it_torch_is_as_before():
    call, _ = both(2, 4, 4, 128, 128, 64, causal=True)
    first = set(kernels(call))
    with sdpa.use():
        assert is_ours(call)
    assert set(kernels(call)) == first and not is_ours(call)


@pytest.mark.gpu
def test_dropout_is_torchs():
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 4, 128, 128, 64))

    def call():
        torch.manual_seed(0)
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        return o, *torch.autograd.grad(o.sum(), (q, k, v))

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = call()
    with sdpa.use():
        assert all(map(torch.equal, call(), want)) and not is_ours(call)


@pytest.mark.gpu
def test_masks_other_types_and_lengths_are_torchs():
    q, k, v = inputs(2, 4, 4, 100, 120, 64)
    mask = torch.rand(100, 120, device="cuda") > 0.5
    calls = [
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),  # aligned to the first key
        lambda: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
    ]
    wants = [call() for call in calls]
    with sdpa.use():
        assert all(torch.equal(call(), want) for call, want in zip(calls, wants, strict=True))
        assert not any(is_ours(call) for call in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("seqlens", [(100, 120), (120, 100)])
def test_causal_to_the_last_key(seqlens):
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 4, *seqlens, 64))
    grad = torch.randn_like(q)

    def call():
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(*seqlens))
        return o, *torch.autograd.grad(o, (q, k, v), grad)

    theirs = call()
    with sdpa.use():
        found = call()
        assert is_ours(call)
    with torch.no_grad():
        want = reference.attention(q, k, v, causal=True)[0], *reference.gradients(grad, q, k, v, causal=True)
    for x, truth, other in zip(found, want, theirs, strict=True):
        bound(x, truth, other)


@pytest.mark.gpu
def test_autocast():
    q, k, v = (x.float().requires_grad_() for x in inputs(2, 4, 4, 128, 128, 64))

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa.use():
        assert is_ours(call) and call().dtype == torch.bfloat16
        call().float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 4, 128, 128, 64))
    with sdpa.use():
        model = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v, is_causal=True), fullgraph=True, mode=mode
        )
        want = flash_fwd(q * 2, k, v, causal=True)
        (want_dq,) = torch.autograd.grad(want.sum(), q)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            o = model(q, k, v)
            torch.testing.assert_close(o, want)
            (dq,) = torch.autograd.grad(o.sum(), q)
            torch.testing.assert_close(dq, want_dq, atol=1e-3, rtol=0.02)
        with torch.no_grad():
            assert is_ours(lambda: model(q, k, v))
