"""The torch operator: opcheck, torch.compile, torch.export. The CPU runs the same code, so it is tested there too."""

import pytest
import torch
import torch._dynamo.testing
from attention import inputs

from cute_attn import flash_fwd
from cute_attn.integrations import torch_op  # noqa: F401  registers the operators

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
