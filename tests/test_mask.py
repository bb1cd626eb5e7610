"""Masks on plain integers, against brute force: which blocks, and which entries."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cute_attn.kernels.mask import Causal, Full, block_range


def sees(mask, row, key, seqlen_q, seqlen_k):
    """By the words of flash_fwd's docstring, not by the mask's own limit."""
    return key < seqlen_k and (not mask.causal or key <= row + seqlen_k - seqlen_q)


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
@given(
    seqlen_q=st.integers(1, 300),
    seqlen_k=st.integers(1, 300),
    m_block=st.integers(0, 4),
    rows=st.sampled_from([64, 128, 192]),
    tile_n=st.sampled_from([16, 80, 96, 128]),
)
def test_block_range(mask, seqlen_q, seqlen_k, m_block, rows, tile_n):
    row0 = m_block * rows
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    n_max, n_whole = block_range(mask, row0, rows, tile_n, problem)
    mine = range(row0, row0 + rows)
    blocks = [range(n * tile_n, (n + 1) * tile_n) for n in range(-(-seqlen_k // tile_n))]
    # rows beyond the last query see what the last one would, or more; what they compute is never stored
    needed = [
        n for n, keys in enumerate(blocks) if any(sees(mask, r, c, seqlen_q, seqlen_k) for r in mine for c in keys)
    ]
    whole = [
        n for n, keys in enumerate(blocks) if all(sees(mask, r, c, seqlen_q, seqlen_k) for r in mine for c in keys)
    ]
    assert needed == list(range(len(needed)))
    assert n_max == max(len(needed), 1)
    assert whole == list(range(len(whole)))
    assert n_whole == min(len(whole), n_max - 1)


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
@given(seqlen_q=st.integers(1, 60), seqlen_k=st.integers(1, 60))
def test_limit(mask, seqlen_q, seqlen_k):
    for row in range(seqlen_q):
        limit = mask.limit(row, seqlen_q, seqlen_k)
        assert [c < limit for c in range(seqlen_k)] == [sees(mask, row, c, seqlen_q, seqlen_k) for c in range(seqlen_k)]
