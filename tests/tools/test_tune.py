"""The tuned tables and the tuner. On a fake GPU: real outputs of the reference, times that the test sets."""

import json
import multiprocessing
import os
import warnings
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cute_attn import call, compile, device, plan, reference, tuned
from cute_attn.kernels.config import FwdConfig
from cute_attn.kernels.mask import Causal
from cute_attn.kernels.tile_scheduler import DynamicLongest, OneTile, StaticTiles
from cute_attn.plan import HEAD_DIMS, Problem
from cute_attn.tools import tune
from cute_attn.tools.benchmark import machine, progress
from cute_attn.tools.tuning import candidates as room
from cute_attn.tools.tuning import choose, results, trial
from cute_attn.tools.tuning.candidates import Verdict, candidates, incumbents
from cute_attn.tools.tuning.tables import row_word
from cute_attn.tuned import Row
from tests.support.attention import check, inputs
from tests.support.nightly import sample

GPU = "NVIDIA H100 NVL"
CONDITIONS = dict(gpu=GPU, date="2026-01-02", kernels_sha256="5eed") | dict.fromkeys(results.VERSIONS, "1")
KEY = (64, False, "bf16")
A, B, C = (FwdConfig(64, tile_n=n) for n in (128, 112, 96))
DYNAMIC = FwdConfig(64, tile_m=192, scheduler=DynamicLongest)
SMALL = FwdConfig(64, tile_m=64, scheduler=OneTile, pingpong=False)
SPLIT = replace(SMALL, split=2)
FEW_ROWS = (Row(SPLIT, max_row_blocks=64, min_seqlen_k=384), Row(SMALL, max_row_blocks=132))


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """No table of a user but those that a test writes, and none remembered; the folder that they go to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("CUTE_ATTN_TUNED", raising=False)
    monkeypatch.setattr(tuned.platformdirs, "user_config_dir", lambda name: str(tmp_path / "config" / name))
    forget()
    yield tmp_path / "config" / "cute_attn" / "tuned"
    torch.set_num_threads(threads)
    monkeypatch.undo()
    forget()


def forget():
    call.known.clear()
    for cached in (tuned.table, plan.plan):
        cached.cache_clear()


# The package's table


def expected(problem):
    """The rule behind the H200's rows, as it was found by hand on 2026-11-20 (benchmarks/NOTEBOOK.md)."""
    head_dim, causal, seqlen_q = -(-problem.head_dim // 32) * 32, problem.causal, problem.seqlen_q
    blocks = problem.batch * problem.heads * -(-seqlen_q // 64)
    fields = few_tiles(head_dim, causal, blocks, problem.seqlen_k) or many_tiles(head_dim, causal, seqlen_q)
    return FwdConfig(head_dim, problem.dtype, problem.layout, tuned.MASKS[causal], **fields)


def many_tiles(head_dim, causal, seqlen_q):
    """Up to 64 columns four warpgroups; then three, where causal or long; two beside wide rows."""
    if head_dim <= 64:
        tiles = -(-seqlen_q // 256)
        uneven = 1 < tiles <= 18 and tiles * 256 - seqlen_q >= 64
        scheduler = DynamicLongest if causal or uneven else StaticTiles
        return dict(tile_m=256, tile_n=64, stages=4, q_stages=2, scheduler=scheduler, speculative=True)
    if head_dim == 96 and (causal or seqlen_q > 1024):
        scheduler = DynamicLongest if causal else StaticTiles
        return dict(tile_m=192, tile_n=96, q_stages=2, scheduler=scheduler, speculative=True)
    cluster = 2 if causal and head_dim != 160 and seqlen_q > (2896 if head_dim in (128, 224) else 1448) else 1
    if causal and head_dim == 128:
        stages = 5 - cluster
        return dict(tile_m=192, tile_n=64, stages=stages, scheduler=DynamicLongest, cluster=cluster, speculative=True)
    if causal:
        tile_m, tile_n = {160: (192, 64), 192: (128, 96), 224: (128, 96), 256: (128, 64)}[head_dim]
        return dict(tile_m=tile_m, tile_n=tile_n, scheduler=DynamicLongest, cluster=cluster)
    if head_dim == 128 and seqlen_q > 2896:
        return dict(tile_m=192, tile_n=64, q_stages=2, cluster=2)
    tile_n = {96: 128, 128: 128, 160: 96, 192: 96, 224: 80, 256: 64}[head_dim]
    return dict(tile_m=128, tile_n=tile_n, q_in_regs=head_dim <= 128, cluster=2)


def few_tiles(head_dim, causal, blocks, seqlen_k):
    """For blocks of 64 queries fewer than twice the SMs: smaller tiles; fewer than half of them: split keys too."""
    if head_dim not in (64, 128):
        return None
    one = dict(tile_m=64, tile_n=64, stages=4 if head_dim == 64 else 2, scheduler=OneTile, pingpong=False)
    if head_dim == 64 and blocks <= 8 and seqlen_k >= 3072:
        return one | dict(split=8, tile_n=128, stages=2)
    if blocks <= 24 and seqlen_k >= (768 if head_dim == 64 else 1024):
        return one | dict(split=4)
    if blocks <= 64 and seqlen_k >= 384:
        return one | dict(split=2)
    if blocks <= 132 and (head_dim, causal) != (128, True):
        return one | dict(tile_n=128, stages=2)
    if blocks <= 264 and (head_dim, causal) == (128, True):
        return one | dict(stages=4, scheduler=DynamicLongest)
    if blocks <= 264:
        return dict(tile_m=128, tile_n=64, stages=4, scheduler=OneTile, speculative=True, pingpong=head_dim == 64)
    return None


LENGTHS = [
    *range(0, 4700, 13),
    *range(254, 260),
    *range(446, 452),
    *range(1022, 1027),
    *range(2893, 2900),
    *range(4540, 4550),
    *range(4605, 4612),
    8192,
    99_999,
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_the_h200s_table_is_the_rule_that_was_found(head_dim, causal):
    for seqlen in LENGTHS:
        for dtype, layout in (("bf16", "bhsd"), ("fp16", "bshd")):
            for batch in (2, 80):  # 8 and 320 heads in all: tiles are few up to some length, or never
                asked = Problem(batch, 4, 4, seqlen, 77, head_dim, dtype, layout, causal)
                assert plan.plan(asked) == plan.plan(asked, "GeForce") == expected(asked)


BLOCKS = sorted({n + i for n in (1, 8, 24, 64, 132, 264) for i in (0, 1)})
KEYS = [1, 64, *(n + i for n in (384, 768, 1024, 3072) for i in (-1, 0)), 100_000]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_and_so_it_is_for_few_tiles(head_dim, causal):
    for blocks in BLOCKS:
        for seqlen_k in KEYS:
            for sizes in ((1, blocks, 1), (blocks, 1, 64), (1, 1, 64 * blocks), (1, 1, 64 * blocks - 63)):
                batch, heads, seqlen_q = sizes
                asked = Problem(batch, heads, heads, seqlen_q, seqlen_k, head_dim, causal=causal)
                assert plan.plan(asked) == expected(asked)


BOTH, FULL, CAUSAL = (False, True), (False,), (True,)
FEW = [  # head_dim, masks, B H Sq Sk -> tile, split, scheduler
    (64, BOTH, (1, 8, 64, 8192), (64, 128), 8, "once"),
    (64, BOTH, (1, 8, 64, 3071), (64, 64), 4, "once"),
    (64, BOTH, (1, 9, 64, 8192), (64, 64), 4, "once"),
    (64, BOTH, (2, 4, 100, 1024), (64, 64), 4, "once"),
    (64, BOTH, (2, 4, 100, 767), (64, 64), 2, "once"),
    (64, BOTH, (4, 16, 1, 512), (64, 64), 2, "once"),
    (64, BOTH, (4, 16, 1, 383), (64, 128), 1, "once"),
    (64, BOTH, (4, 16, 65, 512), (64, 128), 1, "once"),
    (64, BOTH, (1, 132, 64, 512), (64, 128), 1, "once"),
    (64, BOTH, (1, 133, 64, 512), (128, 64), 1, "once"),
    (64, BOTH, (2, 132, 64, 512), (128, 64), 1, "once"),
    (64, FULL, (1, 265, 64, 512), (256, 64), 1, "static"),
    (64, CAUSAL, (1, 265, 64, 512), (256, 64), 1, "drawn"),
    (40, BOTH, (1, 8, 64, 8192), (64, 128), 8, "once"),
    (32, FULL, (1, 8, 64, 8192), (256, 64), 1, "static"),
    (96, FULL, (1, 8, 64, 8192), (128, 128), 1, "static"),
    (128, BOTH, (1, 8, 64, 8192), (64, 64), 4, "once"),
    (128, BOTH, (1, 24, 64, 1024), (64, 64), 4, "once"),
    (128, BOTH, (1, 24, 64, 1023), (64, 64), 2, "once"),
    (128, BOTH, (1, 25, 64, 1024), (64, 64), 2, "once"),
    (128, BOTH, (1, 64, 64, 384), (64, 64), 2, "once"),
    (128, FULL, (1, 64, 64, 383), (64, 128), 1, "once"),
    (128, FULL, (1, 132, 64, 512), (64, 128), 1, "once"),
    (128, FULL, (1, 133, 64, 512), (128, 64), 1, "once"),
    (128, FULL, (1, 264, 64, 512), (128, 64), 1, "once"),
    (128, FULL, (1, 265, 64, 512), (128, 128), 1, "static"),
    (128, FULL, (1, 2, 4096, 4096), (64, 128), 1, "once"),
    (128, FULL, (1, 3, 4096, 4096), (128, 64), 1, "once"),
    (128, FULL, (1, 5, 4096, 4096), (192, 64), 1, "static"),
    (128, CAUSAL, (1, 65, 64, 512), (64, 64), 1, "drawn"),
    (128, CAUSAL, (1, 264, 64, 512), (64, 64), 1, "drawn"),
    (128, CAUSAL, (1, 265, 64, 512), (192, 64), 1, "drawn"),
    (256, FULL, (1, 1, 1, 8192), (128, 64), 1, "static"),
]


@pytest.mark.parametrize(("head_dim", "masks", "sizes", "tile", "split", "scheduler"), FEW, ids=str)
def test_few_tiles_in_numbers(head_dim, masks, sizes, tile, split, scheduler):
    batch, heads, seqlen_q, seqlen_k = sizes
    for causal in masks:
        found = plan.plan(Problem(batch, heads, heads, seqlen_q, seqlen_k, head_dim, causal=causal))
        assert ((found.tile_m, found.tile_n), found.split, found.scheduler.name) == (tile, split, scheduler)


def test_every_class_has_rows_and_says_what_was_measured():
    content = json.loads((Path(tuned.__file__).parent / "tuned.json").read_text())
    assert {"gpu", "date", "versions", "kernels_sha256", "method", "rows"} <= set(content)
    assert content["gpu"] == "NVIDIA H200"
    table = tuned.prebuilt()
    assert set(table.classes) == {(d, c, t) for d in HEAD_DIMS for c in (False, True) for t in ("bf16", "fp16")}
    assert all(rows[-1].always for rows in table.classes.values())
    assert [row.entry() for row in table.rows] == content["rows"]


@pytest.mark.parametrize(("dtype", "layout"), sample(1, ("bf16", "fp16"), ("bhsd", "bshd")))
def test_prebuilt_is_what_the_table_can_reach(dtype, layout):
    sizes = [(h, s, k) for h in (1, 3, 999) for s in LENGTHS for k in {s, 99_999}]
    reached = {
        plan.plan(
            Problem(1, h, h, s, k, d, dtype, layout, c and not window, constant_time, plan.FeatureKey(window=window))
        )
        for d, c in product(HEAD_DIMS, (False, True))
        for h, s, k in sizes
        for constant_time in (False, True)
        for window in (False, True)
    }
    ready = [config for config in plan.prebuilt() if (config.dtype, config.layout) == (dtype, layout)]
    assert reached == {config for config in ready if not (config.score.name or config.sinks)}


def test_prebuilt_begins_with_one_of_each():
    every = [*product(HEAD_DIMS, ("bf16", "fp16"), ("bhsd", "bshd"), (False, True))]
    assert plan.prebuilt()[: len(every)] == [plan.config(*one) for one in every]


# A user's tables


def write(path, *rows, gpu=GPU):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(gpu=gpu, rows=[row if isinstance(row, dict) else row.entry() for row in rows])))


def problem(seqlen=2048, **options):
    return Problem(1, 1, 1, seqlen, seqlen, 64, **options)


def test_a_users_table_serves_its_gpu(tables):
    write(tables / "nvidia_h100_nvl.json", Row(B, max_seqlen_q=1000), Row(C, dtype="fp16"), Row(A))
    before = plan.plan(problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan.plan(problem(1000), GPU) == B
        assert plan.plan(problem(1001), GPU) == A
        assert plan.plan(problem(1001, dtype="fp16"), GPU) == replace(C, dtype="fp16")
        assert plan.plan(problem(causal=True), GPU) == plan.plan(problem(causal=True)), "what it lacks is the package's"
        assert plan.plan(problem()) == plan.plan(problem(), "NVIDIA H200") == before
    mine = {
        replace(c, layout="bhsd")
        for c in plan.prebuilt(GPU)
        if (c.head_dim, c.mask.name, c.score.name) == (64, "full", "")
    }
    named = {B, A, replace(B, dtype="fp16"), replace(C, dtype="fp16")}
    assert mine == named | {plan.constant_time(c) for c in (A, replace(C, dtype="fp16"))}


def test_a_named_table_serves_every_gpu(tmp_path, monkeypatch):
    write(tmp_path / "mine.json", Row(A))
    monkeypatch.setenv("CUTE_ATTN_TUNED", str(tmp_path / "mine.json"))
    assert plan.plan(problem()) == plan.plan(problem(), "GeForce") == A
    assert tuned.file_in_use(GPU) == tmp_path / "mine.json"


FIELDS = tuned.in_words(A)
BAD = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "no object": b"[]",
    "no rows": json.dumps(dict(gpu=GPU)),
    "another GPU": dict(gpu="GeForce", rows=[Row(A).entry()]),
    "no row for every length": [Row(A, max_seqlen_q=512).entry()],
    "head_dim": [dict(Row(A).entry(), head_dim=72)],
    "causal": [dict(Row(A).entry(), causal="no")],
    "no fields": [dict(head_dim=64, causal=False)],
    "unknown key": [dict(Row(A).entry(), tile=3)],
    "unknown field": [dict(Row(A).entry(), fields=FIELDS | dict(warps=4))],
    "type": [dict(Row(A).entry(), fields=FIELDS | dict(tile_n="128"))],
    "scheduler": [dict(Row(A).entry(), fields=FIELDS | dict(scheduler="random"))],
    "shared memory": [dict(Row(A).entry(), fields=FIELDS | dict(tile_n=256, stages=4))],
    "stages": [dict(Row(A).entry(), fields=FIELDS | dict(stages=0))],
    "cluster": [dict(Row(A).entry(), fields=FIELDS | dict(cluster=4))],
    "split": [dict(Row(A).entry(), fields=tuned.in_words(SMALL) | dict(split=3))],
    "split tiles of 128": [dict(Row(A).entry(), fields=FIELDS | dict(split=2))],
    "Q tiles": [dict(Row(A).entry(), fields=FIELDS | dict(q_stages=3))],
    "overlap": [dict(Row(A).entry(), fields=FIELDS | dict(overlap=False))],
    "for few tiles only": [Row(A, max_row_blocks=64).entry()],
    "for many keys only": [Row(A, min_seqlen_k=64).entry()],
    "bound": [dict(Row(A).entry(), max_seqlen_q=-1), Row(A).entry()],
    "dtype": [dict(Row(A).entry(), dtype="fp8"), Row(A).entry()],
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_table_is_named_and_ignored(tables, bad):
    content, path = BAD[bad], tables / "nvidia_h100_nvl.json"
    path.parent.mkdir(parents=True)
    content = dict(gpu=GPU, rows=content) if isinstance(content, list) else content
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else str.encode(content if isinstance(content, str) else json.dumps(content))
    )
    with pytest.warns(RuntimeWarning, match="nvidia_h100_nvl.json: this table of tuned kernels is ignored"):
        assert plan.plan(problem(), GPU) == plan.plan(problem())


def test_a_missing_named_table_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_TUNED", str(tmp_path / "none.json"))
    with pytest.warns(RuntimeWarning, match="none.json"):
        assert plan.plan(problem()) == expected(problem())


def test_rows_say_themselves():
    rows = [Row(A), Row(B, "fp16", 512, 64, tflops={"512": 300.0}), Row(FwdConfig(64, mask=Causal(), stages=3))]
    rows += [Row(B, "bf16", 512, 64, 132, 384, {"512": 300.0}), *FEW_ROWS, Row(B, min_seqlen_k=1)]
    rows.append(Row(FwdConfig(64, tile_m=256, tile_n=64, stages=4, q_stages=2)))
    for row in rows:
        assert tuned.parse(dict(gpu=GPU, rows=[row.entry(), Row(row.config).entry()])).rows[0] == row


@pytest.mark.parametrize("bound", ["max_seqlen_q", "min_free_rows", "max_row_blocks", "min_seqlen_k"])
def test_a_bound_is_a_positive_integer(bound):
    row = Row(A, **{bound: 1})
    assert row.entry() == dict(Row(A).entry(), **{bound: 1})
    assert not row.always
    for value in (0, -1, 1.0, "64", True, None):
        with pytest.raises(ValueError, match=f"^row 1: {bound} {value!r} is not a positive integer$"):
            tuned.parse(dict(gpu=GPU, rows=[Row(A).entry(), dict(row.entry(), **{bound: value})]))


def test_a_row_serves_within_all_its_bounds():
    assert Row(A).always and Row(A).serves(1) and Row(A).serves(99_999, 1, 1)
    few = Row(A, max_row_blocks=64)
    assert [few.serves(512, 512, blocks) for blocks in (0, 1, 64, 65, None)] == [True, True, True, False, False]
    keys = Row(A, min_seqlen_k=384)
    assert [keys.serves(512, seqlen_k) for seqlen_k in (0, 383, 384, 385)] == [False, False, True, True]
    row = Row(DYNAMIC, None, 1000, 64, 64, 384)
    assert row.serves(500, 384, 64)
    assert not any(row.serves(*no) for no in ((1001, 384, 64), (576, 384, 64), (500, 383, 64), (500, 384, 65)))


def test_the_first_row_whose_bounds_are_kept_serves(tables):
    write(tables / "nvidia_h100_nvl.json", *FEW_ROWS, Row(C, min_seqlen_k=5000), Row(A))

    def planned(heads, seqlen_q, seqlen_k):
        return plan.plan(Problem(1, heads, heads, seqlen_q, seqlen_k, 64), GPU)

    assert planned(32, 65, 384) == SPLIT
    assert planned(32, 65, 383) == planned(33, 65, 384) == planned(66, 65, 9000) == SMALL
    assert planned(67, 65, 4999) == A
    assert planned(67, 65, 5000) == C


def test_rows_in_words():
    assert row_word(Row(A)) == "128x128, 2 stages, static"
    few = Row(SPLIT, "bf16", max_row_blocks=64, min_seqlen_k=384)
    said = "64x128, 2 stages, once, split over 2, no ping-pong; row blocks <= 64; keys >= 384; bf16"
    assert row_word(few) == said
    large = Row(FwdConfig(64, tile_m=256, tile_n=64, stages=4, q_stages=2, cluster=2), None, 512, 64)
    said = "256x64, 4 stages, static, cluster of 2, 2 Q tiles; S <= 512; free rows >= 64"
    assert row_word(large) == said
    assert row_word(Row(replace(A, speculative=True))) == "128x128, 2 stages, static, speculative softmax"


# Candidates


@pytest.mark.parametrize("key", [k for k in tuned.prebuilt().classes if k[2] == "bf16"], ids=str)
def test_candidates(key):
    mine = incumbents(tuned.prebuilt().classes[key])
    found = candidates(key, mine)
    assert found[: len(mine)] == mine
    assert len(set(found)) == len(found) <= 80
    assert all((c.head_dim, c.mask.causal, c.dtype, c.layout) == (*key[:2], "bf16", "bhsd") for c in found)
    assert {c.pingpong for c in found} == {False, True}
    assert {c.scheduler for c in found} == {StaticTiles, DynamicLongest}
    assert {c.cluster for c in found} == {1, 2}
    assert all(c.scheduler.dynamic == c.mask.causal for c in found if c.cluster == 2)
    assert {c.split for c in found} == {1}, "kernels for few tiles are not on trial"
    if key[0] <= 64:
        assert {c.tile_m for c in found} == {128, 192, 256}
        assert {(c.stages, c.q_stages) for c in found} == {(k, q) for k in (2, 3, 4) for q in (1, 2)}
    assert all(room.registers_left(c) >= 0 for c in found)
    assert set(found) <= set(candidates(key, mine, wide=True))


def test_the_model_of_registers_drops_what_spilled():
    """Each compiled and looked at, CUDA 13: `inspect.report` found spills in the first three, none in the others."""
    spills = [dict(tile_m=192, tile_n=144), dict(tile_m=192, tile_n=160), dict(tile_m=192, tile_n=128, q_in_regs=True)]
    fits = [dict(tile_m=192, tile_n=128), dict(tile_m=192, tile_n=112, q_in_regs=True), dict(tile_n=224)]
    fits += [dict(tile_m=256, tile_n=64), dict(tile_m=64, tile_n=256)]
    assert all(room.registers_left(FwdConfig(64, **fields)) < 0 for fields in spills)
    assert all(room.registers_left(FwdConfig(64, **fields)) >= 0 for fields in fits)
    assert room.registers_left(FwdConfig(256, tile_n=80)) >= 0


def test_kernels_for_few_tiles_are_no_incumbents():
    assert incumbents([*FEW_ROWS, Row(B, max_seqlen_q=512), Row(C, min_seqlen_k=384), Row(A)]) == [B, C, A]


def test_judged_in_processes_of_their_own(cache):
    """One that kills its process is found, and takes no other along."""
    dying = replace(A, scheduler=Dies)
    verdicts = room.judge_all([dying, A], store=True, workers=1)
    assert verdicts == {dying: Verdict(("the compiler's process died",)), A: Verdict(())}
    assert compile.cache_file(A).exists(), "for `compile.get`"


def test_a_spilling_kernel_is_not_stored(cache):
    spilling = FwdConfig(64, tile_m=192, q_in_regs=True)
    assert "spills" in room.judge(spilling, store=True).problems[0]
    assert not compile.cache_file(spilling).exists()


class EndsItsProcess(type):
    @property
    def name(cls):
        if multiprocessing.parent_process() is not None:
            os._exit(1)
        return "dies"


class Dies(StaticTiles, metaclass=EndsItsProcess):
    """A compiler that crashes where the kernel's name is asked for."""


def test_without_nvdisasm_nobody_looks(monkeypatch):
    def missing(config):
        raise FileNotFoundError("nvdisasm")

    monkeypatch.setattr(room.inspect, "report", missing)
    assert room.judge(A, store=False) == Verdict(None)
    assert room.judge(A, store=False).usable


def test_a_compiler_that_fails_is_a_verdict(monkeypatch):
    def fails(config):
        raise RuntimeError("no")

    monkeypatch.setattr(room.inspect, "report", fails)
    assert room.judge(A, store=False).problems == ("does not compile (RuntimeError: no)",)


# The choice


S = (512, 1024, 2048, 4096)


def times(**us):
    """Config -> S -> three rounds, 0.1 % apart: `A=[100, 100, ...]`, a number for each length."""
    by_name = dict(A=A, B=B, C=C, DYNAMIC=DYNAMIC, STATIC=replace(DYNAMIC, scheduler=StaticTiles))
    noise = (0.9995, 1.0, 1.0005)
    return {
        by_name[name]: {s: [x * n for n in noise] for s, x in zip(S, each, strict=True)} for name, each in us.items()
    }


@pytest.mark.parametrize(("gain", "wins"), [(0.0, False), (0.005, False), (0.009, False), (0.012, True), (0.1, True)])
def test_a_challenger_must_win_by_more_than_one_percent(gain, wins):
    found = choose.choose(times(A=[100] * 4, B=[100 / (1 + gain)] * 4), (Row(A),), S)
    assert found == ((Row(B),) if wins else (Row(A),))


def test_and_by_more_than_the_spread():
    shaky = times(A=[100] * 4, B=[97] * 4)
    shaky[B] = {s: [90.0, 93.0, 97.0, 101.0, 104.0] for s in S}
    shaky[A] = {s: [100.0] * 5 for s in S}
    assert choose.score(shaky, (Row(B),), S).spread == pytest.approx(8 / 97)
    assert choose.choose(shaky, (Row(A),), S) == (Row(A),)
    shaky[B] = {s: [96.9, 96.9, 97.0, 97.1, 140.0] for s in S}
    assert choose.choose(shaky, (Row(A),), S) == (Row(B),), "one slow round is no spread"


def test_what_is_there_stays_as_it_is():
    rows = (Row(B, max_seqlen_q=700, tflops={"512": 1.0}), Row(A))
    found = choose.choose(times(A=[100, 100, 100, 100], B=[99, 100, 101, 102], C=[101, 99.8, 99.5, 100.2]), rows, S)
    assert found is rows


def test_lengths_are_split_where_that_wins():
    found = choose.choose(times(A=[100] * 4, B=[90, 92, 110, 110], C=[120, 120, 95, 94]), (Row(A),), S)
    assert found == (Row(B, max_seqlen_q=1448), Row(C)), "between 1024 and 2048"
    left = choose.choose(times(A=[100] * 4, B=[90, 100, 110, 110]), (Row(A),), S)
    assert left == (Row(B, max_seqlen_q=724), Row(A))
    right = choose.choose(times(A=[100] * 4, B=[110, 110, 110, 95]), (Row(A),), S)
    assert right == (Row(A, max_seqlen_q=2896), Row(B))
    none = choose.choose(times(A=[100] * 4, B=[99.5, 100, 110, 110], C=[120, 120, 99.2, 99.5]), (Row(A),), S)
    assert none == (Row(A),)


def test_bounds_that_are_there_are_kept_in_a_split():
    rows = (Row(DYNAMIC, max_seqlen_q=4608, min_free_rows=64), Row(replace(DYNAMIC, scheduler=StaticTiles)))
    measured = times(DYNAMIC=[100] * 4, STATIC=[110] * 4, B=[120, 120, 120, 90])
    found = choose.choose(measured, rows, S)
    assert found == (rows[0]._replace(max_seqlen_q=2896), rows[1]._replace(max_seqlen_q=2896), Row(B))
    table = tuned.parse(dict(gpu=GPU, rows=[row.entry() for row in found]))
    assert [next(r for r in table.classes[KEY] if r.serves(s)).config.tile_n for s in (576, 2896, 2897)] == [
        128,
        128,
        112,
    ]


def test_a_dynamic_scheduler_is_for_uneven_lengths_where_only_those_were_timed():
    static = replace(DYNAMIC, scheduler=StaticTiles)
    found = choose.choose(times(A=[100] * 4, DYNAMIC=[90] * 4, STATIC=[95] * 4), (Row(A),), S)
    assert found == (Row(DYNAMIC, min_free_rows=64), Row(static))
    dynamic = times(A=[100] * 4, DYNAMIC=[90] * 4)
    assert choose.choose(dynamic, (Row(A),), S) == (Row(DYNAMIC),), "static was not healthy"
    assert choose.choose(dynamic, (Row(A),), S, {static}) == found


def test_rows_for_few_tiles_stay_in_front():
    """Whatever wins among the others: no time of theirs is asked for, and they serve none of the timed lengths."""
    few, measured = FEW_ROWS, times(A=[100] * 4, B=[90, 92, 110, 110], C=[120, 120, 95, 94])
    assert choose.choose(measured, (*few, Row(A)), S) == (*few, Row(B, max_seqlen_q=1448), Row(C))
    assert choose.choose(times(A=[100] * 4, B=[90] * 4), (*few, Row(A)), S) == (*few, Row(B))
    assert choose.choose(times(B=[100] * 4), (*few, Row(A)), S) == (*few, Row(B)), "what was there failed"
    rows = (*few, Row(A))
    assert choose.choose(times(A=[100] * 4, B=[99.5] * 4), rows, S) is rows
    rows = (Row(B, max_seqlen_q=700), *few, Row(A))
    assert choose.choose(times(A=[100] * 4, B=[99.5] * 4), rows, S) is rows, "nor does their place change without a win"
    tuned.parse(dict(gpu=GPU, rows=[row.entry() for row in (*few, Row(B, max_seqlen_q=1448), Row(C))]))


def test_rows_for_many_keys_are_on_trial():
    rows = (Row(B, min_seqlen_k=2000), Row(A))
    assert choose.serving(rows, 1999) == rows[1] and choose.serving(rows, 2000) == rows[0]
    assert choose.choose(times(A=[100, 100, 110, 110], B=[110, 110, 100, 100]), rows, S) is rows
    found = choose.choose(times(A=[100] * 4, B=[110] * 4), rows, S)
    assert found == (Row(A),)


def test_where_what_is_there_fails_the_best_takes_its_place():
    assert choose.choose(times(B=[100] * 4, C=[99.9] * 4), (Row(A),), S) == (Row(C),)


# A tune on a fake GPU


class FakeGpu:
    """Runs the reference; a kernel takes `us(config, S)`, is off by `wrong` for some, and dies for others."""

    def __init__(self, us, wrong=(), failing=(), stuck=()):
        self.us, self.wrong, self.failing, self.stuck = us, wrong, failing, stuck
        self.log = defaultdict(set)
        self.runs_now = None
        self.lab = trial.Lab(torch.device("cpu"), self, self.launch, self.wait)

    def launch(self, config, inputs, o):
        assert (config.dtype, config.layout) == (inputs.problem.dtype, "bshd")
        bare = replace(config, dtype="bf16", layout="bhsd")
        if bare in self.failing:
            raise RuntimeError("invalid argument")
        seqlen = inputs.problem.seqlen_q

        def call():
            self.runs_now = bare
            self.log[seqlen].add(bare)
            got, _ = reference.attention(
                *inputs.bshd(), causal=inputs.problem.causal, layout="bshd", dtype=torch.float32
            )
            o.copy_(got * 1.01 if bare in self.wrong else got)

        call.us = self.us(bare, seqlen)
        return call

    def wait(self):
        if self.runs_now in self.stuck:
            raise TimeoutError("no end after 20 s")

    def run(self, function, runs):
        pass

    def sample(self, function, samples, runs):
        return [function.us] * samples


@pytest.fixture
def few(monkeypatch):
    """Three candidates beside what is there, all healthy, and nothing is compiled."""

    def three(key, there, wide=False):
        mine = [FwdConfig(key[0], mask=tuned.MASKS[key[1]], tile_n=n) for n in (48, 64, 80)]
        return list(dict.fromkeys([*there, *mine]))

    def judge_all(configs, store, step=lambda: None, workers=None):
        return {config: Verdict(("spills: 8 bytes",) if config.tile_n == 48 else ()) for config in configs}

    monkeypatch.setattr(tune, "candidates", three)
    monkeypatch.setattr(tune, "judge_all", judge_all)


def tuner(path, gpu, *words, resume=False, clock=None):
    args = tune.parse([*words, "--seqlens", "16,32", "--tokens", "32", "--resume" if resume else "--out", str(path)])
    found = tune.open_results(args, CONDITIONS, Console(quiet=True))
    more = dict(clock=clock) if clock else {}
    return tune.Tune(args, found, gpu.lab, Console(quiet=True), **more)


def faster(*tiles):
    return lambda config, seqlen: 90.0 if config.tile_n in tiles else 100.0


def test_a_tune_writes_a_table_that_plans(tmp_path, few, monkeypatch):
    path, gpu = tmp_path / "t.json", FakeGpu(faster(80))
    assert tuner(path, gpu, "--head-dim", "64,256", "--full").run() == 0
    content = json.loads(path.read_text())
    assert {key: content[key] for key in ("gpu", "date", "kernels_sha256")} == dict(
        gpu=GPU, date="2026-01-02", kernels_sha256="5eed"
    )
    assert [(e["head_dim"], e["causal"], e["dtype"], e["seqlens"]) for e in content["tuned"]] == [
        (64, False, "bf16", [16, 32]),
        (256, False, "bf16", [16, 32]),
    ]
    mine = [e for e in content["measured"] if e["head_dim"] == 64]
    assert {(e["fields"]["tile_m"], e["fields"]["tile_n"], e["fields"]["scheduler"]): e["reason"] for e in mine} == {
        (256, 64, "drawn"): None,
        (256, 64, "static"): None,
        (128, 48, "static"): "spills: 8 bytes",
        (128, 64, "static"): None,
        (128, 80, "static"): None,
    }
    best = next(e for e in mine if e["fields"]["tile_n"] == 80)
    assert best["tflops"]["32"] == pytest.approx(4 * 32 * 32 * 2048 / 90 / 1e6, abs=0.1), "4 B H S S D"
    assert best["relative_error"] < 1e-2
    assert not any(config.tile_n == 48 for seen in gpu.log.values() for config in seen), "unhealthy: never launched"
    monkeypatch.setenv("CUTE_ATTN_TUNED", str(path))
    forget()
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 256):
            assert plan.plan(Problem(1, 32, 32, 999, 999, head_dim, dtype)).tile_n == 80
        for few in (Problem(1, 1, 1, 999, 999, 64, dtype), Problem(1, 8, 8, 999, 999, 64, dtype)):
            assert plan.plan(few) == expected(few), "not on trial"
    asked = Problem(1, 32, 32, 999, 999, 128)
    assert plan.plan(asked) == expected(asked), "as it was before"


def test_into_a_pipe_a_line_now_and_then(tmp_path, few, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert tuner(tmp_path / "t.json", FakeGpu(faster(80)), "--head-dim", "64", "--full").run() == 0
    lines = capsys.readouterr().err.splitlines()
    for words in ("class 1 of 1, d64 full bf16: screening: ", "class 1 of 1, d64 full bf16: the best "):
        assert any(line.startswith(words) and line.endswith(" s") for line in lines)


def test_nothing_changes_without_a_clear_win(tmp_path, few):
    path = tmp_path / "t.json"
    assert (
        tuner(
            path, FakeGpu(lambda config, seqlen: 99.5 if config.tile_n == 80 else 100.0), "--head-dim", "64,256"
        ).run()
        == 0
    )
    rows = tuned.parse(json.loads(path.read_text())).rows
    assert [r._replace(tflops=None) for r in rows] == [r._replace(tflops=None) for r in tuned.prebuilt().rows]


def test_wrong_and_failing_candidates_are_out(tmp_path, few):
    """A wrong one is the fastest; one of the two that are left wins."""
    path = tmp_path / "t.json"
    wrong, failing = FwdConfig(256, tile_n=64), FwdConfig(256, tile_n=80)
    gpu = FakeGpu(lambda config, _: 90.0 if config in (wrong, failing) else 100.0, wrong=[wrong], failing=[failing])
    assert tuner(path, gpu, "--head-dim", "256", "--full").run() == 0
    content = json.loads(path.read_text())
    reasons = {tuned.config_of(e["head_dim"], e["causal"], e["fields"]): e["reason"] for e in content["measured"]}
    assert reasons[wrong].startswith("wrong (relative error 1.")
    assert reasons[failing] == "failed (RuntimeError: invalid argument)"
    assert tuned.parse(content).classes[256, False, "bf16"][0].config == expected(Problem(1, 8, 8, 32, 32, 256))


def test_errors_are_held_against_the_best():
    assert set(trial.wrong({A: 2e-3, B: 2.4e-3, C: 4e-3})) == {C}
    assert set(trial.wrong({A: torch.inf, B: float("nan"), C: 3e-3})) == {A, B}
    assert set(trial.wrong({A: 0.5, B: 0.3})) == {A, B}
    assert trial.wrong({}) == {}


def test_resume_after_an_interrupt(tmp_path, few):
    path, words = tmp_path / "t.json", ("--head-dim", "64,128,256", "--full")

    def interrupted(config, seqlen):
        if config.head_dim == 128:
            raise KeyboardInterrupt
        return faster(80)(config, seqlen)

    assert tuner(path, FakeGpu(interrupted), *words, resume=True).run() == tune.INTERRUPTED
    assert [e["head_dim"] for e in json.loads(path.read_text())["tuned"]] == [64]
    gpu = FakeGpu(faster(64))
    assert tuner(path, gpu, *words, resume=True).run() == 0
    content = json.loads(path.read_text())
    assert [e["head_dim"] for e in content["tuned"]] == [64, 128, 256]
    assert {config.head_dim for seen in gpu.log.values() for config in seen} == {128, 256}, "64 is not timed again"
    *few, last = tuned.parse(content).classes[KEY]
    assert last.config.tile_n == 80
    assert few == [row for row in tuned.prebuilt().classes[KEY] if row.max_row_blocks]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_budget_ends_a_run_between_classes(tmp_path, few):
    path, now = tmp_path / "t.json", [0.0]

    def us(config, seqlen):
        now[0] += 3.0
        return 100.0

    run = tuner(path, FakeGpu(us), "--head-dim", "64,128,256", "--full", "--budget", "60", clock=lambda: now[0])
    assert run.run() == 0
    assert [e["head_dim"] for e in json.loads(path.read_text())["tuned"]] == [64], "the next would take as long"


def test_a_kernel_that_hangs_is_left_out_next_time(tmp_path, few):
    path, bad = tmp_path / "t.json", FwdConfig(256, tile_n=80)
    words = ("--head-dim", "256", "--full")
    assert tuner(path, FakeGpu(faster(80), stuck=[bad]), *words, resume=True).run() == tune.STUCK
    gpu = FakeGpu(faster(80))
    assert tuner(path, gpu, *words, resume=True).run() == 0
    assert not any(bad in seen for seen in gpu.log.values())
    entries = [e for e in json.loads(path.read_text())["measured"] if e["fields"]["tile_n"] == 80]
    assert [e["reason"] for e in entries] == ["failed (TimeoutError: no end after 20 s)"]


def test_no_candidate_works(tmp_path, few):
    path = tmp_path / "t.json"
    every = [FwdConfig(256, tile_n=n) for n in (64, 80)] + [expected(Problem(1, 8, 8, 32, 32, 256))]
    assert tuner(path, FakeGpu(faster(), failing=every), "--head-dim", "256", "--full").run() == 1
    assert tuned.parse(json.loads(path.read_text())).classes == tuned.prebuilt().classes


@pytest.mark.parametrize("change", [dict(gpu="GeForce"), dict(kernels_sha256="0"), dict(tuned=None)], ids=str)
def test_resume_refuses_what_does_not_match(tmp_path, few, capsys, change):
    path = tmp_path / "t.json"
    assert tuner(path, FakeGpu(faster()), "--head-dim", "256", "--full").run() == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert tune.open_results(tune.parse(["--resume", str(path)]), CONDITIONS, Console(quiet=True)) is None
    assert str(path) in capsys.readouterr().err


def test_types(tmp_path, few, monkeypatch):
    """What is found for fp16 is for fp16; for bf16 too only where the kernel is not healthy in fp16."""
    path = tmp_path / "t.json"
    assert tuner(path, FakeGpu(faster(80)), "--head-dim", "256", "--full", "--dtype", "fp16").run() == 0
    table = tuned.parse(json.loads(path.read_text()))
    assert [table.classes[256, False, t][0].config.tile_n for t in ("bf16", "fp16")] == [64, 80]

    def judge_all(configs, store, step=lambda: None):
        return {c: Verdict(("spills",) if c.dtype == "fp16" or c.tile_n == 48 else ()) for c in configs}

    monkeypatch.setattr(tune, "judge_all", judge_all)
    assert tuner(path, FakeGpu(faster(80)), "--head-dim", "256", "--full").run() == 0
    table = tuned.parse(json.loads(path.read_text()))
    assert [table.classes[256, False, t][0].config.tile_n for t in ("bf16", "fp16")] == [80, 64]
    rows = results.with_rows(table.rows, (256, False, "bf16"), (Row(FwdConfig(256, tile_n=48)),))
    assert {t: tuned.by_class(rows)[256, False, t][0].config.tile_n for t in ("bf16", "fp16")} == dict(bf16=48, fp16=48)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_for_few_tiles_are_never_timed_and_stay(tmp_path, few, dtype):
    """Both types keep them in front, even where what is found is for one type only."""
    path, gpu, key = tmp_path / "t.json", FakeGpu(faster(80)), (64, False, dtype)
    there = [row for row in tuned.prebuilt().classes[key] if row.max_row_blocks]
    assert len(there) == 5
    assert tuner(path, gpu, "--head-dim", "64", "--full", "--dtype", dtype).run() == 0
    content = json.loads(path.read_text())
    timed = {config for seen in gpu.log.values() for config in seen}
    assert timed and not timed & {row.config for row in there}
    measured = [tuned.config_of(e["head_dim"], e["causal"], e["fields"]) for e in content["measured"]]
    assert not {row.config for row in there} & set(measured)
    classes = tuned.parse(content).classes
    for one in ("bf16", "fp16"):
        rows = classes[64, False, one]
        assert [row._replace(dtype=None) for row in rows[: len(there)]] == there
        assert not any(row.max_row_blocks for row in rows[len(there) :])
    assert [row.config.tile_n for row in classes[key][len(there) :]] == [80]
    assert classes[key][-1].tflops.keys() == {"16", "32"}
    assert not any(row.tflops for row in classes[key][: len(there)])


# The command line


def test_bad_arguments(capsys, tmp_path):
    for words in (["--head-dim", "72"], ["--causal", "--full"], ["--rounds", "0"], ["--seqlens", "a"]):
        with pytest.raises(SystemExit, match="2"):
            tune.parse(words)
    with pytest.raises(SystemExit, match="2"):
        tune.parse(["--out", str(tmp_path / "a"), "--resume", str(tmp_path / "b")])
    assert tune.parse(["--causal", "--head-dim", "64,128"]).keys == [(64, True, "bf16"), (128, True, "bf16")]
    assert len(tune.parse([]).keys) == 16


def test_without_a_gpu_it_says_so_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    monkeypatch.setattr(tune, "judge_all", None)
    assert tune.main(["--out", str(tmp_path / "t.json")]) == 2
    out, error = capsys.readouterr()
    assert "a Hopper GPU is needed, and no CUDA device is available; --list" in error and not out
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_lists_when_asked(few, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    assert tune.main(["--head-dim", "256", "--full", "--out", str(tmp_path / "t.json"), "--list"]) == 0
    out = capsys.readouterr().out
    assert "No Hopper GPU here: nothing was timed. (no CUDA device is available" in out
    assert "d256 full bf16: 4 candidates, 3 to be timed" in out
    assert "spills: 8 bytes" in out
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.gpu
def test_a_small_tune(tables, monkeypatch):
    """One class, three candidates, two lengths; the table plans this GPU's calls, and they are right."""
    trio = [FwdConfig(128, tile_n=n, q_in_regs=q) for n, q in ((128, True), (112, False), (64, False))]
    monkeypatch.setattr(tune, "candidates", lambda key, there, wide=False: list(dict.fromkeys([*there, *trio])))
    words, gpu = ["--head-dim", "128", "--full", "--seqlens", "512,1024", "--rounds", "2"], torch.cuda.get_device_name()
    assert device.name() is None, "there is no table yet"
    assert tune.main(words) == 0
    path = tuned.user_file(gpu)
    content = json.loads(path.read_text())
    assert (content["gpu"], content["kernels_sha256"]) == (gpu, machine.kernel_hash())
    assert all(e["reason"] is None and len(e["screened"]) == 2 for e in content["measured"])
    content["rows"] = [dict(r, fields=r["fields"] | dict(tile_n=64)) for r in content["rows"] if r["head_dim"] == 128]
    path.write_text(json.dumps(content))
    forget()
    check(*inputs(4, 32, 32, 512, 512, 128))
    assert device.name() == gpu
    assert plan.plan(Problem(4, 32, 32, 512, 512, 128)).tile_n == 128
    assert plan.plan(Problem(4, 32, 32, 512, 512, 128), gpu).tile_n == 64
    assert plan.plan(Problem(4, 32, 32, 512, 512, 128), gpu) in compile._compiled, "that is what the call ran"
    assert tune.main([*words, "--resume", str(path)]) == 0, "nothing is left to do"
