"""The torch operator: opcheck, torch.compile, torch.export. The CPU runs the same code, so it is tested there too."""

from itertools import permutations, product

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_attn import flash_fwd, flash_fwd_varlen, strides
from cute_attn.integrations import torch_op
from tests.support.attention import inputs

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OP, OP_OUT = torch.ops.cute_attn.flash_fwd, torch.ops.cute_attn.flash_fwd_out


@DEVICES
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(device, layout, return_lse):
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device, layout=layout)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for args in ((q, k, v), transposed):
        torch.library.opcheck(OP.default, (*args, True, None, layout, return_lse))
        torch.library.opcheck(OP_OUT.default, (*args, torch.empty_like(q), False, 0.3, layout, return_lse))


@DEVICES
def test_the_operator_is_flash_fwd(device):
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device)
    o, lse = flash_fwd(q, k, v, causal=True, scale=-0.3, return_lse=True)
    got, got_lse = OP(q, k, v, True, -0.3, "bhsd", True)
    assert torch.equal(got, o)
    assert torch.equal(got_lse, lse)
    assert OP(q, k, v, True, None, "bhsd", False)[1].numel() == 0
    out = torch.full_like(q, torch.nan)
    assert torch.equal(OP_OUT(q, k, v, out, True, -0.3, "bhsd", True), lse)
    assert torch.equal(out, o)


@DEVICES
def test_compile_makes_one_graph_for_every_size(device):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def model(q, k, v):
        o, lse = flash_fwd(q * 2, k, v, causal=True, scale=0.2, return_lse=True)
        return o + 1, lse

    for batch, seqlen in ((3, 40), (5, 41), (2, 333), (4, 7)):
        q, k, v = inputs(batch, 4, 2, seqlen, seqlen + 11, 64, device=device)
        for got, want in zip(
            model(q, k, v), flash_fwd(q * 2, k, v, causal=True, scale=0.2, return_lse=True), strict=True
        ):
            assert torch.equal(got, want + 1 if got.dim() == 4 else want)
    assert counter.frame_count == 1


@DEVICES
def test_compile_with_out_and_layout(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(q, k, v, out):
        return flash_fwd(q, k, v, layout="bshd", out=out) * 2

    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device, layout="bshd")
    out = torch.full_like(q, torch.nan)
    doubled = model(q, k, v, out)
    assert torch.equal(out, flash_fwd(q, k, v, layout="bshd"))
    assert torch.equal(doubled, out * 2)


@DEVICES
def test_compile_under_inference_mode_with_inductor(device):
    model = torch.compile(lambda q, k, v: flash_fwd(q, k, v).relu(), fullgraph=True)
    q, k, v = inputs(2, 4, 2, 40, 50, 64, device=device)
    with torch.inference_mode():
        assert torch.equal(model(q, k, v), flash_fwd(q, k, v).relu())


@DEVICES
def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_fwd(q, k, v, causal=True)

    q, k, v = inputs(2, 4, 2, 40, 40, 64, device=device)
    size = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("seqlen", min=2)}
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=(size, size, size))
    assert [str(n.target) for n in program.graph.nodes].count("cute_attn.flash_fwd.default") == 1
    q, k, v = inputs(3, 4, 2, 77, 77, 64, device=device)
    assert torch.equal(program.module()(q, k, v), flash_fwd(q, k, v, causal=True))


def test_wrong_arguments_raise_in_a_compiled_function_too():
    model = torch.compile(lambda q, k, v: flash_fwd(q, k, v), backend="eager")
    q, k, v = inputs(2, 4, 3, 40, 40, 64, device="cpu")
    with pytest.raises(ValueError, match="k: 3 heads do not divide q's 4"):
        model(q, k, v)


def layouts(dims, device="cpu"):
    """Every order of the dimensions in memory, each expanded or not, with a gap behind the columns or without."""
    for order, expanded, gap in product(permutations(range(4)), product((False, True), repeat=3), (0, 8)):
        shape = [1 if e else n for e, n in zip((*expanded, False), dims, strict=True)]
        shape[3] += gap
        x = torch.randn([shape[i] for i in order], device=device).bfloat16()
        yield x.permute([order.index(i) for i in range(4)])[..., : dims[3]].expand(dims)


SHAPES = pytest.mark.parametrize("dims", [(2, 4, 5, 16), (1, 3, 5, 16), (2, 3, 1, 16), (1, 1, 5, 16), (2, 2, 2, 8)])


@SHAPES
def test_strides_of_a_call_and_of_its_fake(dims):
    """Equal, sizes of 1 included; and torch.empty_like's, but for these."""
    mode = FakeTensorMode()
    for q in list(layouts(dims))[::3]:
        for columns in (dims[3], 24):
            shape, want = strides.of_output(q, columns)
            v = torch.empty(*shape, dtype=q.dtype)
            fake = torch_op.o_like(mode.from_tensor(q, static_shapes=True), mode.from_tensor(v, static_shapes=True))
            assert fake.stride() == want and tuple(fake.shape) == shape
            assert strides.dense(shape, want) == want
        like = torch.empty_like(q).stride()
        own = strides.dense(dims, q.stride())
        assert all(a == b for n, a, b in zip(dims, own, like, strict=True) if n > 1)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_call_has_those_strides(layout):
    for q in list(layouts((2, 4, 5, 16)))[::7] + list(layouts((2, 3, 1, 16)))[::7]:
        x = q if layout == "bhsd" else q.transpose(1, 2)
        for columns in (16, 24):
            v = torch.randn(*x.shape[:3], columns).bfloat16()
            want = strides.of_output(x, columns)[1]
            assert flash_fwd(x, x, v, layout=layout).stride() == want
            assert OP(x, x, v, False, None, layout, False)[0].stride() == want
        packed, cu = x[0], torch.tensor([0, x.shape[1]], dtype=torch.int32)
        assert flash_fwd_varlen(packed, packed, packed, cu, cu).stride() == strides.of_output(packed[None], 16)[1][1:]


COMPILED = {
    "packed qkv": lambda b, h, s: torch.randn(b, s, 3, h, 64).bfloat16()[:, :, 0].transpose(1, 2),
    "expanded heads": lambda b, h, s: torch.randn(b, 1, s, 64).bfloat16().expand(b, h, s, 64),
    "expanded batch": lambda b, h, s: torch.randn(1, s, h, 64).bfloat16().expand(b, s, h, 64).transpose(1, 2),
    "hsbd": lambda b, h, s: torch.randn(h, s, b, 64).bfloat16().permute(2, 0, 1, 3),
}


@DEVICES
@pytest.mark.parametrize("layout", COMPILED)
def test_inductor_finds_the_strides_that_it_was_told(layout, device):
    """Forward and backward, of three queries and of one."""
    step = torch.compile(lambda q, k, v: flash_fwd(q, k, v, causal=True) * 2 + 1, fullgraph=True, dynamic=False)
    for b, h, s in ((2, 4, 3), (2, 3, 1)):
        torch._dynamo.reset()
        q = COMPILED[layout](b, h, s).to(device).detach().requires_grad_()
        k, v = (torch.randn(b, h, s, 64, device=device).bfloat16() for _ in range(2))
        got, want = step(q, k, v), flash_fwd(q, k, v, causal=True) * 2 + 1
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, atol=0.03, rtol=0.02)
        found = [torch.autograd.grad(x.float().sum(), q)[0] for x in (got, want)]
        torch.testing.assert_close(*found, atol=1e-3, rtol=0.02)
