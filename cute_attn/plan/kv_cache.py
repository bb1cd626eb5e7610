"""Over a K/V cache: how its rows come, and whether all CTAs share the keys."""

from dataclasses import replace
from math import gcd
from typing import Any

from ..kernels.config import PACKS, FwdConfig, KvCache
from ..kernels.grid_split import EqualShares
from ..kernels.mask import Causal, CausalOfEach, Full
from ..problem import Problem
from .candidates import kernel_dims
from .pack_gqa import SMS
from .rule import Rule

FEW_ROWS = 128  # of a K/V head and sequence: with more, tiles enough read the same keys
WIDEST = 192  # columns of tiles of so many rows: with more the registers do not suffice
KEYS, SHORT_KEYS = 64, 128  # of a stage, where all CTAs share them; of up to so many columns
SHORT, LONG_KEYS = 64, 4096  # if a sequence has room for so many
GATHERED_STAGES = 4  # of rows that threads copy
STAGES = 2  # that suffice where all CTAs share the keys: more are not faster, and slower over long sequences
Q_IN_REGS = 128  # columns that leave registers for Q, beside O
STAGES_OF_WHOLE = 4  # where a tile has two MMA warpgroups' heads of one query
SOME_TILES = 32  # that share all SMs: with fewer of them each has many parts, which more CTAs merge sooner than one
TWO_CTAS = 128  # columns at most: more leave them too few stages
MANY_SEQUENCES = 16  # whose tiles have 128 heads of a query: keys of fewer are better shared by CTAs of 64 heads
SOME_SEQUENCES, MANY_KEYS = 4, 1 << 16  # or fewer sequences, if all of them have room for so many keys
BOX_ROWS = 128  # at most, of a page
LEAST_BOX = 8  # of smaller ones TMA loads fewer bytes a second than threads copy


def few_queries(problem: Problem, config: FwdConfig) -> bool:
    """Whether what counts is how fast K and V come."""
    rows = problem.seqlen_q * config.pack
    return 0 < rows <= FEW_ROWS and config.head_dim_splits == 1 and not (config.row_max or config.dropout)


def shared(problem: Problem, config: FwdConfig) -> FwdConfig:
    """A CTA to an SM, and its memory for K and V. A tile has all rows, and one query's are no more than it has."""
    wide, whole = config.widest > WIDEST, whole_queries(problem, config)
    pack = FEW_ROWS if whole else config.pack
    tile_m = 64 if problem.seqlen_q * pack <= 64 or wide else FEW_ROWS
    how: dict[str, Any] = dict(tile_m=tile_m, tile_n=KEYS, pack=pack, stages=1, q_stages=1)
    how |= dict(pingpong=whole, q_in_regs=whole and config.widest <= Q_IN_REGS, speculative=False)
    few = replace(config, **how, scheduler=EqualShares, cache=KvCache(KEYS))
    short = config.widest <= SHORT and problem.seqlen_k >= LONG_KEYS
    if short and tile_m == 64 and tiles(problem, few) < SMS and plain(few):
        few = replace(few, tile_n=SHORT_KEYS, cache=KvCache(SHORT_KEYS))
    return replace(few, stages=min(most_stages(few), STAGES_OF_WHOLE if whole else STAGES))


def plain(config: FwdConfig) -> bool:
    """Whether neither scores nor the mask take registers."""
    few = isinstance(config.mask, (Full, Causal, CausalOfEach)) and not config.mask.windowed
    return few and not config.score.name


def whole_queries(problem: Problem, config: FwdConfig) -> bool:
    """Whether a tile has 128 heads of a query. CTAs of 64 of them read all keys twice."""
    many_heads = problem.ratio > config.pack == PACKS[-1] and problem.seqlen_q == 1 and config.widest <= WIDEST
    many_keys = problem.batch >= SOME_SEQUENCES and problem.batch * problem.seqlen_k >= MANY_KEYS
    return many_heads and (problem.batch >= MANY_SEQUENCES or many_keys)


def most_stages(config: FwdConfig) -> int:
    """That memory has room for."""
    q, kv = config.q_stages * config.tile_m * config.head_dim, config.tile_n * (config.head_dim + config.d_v)
    return (config.smem_most - 1024 - 2 * q) // (2 * kv)


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
    stages = GATHERED_STAGES if dims.shares else config.stages
    return replace(dims, stages=min(most_stages(dims), stages), speculative=False)


def tiles(problem: Problem, config: FwdConfig) -> int:
    """Of all sequences, if none has more rows than a tile."""
    return problem.batch * config.packs(problem.heads, problem.heads_kv)


def some_tiles(problem: Problem, config: FwdConfig) -> bool:
    most = SOME_TILES if config.pack <= PACKS[-1] else MANY_SEQUENCES
    return config.shares and tiles(problem, config) > most


def enough_tiles(problem: Problem, config: FwdConfig) -> bool:
    """For two CTAs of an SM, of 168 registers a thread: scores that take more would spill."""
    few = config.row_blocks == 1 and config.widest <= TWO_CTAS and config.producer_warps < 4
    return config.fixup and plain(config) and few and tiles(problem, config) >= SMS


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
    Rule(
        "tiles for many CTAs",
        "few CTAs share each of them, and the last one merges their parts sooner than a second kernel begins",
        some_tiles,
        lambda problem, config: replace(config, fixup=True),
    ),
    Rule(
        "tiles for all SMs",
        "two CTAs of an SM: one loads while the other is at a tile's end",
        enough_tiles,
        lambda problem, config: replace(config, ctas=2),
    ),
)
