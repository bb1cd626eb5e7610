"""Who computes a call and why not we, as `explain` says it and as the logger does; a GPU's answers by a stand-in."""

import logging
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cute_attn import explain, flash_fwd, flash_fwd_kvcache, flash_fwd_varlen, notices, plan
from cute_attn.integrations import sdpa
from cute_attn.integrations import transformers as cute
from cute_attn.integrations.transformers_masks import LazyMask, Padding
from cute_attn.plan import Problem
from tests.interpreter import interpreted
from tests.support.attention import inputs
from tests.support.requirements import interpreter

SIZES = 1, 4, 2, 33, 47, 64
Q, K, V = inputs(*SIZES, device="cpu")
CU = torch.tensor([0, 33], dtype=torch.int32), torch.tensor([0, 47], dtype=torch.int32)
VARLEN = *(x[0].transpose(0, 1).contiguous() for x in (Q, K, V)), *CU
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2)


@pytest.fixture
def gpu():
    """The answers for an H200, on a machine without one."""
    with interpreted() as asked:
        yield
    assert not asked, "nothing is compiled for an answer"


@interpreter
@pytest.mark.parametrize(
    "how",
    [{}, dict(causal=True), dict(window=(3, 0)), dict(softcap=5.0, return_max_logit=True), dict(dropout_p=0.5)],
    ids=str,
)
def test_our_kernel_by_its_name(how, gpu):
    """Of the kernel that a call asks for; nothing runs in its place."""
    found = explain(Q, K, V, **how)
    with interpreted(kernel=Mock()) as asked:
        flash_fwd(Q, K, V, **how)
    assert found == ("cute_attn", asked[0].name, None, None)
    assert str(found) == f"computed by cute_attn, kernel {asked[0].name}"


@interpreter
def test_packed_sequences_by_their_kernel(gpu):
    found = explain(*VARLEN, function=flash_fwd_varlen, causal=True, return_lse=True)
    assert (found.by, found.kernel) == ("cute_attn", plan.varlen(64, "bf16", True, gpu="NVIDIA H200").name)


@interpreter
def test_a_cache_by_its_kernel(gpu):
    """Planned by the queries of a sequence, and the page size where there are pages."""
    table = torch.zeros(1, 3, dtype=torch.int32)
    ask = dict(function=flash_fwd_kvcache, causal=True, cache_seqlens=40)
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    for how, page_size in ((dict(), None), (dict(page_table=table), 47)):
        want = plan.kvcache(64, "bf16", True, ratio=2, max_seqlen_q=33, page_size=page_size)
        assert explain(q, k, v, **ask, **how).kernel == want.name
    each = ask | dict(causal=torch.ones(1, dtype=torch.int32))
    assert "causal_of_each" in explain(q, k, v, **each).kernel
    assert explain(q.requires_grad_(), k, v, **ask).reason.startswith("it raises ValueError: q, k_cache, v_cache: one")


@interpreter
def test_whose_backward(gpu, monkeypatch):
    q = Q.clone().requires_grad_()
    assert explain(q, K, V).backward == "torch's FlashAttention-2"
    monkeypatch.setattr("cute_attn.backward.cudnn_serves", lambda *_: True)
    assert explain(q, K, V).backward == "torch's cuDNN"
    assert explain(q, K, V, window=(3, 3)).backward == "torch's FlashAttention-2"
    with torch.no_grad():
        assert explain(q, K, V).backward is None


def test_the_cpu_is_torchs():
    assert explain(Q, K, V) == ("torch in float32", None, "CPU tensors are computed by torch, in float32", None)
    assert explain(Q.clone().requires_grad_(), K, V).backward == "torch in float32"
    assert explain(*(x.half().numpy() for x in (Q, K, V))).by == "torch in float32"
    assert explain(*VARLEN, function=flash_fwd_varlen).by == "torch in float32"
    cache = (x.transpose(1, 2) for x in (Q, K, V))
    assert explain(*cache, function=flash_fwd_kvcache, cache_seqlens=3).by == "torch in float32"


NUMPY = np.ones((1, 2, 8, 16), np.float16)
WRONG = [
    dict(q=Q.float()),
    dict(q=Q[0]),
    dict(q=NUMPY[:, :, ::-1]),
    dict(zip("qkv", (NUMPY[:, :, ::-1], NUMPY, NUMPY), strict=True)),
    dict(causal=1),
    dict(scale=float("nan")),
    dict(out=Q),
    dict(rng_state=torch.zeros(2, dtype=torch.int64)),
    dict(q=Q.clone().requires_grad_(), softcap=1.0),
    dict(q=Q.clone().requires_grad_(), out=torch.empty_like(Q)),
    dict(sinks=torch.zeros(3)),
    dict(mask_mod=3),
    dict(window=5),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "_".join(wrong))
def test_what_raises_is_told_in_its_own_words(wrong):
    call = dict(q=Q, k=K, v=V) | wrong
    with pytest.raises((TypeError, ValueError)) as error:
        flash_fwd(**call)
    assert explain(**call) == ("nobody", None, f"it raises {error.type.__name__}: {error.value}", None)


def test_what_caches_raise():
    cache = dict(zip(("q", "k_cache", "v_cache"), (x.transpose(1, 2) for x in (Q, K, V)), strict=True), cache_seqlens=3)
    for wrong in (
        dict(cache_seqlens=48),
        dict(page_table=CU[0]),
        dict(out=cache["q"]),
        dict(window=3),
        dict(scale="1"),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            flash_fwd_kvcache(**cache | wrong)
        assert str(error.value) in explain(**cache | wrong, function=flash_fwd_kvcache).reason


def test_what_packed_sequences_raise():
    for wrong in (dict(max_seqlen_q=-1), dict(window=3), dict(scale="1"), dict(seqused_q=torch.ones(1))):
        with pytest.raises((TypeError, ValueError)) as error:
            flash_fwd_varlen(*VARLEN, **wrong)
        assert str(error.value) in explain(*VARLEN, function=flash_fwd_varlen, **wrong).reason


def test_only_what_is_ours_is_explained():
    with pytest.raises(TypeError, match=r"function: .* came; flash_fwd, flash_fwd_varlen, flash_fwd_kvcache, scaled"):
        explain(Q, K, V, function=torch.matmul)


def cuda(**changed):
    """What `sdpa.elsewhere` looks at first."""
    return SimpleNamespace(**dict(is_cuda=True, dtype=torch.bfloat16, device="cuda:0") | changed)


def test_torchs_sdpa_without_flash_attention():
    found = explain(Q, K, V, function=F.scaled_dot_product_attention, is_causal=True)
    assert found.by == "torch, by another backend than flash attention" and "query: on cpu" in found.reason
    how = dict(dropout_p=0.0, is_causal=False, enable_gqa=False)
    k = v = None
    assert "attn_mask: flash attention takes none" in sdpa.elsewhere(cuda(), k, v, attn_mask=Q, **how)
    assert "query: torch.float32" in sdpa.elsewhere(cuda(dtype=torch.float32), k, v, attn_mask=None, **how)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "sdpa_kernel, excludes it" in sdpa.elsewhere(cuda(), k, v, attn_mask=None, **how)


@interpreter
def test_torchs_sdpa_by_flash_attention(gpu, monkeypatch):
    monkeypatch.setattr(sdpa, "elsewhere", lambda *_: None)
    ask = dict(function=F.scaled_dot_product_attention)
    assert explain(Q, K, V, **ask).by == "cute_attn"
    assert explain(Q.clone().requires_grad_(), K, V, **ask).backward == "torch's FlashAttention-2"
    for how, why in (
        (dict(dropout_p=0.5), "dropout_p 0.5"),
        (dict(is_causal=True, scale=float("inf")), "it raises ValueError: scale: inf is not finite"),
    ):
        found = explain(Q, K, V, **how, **ask)
        assert found.by == "torch's flash attention" and why in found.reason
    assert "head_dim 64 of query, 32 of value" in explain(Q, K, V[..., :32], **ask).reason
    assert "scale -1.0" in explain(Q.clone().requires_grad_(), K, V, scale=-1.0, **ask).reason


def model(query=Q, mask=None, **how):
    return MODULE, query[:, :, :33], K[:, :, :33], V[:, :, :33], mask, *how.values()


@interpreter
def test_transformers_calls(gpu):
    ask = dict(function=cute.attention)
    want = plan.plan(Problem(1, 4, 2, 33, 33, 64, causal=True), "NVIDIA H200").name
    assert explain(*model(), **ask) == ("cute_attn", want, None, None)
    among = Padding(torch.ones(1, 33, dtype=torch.bool), 33, True, None)
    padded = LazyMask(lambda: None, (1, 1, 33, 33), "cpu", 33, True, None, among)
    assert "sparse" in explain(*model(mask=padded), **ask).kernel
    for call, how, why in (
        (model(Q.float()), {}, "query: torch.float32"),
        (model(mask=torch.ones(1, 1, 33, 33, dtype=torch.bool)), {}, "attention_mask: a tensor of its own"),
        (model(Q.clone().requires_grad_(), padded), {}, "attention_mask: padding"),
        (model(), dict(dropout=0.1), "dropout"),
        (model(), dict(position_bias=Q), "position_bias: the kernel has none"),
    ):
        found = explain(*call, **how, **ask)
        assert found.by == "transformers' sdpa attention" and why in found.reason and found.kernel is None
    found = explain(*model(Q.clone().requires_grad_()), softcap=5.0, **ask)
    assert found.by == "the model's own eager attention" and "no backward" in found.reason
    assert "NotImplementedError: indices" in explain(*model(), indices=Q, **ask).reason


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    with caplog.at_level(logging.INFO, logger="cute_attn"):
        yield caplog


def test_a_fallback_is_told_once_for_each_reason(said):
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    for _ in range(2):
        cute.attention(*model(Q.float())[:2], *(x[:, :, :33].float() for x in (K, V)), None)
        cute.attention(*model(mask=mask))
        cute.attention(*model())
    ours = "SimpleNamespace: computed by transformers' sdpa attention, not by cute_attn: "
    first, second, third = said.messages
    assert first.startswith(f"{ours}query: torch.float32") and second.startswith(f"{ours}attention_mask: a tensor")
    assert third == "flash_fwd: CPU tensors are computed by torch, in float32"
    assert {record.levelno for record in said.records} == {logging.INFO}


def test_torchs_flash_attention_is_told(said, monkeypatch):
    monkeypatch.setattr(sdpa, "torchs", lambda *_: None)
    for _ in range(2):
        sdpa.attention(Q, K, V, 0.5)
        sdpa.attention(Q.float(), K.float(), V.float())
    of = "scaled_dot_product_attention: computed by torch's flash attention, not by cute_attn: "
    assert [x.removeprefix(of)[:16] for x in said.messages] == ["dropout_p 0.5: d", "q: torch.float32"]


def test_nothing_is_told_unasked(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    with caplog.at_level(logging.WARNING, logger="cute_attn"):
        flash_fwd(Q, K, V)
    assert not caplog.records and not notices._said


def test_a_fallback_compiles_whole(said):
    """The logger is not asked while torch.compile traces."""
    call = torch.compile(lambda q, k, v: cute.attention(MODULE, q, k, v, None)[0], backend="eager", fullgraph=True)
    q, k, v = (x[:, :, :33].float() for x in (Q, K, V))
    torch.testing.assert_close(call(q, k, v), cute.attention(MODULE, q, k, v, None)[0])
    assert len(said.messages) == 1


@pytest.mark.gpu
def test_what_a_gpu_runs():
    q, k, v = inputs(*SIZES)
    found = explain(q, k, v, causal=True)
    assert found.by == "cute_attn" and found.kernel.startswith("flash_fwd_sm90_bf16_d64_causal")
    q, k, v = inputs(2, 4, 4, 128, 128, 64)
    ask = dict(function=F.scaled_dot_product_attention)
    with sdpa.use():
        assert explain(q, k, v, **ask).by == "cute_attn"
        assert "takes none" in explain(q, k, v, torch.ones(128, 128, dtype=torch.bool, device="cuda"), **ask).reason
        found = explain(q[..., :60], k[..., :60], v[..., :60], **ask)
        assert found.by != "cute_attn" and found.reason
        wrong = explain(q, k[:, :3], v[:, :3], **ask)
        assert wrong.by != "cute_attn" and wrong.reason
