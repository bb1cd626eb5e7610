"""Problem -> FwdConfig: which kernel runs, and from which measurement. Pure Python: no GPU, no torch."""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from .kernels.config import FwdConfig
from .kernels.mask import Causal, Full
from .kernels.tile_scheduler import DynamicLongest, StaticTiles

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

    @property
    def empty(self) -> bool:
        """Nothing to multiply: no output, or no keys."""
        return 0 in (self.batch, self.heads, self.seqlen_q, self.seqlen_k)

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.seqlen_q

    def flops(self) -> float:
        """4 B H Sq Sk D: two products' multiplications and additions; halved for causal (FlashAttention's count)."""
        return 4.0 * self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.head_dim / (2 if self.causal else 1)


class Choice(NamedTuple):
    """One row of the tuned table: FwdConfig fields for a head dim, and those that only full or causal takes."""

    both: dict
    full: dict
    causal: dict


TUNED_ON = "NVIDIA H200, 2026-11-20"
TUNED = {
    32: Choice(dict(tile_m=192), {}, {}),
    64: Choice(dict(tile_m=192), {}, {}),
    96: Choice({}, dict(q_in_regs=True, cluster=2), {}),
    128: Choice(dict(q_in_regs=True), dict(cluster=2), {}),
    160: Choice(dict(tile_n=96), dict(cluster=2), {}),
    192: Choice(dict(tile_n=96), dict(cluster=2), {}),
    224: Choice({}, dict(tile_n=80, cluster=2), dict(tile_n=96)),
    256: Choice(dict(tile_n=80), dict(cluster=2), {}),
}


@lru_cache(maxsize=4096)
def plan(problem: Problem) -> FwdConfig:
    """The kernel for a problem; a head dim that has none of its own runs on the next larger one."""
    head_dim = next(d for d in HEAD_DIMS if problem.head_dim <= d)
    tuned = config(head_dim, problem.dtype, problem.layout, problem.causal)
    return uneven(tuned) if _uneven(tuned, problem.seqlen_q) else tuned


def config(head_dim: int, dtype: str, layout: str, causal: bool) -> FwdConfig:
    """The table's row for a head dim and a mask."""
    choice = TUNED[head_dim]
    if causal:
        fields = dict(mask=Causal(), scheduler=DynamicLongest) | choice.both | choice.causal
    else:
        fields = dict(mask=Full(), scheduler=StaticTiles) | choice.both | choice.full
    return FwdConfig(head_dim, dtype, layout, **fields)


def kind(config: FwdConfig) -> tuple[int, str, str, bool]:
    """What a caller chooses, beside the sizes: they may take one kernel or another of a kind."""
    return config.head_dim, config.dtype, config.layout, config.mask.causal


def uneven(tuned: FwdConfig) -> FwdConfig:
    """The same for tiles of uneven length: drawn when a CTA is free. H200, d64 full: +7, 5, 4 % at S 512, 1k, 4k."""
    return replace(tuned, scheduler=DynamicLongest)


def _uneven(tuned: FwdConfig, seqlen_q: int) -> bool:
    """One tile of a few has warpgroups without rows, so that it is done sooner."""
    tiles = -(-seqlen_q // tuned.tile_m)
    return (
        tuned.cluster == 1 and not tuned.scheduler.draws and 1 < tiles <= 24 and tiles * tuned.tile_m - seqlen_q >= 64
    )


def shipped() -> list[FwdConfig]:
    """Every kernel that some problem can reach."""
    every = product(HEAD_DIMS, ("bf16", "fp16"), ("bhsd", "bshd"), (False, True))
    tuned = [config(*one) for one in every]
    return tuned + [uneven(c) for c in tuned if any(_uneven(c, seqlen_q) for seqlen_q in range(1, 8 * c.tile_m))]
