"""The tuned tables and the tuner. On a fake GPU: real outputs of the reference, times that the test sets."""

import json
import multiprocessing
import os
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention import check, inputs
from rich.console import Console

from cute_attn import api, compile, device, plan, reference, tune, tuned
from cute_attn.benchmark import machine
from cute_attn.kernels.config import FwdConfig
from cute_attn.kernels.mask import Causal
from cute_attn.kernels.tile_scheduler import DynamicLongest, StaticTiles
from cute_attn.plan import HEAD_DIMS, Problem
from cute_attn.tuned import Row
from cute_attn.tuning import candidates as room
from cute_attn.tuning import choose, results, trial
from cute_attn.tuning.candidates import Verdict, candidates, incumbents

GPU = "NVIDIA H100 NVL"
CONDITIONS = dict(gpu=GPU, date="2026-01-02", kernels_sha256="5eed") | dict.fromkeys(results.VERSIONS, "1")
KEY = (64, False, "bf16")
A, B, C = (FwdConfig(64, tile_n=n) for n in (128, 112, 96))
DRAWN = FwdConfig(64, tile_m=192, scheduler=DynamicLongest)


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
    api._calls.clear()
    for cached in (tuned.table, plan.plan):
        cached.cache_clear()


# The package's table


def expected(head_dim, causal, seqlen_q):
    """The rule behind the H200's rows, as it was found by hand on 2026-11-20 (benchmarks/NOTEBOOK.md)."""
    head_dim = -(-head_dim // 32) * 32
    tile_m = 192 if head_dim <= 64 else 128
    tile_n = {160: 96, 192: 96, 224: 96 if causal else 80, 256: 80}.get(head_dim, 128)
    q_in_regs = head_dim == 128 or (head_dim == 96 and not causal)
    cluster = 2 if head_dim > 64 and not causal else 1
    tiles = -(-seqlen_q // tile_m)
    uneven = cluster == 1 and 1 < tiles <= 24 and tiles * tile_m - seqlen_q >= 64
    scheduler = DynamicLongest if causal or uneven else StaticTiles
    return FwdConfig(
        head_dim,
        mask=plan.tuned.MASKS[causal],
        tile_m=tile_m,
        tile_n=tile_n,
        q_in_regs=q_in_regs,
        cluster=cluster,
        scheduler=scheduler,
    )


LENGTHS = [
    *range(0, 4700, 13),
    *range(190, 196),
    *range(318, 324),
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
            want = replace(expected(head_dim, causal, seqlen), dtype=dtype, layout=layout)
            assert plan.plan(Problem(2, 4, 2, seqlen, 77, head_dim, dtype, layout, causal)) == want
            assert plan.plan(Problem(2, 4, 2, seqlen, 77, head_dim, dtype, layout, causal), "GeForce") == want


def test_every_class_has_rows_and_says_what_was_measured():
    content = json.loads((Path(tuned.__file__).parent / "tuned.json").read_text())
    assert {"gpu", "date", "versions", "kernels_sha256", "method", "rows"} <= set(content)
    assert content["gpu"] == "NVIDIA H200"
    table = tuned.shipped()
    assert set(table.classes) == {(d, c, t) for d in HEAD_DIMS for c in (False, True) for t in ("bf16", "fp16")}
    assert all(rows[-1].always for rows in table.classes.values())
    assert [row.entry() for row in table.rows] == content["rows"]


def test_shipped_is_what_the_table_can_reach():
    every = [(d, t, o, c) for d in HEAD_DIMS for t in ("bf16", "fp16") for o in ("bhsd", "bshd") for c in (False, True)]
    reached = {plan.plan(Problem(1, 1, 1, s, s, d, t, o, c)) for d, t, o, c in every for s in LENGTHS}
    assert reached == set(plan.shipped())
    assert plan.shipped()[: len(every)] == [plan.config(*one) for one in every]


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
    mine = {replace(c, layout="bhsd") for c in plan.shipped(GPU) if (c.head_dim, c.mask.causal) == (64, False)}
    assert mine == {B, A, replace(B, dtype="fp16"), replace(C, dtype="fp16")}


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
    "causal cluster": [dict(Row(A).entry(), causal=True, fields=FIELDS | dict(cluster=2))],
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
        assert plan.plan(problem()) == expected(64, False, 2048)


def test_rows_say_themselves():
    for row in (Row(A), Row(B, "fp16", 512, 64, {"512": 300.0}), Row(FwdConfig(64, mask=Causal(), stages=3))):
        assert tuned.parse(dict(gpu=GPU, rows=[row.entry(), Row(row.config).entry()])).rows[0] == row


# Candidates


@pytest.mark.parametrize("key", [k for k in tuned.shipped().classes if k[2] == "bf16"], ids=str)
def test_candidates(key):
    mine = incumbents(tuned.shipped().classes[key])
    found = candidates(key, mine)
    assert found[: len(mine)] == mine
    assert len(set(found)) == len(found) <= 80
    assert all((c.head_dim, c.mask.causal, c.dtype, c.layout) == (*key[:2], "bf16", "bhsd") for c in found)
    assert {c.pingpong for c in found} == {False, True}
    assert {c.scheduler for c in found} == {StaticTiles, DynamicLongest}
    assert {c.cluster for c in found} == ({1} if key[1] else {1, 2})
    assert all(room.registers_left(c) >= 0 for c in found)
    assert set(found) <= set(candidates(key, mine, wide=True))


def test_the_model_of_registers_drops_what_spilled():
    """Each compiled and looked at, CUDA 13: `inspect.report` found spills in the first three, none in the others."""
    spills = [dict(tile_m=192, tile_n=144), dict(tile_m=192, tile_n=160), dict(tile_m=192, tile_n=128, q_in_regs=True)]
    fits = [dict(tile_m=192, tile_n=128), dict(tile_m=192, tile_n=112, q_in_regs=True), dict(tile_n=224)]
    assert all(room.registers_left(FwdConfig(64, **fields)) < 0 for fields in spills)
    assert all(room.registers_left(FwdConfig(64, **fields)) >= 0 for fields in fits)
    assert room.registers_left(FwdConfig(256, tile_n=80)) >= 0


def test_judged_in_processes_of_their_own(cache):
    """A healthy kernel is stored for `compile.get`, a spilling one is not; one that kills its process is found."""
    spilling, dying = FwdConfig(64, tile_m=192, tile_n=160), replace(A, scheduler=Dies)
    verdicts = room.judge_all([A, spilling, dying], store=True, workers=2)
    assert verdicts[A] == Verdict(())
    assert "spills" in verdicts[spilling].problems[0]
    assert verdicts[dying].problems == ("the compiler's process died",)
    assert [compile.cache_file(c).exists() for c in (A, spilling)] == [True, False]


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
    by_name = dict(A=A, B=B, C=C, DRAWN=DRAWN, STATIC=replace(DRAWN, scheduler=StaticTiles))
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
    rows = (Row(DRAWN, max_seqlen_q=4608, min_free_rows=64), Row(replace(DRAWN, scheduler=StaticTiles)))
    measured = times(DRAWN=[100] * 4, STATIC=[110] * 4, B=[120, 120, 120, 90])
    found = choose.choose(measured, rows, S)
    assert found == (rows[0]._replace(max_seqlen_q=2896), rows[1]._replace(max_seqlen_q=2896), Row(B))
    table = tuned.parse(dict(gpu=GPU, rows=[row.entry() for row in found]))
    assert [next(r for r in table.classes[KEY] if r.serves(s)).config.tile_n for s in (576, 2896, 2897)] == [
        128,
        128,
        112,
    ]


def test_drawn_tiles_are_for_uneven_lengths_where_only_those_were_timed():
    static = replace(DRAWN, scheduler=StaticTiles)
    found = choose.choose(times(A=[100] * 4, DRAWN=[90] * 4, STATIC=[95] * 4), (Row(A),), S)
    assert found == (Row(DRAWN, min_free_rows=64), Row(static))
    assert choose.choose(times(A=[100] * 4, DRAWN=[90] * 4), (Row(A),), S) == (Row(DRAWN),), "static was not healthy"
    assert choose.choose(times(A=[100] * 4, DRAWN=[90] * 4), (Row(A),), S, {static}) == found


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
    path, gpu = tmp_path / "t.json", FakeGpu(faster(64))
    assert tuner(path, gpu, "--head-dim", "64,256", "--full").run() == 0
    content = json.loads(path.read_text())
    assert {key: content[key] for key in ("gpu", "date", "kernels_sha256")} == dict(
        gpu=GPU, date="2026-01-02", kernels_sha256="5eed"
    )
    assert [(e["head_dim"], e["causal"], e["dtype"], e["seqlens"]) for e in content["tuned"]] == [
        (64, False, "bf16", [16, 32]),
        (256, False, "bf16", [16, 32]),
    ]
    mine = {e["fields"]["tile_n"]: e["reason"] for e in content["measured"] if e["head_dim"] == 64}
    assert mine == {128: None, 48: "spills: 8 bytes", 64: None, 80: None}
    best = next(e for e in content["measured"] if e["head_dim"] == 64 and e["fields"]["tile_n"] == 64)
    assert best["tflops"]["32"] == pytest.approx(4 * 32 * 32 * 2048 / 90 / 1e6, abs=0.1), "4 B H S S D"
    assert best["relative_error"] < 1e-2
    assert not any(config.tile_n == 48 for seen in gpu.log.values() for config in seen), "unhealthy: never launched"
    monkeypatch.setenv("CUTE_ATTN_TUNED", str(path))
    forget()
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 256):
            assert plan.plan(Problem(1, 1, 1, 999, 999, head_dim, dtype)).tile_n == 64
    assert plan.plan(Problem(1, 1, 1, 999, 999, 128)) == expected(128, False, 999), "as it was before"


def test_nothing_changes_without_a_clear_win(tmp_path, few):
    path = tmp_path / "t.json"
    assert (
        tuner(path, FakeGpu(lambda config, seqlen: 99.5 if config.tile_n == 64 else 100.0), "--head-dim", "256").run()
        == 0
    )
    rows = tuned.parse(json.loads(path.read_text())).rows
    assert [r._replace(tflops=None) for r in rows] == [r._replace(tflops=None) for r in tuned.shipped().rows]


def test_wrong_and_failing_candidates_are_out(tmp_path, few):
    """A wrong one is the fastest; one of the two that are left wins."""
    path = tmp_path / "t.json"
    wrong, failing = FwdConfig(256, tile_n=64), FwdConfig(256, tile_n=80)
    gpu = FakeGpu(faster(64, 80), wrong=[wrong], failing=[failing])
    assert tuner(path, gpu, "--head-dim", "256", "--full").run() == 0
    content = json.loads(path.read_text())
    reasons = {tuned.config_of(e["head_dim"], e["causal"], e["fields"]): e["reason"] for e in content["measured"]}
    assert reasons[wrong].startswith("wrong (relative error 1.")
    assert reasons[failing] == "failed (RuntimeError: invalid argument)"
    assert tuned.parse(content).classes[256, False, "bf16"][0].config == expected(256, False, 32)


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
        return faster(64)(config, seqlen)

    assert tuner(path, FakeGpu(interrupted), *words, resume=True).run() == tune.INTERRUPTED
    assert [e["head_dim"] for e in json.loads(path.read_text())["tuned"]] == [64]
    gpu = FakeGpu(faster(64, 80))
    assert tuner(path, gpu, *words, resume=True).run() == 0
    content = json.loads(path.read_text())
    assert [e["head_dim"] for e in content["tuned"]] == [64, 128, 256]
    assert {config.head_dim for seen in gpu.log.values() for config in seen} == {128, 256}, "64 is not timed again"
    assert tuned.parse(content).classes[KEY][0].config.tile_n == 64
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
    path, bad = tmp_path / "t.json", FwdConfig(256, tile_n=64)
    words = ("--head-dim", "256", "--full")
    assert tuner(path, FakeGpu(faster(64), stuck=[bad]), *words, resume=True).run() == tune.STUCK
    gpu = FakeGpu(faster(64))
    assert tuner(path, gpu, *words, resume=True).run() == 0
    assert not any(bad in seen for seen in gpu.log.values())
    entries = [e for e in json.loads(path.read_text())["measured"] if e["fields"]["tile_n"] == 64]
    assert [e["reason"] for e in entries] == ["failed (TimeoutError: no end after 20 s)"]


def test_no_candidate_works(tmp_path, few):
    path = tmp_path / "t.json"
    every = [FwdConfig(256, tile_n=n) for n in (64, 80)] + [expected(256, False, 32)]
    assert tuner(path, FakeGpu(faster(), failing=every), "--head-dim", "256", "--full").run() == 1
    assert tuned.parse(json.loads(path.read_text())).classes == tuned.shipped().classes


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
    assert tuner(path, FakeGpu(faster(64)), "--head-dim", "256", "--full", "--dtype", "fp16").run() == 0
    table = tuned.parse(json.loads(path.read_text()))
    assert [table.classes[256, False, t][0].config.tile_n for t in ("bf16", "fp16")] == [80, 64]

    def judge_all(configs, store, step=lambda: None):
        return {c: Verdict(("spills",) if c.dtype == "fp16" or c.tile_n == 48 else ()) for c in configs}

    monkeypatch.setattr(tune, "judge_all", judge_all)
    assert tuner(path, FakeGpu(faster(64)), "--head-dim", "256", "--full").run() == 0
    table = tuned.parse(json.loads(path.read_text()))
    assert [table.classes[256, False, t][0].config.tile_n for t in ("bf16", "fp16")] == [64, 80]
    rows = results.with_rows(table.rows, (256, False, "bf16"), (Row(FwdConfig(256, tile_n=48)),))
    assert {t: tuned.by_class(rows)[256, False, t][0].config.tile_n for t in ("bf16", "fp16")} == dict(bf16=48, fp16=48)


# The command line


def test_bad_arguments(capsys, tmp_path):
    for words in (["--head-dim", "72"], ["--causal", "--full"], ["--rounds", "0"], ["--seqlens", "a"]):
        with pytest.raises(SystemExit, match="2"):
            tune.parse(words)
    with pytest.raises(SystemExit, match="2"):
        tune.parse(["--out", str(tmp_path / "a"), "--resume", str(tmp_path / "b")])
    assert tune.parse(["--causal", "--head-dim", "64,128"]).keys == [(64, True, "bf16"), (128, True, "bf16")]
    assert len(tune.parse([]).keys) == 16


@pytest.mark.parametrize("words", [[], ["--list"]], ids=str)
def test_without_a_gpu_it_lists_and_says_so(few, monkeypatch, capsys, tmp_path, words):
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    assert tune.main(["--head-dim", "256", "--full", "--out", str(tmp_path / "t.json"), *words]) == 0
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
    check(*inputs(1, 2, 2, 512, 512, 128))
    assert device.name() == gpu
    assert plan.plan(Problem(1, 2, 2, 512, 512, 128), gpu).tile_n == 64
    assert plan.plan(Problem(1, 2, 2, 512, 512, 128), gpu) in compile._compiled, "that is what the call ran"
    assert tune.main([*words, "--resume", str(path)]) == 0, "nothing is left to do"
