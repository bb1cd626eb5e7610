"""Problem -> FwdConfig: which kernel runs. What was measured is in `tuned.json`. Pure Python: no GPU, no torch."""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from . import packing, tuned
from .kernels.config import DTYPES, LAYOUTS, FwdConfig
from .kernels.mask import Window

HEAD_DIM_MAX = 256
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)  # of the kernels; D runs on the next one up


class Problem(NamedTuple):
    """What is asked of one call: sizes, element type ("bf16" or "fp16"), mode order and mask."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "bf16"
    layout: str = "bhsd"
    causal: bool = False
    constant_time: bool = False
    window: bool = False

    @property
    def ratio(self) -> int:
        """Query heads to a K/V head."""
        return self.heads // self.heads_kv if self.heads_kv else 1

    @property
    def empty(self) -> bool:
        """Nothing to multiply: no output, or no keys."""
        return 0 in (self.batch, self.heads, self.seqlen_q, self.seqlen_k)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 queries in all heads and sequences."""
        return self.batch * self.heads * -(-self.seqlen_q // 64)

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.seqlen_q

    def flops(self) -> float:
        """4 B H Sq Sk D: two products' multiplications and additions; halved for causal (FlashAttention's count)."""
        return 4.0 * self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.head_dim / (2 if self.causal else 1)


@lru_cache(maxsize=4096)
def plan(problem: Problem, gpu: str | None = None) -> FwdConfig:
    """The kernel for a problem, by the table of the GPU of that name; without a name, or a table, by the H200's.

    A head dim that has no kernel of its own runs on the next larger one. Where few queries leave most of a tile empty,
    the heads that share a K/V head are packed into it.
    """
    found = _by_table(problem, gpu)
    if problem.ratio < 2 or problem.empty:
        return found
    rows = packing.rows_of(problem)
    other = _by_table(rows, gpu)
    if rows.seqlen_q <= 64:
        other = packing.few_rows(other, _always(problem, gpu), rows)
    return packing.packed(other, problem.ratio) if packing.worth(other, rows, found, problem) else found


def _by_table(problem: Problem, gpu: str | None) -> FwdConfig:
    """The kernel for as many heads, and rows of each, as the problem has."""
    if problem.window or problem.constant_time:
        return _always(problem, gpu)
    rows = tuned.table(gpu).classes[kernel_head_dim(problem), problem.causal, problem.dtype]
    row = next(row for row in rows if row.serves(problem.seqlen_q, problem.seqlen_k, problem.row_blocks))
    return replace(row.config, dtype=problem.dtype, layout=problem.layout)


def _always(problem: Problem, gpu: str | None) -> FwdConfig:
    """The kernel that serves the problem's kind at any lengths."""
    base = config(kernel_head_dim(problem), problem.dtype, problem.layout, problem.window or problem.causal, gpu)
    base = windowed(base) if problem.window else base
    return constant_time(base) if problem.constant_time else base


def kernel_head_dim(problem: Problem) -> int:
    return next(d for d in HEAD_DIMS if problem.head_dim <= d)


def config(head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None = None) -> FwdConfig:
    """The kernel of a head dim and a mask that serves wherever no other row of the table does."""
    return _configs(head_dim, dtype, layout, causal, gpu)[-1]


def constant_time(config: FwdConfig) -> FwdConfig:
    """The same tiles and schedule, with a softmax of which no branch depends on a score."""
    return replace(config, redo=False, constant_time=True)


def windowed(config: FwdConfig) -> FwdConfig:
    """Of a causal kernel the one for a window. Its tiles are short: CTAs of a cluster would share too little.

    With redo ptxas spills at d64, 12 bytes.
    """
    return replace(config, mask=Window(), cluster=1, redo=config.redo and config.head_dim != 64)


def kind(config: FwdConfig) -> tuple[int, str, str, str, bool]:
    """What a caller chooses, beside the sizes: they may take one kernel or another of a kind."""
    return config.head_dim, config.dtype, config.layout, config.mask.name, config.constant_time


def shipped(gpu: str | None = None, ratio: int = 1) -> list[FwdConfig]:
    """Every kernel that some problem can reach: those of each kind, of some lengths only, windowed, constant-time.

    And with a ratio, of query heads to a K/V head, those that pack them.
    """
    kinds = [_configs(*one, gpu) for one in product(HEAD_DIMS, DTYPES, LAYOUTS, (False, True))]
    always, some = [configs[-1] for configs in kinds], [c for configs in kinds for c in configs[:-1]]
    windows = [windowed(config) for config in always if config.mask.causal]
    every = [*always, *some, *windows, *map(constant_time, [*always, *windows])]
    return list(dict.fromkeys([*every, *packing.kernels(every, ratio)]))


def _configs(head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None) -> list[FwdConfig]:
    """Of the table's rows, in the order of asking."""
    rows = tuned.table(gpu).classes[head_dim, causal, dtype]
    return [replace(row.config, dtype=dtype, layout=layout) for row in rows]
