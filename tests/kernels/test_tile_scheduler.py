"""Schedulers on plain integers: every tile once, none twice, and the order that each promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cute_attn.kernels.tile_scheduler import DynamicLongest, Grid, StaticTiles, tiles

GRIDS = st.builds(Grid, st.integers(1, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 12))
SCHEDULERS = pytest.mark.parametrize("scheduler", [StaticTiles, DynamicLongest])


@SCHEDULERS
@given(grid=GRIDS, num_sms=st.integers(1, 140))
def test_every_tile_once(scheduler, grid, num_sms):
    ctas = scheduler.grid(grid, num_sms)
    assert 1 <= ctas <= min(num_sms, tiles(grid))
    # a static or a dynamic scheduler: either way the indices from 0 on come one by one
    decoded = [scheduler.decode(i, grid) for i in range(tiles(grid) + ctas)]
    valid = [(t.m_block, t.head, t.batch) for t in decoded if t.valid]
    assert all(t.valid == (i < tiles(grid)) for i, t in enumerate(decoded))
    want = [(m, h, b) for b in range(grid.batch) for h in range(grid.heads) for m in range(grid.m_blocks)]
    assert sorted(valid) == sorted(want)


@given(grid=GRIDS)
def test_longest_first_within_a_group_of_heads(grid):
    order = [DynamicLongest.decode(i, grid) for i in range(tiles(grid))]
    groups = [(t.batch * grid.heads + t.head) // grid.group for t in order]
    assert groups == sorted(groups)
    for group in set(groups):
        blocks = [t.m_block for t, g in zip(order, groups, strict=True) if g == group]
        assert blocks == sorted(blocks, reverse=True)


@given(grid=GRIDS)
def test_head_by_head_keeps_a_head_together(grid):
    order = [StaticTiles.decode(i, grid) for i in range(tiles(grid))]
    assert [(t.batch, t.head, t.m_block) for t in order] == sorted((t.batch, t.head, t.m_block) for t in order)
