"""flash_fwd_kvcache: right for every cache, and no row or page is read but the sequences' own."""

from itertools import product
from math import gcd
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cute_attn import compile, flash_fwd, flash_fwd_kvcache, kvcache_checks, plan, request, warmup, workspace
from cute_attn.checks import SIZE_MAX, Spec
from cute_attn.kernels.config import PART_COUNTERS, FwdConfig
from cute_attn.kernels.mask import CausalOfEach
from cute_attn.kernels.state import SLACK
from cute_attn.kvcache_operands import Cached
from cute_attn.plan import EVERY_HEAD_DIM, FeatureKey
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.attention import DTYPES
from tests.support.kvcache import NO_PAGES, STORAGE, check, dense, edges, heads_first, interleaved, marked, paged, right
from tests.support.mods import mask_mods
from tests.support.nightly import sample, where
from tests.support.requirements import interpreter
from tests.support.varlen import int32
from tests.support.varlen_modifiers import HEADS, cases, functions

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MASKS = {
    "full": dict(),
    "causal": dict(causal=True),
    "window": dict(window=(20, 2)),
    "causal window": dict(causal=True, window=(70, None)),
    "no left": dict(window=(None, 7)),
}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
EACH_STORAGE = pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
KINDS = {
    "dense": lambda lengths, **how: dense(lengths, 150, **how),
    "index": lambda lengths, **how: dense(lengths, 150, index=True, **how),
    "leftpad": lambda lengths, **how: dense(lengths, 150, index=True, leftpad=True, **how),
    "pages of 1": lambda lengths, **how: paged(lengths, 1, **how),
    "pages of 5": lambda lengths, **how: paged(lengths, 5, shared=3, **how),
    "pages of 16": lambda lengths, **how: paged(lengths, 16, shared=2, **how),
    "pages of 64": lambda lengths, **how: paged(lengths, 64, **how),
    "pages of 48": lambda lengths, **how: paged(lengths, 48, **how),
    "pages of 256": lambda lengths, **how: paged(lengths, 256, **how),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LENGTHS = edges(16)
FEW = [0, 1, 65, 130, 17]
pytestmark = pytest.mark.usefixtures("one_thread")


# Right
@EACH_KIND
@EACH_MASK
def test_on_the_cpu(mask, kind):
    for dtype in DTYPES:
        check(kind(LENGTHS, dtype=dtype), **mask)
        check(kind(LENGTHS, dtype=dtype, seqlen_q=5, heads=6, heads_kv=1), **mask, scale=-0.3, lse=False)
        check(kind(FEW, dtype=dtype, packed=[3, 0, 1, 70, 5]), **mask)


@EACH_STORAGE
def test_strides(storage):
    for how in (dict(), dict(d=32, d_v=96), dict(heads_kv=1, heads=4), dict(d=8)):
        check(paged(LENGTHS, 16, storage=storage, shared=2, seqlen_q=3, **how), causal=True)
        check(dense(LENGTHS, 140, storage=storage, index=True, leftpad=True, **how), causal=True)
        check(dense([3], 40, storage=storage, **how))


@pytest.mark.parametrize("head_dim", [8, 40, 128, 256, 512])
def test_head_dims(head_dim):
    check(paged(FEW, 16, d=head_dim, seqlen_q=2), causal=True)
    check(paged(FEW, 16, d=head_dim, d_v=72, seqlen_q=2), causal=True)


@DEVICES
@pytest.mark.parametrize("name", {**cases("cpu"), **functions("cpu")})
def test_what_changes_scores(name, where):
    """Each sequence as if it were alone, under its own number: there are as many as `cases` has slopes for."""
    how, lengths = {**cases(where), **functions(where)}[name], [1, 0, 63, 17, 33, 130]
    check(paged(lengths, 16, heads=HEADS, seqlen_q=3, where=where), **how)
    check(dense(lengths, 150, heads=HEADS, leftpad=True, packed=[1, 0, 2, 0, 33, 70], where=where), **how)


def test_one_length_for_all():
    case = dense([70] * 3, 90, seqlen_q=3)
    tensor = check(case, causal=True)
    for number in (70, np.int64(70)):
        case.how.update(cache_seqlens=number)
        assert all(map(torch.equal, check(case, causal=True), tensor))
    padded = dense([70] * 4, 90, leftpad=True)
    padded.how.update(cache_seqlens=70)
    check(padded)


@pytest.mark.parametrize("kind", ["dense", "pages of 5", "leftpad"])
def test_lengths_end_with_the_cache(kind):
    """Whatever they say; below 0 there are none."""
    case = KINDS[kind]([150, 0, 150, 0])
    if kind == "pages of 5":
        case.how.update(page_table=case.how["page_table"][:, :30].contiguous())
    case.how.update(cache_seqlens=int32([151, -1, 2**31 - 1, -(2**31)], "cpu"))
    check(case)


def test_without_keys():
    """No rows in the cache, no pages in a sequence, no pages at all, a sink beside nothing."""
    q = torch.randn(2, 3, 4, 64).bfloat16()
    table = torch.zeros(2, 3, dtype=torch.int32)
    for k, how in (
        (q[:, :0, :2], dict()),
        (q[:, :, :2], dict()),
        (q[:, :, :2], dict(page_table=table[:, :0])),
        (q[:0, :, :2], dict(page_table=table)),
    ):
        o, lse = flash_fwd_kvcache(q, k, k, cache_seqlens=0, return_lse=True, **how)
        assert (o == 0).all() and (lse == -torch.inf).all() and o.shape == q.shape and lse.shape == (2, 4, 3)
        sinks = torch.arange(4.0)
        o, lse = flash_fwd_kvcache(q, k, k, cache_seqlens=0, return_lse=True, sinks=sinks, **how)
        assert (o == 0).all() and torch.equal(lse, sinks[:, None].expand(2, 4, 3))
    for batch, seqlen_q in ((0, 3), (2, 0)):
        o, lse = flash_fwd_kvcache(q[:batch, :seqlen_q], q[:batch], q[:batch], cache_seqlens=0, return_lse=True)
        assert o.shape == (batch, seqlen_q, 4, 64) and lse.shape == (batch, 4, seqlen_q)


def test_each_sequence_causal_or_not():
    case = paged([40, 3, 9, 70], 16, seqlen_q=5)
    each = int32([1, 0, 1, 0], "cpu")
    check(case, causal=each)
    check(case, causal=each, window=(4, 2))
    o, ones = (flash_fwd_kvcache(**case.call, causal=causal) for causal in (True, torch.ones_like(each)))
    assert torch.equal(o, ones)
    assert torch.equal(o, flash_fwd_kvcache(**case.call, causal=each, window=(None, 0))), "all end at the diagonal"
    function = torch.compile(flash_fwd_kvcache, fullgraph=True, backend="aot_eager")
    assert torch.equal(o, function(**case.call, causal=each, window=(None, 0)))


def test_as_flash_fwd():
    """Over a dense cache that is full."""
    q, (k, v) = torch.randn(2, 5, 4, 64).half(), torch.randn(2, 2, 70, 2, 64).half()
    for mask in MASKS.values():
        want = flash_fwd(q, k, v, layout="bshd", return_lse=True, **mask)
        assert all(map(torch.equal, want, flash_fwd_kvcache(q, k, v, cache_seqlens=70, return_lse=True, **mask)))


@pytest.mark.parametrize("name", ["page_table", "cache_batch_idx"])
def test_what_is_not_in_the_cache_raises_on_the_cpu(name):
    case = paged([40, 40], 16) if name == "page_table" else dense([40, 40], 50, index=True)
    for wrong in (-1, 99):
        case.how[name][(0, 0) if name == "page_table" else 1] = wrong
        with pytest.raises(ValueError, match=f"{name}: {wrong} came for sequence .; from 0 to . lie in the cache"):
            flash_fwd_kvcache(**case.call)


# Wrong
Q, KV = torch.zeros(2, 3, 4, 16, dtype=torch.float16), torch.zeros(2, 10, 2, 16, dtype=torch.float16)
TABLE, B, CU = torch.zeros(2, 3, dtype=torch.int32), int32([1, 0], "cpu"), int32([0, 4, 6], "cpu")
PACKED = dict(q=Q.flatten(0, 1), cu_seqlens_q=CU)
WRONG = {
    "q dims": (
        dict(q=Q[0]),
        ValueError,
        r"q: 3 dimensions, .*; 4 are needed: \(B, Sq, H, D\), or \(total_q, H, D\) wi",
    ),
    "q packed": (dict(cu_seqlens_q=CU), ValueError, "q: 4 dimensions, .*; 3 are needed with cu_seqlens_q"),
    "q list": (dict(q=[1]), TypeError, "q: a torch.Tensor is needed, builtins.list came"),
    "q numpy": (dict(q=Q.numpy()), TypeError, "q: a torch.Tensor is needed, numpy.ndarray came; torch.from_dlpack"),
    "q type": (dict(q=Q.float()), TypeError, "q: torch.float32 is not supported"),
    "q head dim": (dict(q=Q[..., :12]), ValueError, "q: head_dim 12 is not supported"),
    "k list": (dict(k_cache=[1]), TypeError, "k_cache: a torch.Tensor is needed, builtins.list came"),
    "k dims": (dict(k_cache=KV[0]), ValueError, r"k_cache: 3 dimensions, .*; 4 are needed: \(B_cache, S, Hk, D\)"),
    "k pages": (
        dict(k_cache=KV[0], page_table=TABLE),
        ValueError,
        r"4 are needed with page_table: \(pages, page_size, Hk, D\)",
    ),
    "k type": (dict(k_cache=KV.bfloat16()), TypeError, "k_cache: torch.bfloat16 does not match q's torch.float16"),
    "k float8": (dict(v_cache=KV.to(torch.float8_e4m3fn)), TypeError, "v_cache: torch.float8_e4m3fn is not supported"),
    "k sparse": (dict(k_cache=KV.to_sparse()), TypeError, "k_cache: a dense tensor is needed"),
    "k D": (dict(k_cache=KV[..., :8]), ValueError, r"k_cache: shape \(2, 10, 2, 8\) does not fit q's .* with q's D"),
    "v shape": (dict(v_cache=KV[:, :9]), ValueError, r"v_cache: shape \(2, 9, 2, 16\) does not fit k_cache's"),
    "heads": (dict(q=Q[:, :, :3]), ValueError, "k_cache: 2 heads do not divide q's 3"),
    "more": (
        dict(q=Q[:1], cache_seqlens=3),
        ValueError,
        r"k_cache: of 2 sequences came with q's 1; pass k_cache\[:1\]",
    ),
    "fewer": (
        dict(k_cache=KV[:1], v_cache=KV[:1]),
        ValueError,
        "q's 2; pass a longer cache, or say by cache_batch_idx",
    ),
    "no lengths": (dict(cache_seqlens=None), TypeError, "cache_seqlens: None came; an int32 tensor"),
    "length float": (dict(cache_seqlens=3.0), TypeError, "cache_seqlens: 3.0 came; an int32 tensor"),
    "length bool": (dict(cache_seqlens=True), TypeError, "cache_seqlens: True came"),
    "length list": (dict(cache_seqlens=[3, 4]), TypeError, r"cache_seqlens: \[3, 4\] came"),
    "length array": (dict(cache_seqlens=np.array([3, 4])), TypeError, r"cache_seqlens: array\(\[3, 4\]\) came"),
    "length": (
        dict(cache_seqlens=11),
        ValueError,
        "cache_seqlens: 11 came; from 0 to 10 keys lie in a sequence's part",
    ),
    "length below": (dict(cache_seqlens=-1), ValueError, "cache_seqlens: -1 came; from 0 to 10"),
    "length of pages": (dict(cache_seqlens=31, page_table=TABLE), ValueError, "31 came; from 0 to 30"),
    "lengths int64": (
        dict(cache_seqlens=B.long()),
        TypeError,
        "cache_seqlens: torch.int64 came, torch.int32 is needed",
    ),
    "lengths count": (dict(cache_seqlens=CU), ValueError, r"cache_seqlens: shape \(3,\) came, \(2,\) is needed"),
    "lengths stride": (dict(cache_seqlens=TABLE[:, 0]), ValueError, "cache_seqlens: stride 3 came, 1 is needed"),
    "table list": (dict(page_table=[[0]]), TypeError, "page_table: a torch.Tensor is needed, builtins.list came"),
    "table int64": (dict(page_table=TABLE.long()), TypeError, "page_table: torch.int64 came, torch.int32 is needed"),
    "table dims": (dict(page_table=TABLE[0]), ValueError, r"page_table: shape \(3,\) came, \(2, pages_per_seq\) is"),
    "table rows": (dict(page_table=TABLE[:1]), ValueError, r"page_table: shape \(1, 3\) came, \(2, pages_per_seq\) is"),
    "table stride": (
        dict(page_table=TABLE.T[:2]),
        ValueError,
        "page_table: stride 3 in the last dimension, 1 is needed",
    ),
    "table reach": (
        dict(page_table=TABLE[:, :1].expand(2, 2**28)),
        ValueError,
        "page_table: stride 0 in the last dimension",
    ),
    "index list": (dict(cache_batch_idx=[0, 1]), TypeError, "cache_batch_idx: a torch.Tensor is needed"),
    "index count": (dict(cache_batch_idx=CU), ValueError, r"cache_batch_idx: shape \(3,\) came, \(2,\) is needed"),
    "index and table": (
        dict(cache_batch_idx=B, page_table=TABLE),
        ValueError,
        r"cache_batch_idx: given with page_table, .*; pass page_table\[cache_batch_idx\] alone",
    ),
    "leftpad type": (
        dict(cache_leftpad=B.float()),
        TypeError,
        "cache_leftpad: torch.float32 came, torch.int32 is needed",
    ),
    "leftpad and table": (
        dict(cache_leftpad=B, page_table=TABLE),
        ValueError,
        "cache_leftpad: given with page_table, .*; leave whole pages out of page_table",
    ),
    "cu int64": (PACKED | dict(cu_seqlens_q=CU.long()), TypeError, "cu_seqlens_q: torch.int64 came"),
    "cu empty": (PACKED | dict(cu_seqlens_q=CU[:0]), ValueError, r"cu_seqlens_q: shape \(0,\) came, \(B \+ 1,\) is"),
    "cu count": (PACKED | dict(cu_seqlens_q=CU[:2]), ValueError, r"cache_seqlens: shape \(2,\) came, \(1,\) is needed"),
    "hint": (dict(max_seqlen_q=3), ValueError, "max_seqlen_q: given without cu_seqlens_q, .*; omit it"),
    "hint tensor": (PACKED | dict(max_seqlen_q=B[0]), TypeError, "max_seqlen_q: an int or None is needed"),
    "causal": (dict(causal=1), TypeError, "causal: a bool is needed, 1 came"),
    "causal bools": (dict(causal=B.bool()), TypeError, "causal: torch.bool came, torch.int32 is needed"),
    "causal count": (dict(causal=CU), ValueError, r"causal: shape \(3,\) came, \(2,\) is needed"),
    "window": (dict(window=3), TypeError, "window: 3 came; a pair"),
    "scale": (dict(scale=float("nan")), ValueError, "scale: nan is not finite"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap: -1.0 came"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes: .*; \(4,\) or \(2, 4\) is needed"),
    "aux": (dict(aux=(1,)), ValueError, "aux: 1 came without a score_mod or a mask_mod"),
    "return_lse": (dict(return_lse=1), TypeError, "return_lse: a bool is needed, 1 came"),
    "out shape": (dict(out=Q[:, :2].clone()), ValueError, r"out: shape \(2, 2, 4, 16\) is not q's \(2, 3, 4, 16\)"),
    "out dims": (PACKED | dict(out=Q.clone()), ValueError, "out: 4 dimensions"),
    "out is q": (dict(out=Q), ValueError, "out: shares memory with q"),
    "out is the cache": (dict(out=KV[:, :6].unflatten(1, (3, 2)).flatten(2, 3)), ValueError, "memory with k_cache"),
    "out type": (dict(out=Q.bfloat16()), TypeError, "out: torch.bfloat16 came, q's torch.float16 is needed"),
    "out twice": (dict(out=Q[:, :1].expand(2, 3, 4, 16)), ValueError, "out: strides .* more than once"),
    "tiles": (
        dict(q=Q[:, :1, :1].expand(2, 2**29, 64, 16), k_cache=KV[:, :, :1], v_cache=KV[:, :, :1]),
        ValueError,
        "q: 1073741824 tiles of 64 rows in one call; split the batch",
    ),
    "keys": (
        dict(k_cache=KV[:, :1].expand(2, 2**30 + 1, 2, 16), v_cache=KV[:, :1].expand(2, 2**30 + 1, 2, 16)),
        ValueError,
        "k_cache: 1073741825 keys in a sequence; at most",
    ),
}


def asked(**changes):
    return dict(q=Q, k_cache=KV, v_cache=KV.clone(), cache_seqlens=B) | changes


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    changes, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        flash_fwd_kvcache(**asked(**changes))


def _padded(*shape):
    """Rows at no multiple of 8 elements."""
    return torch.zeros(*shape[:-1], shape[-1] + 4, dtype=torch.float16)[..., : shape[-1]]


WRONG_ON_A_GPU = {
    "rows before the batch": (
        dict(q=Q.transpose(0, 1).contiguous().transpose(0, 1)),
        r"q: strides \(64, 128, 16, 1\) of shape .*: the batch's stride is no multiple of the row's, .*q.contig",
    ),
    "overlapping": (
        dict(q=torch.zeros(999).half().as_strided(Q.shape, (64, 64, 16, 1))),
        "q: strides .* at least Sq rows",
    ),
    "odd batch": (dict(q=torch.zeros(999).half().as_strided(Q.shape, (200, 64, 16, 1))), "q: strides .*no multiple"),
    "out": (dict(out=Q.transpose(0, 1).contiguous().transpose(0, 1)), "out: strides .*; use out.contiguous"),
    "k stride": (dict(k_cache=_padded(2, 10, 2, 16)), r"k_cache: stride 20 in dimension 2, .* \(16 bytes\) is needed"),
    "v last": (
        dict(v_cache=KV.transpose(2, 3).contiguous().transpose(2, 3)),
        "v_cache: stride 2 in the last dimension",
    ),
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Of calls on CPU tensors: what they launch, by a kernel that does nothing; they are planned as varlen."""
    launched = []

    def made(*arguments):
        head_dim, dtype, causal, key, gpu, head_dim_v, ratio, longest, page_size, *_ = arguments
        launched.append(SimpleNamespace(longest=longest, page_size=page_size, ratio=ratio, causal=causal))
        return plan.varlen(head_dim, dtype, causal, key, gpu, head_dim_v)

    monkeypatch.setattr(plan, "kvcache", made)
    kernel = Mock(side_effect=lambda *arguments: setattr(launched[-1], "arguments", arguments))
    with interpreted(kernel=kernel):
        yield launched


@pytest.mark.parametrize("case", WRONG_ON_A_GPU)
def test_wrong_on_a_gpu(case, on_a_gpu):
    changes, words = WRONG_ON_A_GPU[case]
    with pytest.raises(ValueError, match=words):
        flash_fwd_kvcache(**asked(**changes))
    assert not on_a_gpu


def test_rows_too_far_apart():
    spec = Spec(torch.Size((2, 3, 4, 16)), (64 << 30, 64, 16, 1), torch.float16, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"q: strides .* reach over 1073741827 rows; at most"):
        kvcache_checks.rows("q", spec)


def test_a_cache_whose_rows_are_counted_beyond_int32():
    """In steps of 8 elements; with a larger common divisor it is taken."""
    q = Spec(torch.Size((1, 1, 1, 64)), (64, 64, 64, 1), torch.float16, torch.device("cpu"))
    shape = torch.Size((1 << 24, 16, 1, 64))
    small, large = (q._replace(shape=shape, stride=(n, 64, 64, 1)) for n in (1032, 1024))
    with pytest.raises(ValueError, match=r"k_cache: strides .* reach over \d+ times 8 elements, the greatest common"):
        kvcache_checks.caches(small, small, q, True)
    kvcache_checks.caches(large, large, q, True)


def test_the_reach_of_a_cache_is_that_of_its_boxes():
    """Up to behind the last row of the last page, where a coordinate may be; whatever heads lie further away."""
    q = Spec(torch.Size((1, 1, 1, 64)), (64, 64, 64, 1), torch.float16, torch.device("cpu"))
    pages = (1 << 27) - 100
    shape = torch.Size((pages, 16, 1, 8))  # as (rows, pages, heads, d), transposed
    far = q._replace(shape=shape, stride=(8, 8 * pages, 8, 1))
    with pytest.raises(ValueError, match=r"k_cache: strides .* reach over \d+ times 8 elements"):
        kvcache_checks.caches(far, far, q._replace(shape=torch.Size((1, 1, 1, 8))), True)
    q = q._replace(shape=torch.Size((1, 1, 2, 64)))
    heads = q._replace(shape=torch.Size((1 << 24, 16, 2, 64)), stride=(1024, 64, 1 << 38, 1))
    kvcache_checks.caches(heads, heads, q, True)


def test_a_sequence_that_is_not_causal_sees_the_last_of_most_keys():
    """By int32s, that of a row which is no query too: it counts for its tile's blocks."""
    every, queries = np.int32(SIZE_MAX), np.int32(5)
    problem = SimpleNamespace(seqlen_q=queries, seqlen_k=every, of_mask=np.int32(SLACK))
    with np.errstate(over="raise"):
        assert all(CausalOfEach().limit(row, problem) == SIZE_MAX for row in np.arange(64, dtype=np.int32))


WRONG_WITH_GRADIENTS = dict(q=dict(q=Q.clone().requires_grad_()), v=dict(v_cache=KV.clone().requires_grad_()))


@pytest.mark.parametrize("case", WRONG_WITH_GRADIENTS)
def test_no_gradients(case):
    """Eager, compiled, with features and by the operator, without a launch."""
    learns = asked(**WRONG_WITH_GRADIENTS[case])
    words = "q, k_cache, v_cache: one of them requires grad, and attention over a cache has no backward; call under"
    for how in (dict(), dict(softcap=2.0), dict(v_cache=torch.zeros(2, 10, 2, 8).half().requires_grad_())):
        with pytest.raises(ValueError, match=words):
            flash_fwd_kvcache(**learns | how)
    with pytest.raises(ValueError, match=words):
        torch.compile(lambda: flash_fwd_kvcache(**learns), backend="eager")()
    tensors = learns["q"], learns["k_cache"], learns["v_cache"]
    with pytest.raises(ValueError, match=words):
        torch.ops.cute_attn.attention(*tensors, True, None, False, "bshd", cache_seqlens=B)
    with torch.no_grad():
        flash_fwd_kvcache(**learns)


# What a kernel gets
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 5)]),
    st.permutations(range(3)).filter(lambda order: order.index(0) < order.index(1)),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1, 3]),
)
def test_queries_as_rows(sizes, order, gap, expanded, heads):
    """Row b * step + i of the view is query i of sequence b, at its very address; sizes of 1 have strides of TMA's."""
    shape = [*sizes, heads]
    base = torch.zeros(*[shape[i] + gap * (i > 0) for i in order], 16, dtype=torch.float16)
    q = base.permute(*[order.index(i) for i in range(3)], 3)[:, : sizes[1], :heads]
    q = q[:1].expand(sizes[0], -1, -1, -1) if expanded else q
    kvcache_checks.rows("q", Spec.of(q))
    case = Cached(q, KV, KV, None, 1, *[None] * 6)
    rows = case.for_tma(q)[0]
    _, seqlen, step, _ = case._of_queries(q)
    assert seqlen == sizes[1] and not any(s % 8 for s in rows.stride()[:-1])
    for b, i in product(*map(range, sizes)):
        assert rows[b * step + i].data_ptr() == q[b, i].data_ptr()
    assert rows[0].stride() == q[0, 0].stride() or heads == 1
    reach = sum((n - 1) * s for n, s in zip(rows.shape, rows.stride(), strict=True))
    end = rows.as_strided((1,), (1,), rows.storage_offset() + reach)
    assert end.data_ptr() == q[-1, -1, -1, -1:].data_ptr()


@EACH_STORAGE
@pytest.mark.parametrize(("pages", "page_size"), [(1, 1), (1, 16), (7, 1), (7, 16)])
@pytest.mark.parametrize("heads", [1, 2])
def test_caches_as_pages(storage, pages, page_size, heads):
    """Each row where it was, any two of a head at a multiple of the unit, whatever strides the sizes of 1 had."""
    for x in storage(pages, page_size, heads, 64, 32):
        odd = x.as_strided(x.shape, [3 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
        for cache in (x, odd):
            strides, unit = kvcache_checks.as_pages(cache.shape, cache.stride())
            view = cache.as_strided(cache.shape, strides)
            assert unit % 8 == 0 and not any(s % unit for s in strides[:2]) and strides[2] % 8 == 0
            for page, row, head in product(range(pages), range(page_size), range(heads)):
                assert view[page, row, head].data_ptr() == cache[page, row, head].data_ptr()


def addresses(*tensors):
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def test_what_is_launched_over_pages(on_a_gpu):
    case = paged([40, 0, 9], 16, seqlen_q=5, storage=interleaved)
    o, lse = flash_fwd_kvcache(**case.call, causal=True, softcap=2.0, return_lse=True)
    (found,) = on_a_gpu
    assert (found.longest, found.page_size, found.ratio, found.causal) == (5, 16, 2, True)
    q, k, v, out, *rest = found.arguments
    assert (q.shape, out.shape) == ((15, 4, 64), (15, 4, 64)) and k.shape == v.shape == case.k_cache.shape
    table, page = case.how["page_table"], 128
    numbers = 0, 5, 5, 5, 3, case.how["cache_seqlens"].data_ptr(), 5 * 16, 5 * 16, page, page
    assert tuple(rest[4:]) == (2.0, *numbers, table.data_ptr(), table.stride(0))
    assert rest[0] == lse.data_ptr() and rest[2:4] == [0.125, 3] and table.stride(0) != table.shape[1]
    assert addresses(q, k, v, out) == addresses(case.q, case.k_cache, case.v_cache, o)


def test_what_is_launched_over_a_dense_cache(on_a_gpu):
    case = dense([40, 0, 9], 48, packed=[3, 0, 4], index=True, leftpad=True, storage=heads_first, d_v=32)
    out = marked(case)
    assert flash_fwd_kvcache(**case.call, max_seqlen_q=7, window=(5, 3), out=out) is out
    (found,) = on_a_gpu
    assert (found.longest, found.page_size) == (7, None)
    tensors, how = found.arguments[:4], case.how
    assert all(x is y for x, y in zip(tensors, (*case[:3], out), strict=True)), "as they are"
    cu, lengths, index, leftpad = addresses(
        *(how[x] for x in ("cu_seqlens_q", "cache_seqlens", "cache_batch_idx", "cache_leftpad"))
    )
    want = 5, 3, cu, len(case.q), 0, 0, 3, lengths, 48, 48, 64, 32, index, leftpad
    assert found.arguments[8:] == want
    for n in (40, 48):  # as one number, which is no part of what is prepared
        case.how.update(cache_seqlens=n)
        flash_fwd_kvcache(**case.call, max_seqlen_q=7, out=out)
        assert on_a_gpu[-1].arguments[8:] == (cu, len(case.q), 0, 0, 3, 0, n, 48, 64, 32, index, leftpad)
    assert len(on_a_gpu) == 2
    with pytest.raises(ValueError, match="cache_seqlens: 49 came; from 0 to 48"):
        flash_fwd_kvcache(**case.call | dict(cache_seqlens=49), max_seqlen_q=7, out=out)


def test_a_like_call_is_looked_up(on_a_gpu):
    """With other values, lengths and tables; a call that differs in more is prepared anew."""
    case = paged([40, 7, 9], 16, seqlen_q=2)
    for _ in range(2):
        flash_fwd_kvcache(**case.call)
        case.how.update(cache_seqlens=case.how["cache_seqlens"] + 1, page_table=case.how["page_table"].clone())
    assert len(on_a_gpu) == 2  # the table's stride differs
    flash_fwd_kvcache(**case.call, scale=2.0)
    where = on_a_gpu[-1].arguments
    assert where[6] == 2.0 and where[-2] == case.how["page_table"].data_ptr() and len(on_a_gpu) == 2
    for changes in (dict(causal=True), dict(out=marked(case)), dict(cache_seqlens=3), dict(window=(3, 3))):
        before = len(on_a_gpu)
        for _ in range(2):
            flash_fwd_kvcache(**case.call | changes)
        assert len(on_a_gpu) == before + 1


def test_a_cache_without_memory_is_another_that_is_not_read(on_a_gpu):
    q, table = torch.zeros(2, 3, 4, 64).half(), torch.zeros(2, 3, dtype=torch.int32)
    for k, how, page_size in (
        (q[:, :0, :2], dict(), None),
        (q[:0, :, :2], dict(page_table=table), 3),
        (q[:, :0, :2], dict(page_table=table), 1),
    ):
        o = flash_fwd_kvcache(q, k, k[..., :32], cache_seqlens=0, **how)
        q_rows, *caches, o_rows = on_a_gpu[-1].arguments[:4]
        assert [x.shape for x in caches] == [(1, 1, 2, 64), (1, 1, 2, 32)] and on_a_gpu[-1].page_size == page_size
        assert addresses(*caches) == addresses(q, o) == addresses(q_rows, o_rows)
        assert on_a_gpu[-1].arguments[8:-2] == (0, 3, 3, 3, 2, 0, 0, 0, 64, 32)
    assert len(on_a_gpu) == 3


@pytest.mark.parametrize("name", ["cache_seqlens", "page_table", "causal"])
def test_no_vmap_of_a_like_call(name, on_a_gpu):
    """What is mapped over looks like what has come before."""
    case = paged([40, 7, 9], 16, seqlen_q=2)
    given = case.call | dict(causal=int32([1, 0, 1], "cpu"))
    flash_fwd_kvcache(**given)
    with pytest.raises(TypeError, match=f"{name}: a tensor inside a transform of torch.func came"):
        torch.vmap(lambda x: flash_fwd_kvcache(**given | {name: x}))(given[name][None])


@pytest.mark.parametrize("name", ["cache_seqlens", "page_table", "causal"])
def test_no_fake_tensor_beside_real_ones(name, on_a_gpu):
    """Whose address is 0, which says that there is none."""
    case = paged([40, 7, 9], 16, seqlen_q=2)
    given = case.call | dict(causal=int32([1, 0, 1], "cpu"))
    fake = FakeTensorMode().from_tensor(given[name])
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: a .*FakeTensor came beside tensors with memory"):
            flash_fwd_kvcache(**given | {name: fake})
        flash_fwd_kvcache(**given)


def test_every_plan_has_a_kernel():
    """With boxes that TMA writes to whole 128 bytes, of narrow atoms too."""
    sizes = product(EVERY_HEAD_DIM, EVERY_HEAD_DIM, (None, 1, 2, 48, 256), (False, True), (1, 130))
    for d, d_v, page_size, causal, longest in sizes:
        how = dict(head_dim_v=0 if d_v == d else d_v, max_seqlen_q=longest, page_size=page_size)
        config = plan.kvcache(d, "bf16", causal, **how)
        rows = min(gcd(2 * columns, 128) * config.cache.box for columns in (config.head_dim, config.columns_v))
        assert rows % 128 == 0, config.name


def test_one_sequence_has_no_distance_to_the_next(on_a_gpu):
    """Whatever stride its row of page_table has."""
    case = paged([40], 16)
    table = case.how["page_table"]
    flash_fwd_kvcache(**case.call | dict(page_table=table.as_strided(table.shape, (1 << 40, 1))))
    assert on_a_gpu[-1].arguments[-2:] == (table.data_ptr(), 0)


def test_nothing_to_launch(on_a_gpu):
    o = flash_fwd_kvcache(Q[:, :0], KV, KV, cache_seqlens=2)
    assert o.shape == (2, 0, 4, 16) and not hasattr(on_a_gpu[0], "arguments")


def test_the_workspace_is_the_last_argument(on_a_gpu, monkeypatch):
    """Of as many bytes as the kernel says for the GPU's SMs and the heads."""

    def nbytes(config, num_sms, heads, heads_kv):
        return 1000 * num_sms + 10 * heads + heads_kv

    memory, wanted = torch.zeros(8, dtype=torch.uint8), []
    monkeypatch.setattr(FwdConfig, "workspace_bytes", nbytes)
    case, get = dense([4, 2], 48), lambda index, nbytes: wanted.append((index, nbytes)) or memory
    with patch.object(workspace, "get", get):  # before `on_a_gpu` puts back what it has replaced
        for _ in range(2):
            flash_fwd_kvcache(**case.call)
            assert on_a_gpu[-1].arguments[-3:] == (0, 0, memory.data_ptr())
    heads, heads_kv = case.call["q"].shape[2], case.call["k_cache"].shape[2]
    assert wanted == [(0, 3000 + 10 * heads + heads_kv)] * 2


# Traced
TRACED = {
    "pages": (paged([40, 0, 9], 16, seqlen_q=5), dict(causal=True, return_lse=True)),
    "packed": (paged([40, 0, 9], 16, packed=[5, 2, 0]), dict(window=(9, 1), softcap=2.0)),
    "dense": (dense([40, 0, 9], 48, index=True, leftpad=True, d_v=32), dict(return_lse=True)),
    "one length": (dense([40, 40], 48), dict(cache_seqlens=40)),
    "of each": (dense([40, 9], 48, seqlen_q=5), dict(causal=int32([0, 1], "cpu"))),
}
EACH_TRACED = pytest.mark.parametrize(("case", "how"), TRACED.values(), ids=TRACED)


def as_function(case, how):
    """Of the tensors alone, and these; the first three are q and the caches."""
    given = case.call | how
    names = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
    others = {name: x for name, x in given.items() if name not in names}

    def function(*tensors):
        found = flash_fwd_kvcache(**dict(zip(names, tensors, strict=True)), **others)
        return found if isinstance(found, tuple) else (found,)

    return function, [given[name] for name in names]


def used(case, found):
    """Of o and lse, the rows of q that some sequence has."""
    if "cu_seqlens_q" not in case.how:
        return list(found)
    rows = slice(*case.how["cu_seqlens_q"][[0, -1]].tolist())
    return [found[0][rows], *(x[:, rows] for x in found[1:])]


@EACH_TRACED
def test_compiled(case, how):
    """In one graph, with an out too."""
    torch._dynamo.reset()
    function, tensors = as_function(case, how)
    want = used(case, function(*tensors))
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    assert all(map(torch.equal, used(case, found), want))
    out = marked(case)
    torch.compile(flash_fwd_kvcache, fullgraph=True, backend="aot_eager")(**case.call | how, out=out)
    assert torch.equal(used(case, [out])[0], want[0])


@EACH_TRACED
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode, case, how):
    function, tensors = as_function(case, how)
    graph = make_fx(function, tracing_mode=mode)(*tensors)
    names = [str(node.target) for node in graph.graph.nodes if "cute_attn" in str(node.target)]
    assert names == ["cute_attn.attention.default"]
    assert all(map(torch.equal, used(case, graph(*tensors)), used(case, function(*tensors))))


@EACH_TRACED
def test_other_tracers(case, how):
    """torch.export, jit.trace and torch.fx: with lengths that they have not seen."""
    function, tensors = as_function(case, how)

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    exported = torch.export.export(Model(), tuple(tensors)).module()
    traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
    lengths = case.how["cache_seqlens"]
    others = [(x - 1).clamp(min=0) if x is lengths else x for x in tensors]
    want = used(case, function(*others))
    for found in (exported, traced):
        assert all(map(torch.equal, used(case, found(*others)), want))


def test_fx():
    case = TRACED["dense"][0]

    def function(q, k, v, lengths):
        return flash_fwd_kvcache(q, k, v, **case.how | dict(cache_seqlens=lengths))

    graph = torch.fx.symbolic_trace(function)
    tensors = *case[:3], case.how["cache_seqlens"]
    assert torch.equal(graph(*tensors), function(*tensors))


@EACH_TRACED
def test_fake_tensors(case, how):
    function, tensors = as_function(case, how)
    mode = FakeTensorMode()
    for fake, real in zip(function(*map(mode.from_tensor, tensors)), function(*tensors), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@EACH_TRACED
def test_opcheck(case, how):
    """Where rows of no sequence hold what they will, no call is the like of another."""
    given = case.call | how
    if "cu_seqlens_q" in given:
        return
    lengths, causal = given.pop("cache_seqlens"), given.pop("causal", False)
    of_each = isinstance(causal, torch.Tensor)
    named = dict(cache_length=lengths) if isinstance(lengths, int) else dict(cache_seqlens=lengths)
    named |= dict(causal_each=causal) if of_each else {}
    named |= {x: given[x] for x in ("page_table", "cache_batch_idx", "cache_leftpad") if x in given}
    arguments = causal is True, None, True, "bshd"
    torch.library.opcheck(torch.ops.cute_attn.attention.default, (*case[:3], *arguments), named)
    torch.library.opcheck(torch.ops.cute_attn.attention_out.default, (*case[:3], marked(case), *arguments), named)


def test_functions_of_scores_pass_no_operator():
    case = TRACED["pages"][0]
    with pytest.raises(TypeError, match="mask_mod: given in a call that is traced"):
        make_fx(lambda q: flash_fwd_kvcache(**case.call | dict(q=q), mask_mod=mask_mods("cpu")["prefix"]))(case.q)


def test_a_plain_call_asks_no_tracer(monkeypatch):
    monkeypatch.setattr(request, "traced", None)
    flash_fwd_kvcache(**asked())


WRONG_OPERATORS = {
    "nothing of a cache": (dict(page_table=TABLE), "page_table: given without cache_seqlens or cache_length"),
    "both": (dict(cache_seqlens=B, cache_length=3), "cache_seqlens: given with cache_length; pass one of them"),
    "layout": (
        dict(cache_seqlens=B, layout="bhsd"),
        "layout: 'bhsd' came; over caches q is 'bshd' without cu_seqlens_q",
    ),
    "keys": (dict(cache_seqlens=B, cu_seqlens_k=CU), "cu_seqlens_k: given with cache_seqlens or cache_length"),
    "row_max": (
        dict(cache_seqlens=B, return_row_max=True),
        "return_row_max: given with cache_seqlens, and caches have",
    ),
    "dropout": (
        dict(cache_seqlens=B, dropout_p=0.5, rng_state=torch.zeros(2, dtype=torch.int64)),
        "dropout_p: given with cache_seqlens",
    ),
    "constant_time": (dict(cache_length=3, constant_time=True), "constant_time: given with cache_seqlens"),
}


@pytest.mark.parametrize("case", WRONG_OPERATORS)
def test_wrong_arguments_of_the_operator(case):
    changes, words = WRONG_OPERATORS[case]
    with pytest.raises(ValueError, match=words):
        torch.ops.cute_attn.attention(
            Q, KV, KV, **dict(causal=False, scale=None, return_lse=True, layout="bshd") | changes
        )


# The kernel: its machine code, and interpreted
REACHED = {
    plan.kvcache(d, "bf16", causal, ratio=ratio, max_seqlen_q=longest, page_size=page, batch=batch)
    for d, causal, ratio in product((64, 96, 128, 192, 256, 512), (False, True), (1, 8, 128))
    for longest, page, batch in product((1, 4096), (None, 16, 64, 256), (1, 40, 200))
}


@pytest.mark.machine_code
@pytest.mark.parametrize("config", sample(2, sorted(REACHED, key=lambda c: c.name)), ids=lambda config: config.name)
def test_healthy(config):
    """The forward's and, where keys are shared, the one that combines."""
    assert inspect.report(config).problems() == []


def test_warmup(monkeypatch):
    """Every kernel that a call of its kind reaches."""
    compiled = []
    monkeypatch.setattr(compile, "get", compiled.append)
    how = dict(dtype="bf16", ratio=(1, 6, 128), causal=(False, True))
    ready = warmup((64, 128), page_size=(0, 1, 16), **how | dict(ratio=(1, 2, 6, 128, 200)))
    assert ready == compiled and all(config.cache for config in ready)
    for d, ratio, page, causal in product((64, 128), (1, 2, 6, 128, 200), (None, 1, 16), (False, True)):
        assert plan.kvcache(d, "bf16", causal, ratio=ratio, page_size=page) in ready
        for longest in (1, 2, 3, 5, 7, 8, 11, 12, 16, 17, 22, 33, 64, 65, 100, 128, 129, 500, 4096):
            for batch, heads_kv, room in (
                (1, 1, 90000),
                (1, 8, 9),
                (9, 8, 90000),
                (100, 2, 1),
                (70, 8, 1),
                (3, 100, 1),
            ):
                sizes = dict(max_seqlen_q=longest, page_size=page, batch=batch, heads_kv=heads_kv, room=room)
                config = plan.kvcache(d, "bf16", causal, ratio=ratio, **sizes)
                assert config in ready, (d, ratio, page, causal, sizes)
    assert {config.mask.name for config in warmup(64, window=True, page_size=16, **how)} == {"window"}


@pytest.mark.parametrize("page_size", [-1, 2.0, "16", True])
def test_no_warmup_of_such_pages(page_size):
    with pytest.raises(ValueError, match=r"page_size: .* came; the number of keys of a page is needed, or 0"):
        warmup(64, page_size=page_size)
    with pytest.raises(ValueError, match="constant_time: flash_fwd_kvcache has no kernels for it"):
        warmup(64, page_size=16, constant_time=True)


def test_the_plan():
    """Few queries share the keys, and their stages have all of an SM's memory; a box is no larger than a page."""
    for d, ratio, page in product((64, 128, 256), (1, 8), (None, 1, 12, 16, 48, 64, 256)):
        few, many = (plan.kvcache(d, "bf16", True, ratio=ratio, max_seqlen_q=n, page_size=page) for n in (4, 4096))
        assert few.shares and not many.shares and few.pack == ratio
        assert few.stages == (2 if not few.cache.gathers else 3 if d == 256 else 4)
        for config in (few, many):
            assert config.cache.paged == (page is not None) and config.tile_n % config.cache.box == 0
            assert page is None or page % config.cache.box == 0
        unknown = plan.kvcache(d, "bf16", True, ratio=ratio, page_size=page)
        assert not unknown.shares, "without a hint sequences may have many queries"
    assert not plan.kvcache(512, "bf16", True, ratio=8, max_seqlen_q=1).shares


@pytest.mark.parametrize("page", [None, 1, 16, 64])
@pytest.mark.parametrize(
    ("batch", "heads_kv", "who"),
    [(1, 8, "a kernel"), (4, 8, "a kernel"), (8, 8, "last"), (32, 8, "two"), (2, 66, "two")],
)
def test_who_merges(batch, heads_kv, who, page):
    """A second kernel, or a shared tile's last CTA; with a tile for each SM it has two CTAs, whatever both need."""
    for d, ratio, seqlen_q, causal in product((64, 128, 256), (1, 8), (1, 5), (False, True)):
        how = dict(ratio=ratio, max_seqlen_q=seqlen_q, page_size=page, batch=batch, heads_kv=heads_kv)
        config = plan.kvcache(d, "bf16", causal, **how)
        two = who == "two" and d <= 128 and page != 1
        assert (config.fixup, config.ctas) == (who != "a kernel", 2 if two else 1)
        assert config.ctas * (config.smem_bytes + 1024) <= 228 << 10
        warps = config.ctas * config.threads // 32
        assert not two or 64 * 1024 // warps // 32 // 8 * 8 >= 168, "registers of a thread"
        windowed = plan.kvcache(d, "bf16", causal, FeatureKey(window=True), **how)
        assert (windowed.fixup, windowed.ctas) == (config.fixup, 1)


@pytest.mark.parametrize(
    ("batch", "room", "rows"),
    [(1, 1 << 20, 64), (3, 1 << 20, 64), (4, 1 << 13, 64), (4, 1 << 14, 128), (15, 1, 64), (16, 1, 128), (200, 1, 128)],
)
def test_the_tiles_of_many_heads(batch, room, rows):
    """128 of one query in a tile, where there are tiles or keys enough."""
    config = plan.kvcache(128, "bf16", False, ratio=128, max_seqlen_q=1, batch=batch, room=room)
    assert config.tile_m == config.pack == rows and config.fixup == (batch > 16)
    assert (config.pingpong, config.q_in_regs, config.stages) == ((True, True, 4) if rows == 128 else (False, False, 2))


@pytest.mark.parametrize(("d", "batch", "keys"), [(64, 1, 128), (32, 8, 128), (64, 32, 64), (96, 1, 64)])
def test_a_stage_of_few_columns_has_more_keys(d, batch, keys):
    """But where two CTAs share an SM, or a sequence has few."""
    for page, room in product((None, 16, 64, 256), (1024, 4096)):
        sizes = dict(ratio=8, max_seqlen_q=1, page_size=page, batch=batch, heads_kv=8, room=room)
        config = plan.kvcache(d, "bf16", False, **sizes)
        assert config.tile_n == (keys if room == 4096 else 64) and config.ctas == (2 if batch == 32 else 1)


@pytest.mark.parametrize("ctas", [1, 2])
def test_a_workspace_has_two_places_for_each_cta(ctas):
    """A part is a row's O, running max and sum; the counters suffice for all CTAs of 144 SMs, and their warpgroups."""
    sizes = dict(ratio=8, max_seqlen_q=1, batch=132 if ctas == 2 else 33)
    config = plan.kvcache(128, "bf16", False, **sizes)
    assert config.ctas == ctas and config.workspace_bytes(132, 8, 1) == 2 * 132 * ctas * 64 * (128 + 8) * 4
    assert config.workspace_bytes(132, 64, 8) == 2 * (ctas * 132 // 8 * 8) * 64 * (128 + 8) * 4
    assert config.counters == PART_COUNTERS >= 144 * max(ctas, 2)
    assert plan.kvcache(128, "bf16", False, ratio=8, max_seqlen_q=1).counters == 0


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("num_sms", "seed"), sample(3, [1, 4, 9], [0, 1]))
def test_shared_keys_interpreted(num_sms, seed):
    """Whole tiles and parts of them, on fewer SMs than there are tiles and on more; no order of CTAs changes a bit."""
    assert not in_any_order(num_sms, seed, heads_kv=2).fixup


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("num_sms", "seed"), sample(2, [8, 20, 45], [0, 1]))
def test_the_last_cta_merges_interpreted(num_sms, seed):
    """Whichever it is."""
    config = in_any_order(num_sms, seed, heads_kv=8)
    assert config.fixup and config.ctas == 1


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(
    "case",
    sample(
        1,
        [
            (1, dict(seqlen_q=3), dict(window=(100, 0))),
            (1, dict(seqlen_q=3), dict(causal=True, sinks=torch.linspace(-2, 2, 16))),
            (1, dict(seqlen_q=2), dict(causal=True, alibi_slopes=torch.linspace(0.1, 1, 16))),
            (1, dict(seqlen_q=40), dict(causal=True, softcap=2.0)),
            (1, dict(d=64, d_v=128), dict()),
            (1, dict(d=256), dict(causal=True)),
            (1e8, dict(seqlen_q=3), dict(causal=True)),
        ],
    ),
)
def test_what_the_last_cta_merges_interpreted(case):
    """Whatever changes scores; rows whose running max is an anchor; O of few columns and of many."""
    scale, how, asked = case
    made = paged([300, 0, 17, 129, 64], 16, heads=16, heads_kv=8, **how)
    made.q.mul_(scale)
    with interpreted(num_sms=9) as configs:
        check(made, **asked)
    assert configs[0].fixup


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("batch", where(lambda batch: batch < 1000, [70, 1100]))
def test_many_sequences_interpreted(batch):
    """A CTA finds its first one among the first 1024, by what each 32 have, and further ones 32 by 32."""
    with interpreted(num_sms=7) as configs:
        check(paged([n * 37 % 90 for n in range(batch)], 16, heads=2, heads_kv=1, d=32))
    assert configs[0].fixup


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("num_sms", sample(1, [27, 41]))
def test_two_ctas_of_an_sm_interpreted(num_sms):
    config = in_any_order(num_sms, 3, heads_kv=27)
    assert config.fixup and config.ctas == 2


def in_any_order(num_sms, seed, heads_kv):
    """The kernel, whose results are right and have the same bits in other orders of CTAs."""
    lengths = [130, 0, 17, 65, 1] if heads_kv > 8 else [300, 0, 17, 129, 64]
    case = paged(lengths, 16, heads=heads_kv * 2, heads_kv=heads_kv, seqlen_q=3)
    with interpreted(num_sms=num_sms, seed=seed) as configs:
        found = check(case, causal=True)
    with interpreted(num_sms=num_sms, seed=seed + 7):
        again = flash_fwd_kvcache(**case.call, causal=True, return_lse=True)
    for x, y in zip(found, again, strict=True):
        assert torch.equal(x, y)
    assert configs[0].shares
    return configs[0]


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("kind", "mask"), sample(4, KINDS, MASKS))
def test_interpreted(kind, mask):
    with interpreted() as configs:
        check(KINDS[kind](FEW, seqlen_q=3, heads=6), **MASKS[mask])
    assert configs


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("heads", "num_sms"), sample(1, [128, 70, 160], [3, 4, 31]))
def test_heads_of_two_warpgroups_interpreted(heads, num_sms):
    """A tile has all heads of a query, or 128 of them."""
    with interpreted(num_sms=num_sms) as configs:
        check(paged([300, 0, 65, 1, *[20] * 12], 16, heads=heads, heads_kv=1))
    assert configs[0].shares and configs[0].pack == configs[0].tile_m == 128


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("packed", sample(1, [[3, 30, 0, 20], [32, 1, 32, 2]]))
def test_queries_of_two_warpgroups_interpreted(packed):
    with interpreted(num_sms=5) as configs:
        case = dense([300, 0, 65, 40], 320, heads=4, heads_kv=1, packed=packed)
        case.how.update(max_seqlen_q=32)
        check(case, causal=True)
    assert configs[0].shares and configs[0].tile_m == 128


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("lengths", "num_sms"), sample(1, [[128] * 6, [128] * 4, [64] * 40, [512] * 2], [3, 6, 9]))
def test_equal_sequences_stay_whole_interpreted(lengths, num_sms):
    """Where nearly all rows of CTAs have as many, or as many share one."""
    with interpreted(num_sms=num_sms) as configs:
        check(paged(lengths, 16, heads=4, heads_kv=1))
    assert configs[0].shares


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(
    "case",
    sample(
        1,
        [
            (1, dict(heads=8)),
            (3, dict(heads=8, d=128)),
            (2, dict(packed=[3, 80, 0, 1])),
            (4, dict(heads=2, d=192, d_v=128)),
            (6, dict(heads_kv=1, d=32, d_v=96)),
            (1, dict(heads=2, d=512, seqlen_q=2)),
            (5, dict(heads_kv=1, d=256, storage=heads_first)),
        ],
    ),
)
def test_pages_of_few_rows_interpreted(case):
    """Gathered by threads: one kernel for all such pages."""
    page_size, how = case
    with interpreted() as configs:
        check(paged([300, 0, 65, 1], page_size, **how), causal=True)
    assert configs[0].cache.gathers


@interpreter
@pytest.mark.machine_code
@EACH_STORAGE
def test_strides_interpreted(storage):
    with interpreted():
        check(paged(FEW, 16, storage=storage, shared=1, packed=[2, 0, 1, 3, 1]), causal=True)
        check(dense(FEW, 150, storage=storage, index=True, leftpad=True), causal=True)
        check(dense([17], 40, storage=storage, heads=4, heads_kv=1))


@interpreter
@pytest.mark.machine_code
def test_one_length_and_wild_ones_interpreted():
    case = dense([70] * 3, 90, seqlen_q=3)
    case.how.update(cache_seqlens=70)
    wild = dense([90, 0, 90], 90)
    wild.how.update(cache_seqlens=int32([91, -(2**31), 2**31 - 1], "cpu"))
    with interpreted():
        check(case, causal=True)
        check(wild)


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(
    "sizes", sample(1, [(320, 256, 16, 2), (512, 256, 1, 2), (320, None, 3, 2), (96, 448, 1, 2), (224, None, 5, 130)])
)
def test_wide_heads_interpreted(sizes):
    """Keys that fewer stages share, and boxes of one row: of two warpgroups' columns, of tiles of many rows."""
    d, d_v, page_size, seqlen_q = sizes
    with interpreted():
        check(paged([65, 3], page_size, d=d, d_v=d_v, seqlen_q=seqlen_q, heads=2), causal=True)


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_rows_of_q_and_out_interpreted(seqlen_q):
    """Sequences at different distances in q and in out."""
    case = dense([70, 3, 0], 90, seqlen_q=seqlen_q)
    sliced = torch.cat((case.q, torch.full_like(case.q, torch.nan)), dim=1)[:, :seqlen_q]
    expanded = case.q[:1].expand(3, -1, -1, -1)
    wide = torch.empty(3, seqlen_q + 2, 5, 72).bfloat16()[:, :seqlen_q, :4, :64]
    heads_before_rows = torch.empty(3, 4, seqlen_q, 64).bfloat16().transpose(1, 2)
    with interpreted():
        for q, out in product((case.q, sliced, expanded), (None, wide, heads_before_rows)):
            o, lse = flash_fwd_kvcache(**case.call | dict(q=q), causal=True, return_lse=True, out=out)
            assert out is None or o is out
            right(case._replace(q=q), o, lse, causal=True)


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("name", "seqlen_q"), sample(2, ["plain", "window", "alibi", "both, window"], [3, 70]))
def test_each_causal_or_not_interpreted(name, seqlen_q):
    """Whose scores differ on both sides of the diagonal, and whose windows end there or beyond."""
    more = dict(plain={}, window=dict(window=(40, 2)), alibi=cases("cpu")["alibi"]) | functions("cpu")
    with interpreted():
        case = paged([65, 3, 63, 0, 33, 130], 16, heads=HEADS, seqlen_q=seqlen_q)
        check(case, causal=int32([1, 0, 1, 0, 0, 1], "cpu"), **more[name])


@interpreter
@pytest.mark.machine_code
def test_without_keys_interpreted():
    q, table = torch.randn(2, 3, 4, 64).bfloat16(), torch.tensor([NO_PAGES[:3]] * 2, dtype=torch.int32)
    for k, how in ((q[:, :0, :2], dict()), (q[:0, :, :2], dict(page_table=table))):
        with interpreted():
            o, lse = flash_fwd_kvcache(q, k, k, cache_seqlens=0, return_lse=True, **how)
        assert (o == 0).all() and (lse == -torch.inf).all()


# On the GPU
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"), zip((40, 64, 128, 192, 256), (*DTYPES, *DTYPES, DTYPES[0]), strict=True)
)
@EACH_KIND
@EACH_MASK
def test_right(mask, kind, head_dim, dtype):
    how = dict(d=head_dim, dtype=dtype, where="cuda")
    check(kind(LENGTHS, **how), **mask)
    check(kind(LENGTHS, seqlen_q=70, heads=8, heads_kv=1, **how), **mask)
    check(kind(FEW, packed=[3, 0, 1, 200, 5], heads=6, **how), **mask, scale=-0.3, lse=False)


@pytest.mark.gpu
@EACH_STORAGE
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100, 256])
def test_strides_on_the_gpu(page_size, storage):
    for how in (dict(), dict(d=32, d_v=96), dict(heads_kv=1), dict(d=128, heads=16)):
        check(paged([1000, 0, 77, 4096], page_size, storage=storage, shared=2, where="cuda", **how), causal=True)
        check(dense([1000, 0, 77, 1], 1100, storage=storage, index=True, leftpad=True, where="cuda", **how))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (8, 1), (32, 8), (71, 1)])
def test_long_and_many(heads, heads_kv, head_dim):
    """One long sequence, which many CTAs share; many of all lengths."""
    how = dict(heads=heads, heads_kv=heads_kv, d=head_dim, where="cuda")
    many = [torch.randint(0, 3000, (n,)).tolist() for n in (70, 300)]
    for lengths in ([20_000], *many, [9000, *[3] * 30], [700] * 66, [40_000, *[50] * 150]):
        check(paged(lengths, 16, **how), causal=True)
        check(paged(lengths, 16, seqlen_q=4, **how), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
@pytest.mark.parametrize("seqlen_q", [1, 8, 300])
def test_a_hundred_thousand_keys(page_size, seqlen_q):
    how = dict(heads=8, heads_kv=2, d=128, seqlen_q=seqlen_q, where="cuda")
    lengths = [100_003, 1, 100_000]
    check(dense(lengths, 100_100, **how) if page_size is None else paged(lengths, page_size, **how), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen_q"), [(128, 1, 1), (70, 1, 1), (160, 1, 1), (32, 2, 7), (12, 3, 30)]
)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_rows_of_two_warpgroups(heads, heads_kv, seqlen_q, head_dim):
    """Few queries of many heads: a tile has up to 128 rows of a K/V head."""
    how = dict(heads=heads, heads_kv=heads_kv, d=head_dim, seqlen_q=seqlen_q, where="cuda")
    for lengths in ([5000], [300, 0, 65, 1, 4000], [256] * 40):
        check(paged(lengths, 16, **how), causal=True)
        check(dense(lengths, 5000, **how), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv", [2, 8, 32])
def test_a_graph_follows_lengths_and_pages(heads_kv):
    """Captured with some, replayed with a hundred others; equal bits in every replay."""
    how = dict(heads=2 * heads_kv, heads_kv=heads_kv, seqlen_q=2, where="cuda")
    every = [paged(torch.randint(0, 900, (6,)).tolist(), 16, **how) for _ in range(100)]
    pages, width = (
        max(f(x) for x in every) for f in (lambda x: len(x.k_cache), lambda x: x.how["page_table"].shape[1])
    )
    q, out = torch.empty_like(every[0].q), marked(every[0])
    k, v = (torch.empty(pages, 16, heads_kv, 64, device="cuda", dtype=q.dtype) for _ in range(2))
    table, lengths = (torch.zeros(n, device="cuda", dtype=torch.int32) for n in ((6, width), (6,)))
    run = lambda: flash_fwd_kvcache(  # noqa: E731
        q, k, v, cache_seqlens=lengths, page_table=table, causal=True, return_lse=True, out=out
    )
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = run()
    for case in every:
        q.copy_(case.q)
        k[: len(case.k_cache)], v[: len(case.v_cache)] = case.k_cache, case.v_cache
        table[:, : case.how["page_table"].shape[1]] = case.how["page_table"]
        lengths.copy_(case.how["cache_seqlens"])
        graph.replay()
        right(case, out, lse, causal=True)
        before = out.clone(), lse.clone()
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv", [2, 16, 48])
def test_streams_at_once(heads_kv):
    """Each has counters and a workspace of its own; no call waits for the GPU."""
    every = [paged([3000, 5, 700], 16, heads=96, heads_kv=heads_kv, where="cuda") for _ in range(4)]
    want = [flash_fwd_kvcache(**case.call) for case in every]
    streams = [torch.cuda.Stream() for _ in every]
    for stream, case in zip(streams, every, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            flash_fwd_kvcache(**case.call)
    torch.cuda.synchronize()
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, (stream, case) in product(range(20), zip(streams, every, strict=True)):
            with torch.cuda.stream(stream):
                found.append(flash_fwd_kvcache(**case.call))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(o, want[i % 4]) for i, o in enumerate(found))


@pytest.mark.gpu
def test_the_call_says_what_is_wrong_with_an_address():
    case = paged([30, 5], 16, where="cuda")
    odd = case.k_cache.new_empty(case.k_cache.numel() + 1)[1:].view_as(case.k_cache)
    with pytest.raises(ValueError, match="k_cache: its data starts 2 bytes past a multiple of 16"):
        flash_fwd_kvcache(**case.call | dict(k_cache=odd))
    with pytest.raises(ValueError, match="page_table: on cpu, but q is on cuda"):
        flash_fwd_kvcache(**case.call | dict(page_table=case.how["page_table"].cpu()))
