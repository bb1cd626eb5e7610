"""Chunks, spans and drafts: masks by run-time arguments, in all three functions, held to the masks written out."""

import pytest
import torch
import torch.nn.functional as F

from cute_attn import compile, flash_fwd, flash_fwd_kvcache, flash_fwd_varlen, plan, spans
from cute_attn.kernels.mask import Chunks, Drafts, Spans
from cute_attn.plan import FeatureKey, Problem
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.attention import bound, close_lse
from tests.support.kvcache import dense, marked, paged
from tests.support.nightly import sample
from tests.support.requirements import interpreter
from tests.support.varlen import int32

DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


# Which keys a query sees, (Sq, Sk), of the n-th sequence
def places(seqlen_q, seqlen_k):
    return torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(seqlen_k)


def chunked(n, seqlen_q, seqlen_k, attention_chunk, causal=False):
    row, key = places(seqlen_q, seqlen_k)
    seen = row.div(attention_chunk, rounding_mode="floor") == key // attention_chunk
    return seen & (key <= row) if causal else seen


def spanned(n, seqlen_q, seqlen_k, ids, window=None, causal=False):
    row, key = places(seqlen_q, seqlen_k)
    seen = key <= row + (0 if window is None else window[1])
    if window is not None:
        seen &= key >= row - window[0]
    ids = ids[n].tolist() + [-1] * seqlen_k
    for i in range(seqlen_q):
        place = i + seqlen_k - seqlen_q
        if place >= 0 and ids[place] >= 0:
            first = end = place
            while first and ids[first - 1] == ids[place]:
                first -= 1
            while end < seqlen_k and ids[end] == ids[place]:
                end += 1
            seen[i, first:end] = True
    return seen


def drafted(n, seqlen_q, seqlen_k, bits):
    _, key = places(seqlen_q, seqlen_k)
    new = key - (seqlen_k - seqlen_q)
    seen = bits[n][:seqlen_q, :seqlen_q].bool()
    return (new < 0) | seen[:, new.clamp(0, seqlen_q - 1)]


def words(bits):
    """(..., Sq, n) of 0 and 1 as int32 (..., Sq, words)."""
    n = -(-bits.shape[-1] // 32) * 32
    padded = torch.nn.functional.pad(bits.long(), (0, n - bits.shape[-1])).unflatten(-1, (-1, 32))
    return (padded << torch.arange(32)).sum(-1).to(torch.int32)


def tree(seqlen_q, batch):
    """Each query sees itself, and what its parent sees."""
    bits = torch.zeros(batch, seqlen_q, seqlen_q, dtype=torch.int)
    for b in range(batch):
        for i in range(seqlen_q):
            if i:
                bits[b, i] = bits[b, torch.randint(0, i, ())]
            bits[b, i, i] = 1
    return bits


def images(batch, length):
    """Spans of all lengths, one at either end, one alone, and two side by side."""
    ids = torch.full((batch, length), -1)
    for b in range(batch):
        at = sorted(torch.randint(0, length, (6,)).tolist())
        ids[b, : at[0]], ids[b, at[1] : at[2]], ids[b, at[2] : at[3]], ids[b, at[4] : at[4] + 1] = 7, 0, 1, 2
        ids[b, at[5] :] = 9
    return ids


MASKS = ("chunks", "causal chunks", "spans", "spans in a window", "a tree", "any bits")


def mask(name, batch, seqlen_q, seqlen_k):
    """(what a call takes, the function of which keys are seen): of so many queries and keys at most."""
    if "chunks" in name:
        how = dict(attention_chunk=int(torch.randint(1, 100, ())), **dict(causal=True) if "causal" in name else {})
        return how, lambda *sizes: chunked(*sizes, **how)
    if "spans" in name:
        ids, how = images(batch, seqlen_k), dict(causal=True) if name == "spans" else dict(window=(20, 1))
        return dict(how, spans=spans(ids)), lambda *sizes: spanned(*sizes, ids=ids, **how)
    bits = tree(seqlen_q, batch) if name == "a tree" else torch.randint(0, 2, (batch, seqlen_q, seqlen_q))
    return dict(draft_mask=words(bits)), lambda *sizes: drafted(*sizes, bits=bits)


def right(q, k, v, seen, o, lse):
    """Of one sequence, (S, H, D) each."""
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    seen, ratio = seen.to(q.device), q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(ratio, 1) for x in (k, v))
    s = (q.double() @ keys.mT) * q.shape[-1] ** -0.5
    s = s.masked_fill(~seen, -torch.inf)
    want, want_lse = s.softmax(-1).nan_to_num(0) @ values, s.logsumexp(-1)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True) if k.shape[2] else want
    bound(o[None].transpose(1, 2), want, theirs.nan_to_num(0))
    close_lse(lse[None], want_lse)


def moved(how, where):
    return {name: x.to(where) if isinstance(x, torch.Tensor) else x for name, x in how.items()}


# The three functions
def check_dense(name, batch, heads, heads_kv, seqlen_q, seqlen_k, d, where, **more):
    q, k, v = (
        torch.randn(batch, s, h, d, device=where).bfloat16()
        for s, h in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    )
    how, seen = mask(name, batch, seqlen_q, seqlen_k)
    o, lse = flash_fwd(q, k, v, layout="bshd", return_lse=True, **moved(how, where), **more)
    for b in range(batch):
        right(q[b], k[b], v[b], seen(b, seqlen_q, seqlen_k), o[b], lse[b])


def check_varlen(name, lengths, d, where):
    ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    q, k, v = (torch.randn(ends[-1], h, d, device=where).bfloat16() for h in (4, 2, 2))
    how, seen = mask(name, len(lengths), max(lengths), max(lengths))
    if "spans" in how:
        how["spans"] = torch.cat([x[:n] for x, n in zip(how["spans"], lengths, strict=True)])
    if "draft_mask" in how:
        how["draft_mask"] = torch.cat([x[:n] for x, n in zip(how["draft_mask"], lengths, strict=True)])
    cu = int32(ends, where)
    o, lse = flash_fwd_varlen(q, k, v, cu, cu, max_seqlen_q=max(lengths), return_lse=True, **moved(how, where))
    for b, n in enumerate(lengths):
        if n:
            rows = slice(ends[b], ends[b + 1])
            right(q[rows], k[rows], v[rows], seen(b, n, n), o[rows], lse[:, rows])


def check_cache(name, case, seqlens_q, where):
    packed = "cu_seqlens_q" in case.how
    how, seen = mask(name, len(case.keys), max(seqlens_q), max(map(len, case.keys)) - 3)  # places beyond the table too
    if packed and "draft_mask" in how:
        table = torch.zeros(len(case.q), how["draft_mask"].shape[-1], dtype=torch.int32)
        for own, start, n in zip(how["draft_mask"], case.how["cu_seqlens_q"].tolist(), seqlens_q, strict=False):
            table[start : start + n] = own[:n]
        how["draft_mask"] = table
    more = dict(max_seqlen_q=max(seqlens_q)) if packed else {}
    o, lse = flash_fwd_kvcache(**case.call, **moved(how, where), **more, return_lse=True, out=marked(case))
    starts = case.how["cu_seqlens_q"].tolist() if packed else None
    for b, (k, v) in enumerate(zip(case.keys, case.values, strict=True)):
        rows = slice(starts[b], starts[b + 1]) if packed else b
        if seqlens_q[b]:
            q, own_lse = case.q[rows], lse[:, rows] if packed else lse[b]
            right(q, k, v, seen(b, seqlens_q[b], len(k)), o[rows], own_lse)


LENGTHS = [300, 9, 0, 129, 64]
CASES = {
    "dense": lambda name, where: check_dense(name, 2, 4, 2, 70, 130, 64, where),
    "dense, more queries": lambda name, where: check_dense(name, 1, 2, 2, 90, 40, 128, where),
    "dense, few queries": lambda name, where: check_dense(name, 2, 8, 1, 5, 200, 64, where),
    "varlen": lambda name, where: check_varlen(name, [30, 0, 70, 1, 163], 64, where),
    "cache": lambda name, where: check_cache(name, paged(LENGTHS, 16, seqlen_q=8, where=where), [8] * 5, where),
    "cache, last CTA": lambda name, where: check_cache(
        name, dense(LENGTHS, 310, heads=16, heads_kv=8, seqlen_q=3, leftpad=True, where=where), [3] * 5, where
    ),
    "cache, packed": lambda name, where: check_cache(
        name, paged(LENGTHS, 5, packed=[3, 40, 0, 64, 1], d=128, where=where), [3, 40, 0, 64, 1], where
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("case", CASES)
@DEVICES
def test_right(where, case, name):
    CASES[case](name, where)


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("case", "name"), sample(3, CASES, MASKS))
def test_interpreted(case, name):
    with interpreted(num_sms=9) as configs:
        CASES[case](name, "cpu")
    assert {type(config.mask) for config in configs} <= {Chunks, Spans, Drafts}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_sizes(head_dim, name):
    for sizes in ((2, 4, 2, 300, 1000), (1, 8, 1, 64, 3000), (3, 2, 2, 129, 129)):
        check_dense(name, *sizes, head_dim, "cuda")
    check_varlen(name, [1000, 3, 0, 640], head_dim, "cuda")
    for page_size in (1, 16, 64):
        for queries in (1, 8, 64):
            case = paged([3000, 100, 700], page_size, heads=8, heads_kv=2, d=head_dim, seqlen_q=queries, where="cuda")
            check_cache(name, case, [queries] * 3, "cuda")


@DEVICES
@pytest.mark.parametrize("name", ["spans", "a tree"])
def test_beside_what_changes_scores(name, where):
    """The masks say who is seen, whatever the scores are."""
    how, seen = mask(name, 2, 20, 50)
    q, k, v = (torch.randn(2, s, 2, 64, device=where).bfloat16() for s in (20, 50, 50))
    asked = dict(layout="bshd", softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.3], device=where))
    o = flash_fwd(q, k, v, **moved(how, where), **asked)
    visible = torch.stack([seen(b, 20, 50) for b in range(2)]).to(where)
    mod = lambda b, h, i, j: visible[b, i, j]  # noqa: E731
    if where == "cpu":
        assert torch.equal(o, flash_fwd(q, k, v, mask_mod=mod, **asked))
    else:
        torch.testing.assert_close(o, flash_fwd(q, k, v, mask_mod=mod, **asked), atol=0.02, rtol=0.02)


def test_new_values_take_the_same_kernel():
    q, k, v = (torch.randn(2, s, 2, 64).bfloat16() for s in (20, 50, 50))
    with interpreted():
        for name in MASKS:
            before = None
            for _ in range(2):
                how, _ = mask(name, 2, 20, 50)
                flash_fwd(q, k, v, layout="bshd", **how)
                assert before in (None, len(compile._compiled))
                before = len(compile._compiled)


OWN = Chunks(True), Chunks(False), Spans(True), Spans(False), Drafts()


@pytest.mark.machine_code
@pytest.mark.parametrize(("own", "head_dim"), sample(5, OWN, [64, 128, 256]))
def test_the_machine_code(own, head_dim):
    key = FeatureKey(**{type(own).__name__.lower(): own}, window=own == Spans(True))
    causal = own in (Chunks(True), Spans(False))
    problem = Problem(4, 16, 16, 4096, 4096, head_dim, causal=causal, features=key)
    few = plan.kvcache(head_dim, "bf16", causal, key, ratio=8, max_seqlen_q=8, page_size=64, batch=9, heads_kv=8)
    for config in (plan.plan(problem), few):
        assert config.mask == own and inspect.report(config).problems() == [], config.name


@pytest.mark.parametrize("name", MASKS)
def test_compiled(name):
    how, _ = mask(name, 2, 20, 50)
    q, k, v = (torch.randn(2, s, 2, 64).bfloat16() for s in (20, 50, 50))
    function = torch.compile(lambda q: flash_fwd(q, k, v, layout="bshd", **how), backend="aot_eager", fullgraph=True)
    assert torch.equal(function(q), flash_fwd(q, k, v, layout="bshd", **how))


def test_spans_of_ids():
    ids = torch.tensor([[-1, 3, 3, 5, 5, 5, -1, -1, 3], [0, 0, -1, 1, 0, 0, 0, 0, 0]])
    want = [[[0, 1], [1, 3], [1, 3], [3, 6], [3, 6], [3, 6], [6, 7], [7, 8], [8, 9]]]
    want += [[[0, 2], [0, 2], [2, 3], [3, 4], *[[4, 9]] * 5]]
    assert spans(ids).tolist() == want and spans(ids.int()).dtype == torch.int32
    assert spans(ids[:, :0]).shape == (2, 0, 2)
    for wrong, error, words in (
        (ids.float(), TypeError, "span_ids: torch.float32 came; torch.int32 or torch.int64"),
        (ids[0], ValueError, r"span_ids: shape \(9,\) came; \(B, S\) is needed"),
        ([[1]], TypeError, "span_ids: list came"),
    ):
        with pytest.raises(error, match=words):
            spans(wrong)


Q = torch.zeros(2, 20, 2, 64, dtype=torch.bfloat16)
TABLE, BITS = torch.zeros(2, 20, 2, dtype=torch.int32), torch.zeros(2, 20, 1, dtype=torch.int32)
WRONG = {
    "no number": (dict(attention_chunk=2.5), TypeError, "attention_chunk: 2.5 came; a number of keys is needed"),
    "no chunk": (dict(attention_chunk=0), ValueError, "attention_chunk: 0 came; a number of keys of at least 1"),
    "two masks": (dict(attention_chunk=3, window=(3, 0)), ValueError, "attention_chunk: given with window; no kernel"),
    "spans and chunks": (
        dict(attention_chunk=3, spans=TABLE, causal=True),
        ValueError,
        "attention_chunk: given with",
    ),
    "spans of all": (dict(spans=TABLE), ValueError, "spans: given without causal=True or a window"),
    "spans' shape": (dict(spans=TABLE[:1], causal=True), ValueError, r"spans: shape .* \(B, places, 2\)"),
    "spans' type": (dict(spans=TABLE.long(), causal=True), TypeError, "spans: torch.int64 came, torch.int32 is needed"),
    "no places": (dict(spans=TABLE[:, :0], causal=True), ValueError, "spans: shape .* came"),
    "spans' strides": (
        dict(spans=torch.zeros(2, 2, 20, dtype=torch.int32).mT, causal=True),
        ValueError,
        "spans: strides .* use spans.contiguous",
    ),
    "no tensor": (dict(spans=[1], causal=True), TypeError, "spans: a torch.Tensor is needed, int32"),
    "causal drafts": (
        dict(draft_mask=BITS, causal=True),
        ValueError,
        "draft_mask: given with causal=True",
    ),
    "drafts in a window": (dict(draft_mask=BITS, window=(3, 3)), ValueError, "draft_mask: given with window"),
    "drafts' shape": (
        dict(draft_mask=BITS[:, :9]),
        ValueError,
        r"draft_mask: shape .* \(2, 20, 1\), a bit for",
    ),
    "drafts' type": (dict(draft_mask=BITS.bool()), TypeError, "draft_mask: torch.bool came, torch.int32 is needed"),
    "gradients": (
        dict(draft_mask=BITS, q=Q.clone().requires_grad_()),
        ValueError,
        "draft_mask: given with inputs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    changes, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        flash_fwd(**dict(q=Q, k=Q, v=Q, layout="bshd") | changes)


@pytest.mark.parametrize("how", [dict(attention_chunk=3), dict(spans=TABLE, window=(3, 0)), dict(draft_mask=BITS)])
def test_not_beside_causal_of_each(how):
    with interpreted(kernel=lambda *_: None), pytest.raises(ValueError, match="causal: a tensor came with"):
        flash_fwd_kvcache(Q, Q, Q, cache_seqlens=20, causal=int32([1, 0], "cpu"), **how)
