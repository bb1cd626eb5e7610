"""One problem, all contenders: the same inputs, each checked against the reference, then timed beside each other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ... import device, reference
from ...api import o_like
from ...plan import plan
from ...problem import Problem
from .implementations import OURS, Implementation, Inputs, Prepared, first_line, first_run, make_inputs
from .timing import ROUNDS, Call, CudaTimer, NoMonitor, Stats, Timer, compare, graph_calls, graphed, host_us

CHECKED_HEADS = 8
ERROR_MAX = 2e-2  # relative; rounding to bf16 gives 2e-3 to 5e-3, a wrong tile far more
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)  # of the FlashAttention papers' grid
EAGER, GRAPH = "eager", "graph"


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


def gpu_setup(monitor: Callable[[], AbstractContextManager] = lambda: nullcontext(NoMonitor()), **options) -> Setup:
    return Setup(torch.device("cuda", torch.cuda.current_device()), CudaTimer(), monitor, **options)


class Truth:
    """float32 attention of up to 8 (batch, head) pairs, spread over all: what every output is held against."""

    def __init__(self, x: Inputs):
        p = x.problem
        ratio, total = p.heads // p.heads_kv, p.batch * p.heads
        count = min(CHECKED_HEADS, total)
        flat = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
        self.pairs = [divmod(i, p.heads) for i in flat]
        one = [(x.q[b, h], x.k[b, h // ratio], x.v[b, h // ratio]) for b, h in self.pairs]
        how = dict(causal=p.causal, dtype=torch.float32)
        self._o = [reference.attention(*(t[None, None] for t in qkv), **how)[0][0, 0] for qkv in one]

    def errors(self, o: torch.Tensor) -> tuple[float, float]:
        """Of o (B, H, Sq, D): the largest, and their norm over the truth's (Frobenius); inf where o is not finite."""
        if not torch.isfinite(o).all():
            return torch.inf, torch.inf
        top, square, norm = 0.0, 0.0, 0.0
        for (b, h), true in zip(self.pairs, self._o, strict=True):
            wrong = (o[b, h].float() - true).double()
            top = max(top, wrong.abs().max().item())
            square += wrong.square().sum().item()
            norm += true.double().square().sum().item()
        return top, (square / norm) ** 0.5 if norm else square**0.5


@dataclass
class Row:
    """A contender in one mode (eager, or graph replays): why it has no time, or its call and its errors."""

    contender: str
    mode: str = EAGER
    reason: str | None = None
    call: Call | None = None
    max_error: float | None = None
    relative_error: float | None = None
    host_us: float | None = None

    @property
    def name(self) -> str:
        return self.contender if self.mode == EAGER else f"{self.contender} {self.mode}"


def measure(
    problem: Problem, contenders: Sequence[Implementation], absent: dict[str, str], setup: Setup
) -> list[dict[str, Any]]:
    """A record per contender and mode; `absent` says why some are not on this machine. Frees what it allocated."""
    records = _measure(problem, contenders, absent, setup)
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return with_ratios(records)


def _measure(
    problem: Problem, contenders: Sequence[Implementation], absent: dict[str, str], setup: Setup
) -> list[dict[str, Any]]:
    inputs = make_inputs(problem, setup.device)
    truth = Truth(inputs)
    rows = [row for contender in contenders for row in _checked(contender, absent, inputs, truth, setup)]
    calls = {row.name: row.call for row in rows if row.call is not None}
    with setup.monitor() as monitor:
        stats = compare(calls, rounds=setup.rounds, timer=setup.timer, monitor=monitor, step=setup.step)
    for row in rows:
        if setup.graph and row.mode == EAGER and row.call is not None:
            row.host_us = host_us(row.call, stats[row.name].p50_us, setup.timer)
    return [record(problem, row, stats.get(row.name), len(truth.pairs), setup.cublas_tflops) for row in rows]


def _checked(
    contender: Implementation, absent: dict[str, str], inputs: Inputs, truth: Truth, setup: Setup
) -> list[Row]:
    """Its row, and with graphs a second; without a call where it is absent, refuses, fails or is wrong."""
    name = contender.name
    reason = absent.get(name) or contender.refuses(inputs.problem)
    if reason:
        return [Row(name, reason=reason)]

    def eager():
        prepared.append(contender.prepare(inputs))
        return prepared[0].call, _eager_errors(prepared[0], inputs, truth)

    prepared: list[Prepared] = []
    rows = [_attempt(name, EAGER, eager)]
    if setup.graph and rows[0].call is not None:
        rows.append(_attempt(name, GRAPH, lambda: _replay(prepared[0], inputs.problem, truth)))
    return rows


def _attempt(name: str, mode: str, prepare: Callable[[], tuple[Call, tuple[float, float]]]) -> Row:
    try:
        call, (max_error, relative_error) = prepare()
    except torch.AcceleratorError:
        raise  # the CUDA context is gone, and with it everybody's tensors
    except torch.OutOfMemoryError:
        return Row(name, mode, "out of memory")
    except NotImplementedError as error:
        return Row(name, mode, f"not supported ({error})")
    except Exception as error:  # a baseline may fail in any way, and the others are still timed
        return Row(name, mode, f"failed ({type(error).__name__}: {first_line(error)})")
    if max_error == torch.inf:
        return Row(name, mode, "wrong (NaN or inf in the output)")
    if relative_error > ERROR_MAX:
        reason = f"wrong (relative error {relative_error:.1e}, at most {ERROR_MAX:.0e} is expected)"
        return Row(name, mode, reason, None, max_error, relative_error)
    return Row(name, mode, None, call, max_error, relative_error)


def _replay(prepared: Prepared, problem: Problem, truth: Truth) -> tuple[Call, tuple[float, float]]:
    """Its graph, and the errors of what a replay wrote over NaN."""
    call, last = graphed(prepared.call, graph_calls(problem.flops()))
    prepared.bhsd(last).fill_(torch.nan)
    call.run()
    return call, truth.errors(prepared.bhsd(last))


def _eager_errors(prepared: Prepared, inputs: Inputs, truth: Truth) -> tuple[float, float]:
    """The larger errors of the timed call and, where there is one, of the call that writes in place; both on NaN."""
    poison = o_like(inputs.q, inputs.v).fill_(torch.nan)
    del poison  # torch's allocator hands this memory out again: what a call leaves unwritten stays NaN
    errors = [truth.errors(prepared.bhsd(first_run(prepared)))]
    if prepared.into is not None:
        o = o_like(inputs.q, inputs.v).fill_(torch.nan)
        prepared.into(o)
        errors.append(truth.errors(o))
    return max(e[0] for e in errors), max(e[1] for e in errors)


STATS = [field.name for field in fields(Stats)]


def record(problem: Problem, row: Row, stats: Stats | None, heads: int, cublas_tflops: float | None) -> dict[str, Any]:
    """A row as the JSON has it; None for whatever was not measured."""
    p, flops = problem, problem.flops()
    tflops = flops / stats.p50_us / 1e6 if stats else None
    return {
        "shape": shape_word(p),
        **{name: getattr(p, name) for name in p._fields},
        "flops": flops,
        "contender": row.contender,
        "mode": row.mode,
        "kernel": plan(p, device.name()).name if row.contender == OURS else None,
        "reason": row.reason,
        **(asdict(stats) if stats else dict.fromkeys(STATS)),
        "tflops": tflops,
        "of_cublas": tflops / cublas_tflops if tflops and cublas_tflops else None,
        "us_per_head": stats.p50_us / (p.batch * p.heads) if stats else None,
        "tflops_per_watt": tflops / stats.watts if stats and tflops and stats.watts else None,
        "host_us": row.host_us,
        "over_best_peer": None,
        "max_error": row.max_error,
        "relative_error": row.relative_error,
        "checked_heads": heads if row.max_error is not None else None,
    }


def with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `ratios` to the records of a cell: each other contender's time over its own, in the same mode."""
    for one in records:
        timed = [r for r in records if r["mode"] == one["mode"] and r["p50_us"] and r is not one]
        one["ratios"] = {r["contender"]: r["p50_us"] / one["p50_us"] for r in timed} if one["p50_us"] else {}
    return records


def shape_word(problem: Problem) -> str:
    """B,H,S,D, or D/Dv; then Hk where it differs, then Sk where it does (with Hk)."""
    p = problem
    word = f"{p.batch},{p.heads},{p.seqlen_q},{p.head_dim}" + (f"/{p.head_dim_v}" if p.head_dim_v else "")
    if p.heads_kv != p.heads or p.seqlen_k != p.seqlen_q:
        word += f",{p.heads_kv}"
    return word + (f",{p.seqlen_k}" if p.seqlen_k != p.seqlen_q else "")


def cell_word(problem: Problem) -> str:
    return f"{shape_word(problem)} {'causal' if problem.causal else 'full'}"


def sweep(hidden: int = 2048, tokens: int = 16384) -> list[tuple[tuple[int, int, int, int], bool]]:
    """The FlashAttention papers' grid, 36 of ((B, H, S, D), causal): 16k tokens, hidden size 2048."""
    return [
        ((tokens // seqlen, hidden // head_dim, seqlen, head_dim), causal)
        for head_dim in (64, 128, 256)
        for seqlen in SEQLENS
        for causal in (False, True)
    ]
