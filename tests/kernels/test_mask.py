"""Masks on plain integers, against brute force: which blocks, and which entries."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cute_attn.kernels.mask import Causal, Full, Window, block_range, is_partial
from tests.support.masks import sees

MASKS = pytest.mark.parametrize("mask", [Full(), Causal(), Window()], ids=lambda mask: mask.name)
SIDES = st.one_of(st.integers(0, 400), st.just(1 << 30))
WINDOWS = st.tuples(SIDES, SIDES)


@MASKS
@given(
    seqlen_q=st.integers(1, 300),
    seqlen_k=st.integers(1, 300),
    window=WINDOWS,
    m_block=st.integers(0, 4),
    rows=st.sampled_from([64, 128, 192]),
    tile_n=st.sampled_from([16, 80, 96, 128]),
)
def test_block_range(mask, seqlen_q, seqlen_k, window, m_block, rows, tile_n):
    row0 = m_block * rows
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k, args=SimpleNamespace(mask=window))
    found = block_range(mask, row0, rows, tile_n, problem)
    mine = range(row0, row0 + rows)
    blocks = [range(n * tile_n, (n + 1) * tile_n) for n in range(-(-seqlen_k // tile_n))]
    # rows beyond the last query see what the last one would, or later keys; what they compute is never stored
    needed = [n for n, keys in enumerate(blocks) if any(sees(mask, r, c, problem) for r in mine for c in keys)]
    whole = [n for n, keys in enumerate(blocks) if all(sees(mask, r, c, problem) for r in mine for c in keys)]
    assert 0 <= found.first < found.end
    assert set(needed) <= set(range(found.first, found.end))
    if not mask.windowed:
        assert found.first == found.full_first == 0 and found.end == max(len(needed), 1)
    elif needed and row0 + rows <= seqlen_q:
        assert (found.first, found.end) == (needed[0], needed[-1] + 1), "no block that nobody sees"
    assert found.full_end < found.end
    assert list(range(found.full_first, found.full_end)) == [n for n in whole if n < found.end - 1]
    for n in range(found.first, found.end):
        if not is_partial(mask, row0, rows, n, tile_n, problem):
            assert n in whole


@MASKS
@given(seqlen_q=st.integers(1, 60), seqlen_k=st.integers(1, 60), window=WINDOWS)
def test_limits(mask, seqlen_q, seqlen_k, window):
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k, args=SimpleNamespace(mask=window))
    limits = [(mask.first(row, problem), mask.limit(row, problem)) for row in range(seqlen_q)]
    assert limits == sorted(limits), "neither falls"
    for row, (first, limit) in enumerate(limits):
        for key in range(seqlen_k):
            assert (first <= key < limit) == sees(mask, row, key, problem)
