"""What goes down to torch's backward kernels lies in one order, whatever order came.

torch keeps cuDNN's backward graphs by the sizes and strides of q, k and v: the first call of a key fixes the strides of
o, its gradient and lse, and a later one of others reads them wrongly, without an error.
"""

from itertools import permutations, product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cute_attn import flash_fwd, flash_fwd_varlen, reference, strides
from cute_attn.integrations import torch_op, varlen_op
from tests.support.attention import inputs

B, H, HK, S, D = 2, 4, 2, 24, 16
LAYOUTS = pytest.mark.parametrize("layout", ["bhsd", "bshd"])
pytestmark = pytest.mark.usefixtures("one_thread")


def permuted(x, order):
    """x with its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])


def cut(x):
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def odd(x):
    """Its data 2 bytes past a multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def rows_of_a_projection(x):
    """Every third of the rows of a larger buffer, as q, k and v of one linear layer are."""
    return torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], dim=2)[:, :, 0]


ORDERS = {f"{''.join('bhsd'[i] for i in p)}": lambda x, p=p: permuted(x, p) for p in permutations(range(4))}
OTHERS = dict(cut=cut, odd=odd, rows_of_a_projection=rows_of_a_projection)
EVERY = ORDERS | OTHERS
ROWS = {name: how for name, how in EVERY.items() if name in OTHERS or name.endswith("d")}  # that flash_fwd takes
EXPANDED = dict(sum=lambda x: x[:1, :1, :1, :1].expand(x.shape), columns=lambda x: x[..., :1].expand(x.shape))


def step(layout="bhsd", seqlen=S, device="cpu", heads_kv=HK):
    """q, k, v, o, lse and o's gradient, (B, H, S, D), of causal attention."""
    torch.manual_seed(0)
    q, k, v = inputs(B, H, heads_kv, seqlen, seqlen, D, device=device)
    o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
    return q, k, v, o, lse, torch.randn_like(o)


def given(x, layout):
    return x if layout == "bhsd" else x.transpose(1, 2)


def instead(monkeypatch, name, kernel):
    kernel.default = getattr(torch.ops.aten, name).default  # modules of torch that are imported late name it
    monkeypatch.setattr(torch.ops.aten, name, kernel)


@pytest.fixture
def cudnn(monkeypatch):
    """In place of torch's: keeps what came."""
    calls = []

    def kernel(grad, q, k, v, o, lse, *how, scale=None):
        calls.append(dict(grad=grad, q=q, k=k, v=v, o=o, lse=lse))
        return tuple(map(torch.empty_like, (q, k, v)))

    instead(monkeypatch, "_scaled_dot_product_cudnn_attention_backward", kernel)
    return calls


def bwd(layout, grad, q, k, v, o, lse):
    """As bhsd, by our operator's kernel in this layout."""
    found = torch_op.cudnn_bwd_op(*(given(x, layout) for x in (grad, q, k, v, o)), lse, True, None, layout)
    return [given(dx, layout) for dx in found]


@LAYOUTS
@pytest.mark.parametrize("q_order", ROWS)
def test_cudnn_sees_strides_that_its_key_tells(q_order, layout, cudnn):
    """Every order of o's gradient with every order of o; the values are the same, and q's gradient is like q."""
    q, k, v, o, lse, grad = step()
    q = ROWS[q_order](q)
    for grad_order, o_order in product(EVERY, ("bhsd", "bshd", "sbhd", "bhds", "cut", "odd")):
        got = bwd(layout, EVERY[grad_order](grad), q, k, v, EVERY[o_order](o), lse)
        down = cudnn.pop()
        assert down["o"].stride() == down["grad"].stride() == strides.dense(q.shape, q.stride())
        assert down["lse"].stride() == (H * S, S, 1, 1)
        assert not any(x.data_ptr() % 16 for x in down.values())
        assert torch.equal(down["o"], o) and torch.equal(down["grad"], grad)
        assert all(torch.equal(down[name], x) for name, x in zip("qkv", (q, k, v), strict=True))
        assert got[0].stride() == down["o"].stride()


@LAYOUTS
def test_what_is_expanded_and_every_order_of_lse(layout, cudnn):
    q, k, v, o, lse, grad = step()
    for name, how in EXPANDED.items():
        bwd(layout, how(grad), q, k, v, o, lse)
        assert cudnn[-1]["grad"].stride() == q.stride() and torch.equal(cudnn[-1]["grad"], how(grad)), name
    for order in permutations(range(3)):
        bwd(layout, grad, q, k, v, o, permuted(lse, order))
        assert cudnn[-1]["lse"].stride() == (H * S, S, 1, 1) and torch.equal(cudnn[-1]["lse"][..., 0], lse)


def test_q_k_and_v_are_copied_where_cudnn_cannot_address_them(cudnn):
    """And lie in their own order otherwise: those strides are in the key."""
    q, k, v, o, lse, grad = step()
    for name, how in EVERY.items():
        bwd("bhsd", grad, how(q), how(k), how(v), o, lse)
        for x, came in zip((cudnn[-1][n] for n in "qkv"), (q, k, v), strict=True):
            assert torch.equal(x, came) and x.stride(-1) == 1 and not x.data_ptr() % 16
            if name in ROWS and name != "odd":
                assert x.stride() == how(came).stride()
    far = torch.empty(1, dtype=q.dtype).as_strided((1, 1, 1, 16), (1 << 40, 16, 16, 0))
    assert torch_op.fit(far).stride() == (16, 16, 16, 1)


def test_the_usual_orders_are_not_copied(cudnn):
    """q, o and its gradient of one order, contiguous in either layout; k and v as views of one projection."""
    q, k, v, o, lse, grad = step()
    for order in ("bhsd", "bshd"):
        for kv in ("bhsd", "bshd", "cut", "rows_of_a_projection"):
            came = dict(
                grad=ORDERS[order](grad), q=ORDERS[order](q), k=EVERY[kv](k), v=EVERY[kv](v), o=ORDERS[order](o)
            )
            for layout in ("bhsd", "bshd"):
                bwd(layout, *came.values(), lse)
                down = cudnn.pop()
                assert all(down[name].data_ptr() == x.data_ptr() for name, x in (came | dict(lse=lse)).items())


def test_a_size_of_1_has_one_stride(cudnn):
    """Whatever stride came with it: 0 is refused by some, and others would make another key."""
    for shape in ((1, 1, 8, 16), (2, 1, 8, 16), (1, 3, 8, 16)):
        x = torch.randn(shape).bfloat16()
        lse = torch.zeros(shape[:3])
        for stride in (0, 8, 10**6):
            y = x.as_strided(x.shape, [stride if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
            bwd("bhsd", y, y, y, y, y, lse)
            down = cudnn.pop()
            assert {z.stride() for name, z in down.items() if name != "lse"} == {x.stride()}
            assert all(z.data_ptr() == y.data_ptr() for name, z in down.items() if name != "lse")


def test_what_the_key_of_cudnn_confuses_is_not_given_to_it(monkeypatch):
    """Strides beyond 32 bits; and torch's experiment, which wants lse in another order."""
    q = torch.empty(1, dtype=torch.bfloat16).expand(1, 2, 8, 16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert torch_op.cudnn_serves(q, q, None, "bhsd")
    huge = torch.empty(1, dtype=torch.bfloat16).expand(1, 1 << 10, 1 << 15, 64)
    assert not torch_op.cudnn_serves(huge, huge, None, "bhsd")
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert not torch_op.cudnn_serves(q, q, None, "bhsd")


@pytest.fixture
def flash(monkeypatch):
    calls = []

    def kernel(grad, q, k, v, o, lse, *how, scale=None, **sides):
        calls.append(dict(grad=grad, q=q, k=k, v=v, o=o, lse=lse))
        return tuple(map(torch.empty_like, (q, k, v)))

    instead(monkeypatch, "_flash_attention_backward", kernel)
    return calls


@LAYOUTS
def test_flash_attention_sees_o_and_its_gradient_contiguous(layout, flash):
    q, k, v, o, lse, grad = (x.to("meta") for x in step())
    orders = [how for name, how in EVERY.items() if name != "odd"]
    for one, other in product(orders, orders):
        args = one(grad), other(q), other(k), other(v), other(o)
        found = torch_op.flash_bwd_op(*(given(x, layout) for x in args), permuted(lse, (2, 0, 1)), True, None, layout)
        down = flash.pop()
        assert all(down[name].is_contiguous() and down[name].shape == (B, S, H, D) for name in ("grad", "o"))
        assert down["lse"].is_contiguous() and all(down[name].stride(-1) == 1 for name in "qkv")
        assert [dx.shape for dx in found] == [given(x, layout).shape for x in (q, k, v)]


def test_packed_gradients_see_o_and_its_gradient_contiguous(flash, monkeypatch):
    monkeypatch.setattr(varlen_op, "_within", lambda dx, cu: dx)
    q, o, grad = (torch.empty(20, H, D, device="meta", dtype=torch.float16) for _ in range(3))
    k, v = (torch.empty(20, HK, D, device="meta", dtype=torch.float16) for _ in range(2))
    cu, lse = torch.empty(3, dtype=torch.int32, device="meta"), torch.empty(20, H, device="meta").T
    for one, other in product(permutations(range(3)), permutations(range(3))):
        args = permuted(grad, one), *(permuted(x, other) for x in (q, k, v, o))
        varlen_op.flash_bwd_varlen_op(*args, lse, cu, cu, 20, 20, True, None, None, None)
        down = flash.pop()
        assert all(down[name].is_contiguous() for name in ("grad", "o", "lse"))
        assert all(down[name].stride(-1) == 1 for name in "qkv")


def wanted(q, k, v, grad, causal=True, scale=None):
    with torch.no_grad():
        return reference.gradients(grad, q, k, v, causal=causal, scale=scale)


def near(got, want):
    for dx, other in zip(got, want, strict=True):
        error = float((dx.double() - other).norm() / other.norm().clamp_min(1))
        assert error < 1e-2, error


def attend(layout, q, k, v, **how):
    return given(flash_fwd(*(given(x, layout) for x in (q, k, v)), layout=layout, **how), layout)


GPU_ORDERS = {name: how for name, how in (EVERY | EXPANDED).items() if name not in ("odd",)}


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("deterministic", [False, True], ids=["cudnn", "flash"])
@pytest.mark.parametrize("heads_kv", [H, HK])
def test_every_pair_of_orders_in_one_process(heads_kv, deterministic, layout):
    """One shape, so that torch has one graph for each order of q, k and v: against float64."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        q, k, v, _, _, grad = step(seqlen=130, device="cuda", heads_kv=heads_kv)
        for q_order, kv_order in product(("bhsd", "bshd", "sbhd", "hbsd", "cut"), ("bhsd", "bshd", "cut")):
            x = [ROWS[q_order](q), ROWS[kv_order](k), ROWS[kv_order](v)]
            x = [y.detach().requires_grad_() for y in x]
            for how in (*GPU_ORDERS.values(), odd):
                dy = how(grad)
                got = torch.autograd.grad(attend(layout, *x, causal=True), x, dy)
                near(got, wanted(*x, dy))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@LAYOUTS
def test_scales_masks_and_heads_share_no_graph(layout):
    """In turns, with gradients of two orders each."""
    for scale, causal, heads_kv, order in product((None, 0.3, 0.01), (True, False), (4, 2, 1), ("bhsd", "bshd")):
        q, k, v, _, _, grad = step(seqlen=128, device="cuda", heads_kv=heads_kv)
        x = [y.requires_grad_() for y in (q, k, v)]
        dy = ORDERS[order](grad)
        near(
            torch.autograd.grad(attend(layout, *x, causal=causal, scale=scale), x, dy),
            wanted(*x, dy, causal=causal, scale=scale),
        )


@pytest.mark.gpu
@LAYOUTS
def test_views_of_one_projection_and_copies_in_turns(layout):
    packed = torch.randn(B, 3, H, 130, 64, device="cuda").bfloat16()
    for _ in range(2):
        for x in (packed.unbind(1), [y.contiguous() for y in packed.unbind(1)]):
            for order in ("bshd", "bhsd", "sbhd"):
                qkv = [y.detach().requires_grad_() for y in x]
                grad = ORDERS[order](torch.randn(B, H, 130, 64, device="cuda").bfloat16())
                near(torch.autograd.grad(attend(layout, *qkv, causal=True), qkv, grad), wanted(*qkv, grad))


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_orders_under_compile_and_checkpoint(how, layout):
    torch._dynamo.reset()
    q, k, v, _, _, grad = step(seqlen=130, device="cuda")
    x = [y.requires_grad_() for y in (q, k, v)]

    def plain(*x):
        return attend(layout, *x, causal=True)

    compiled = torch.compile(plain, fullgraph=True)
    call = dict(compile=compiled, checkpoint=lambda *x: checkpoint(plain, *x, use_reentrant=False))[how]
    for order in ("bhsd", "bshd", "bhds", "sum", "bhsd"):
        dy = GPU_ORDERS[order](grad)
        near(torch.autograd.grad(call(*x), x, dy), wanted(*x, dy))


@pytest.mark.gpu
def test_packed_orders():
    q, k, v, _, _, grad = (x[0].transpose(0, 1) for x in step(seqlen=130, device="cuda")[:6])
    cu = torch.tensor([0, 130], dtype=torch.int32, device="cuda")
    x = [y.contiguous().requires_grad_() for y in (q, k, v)]
    want = wanted(*(y[None].transpose(1, 2) for y in (*x, grad)))
    for order in permutations(range(3)):
        o = flash_fwd_varlen(*x, cu, cu, max_seqlen_q=130, max_seqlen_k=130, causal=True)
        got = torch.autograd.grad(o, x, permuted(grad, order))
        near([dx[None].transpose(1, 2) for dx in got], want)
