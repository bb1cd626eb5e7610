"""What changes scores, in varlen sequences: each sequence as if it were alone, under its own number."""

from itertools import product

import pytest
import torch

from cute_attn import compile, flash_fwd_varlen, mods, plan
from cute_attn.flash_attn_interface import flash_attn_varlen_func
from cute_attn.plan import HEAD_DIMS, FeatureKey
from cute_attn.tools import inspect
from tests.support.mods import mask_mods, score_mods
from tests.support.nightly import sample
from tests.support.varlen import varlen_inputs
from tests.support.varlen_modifiers import HEADS, SEQUENCES, cases, check, functions

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
pytestmark = pytest.mark.usefixtures("one_thread")


@DEVICES
@pytest.mark.parametrize("name", {**cases("cpu"), **functions("cpu")})
def test_each_sequence_is_its_own(name, device):
    for head_dim, slack in ((64, 0), (128, 2)):
        tensors = varlen_inputs(SEQUENCES, HEADS, 2, head_dim, where=device, slack=slack)
        check(*tensors, **{**cases(device), **functions(device)}[name])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim):
    sizes = [(300, 700), (1, 1025), (1023, 1024), (129, 127)]
    tensors = varlen_inputs(sizes, HEADS, 2, head_dim - 8)
    heads = torch.linspace(-0.3, 0.5, HEADS, device="cuda")
    for mask in (dict(), dict(causal=True), dict(window=(200, 40))):
        check(*tensors, softcap=2.0, alibi_slopes=heads, sinks=heads, **mask)
        check(*tensors, score_mod=score_mods("cuda")["sloped"], mask_mod=mask_mods("cuda")["prefix"], **mask)


def test_the_interface_of_flash_attention_has_softcaps():
    q, k, v, lengths = varlen_inputs(SEQUENCES, HEADS, 2, 64, where="cpu", margin=0)
    found = flash_attn_varlen_func(q, k, v, *lengths.values(), 70, 130, softcap=2.0, causal=True)
    assert torch.equal(found, flash_fwd_varlen(q, k, v, **lengths, softcap=2.0, causal=True))


@pytest.mark.gpu
def test_new_values_compile_nothing(monkeypatch):
    tensors = varlen_inputs(SEQUENCES, HEADS, 2, 64)
    for scale in (1.0, -2.0):
        heads = torch.linspace(-0.3, 0.5, HEADS, device="cuda") * scale
        check(*tensors, softcap=3.0 + scale, alibi_slopes=heads, sinks=heads)
        monkeypatch.setattr(compile, "compile", None)


WRONG = {
    "softcap": (dict(softcap=-1.0), ValueError, "softcap: -1.0 came"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes: shape \(3,\) came; \(4,\) or \(6, 4\) is"),
    "sinks": (dict(sinks=torch.ones(4).double()), TypeError, "sinks: torch.float64 came"),
    "score_mod": (dict(score_mod=3), TypeError, "score_mod: 3 came; a function of"),
    "aux": (dict(score_mod=lambda s, *_: s, aux=3), TypeError, "aux: builtins.int came; a tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    how, error, words = WRONG[name]
    q, k, v, lengths = varlen_inputs(SEQUENCES, HEADS, 2, 64, where="cpu")
    with pytest.raises(error, match=words):
        flash_fwd_varlen(q, k, v, **lengths, **how)


def test_no_gradients():
    q, k, v, lengths = varlen_inputs(SEQUENCES, HEADS, 2, 64, where="cpu")
    heads = torch.ones(HEADS)
    with pytest.raises(ValueError, match="softcap: given with inputs that require grad"):
        flash_fwd_varlen(q.clone().requires_grad_(), k, v, **lengths, softcap=2.0, sinks=heads)


def test_compiled():
    """But for functions, which pass no operator."""
    q, k, v, lengths = varlen_inputs(SEQUENCES, HEADS, 2, 64, where="cpu")
    compiled = torch.compile(flash_fwd_varlen, backend="aot_eager", fullgraph=True)
    how = dict(softcap=2.0, sinks=torch.ones(HEADS), alibi_slopes=torch.linspace(0.1, 0.5, HEADS), causal=True)
    how |= dict(window=(9, None), return_row_max=True, out=torch.zeros_like(q))
    found = [x.clone() for x in compiled(q, k, v, **lengths, **how)]
    want = flash_fwd_varlen(q, k, v, **lengths, **how | dict(out=torch.zeros_like(q)))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    with pytest.raises(Exception, match="they cannot pass the operator"):
        compiled(q, k, v, **lengths, mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)


@pytest.mark.machine_code
@pytest.mark.parametrize(
    ("head_dim", "causal", "masked"), sample(3, [64, 96, 128, 192, 256], [False, True], [False, True])
)
def test_healthy(head_dim, causal, masked):
    mod = mods.prepare("mask_mod", mask_mods("cpu")["documents"], ()).kernel
    key = FeatureKey(mask_mod=mod, row_max=True) if masked else FeatureKey(softcap=True, alibi=True, sinks=True)
    config = plan.varlen(head_dim, "bf16", causal, key)
    assert config.varlen and config.sinks == key.sinks and inspect.report(config).problems() == []


def test_plain_calls_have_the_kernels_that_they_had():
    for d, causal, window in product(HEAD_DIMS, (False, True), (False, True)):
        config = plan.varlen(d, "bf16", causal, FeatureKey(window=window))
        assert not (config.score.name or config.sinks or config.row_max) and config.mask.windowed == window
