"""Problem -> FwdConfig: which kernel runs. What was measured is in `tuned.json`. Needs no GPU."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from . import packing, tuned
from .kernels.config import DTYPES, LAYOUTS, SMEM_BYTES, FwdConfig, SparseBlocks
from .kernels.mask import Causal, Full, Mask, UserMask, Window
from .kernels.packed_scheduler import Packed, PackedLongest
from .kernels.score import Alibi, Plain, Score, Softcap, UserScore
from .kernels.tile_scheduler import DynamicLongest, StaticTiles
from .problem import PLAIN as PLAIN
from .problem import FeatureKey as FeatureKey
from .problem import Problem as Problem

HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)  # of the tables' kernels; D runs on the next one up
EQUAL_HEAD_DIMS = tuple((d, 0) for d in HEAD_DIMS)
EVERY_HEAD_DIM = (*HEAD_DIMS, 320, 384, 448, 512)  # and those of kernels that are in no table


MODIFIED = {
    False: [FeatureKey(alibi=True)],
    True: [FeatureKey(softcap=True), FeatureKey(softcap=True, alibi=True, sinks=True)],
}


@lru_cache(maxsize=4096)
def plan(problem: Problem, gpu: str | None = None) -> FwdConfig:
    """The kernel for a problem, by the table of the GPU of that name; without a name, or a table, by the H200's.

    A head dim that has no kernel of its own runs on the next larger one, and so does each of a pair. Where few queries
    leave most of a tile empty, the heads that share a K/V head are packed into it.
    """
    found = _by_table(problem, gpu)
    if problem.ratio < 2 or problem.empty or not found.packable:
        return found
    rows = packing.rows_of(problem)
    other = _by_table(rows, gpu)
    if rows.seqlen_q <= 64:
        other = packing.few_rows(other, _always(problem, gpu), rows)
    return packing.packed(other, problem.ratio) if packing.worth(other, rows, found, problem) else found


def _by_table(problem: Problem, gpu: str | None) -> FwdConfig:
    """The kernel for as many heads, and rows of each, as the problem has."""
    if problem.features != PLAIN:
        return _always(problem, gpu)
    rows = _rows(*kernel_dims(problem.head_dim, problem.head_dim_v), problem.dtype, problem.causal, gpu)
    row = next(row for row in rows if row.serves(problem.seqlen_q, problem.seqlen_k, problem.row_blocks))
    if problem.constant_time and row.config.split == 1:
        return _always(problem, gpu)
    found = replace(row.config, dtype=problem.dtype, layout=problem.layout)
    return constant_time(found) if problem.constant_time else found


def _always(problem: Problem, gpu: str | None) -> FwdConfig:
    """The kernel of the problem's kind that serves any lengths."""
    causal = problem.features.window or problem.causal
    head_dim, head_dim_v = kernel_dims(problem.head_dim, problem.head_dim_v)
    base = config(head_dim, problem.dtype, problem.layout, causal, gpu, head_dim_v)
    base = modified(base, problem.features)
    return constant_time(base) if problem.constant_time else base


def kernel_dims(head_dim: int, head_dim_v: int = 0) -> tuple[int, int]:
    """The (head_dim, head_dim_v) of a kernel for these."""
    d, d_v = (next(n for n in EVERY_HEAD_DIM if x <= n) for x in (head_dim, head_dim_v or head_dim))
    return d, 0 if d == d_v else d_v


def config(
    head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None = None, head_dim_v: int = 0
) -> FwdConfig:
    """The kernel of these head dims and a mask that serves wherever no other row of the table does."""
    return _configs(head_dim, head_dim_v, dtype, layout, causal, gpu)[-1]


def constant_time(config: FwdConfig) -> FwdConfig:
    """The same tiles and schedule, with a softmax of which no branch depends on a score."""
    score = replace(config.score, exact=True) if isinstance(config.score, Softcap) else config.score
    return replace(config, redo=False, constant_time=True, score=score)


def modified(config: FwdConfig, features: FeatureKey) -> FwdConfig:
    """Of a kernel the one with modifiers; of a causal one where there is a window."""
    config = sparse(config, features.sparse, features.dropout) if features.sparse else config
    config = windowed(config) if features.window else config
    causal = config.mask.causal
    capped = Softcap() if features.softcap else Plain()
    biased = Alibi(capped, causal) if features.alibi else capped
    score = UserScore(features.score_mod, biased) if features.score_mod else biased
    base = config.mask
    if score.name and not config.sparse:  # slower softmaxes: CTAs of a cluster that draws wait for each other too long
        config = replace(config, cluster=1 if config.scheduler.draws else config.cluster)
    mask = UserMask(features.mask_mod, base) if features.mask_mod and not isinstance(base, UserMask) else base
    config = replace(config, tile_n=keys_of_a_block(config, score, mask))
    redo = redoes(config, score, mask)
    stages = max(config.stages, 3) if score.name and redo else config.stages  # K is held until a step is certain
    config = replace(config, score=score, mask=mask, sinks=features.sinks, redo=redo, stages=stages)
    config = with_maxima(config) if features.row_max else config
    return with_dropout(config) if features.dropout else config


def keys_of_a_block(config: FwdConfig, score: Score, mask: Mask) -> int:
    """The kernel's own, or fewer where with this score or mask ptxas would spill, 4 to 76 bytes."""
    n, held = config.tile_n, config.registers_held
    if (config.widest, config.tile_m) == (64, 256):
        much = score.name and (mask.windowed if mask.everywhere else mask.causal and redoes(config, score, mask))
        return min(n, 48) if much else n
    if config.warpgroups < 3 or held < 120:
        much = config.warpgroups == 3 and held >= 112 and mask.windowed and isinstance(score, Softcap)
        return min(n, 48) if much else n
    much = isinstance(score, UserScore) or mask.everywhere or (score.name and mask.windowed)  # at d160
    return n - 16 if (score.name and n > 64) or (held >= 128 and much) else n


def redoes(config: FwdConfig, score: Score, mask: Mask) -> bool:
    """Whether a kernel questions its steps afterwards when it has this score and this mask.

    Three warpgroups gain by it, 5 to 20 % at d128. Four have registers for softcap only, and three that hold more none:
    ptxas spills, 8 to 88 bytes.
    """
    if mask.everywhere or config.sparse:
        return False
    if not score.name:
        return config.redo
    if config.warpgroups == 3:
        return score.quick and config.registers_held <= 112
    return config.redo and isinstance(score, Softcap)


def with_dropout(config: FwdConfig) -> FwdConfig:
    """Of a kernel the one that leaves out entries of P, whose random bits are for 32 keys at a time."""
    return roomy(replace(config, dropout=True, redo=False, tile_n=config.tile_n // 32 * 32))


def with_maxima(config: FwdConfig) -> FwdConfig:
    """Of a kernel the one that writes its rows' maxima too."""
    return roomy(replace(config, row_max=True, redo=False))


def roomy(config: FwdConfig) -> FwdConfig:
    """Where more is held than a kernel was tuned for: two or three warpgroups that hold much already would spill."""
    if config.registers_held < {2: 184, 3: 120}.get(config.warpgroups, 256):
        return config
    return replace(config, tile_n=64) if config.tile_n > 64 else replace(config, tile_m=128)


def sparse(config: FwdConfig, blocks: SparseBlocks, dropout: bool) -> FwdConfig:
    """Of a kernel the one for lists of blocks: tiles of their size or a part of it, drawn, since their work differs.

    192 rows are 64 keys wide, and with dropout ptxas spills 8 bytes of them.
    """
    has_192 = 64 < config.widest <= 128 and not dropout
    sizes = (64,) if config.parts_v > 1 else (128, 192, 64) if has_192 else (128, 64)
    tile_m = next(m for m in sizes if blocks.block_m % m == 0)
    most = 128 if config.widest <= 128 and tile_m <= 128 else 64
    most = config.tile_n if config.widest > HEAD_DIMS[-1] else most
    tile_n = next(n for n in (most, 64) if blocks.block_n % n == 0)
    kind = config.head_dim, config.dtype, config.layout, config.mask
    plain = FwdConfig(*kind, tile_m, tile_n, head_dim_v=config.head_dim_v)
    q_stages = 2 if plain.smem_bytes + 2 * plain.head_dim * tile_m <= SMEM_BYTES else 1  # tiles are short
    pingpong = plain.warpgroups > 1
    return replace(plain, scheduler=DynamicLongest, pingpong=pingpong, q_stages=q_stages, sparse=blocks)


def windowed(config: FwdConfig) -> FwdConfig:
    """Of a causal kernel the one for a window. Its tiles are short: CTAs of a cluster would share too little.

    With redo ptxas spills at d64, 12 bytes.
    """
    return replace(config, mask=Window(), cluster=1, redo=config.redo and config.widest != 64)


def varlen(
    head_dim: int,
    dtype: str,
    causal: bool,
    features: FeatureKey = PLAIN,
    gpu: str | None = None,
    head_dim_v: int = 0,
    ratio: int = 1,
    max_seqlen_q: int | None = None,
) -> FwdConfig:
    """The kernel for packed sequences: the tiles of the one that serves wherever no other row does, and no clusters.

    Where no sequence has more than a few queries, the heads that share a K/V head are packed into a tile.
    """
    found = _varlen(head_dim, dtype, causal, features, gpu, head_dim_v)
    if ratio < 2 or not max_seqlen_q or not found.packable:
        return found
    return packing.of_sequences(found, ratio, max_seqlen_q)


@lru_cache(maxsize=256)
def _varlen(
    head_dim: int, dtype: str, causal: bool, features: FeatureKey, gpu: str | None, head_dim_v: int
) -> FwdConfig:
    """With wider blocks and a mask_mod ptxas spills at d96 and d192, 4 to 8 bytes."""
    head_dim, head_dim_v = kernel_dims(head_dim, head_dim_v)
    longest = causal or features.window
    base = modified(config(head_dim, dtype, LAYOUTS[0], longest, gpu, head_dim_v), features)
    tile_n = min(base.tile_n, 64) if features.mask_mod else base.tile_n
    return replace(base, layout="thd", scheduler=PackedLongest if longest else Packed, cluster=1, tile_n=tile_n)


class Kind(NamedTuple):
    """What a caller chooses, beside the sizes: they may take one kernel or another of a kind."""

    head_dim: int
    dtype: str
    layout: str
    mask: str
    constant_time: bool
    score: str
    sinks: bool
    head_dim_v: int
    dropout: bool
    row_max: bool


def kind(config: FwdConfig) -> Kind:
    c = config
    return Kind(
        *(c.head_dim, c.dtype, c.layout, c.mask.name, c.constant_time),
        *(c.score.name, c.sinks, c.head_dim_v, c.dropout, c.row_max),
    )


def shipped(
    gpu: str | None = None, ratio: int = 1, dims: Iterable[tuple[int, int]] = EQUAL_HEAD_DIMS
) -> list[FwdConfig]:
    """The kernels of each kind, of some lengths only, windowed, constant-time; and with other modifiers one of each.

    With a ratio, of query heads to a K/V head, those that pack them too, for few queries. Modifiers combine, and so do
    head dims, of which `dims` names others: any other kernel is compiled by its first call.
    """
    every = product(dims, DTYPES, LAYOUTS, (False, True))
    kinds = [_configs(d, d_v, dtype, layout, causal, gpu) for (d, d_v), dtype, layout, causal in every]
    always, some = [configs[-1] for configs in kinds], [c for configs in kinds for c in configs[:-1]]
    windows = [windowed(config) for config in always if config.mask.causal]
    plain = [c for c in always if (c.dtype, c.layout) == ("bf16", "bhsd")]
    others = [modified(config, features) for config in plain for features in MODIFIED[config.mask.causal]]
    others += map(constant_time, [*always, *(config for config in some if config.split > 1), *windows])
    packs = packing.kernels([*always, *windows, *others], some, ratio)
    return list(dict.fromkeys([*always, *some, *windows, *others, *packs]))


def shipped_varlen(gpu: str | None = None, ratio: int = 1) -> list[FwdConfig]:
    """Every kernel that some call with packed sequences can reach; with a ratio those that pack heads too."""
    masks = (False, PLAIN), (True, PLAIN), (False, FeatureKey(window=True))
    found = [varlen(d, dtype, *mask, gpu) for d, dtype, mask in product(HEAD_DIMS, DTYPES, masks)]
    return found if ratio < 2 else found + packing.sequences_kernels(found, ratio)


def _configs(head_dim: int, head_dim_v: int, dtype: str, layout: str, causal: bool, gpu: str | None) -> list[FwdConfig]:
    """Of the table's rows, in the order of asking."""
    rows = _rows(head_dim, head_dim_v, dtype, causal, gpu)
    return [replace(row.config, dtype=dtype, layout=layout) for row in rows]


def _rows(head_dim: int, head_dim_v: int, dtype: str, causal: bool, gpu: str | None) -> tuple[tuned.Row, ...]:
    """Of the table; of a pair the rows of the wider one, whose tiles have room for both.

    With redo ptxas spills at 96 beside 128, 4 bytes.
    """
    widest = max(head_dim, head_dim_v)
    if widest > HEAD_DIMS[-1]:
        return (tuned.Row(large(head_dim, head_dim_v, causal)),)
    rows = tuned.table(gpu).classes[widest, causal, dtype]
    return tuple(row._replace(config=_pair(row.config, head_dim, head_dim_v)) for row in rows) if head_dim_v else rows


def _pair(config: FwdConfig, head_dim: int, head_dim_v: int) -> FwdConfig:
    redo = config.redo and head_dim_v < head_dim
    return replace(config, head_dim=head_dim, head_dim_v=head_dim_v, redo=redo)


def large(head_dim: int, head_dim_v: int, causal: bool) -> FwdConfig:
    """Head dims beyond the tables': 64 rows where two warpgroups share O's columns, and blocks of 64 keys or of 32."""
    d_v = head_dim_v or head_dim
    tile_m = 64 if d_v > 256 else 128
    room = SMEM_BYTES - 1024 - 2 * head_dim * tile_m
    tile_n = 64 if room >= 64 * 4 * (head_dim + d_v) else 32  # of two stages
    mask, scheduler = (Causal(), DynamicLongest) if causal else (Full(), StaticTiles)
    return FwdConfig(head_dim, mask=mask, tile_m=tile_m, tile_n=tile_n, scheduler=scheduler, head_dim_v=head_dim_v)
