"""Problem -> FwdConfig: which kernel runs. What was measured is in `tuned.json`. Pure Python: no GPU, no torch."""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from . import packing, tuned
from .kernels.config import DTYPES, LAYOUTS, FwdConfig, SparseBlocks
from .kernels.mask import UserMask, Window
from .kernels.packed_scheduler import Packed, PackedLongest
from .kernels.score import Alibi, Plain, Softcap, UserScore
from .kernels.tile_scheduler import DynamicLongest
from .kernels.user_mod import UserMod

HEAD_DIM_MAX = 256
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)  # of the kernels; D runs on the next one up


class Kinds(NamedTuple):
    """Which modifiers a call has, whatever their values."""

    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    score_mod: UserMod | None = None
    mask_mod: UserMod | None = None
    sparse: SparseBlocks | None = None
    row_max: bool = False
    dropout: bool = False


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
    kinds: Kinds = Kinds()

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


MODIFIED = {False: [Kinds(alibi=True)], True: [Kinds(softcap=True), Kinds(softcap=True, alibi=True, sinks=True)]}


@lru_cache(maxsize=4096)
def plan(problem: Problem, gpu: str | None = None) -> FwdConfig:
    """The kernel for a problem, by the table of the GPU of that name; without a name, or a table, by the H200's.

    A head dim that has no kernel of its own runs on the next larger one. Where few queries leave most of a tile empty,
    the heads that share a K/V head are packed into it.
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
    if problem.constant_time or problem.kinds != Kinds():
        return _always(problem, gpu)
    rows = tuned.table(gpu).classes[kernel_head_dim(problem), problem.causal, problem.dtype]
    row = next(row for row in rows if row.serves(problem.seqlen_q, problem.seqlen_k, problem.row_blocks))
    return replace(row.config, dtype=problem.dtype, layout=problem.layout)


def _always(problem: Problem, gpu: str | None) -> FwdConfig:
    """The kernel of the problem's kind that serves any lengths."""
    causal = problem.kinds.window or problem.causal
    base = config(kernel_head_dim(problem), problem.dtype, problem.layout, causal, gpu)
    base = modified(base, problem.kinds)
    return constant_time(base) if problem.constant_time else base


def kernel_head_dim(problem: Problem) -> int:
    return next(d for d in HEAD_DIMS if problem.head_dim <= d)


def config(head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None = None) -> FwdConfig:
    """The kernel of a head dim and a mask that serves wherever no other row of the table does."""
    return _configs(head_dim, dtype, layout, causal, gpu)[-1]


def constant_time(config: FwdConfig) -> FwdConfig:
    """The same tiles and schedule, with a softmax of which no branch depends on a score."""
    score = replace(config.score, exact=True) if isinstance(config.score, Softcap) else config.score
    return replace(config, redo=False, constant_time=True, score=score)


def modified(config: FwdConfig, kinds: Kinds) -> FwdConfig:
    """Of a kernel the one with modifiers; of a causal one where there is a window."""
    config = sparse(config, kinds.sparse) if kinds.sparse else config
    config = windowed(config) if kinds.window else config
    causal = config.mask.causal
    capped = Softcap() if kinds.softcap else Plain()
    biased = Alibi(capped, causal) if kinds.alibi else capped
    score = UserScore(kinds.score_mod, biased) if kinds.score_mod else biased
    base = config.mask
    if score.name and not config.sparse:  # slower softmaxes: CTAs of a cluster that draws wait for each other too long
        config = replace(config, cluster=1 if config.scheduler.draws else config.cluster)
    mask = UserMask(kinds.mask_mod, base) if kinds.mask_mod and not isinstance(base, UserMask) else base
    redo = config.redo and not score.name and not mask.everywhere
    config = replace(config, score=score, mask=mask, sinks=kinds.sinks, redo=redo)
    config = with_maxima(config) if kinds.row_max else config
    return with_dropout(config) if kinds.dropout else config


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


def sparse(config: FwdConfig, blocks: SparseBlocks) -> FwdConfig:
    """Of a kernel the one for lists of blocks: tiles of their size or a part of it, drawn, since their work differs."""
    tile_m, widest = next(m for m in (128, 64) if blocks.block_m % m == 0), 128 if config.head_dim <= 128 else 64
    tile_n = next(n for n in (widest, 64) if blocks.block_n % n == 0)
    plain = FwdConfig(config.head_dim, config.dtype, config.layout, config.mask, tile_m, tile_n)
    return replace(plain, scheduler=DynamicLongest, pingpong=tile_m == 128, sparse=blocks)


def windowed(config: FwdConfig) -> FwdConfig:
    """Of a causal kernel the one for a window. Its tiles are short: CTAs of a cluster would share too little.

    With redo ptxas spills at d64, 12 bytes.
    """
    return replace(config, mask=Window(), cluster=1, redo=config.redo and config.head_dim != 64)


@lru_cache(maxsize=256)
def varlen(
    head_dim: int, dtype: str, causal: bool, window: bool, gpu: str | None = None, row_max: bool = False
) -> FwdConfig:
    """The kernel for packed sequences: the tiles of the one that serves wherever no other row does, and no clusters."""
    base = config(next(d for d in HEAD_DIMS if head_dim <= d), dtype, LAYOUTS[0], causal or window, gpu)
    base = windowed(base) if window else base
    scheduler = PackedLongest if causal or window else Packed
    base = with_maxima(base) if row_max else base
    return replace(base, layout="thd", scheduler=scheduler, cluster=1)


def kind(config: FwdConfig) -> tuple:
    """What a caller chooses, beside the sizes: they may take one kernel or another of a kind."""
    c = config
    return c.head_dim, c.dtype, c.layout, c.mask.name, c.constant_time, c.score.name, c.sinks, c.dropout, c.row_max


def shipped(gpu: str | None = None, ratio: int = 1) -> list[FwdConfig]:
    """The kernels of each kind, of some lengths only, windowed, constant-time; and with other modifiers one of each.

    With a ratio, of query heads to a K/V head, those that pack them too, for few queries. Modifiers combine: any other
    kernel is compiled by its first call.
    """
    kinds = [_configs(*one, gpu) for one in product(HEAD_DIMS, DTYPES, LAYOUTS, (False, True))]
    always, some = [configs[-1] for configs in kinds], [c for configs in kinds for c in configs[:-1]]
    windows = [windowed(config) for config in always if config.mask.causal]
    plain = [c for c in always if (c.dtype, c.layout) == ("bf16", "bhsd")]
    others = [modified(config, kinds) for config in plain for kinds in MODIFIED[config.mask.causal]]
    others += map(constant_time, [*always, *windows])
    packs = packing.kernels([*always, *windows, *others], some, ratio)
    return list(dict.fromkeys([*always, *some, *windows, *others, *packs]))


def shipped_varlen(gpu: str | None = None) -> list[FwdConfig]:
    """Every kernel that some call with packed sequences can reach."""
    masks = (False, False), (True, False), (False, True)
    return [varlen(d, dtype, *mask, gpu) for d, dtype, mask in product(HEAD_DIMS, DTYPES, masks)]


def _configs(head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None) -> list[FwdConfig]:
    """Of the table's rows, in the order of asking."""
    rows = tuned.table(gpu).classes[head_dim, causal, dtype]
    return [replace(row.config, dtype=dtype, layout=layout) for row in rows]
