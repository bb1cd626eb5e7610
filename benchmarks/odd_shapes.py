"""Times head dims and lengths that are off the sweep's grid, each beside the grid's cell that it would be padded to.

python benchmarks/odd_shapes.py [--out FILE] [--only WORD]

A shape's baseline is its neighbour, D and S padded to the grid's next, B and H the same: its padded work is the
neighbour's work, so that an `x baseline` of 1 says that padding by hand would be as fast. TFLOPS are of the shape's own
work. Exit status 1 where `x baseline` is below 0.85; 2 for bad arguments, or without a Hopper GPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from accuracy import compile_ahead
from script import main

from cute_attn.plan import Problem
from cute_attn.tools.benchmark import cells, frame
from cute_attn.tools.benchmark.cells import SEQLENS, sweep
from cute_attn.tools.benchmark.implementations import CuteAttn
from cute_attn.tools.benchmark.workload import cell_word

BAR = 0.85  # the least x baseline
TOKENS, HIDDEN = 16384, 2048  # of a neighbour, as in the sweep
HEAD_DIMS = tuple(sorted({head_dim for (_, _, _, head_dim), _ in sweep()}))  # of the grid
ODD = (
    *((4096, head_dim) for head_dim in (80, 96, 112, 160, 192, 224)),
    *((seqlen, head_dim) for head_dim in (128, 64) for seqlen in (1000, 1337, 4097)),
)


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


def rows(beside: Problem, odd: Sequence[Problem], device: torch.device) -> list[frame.Row]:
    """The neighbour, and a row per odd shape."""
    return [
        replace(cells.row(p, [CuteAttn()], {}, device), case=cell_word(p), baseline=cell_word(beside))
        for p in (beside, *odd)
    ]


class Run(frame.Run):
    def failures(self) -> list[str]:
        below = [r for r in self.records if r["x_baseline"] is not None and r["x_baseline"] < BAR]
        words = [f"{r['case']}: {r['x_baseline']:.3f} of {r['baseline']}, at least {BAR} is wanted" for r in below]
        return super().failures() + words


if __name__ == "__main__":
    GROUPS = {"; ".join(map(cell_word, odd)): partial(rows, beside, odd) for beside, odd in groups().items()}
    PROBLEMS = [one for beside, odd in groups().items() for one in (beside, *odd)]
    sys.exit(main("odd_shapes", __doc__, GROUPS, make=Run, before=partial(compile_ahead, PROBLEMS), bar=BAR))
