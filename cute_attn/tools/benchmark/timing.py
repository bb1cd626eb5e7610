"""Times callables beside each other, each warmed up under its own load.

The GPU is limited by power, so a time depends on what ran just before. The method: rounds, each in a freshly shuffled
order; every implementation first runs 60 ms untimed, so that power and clocks settle to its own load, then about 40 ms
timed. A sample is the time between two CUDA events, around one call, or around as many calls as fill 20 us where one
call is shorter; the host waits only after the last one. No L2 flush.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Protocol

import torch

EAGER, GRAPH = "eager", "graph"  # modes: a call at a time, replays of a CUDA graph
ROUNDS = 5
WARMUP_MS, TIMED_MS = 60.0, 40.0
SAMPLE_US = 20.0  # a sample is at least this long: events resolve about 0.5 us (CUDA runtime, cudaEventElapsedTime)
GRAPH_CALLS, GRAPH_FLOP = 20, 2e12  # in a graph: so many calls, fewer where they would make more FLOP
GRAPH_US = 2000.0  # a graph of whole rounds over sets of operands lasts about so long
AWAKE_S = 0.02  # of work for the processor before host times
METHOD = {
    "order": "rounds of all implementations, freshly shuffled in each",
    "settle_ms": WARMUP_MS,
    "timed_ms": TIMED_MS,
    "sample": f"CUDA events around each call, or around as many calls as fill {SAMPLE_US:g} us; no wait between calls",
    "p50_us": "median over rounds of each round's median; TFLOPS, ratios and us per head come from it",
    "p95_us, p99_us, mean_us, std_us": "of the samples of all rounds",
    "spread": "(max - min) / median of the rounds' medians",
    "inputs": "random normal, the same for every implementation; no L2 flush",
    "graph": f"CUDA-graph replays of {GRAPH_CALLS} calls, or of as many as make {GRAPH_FLOP:g} FLOP; per call",
    "host_us": f"host time per eager call: queue never full, processor busy for {1000 * AWAKE_S:g} ms before; "
    "median of 5 repeats",
}


@dataclass(frozen=True)
class Call:
    """What is timed: `run()` issues `count` calls; `context()` is entered once around many runs."""

    run: Callable[[], Any]
    count: int = 1
    context: Callable[[], AbstractContextManager] = nullcontext


class Timer(Protocol):
    def run(self, function: Callable[[], Any], runs: int) -> None:
        """Run it so many times, and wait."""

    def sample(self, function: Callable[[], Any], samples: int, runs: int) -> list[float]:
        """Microseconds per run in each of `samples` groups of `runs` runs, one directly after the other."""


class Monitor(Protocol):
    def watch(self, name: str) -> AbstractContextManager:
        """Read the sensors for `name` while inside."""

    def mean(self, name: str) -> tuple[float | None, float | None]:
        """Mean watts and SM MHz of all that was read for `name`; None where nothing was."""


class CudaTimer:
    """Queues runs on torch's current stream, and events between them."""

    LEAD = 3  # runs ahead of the first event, so that the host is ahead of the GPU when the timed part starts

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def run(self, function, runs):
        for _ in range(runs):
            function()
        torch.cuda.synchronize()

    def sample(self, function, samples, runs):
        events = self._reused(samples + 1)
        for _ in range(self.LEAD):
            function()
        events[0].record()
        for event in events[1:]:
            for _ in range(runs):
                function()
            event.record()
        events[-1].synchronize()
        return [1000 * start.elapsed_time(end) / runs for start, end in pairwise(events)]

    def _reused(self, count):
        """Events that have been recorded before: the first record also creates the event."""
        while len(self._events) < count:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        return self._events[:count]


class NoMonitor:
    """Stands in where no sensor can be read."""

    def watch(self, name):
        return nullcontext()

    def mean(self, name):
        return None, None


@dataclass(frozen=True)
class Stats:
    """Microseconds per call, from the samples of all rounds; watts and SM MHz while they were taken."""

    p50_us: float
    p95_us: float
    p99_us: float
    mean_us: float
    std_us: float
    spread: float
    rounds_us: list[float]
    samples: int
    calls_per_sample: int
    watts: float | None = None
    sm_mhz: float | None = None


def compare(
    calls: Mapping[str, Call | Callable[[], Any]],
    *,
    rounds: int = ROUNDS,
    warmup_ms: float = WARMUP_MS,
    timed_ms: float = TIMED_MS,
    timer: Timer | None = None,
    monitor: Monitor | None = None,
    rng: random.Random | None = None,
    step: Callable[[str], Any] = lambda name: None,
) -> dict[str, Stats]:
    """Time every callable by this file's method; they have been called before (compiled, allocated).

    Args:
        calls: name -> `Call`, or any callable without arguments that queues its work on torch's current stream.
        rounds, warmup_ms, timed_ms: how often, and for how long each time, an implementation runs untimed and timed.
        timer, monitor, rng: clock, sensors and order; default CUDA events, no sensors, a fresh random order.
        step: called with the name after each implementation's part of a round.
    """
    timer, monitor, rng = timer or CudaTimer(), monitor or NoMonitor(), rng or random.Random()
    all_calls = {name: call if isinstance(call, Call) else Call(call) for name, call in calls.items()}
    run_us = {name: _estimate(call, timer) for name, call in all_calls.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in all_calls}
    for _ in range(rounds):
        for name in rng.sample(list(all_calls), len(all_calls)):
            call, us = all_calls[name], run_us[name]
            runs = _runs_per_sample(us)
            with call.context():
                timer.run(call.run, ceil(1000 * warmup_ms / us))
                with monitor.watch(name):
                    samples = timer.sample(call.run, max(3, round(1000 * timed_ms / (us * runs))), runs)
            taken[name].append([sample / call.count for sample in samples])
            step(name)
    return {
        name: summarise(taken[name], _runs_per_sample(run_us[name]) * call.count, *monitor.mean(name))
        for name, call in all_calls.items()
    }


def _estimate(call: Call, timer: Timer) -> float:
    """About how long a run takes, us: it only sets how many make up 60 and 40 ms."""
    with call.context():
        timer.run(call.run, 1)
        return max(statistics.median(timer.sample(call.run, 3, 5)), 0.5)


def _runs_per_sample(us: float) -> int:
    return ceil(SAMPLE_US / us)


def summarise(
    rounds: Sequence[Sequence[float]],
    calls_per_sample: int = 1,
    watts: float | None = None,
    sm_mhz: float | None = None,
) -> Stats:
    """Statistics of the samples of each round, us per call; std is of the population."""
    samples = sorted(sample for one in rounds for sample in one)
    medians = [statistics.median(one) for one in rounds]
    p50 = statistics.median(medians)
    return Stats(
        p50_us=p50,
        p95_us=percentile(samples, 95),
        p99_us=percentile(samples, 99),
        mean_us=statistics.fmean(samples),
        std_us=statistics.pstdev(samples),
        spread=(max(medians) - min(medians)) / p50,
        rounds_us=medians,
        samples=len(samples),
        calls_per_sample=calls_per_sample,
        watts=watts,
        sm_mhz=sm_mhz,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, linear between neighbours (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def geomean(ratios: Iterable[float]) -> float:
    return statistics.geometric_mean(list(ratios))


def host_us(call: Call, us: float, timer: Timer, clock: Callable[[], float] = time.perf_counter) -> float:
    """Host time of one eager call, us: `clock` around 10 to 100 calls that queue up behind an idle GPU.

    The processor is kept busy before each repeat: waiting for the GPU it falls asleep, and wakes at a lower clock.

    us: about what a call takes on the GPU; the calls together take at most about 100 ms of it. 100 calls, of up to
    three launches each, stay below the launch queue's 1,024, so no call waits for the GPU.
    """
    calls, repeats = min(max(int(100_000 / us), 10), 100), []
    with call.context():
        for _ in range(5):
            timer.run(call.run, 1)
            _stay_awake(clock)
            start = clock()
            for _ in range(calls):
                call.run()
            repeats.append(1e6 * (clock() - start) / calls)
            timer.run(call.run, 0)
    return statistics.median(repeats)


def _stay_awake(clock: Callable[[], float]) -> None:
    """About AWAKE_S of work; bounded by its steps too, for clocks that stand still."""
    start = clock()
    for _ in range(1_000_000):
        if clock() - start >= AWAKE_S:
            return


def graph_calls(flop: float) -> int:
    """How many calls of so many FLOP a graph holds."""
    return max(1, min(GRAPH_CALLS, int(GRAPH_FLOP / max(flop, 1.0))))


def graphed(call: Call, calls: int = GRAPH_CALLS) -> tuple[Call, Any]:
    """A CUDA graph of so many calls, and what the last of them returned: each replay writes it anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with call.context():
        with torch.cuda.stream(stream):
            for _ in range(3):
                call.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                last = call.run()
    return Call(graph.replay, count=calls), last


def graphed_rounds(call: Call, sets: int, timer: Timer) -> tuple[Call, Any]:
    """`graphed`, of a call that takes so many sets of operands in turn: whole rounds over them, of about GRAPH_US."""
    once = graphed(call, sets)
    rounds = round(GRAPH_US / _estimate(once[0], timer))
    return once if rounds < 2 else graphed(call, rounds * sets)
