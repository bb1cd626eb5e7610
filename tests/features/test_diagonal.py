"""The kernel of scores that fall with the distance from the diagonal: each block once, and the diagonal's early."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cute_attn import plan
from cute_attn.kernels.blocks import DiagonalFirst, above, skipped
from cute_attn.kernels.config import FwdConfig, SparseBlocks
from cute_attn.kernels.mask import Causal
from cute_attn.kernels.parts import parts_of
from cute_attn.kernels.score import Alibi, Softcap, UserScore
from cute_attn.kernels.tile_scheduler import Tile
from cute_attn.plan import HEAD_DIMS, FeatureKey
from cute_attn.tools import inspect
from tests.support.nightly import sample

SIZES = [(1, 1), (64, 40), (64, 8192), (300, 200), (100, 700), (1000, 130), (1500, 1500)]
ALIBI = FwdConfig(64, tile_m=128, tile_n=64, score=Alibi())


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_each_block_comes_once_and_the_diagonal_s_early(seqlen_q, seqlen_k, cluster):
    config = replace(ALIBI, cluster=cluster)
    blocks = parts_of(config).blocks
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    for m_block in range(-(-seqlen_q // (config.tile_m * cluster)) * cluster):
        first, n_blocks = blocks.range(Tile(m_block, 0, 0, True), problem)
        order = blocks.order(Tile(m_block, 0, 0, True), problem)
        found = [order(n) for n in reversed(range(n_blocks))]
        assert first == 0 and sorted(found) == list(range(n_blocks))
        last_row = (m_block // cluster + 1) * cluster * config.tile_m - 1
        key = min(max(last_row + seqlen_k - seqlen_q, 0), seqlen_k - 1)
        start = key // config.tile_n  # of the last row, where a cluster's two CTAs take the same blocks
        downwards = [*range(start, -1, -1), *range(n_blocks - 1, start, -1)]
        assert found == list(dict.fromkeys([n_blocks - 1, *downwards]))
        last, multiplied = n_blocks - 1, [n_blocks - 1]
        n_block = start + skipped(start, last)
        for _ in range(last):
            n_block = above(n_block - 1, last)
            multiplied.append(n_block)
        assert found == multiplied, "what is loaded is what is multiplied"


def test_which_kernels_begin_there():
    """Those whose scores fall on both sides, where a step may do without a rescale, and blocks are in order."""
    begins = [ALIBI, replace(ALIBI, score=Alibi(Softcap())), replace(ALIBI, score=UserScore(None, Alibi()))]
    others = [
        *(replace(ALIBI, score=score) for score in (Alibi(causal=True), Softcap(), UserScore(None))),
        *(replace(ALIBI, **how) for how in (dict(constant_time=True), dict(sparse=SparseBlocks(128, 128, True)))),
        replace(ALIBI, mask=Causal()),
        plan.with_features(ALIBI, FeatureKey(window=True, alibi=True)),
    ]
    for config in (*begins, *others):
        found = isinstance(parts_of(config).blocks, DiagonalFirst)
        assert found == config.diagonal_first == (config in begins)


@pytest.mark.machine_code
@pytest.mark.parametrize("head_dim", sample(3, HEAD_DIMS))
def test_only_the_first_steps_look_for_maxima_and_mask(head_dim):
    """Those of the blocks that the diagonal crosses; the steady loop neither, where the bias is linear."""
    config = plan.with_features(plan.config(head_dim, "bf16", "bhsd", False), FeatureKey(alibi=True))
    report = inspect.report(config)
    assert config.diagonal_first and not report.problems()
    crossed, steady = report.loops
    assert crossed.maxima >= config.tile_n // 2 <= crossed.selects
    assert steady.maxima == 0 and steady.selects <= 4 and steady.instructions < crossed.instructions
