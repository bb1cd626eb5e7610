"""FlashAttention-3's interface: its arguments, what they become, what raises, and the numbers."""

import importlib.util
import inspect

import numpy as np
import pytest
import torch

from cute_attn import api, flash_fwd_kvcache, reference
from cute_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from cute_attn.tools.benchmark.edges import sdpa
from tests.support.attention import bound, inputs

# hopper/flash_attn_interface.py at Dao-AILab/flash-attention 0251105 (2026-08-15)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
REST = (
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, "
    "return_attn_probs=False"
)
SIGNATURES = {
    flash_attn_func: f"(q, k, v, {REST})",
    flash_attn_varlen_func: f"(q, k, v, {LENGTHS}{REST})",
}
KVCACHE = (
    "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, sinks=None)"
)
functions = pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)


def words(function):
    """Its signature without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


@functions
def test_the_signature_is_flash_attention_3s(function):
    assert words(function) == SIGNATURES[function]


@functions
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn_interface") is None, reason="FlashAttention-3 is not installed"
)
def test_the_signature_is_the_installed_one(function):
    import flash_attn_interface

    assert words(function) == words(getattr(flash_attn_interface, function.__name__))


def bshd(**sizes):
    return inputs(*{**dict(b=2, h=4, hk=2, sq=37, sk=53, d=32), **sizes}.values(), device="cpu", layout="bshd")


@pytest.fixture
def asked(monkeypatch):
    """What flash_fwd is asked for."""
    seen = []
    monkeypatch.setattr(api, "flash_fwd", lambda q, k, v, **how: seen.append(how))
    return seen


@pytest.mark.parametrize(
    ("window_size", "causal", "window"),
    [
        ((-1, -1), False, None),
        ((-1, -1), True, None),
        ((5, -1), False, (5, None)),
        ((-1, 3), False, (None, 3)),
        ((0, 0), False, (0, 0)),
        ([5, 3], False, (5, 3)),
        ((None, None), False, None),
        (np.array([5, -1]).tolist(), False, (5, None)),
        (tuple(np.array([5, 3])), False, (5, 3)),
        ((5, 3), True, (5, None)),  # causality bounds the right side, whatever comes
        ((-1, 3), True, None),
        ((0, -1), True, (0, None)),
    ],
)
def test_windows(window_size, causal, window, asked):
    flash_attn_func(*bshd(), window_size=window_size, causal=causal)
    assert asked[0]["window"] == window and asked[0]["causal"] is causal


def test_what_flash_fwd_is_asked_for(asked):
    flash_attn_func(*bshd())
    assert asked.pop() == dict(
        causal=False, scale=None, window=None, softcap=None, layout="bshd", return_lse=False, attention_chunk=None
    )
    flash_attn_func(*bshd(), 0.3, True, softcap=20.0, return_attn_probs=True)
    assert asked.pop() == dict(
        causal=True, scale=0.3, window=None, softcap=20.0, layout="bshd", return_lse=True, attention_chunk=None
    )
    for hint in (dict(num_splits=0), dict(num_splits=4), dict(pack_gqa=True), dict(pack_gqa=False), dict(sm_margin=8)):
        flash_attn_func(*bshd(), **hint)
        assert asked.pop() == dict(
            causal=False, scale=None, window=None, softcap=None, layout="bshd", return_lse=False, attention_chunk=None
        )


WRONG = [
    (dict(qv=torch.zeros(1)), NotImplementedError, "qv: not supported; torch.cat"),
    (dict(q_descale=torch.ones(1)), NotImplementedError, "q_descale: not supported; FP8"),
    (dict(k_descale=torch.ones(1)), NotImplementedError, "k_descale: not supported; FP8"),
    (dict(v_descale=torch.ones(1)), NotImplementedError, "v_descale: not supported; FP8"),
    (dict(attention_chunk=-64), TypeError, "attention_chunk: -64 came; a number of keys is needed, 0 for no chunks"),
    (dict(window_size=(-2, -1)), ValueError, "window_size: -2 is below -1"),
    (dict(window_size=("1", -1)), TypeError, "window_size: '1' came; an int"),
    (dict(window_size=(-1, True)), TypeError, "window_size: True came; an int"),
    (dict(deterministic="x"), TypeError, "deterministic: a bool is needed, 'x' came"),
    (dict(causal=0), TypeError, "causal: a bool is needed, 0 came"),
    (dict(return_attn_probs=1), TypeError, "return_attn_probs: a bool is needed, 1 came"),
    (dict(attention_chunk=None), TypeError, "attention_chunk: None came; a number of keys"),
    (dict(attention_chunk=False), TypeError, "attention_chunk: False came"),
    (dict(softcap=False), TypeError, "softcap: False came; a number is needed, 0.0 for no cap"),
    (dict(softcap=None), TypeError, "softcap: None came"),
    (dict(softcap=""), TypeError, "softcap: '' came"),
    (dict(window_size=5), ValueError, "window_size: 5 came; a pair"),
    (dict(window_size=(1, 2, 3)), ValueError, "window_size: .* came; a pair"),
    (dict(num_splits=-1), ValueError, "num_splits: -1 came"),
    (dict(sm_margin=None), ValueError, "sm_margin: None came"),
    (dict(pack_gqa=1), ValueError, "pack_gqa: 1 came"),
]


@functions
@pytest.mark.parametrize(
    ("wrong", "error", "message"), WRONG, ids=lambda x: "" if not isinstance(x, dict) else next(iter(x))
)
def test_what_is_not_supported_raises_by_name(function, wrong, error, message, asked):
    lengths = () if function is flash_attn_func else (None, None, 1, 1)
    with pytest.raises(error, match=message):
        function(*bshd(), *lengths, **wrong)
    assert not asked


def test_deterministic_gradients_need_torchs_mode(one_thread):
    q, k, v = (x.requires_grad_() for x in bshd())
    with pytest.raises(ValueError, match="deterministic: True came with gradients"):
        flash_attn_func(q, k, v, deterministic=True)
    with torch.no_grad():
        flash_attn_func(q, k, v, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert flash_attn_func(q, k, v, deterministic=True).requires_grad
    finally:
        torch.use_deterministic_algorithms(False)


CASES = [
    (dict(), dict()),
    (dict(causal=True), dict(causal=True)),
    (dict(causal=True, window_size=(7, 7)), dict(causal=True, window=(7, None))),
    (dict(window_size=(7, 3), softmax_scale=0.3), dict(window=(7, 3), scale=0.3)),
    (dict(causal=True, softcap=2.0, softmax_scale=1.0), dict(causal=True, softcap=2.0, scale=1.0)),
]


def numbers(device, call, definition):
    q, k, v = (x.to(device) for x in bshd())
    o, lse = flash_attn_func(q, k, v, **call, return_attn_probs=True)
    assert torch.equal(flash_attn_func(q, k, v, **call), o) and o.shape == q.shape and o.dtype == q.dtype
    want, want_lse = reference.attention(q, k, v, **definition, layout="bshd")
    o, want, q, k, v = (x.transpose(1, 2) for x in (o, want, q, k, v))
    if "softcap" in definition:
        torch.testing.assert_close(o.double(), want, atol=0.02, rtol=0.02)
    else:
        bound(o, want, sdpa(q, k, v, **dict(causal=False) | definition))
    assert lse.shape == (2, 4, 37) and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("call", "definition"), CASES, ids=str)
def test_numbers_on_the_cpu(call, definition, one_thread):
    numbers("cpu", call, definition)


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "definition"), CASES, ids=str)
def test_numbers_on_the_gpu(call, definition):
    numbers("cuda", call, definition)


def test_gradients(one_thread):
    q, k, v = (x.requires_grad_() for x in bshd())
    grad = torch.randn(2, 37, 4, 32).bfloat16()
    o, lse = flash_attn_func(q, k, v, causal=True, window_size=(9, -1), return_attn_probs=True)
    found = torch.autograd.grad(o, (q, k, v), grad)
    how = dict(causal=True, window=(9, None), layout="bshd")
    for mine, want in zip(found, reference.gradients(grad, q.detach(), k.detach(), v.detach(), **how), strict=True):
        torch.testing.assert_close(mine.double(), want, atol=0.05, rtol=0.02)
    assert not lse.requires_grad


def packed(device, causal, window_size, window):
    """Three sequences, one of them empty, each beside the definition of itself."""
    seqlens_q, seqlens_k = (37, 0, 64), (53, 11, 64)
    q = torch.randn(sum(seqlens_q), 4, 32, device=device).bfloat16()
    k, v = torch.randn(2, sum(seqlens_k), 2, 32, device=device).bfloat16()
    starts_q, starts_k = (
        torch.tensor((0, *seqlens), device=device).cumsum(0).int() for seqlens in (seqlens_q, seqlens_k)
    )
    how = dict(causal=causal, window_size=window_size)
    call = q, k, v, starts_q, starts_k, max(seqlens_q), max(seqlens_k)
    o, lse = flash_attn_varlen_func(*call, **how, return_attn_probs=True)
    assert torch.equal(flash_attn_varlen_func(*call, **how), o) and o.shape == q.shape and lse.shape == (4, len(q))
    parts = zip(*(x.split(seqlens_q) for x in (q, o, lse.T)), *(x.split(seqlens_k) for x in (k, v)), strict=True)
    for q, o, lse, k, v in parts:
        q, o, k, v = (x.transpose(0, 1)[None] for x in (q, o, k, v))
        want, want_lse = reference.attention(q, k, v, causal=causal, window=window)
        if q.numel():
            bound(o, want, sdpa(q, k, v, causal=causal, window=window))
            torch.testing.assert_close(lse.T[None].double(), want_lse, rtol=1e-5, atol=1e-4)


PACKED = [(False, (-1, -1), None), (True, (-1, -1), None), (True, (9, 9), (9, None)), (False, (9, 4), (9, 4))]


@pytest.mark.parametrize(("causal", "window_size", "window"), PACKED)
def test_packed_sequences_on_the_cpu(causal, window_size, window, one_thread):
    packed("cpu", causal, window_size, window)


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window_size", "window"), PACKED)
def test_packed_sequences_on_the_gpu(causal, window_size, window):
    packed("cuda", causal, window_size, window)


# Over a cache
def test_the_signature_over_a_cache():
    assert words(flash_attn_with_kvcache) == KVCACHE


CALL = dict(page_table=torch.tensor([[2, 0, 3], [1, 4, -1]], dtype=torch.int32), causal=True)


def cache(where="cpu"):
    """q, caches of five pages of 16, and new tokens."""
    torch.manual_seed(1)
    q, *caches = (torch.randn(*s, 64, device=where).bfloat16() for s in ((2, 3, 4), (5, 16, 2), (5, 16, 2)))
    new = dict(zip("kv", (torch.randn(2, 3, 2, 64, device=where).bfloat16() for _ in range(2)), strict=True))
    seqlens = torch.tensor([33, 5], dtype=torch.int32, device=where)
    return q, caches, dict(cache_seqlens=seqlens, page_table=CALL["page_table"].to(where)), new


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_over_a_cache(where):
    """As flash_fwd_kvcache, in the same words and others; appended and rotated."""
    q, caches, places, new = cache(where)
    angles = torch.rand(60, 16, device=where)
    turn = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=False)
    sinks = torch.rand(4, device=where)
    ours = [x.clone() for x in caches]
    how = dict(causal=True, softcap=2.0, sinks=sinks)
    want = flash_fwd_kvcache(q, *ours, **places, **new, **turn, **how, scale=0.2, window=(20, 0), return_lse=True)
    found = flash_attn_with_kvcache(
        q, *caches, **places, **new, **turn, **how, softmax_scale=0.2, window_size=[20, -1], return_softmax_lse=True
    )
    for x, y in zip((*found, *caches), (*want, *ours), strict=True):
        assert torch.equal(x, y)


def test_defaults_over_a_cache():
    """Full caches, no lse; chunks and a window by a tensor."""
    q, caches, _, _ = cache()
    two = [x[:2] for x in caches]
    want = flash_fwd_kvcache(q, *two, cache_seqlens=16)
    assert torch.equal(flash_attn_with_kvcache(q, *two), want)
    whole = flash_fwd_kvcache(q, *caches, cache_seqlens=48, page_table=CALL["page_table"].abs(), attention_chunk=10)
    how = dict(page_table=CALL["page_table"].abs(), attention_chunk=10)
    assert torch.equal(flash_attn_with_kvcache(q, *caches, **how), whole)
    near = flash_fwd_kvcache(q, *two, cache_seqlens=16, window=(3, 1))
    assert torch.equal(flash_attn_with_kvcache(q, *two, window_size=torch.tensor([3, 1])), near)


def test_pairs_of_columns_without_rotary():
    """As there, no word of them is needed."""
    q, caches, places, _ = cache()
    found = (flash_attn_with_kvcache(q, *caches, **places, rotary_interleaved=x) for x in (True, False))
    assert torch.equal(*found)


def test_no_scheduler_metadata_is_needed():
    q, caches, places, _ = cache()
    made = get_scheduler_metadata(2, 3, 48, 4, 2, 64, places["cache_seqlens"], torch.bfloat16, causal=True)
    assert made is None
    assert flash_attn_with_kvcache(q, *caches, **places, scheduler_metadata=made).shape == q.shape
    with pytest.raises(ValueError, match="scheduler_metadata: get_scheduler_metadata gives None here"):
        flash_attn_with_kvcache(q, *caches, **places, scheduler_metadata=torch.zeros(3))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(qv=torch.zeros(1)), NotImplementedError, "qv: not supported"),
        (dict(k_descale=torch.zeros(1)), NotImplementedError, "k_descale: not supported; FP8"),
        (dict(num_splits=-1), ValueError, "num_splits: -1 came"),
        (dict(return_softmax_lse=1), TypeError, "return_softmax_lse: a bool is needed"),
        (dict(rotary_cos=torch.ones(3, 8)), ValueError, "k: None came with rotary_cos"),
        (dict(window_size=(3, 3), attention_chunk=4), ValueError, "attention_chunk: given with window"),
    ],
)
def test_what_is_wrong_over_a_cache(wrong, error, message):
    q, caches, places, _ = cache()
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(q, *caches, **places, **wrong)


def test_chunks_of_dense_and_packed_sequences():
    q, k, v = bshd()
    want = api.flash_fwd(q, k, v, layout="bshd", attention_chunk=9, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, causal=True, attention_chunk=9), want)
    cu_q, cu_k = (torch.arange(3, dtype=torch.int32) * n for n in (37, 53))
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    found = flash_attn_varlen_func(*packed, cu_q, cu_k, 37, 53, causal=True, attention_chunk=9)
    assert torch.equal(found.view_as(want), want)
