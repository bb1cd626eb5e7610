"""The frame of every benchmark: rows in, times out.

A row states what is computed, and who computes it. Rows of a group are checked, then timed beside each other. Each
implementation of each row becomes a record; `Run` prints the records and writes them, group after group.
"""

import sys
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from ... import device
from . import machine, report, timing
from .implementations import OURS, Implementation, Prepared, first_line, first_run
from .progress import Progress
from .timing import EAGER, GRAPH, METHOD, ROUNDS, Call, CudaTimer, NoMonitor, Stats, Timer
from .workload import Spec

SCHEMA = 2  # of a record's file; 1, without a number: `entries` or `cells` with fewer fields, a form for each script
ERROR_MAX = 2e-2  # relative; rounding to bf16 gives 2e-3 to 5e-3, a wrong tile far more

Record = dict[str, Any]
Maker = Callable[[torch.device], "Sequence[Row]"]  # of rows that are timed together, and of their operands
Groups = Mapping[str, Maker]


class Truth(Protocol):
    """What outputs are held against."""

    @property
    def pairs(self) -> Sequence:
        """The (batch, head) pairs that are compared."""

    def errors(self, o: torch.Tensor) -> tuple[float, float]:
        """The largest error, and the relative one; inf where o is not finite."""


@dataclass(frozen=True)
class Row:
    """One computation, and who is timed on it."""

    spec: Spec
    implementations: Mapping[str, Callable[[], Prepared]]  # name -> what prepares its call
    truth: Truth | None = None
    case: str = ""  # its name among the rows that are timed together
    baseline: str = "cudnn"  # an implementation of this row, or the case of another: its time over a record's is x
    absent: Mapping[str, str] = field(default_factory=dict)  # name -> why it has no time here
    error_max: float = ERROR_MAX
    host: bool = False  # the host time of an eager call too
    sets: int = 0  # of operands, which calls take in turn: timed in replays of whole rounds, eager where none can be


@dataclass
class Setup:
    """How this run measures; tests put a fake timer here."""

    device: torch.device
    timer: Timer
    monitor: Callable[[], AbstractContextManager]  # a new `Monitor`, running while entered
    rounds: int = ROUNDS
    graph: bool = False
    cublas_tflops: float | None = None
    step: Callable[[str], Any] = lambda name: None
    gpu: str | None = None  # torch's name of it, for the roofline


def gpu_setup(monitor: Callable[[], AbstractContextManager] = lambda: nullcontext(NoMonitor()), **options) -> Setup:
    index = torch.cuda.current_device()
    gpu = torch.cuda.get_device_name(index)
    return Setup(torch.device("cuda", index), CudaTimer(), monitor, gpu=gpu, **options)


@dataclass
class Attempt:
    """An implementation of a row in one mode (eager, or graph replays): why it has no time, or its call and errors."""

    implementation: str
    mode: str = EAGER
    reason: str | None = None
    call: Call | None = None
    max_error: float | None = None
    relative_error: float | None = None
    host_us: float | None = None


def measure(make: Maker, setup: Setup) -> list[Record]:
    """A record for each row, implementation and mode, all timed in the same rounds. Frees what `make` allocated."""
    records = _measure(make(setup.device), setup)
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return with_ratios(records)


def _measure(rows: Sequence[Row], setup: Setup) -> list[Record]:
    attempts = {
        f"{row.case}: {attempt.implementation} {attempt.mode}": (row, attempt)
        for row in rows
        for name in row.implementations
        for attempt in _checked(row, name, setup)
    }
    calls = {name: attempt.call for name, (_, attempt) in attempts.items() if attempt.call is not None}
    with setup.monitor() as monitor:
        stats = timing.compare(calls, rounds=setup.rounds, timer=setup.timer, monitor=monitor, step=setup.step)
    for name, call in calls.items():
        row, attempt = attempts[name]
        if (setup.graph or row.host) and attempt.mode == EAGER:
            attempt.host_us = timing.host_us(call, stats[name].p50_us, setup.timer)
    return [record(row, attempt, stats.get(name), setup) for name, (row, attempt) in attempts.items()]


def _checked(row: Row, name: str, setup: Setup) -> list[Attempt]:
    """Eager and, with graphs, replayed; with sets replayed alone, where it can be captured.

    Without a call where it is absent, refuses, fails or is wrong.
    """
    if name in row.absent:
        return [Attempt(name, reason=row.absent[name])]

    def eager():
        prepared.append(row.implementations[name]())
        return prepared[0].call, _eager_errors(prepared[0], row.truth)

    prepared: list[Prepared] = []
    attempts = [_attempt(row, Attempt(name), eager)]
    if (setup.graph or row.sets) and attempts[0].call is not None:
        attempts.append(_attempt(row, Attempt(name, GRAPH), lambda: _replay(prepared[0], row, setup.timer)))
        if row.sets and attempts[1].call is not None:
            return attempts[1:]
    return attempts


def _attempt(row: Row, new: Attempt, prepare: Callable[[], tuple[Call, tuple]]) -> Attempt:
    try:
        call, (max_error, relative_error) = prepare()
    except torch.AcceleratorError as error:
        if context_lost():
            raise  # and with it everybody's tensors
        return replace(new, reason=f"failed ({type(error).__name__}: {first_line(error)})")
    except torch.OutOfMemoryError:
        return replace(new, reason="out of memory")
    except NotImplementedError as error:
        return replace(new, reason=f"not supported ({first_line(error, 400)})")
    except Exception as error:  # a baseline may fail in any way, and the others are still timed
        return replace(new, reason=f"failed ({type(error).__name__}: {first_line(error)})")
    if max_error == torch.inf:
        return replace(new, reason="wrong (NaN or inf in the output)")
    checked = replace(new, max_error=max_error, relative_error=relative_error)
    if relative_error is not None and relative_error > row.error_max:
        words = f"relative error {relative_error:.1e}, at most {row.error_max:.0e} is expected"
        return replace(checked, reason=f"wrong ({words})")
    return replace(checked, call=call)


def context_lost() -> bool:
    """Whether the CUDA context is gone: after an error that is only a call's own, as in a capture, others still run."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _replay(prepared: Prepared, row: Row, timer: Timer) -> tuple[Call, tuple]:
    """Its graph, and the errors of what the second replay wrote over NaN."""
    if row.sets:
        call, last = timing.graphed_rounds(prepared.call, row.sets, timer)
    else:
        call, last = timing.graphed(prepared.call, timing.graph_calls(row.spec.workload().flops))
    call.run()
    prepared.bhsd(last).fill_(torch.nan)
    call.run()
    return call, row.truth.errors(prepared.bhsd(last)) if row.truth else (None, None)


def _eager_errors(prepared: Prepared, truth: Truth | None) -> tuple:
    """The larger errors of the timed call and, where there is one, of the call that writes in place; both on NaN."""
    first = first_run(prepared)
    if truth is None:
        return None, None
    errors, o = [], prepared.bhsd(first).fill_(torch.nan)
    if prepared.into is not None:
        prepared.into(o)
        errors.append(truth.errors(o))
        o.fill_(torch.nan)
    del first, o  # torch's allocator hands this memory out again: what a call leaves unwritten stays NaN
    errors.append(truth.errors(prepared.bhsd(first_run(prepared))))
    return max(e[0] for e in errors), max(e[1] for e in errors)


STATS = [field.name for field in fields(Stats)]


def record(row: Row, attempt: Attempt, stats: Stats | None, setup: Setup) -> Record:
    """As the JSON has it; None for whatever was not measured."""
    spec, work, us = row.spec, row.spec.workload(), stats.p50_us if stats else None
    p, roofline = spec.problem, work.roofline(setup.gpu)
    tflops = work.flops / us / 1e6 if us else None
    return {
        "case": row.case,
        **spec.facts(),
        "contender": attempt.implementation,
        "mode": attempt.mode,
        "kernel": spec.kernel(device.name()) if attempt.implementation == OURS else None,
        "reason": attempt.reason,
        **(asdict(stats) if stats else dict.fromkeys(STATS)),
        "tflops": tflops,
        "gb_per_s": work.bytes / us / 1e3 if us else None,
        "roofline_us": roofline.us if roofline else None,
        "bound": roofline.bound if roofline else None,
        "of_roofline": roofline.us / us if roofline and us else None,
        "of_cublas": tflops / setup.cublas_tflops if tflops and setup.cublas_tflops else None,
        "us_per_head": us / (p.batch * p.heads) if us else None,
        "tflops_per_watt": tflops / stats.watts if stats and tflops and stats.watts else None,
        "host_us": attempt.host_us,
        "over_best_peer": None,
        "max_error": attempt.max_error,
        "relative_error": attempt.relative_error,
        "checked_heads": len(row.truth.pairs) if row.truth and attempt.max_error is not None else None,
        "baseline": row.baseline,
    }


def with_ratios(records: list[Record]) -> list[Record]:
    """Adds, of the same mode, `ratios`: other implementations' times over a record's; `x_baseline`: its baseline's."""
    for one in records:
        timed = [r for r in records if r["mode"] == one["mode"] and r["p50_us"]] if one["p50_us"] else []
        same = [r for r in timed if r["case"] == one["case"]]
        one["ratios"] = {r["contender"]: r["p50_us"] / one["p50_us"] for r in same if r is not one}
        beside = [r for r in same if r["contender"] == one["baseline"]]
        beside += [r for r in timed if r["case"] and r["case"] == one["baseline"]]
        one["x_baseline"] = beside[0]["p50_us"] / one["p50_us"] if beside else None
    return records


class Run:
    """A timed run: conditions, then group after group, each printed and written as soon as it is finished."""

    rounds, graph = ROUNDS, False
    method: Mapping[str, object] = METHOD
    ours: Container[str] = (OURS,)  # whose failures are the run's

    def __init__(self, groups: Groups, facts: dict[str, Any], console: Console, json: Path | None):
        self.groups, self.facts, self.console, self.json = groups, facts, console, json
        self.baselines: Sequence[Implementation] = ()  # whose versions are conditions
        self.absent: dict[str, str] = {}
        self.steps = 0  # in a group, if known: who runs in how many rounds
        self.records: list[Record] = []

    def run(self) -> int:
        """0 when all went well, 1 where ours failed or was wrong, 130 when interrupted."""
        try:
            self._time(self.prepare())
        except KeyboardInterrupt:
            print(f"interrupted: {self.cells_done()} of {len(self.groups)} cells are finished", file=sys.stderr)
            self.finish(complete=False)
            return 130
        self.finish(complete=True)
        failures = self.failures()
        for line in failures:
            print(line, file=sys.stderr)
        return 1 if failures else 0

    def prepare(self) -> Setup:
        """Prints the conditions, the steady cuBLAS rate among them, and who is absent."""
        torch.set_float32_matmul_precision("highest")  # the reference's products in float32, not TF32
        nvml = machine.Nvml()
        versions = {one.name: one.version() for one in self.baselines if one.name not in self.absent}
        self.facts = machine.conditions(nvml) | self.facts | {"peers": versions}
        report.print_facts(self.console, report.conditions_in_words(self.facts) | versions | self.absent)
        cublas = machine.cublas(nvml)
        rate = self.facts["cublas_tflops"] = machine.cublas_tflops(cublas)
        self.facts["cublas_watts"], self.facts["cublas_sm_mhz"] = cublas.watts, cublas.sm_mhz
        report.print_facts(self.console, {"cuBLAS": report.rate(self.facts)})
        how = dict(rounds=self.rounds, graph=self.graph, cublas_tflops=rate)
        return gpu_setup(monitor=lambda: machine.Monitor(nvml.read), **how)

    def _time(self, setup: Setup) -> None:
        progress, count, steps = Progress(), len(self.groups), self.steps or 1
        task = progress.add_task("", total=count * steps)
        stepping = replace(setup, step=lambda name: progress.advance(task)) if self.steps else setup
        for i, make in enumerate(self.groups.values()):
            progress.update(task, completed=i * steps, description=f"cell {i + 1} of {count}")
            with progress:
                records = measure(make, stepping)
            if not self.steps:
                progress.advance(task)
            self.keep(records)
            self.write(complete=False)

    def keep(self, records: list[Record]) -> None:
        """A finished group, to the records and to the console."""
        self.records += records
        report.print_cell(self.console, records, self.absent)

    def cells_done(self) -> int:
        return len({(record["shape"], record["causal"]) for record in self.records})

    def failures(self) -> list[str]:
        """What fails the run, a line each."""
        ours = [r for r in self.records if r["contender"] in self.ours and r["reason"]]
        return [f"{r['shape']}: {report.name(r)}: {r['reason']}" for r in ours]

    def finish(self, complete: bool) -> None:
        self.write(complete)

    def content(self, complete: bool) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "timed": True,
            "complete": complete,
            "conditions": self.facts,
            "method": {**self.method, "rounds": self.rounds},
            "absent": self.absent,
            "records": self.records,
        }

    def write(self, complete: bool) -> None:
        if self.json is not None:
            report.write_json(self.json, self.content(complete))
