"""What each feature of a call makes of the plain call's kernel: rules, in the order in which they apply."""

from dataclasses import replace
from typing import Any

from ..kernels.config import SMEM_BYTES, FwdConfig
from ..kernels.mask import Mask, UserMask, Window
from ..kernels.score import Alibi, Plain, Softcap, UserScore
from ..kernels.tile_scheduler import DynamicLongest
from ..kernels.varlen_scheduler import VarlenLongest, VarlenScheduler
from ..problem import FeatureKey, Problem
from .candidates import HEAD_DIMS, ends_differ, unsized
from .rule import Rule, Step, follow

# registers_held from which two and three MMA warpgroups have none left for a feature that needs some throughout
FULL = {2: 184, 3: 120}


def with_features(config: FwdConfig, key: FeatureKey) -> FwdConfig:
    """Of a kernel the one with these features; of a causal one where there is a window."""
    problem = unsized(config.head_dim, config.dtype, config.layout, config.mask.causal, key, config.head_dim_v)
    return follow(RULES, problem, [Step("", "", config)])[-1].config


def constant_time(config: FwdConfig) -> FwdConfig:
    """The same tiles and schedule, with a softmax of which no branch depends on a score."""
    score = replace(config.score, exact=True) if isinstance(config.score, Softcap) else config.score
    return replace(config, speculative=False, constant_time=True, score=score)


def sparse_rows(problem: Problem, config: FwdConfig) -> FwdConfig:
    """A tile has the rows of a sparse block of queries, or a part of them. 192 rows are 64 keys wide."""
    blocks, dropout = problem.features.sparse, problem.features.dropout
    assert blocks is not None
    has_192 = 64 < config.widest <= 128
    sizes = (64,) if config.head_dim_splits > 1 else (128, 192, 64) if has_192 else (128, 64)
    tile_m = next(m for m in sizes if blocks.block_m % m == 0)
    tile_n = min(64, config.tile_n) if config.widest > HEAD_DIMS[-1] else 64
    same = config.head_dim, config.dtype, config.layout, config.mask
    return FwdConfig(*same, tile_m, tile_n, head_dim_v=config.head_dim_v, sparse=blocks, dropout=dropout)


def sparse_keys(problem: Problem, config: FwdConfig) -> FwdConfig:
    """Blocks as wide as the sparse ones where 128 rows or fewer leave registers for it.

    The scheduler is dynamic, since tiles differ in work. A second tile of Q is loaded ahead where it fits, since they
    are short.
    """
    assert config.sparse is not None
    wide = config.widest <= 128 and config.tile_m <= 128 and config.sparse.block_n % 128 == 0
    config = replace(config, tile_n=128 if wide else config.tile_n)
    q_stages = 2 if config.smem_bytes + 2 * config.head_dim * config.tile_m <= SMEM_BYTES else 1
    return replace(config, scheduler=DynamicLongest, pingpong=config.warpgroups > 1, q_stages=q_stages)


def mask_of(problem: Problem) -> Any:
    """Of the features' keys, one that is a mask."""
    return next((value for _, value in problem.features if isinstance(value, Mask)), None)


def score_of(key: FeatureKey, config: FwdConfig) -> Plain | Softcap | Alibi | UserScore:
    """A kernel's score with these features."""
    capped = Softcap() if key.softcap else Plain()
    biased = Alibi(capped, config.mask.causal and not config.mask.of_tile) if key.alibi else capped
    return UserScore(key.score_mod, biased) if key.score_mod else biased


def scores(problem: Problem) -> bool:
    """Whether scores are changed before their softmax."""
    key = problem.features
    return bool(key.softcap or key.alibi or key.score_mod)


def fewer_keys(problem: Problem, config: FwdConfig) -> bool:
    """Whether three warpgroups hold too much for what becomes of scores, or for a user's function."""
    held, key = config.registers_held, problem.features
    wide = scores(problem) and config.tile_n > 64 and held >= 120
    return config.warpgroups == 3 and bool(wide or (held >= 128 and (key.score_mod or key.mask_mod)))


def with_score(problem: Problem, config: FwdConfig) -> FwdConfig:
    score = score_of(problem.features, config)
    return replace(config, score=score, speculative=not problem.features.mask_mod and speculates(config, score))


def speculates(config: FwdConfig, score: Plain | Softcap | Alibi | UserScore) -> bool:
    """Whether the softmax is speculative with this score: three warpgroups gain by it, 5 to 20 % at d128."""
    if config.sparse:
        return False
    return score.quick and (config.registers_held <= 112 if config.warpgroups == 3 else config.speculative)


def with_mask_mod(problem: Problem, config: FwdConfig) -> FwdConfig:
    assert problem.features.mask_mod is not None and not isinstance(config.mask, UserMask)
    return replace(config, mask=UserMask(problem.features.mask_mod, config.mask), speculative=False)


def with_dropout(problem: Problem, config: FwdConfig) -> FwdConfig:
    return replace(config, dropout=True, speculative=False, tile_n=config.tile_n // 32 * 32)


def full(config: FwdConfig) -> bool:
    """Whether two or three warpgroups hold too much for row_max or dropout."""
    return config.registers_held >= FULL.get(config.warpgroups, 256)


def fit_registers(config: FwdConfig) -> FwdConfig:
    """Narrower blocks, or fewer rows where they are narrow already."""
    return replace(config, tile_n=64) if config.tile_n > 64 else replace(config, tile_m=128)


def for_varlen(problem: Problem, config: FwdConfig) -> FwdConfig:
    scheduler = VarlenLongest if ends_differ(problem) else VarlenScheduler
    return replace(config, layout="thd", scheduler=scheduler, cluster=1)


LISTS = (
    Rule(
        "block-sparse indices: rows",
        "a tile has the rows of a sparse block or a part of them: narrower ones would read K and V more often",
        lambda problem, config: problem.features.sparse,
        sparse_rows,
    ),
    Rule(
        "block-sparse indices: keys and schedule",
        "blocks as wide as the sparse ones where registers allow it; a dynamic scheduler, since tiles differ in work",
        lambda problem, config: problem.features.sparse,
        sparse_keys,
    ),
)
WINDOW = Rule(
    "window",
    "its tiles are short: CTAs of a cluster would share too little",
    lambda problem, config: problem.features.window,
    lambda problem, config: replace(config, mask=Window(), cluster=1),
)
OWN_MASK = Rule(
    "a mask of its own",
    "a feature's key may be the mask itself; where it ends, tiles differ in length as those of a window do",
    lambda problem, config: mask_of(problem),
    lambda problem, config: replace(config, mask=mask_of(problem), cluster=1),
)
SCORES = (
    Rule(
        "scores: no cluster",
        "with slower softmaxes the CTAs of a cluster with a dynamic scheduler wait for each other too long",
        lambda problem, config: scores(problem) and not config.sparse and config.scheduler.dynamic,
        lambda problem, config: replace(config, cluster=1),
    ),
    Rule(
        "scores and mask_mod: fit registers",
        "three warpgroups have 160 registers a thread: narrower blocks leave some for the score or the function",
        fewer_keys,
        lambda problem, config: replace(config, tile_n=config.tile_n - 16),
    ),
    Rule(
        "scores: speculative softmax",
        "where three warpgroups have the registers, or the plain kernel has it, and the score is cheap to repeat",
        lambda problem, config: scores(problem),
        with_score,
    ),
    Rule(
        "scores: three stages",
        "a speculative softmax holds a block of K until its step is certain",
        lambda problem, config: config.score.name and config.speculative,
        lambda problem, config: replace(config, stages=max(config.stages, 3)),
    ),
    Rule(
        "mask_mod",
        "any block may be masked, and the speculative softmax is for those that are not",
        lambda problem, config: problem.features.mask_mod,
        with_mask_mod,
    ),
    Rule(
        "sinks",
        "a logit a head joins the denominator",
        lambda problem, config: problem.features.sinks,
        lambda problem, config: replace(config, sinks=True),
    ),
)
ROW_MAX = (
    Rule(
        "row_max",
        "each score is looked at once, before its exponential: no speculative softmax",
        lambda problem, config: problem.features.row_max,
        lambda problem, config: replace(config, row_max=True, speculative=False),
    ),
    Rule(
        "row_max: fit registers",
        "the rows' maxima stay in registers: warpgroups that hold much already get smaller tiles",
        lambda problem, config: problem.features.row_max and full(config),
        lambda problem, config: fit_registers(config),
    ),
)
DROPOUT = (
    Rule(
        "dropout",
        "random bits are for 32 keys of a row at a time, and no block is repeated",
        lambda problem, config: problem.features.dropout,
        with_dropout,
    ),
    Rule(
        "dropout: fit registers",
        "the random generator takes registers: warpgroups that hold much already get smaller tiles",
        lambda problem, config: problem.features.dropout and full(config),
        lambda problem, config: fit_registers(config),
    ),
)
CONSTANT_TIME = Rule(
    "constant time",
    "no branch may depend on a score: O is rescaled in each step, and nothing is speculative",
    lambda problem, config: problem.constant_time,
    lambda problem, config: constant_time(config),
)
VARLEN = Rule(
    "varlen",
    "lengths are on the device, where a scheduler reads them; the tiles of a cluster would be of two sequences",
    lambda problem, config: problem.layout == "thd",
    for_varlen,
)
RULES = (*LISTS, WINDOW, OWN_MASK, *SCORES, *ROW_MAX, *DROPOUT, CONSTANT_TIME, VARLEN)
