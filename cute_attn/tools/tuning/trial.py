"""Candidates on the GPU: each checked against float32 attention first, then timed beside the others."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ... import compile, device
from ...kernels.config import FwdConfig
from ...problem import Problem
from ...tuned import Key
from ..benchmark.cells import Truth
from ..benchmark.frame import ERROR_MAX
from ..benchmark.implementations import Inputs, first_line, make_inputs
from ..benchmark.timing import TIMED_MS, WARMUP_MS, CudaTimer, Stats, Timer, compare, geomean
from .candidates import LAYOUT, of_type

HIDDEN = 2048  # heads x head_dim of a timed problem, about
SECONDS = 20.0  # after which a kernel that takes milliseconds will not end any more
WORSE = 1.5  # times the least error of all candidates: they round alike, so one that is further off does other things


class Stuck(Exception):
    """The GPU is of no more use to this process, because of one candidate."""

    def __init__(self, config: FwdConfig, reason: str):
        super().__init__(reason)
        self.config, self.reason = config, reason


class Effort(NamedTuple):
    """How often and how long each candidate runs; see `benchmark/timing.py`."""

    rounds: int
    warmup_ms: float = WARMUP_MS
    timed_ms: float = TIMED_MS


SCREEN = Effort(rounds=1, warmup_ms=30.0, timed_ms=20.0)


@dataclass
class Outcome:
    """At one length: times, relative errors (Frobenius, against float32), and why others have no time."""

    stats: dict[FwdConfig, Stats] = field(default_factory=dict)
    errors: dict[FwdConfig, float] = field(default_factory=dict)
    reasons: dict[FwdConfig, str] = field(default_factory=dict)


def problem(key: Key, seqlen: int, tokens: int) -> Problem:
    """The one that stands for a class at a length: batch x S about `tokens`, heads x D about 2048."""
    head_dim, causal, dtype = key
    heads = max(HIDDEN // head_dim, 1)
    return Problem(max(tokens // seqlen, 1), heads, heads, seqlen, seqlen, head_dim, dtype, LAYOUT, causal)


@dataclass
class Lab:
    """Where candidates run; tests put a fake GPU here."""

    device: torch.device
    timer: Timer
    launch: Callable[[FwdConfig, Inputs, torch.Tensor], Callable[[], Any]]  # -> a call that writes o (B, S, H, D)
    wait: Callable[[], None]  # until the GPU has run everything; TimeoutError where it does not end
    step: Callable[[], Any] = lambda: None  # after each candidate's part of a round

    def measure(self, problem: Problem, configs: Iterable[FwdConfig], effort: Effort, check: bool) -> Outcome:
        """The candidates, as rows have them, on one problem; `check`: each one's output first."""
        inputs, found = make_inputs(problem, self.device), Outcome()
        o = torch.empty_like(inputs.bshd()[0])
        calls: dict[FwdConfig, Callable[[], Any]] = {}
        truth = Truth(inputs) if check else None
        for config in configs:
            try:
                calls[config] = self.launch(of_type(config, problem.dtype), inputs, o)
                if truth is not None:
                    found.errors[config] = self._error(config, calls[config], o, truth)
            except Stuck:
                raise
            except Exception as error:  # a candidate may fail in any way, and the others are still timed
                self._finish(config)  # it may have taken the CUDA context with it
                found.reasons[config] = f"failed ({type(error).__name__}: {first_line(error)})"
        found.reasons |= wrong(found.errors)
        ready = {str(i): c for i, c in enumerate(calls) if c not in found.reasons}
        how = effort._asdict() | dict(timer=self.timer, step=lambda name: self.step())
        stats = compare({name: calls[config] for name, config in ready.items()}, **how)
        found.stats = {config: stats[name] for name, config in ready.items()}
        return found

    def _error(self, config: FwdConfig, call: Callable[[], Any], o: torch.Tensor, truth: Truth) -> float:
        """Relative, of what the call writes over NaN."""
        o.fill_(torch.nan)
        call()
        self._finish(config)
        return truth.errors(o.transpose(1, 2))[1]

    def _finish(self, config: FwdConfig) -> None:
        try:
            self.wait()
        except (TimeoutError, RuntimeError) as error:  # torch's CUDA errors are RuntimeErrors
            raise Stuck(config, f"failed ({type(error).__name__}: {first_line(error)})") from error


def wrong(errors: dict[FwdConfig, float]) -> dict[FwdConfig, str]:
    """Who is excluded, and why: off by far, or by more than the others are."""
    least = min(errors.values(), default=0.0)
    limit = min(ERROR_MAX, WORSE * least) if least < ERROR_MAX else ERROR_MAX
    return {
        config: "wrong (NaN or inf in the output)"
        if error == torch.inf
        else f"wrong (relative error {error:.1e}, at most {limit:.1e} is expected)"
        for config, error in errors.items()
        if not error <= limit
    }


def gpu_lab(step: Callable[[], Any] = lambda: None) -> Lab:
    index = torch.cuda.current_device()
    return Lab(torch.device("cuda", index), CudaTimer(), gpu_launch, gpu_wait, step)


def gpu_launch(config: FwdConfig, inputs: Inputs, o: torch.Tensor) -> Callable[[], Any]:
    """The compiled call itself, as `flash_fwd` makes it."""
    kernel, gpu = compile.get(config), device.get(o.device.index)
    q, k, v = inputs.bshd()
    counter = gpu.counters(config.counters)
    scale = inputs.problem.head_dim**-0.5
    return lambda: kernel(q, k, v, o, 0, counter, scale, gpu.num_sms)


def gpu_wait(seconds: float = SECONDS) -> None:
    """Polls, where a plain wait would hang with a kernel that hangs."""
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end after {seconds:g} s")
        time.sleep(0.0005)


def finalists(screened: dict[int, Outcome], keep: Sequence[FwdConfig], best: int) -> list[FwdConfig]:
    """Those worth more rounds, of those that ran at every length: `keep`, the best few overall, the best at each."""
    everywhere = [c for c in next(iter(screened.values())).stats if all(c in one.stats for one in screened.values())]
    if not everywhere:
        return []
    overall = {c: geomean(one.stats[c].p50_us for one in screened.values()) for c in everywhere}
    few = sorted(everywhere, key=lambda c: overall[c])[:best]
    each = [min(everywhere, key=lambda c: one.stats[c].p50_us) for one in screened.values()]
    return list(dict.fromkeys([*(c for c in keep if c in overall), *few, *each]))
