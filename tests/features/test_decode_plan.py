"""`decode_plan`: the same results as without it, to the bit, by copies of the lengths; and what it is not of raises."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_attn import DecodePlan, decode_plan, explain, flash_fwd_kvcache, plan
from cute_attn.kernels.decode_plan import DecodePlanConfig
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.kvcache import dense, marked, paged, right
from tests.support.nightly import sample
from tests.support.requirements import interpreter
from tests.support.varlen import int32

KINDS = {
    "pages": lambda where: (paged([300, 0, 17, 129, 64], 16, seqlen_q=3, where=where), dict(causal=True)),
    "last CTA": lambda where: (paged([300, 0, 17, 129], 16, heads=20, heads_kv=10, where=where), dict(window=(100, 0))),
    "many": lambda where: (dense([n * 37 % 90 for n in range(70)], 96, heads=2, heads_kv=1, d=32, where=where), {}),
    "leftpad": lambda where: (dense([200, 64, 3, 130], 300, index=True, leftpad=True, where=where), {}),
    "packed": lambda where: (paged([90, 0, 300], 64, packed=[2, 0, 5], where=where), dict(max_seqlen_q=5, causal=True)),
    "of each": lambda where: (paged([90, 20, 300], 16, seqlen_q=2, where=where), dict(causal=int32([1, 0, 1], where))),
    "one length": lambda where: (dense([40] * 3, 48, where=where), dict(cache_seqlens=40)),
    "rows that threads copy": lambda where: (paged([90, 0, 200], 3, where=where), dict(softcap=2.0)),
}
OF_A_LAYER = "page_table", "cache_batch_idx", "softcap"  # beside the plan


def asked(kind, where="cpu"):
    """A case, and its arguments: of the plan, and of a layer."""
    case, how = KINDS[kind](where)
    both = case.how | how
    return case, both, {name: x for name, x in both.items() if name in OF_A_LAYER}


def run(case, **how):
    """o, whose rows of no sequence stay as they were, and lse."""
    return flash_fwd_kvcache(case.q, case.k_cache, case.v_cache, return_lse=True, out=marked(case), **how)


def made(case, both, **more):
    return decode_plan(case.q, case.k_cache, case.v_cache, **both, **more)


def same(case, both, of_layer):
    """As without a plan."""
    found = made(case, both)
    o, lse = run(case, cache_seqlens=found, **of_layer)
    want, want_lse = run(case, **both)
    written = ~case.q[..., 0].isnan().T if "cu_seqlens_q" in both else ...  # (H, total): rows of no sequence are NaN
    assert torch.equal(o.view(torch.int16), want.view(torch.int16)) and torch.equal(lse[written], want_lse[written])
    rows = {name: x for name, x in both.items() if name in ("causal", "window", "softcap")}
    right(case, o, None, **rows)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu(kind):
    found = same(*asked(kind))
    assert isinstance(found, DecodePlan) and found.entries is None


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize("kind", sample(2, KINDS))
def test_interpreted(kind):
    """The list, its reader, and the kernel that finds the same alone."""
    with interpreted(num_sms=7 if kind == "many" else 11) as configs:
        found = same(*asked(kind))
    maker, reader, alone = configs
    assert (maker.forward, reader.planned, alone.planned) == (reader, True, False)
    assert found.entries.shape == (reader.rows_of_ctas(7 if kind == "many" else 11, *found.kind[3:5]), 4)


@interpreter
@pytest.mark.machine_code
def test_lengths_that_change():
    """The plan keeps its own, until it is written in place."""
    case, both, of_layer = asked("pages")
    with interpreted(num_sms=11):
        found = made(case, both)
        want = run(case, cache_seqlens=found, **of_layer)
        lengths, entries = both["cache_seqlens"].clone(), found.entries.clone()
        both["cache_seqlens"].fill_(1)
        again = run(case, cache_seqlens=found, **of_layer)
        assert made(case, both, out=found) is found and not torch.equal(found.entries, entries)
        assert not torch.equal(run(case, cache_seqlens=found, **of_layer)[1], want[1])
        both["cache_seqlens"].copy_(lengths)
        made(case, both, out=found)
        last = run(case, cache_seqlens=found, **of_layer)
    for x, y, z in zip(want, again, last, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@interpreter
def test_no_list_for_long_queries():
    """Whose CTAs do not share the keys."""
    case = paged([300, 200], 64, seqlen_q=200)
    with interpreted() as configs:
        found = made(case, case.how)
        assert found.entries is None
        assert explain(*case[:3], function=flash_fwd_kvcache, cache_seqlens=found, page_table=case.how["page_table"])
    assert not configs


def test_explained():
    case, both, _ = asked("pages")
    with interpreted():
        found = explain(*case[:3], function=flash_fwd_kvcache, **both)
        assert found.by == "cute_attn" and "planned" not in found.kernel


CASE, BOTH, OF_LAYER = asked("pages")
WRONG = {
    "other queries": (dict(q=CASE.q[:, :2]), "cache_seqlens: a DecodePlan of 5 sequences of 3 queries each"),
    "fewer sequences": (
        dict(q=CASE.q[:3], page_table=OF_LAYER["page_table"][:3]),
        r"shape \(5,\) came, \(3,\) is needed",
    ),
    "other heads": (dict(q=CASE.q[:, :, :2]), "2 heads on 2.* make one with this call's arguments"),
    "less room": (dict(page_table=OF_LAYER["page_table"][:, :4]), "and this call has .* room for 64 keys"),
    "a window": (dict(window=(3, 0)), "window: given with a DecodePlan as cache_seqlens, which was made with its own"),
    "causal of each": (dict(causal=int32([1] * 5, "cpu")), "causal: given with a DecodePlan as cache_seqlens"),
    "packed": (dict(cu_seqlens_q=int32([0, 1], "cpu")), "cu_seqlens_q: given with a DecodePlan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_of_other_calls(case):
    changes, words = WRONG[case]
    call = dict(q=CASE.q, k_cache=CASE.k_cache, v_cache=CASE.v_cache, cache_seqlens=made(CASE, BOTH), **OF_LAYER)
    assert flash_fwd_kvcache(**call, causal=True).shape == CASE.q.shape, "what it was made with may be given"
    with pytest.raises(ValueError, match=words):
        flash_fwd_kvcache(**call | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(window=(3, 0)), "out: a DecodePlan of 5 sequences"),
        (dict(max_seqlen_q=3, cu_seqlens_q=int32([0] * 6, "cpu"), q=CASE.q[:, 0]), "out: a DecodePlan of 5 sequences"),
        (dict(cache_seqlens=3), "cache_seqlens: 3 came, and out was made with a tensor"),
        (dict(q=CASE.q[:, :1]), "out: a DecodePlan of 5 sequences of 3 queries each.* this call has 5 sequences of 1"),
        (dict(out=CASE.q), "out: Tensor came; a DecodePlan is needed"),
    ],
)
def test_a_plan_that_is_not_like_out(changes, words):
    call = dict(q=CASE.q, k_cache=CASE.k_cache, v_cache=CASE.v_cache, **BOTH)
    with pytest.raises((TypeError, ValueError), match=words):
        decode_plan(**call | dict(out=made(CASE, BOTH)) | changes)


def test_a_call_that_raises_leaves_out_as_it_was():
    case = paged([300, 0, 17, 129, 64], 16, heads=4)
    with interpreted(num_sms=11):
        found = made(case, case.how, alibi_slopes=torch.ones(4))
        lengths, entries = found.cache_seqlens.clone(), found.entries.clone()
        shorter = dict(case.how, cache_seqlens=int32([1, 0, 2, 3, 4], "cpu"))
        with pytest.raises(ValueError, match="alibi_slopes: shape"):
            made(case, shorter, alibi_slopes=torch.ones(3), out=found)
    assert torch.equal(lengths, found.cache_seqlens) and torch.equal(entries, found.entries)


def test_a_window_is_copied():
    case, sides = paged([300, 20], 16), [100, 0]
    found = made(case, case.how, window=sides)
    sides[0] = 3
    want = run(case, **case.how, window=(100, 0))
    table = dict(page_table=case.how["page_table"])
    for how in ({}, dict(window=(100, 0)), dict(window=[100, 0])):
        assert torch.equal(run(case, cache_seqlens=found, **table, **how)[0], want[0])


@interpreter
def test_nothing_to_list():
    """No sequences, no heads: nothing is launched."""
    case = paged([30, 20], 16)
    none = dict(cache_seqlens=int32([], "cpu"), page_table=case.how["page_table"][:0])
    packed = dict(none, cu_seqlens_q=int32([0], "cpu"), max_seqlen_q=1)
    for q, how in ((case.q[:0], none), (case.q[:0, 0], packed), (case.q[:, :, :0], case.how)):
        with interpreted() as configs:
            found = decode_plan(q, case.k_cache, case.v_cache, **how)
            table = dict(page_table=how["page_table"])
            o = flash_fwd_kvcache(q, case.k_cache, case.v_cache, cache_seqlens=found, **table)
        assert o.shape == q.shape and found.entries is None and not configs


@interpreter
def test_no_fake_tensors_beside_real_lengths():
    case = paged([30, 20], 16)
    fake = FakeTensorMode()
    q, k, v = (fake.from_tensor(x) for x in case[:3])
    with interpreted() as configs, pytest.raises(TypeError, match=r"q: a .*FakeTensor came beside tensors with memory"):
        decode_plan(q, k, v, **case.how)
    assert not configs


def test_of_another_head_dim_on_the_cpu():
    case, other = paged([30, 20], 16), paged([30, 20], 16, d=128)
    with pytest.raises(ValueError, match=r"cache_seqlens: a DecodePlan of .* D 64 came, and this call has .* D 128"):
        run(other, cache_seqlens=made(case, case.how), page_table=other.how["page_table"])
    with pytest.raises(ValueError, match="alibi_slopes: shape"):
        made(case, case.how, alibi_slopes=torch.ones(3))


def test_beside_a_compiled_function():
    """Which calls it where its graph breaks."""

    def function(q):
        torch._dynamo.graph_break()
        return made(CASE._replace(q=q * 1), BOTH).cache_seqlens

    assert torch.equal(torch.compile(function, backend="eager")(CASE.q), BOTH["cache_seqlens"])


def test_not_in_a_trace():
    found = made(CASE, BOTH)

    def function(q):
        return flash_fwd_kvcache(q, CASE.k_cache, CASE.v_cache, cache_seqlens=found, **OF_LAYER)

    with pytest.raises(Exception, match="a DecodePlan came in a call that is traced"):
        torch.fx.experimental.proxy_tensor.make_fx(function)(CASE.q)
    with pytest.raises(Exception, match="a DecodePlan came in a call that is traced"):
        torch.fx.experimental.proxy_tensor.make_fx(lambda q: made(CASE._replace(q=q), BOTH).cache_seqlens)(CASE.q)


@pytest.mark.machine_code
def test_healthy():
    config = plan.kvcache(128, "bf16", True, ratio=8, max_seqlen_q=1, batch=200, page_size=16)
    config = replace(config, planned=True)
    assert inspect.report(config).problems() == []
    build = inspect.build(DecodePlanConfig(config))
    assert inspect.spill_stores(build.log) == 0 and "0 bytes stack frame" in build.log


# On the GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_right(kind):
    same(*asked(kind, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [33, 500, 1100, 4000])
def test_many_sequences(batch):
    case = paged(torch.randint(0, 400, (batch,)).tolist(), 16, heads=8, heads_kv=2, where="cuda")
    same(case, case.how, {name: x for name, x in case.how.items() if name in OF_A_LAYER})


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [True, False])
def test_a_graph(inside):
    """The plan captured with its layer, or written in place before each replay."""
    case, both, of_layer = asked("pages", "cuda")
    every = [torch.randint(1, n + 1, (5,)) * (torch.tensor([300, 0, 17, 129, 64]) > 0) for n in (17, 5, 1)]
    found, graph = made(case, both), torch.cuda.CUDAGraph()
    run(case, cache_seqlens=found, **of_layer)
    with torch.cuda.graph(graph):
        if inside:
            made(case, both, out=found)
        o, lse = run(case, cache_seqlens=found, **of_layer)
    for lengths in every:
        both["cache_seqlens"].copy_(lengths.clamp(max=torch.tensor([300, 0, 17, 129, 64])))
        if not inside:
            made(case, both, out=found)
        graph.replay()
        want = run(case, **both)
        assert torch.equal(o, want[0]) and torch.equal(lse, want[1])
