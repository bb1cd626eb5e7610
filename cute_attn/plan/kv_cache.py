"""Over a K/V cache: how its rows come, and whether all CTAs share the keys."""

from dataclasses import replace
from math import gcd
from typing import Any

from ..kernels.combine import COMBINE_BYTES
from ..kernels.config import PACKS, SMEM_BYTES, FwdConfig, KvCache
from ..kernels.grid_split import EqualShares
from ..problem import Problem
from .candidates import kernel_dims
from .rule import Rule

FEW_ROWS = 128  # of a K/V head and sequence: with more, tiles enough read the same keys
WIDEST = 192  # columns of tiles of so many rows: with more the registers do not suffice
KEYS = 64  # of a stage, where all CTAs share them
LEAST_STAGES, STAGES = 3, 16  # that are left for `Combine` to begin early; at most
BOX_ROWS = 128  # at most, of a page
LEAST_BOX = 8  # of smaller ones TMA loads fewer bytes a second than threads copy


def few_queries(problem: Problem, config: FwdConfig) -> bool:
    """Whether what counts is how fast K and V come."""
    rows = problem.seqlen_q * config.pack
    return 0 < rows <= FEW_ROWS and config.head_dim_splits == 1 and not (config.row_max or config.dropout)


def shared(problem: Problem, config: FwdConfig) -> FwdConfig:
    """A CTA to an SM, and its memory for K and V. A tile has all rows, and one query's are no more than it has."""
    wide = config.widest > WIDEST
    one = problem.seqlen_q == 1 and problem.ratio > config.pack == PACKS[-1] and not wide
    pack = FEW_ROWS if one else config.pack
    tile_m = 64 if problem.seqlen_q * pack <= 64 or wide else FEW_ROWS
    how: dict[str, Any] = dict(tile_m=tile_m, tile_n=KEYS, pack=pack, stages=1, q_stages=1)
    how |= dict(pingpong=False, q_in_regs=False, speculative=False)
    few = replace(config, **how, scheduler=EqualShares, cache=KvCache(KEYS))
    return replace(few, stages=most_stages(few))


def most_stages(config: FwdConfig) -> int:
    """That memory has room for; of one that shares the keys, beside a CTA of `Combine`, where enough are left."""
    q, kv = config.q_stages * config.tile_m * config.head_dim, config.tile_n * (config.head_dim + config.d_v)
    room, combine = SMEM_BYTES - 1024 - 2 * q, COMBINE_BYTES + 1024 if config.shares else 0
    most, beside = (min(n // (2 * kv), STAGES) for n in (room, room - combine))
    return beside if beside >= LEAST_STAGES else most


def long_queries(problem: Problem, config: FwdConfig) -> bool:
    return not config.shares and config.head_dim == config.d_v == 128 and (config.tile_m, config.tile_n) == (192, 64)


def box_of(page: int, tile_n: int) -> int:
    """Rows of a box: the largest power of two that a page and a stage are multiples of."""
    rows = gcd(page, tile_n, BOX_ROWS)
    return rows & -rows


def cached(problem: Problem, config: FwdConfig) -> FwdConfig:
    if not problem.page:
        return replace(config, cache=KvCache(config.tile_n))
    box = box_of(problem.page, config.tile_n)
    if box < LEAST_BOX:
        return gathered(config)
    found = replace(config, cache=KvCache(box, paged=True), speculative=False)
    return replace(found, speculative=config.speculative and speculates(found))


def speculates(config: FwdConfig) -> bool:
    """Whether a speculative softmax leaves registers for the boxes: ptxas spills with more of them, or two scores."""
    most = 1 if config.warpgroups > 2 else 2 if config.score.name else 8
    return config.cache_boxes <= most


def gathered(config: FwdConfig) -> FwdConfig:
    """Rows are copied to whole 128 bytes. Of V's columns each warpgroup that shares the rows has an equal part."""
    if config.warpgroups > 2 and config.head_dim_splits == 1:  # whose producer would have few registers
        config = replace(config, tile_m=128)
    sizes = (config.head_dim, 64), (config.d_v, 64 * config.head_dim_splits)
    head_dim, head_dim_v = kernel_dims(*(-(-d // n) * n for d, n in sizes))
    dims = replace(config, head_dim=head_dim, head_dim_v=head_dim_v, stages=1, cache=KvCache(1, True, True))
    most = most_stages(dims)
    return replace(dims, stages=most if dims.shares else min(most, config.stages), speculative=False)


RULES = (
    Rule(
        "few queries over a cache",
        "what counts is how fast K and V come: all CTAs share the keys, and a second kernel merges what they found",
        few_queries,
        shared,
    ),
    Rule(
        "many queries over a cache",
        "a chunk sees many more keys than it has queries: 128 rows by 128 keys keep the tensor cores busier",
        long_queries,
        lambda problem, config: replace(config, tile_m=128, tile_n=128, stages=2),
    ),
    Rule(
        "K/V cache",
        "k and v are a cache's, in boxes of as many rows as a page has together, or gathered row by row",
        lambda problem, config: problem.page is not None,
        cached,
    ),
)
