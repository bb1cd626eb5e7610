"""The benchmark: its arithmetic, its method and its files, on a fake clock; one small real run on a GPU."""

import csv
import hashlib
import importlib.util
import io
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cute_attn.plan import Problem, plan
from cute_attn.tools import bench
from cute_attn.tools.benchmark import cells, frame, implementations, machine, plot, progress, report, static, timing
from cute_attn.tools.benchmark.workload import Spec, shape_word
from tests.support.bench import CONDITIONS, EightHeads, FakeMonitor, FakeTimer, fake_setup, right_output
from tests.support.figures import RESULTS, assert_words_lie_apart, colours, committed

SMALL = Problem(2, 4, 2, 24, 24, 16, "bf16", "bshd", False)


pytestmark = pytest.mark.usefixtures("one_thread")


class Slow:
    """A callable that takes `us`, for `FakeTimer(lambda f: f.us)`."""

    def __init__(self, us):
        self.us = us

    def __call__(self):
        raise AssertionError("the fake timer runs nothing")


# Statistics


def test_statistics_of_known_samples():
    rounds = [[1.0, 2.0, 3.0], [2.0, 3.0, 10.0], [4.0, 4.0, 4.0]]
    stats = timing.summarise(rounds, 7, 350.0, 1400.0)
    flat = np.array(rounds).ravel()
    assert stats.rounds_us == [2.0, 3.0, 4.0]
    assert stats.p50_us == 3.0  # of the rounds' medians
    assert stats.spread == pytest.approx((4 - 2) / 3)
    assert stats.p95_us == pytest.approx(np.percentile(flat, 95))
    assert stats.p99_us == pytest.approx(np.percentile(flat, 99))
    assert stats.mean_us == pytest.approx(flat.mean())
    assert stats.std_us == pytest.approx(flat.std())
    assert (stats.samples, stats.calls_per_sample, stats.watts, stats.sm_mhz) == (9, 7, 350.0, 1400.0)


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("percent", [0, 50, 95, 99, 100])
def test_percentile_is_numpys(count, percent):
    values = sorted(random.Random(count).random() for _ in range(count))
    assert timing.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_geomean():
    assert timing.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert timing.geomean([1.1, 1.2, 1.3]) == pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3))


# Method


def test_every_round_is_shuffled_and_settles_first():
    calls = {name: Slow(us) for name, us in {"a": 30.0, "b": 200.0, "c": 3000.0}.items()}
    timer, monitor, steps = FakeTimer(lambda f: f.us), FakeMonitor(), []
    rng = random.Random(1)
    got = timing.compare(calls, rounds=6, timer=timer, monitor=monitor, rng=rng, step=steps.append)
    parts = timer.log[2 * len(calls) :]  # each was estimated first
    orders = [tuple(steps[3 * i : 3 * i + 3]) for i in range(6)]
    assert steps == monitor.watched  # sensors are read in the timed parts, in this order
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    for i, name in enumerate(steps):
        (settle, first, untimed), (timed, second, runs) = parts[2 * i : 2 * i + 2]
        assert (settle, timed) == ("run", "sample") and first is second is calls[name]
        assert untimed * first.us == pytest.approx(60_000, rel=0.05)
        assert runs * first.us == pytest.approx(40_000, rel=0.08)
    assert {name: stats.p50_us for name, stats in got.items()} == {"a": 30.0, "b": 200.0, "c": 3000.0}
    assert got["a"].watts == 500.0 and got["a"].sm_mhz == 1500.0


def test_each_run_of_compare_has_an_order_of_its_own():
    def order():
        steps = []
        timing.compare(
            {str(i): Slow(100.0) for i in range(9)}, rounds=1, timer=FakeTimer(lambda f: f.us), step=steps.append
        )
        return tuple(steps)

    assert len({order() for _ in range(4)}) > 1


@pytest.mark.parametrize(("us", "calls"), [(3.0, 7), (19.0, 2), (20.0, 1), (5000.0, 1)])
def test_short_calls_are_sampled_in_batches(us, calls):
    timer = FakeTimer(lambda f: f.us)
    stats = timing.compare({"x": Slow(us)}, rounds=2, timer=timer)["x"]
    assert stats.calls_per_sample == calls
    assert stats.p50_us == us
    assert stats.samples == 2 * max(3, round(40_000 / (us * calls)))


def test_cuda_samples_lie_between_successive_events(monkeypatch):
    """A run takes 30 us here; events cost nothing, and the host waits for the last one only."""
    now, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return (other.at - self.at) / 1000

        def synchronize(self):
            waits.append(now[0])

    def run():
        now[0] += 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("all"))
    timer = timing.CudaTimer()
    assert timer.sample(run, 4, 5) == pytest.approx([30.0] * 4)
    assert now[0] == 30 * (timer.LEAD + 4 * 5) and waits == [now[0]]
    assert timer.sample(run, 2, 1) == pytest.approx([30.0] * 2)
    timer.run(run, 7)
    assert now[0] == 30 * (2 * timer.LEAD + 4 * 5 + 2 + 7) and waits[2:] == ["all"]


def test_a_graph_of_long_calls_holds_fewer():
    assert [timing.graph_calls(flop) for flop in (0.0, 1e9, 2.7e11, 1.3e13)] == [20, 20, 7, 1]


def test_a_graph_counts_as_its_calls():
    call = timing.Call(Slow(600.0), count=20)
    stats = timing.compare({"graph": call}, rounds=1, timer=FakeTimer(lambda f: f.us))["graph"]
    assert stats.p50_us == 30.0 and stats.calls_per_sample == 20


def test_the_context_is_entered_around_runs_not_in_them():
    inside = []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    class Checking(FakeTimer):
        def sample(self, function, samples, runs):
            assert inside == [True]
            return super().sample(function, samples, runs)

    timing.compare({"x": timing.Call(Slow(50.0), context=context)}, rounds=2, timer=Checking(lambda f: f.us))
    assert not inside


def test_host_time_is_per_call_and_the_queue_stays_short():
    now, calls, waits = [0.0], [], []

    class Timer(FakeTimer):
        def run(self, function, runs):
            waits.append(len(calls))

    def call():
        calls.append(None)
        now[0] += 4e-6

    got = timing.host_us(timing.Call(call), us=100.0, timer=Timer(None), clock=lambda: now[0])
    assert got == pytest.approx(4.0), "the time spent staying awake is no part of it"
    queued = [b - a for a, b in pairwise(waits)]
    assert max(queued) <= 100 and sum(queued) == len(calls)


def test_monitor_reads_only_what_is_watched():
    readings = iter(range(1_000_000))
    with machine.Monitor(lambda: (float(next(readings)), None), interval=0.001) as monitor:
        time.sleep(0.02)
        with monitor.watch("a"):
            time.sleep(0.05)
    watts, mhz = monitor.mean("a")
    assert watts is not None and mhz is None
    assert monitor.mean("b") == (None, None)


def test_monitor_means_leave_out_what_was_not_read():
    monitor = machine.Monitor(lambda: (None, None))
    monitor._readings["a"] += [(100.0, None), (300.0, 1400.0), (None, 1600.0)]
    assert monitor.mean("a") == (200.0, 1500.0)


def test_nvml_queries_and_what_it_does_not_answer(monkeypatch):
    class Fake:
        NVMLError, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_FI_DEV_POWER_INSTANT = OSError, 1, 2, 186
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 1)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda i: f"gpu{i}")
        nvmlDeviceGetClockInfo = staticmethod(lambda handle, clock: {1: 1500, 2: 3201}[clock])
        nvmlDeviceGetMaxClockInfo = staticmethod(lambda handle, clock: {1: 1980, 2: 3201}[clock])
        nvmlDeviceGetPowerUsage = staticmethod(lambda handle: 612_500)
        nvmlDeviceGetEnforcedPowerLimit = staticmethod(lambda handle: 700_000)
        nvmlSystemGetDriverVersion = staticmethod(lambda: "580.1")

        @staticmethod
        def nvmlDeviceGetFieldValues(handle, fields):
            assert (handle, fields) == ("gpu0", [186])
            raise OSError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", Fake)
    nvml = machine.Nvml()
    assert nvml.read() == (612.5, 1500)  # the mean of a second, where this moment's power is not told
    found = nvml.conditions()
    assert found["sm_mhz_max"] == 1980 and found["mem_mhz_now"] == 3201
    assert found["power_limit_watts"] == 700.0 and found["driver"] == "580.1"


def test_no_nvml_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = machine.Nvml()
    assert 'pip install "cute_attn[bench]"' in nvml.conditions()["sensors"]
    assert nvml.read() == (None, None)


# One cell


def test_a_cell_on_the_cpu_has_every_field():
    setup = fake_setup(rounds=2, cublas_tflops=700.0)
    problem = SMALL._replace(heads_kv=4)
    who = [implementations.CuteAttn(), implementations.BASELINES["math"], implementations.BASELINES["fa3"]]
    ours, math_, fa3 = cells.measure(problem, who, {"fa3": "not installed (no module x)"}, setup)
    assert ours["shape"] == "2,4,24,16" and ours["contender"] == "cute_attn" and ours["mode"] == "eager"
    assert ours["tflops"] == pytest.approx(Spec(problem).workload().flops / 100.0 / 1e6)
    moved = 2 * 4 * 24 * (4 * 16 * 2 + 4)  # in 8 heads: q, k, v and o of 2 bytes, lse of 4
    assert (ours["bytes"], ours["gb_per_s"]) == (moved, pytest.approx(moved / 100.0 / 1e3))
    assert (ours["bound"], ours["roofline_us"]) == ("memory", pytest.approx(moved / 4.8e6))
    assert ours["of_roofline"] == pytest.approx(ours["roofline_us"] / 100.0)
    assert (ours["baseline"], ours["x_baseline"], math_["x_baseline"]) == ("math", pytest.approx(1.2), 1.0)
    assert ours["of_cublas"] == pytest.approx(ours["tflops"] / 700)
    assert ours["us_per_head"] == pytest.approx(100 / 8)
    assert ours["tflops_per_watt"] == pytest.approx(ours["tflops"] / 500)
    assert ours["ratios"] == {"math": pytest.approx(1.2)} and math_["ratios"] == {"cute_attn": pytest.approx(1 / 1.2)}
    assert 0 < ours["relative_error"] < 1e-2 and 0 < ours["max_error"] < 0.1 and ours["checked_heads"] == 8
    assert ours["kernel"].startswith("flash_fwd_sm90_bf16")
    assert len(ours["rounds_us"]) == 2
    unmeasured = {key for key, value in ours.items() if value is None}
    assert unmeasured == {"reason", "host_us", "over_best_peer"}
    assert fa3["reason"] == "not installed (no module x)" and fa3["p50_us"] is None and fa3["ratios"] == {}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_agree_whatever_the_layout_and_mask(layout, causal):
    problem = SMALL._replace(layout=layout, causal=causal, seqlen_k=31 if not causal else 24)
    records = cells.measure(
        problem, [implementations.CuteAttn(), implementations.BASELINES["math"]], {}, fake_setup(rounds=1)
    )
    assert [record["reason"] for record in records] == [None, None]


def test_inputs_lie_in_the_layout_and_are_the_same_again():
    for layout in ("bhsd", "bshd"):
        x = implementations.make_inputs(SMALL._replace(layout=layout), torch.device("cpu"))
        assert x.q.shape == (2, 4, 24, 16) and x.k.shape == x.v.shape == (2, 2, 24, 16)
        assert x.q.is_contiguous() == (layout == "bhsd") and x.bshd()[0].is_contiguous() == (layout == "bshd")
        assert torch.equal(x.q, implementations.make_inputs(x.problem, torch.device("cpu")).q)


class Peer:
    """A implementation that returns what `make` makes of the right output."""

    def __init__(self, make):
        self.name, self._make = "peer", make

    def absent(self):
        return None

    def refuses(self, problem):
        return None

    def version(self):
        return "1"

    def prepare(self, inputs):
        o = right_output(inputs)
        return implementations.Prepared(timing.Call(lambda: self._make(o.clone())), lambda o: o)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda o: o.mul_(1.1), "wrong (relative error 1.0e-01"),
        (lambda o: o.index_fill_(1, torch.tensor(3), torch.nan), "wrong (NaN or inf"),
        (lambda o: _raise(NotImplementedError("no D 16")), "not supported (no D 16)"),
        (lambda o: _raise(torch.OutOfMemoryError("much")), "out of memory"),
        (lambda o: _raise(RuntimeError("first\nsecond")), "failed (RuntimeError: first)"),
    ],
)
def test_a_contender_that_fails_or_is_wrong_is_not_timed(make, reason):
    records = cells.measure(SMALL, [implementations.CuteAttn(), Peer(make)], {}, fake_setup(rounds=1))
    assert records[0]["p50_us"] == 100.0 and records[0]["ratios"] == {}
    assert records[1]["reason"].startswith(reason) and records[1]["p50_us"] is None


def test_a_small_error_is_measured():
    records = cells.measure(SMALL, [Peer(lambda o: o.mul_(1.01))], {}, fake_setup(rounds=1))
    assert records[0]["relative_error"] == pytest.approx(0.01, rel=0.3)


def test_errors_of_many_heads_are_of_eight_spread_over_all():
    problem = Problem(4, 8, 4, 8, 8, 16)
    x = implementations.make_inputs(problem, torch.device("cpu"))
    truth = cells.Truth(x)
    assert len(truth.pairs) == 8 and truth.pairs[0] == (0, 0) and truth.pairs[-1] == (3, 7)
    assert len({b for b, _ in truth.pairs}) == 4
    assert truth.errors(right_output(x).float())[1] < 1e-2
    o = right_output(x)
    o[3, 7] += 1
    assert truth.errors(o)[0] == pytest.approx(1.0, rel=0.05)


def test_torch_is_not_comparable_where_its_mask_is_another():
    causal = SMALL._replace(seqlen_k=48, causal=True)
    records = cells.measure(
        causal, [implementations.CuteAttn(), implementations.BASELINES["cudnn"]], {}, fake_setup(rounds=1)
    )
    assert records[0]["p50_us"] and records[1]["reason"].startswith("not comparable")


def test_graphs_add_rows_and_host_times(monkeypatch):
    who = [implementations.CuteAttn(), implementations.BASELINES["math"]]
    monkeypatch.setattr(timing, "host_us", lambda call, us, timer: us / 10)
    replayed = (1e-3, 2e-3)
    monkeypatch.setattr(frame, "_replay", lambda prepared, *_: (timing.Call(prepared.call.run, 20), replayed))
    records = cells.measure(SMALL, who, {}, fake_setup(rounds=1, graph=True))
    assert [(r["contender"], r["mode"]) for r in records] == [
        (name, mode) for name in ("cute_attn", "math") for mode in ("eager", "graph")
    ]
    eager, graph = records[:2]
    assert graph["p50_us"] == eager["p50_us"] / 20
    assert eager["ratios"] == graph["ratios"] == {"math": pytest.approx(1.2)}
    assert eager["host_us"] == 10.0 and graph["host_us"] is None


# Implementations


def test_absent_peers_are_named_with_the_module():
    absent = implementations.FlashAttention("fa9", "no_such_module_9", "no_such_module_9.part").absent()
    assert absent == "not installed (no module no_such_module_9 or no_such_module_9.part)"


def test_a_peer_that_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("import no_such_dependency")
    (tmp_path / "other_cuda_peer.py").write_text("raise OSError('libcudart.so.11.0: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "no_such_dependency" in implementations.FlashAttention("x", "broken_peer").absent()
    assert "libcudart.so.11.0" in implementations.FlashAttention("x", "other_cuda_peer").absent()


@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attentions_interface(tmp_path, monkeypatch, with_lse):
    source = f"""
from cute_attn import flash_fwd
__version__ = "3.1"
def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return flash_fwd(q, k, v, causal=causal, scale=softmax_scale, layout="bshd", return_lse={with_lse})
"""
    (tmp_path / f"some_fa_{with_lse}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    peer = implementations.FlashAttention("fa3", "no_such_module_9", f"some_fa_{with_lse}")
    assert peer.absent() is None and peer.version() == "3.1"
    record = cells.measure(SMALL._replace(causal=True, seqlen_k=40), [peer], {}, fake_setup(rounds=1))[0]
    assert record["reason"] is None and record["relative_error"] < 1e-2


def test_flash_attention_3_as_a_wheel(tmp_path, monkeypatch):
    """As tokenspeed-fa3 has it: a module at the top with no version of its own, which the wheel's metadata has."""
    source = "from cute_attn.flash_attn_interface import flash_attn_func"
    (tmp_path / "flash_attn_interface.py").write_text(source)
    metadata = tmp_path / "some_fa3-3.0.0.post1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-fa3\nVersion: 3.0.0.post1\n")
    (metadata / "top_level.txt").write_text("flash_attn_interface\n")
    (metadata / "RECORD").write_text("flash_attn_interface.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    peer = implementations.FlashAttention("fa3", *implementations.BASELINES["fa3"]._modules)
    assert peer.absent() is None and peer.version() == "some-fa3 3.0.0.post1"
    assert cells.measure(SMALL, [peer], {}, fake_setup(rounds=1))[0]["reason"] is None
    del sys.modules["flash_attn_interface"]


def test_torch_says_which_backend_refuses():
    record = cells.measure(SMALL, [implementations.BASELINES["efficient"]], {}, fake_setup(rounds=1))[0]
    assert record["reason"].startswith("not supported (")


# Machine


def test_kernel_hash_is_the_shells():
    kernels = Path(machine.KERNELS)
    names = sorted(path.name for path in kernels.iterdir() if path.suffix == ".py")
    shell = subprocess.run(
        ["sha256sum"], input=b"".join((kernels / n).read_bytes() for n in names), capture_output=True
    )
    assert machine.kernel_hash() == shell.stdout.decode().split()[0]


def test_kernel_hash_follows_the_files(tmp_path, monkeypatch):
    (tmp_path / "b.py").write_text("b\n")
    (tmp_path / "a.py").write_text("a\n")
    (tmp_path / "README.md").write_text("no code")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    assert machine.kernel_hash() == hashlib.sha256(b"a\nb\n").hexdigest()


# Command line


def test_the_sweep_is_the_grid_by_formula():
    _, problems = bench.parse(["--sweep"])
    want = {
        (16384 // s, 2048 // d, 2048 // d, s, s, d, "bf16", "bshd", causal)
        for d in (64, 128, 256)
        for s in (512, 1024, 2048, 4096, 8192, 16384)
        for causal in (False, True)
    }
    assert len(problems) == 36 and {problem[:9] for problem in problems} == want
    assert {problem.batch * problem.seqlen_q for problem in problems} == {16384}
    assert len(bench.parse(["--sweep", "--causal"])[1]) == 18
    assert {problem.heads_kv for problem in bench.parse(["--sweep", "--kv-heads", "4"])[1]} == {4}


def test_problems_of_the_command_line():
    assert bench.parse([])[1] == [Problem(16, 16, 16, 2048, 2048, 64, "bf16", "bshd", False)]
    words = "--shape 1,8,512,64 --shape 2,4,128,256 --kv-heads 2 --seqlen-k 640 --causal --dtype fp16 --layout bhsd"
    args, problems = bench.parse(words.split())
    assert problems == [
        Problem(1, 8, 2, 512, 640, 64, "fp16", "bhsd", True),
        Problem(2, 4, 2, 128, 640, 256, "fp16", "bhsd", True),
    ]
    assert args.vs == ("cudnn", "flash", "fa3", "fa4")
    assert bench.parse(["--vs", "math,cudnn,math"])[0].vs == ("math", "cudnn")
    assert bench.parse(["--vs", ""])[0].vs == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape 1,2,3", "argument --shape: '1,2,3' is not four positive integers"),
        ("--shape 1,2,x,64", "argument --shape"),
        ("--shape 1,2,3,64,5", "argument --shape"),
        ("--shape 1,0,128,64", "argument --shape"),
        ("--shape 1,2,128,60", "argument --shape: '1,2,128,60': head_dim 60 is not supported; use a multiple of 8"),
        ("--shape 1,2,128,520", "up to 512"),
        ("--shape 1,6,128,64 --kv-heads 4", "argument --kv-heads: 4 does not divide the 6 heads"),
        ("--kv-heads 0", "argument --kv-heads: '0' is not a positive integer"),
        ("--seqlen-k -5", "argument --seqlen-k"),
        ("--rounds 1.5", "argument --rounds"),
        ("--dtype fp8", "argument --dtype"),
        ("--layout sbhd", "argument --layout"),
        ("--vs cudnn,fa5", "argument --vs: fa5 is not known; use cudnn, flash, efficient, math, fa3, fa4"),
        ("--plot x.pdf", "argument --plot: 'x.pdf' is not the name of a .png file"),
        ("--json /no/such/folder/x.json", "argument --json"),
        ("--peers /no/such/file.json", "argument --baselines"),
        ("--vs math --peers x.json", "put cudnn in --vs"),
    ],
)
def test_bad_arguments_exit_with_2_and_name_themselves(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_itself_rejects_an_unknown_peer():
    command = [sys.executable, "-m", "cute_attn.bench", "--vs", "fa5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "fa5" in done.stderr and "cudnn" in done.stderr


def test_without_a_gpu_the_static_report_and_nothing_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    path = tmp_path / "x.json"
    words = f"--shape 1,2,256,64 --shape 1,2,256,48 --causal --json {path} --csv {tmp_path / 'x.csv'}"
    assert bench.main(words.split()) == 0
    out = capsys.readouterr().out
    assert bench.NOT_TIMED in out
    name = plan(Problem(1, 2, 2, 256, 256, 64, "bf16", "bshd", True)).name
    assert out.count(name) == 1  # D 48 runs on it too
    assert "registers" in out and "steady loop" in out and "tensor cores" in out
    content = json.loads(path.read_text())
    assert content["timed"] is False and content["records"] == []
    (kernel,) = content["kernels"]
    assert kernel["wgmma"] > 0 and kernel["steady_loop"]["mufu"] > 0 and 0 < kernel["bounds"]["ping_pong"] <= 1
    assert content["conditions"]["kernels_sha256"] == machine.kernel_hash()
    assert not (tmp_path / "x.csv").exists()


def test_configs_are_those_of_the_plan():
    problems = bench.parse(["--sweep"])[1]
    assert set(static.configs(problems)) == {plan(problem) for problem in problems}
    assert len(static.configs(problems)) < len(problems)


def test_only_the_benchmark_needs_its_extras():
    code = """
import sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "pynvml")))
import cute_attn
import runpy
runpy.run_module("cute_attn.bench", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == 'python -m cute_attn.bench: rich is missing; pip install "cute_attn[bench]"'


# A whole run, on a fake clock


@pytest.fixture
def fake_gpu(monkeypatch):
    """bench.main runs as on a GPU: times are fake, outputs are the CPU's."""

    class Nvml:
        def read(self):
            return 500.0, 1500.0

        def conditions(self):
            sensors = {"sm_mhz_now": 1980, "sm_mhz_max": 1980, "mem_mhz_now": 3201, "mem_mhz_max": 3201}
            return {**sensors, "power_limit_watts": 700.0, "driver": "580.1", "sensors": "NVML"}

    monkeypatch.setattr(machine, "no_hopper", lambda: None)
    monkeypatch.setattr(machine, "Nvml", Nvml)
    monkeypatch.setattr(machine, "cublas", lambda nvml: timing.summarise([[1600.0]], 1, 690.0, 1400.0))
    monkeypatch.setattr(frame, "gpu_setup", lambda monitor, **options: fake_setup(**options))


RUN = "--shape 1,2,16,16 --shape 1,2,32,16 --vs math,fa3 --rounds 3"


def test_a_run_writes_everything(fake_gpu, tmp_path, capsys):
    files = {"json": tmp_path / "x.json", "csv": tmp_path / "x.csv", "plot": tmp_path / "x.png"}
    words = RUN.split() + [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    for word in (
        "power limit   700.0 W",
        machine.kernel_hash(),
        "SM 1980 MHz now",
        "2 (D + Dv) for each",
        "687.2 TFLOPS",
    ):
        assert word in out
    assert "fa3           not installed (no module flash_attn_interface" in out
    assert out.count("TFLOPS") > 3 and "ours over math: geometric mean 1.200, least 1.200, 2 cells" in out
    content = json.loads(files["json"].read_text())
    assert content["timed"] and content["complete"] and content["method"]["rounds"] == 3
    assert content["conditions"]["shapes"] == ["1,2,16,16 full", "1,2,32,16 full"]
    assert content["conditions"]["cublas_tflops"] == pytest.approx(2 * 8192**3 / 1600 / 1e6)
    assert content["absent"]["fa3"].startswith("not installed")
    assert [r["contender"] for r in content["records"]] == ["cute_attn", "math", "fa3"] * 2
    assert content["records"][0]["rounds_us"] == [100.0] * 3
    assert content["summary"]["eager"]["ours_over"]["math"]["geomean"] == pytest.approx(1.2)
    rows = list(csv.DictReader(files["csv"].open()))
    assert len(rows) == 6 and rows[0]["over_math"] == "1.2" and rows[0]["rounds_us"] == "100.000 100.000 100.000"
    assert rows[2]["reason"].startswith("not installed") and rows[0]["kernels_sha256"] == machine.kernel_hash()
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_into_a_pipe_a_line_now_and_then(fake_gpu, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert bench.main(RUN.split()) == 0
    lines = capsys.readouterr().err.splitlines()
    steps = 3 * 2  # rounds, implementations that are there
    cells = [f"cell {1 + i // steps} of 2: {1 + i} of {2 * steps} after 0 s" for i in range(2 * steps)]
    assert lines == cells


def test_an_interrupted_run_keeps_its_finished_cells(fake_gpu, tmp_path, monkeypatch, capsys):
    measured, right = [], frame.measure

    def measure(*args):
        if measured:
            raise KeyboardInterrupt
        measured.append(args)
        return right(*args)

    monkeypatch.setattr(frame, "measure", measure)
    path, table = tmp_path / "x.json", tmp_path / "x.csv"
    files = ["--json", str(path), "--csv", str(table), "--plot", str(tmp_path / "x.png")]
    assert bench.main([*RUN.split(), *files]) == 130
    content = json.loads(path.read_text())
    assert content["complete"] is False and {r["seqlen_q"] for r in content["records"]} == {16}
    assert len(list(csv.DictReader(table.open()))) == 3
    assert "1 of 2 cells are finished" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv", "x.json", "x.png"]  # no temporary file is left


def test_a_crash_keeps_its_finished_cells(fake_gpu, tmp_path, monkeypatch):
    right = bench.row
    monkeypatch.setattr(
        bench, "row", lambda p, *args: right(p, *args) if p.seqlen_q == 16 else _raise(RuntimeError("CUDA error"))
    )
    path = tmp_path / "x.json"
    with pytest.raises(RuntimeError):
        bench.main([*RUN.split(), "--json", str(path)])
    assert {r["seqlen_q"] for r in json.loads(path.read_text())["records"]} == {16}


def test_a_wrong_kernel_fails_the_run(fake_gpu, monkeypatch, capsys):
    right = implementations.cute_attn.flash_fwd
    monkeypatch.setattr(implementations.cute_attn, "flash_fwd", lambda *a, **k: right(*a, **k).mul_(1.5))
    assert bench.main(RUN.split()) == 1
    assert "cute_attn: wrong (relative error" in capsys.readouterr().out


def test_an_output_left_unwritten_is_wrong(fake_gpu, monkeypatch, capsys):
    right = implementations.cute_attn.flash_fwd
    monkeypatch.setattr(implementations.cute_attn, "flash_fwd", lambda *a, out=None, **k: right(*a, **k))
    assert bench.main(RUN.split()) == 1
    assert "cute_attn: wrong (NaN or inf in the output)" in capsys.readouterr().out


def test_ours_over_the_best_peer(fake_gpu, tmp_path, capsys):
    """torch's math stands for cuDNN: the arithmetic is (cuDNN's time / ours) / best_over_cudnn."""
    cell = {"causal": False, "us": {}}
    cells_ = [
        {"shape": "1,2,16,16", **cell, "best_over_cudnn": 1.1},
        {"shape": "1,2,32,16", **cell, "best_over_cudnn": 1.3},
    ]
    other = [{"shape": "1,2,16,16", **cell, "graph": True, "best_over_cudnn": 9.0}]
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps({"dtype": "bf16", "cells": cells_ + other}))
    best = report.best_over_cudnn(report.baselines_file(peers, "bf16"))
    records = [synthetic("cute_attn", 100.0), synthetic("cudnn", 120.0)]
    records += [synthetic("cute_attn", 100.0, seqlen=32), synthetic("cudnn", 130.0, seqlen=32)]
    for i in (0, 2):
        report.with_best(frame.with_ratios(records[i : i + 2]), best)
    assert [record["over_best_peer"] for record in records] == [
        pytest.approx(1.2 / 1.1),
        None,
        pytest.approx(1.0),
        None,
    ]
    found = report.summary(records)["ours_over_best_peer"]
    assert found["geomean"] == pytest.approx(math.sqrt(1.2 / 1.1 * 1.0))
    assert found["min"] == pytest.approx(1.0) and found["cells"] == 2
    with pytest.raises(SystemExit) as stop:
        bench.main(["--peers", str(peers), "--dtype", "fp16"])
    assert stop.value.code == 2 and "its numbers are for bf16" in capsys.readouterr().err


def synthetic(implementation, us, seqlen=16, head_dim=16, heads=2, causal=False, mode="eager", batch=1):
    problem = Problem(batch, heads, heads, seqlen, seqlen, head_dim, "bf16", "bshd", causal)
    attempt = frame.Attempt(implementation, mode, max_error=1.2e-3, relative_error=2.4e-3)
    stats = timing.summarise([[us * 0.99, us, us * 1.02], [us * 0.995, us * 1.001, us * 1.05]], 1, 650.0, 1500.0)
    return frame.record(frame.Row(Spec(problem), {}, EightHeads()), attempt, stats, fake_setup(cublas_tflops=674.0))


def synthetic_sweep(names=("cute_attn", "cudnn", "flash", "fa3", "fa4"), modes=("eager",)):
    """Plausible times for the whole grid."""
    records = []
    for (batch, heads, seqlen, head_dim), causal in cells.sweep():
        flops = Spec(Problem(batch, heads, heads, seqlen, seqlen, head_dim, causal=causal)).workload().flops
        cell = []
        for i, name in enumerate(names):
            for mode in modes:
                tflops = (300 + 1.6 * head_dim) * (1 - 60 * (1 + causal) / (seqlen + 200)) * (1 - 0.06 * i)
                us = flops / tflops / 1e6
                cell.append(synthetic(name, us, seqlen, head_dim, heads, causal, mode, batch))
        records += frame.with_ratios(cell)
    return records


def test_each_cell_of_the_peers_file_is_reported(fake_gpu, tmp_path, capsys, monkeypatch):
    class Cudnn(implementations.Sdpa):
        def absent(self):
            return None

    monkeypatch.setitem(implementations.BASELINES, "cudnn", Cudnn("cudnn", "MATH"))
    peers, path = tmp_path / "peers.json", tmp_path / "x.json"
    peers.write_text(json.dumps({"cells": [{"shape": "1,2,16,16", "causal": True, "best_over_cudnn": 1.25}]}))
    words = f"--shape 1,2,16,16 --causal --vs cudnn --peers {peers} --json {path}"
    assert bench.main(words.split()) == 0
    assert "ours over the best baseline of --baselines, through cuDNN: geometric mean 0.960" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["records"][0]["over_best_peer"] == pytest.approx(1.2 / 1.25)
    assert content["summary"]["ours_over_best_peer"]["cells"] == 1
    assert bench.main(words.replace("16,16", "32,16").split()) == 0
    assert "no cell of this run is in that file" in capsys.readouterr().out


def test_the_plot_has_the_peers_file(fake_gpu, tmp_path, monkeypatch):
    class Cudnn(implementations.Sdpa):
        def absent(self):
            return None

    drawn = []
    monkeypatch.setattr(plot, "draw", lambda path, records, facts, peers=None: drawn.append(peers))
    monkeypatch.setitem(implementations.BASELINES, "cudnn", Cudnn("cudnn", "MATH"))
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps(PEERS))
    words = f"--shape 1,2,16,16 --vs cudnn --plot {tmp_path / 'x.png'}"
    assert bench.main(words.split()) == bench.main([*words.split(), "--peers", str(peers)]) == 0
    assert drawn == [None, PEERS]


@pytest.mark.parametrize("us", [{"cudnn": 1.0, "fa3": 0}, {"cudnn": "1", "fa3": 2}, 3])
def test_a_peers_file_without_numbers_is_refused_before_anything_is_timed(us, tmp_path, capsys):
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps({"cells": [{"shape": "1,2,16,16", "causal": True, "best_over_cudnn": 1.0, "us": us}]}))
    with pytest.raises(SystemExit) as stop:
        bench.parse(["--peers", str(peers)])
    assert stop.value.code == 2 and "does not serve" in capsys.readouterr().err


# Report


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_cut_at_any_width(width):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    records = [
        synthetic(name, us, 4096, 128, 96, True, mode, 16)
        for name, us in (("cute_attn", 11543.21), ("cudnn", 12682.6), ("efficient", 98765.4))
        for mode in ("eager", "graph")
    ]
    for record in records[::2]:
        record["host_us"] = 12.62
    report.print_cell(console, frame.with_ratios(records))
    text = console.export_text()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("11549", "1.2e-3", "2.4e-3", "efficient graph", "12.62", "1.099", "1500", "8 of 1536"):
        assert word in text, word
    if width >= 120:
        assert text.count("efficient graph") == 1  # one table


def test_microseconds_keep_their_figures():
    assert [report.us(x) for x in (None, 9.036, 99.99, 143.94, 4196.93, 22629.04)] == [
        "-",
        "9.04",
        "99.99",
        "143.9",
        "4196.9",
        "22629",
    ]


def test_summary_of_a_sweep_counts_cells_and_modes():
    records = synthetic_sweep(("cute_attn", "cudnn", "fa3"), ("eager", "graph"))
    found = report.summary(records)
    assert set(found) == {"eager", "graph"} and set(found["eager"]["ours_over"]) == {"cudnn", "fa3"}
    over = found["eager"]["ours_over"]["fa3"]
    assert over["cells"] == 36 and over["geomean"] == pytest.approx(1 / 0.88, rel=1e-6)


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_records_are_lines_of_seven_digits(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"gpu": "H200", "records": [{"us": 1 / 3, "rounds": [2 / 3, 10**9]}, {"us": None}]})
    assert json.loads(path.read_text())["records"] == [{"us": 0.3333333, "rounds": [0.6666667, 10**9]}, {"us": None}]
    assert sum('"us"' in line for line in path.read_text().splitlines()) == 2


# Plot


@pytest.mark.parametrize("kind", ["sweep", "bars"])
def test_a_plot_shows_every_contender(tmp_path, kind):
    records = synthetic_sweep(modes=("eager", "graph"))
    if kind == "bars":
        records = [record for record in records if record["seqlen_q"] == 2048]
    path = tmp_path / "x.png"
    plot.draw(path, records, CONDITIONS)
    pixels = plot.plt.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 900
    seen = colours(path)
    for implementation in ("cute_attn", "cudnn", "flash", "fa3", "fa4"):
        code = plot.STYLE[implementation][0].lstrip("#")
        assert tuple(int(code[i : i + 2], 16) for i in (0, 2, 4)) in seen, implementation


def test_a_plot_leaves_out_who_has_no_time(tmp_path):
    records = synthetic_sweep(("cute_attn", "cudnn"))
    for record in records:
        if record["contender"] == "cudnn":
            record.update(tflops=None, p50_us=None, reason="out of memory")
    plot.draw(tmp_path / "x.png", records, CONDITIONS)
    assert tuple(bytes.fromhex("009E73")) not in colours(tmp_path / "x.png")


PEERS = {
    "gpu": "NVIDIA H200 SXM (132 SMs)",
    "date": "2026-11-30",
    "dtype": "bf16",
    "peers": {"fa3": "some-fa3 3.0 (a wheel)"},
    "cells": [
        {"shape": shape_word(Problem(b, h, h, s, s, d)), "causal": causal, "best_over_cudnn": 1.25, "us": us}
        for (b, h, s, d), causal in cells.sweep()
        for us in [{"cudnn": 100.0, "fa3": 80.0}]
    ],
}


@pytest.mark.parametrize("name", ["sweep_bf16", "sweep_fp16"])
def test_words_of_the_sweeps_lie_apart(name):
    sweep = committed(name)
    figure = plot.figure_of(sweep["records"], sweep["conditions"], committed("peers_h200_bf16"))
    assert figure.get_figwidth() == 8.3  # README shows it 830 pixels wide: a point is 1.4 of them
    assert_words_lie_apart(figure)


@pytest.mark.parametrize("modes", [("eager",), ("eager", "graph")], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", ["sweep", "bars", "one bar"])
def test_words_of_any_plot_lie_apart(kind, modes):
    records = synthetic_sweep(modes=modes)
    if kind != "sweep":
        records = [r for r in records if r["seqlen_q"] == 2048 and (kind == "bars" or r["shape"] == "8,32,2048,64")]
    assert_words_lie_apart(plot.figure_of(records, CONDITIONS))


def lines_of(figure):
    """Label of the legend -> its line in the first panel, by colour and style."""
    handles = figure.legends[0].legend_handles
    drawn = {(line.get_color(), line.get_linestyle()): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    return {handle.get_label(): drawn[handle.get_color(), handle.get_linestyle()] for handle in handles}


def notes_of(figure):
    return " ".join(text.get_text() for text in reversed(figure.texts))


def test_the_sweep_has_flash_attention_3_by_its_ratio_to_cudnn():
    figure = plot.figure_of(synthetic_sweep(("cute_attn", "cudnn")), CONDITIONS, PEERS)
    lines = lines_of(figure)
    assert lines["FlashAttention-3, by its ratio to cuDNN"] == pytest.approx([1.25 * y for y in lines["cuDNN"]])
    for word in ("FlashAttention-3 (some-fa3 3.0) is not of this run", "2026-11-30", "on one NVIDIA H200 SXM."):
        assert word in notes_of(figure)


def test_the_committed_sweep_shows_flash_attention_3():
    sweep, peers = committed("sweep_bf16"), committed("peers_h200_bf16")
    figure = plot.figure_of(sweep["records"], sweep["conditions"], peers)
    line = lines_of(figure)["FlashAttention-3, by its ratio to cuDNN"]
    us = {(c["shape"], c["causal"]): c["us"] for c in peers["cells"]}
    cudnn = [r for r in sweep["records"] if r["contender"] == "cudnn" and r["head_dim"] == 64 and not r["causal"]]
    ratios = [us[r["shape"], False]["cudnn"] / us[r["shape"], False]["fa3"] for r in cudnn]
    assert line == pytest.approx([r["tflops"] * x for r, x in zip(cudnn, ratios, strict=True)])
    assert peers["date"] in notes_of(figure)


def test_a_runs_own_flash_attention_3_is_shown_as_it_was_timed():
    figure = plot.figure_of(synthetic_sweep(("cute_attn", "cudnn", "fa3")), CONDITIONS, PEERS)
    lines = lines_of(figure)
    assert "FlashAttention-3, by its ratio to cuDNN" not in lines and "is not of this run" not in notes_of(figure)
    assert lines["FlashAttention-3"] == pytest.approx([0.88 * y for y in lines["cute_attn"]])


@pytest.mark.parametrize("graph", [False, True])
def test_ratios_are_of_the_same_cell_type_and_mode(graph):
    records = synthetic_sweep(("cute_attn", "cudnn"))
    in_graph = {**PEERS, "cells": [cell | {"graph": graph} for cell in PEERS["cells"]]}
    assert len(report.by_ratio(records, in_graph, "fa3")) == (0 if graph else 36)
    assert report.by_ratio(records, PEERS | {"dtype": "fp16"}, "fa3") == []
    assert len(report.by_ratio(records, PEERS | {"cells": PEERS["cells"][:3]}, "fa3")) == 3
    assert report.by_ratio(records, PEERS | {"cells": [{**PEERS["cells"][0], "us": {"cudnn": 1.0}}]}, "fa3") == []


AT_THE_LIMIT = {"cublas_tflops": 500.0, "cublas_watts": 690.0, "cublas_sm_mhz": 1480.0, "power_limit_watts": 700.0}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, True),
        ({"cublas_tflops": 900.0}, False),  # ours is below
        ({"cublas_watts": 400.0}, False),  # it is not the power
        ({"cublas_watts": None}, False),
        ({"power_limit_watts": None}, False),
    ],
    ids=["above", "below", "not at the limit", "no sensor", "no limit"],
)
def test_the_plot_says_why_ours_may_stand_above_cublas(other, said):
    notes = notes_of(plot.figure_of(synthetic_sweep(), CONDITIONS | AT_THE_LIMIT | other))
    assert ("Why ours may stand above cuBLAS's line: power (700 W)" in notes) == said
    assert ("cuBLAS: 690 W at 1480 MHz; ours at 1,8,16384,256: 650 W at 1500 MHz." in notes) == said


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    """A folder of results in which benchmarks/plots.py has drawn."""
    path = tmp_path_factory.mktemp("results")
    for name in ("peers_h200_bf16", "sweep_bf16", "sweep_fp16", "ladder", "timeline"):
        shutil.copy(RESULTS / f"{name}.json", path)
    spec = importlib.util.spec_from_file_location("benchmarks_plots", RESULTS.parent / "plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RESULTS = path
    module.main()
    return path


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.png")))
def test_the_pictures_are_those_of_the_records(redrawn, name):
    """Opaque, so that they are read on a dark page too."""
    want, got = (np.asarray(plot.plt.imread(path / name)) for path in (redrawn, RESULTS))
    assert got.shape == want.shape and got[..., 3:].min(initial=1.0) == 1.0
    assert np.abs(got - want).mean() < 0.01  # fonts of another matplotlib


# On the GPU


@pytest.mark.gpu
def test_a_small_real_run(tmp_path):
    path = tmp_path / "x.json"
    words = "--shape 2,4,512,64 --causal --rounds 2 --graph --vs cudnn,flash,efficient,math"
    assert bench.main([*words.split(), "--json", str(path), "--plot", str(tmp_path / "x.png")]) == 0
    content = json.loads(path.read_text())
    assert content["conditions"]["cublas_tflops"] > 100
    by_mode = defaultdict(dict)
    for record in content["records"]:
        by_mode[record["mode"]][record["contender"]] = record
    for mode, rows in by_mode.items():
        ours = rows["cute_attn"]
        assert ours["reason"] is None and ours["relative_error"] < 1e-2
        assert {"cudnn", "flash"} <= set(ours["ratios"])
        assert 1 < ours["p50_us"] < 1000 and len(ours["rounds_us"]) == 2
        missing = {key for key, value in ours.items() if value is None} - {
            "watts",
            "sm_mhz",
            "tflops_per_watt",
            "over_best_peer",
        }
        assert missing == ({"reason"} if mode == "eager" else {"reason", "host_us"})
    assert set(by_mode) == {"eager", "graph"}
    assert by_mode["graph"]["cute_attn"]["p50_us"] <= by_mode["eager"]["cute_attn"]["p50_us"] * 1.1


@pytest.mark.gpu
def test_compare_on_the_gpu_orders_work_by_its_size():
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (1024, 4096))
    got = timing.compare({"small": lambda: a @ a, "large": lambda: b @ b}, rounds=2)
    assert got["small"].p50_us < got["large"].p50_us
    assert got["large"].p50_us <= got["large"].p95_us and got["large"].mean_us > 0
