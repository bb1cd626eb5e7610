"""PackGQA: which calls pack the query heads of a K/V head into the rows of one tile, and into which tiles.

A query of `ratio` heads becomes `pack` rows, the ratio rounded up to a power of two: a block of 64 rows then has whole
queries, and TMA leaves out the rows that no head has. Of more than 64 heads each 64 are packed for themselves.
"""

from dataclasses import replace

from ..kernels.config import PACKS, SMEM_BYTES, FwdConfig
from ..kernels.tile_scheduler import OneTile
from ..problem import Problem
from . import exceptions
from .rule import Rule

SMS = 132  # of an H200: with more tiles than that, two CTAs on an SM are better than one
SHOULD_PACK = 0.75  # of the rows that the tiles have otherwise: with more, packing is not worth a kernel of its own
SPLITS = (8, 4, 2)  # CTAs that share the keys of a block of PackGQA rows where the table has no kernel that splits them
SPLIT_KEYS = 256  # at least, for each: a merge must repay itself


def pack_of(ratio: int) -> int:
    """Rows of a query, for so many query heads to a K/V head."""
    return next((pack for pack in PACKS if ratio <= pack), PACKS[-1])


def rows_of(problem: Problem) -> Problem:
    """What a problem is to the table when its heads are packed: fewer heads, with more rows each."""
    pack = pack_of(problem.ratio)
    heads = problem.heads_kv * -(-problem.ratio // pack)
    return problem._replace(heads=heads, heads_kv=heads, seqlen_q=problem.seqlen_q * pack)


def rows_of_tiles(config: FwdConfig, problem: Problem) -> int:
    """Of all tiles, with or without a query: a tile of one busy warpgroup takes nearly as long as a full one."""
    tile = config.tile_m * config.cluster
    return problem.batch * problem.heads * -(-problem.seqlen_q // tile) * tile


def should_pack(config: FwdConfig, rows: Problem, base: FwdConfig, problem: Problem) -> bool:
    """Whether `config` on packed rows is to be preferred to `base` on the problem as it is."""
    return rows_of_tiles(config, rows) <= SHOULD_PACK * rows_of_tiles(base, problem)


def few_rows(rows: Problem, table: FwdConfig) -> bool:
    """Whether heads have 64 rows at most, and the table no tiles of 64 rows for them."""
    served = not table.varlen and table.tile_m == 64 and rows.row_blocks <= SMS
    return rows.seqlen_q <= 64 and not served


def one_block(config: FwdConfig) -> FwdConfig:
    """64 rows to a CTA; as many stages as let two CTAs share an SM, at least two where the table has as many."""
    scheduler = config.scheduler if config.varlen else OneTile
    found = replace(config, tile_m=64, scheduler=scheduler, pingpong=False, q_in_regs=False, cluster=1, q_stages=1)
    fewer = (replace(found, stages=n) for n in range(config.stages, 1, -1))
    return next((x for x in fewer if 2 * x.smem_bytes <= SMEM_BYTES), replace(found, stages=min(config.stages, 2)))


def splits(config: FwdConfig) -> list[FwdConfig]:
    """Of a kernel of one block those that share its keys, the most CTAs first."""
    if config.mask.windowed or config.row_max or config.varlen:
        return []
    return [replace(config, speculative=False, split=n) for n in SPLITS if n <= config.split_max]


def split_keys(rows: Problem, config: FwdConfig) -> FwdConfig:
    """As many CTAs to a block of rows as there are SMs and keys for."""
    most = min(SMS // rows.row_blocks, rows.seqlen_k // SPLIT_KEYS)
    return next((part for part in splits(config) if part.split <= most), config)


def packed(config: FwdConfig, ratio: int) -> FwdConfig:
    """The same tiles and schedule, of packed rows."""
    return exceptions.with_exceptions(replace(config, pack=pack_of(ratio)))


def sequences_kernels(configs: list[FwdConfig], ratio: int) -> list[FwdConfig]:
    """Every kernel that varlen sequences of few queries can reach where others reach these."""
    every = [x for config in configs for x in (config, one_block(config))]
    return list(dict.fromkeys(packed(config, ratio) for config in every))


def kernels(always: list[FwdConfig], some: list[FwdConfig], ratio: int) -> list[FwdConfig]:
    """Every kernel that packed problems can reach where others reach these; `some`: at some lengths only."""
    if ratio < 2:
        return []
    always = [config for config in always if config.packable]
    blocks = [one_block(config) for config in always]
    every = [*always, *some, *blocks, *(part for block in blocks for part in splits(block))]
    return list(dict.fromkeys(packed(config, ratio) for config in every))


FEW_ROWS = (  # on the kernel for any lengths, where the table has none for few rows
    Rule(
        "few rows",
        "what counts is how fast K and V come: as many CTAs as possible ask for them, each for 64 rows",
        lambda rows, config: rows.seqlen_q <= 64,
        lambda rows, config: one_block(config),
    ),
    Rule(
        "few rows: split keys",
        "fewer tiles than SMs: the CTAs of a cluster share a tile's keys",
        lambda rows, config: rows.seqlen_q <= 64,
        split_keys,
    ),
)
PACK = Rule(
    "PackGQA",
    "few queries would leave most of a tile empty: the heads that share a K/V head fill it",
    lambda problem, config: problem.ratio > 1,
    lambda problem, config: replace(config, pack=pack_of(problem.ratio)),
)
RULES = (*FEW_ROWS, PACK)
