"""Times head dims and lengths that are off the sweep's grid, each beside the grid's cell that it would be padded to.

python benchmarks/odd_shapes.py [--out FILE]

A shape's share is its neighbour's time over its own: with B and H the same, its padded work is the neighbour's work, so
that a share of 1 says that padding by hand would be as fast. Exit status 1 where a share is below 0.85; 2 for bad
arguments, or without a Hopper GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy import compile_ahead, show
from gpu_tests import where
from rich import box
from rich.table import Table

from cute_attn import device
from cute_attn.plan import Problem, plan
from cute_attn.tools.bench import out_file
from cute_attn.tools.benchmark.cells import ERROR_MAX, SEQLENS, Setup, Truth, cell_word, gpu_setup, shape_word, sweep
from cute_attn.tools.benchmark.implementations import CuteAttn, first_run, make_inputs
from cute_attn.tools.benchmark.machine import FLOP_FORMULA, Monitor, Nvml, no_hopper
from cute_attn.tools.benchmark.progress import each
from cute_attn.tools.benchmark.report import us, write_json
from cute_attn.tools.benchmark.timing import METHOD, ROUNDS, Call, Stats, compare

ROOT = Path(__file__).parent.parent
BAR = 0.85  # the least share
TOKENS, HIDDEN = 16384, 2048  # of a neighbour, as in the sweep
HEAD_DIMS = tuple(sorted({head_dim for (_, _, _, head_dim), _ in sweep()}))  # of the grid
ODD = (
    *((4096, head_dim) for head_dim in (80, 96, 112, 160, 192, 224)),
    *((seqlen, head_dim) for head_dim in (128, 64) for seqlen in (1000, 1337, 4097)),
)
SHARE = {
    "neighbour": f"D padded to the next of {HEAD_DIMS}, S to the next of {SEQLENS}, B and H the same",
    "share": "the neighbour's p50 / the shape's own, timed in the same rounds",
    "tflops": f"of the shape's own work, {FLOP_FORMULA}: without the padding",
}

Entry = dict[str, Any]


def padded(seqlen: int, head_dim: int) -> tuple[int, int]:
    """(S, D) of the grid's next cell."""
    return next(s for s in SEQLENS if seqlen <= s), next(d for d in HEAD_DIMS if head_dim <= d)


def problem(seqlen: int, head_dim: int, causal: bool) -> Problem:
    """With the batch and the heads of its neighbour, which has 16k tokens and hidden size 2048."""
    padded_seqlen, padded_dim = padded(seqlen, head_dim)
    batch, heads = TOKENS // padded_seqlen, HIDDEN // padded_dim
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, "bf16", "bshd", causal)


def neighbour(odd: Problem) -> Problem:
    seqlen, head_dim = padded(odd.seqlen_q, odd.head_dim)
    return odd._replace(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim)


def groups() -> dict[Problem, list[Problem]]:
    """Neighbour -> the odd shapes that are timed beside it."""
    out: dict[Problem, list[Problem]] = {}
    for causal in (False, True):
        for seqlen, head_dim in ODD:
            odd = problem(seqlen, head_dim, causal)
            out.setdefault(neighbour(odd), []).append(odd)
    return out


def checked(of: Problem, setup: Setup) -> Call:
    """flash_fwd on the problem's inputs, after an output that is right: a wrong kernel's time says nothing."""
    inputs = make_inputs(of, setup.device)
    prepared = CuteAttn().prepare(inputs)
    error = Truth(inputs).errors(prepared.bhsd(first_run(prepared)))[1]
    if error > ERROR_MAX:
        raise RuntimeError(f"{cell_word(of)}: relative error {error:.1e}, at most {ERROR_MAX:.0e} is expected")
    return prepared.call


def measure(beside: Problem, odd: Sequence[Problem], setup: Setup) -> list[Entry]:
    """An entry per odd shape, all timed in the same rounds as their neighbour."""
    calls = {cell_word(one): checked(one, setup) for one in (beside, *odd)}
    with setup.monitor() as monitor:
        stats = compare(calls, rounds=setup.rounds, timer=setup.timer, monitor=monitor)
    timed = {one: _timed(one, stats[cell_word(one)]) for one in (beside, *odd)}
    return [_entry(timed[one], timed[beside]) for one in odd]


def _timed(of: Problem, stats: Stats) -> Entry:
    return {
        "shape": shape_word(of),
        "causal": of.causal,
        "kernel": plan(of, device.name()).name,
        "p50_us": stats.p50_us,
        "spread": stats.spread,
        "rounds_us": stats.rounds_us,
        "watts": stats.watts,
        "sm_mhz": stats.sm_mhz,
        "tflops": of.flops() / stats.p50_us / 1e6,
    }


def _entry(own: Entry, beside: Entry) -> Entry:
    share = beside["p50_us"] / own["p50_us"]
    return {**own, "neighbour": beside, "share": share, "passed": share >= BAR}


def table(entries: Sequence[Entry]) -> Table:
    """A row per odd shape, with its neighbour's."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("B,H,S,D", "us", "TFLOPS", "neighbour", "us", "TFLOPS", "share", ""):
        numeric = header in ("us", "TFLOPS", "share")
        out.add_column(header, justify="right" if numeric else "left", no_wrap=True)
    for e in entries:
        words = [w for one in (e, e["neighbour"]) for w in (_cell(one), us(one["p50_us"]), f"{one['tflops']:.1f}")]
        passed = "ok" if e["passed"] else f"below {BAR}"
        out.add_row(*words, f"{e['share']:.3f}", passed, style=None if e["passed"] else "bold red")
    return out


def _cell(entry: Entry) -> str:
    return f"{entry['shape']} {'causal' if entry['causal'] else 'full'}"


def finish(entries: Sequence[Entry], out: Path) -> int:
    """Writes the record and prints the table, failures on stderr too; 1 where there are any."""
    failed = [f"{_cell(e)}: share {e['share']:.3f}, at least {BAR} is wanted" for e in entries if not e["passed"]]
    method = METHOD | {"rounds": ROUNDS} | SHARE
    write_json(out, {**where(), "bar": BAR, "method": method, "failed": failed, "cells": list(entries)})
    reached = f"{len(entries) - len(failed)} of {len(entries)} shapes reach {BAR} of their neighbour's rate"
    return show(table(entries), reached, failed)


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks/odd_shapes.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=out_file, default=ROOT / "benchmarks" / "results" / "odd_shapes.json")
    arguments = parser.parse_args(argv)
    reason = no_hopper()
    if reason is not None:
        print(f"benchmarks/odd_shapes.py: a Hopper GPU is needed: {reason}", file=sys.stderr)
        return 2
    compile_ahead(one for beside, odd in groups().items() for one in (beside, *odd))
    nvml = Nvml()
    setup = gpu_setup(monitor=lambda: Monitor(nvml.read))
    entries = [
        entry for beside, odd in each([*groups().items()], "groups of shapes") for entry in measure(beside, odd, setup)
    ]
    return finish(entries, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
