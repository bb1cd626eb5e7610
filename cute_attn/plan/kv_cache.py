"""Over a K/V cache: how its rows come, and whether all CTAs share the keys."""

from dataclasses import replace
from math import gcd

from ..kernels.config import SMEM_BYTES, FwdConfig, KvCache
from ..kernels.grid_split import EqualShares
from ..problem import Problem
from .candidates import kernel_dims
from .rule import Rule

FEW_ROWS = 128  # of a K/V head and sequence: with more, tiles enough read the same keys
TWO_CTAS = 128  # registers_held up to which two CTAs of 160 threads have enough: ptxas gives each thread 168
BOUNDS = 24  # of these for a window's second bound, or ALiBi's slopes
BOX_ROWS = 64  # at most, of a page
BOXES = 32  # at most, of a stage: a lane for each


def few_queries(problem: Problem, config: FwdConfig) -> bool:
    """Whether what counts is how fast K and V come."""
    rows = problem.seqlen_q * config.pack
    return 0 < rows <= FEW_ROWS and config.head_dim_splits == 1 and not (config.row_max or config.dropout)


def shared(problem: Problem, config: FwdConfig) -> FwdConfig:
    """64 rows to a CTA, of which an SM has two where two stages or three of 64 keys, or of 32, leave room for them."""
    few = replace(config, tile_m=64, q_stages=1, pingpong=False, q_in_regs=False, speculative=False)
    room = SMEM_BYTES - 1024 - 2 * few.head_dim * few.tile_m
    sizes = [
        replace(few, scheduler=EqualShares, tile_n=n, stages=stages, cache=KvCache(n))
        for n in (64, 32)
        for stages in (3, 2)
        if 2 * stages * n * (few.head_dim + few.d_v) <= room
    ]
    most = TWO_CTAS - (BOUNDS if config.mask.windowed or problem.features.alibi else 0)
    return next((x for x in sizes if x.ctas_per_sm == 2 and x.registers_held <= most), sizes[0])


def box_of(page: int, tile_n: int) -> int:
    """Rows of a box: the largest power of two that a page and a stage are multiples of."""
    rows = gcd(page, tile_n, BOX_ROWS)
    return rows & -rows


def keys_of_stage(page: int, tile_n: int) -> int:
    """As many as there are lanes for the boxes of."""
    return max(n for n in range(16, tile_n + 1, 16) if n <= BOXES * box_of(page, n))


def cached(problem: Problem, config: FwdConfig) -> FwdConfig:
    if not problem.page:
        return replace(config, cache=KvCache(config.tile_n))
    tile_n = keys_of_stage(problem.page, config.tile_n)
    box = box_of(problem.page, tile_n)
    head_dim, head_dim_v = _whole_atoms(config) if box == 1 else (config.head_dim, config.head_dim_v)
    dims = replace(config, head_dim=head_dim, head_dim_v=head_dim_v, tile_n=tile_n, cache=KvCache(box, paged=True))
    return replace(dims, speculative=config.speculative and box == tile_n)


def _whole_atoms(config: FwdConfig) -> tuple[int, int]:
    """Boxes of one row: TMA writes them to whole 128 bytes, which those of head dims with narrower atoms are not.

    Of V's columns each warpgroup that shares the rows has an equal part.
    """
    sizes = (config.head_dim, 64), (config.d_v, 64 * config.head_dim_splits)
    return kernel_dims(*(-(-d // n) * n for d, n in sizes))


RULES = (
    Rule(
        "few queries over a cache",
        "what counts is how fast K and V come: all CTAs share the keys, and a second kernel merges what they found",
        few_queries,
        shared,
    ),
    Rule(
        "K/V cache",
        "k and v are a cache's, in boxes of as many rows as a page has together",
        lambda problem, config: problem.page is not None,
        cached,
    ),
)
