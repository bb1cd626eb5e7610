"""benchmarks/serving.py: its cells, caches and truth on the CPU, and what is timed in made-up graphs."""

import importlib
import json
import math
import sys
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cute_attn import plan, reference
from cute_attn.tools.benchmark import frame, implementations, timing
from cute_attn.tools.benchmark.workload import Spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scripts():
    """The script and its parts as modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = "caches", "serving", "serving_implementations"
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def caches(scripts, monkeypatch):
    """Three sets of every cache."""
    monkeypatch.setattr(scripts.caches, "MOST_SETS", 3)
    return scripts.caches


class FakeTimer:
    """Runs everything once, and takes this long for it, us."""

    def __init__(self, us=100.0):
        self.us = us

    def run(self, function, runs):
        function()

    def sample(self, function, samples, runs):
        return [self.us] * samples


def graphed(call, calls):
    """Stands in for a CUDA graph: a replay makes the calls, and writes the last one's output anew."""
    last = [call.run() for _ in range(calls)][-1]
    return timing.Call(lambda: [last.copy_(call.run()) for _ in range(calls)], count=calls), last


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setattr(timing, "graphed", graphed)
    return frame.Setup(CPU, FakeTimer(), lambda: nullcontext(timing.NoMonitor()), rounds=1, gpu="NVIDIA H200")


def small(caches, page=0, keys=(33, 70, 5), tokens=4, heads=(4, 2)):
    return caches.over_keys(3, heads, tokens, keys, 16, page)


# Cells


def test_cells_are_those_of_serving(scripts):
    cells = scripts.serving.CELLS
    assert {case: len(specs) for case, specs in cells.items()} == dict(decode=128, paged=36, ragged=4, chunk=40)
    decode = {(p.heads, p.heads_kv, p.head_dim, p.seqlen_q) for p in (x.problem for x in cells["decode"])}
    one = {(64, 8, 128, 1), (32, 8, 128, 1), (8, 8, 128, 1), (128, 1, 128, 1), (64, 8, 64, 1), (32, 8, 256, 1)}
    assert decode == one | {(heads, 8, 128, tokens) for heads in (64, 32) for tokens in (2, 4, 8)}
    assert {x.problem.page for x in cells["paged"]} == {1, 16, 64, 256} and not any(x.lengths for x in cells["paged"])
    assert {x.problem.page for x in cells["ragged"]} == {0, 1, 4, 64}
    assert {(x.problem.seqlen_q, x.problem.page) for x in cells["chunk"]} == {(2048, n) for n in (0, 16, 64, 128, 256)}
    every = [x for specs in cells.values() for x in specs]
    assert all(x.problem.causal == (x.problem.seqlen_q > 1) for x in every)
    assert len(scripts.serving.GROUPS) == len(every) and max(x.kv_bytes for x in every) <= 60e9


def test_only_selects_cells_by_their_names(scripts):
    named = [name for name in scripts.serving.GROUPS if "paged 64/8 d128 B32 Sq1 Sk8192" in name]
    assert [name.rpartition(" page ")[2] for name in named] == ["1", "16", "64", "256"]


def test_bytes_are_those_of_k_and_v_of_all_sequences_once(caches):
    """q and o of 3 sequences of 4 tokens in 4 heads, lse too; K and V of 108 keys in 2 heads, whatever the page."""
    for page in (0, 16):
        spec = small(caches, page)
        assert spec.kv_bytes == 2 * 2 * 108 * 2 * 16 and spec.facts()["kv_bytes"] == spec.kv_bytes
        assert spec.workload().bytes == spec.kv_bytes + 3 * 4 * 4 * (2 * 2 * 16 + 4)
        assert spec.workload().flops == 4 * 16 * 4 * (4 * 108 - 3 * 6)
    alike = caches.over_keys(5, (64, 8), 1, 1024)
    assert alike.kv_bytes == 5 * 1024 * 8 * 256 * 2


def test_sets_are_more_than_the_l2_holds_and_not_too_many(scripts):
    over_keys = scripts.caches.over_keys
    for batch, keys in ((1, 1024), (1, 8192), (8, 8192), (128, 32768)):
        spec = over_keys(batch, (64, 8), 1, keys)
        assert spec.sets * spec.kv_bytes >= 240e6 and (spec.sets == 1 or (spec.sets - 1) * spec.kv_bytes < 240e6)
    assert over_keys(1, (128, 1), 1, 1024).sets == 64


def test_ragged_lengths_are_fixed_and_log_uniform(scripts):
    lengths = scripts.caches.random_lengths(64)
    assert lengths == scripts.caches.random_lengths(64) and len(set(lengths)) > 50
    assert lengths[:4] == (17157, 11974, 2943, 1502) and 512 <= min(lengths) <= max(lengths) <= 32768
    assert {x.keys for x in scripts.serving.CELLS["ragged"]} == {lengths}
    assert 0.3 < sum(n < 4096 for n in lengths) / 64 < 0.7  # the middle of a log scale


def test_a_record_says_the_cell(caches):
    facts = small(caches, 16).facts()
    assert facts["shape"] == "3,4,4,16,2,5..70" and facts["page"] == 16
    assert facts["features"] == dict(sequences=3, tokens=12, page_size=16, sets=3)
    alike = caches.over_keys(5, (64, 8), 1, 1024).facts()
    assert alike["shape"] == "5,64,1,128,8,1024" and alike["features"] == dict(sets=3)


def test_the_kernel_of_a_cache_is_its_plans(scripts):
    over_keys, p = scripts.caches.over_keys, scripts.caches.Problem(1, 64, 8, 4, 1024, 128, causal=True)
    kernels = [over_keys(1, (64, 8), 4, 1024, page=page).kernel(None) for page in (0, 16, 64)]
    assert kernels == [
        plan.kvcache(128, "bf16", True, ratio=8, max_seqlen_q=4, page_size=page).name for page in (None, 16, 64)
    ]
    assert Spec(p).kernel(None) == plan.plan(p).name not in kernels and len(set(kernels)) > 1
    assert Spec(p, features=dict(softcap=True)).kernel(None) is None


# Caches


def test_pages_are_a_permutation_in_random_order(caches):
    spec = small(caches, 8)
    assert spec.pages == (5, 9, 1)
    table = caches.page_table(spec)
    own = [page for row, count in zip(table, spec.pages, strict=True) for page in row[:count].tolist()]
    assert table.dtype == torch.int32 and table.shape == (3, 9)
    assert sorted(own) == list(range(15)) and own != sorted(own)
    assert not table[0, 5:].any() and not table[2, 1:].any()


@pytest.mark.parametrize("page", [0, 8])
def test_sets_are_equal_and_of_other_memory(caches, page):
    cache = caches.build(small(caches, page), CPU)
    assert len(cache.k) == len(cache.v) == 3
    assert cache.k[0].shape == ((15, 8, 2, 16) if page else (3, 70, 2, 16)) == cache.v[0].shape
    for sets in (cache.k, cache.v):
        assert all(torch.equal(x, sets[0]) for x in sets)
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (*cache.k, *cache.v))
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert not torch.equal(cache.k[0], cache.v[0]) and cache.k[0].std().item() == pytest.approx(1, rel=0.1)
    assert cache.seqlens.dtype == torch.int32 and cache.seqlens.tolist() == [33, 70, 5]


def test_cells_share_a_buffer_that_grows(caches):
    pool, like = caches.Pool(), torch.empty(0)
    first, _ = pool.tensors(2, (3, 5), like)
    again = pool.tensors(1, (2, 2), like)[0]
    assert first.data_ptr() == again.data_ptr() and first.shape == (3, 5)
    grown = pool.tensors(4, (3, 5), like)
    assert len(grown) == 4 and {x.data_ptr() for x in grown} == {grown[0].data_ptr() + 4096 * i for i in range(4)}


@pytest.mark.parametrize("page", [0, 1, 8])
def test_the_truth_is_each_sequences_own_and_finds_a_wrong_one(caches, page):
    cache = caches.build(small(caches, page), CPU)
    truth = caches.CacheTruth(cache)
    o = torch.zeros(cache.q.shape)
    how = dict(page_table=cache.page_table, causal=True)
    for b, one, _ in reference.kvcache(cache.q, cache.k[0], cache.v[0], cache.seqlens, **how):
        o[b] = one.float()
    o = o.transpose(1, 2)
    assert {b for b, _ in truth.pairs} == {0, 2} and truth.errors(o)[1] < 1e-5
    for b in (0, 2):
        wrong = o.clone()
        wrong[b] += 1
        assert truth.errors(wrong)[0] == pytest.approx(1.0)
    o[1, 0, 0, 0] = torch.nan
    assert truth.errors(o) == (math.inf, math.inf)


def test_calls_take_the_sets_in_turn(caches):
    cache, seen = caches.build(small(caches), CPU), []
    prepared = caches.of_sets(cache, lambda k, v: seen.append((k, v)) or cache.q)
    for _ in range(7):
        returned = prepared.call.run()
    wanted = [(cache.k[i], cache.v[i]) for i in (0, 1, 2, 0, 1, 2, 0)]
    assert all(a is k and b is v for (a, b), (k, v) in zip(seen, wanted, strict=True))
    assert prepared.bhsd(returned).shape == (3, 4, 4, 16)


def test_dense_implementations_take_the_sets_in_turn(scripts, caches, monkeypatch):
    seen = []
    monkeypatch.setattr(implementations.cute_attn, "flash_fwd", lambda q, k, v, **_: seen.append((k, v)) or q)
    cache = caches.build(small(caches, keys=24), CPU)
    prepared = scripts.serving_implementations.dense(implementations.CuteAttn(), cache)
    for _ in range(4):
        prepared.call.run()
    assert [k.data_ptr() for k, _ in seen] == [cache.k[i].data_ptr() for i in (0, 1, 2, 0)]
    assert [v.data_ptr() for _, v in seen] == [cache.v[i].data_ptr() for i in (0, 1, 2, 0)]


# Graphs


@pytest.mark.parametrize(("us", "calls"), [(100.0, 60), (990.0, 6), (1900.0, 3), (9000.0, 3)])
def test_a_graph_holds_whole_rounds_of_about_2_ms(monkeypatch, us, calls):
    """us: what a round over three sets takes."""
    monkeypatch.setattr(timing, "graphed", graphed)
    call, last = timing.graphed_rounds(timing.Call(lambda: torch.ones(1)), 3, FakeTimer(us))
    assert call.count == calls and last.item() == 1


def test_rows_of_sets_are_timed_in_replays_alone(scripts, caches, setup):
    found = frame.measure(partial(scripts.serving.rows, "decode", small(caches, 8)), setup)
    ours = found[0]
    assert (ours["contender"], ours["mode"], ours["reason"]) == ("cute_attn", "graph", None)
    assert sum(r["contender"] == "cute_attn" for r in found) == 1
    assert ours["p50_us"] == pytest.approx(100 / 60) and ours["gb_per_s"] == ours["bytes"] / ours["p50_us"] / 1e3
    assert ours["relative_error"] < 1e-2 and ours["checked_heads"] == 8 and ours["case"] == "decode"
    assert ours["kernel"] == small(caches, 8).kernel(None)


def test_what_cannot_be_captured_is_timed_in_eager_calls(scripts, caches, setup, monkeypatch):
    monkeypatch.setattr(frame, "context_lost", lambda: False)

    def refuse(call, calls):
        raise torch.AcceleratorError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "graphed", refuse)
    eager, graph = frame.measure(partial(scripts.serving.rows, "decode", small(caches, 8)), setup)[:2]
    assert (eager["mode"], graph["mode"]) == ("eager", "graph") and eager["p50_us"] == 100.0
    assert graph["reason"].startswith("failed (AcceleratorError: operation not permitted")


def test_a_context_is_lost_where_waiting_for_it_fails_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not frame.context_lost()

    def fail():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert frame.context_lost()


def test_a_lost_context_ends_the_run(scripts, caches, setup, monkeypatch):
    def lose(*_, **__):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(frame, "context_lost", lambda: True)
    monkeypatch.setattr(timing, "graphed", lose)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        frame.measure(partial(scripts.serving.rows, "decode", small(caches, 8)), setup)


def test_a_replay_that_does_nothing_is_wrong(scripts, caches, setup, monkeypatch):
    def once(call, calls):
        """Only the first replay writes."""
        replay, last = graphed(call, calls)
        turns = iter([replay.run])
        return timing.Call(lambda: next(turns, lambda: None)(), count=calls), last

    monkeypatch.setattr(timing, "graphed_rounds", lambda call, sets, timer: once(call, sets))
    found = frame.measure(partial(scripts.serving.rows, "decode", small(caches, 8)), setup)
    assert found[1]["mode"] == "graph" and found[1]["reason"] == "wrong (NaN or inf in the output)"


# Implementations


def reasons(scripts, spec, setup):
    found = frame.measure(partial(scripts.serving.rows, "x", spec), setup)
    return {r["contender"]: r["reason"] or "" for r in found}


def test_who_is_not_here_and_who_refuses_say_why(scripts, caches, setup, monkeypatch):
    monkeypatch.setattr(scripts.serving, "missing", dict)
    packages = {one.package for one in scripts.serving_implementations.IMPLEMENTATIONS if one.package}
    alike, ragged, paged = (small(caches, page, keys) for page, keys in ((0, 24), (0, (9, 5, 24)), (8, 24)))
    found = reasons(scripts, alike, setup)
    assert not found["cute_attn"] and not found["flash_fwd"] and len(packages) > 5
    assert found["cudnn"].startswith("not comparable") and found["flash"].startswith("not supported (Could not run")
    assert found["flashinfer"] == "not supported (a cache without pages)"
    found = reasons(scripts, ragged, setup)
    assert found["flash_fwd"] == found["cudnn"] == found["flash"] == "not supported (a length of each sequence)"
    found = reasons(scripts, paged, setup)
    assert found["flash_fwd"] == found["cudnn"] == found["flash"] == "not supported (pages)"
    assert found["fa3_fwd"] == "not supported (pages: that build has none)" and not found["cute_attn"]


def test_absent_packages_say_why(scripts, caches, setup):
    found = reasons(scripts, small(caches, 8), setup)
    for name in ("fa3", "fa3_fwd", "flash_attn_3", "fa4", "flashinfer"):
        assert found[name].startswith("not installed (no module "), name


def test_pages_of_flashinfer_are_those_of_the_table(scripts, caches):
    cache = caches.build(small(caches, 8), CPU)
    starts, pages, last = scripts.serving_implementations.page_lists(cache)
    assert starts.tolist() == [0, 5, 14, 15] and last.tolist() == [1, 6, 5]
    for b, n in enumerate(cache.spec.pages):
        assert torch.equal(pages[starts[b] : starts[b + 1]], cache.page_table[b, :n])
    assert {x.dtype for x in (starts, pages, last)} == {torch.int32}


class Operator:
    """Stands in for FlashAttention-3's operator library: attention by the reference, in the operator's order."""

    def __init__(self):
        self.metadata, self.given = [], []

    def get_scheduler_metadata(self, *args):
        self.metadata.append(args)
        return torch.zeros(1)

    def fwd(self, *args, scheduler_metadata):
        q, k, v, used, table, scale, causal = (args[i] for i in (0, 1, 2, 11, 14, 23, 24))
        self.given.append(scheduler_metadata)
        seqlens = used if used is not None else k.shape[1]
        how = dict(page_table=table, causal=causal, scale=scale)
        return [torch.stack([o for _, o, _ in reference.kvcache(q, k, v, seqlens, **how)]).to(q.dtype)]


@pytest.mark.parametrize(("page", "keys", "made"), [(0, 24, 0), (0, (9, 5, 24), 1), (8, (9, 5, 24), 1)])
def test_operators_of_flash_attention_3_are_called_right(scripts, caches, monkeypatch, page, keys, made):
    """Metadata where there are lengths, made once before the calls."""
    implementations, cache = scripts.serving_implementations, caches.build(small(caches, page, keys), CPU)
    for metadata in (True, False):
        monkeypatch.setattr(torch.ops, "standin", operator := Operator(), raising=False)
        prepared = implementations.fa3_operator("standin", metadata, cache)
        outputs = [prepared.bhsd(prepared.call.run()) for _ in range(2)]
        assert all(caches.CacheTruth(cache).errors(o)[1] < 1e-2 for o in outputs)
        assert len(operator.metadata) == made * metadata
        assert {x is None for x in operator.given} == {not (made and metadata)}


# Runs


def test_a_run_is_written_with_its_method(scripts, caches, setup, tmp_path):
    make = partial(scripts.serving.rows, "paged", small(caches, 8))
    run = scripts.serving.Run({"paged": make}, {}, Console(), tmp_path / "x.json")
    run.prepare = lambda: setup
    assert run.run() == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert "take in turn" in content["method"]["inputs"] and "whole rounds" in content["method"]["graph"]
    assert content["complete"] and content["records"][0]["page"] == 8


def test_a_wrong_output_of_ours_fails_the_run(scripts, caches, setup, monkeypatch, capsys):
    right = scripts.serving_implementations.flash_fwd_kvcache
    monkeypatch.setattr(scripts.serving_implementations, "flash_fwd_kvcache", lambda *a, **k: right(*a, **k) * 1.5)
    make = partial(scripts.serving.rows, "paged", small(caches, 8))
    run = scripts.serving.Run({"paged": make}, {}, Console(), None)
    run.prepare = lambda: setup
    assert run.run() == 1 and "paged: cute_attn: wrong (relative error 5.0e-01" in capsys.readouterr().err


def test_rounds_are_asked_for(scripts, monkeypatch, tmp_path):
    script, seen = importlib.import_module("script"), []

    class Run(frame.Run):
        def run(self):
            seen.append(self.rounds)
            return 0

    monkeypatch.setattr(script, "no_hopper", lambda: None)
    for words in ([], ["--rounds", "2"]):
        argv = ["--out", str(tmp_path / "x.json"), *words]
        assert script.main("serving", None, {"a": lambda device: []}, argv, make=Run) == 0
    assert seen == [timing.ROUNDS, 2]


def of(case, contender, us, ratios, heads=64, page=0):
    """What the README reads of a record."""
    speed = dict(gb_per_s=4e6 / us if us else None, tflops=10.0 if us else None)
    shape = dict(case=case, heads=heads, heads_kv=8, head_dim=128, seqlen_q=1, page=page)
    return dict(shape, contender=contender, mode="graph", p50_us=us, ratios=ratios, **speed)


def test_the_readme_has_a_table_of_serving_where_there_is_a_record(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.serving() == []
    records = [
        of("decode", "cute_attn", 1000.0, {"fa3": 1.2, "fa4": 1.1, "flash_fwd": 0.5}),
        of("decode", "cute_attn", 2000.0, {"fa3": 2.0}),
        of("decode", "fa3", 1200.0, {"cute_attn": 0.5}),
        of("paged", "cute_attn", 1000.0, {}, page=16),
        of("paged", "cute_attn", None, {}, page=64),
    ]
    conditions = dict(gpu="NVIDIA H200", date="2027-01-02T03:04:05", torch="2.9", cutlass_dsl="4.8.1")
    (tmp_path / "serving.json").write_text(json.dumps(dict(schema=2, conditions=conditions, records=records)))
    lines = readme.serving()
    assert "| decode, 64/8, d128, 1 token | 2 | 2.00 to 4.00 | 10 | 1.483 | 1.100 |" in lines
    assert "| paged, 64/8, d128, 1 token | 1 | 4.00 | 10 |  |  |" in lines and any(
        "2027-01-02" in line for line in lines
    )
