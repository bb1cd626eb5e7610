"""Errors of cute_attn and of cuDNN against float64 attention: the sweep's 36 cells, and adversarial inputs.

python benchmarks/accuracy.py [--out FILE] [--dtype bf16,fp16]

Exit status 1 where an output of ours has a NaN or inf, or where its largest error is above 1.25 times cuDNN's plus half
an ulp of the largest output; 2 for bad arguments, or without a Hopper GPU.
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_tests import where
from rich import box
from rich.console import Console
from rich.table import Table

from cute_attn import compile, device, reference
from cute_attn.checks import TORCH_DTYPES
from cute_attn.plan import Problem, plan
from cute_attn.tools.bench import WIDTH, out_file
from cute_attn.tools.benchmark.cells import sweep
from cute_attn.tools.benchmark.implementations import (
    BASELINES,
    OURS,
    CuteAttn,
    Implementation,
    Inputs,
    first_run,
    make_inputs,
)
from cute_attn.tools.benchmark.machine import no_hopper
from cute_attn.tools.benchmark.progress import each, steps
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.workload import shape_word

ROOT = Path(__file__).parent.parent
CUDNN = "cudnn"
TOLERANCE = 1.25  # times cuDNN's largest error
SEQLEN_OF_TWO = 4096  # up to here two (batch, head) pairs of a cell are checked, above it one
ADVERSARIAL_SEQLEN = 2048
GROUP = 64  # keys whose logits rise together; no kernel takes fewer at a time, so the maximum grows at every block
GROWTH = 8.0  # of the logits from group to group: 2^11.5, past the slack (2^8) of a kernel that rescales O lazily
LOGIT_MAX = 1e4
METHOD = {
    "truth": "float64 attention of the rounded inputs, a block of query rows at a time",
    "checked": f"2 (batch, head) pairs of a cell up to S {SEQLEN_OF_TWO}, 1 above; NaN and inf are looked for in all",
    "max_error, mean_error": "absolute, over the checked pairs",
    "relative_error": "norm of the difference / norm of the truth",
    "normal": "random normal q, k, v, the same for both",
    "growing to the first key, to the last key": f"logits rise by {GROWTH:g} from {GROUP} keys to the next {GROUP}",
    "logits of 1e4": "normal q, scaled so that the largest |logit| is 1e4",
    "allowed": f"{TOLERANCE:g} x cuDNN's max_error + half an ulp of the truth's largest magnitude",
}

Entry = dict[str, Any]


# Inputs


def growing(x: Inputs, *, to_first: bool) -> Inputs:
    """x with logits that rise by GROWTH every GROUP keys: towards the first key, which kernels take last, or the last.

    One column carries it: q's is constant, and k's counts groups, which bf16 holds exactly up to 256.
    """
    q, k = x.q.clone(), x.k.clone()
    groups = torch.arange(k.shape[2], device=k.device) // GROUP  # (Sk,)
    q[..., 0] = GROWTH * q.shape[3] ** 0.5
    k[..., 0] = groups.flip(0) if to_first else groups
    return x._replace(q=q, k=k)


def large_logits(x: Inputs) -> Inputs:
    """x with q scaled so that the largest |logit| is about LOGIT_MAX, up to q's rounding."""
    tops = [(q.float() @ k.float().mT).abs().max().item() for q, k in zip(x.q, x.k, strict=True)]  # of each batch
    return x._replace(q=x.q * (LOGIT_MAX * x.q.shape[3] ** 0.5 / max(tops)))


ADVERSARIAL: dict[str, Callable[[Inputs], Inputs]] = {
    "growing to the first key": partial(growing, to_first=True),
    "growing to the last key": partial(growing, to_first=False),
    "logits of 1e4": large_logits,
}
INPUTS = {"normal": lambda x: x, **ADVERSARIAL}


def cases(dtype: str) -> list[tuple[str, Problem]]:
    """(kind of inputs, problem): the sweep's cells, then those of one length with each adversarial kind."""
    grid = [Problem(b, h, h, s, s, d, dtype, "bshd", causal) for (b, h, s, d), causal in sweep()]
    hard = [problem for problem in grid if problem.seqlen_q == ADVERSARIAL_SEQLEN]
    return [("normal", problem) for problem in grid] + [(kind, problem) for kind in ADVERSARIAL for problem in hard]


# Errors


class Errors(NamedTuple):
    """Of an output against the truth; inf where the output has a NaN or inf."""

    mean: float
    max: float
    relative: float


def pairs(problem: Problem) -> list[tuple[int, int]]:
    """The (batch, head) pairs that are checked: the last one, where a wrong offset shows, and with two the first."""
    last = (problem.batch - 1, problem.heads - 1)
    return [(0, 0), last] if problem.seqlen_q <= SEQLEN_OF_TWO else [last]


def truth(x: Inputs, chosen: Sequence[tuple[int, int]]) -> torch.Tensor:
    """float64 attention (pairs, Sq, D) of these (batch, head) pairs of q, k, v (B, H, S, D)."""
    one = [[t[b, h][None, None] for t in (x.q, x.k, x.v)] for b, h in chosen]  # (1, 1, S, D) each
    return torch.cat([reference.attention(*qkv, causal=x.problem.causal, dtype=torch.float64)[0][0] for qkv in one])


def errors(o: torch.Tensor, chosen: Sequence[tuple[int, int]], true: torch.Tensor) -> Errors:
    """Of o (B, H, Sq, D) in the chosen pairs against true (pairs, Sq, D); all of o must be finite."""
    if not torch.isfinite(o).all():
        return Errors(math.inf, math.inf, math.inf)
    wrong = torch.stack([o[b, h] for b, h in chosen]).double() - true
    return Errors(wrong.abs().mean().item(), wrong.abs().max().item(), (wrong.norm() / true.norm()).item())


def output(implementation: Implementation, x: Inputs) -> torch.Tensor:
    """Its o (B, H, Sq, D), in memory that held NaN before: what a call leaves unwritten is seen."""
    prepared = implementation.prepare(x)
    poison = torch.full_like(x.q, torch.nan)
    del poison  # torch's allocator hands this memory out again
    return prepared.bhsd(first_run(prepared))


# Verdict


def half_ulp(largest: float, dtype: torch.dtype) -> float:
    """What rounding a number of this magnitude to dtype may be off by, at most."""
    return torch.finfo(dtype).eps / 2 * 2.0 ** (math.frexp(largest)[1] - 1)


def allowed(cudnn: Errors, largest: float, dtype: torch.dtype) -> float:
    """The largest error that ours may have; inf where cuDNN's own output is not finite.

    The floor is what rounding alone explains: where the largest errors are of a single rounding of the largest
    outputs, one kernel may round a near tie one way and the other kernel the other way, and both are right.
    """
    return TOLERANCE * cudnn.max + half_ulp(largest, dtype)


def verdict(ours: Errors, limit: float) -> str:
    if not math.isfinite(ours.max):
        return "NaN or inf"
    return "ok" if ours.max <= limit else "error too large"


def measure(kind: str, problem: Problem, baseline: Implementation, on: torch.device) -> list[Entry]:
    """Ours' entry, with its verdict, and the baseline's. None for errors that are not finite."""
    x = INPUTS[kind](make_inputs(problem, on))
    chosen = pairs(problem)
    true = truth(x, chosen)
    largest = true.abs().max().item()
    ours, theirs = (errors(output(one, x), chosen, true) for one in (CuteAttn(), baseline))
    limit = allowed(theirs, largest, x.q.dtype)
    cell = {
        "shape": shape_word(problem),
        "causal": problem.causal,
        "dtype": problem.dtype,
        "inputs": kind,
        "checked_pairs": len(chosen),
        "largest_output": largest,
    }
    judged = {"allowed": _finite(limit), "verdict": verdict(ours, limit)}
    return [
        {**cell, "contender": OURS, **_numbers(ours), **judged},
        {**cell, "contender": baseline.name, **_numbers(theirs), "allowed": None, "verdict": None},
    ]


def _numbers(e: Errors) -> dict[str, float | None]:
    return {f"{name}_error": _finite(value) for name, value in e._asdict().items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# The run


def compile_ahead(problems: Iterable[Problem]) -> None:
    """Their kernels into the disk cache, in parallel processes: one process compiles one at a time, each about 2 s."""
    configs = list(dict.fromkeys(plan(problem, device.name()) for problem in problems))
    workers = min(len(configs), len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, steps("kernels", len(configs)) as step:
        for _ in pool.map(compile.store, configs):
            step()


def table(entries: Sequence[Entry]) -> Table:
    """A row per cell: both implementations' errors, what is allowed, the verdict."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    out.add_column("cell")
    out.add_column("inputs")
    for who in ("ours", "cuDNN"):
        for what in ("mean", "max", "rel."):
            out.add_column(f"{who}\n{what}", justify="right", no_wrap=True)
    out.add_column("max\nallowed", justify="right", no_wrap=True)
    out.add_column("verdict")
    for ours, cudnn in zip(entries[::2], entries[1::2], strict=True):
        numbers = [e[f"{what}_error"] for e in (ours, cudnn) for what in ("mean", "max", "relative")]
        words = ["not finite" if x is None else f"{x:.2e}" for x in [*numbers, ours["allowed"]]]
        style = None if ours["verdict"] == "ok" else "bold red"
        out.add_row(_cell(ours), ours["inputs"], *words, ours["verdict"], style=style)
    return out


def _cell(entry: Entry) -> str:
    return f"{entry['shape']} {'causal' if entry['causal'] else 'full'} {entry['dtype']}"


def finish(entries: Sequence[Entry], out: Path, versions: dict[str, str | None]) -> int:
    """Writes the record and prints the table, failures on stderr too; 1 where there are any."""
    failed = [f"{_cell(e)}, {e['inputs']}: {e['verdict']}" for e in entries if e["verdict"] not in ("ok", None)]
    write_json(out, {**where(), "peers": versions, "method": METHOD, "failed": failed, "cells": list(entries)})
    cells = len(entries) // 2
    return show(table(entries), f"{cells - len(failed)} of {cells} cells are within what is allowed", failed)


def show(numbers: Table, summary: str, failed: Sequence[str]) -> int:
    """To people: the table, a line under it, and the failures on stderr; 1 where there are any."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(numbers)
    console.print(summary)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _dtypes(word: str) -> list[str]:
    names = list(dict.fromkeys(word.split(",")))
    if not set(names) <= set(TORCH_DTYPES):
        raise argparse.ArgumentTypeError(f"{word!r} is not known; use {', '.join(TORCH_DTYPES)}, or both")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks/accuracy.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=out_file, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    parser.add_argument("--dtype", type=_dtypes, default=list(TORCH_DTYPES), metavar="bf16,fp16", help="default both")
    arguments = parser.parse_args(argv)
    cudnn = BASELINES[CUDNN]
    reason = no_hopper() or cudnn.absent()
    if reason is not None:
        print(f"benchmarks/accuracy.py: a Hopper GPU and cuDNN are needed: {reason}", file=sys.stderr)
        return 2
    every = [case for dtype in arguments.dtype for case in cases(dtype)]
    compile_ahead(problem for _, problem in every)
    on = torch.device("cuda", torch.cuda.current_device())
    entries = [entry for kind, problem in each(every, "cells") for entry in measure(kind, problem, cudnn, on)]
    return finish(entries, arguments.out, {CUDNN: cudnn.version()})


if __name__ == "__main__":
    sys.exit(main())
