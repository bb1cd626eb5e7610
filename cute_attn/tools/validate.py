"""`python -m cute_attn.validate`: the gates in order, a line each. Without a Hopper GPU, those that need none.

    python -m cute_attn.validate --json validate.json

Compiles 27 kernels for sm_90a, for 2 to 5 s each. Needs `pip install "cute_attn[bench]"`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cute_attn

try:
    from rich.console import Console
    from rich.text import Text
except ImportError:
    raise SystemExit('python -m cute_attn.validate: rich is missing; pip install "cute_attn[bench]"') from None

from .. import device
from ..kernels.config import FwdConfig
from ..plan import plan
from ..problem import Problem
from . import inspect
from .bench import WIDTH, out_file
from .benchmark import edges, gates, machine, report
from .benchmark.cells import measure
from .benchmark.frame import Setup, gpu_setup
from .benchmark.implementations import BASELINES, OURS, CuteAttn, first_line, make_inputs
from .benchmark.progress import each
from .benchmark.timing import Call, compare
from .benchmark.workload import cell_word

HEADLINE = Problem(16, 16, 16, 2048, 2048, 64, "fp16")
DIFFERENCE = 2e-3  # to torch SDPA
STD = 0.02  # of the mean
TOGETHER = 200  # calls to a sample: some 100 ms, over which clocks at the power limit, and the host's pauses, even out
STEADY_MS = 2000.0
WARMUP_MS = 400.0  # ours alone: the GPU may come from idle clocks
SEQLEN = 2048  # of the cells whose gates are asked; benchmarks/gpu_ci asks all
EDGE_HEAD_DIMS = (40, 64, 128, 256)
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass
class Lab:
    """What the gates check, and what they measure it with."""

    recorded: dict[str, Any]  # gates.json
    setup: Setup | None  # None: no Hopper GPU

    @property
    def device(self) -> torch.device:
        assert self.setup is not None, "a gate that needs a GPU"
        return self.setup.device

    @property
    def edges(self) -> list[Problem]:
        every = product(EDGE_HEAD_DIMS, (False, True), edges.EDGES)
        return [Problem(2, 4, 2, *lengths, d, "bf16", "bhsd", causal) for d, causal, lengths in every]

    @property
    def cells(self) -> dict[str, Problem]:
        """Of the recorded gates, by name."""
        every = {name: gates.problem(name, self.recorded) for name in self.recorded["gates"]}
        return {name: problem for name, problem in every.items() if problem.seqlen_q == SEQLEN}

    @cached_property
    def kernels(self) -> list[FwdConfig]:
        """That all of these run, each once."""
        return list(dict.fromkeys(plan(p, device.name()) for p in [*self.edges, HEADLINE, *self.cells.values()]))


class Finding(NamedTuple):
    """What a gate measured, in words, and in full for the JSON."""

    passed: bool
    measured: str
    details: Any = None


class Gate(NamedTuple):
    name: str
    asked: str
    check: Callable[[Lab], Finding]
    needs_gpu: bool = True


def compiles(lab: Lab) -> Finding:
    return _each_kernel(lab, "compile", lambda config: [] if inspect.build(config).sass else ["no machine code"])


def machine_code(lab: Lab) -> Finding:
    return _each_kernel(lab, "are healthy", lambda config: inspect.report(config).problems())


def _each_kernel(lab: Lab, verb: str, problems: Callable[[FwdConfig], list[str]]) -> Finding:
    found: dict[str, list[str]] = {}
    for config in each(lab.kernels, "kernels"):
        name = f"{config.name} {config.layout}"
        try:
            found[name] = problems(config)
        except FileNotFoundError:  # nvdisasm; it says how to get it
            raise
        except Exception as error:  # the DSL and ptxas fail in many ways; the other kernels are still looked at
            found[name] = [_words(error)]
    broken = {name: texts for name, texts in found.items() if texts}
    words = f"{len(found) - len(broken)} of {len(found)} kernels {verb}"
    return Finding(not broken, "; ".join([words, *_first(broken)]), found)


def _first(broken: dict[str, list[str]]) -> Iterator[str]:
    for name, texts in list(broken.items())[:1]:
        yield f"{name}: {texts[0]}" + (f", and {len(broken) - 1} more" if len(broken) > 1 else "")


def right_at_edges(lab: Lab) -> Finding:
    found = {}
    for problem in each(lab.edges, "edge shapes"):
        name = f"{problem.seqlen_q}x{problem.seqlen_k} d{problem.head_dim} {'causal' if problem.causal else 'full'}"
        found[name] = edges.check(make_inputs(problem, lab.device))
    worst = max(found, key=lambda name: _share(found[name]))
    right = sum(edge.passed for edge in found.values())
    words = f"{right} of {len(found)} right; largest error {_share(found[worst]):.2f} of what is allowed ({worst})"
    if wrong := [name for name, edge in found.items() if not edge.lse]:
        words += f"; lse wrong at {wrong[0]}"
    details = {name: dict(error=_finite(x.error), allowed=_finite(x.allowed), lse=x.lse) for name, x in found.items()}
    return Finding(right == len(found), words, details)


def _share(edge: edges.Edge) -> float:
    share = edge.error / edge.allowed
    return share if isfinite(share) else torch.inf


def difference(lab: Lab) -> Finding:
    q, k, v, _ = make_inputs(HEADLINE, lab.device)
    ours, theirs = cute_attn.flash_fwd(q, k, v), edges.sdpa(q, k, v, causal=False)
    largest = (ours.float() - theirs.float()).abs().max().item()
    return Finding(largest < DIFFERENCE, f"{largest:.1e}", _finite(largest))


def steady(lab: Lab) -> Finding:
    assert lab.setup is not None
    call = CuteAttn().prepare(make_inputs(HEADLINE, lab.device)).call
    call.run()
    many = Call(lambda: [call.run() for _ in range(TOGETHER)], count=TOGETHER)
    timer = lab.setup.timer
    stats = compare({OURS: many}, rounds=1, warmup_ms=WARMUP_MS, timed_ms=STEADY_MS, timer=timer)[OURS]
    share = stats.std_us / stats.mean_us
    return Finding(share < STD, f"{share:.2%} of {stats.mean_us:.1f} us", asdict(stats))


def over_cudnn(lab: Lab) -> Finding:
    assert lab.setup is not None
    ours, baseline, cells, records = CuteAttn(), BASELINES[gates.BASELINE], lab.cells, []
    absent = {gates.BASELINE: reason} if (reason := baseline.absent()) else {}
    for problem in each([*cells.values()], "cells over cuDNN"):
        records += measure(problem, [ours, baseline], absent, lab.setup)
    found = gates.compare({name: lab.recorded["gates"][name] for name in cells}, records)
    least = min(found, key=lambda cell: (cell.ratio or 0.0) / cell.gate)
    words = f"{sum(cell.passed for cell in found)} of {len(found)} cells; least "
    if least.ratio is None:
        reasons = [f"{r['contender']}: {r['reason']}" for r in records if r["reason"]]
        words += "; ".join([f"{least.name}: no ratio", *dict.fromkeys(reasons)])
    else:
        words += f"{least.ratio / least.gate:.3f} of its gate ({least.name}: {least.ratio:.3f}, gate {least.gate:.3f})"
    return Finding(all(cell.passed for cell in found), words, [cell._asdict() for cell in found])


def _finite(x: float) -> float | None:
    return x if isfinite(x) else None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


GATES = (
    Gate("compiles", "every kernel of the shapes below, for sm_90a", compiles, needs_gpu=False),
    Gate("machine code", "no spills, no serialised WGMMA, WGMMA and TMA in place", machine_code, needs_gpu=False),
    Gate("edge shapes", "error at most twice torch's in the same dtype and an ulp, lse to 2e-6", right_at_edges),
    Gate("difference to SDPA", f"below {DIFFERENCE:.0e} at {cell_word(HEADLINE)} fp16", difference),
    Gate("std of the time", f"below {STD:.0%} at {cell_word(HEADLINE)} fp16, alone and settled", steady),
    Gate("over cuDNN", f"at least {1 - gates.TOLERANCE:.2f} of each recorded gate, S {SEQLEN}", over_cudnn),
)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where no gate failed, 1 where one did, 2 for bad arguments."""
    args = parse(argv)
    reason = machine.no_hopper()
    if reason is None:
        torch.set_float32_matmul_precision("highest")  # the reference's products in float32, not TF32
    lab = Lab(args.recorded, None if reason else gpu_setup())
    console = Console(width=None if sys.stdout.isatty() else max(WIDTH, Console().width), highlight=False)
    facts = machine.conditions(machine.Nvml())
    rows = []
    for row in run(lab, reason):
        console.print(line(row), soft_wrap=True)
        rows.append(row)
    failed, left = ([row["gate"] for row in rows if row["status"] == status] for status in (FAILED, NOT_RUN))
    console.print(Text(verdict(failed, left)), soft_wrap=True)
    if args.json is not None:
        content = {"passed": not failed, "complete": not left, "conditions": facts, "gates": rows}
        report.write_json(args.json, content)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and the recorded gates; exits with 2 on bad ones, naming the argument."""
    p = argparse.ArgumentParser(prog="python -m cute_attn.validate", description="Run the gates, a line each.")
    p.add_argument("--json", type=out_file, metavar="FILE", help="everything that was measured")
    p.add_argument("--gates", type=Path, default=gates.GATES, metavar="FILE", help="ratios to cuDNN; default: ours")
    args = p.parse_args(argv)
    try:
        args.recorded = gates.read(args.gates)
        if not Lab(args.recorded, None).cells:
            raise ValueError(f"no cell of S {SEQLEN}")
    except (OSError, ValueError) as error:
        p.error(f"argument --gates: {args.gates} does not serve: {error}")
    return args


def run(lab: Lab, reason: str | None) -> Iterator[dict[str, Any]]:
    """A row per gate. One that fails does not keep the next from running, unless the GPU itself is lost."""
    for gate in GATES:
        row = {"gate": gate.name, "status": NOT_RUN, "measured": reason, "asked": gate.asked, "details": None}
        if reason is None or not gate.needs_gpu:
            try:
                finding = gate.check(lab)
            except Exception as error:  # a gate that cannot tell has failed
                finding = Finding(False, _words(error))
                if isinstance(error, torch.AcceleratorError):
                    reason = "the CUDA context is lost"
            row |= {"status": PASSED if finding.passed else FAILED}
            row |= {"measured": finding.measured, "details": finding.details}
        yield row


def line(row: dict[str, Any]) -> Text:
    style = {PASSED: "green", FAILED: "bold red", NOT_RUN: "dim"}[row["status"]]
    words = f"{row['measured']}" + ("" if row["status"] == NOT_RUN else f" (asked: {row['asked']})")
    return Text(f"{row['status']:8} ", style=style) + Text(f"{row['gate']:19} {words}", style="not dim not bold")


def verdict(failed: list[str], left: list[str]) -> str:
    if failed:
        return f"validate: failed: {', '.join(failed)}"
    return "validate: passed" + (f" as far as it ran; not run: {', '.join(left)}" if left else "")


if __name__ == "__main__":
    raise SystemExit(main())
