"""The kernel that splits a tile's keys, without a GPU: every block is one CTA's, which multiplies all that it loads."""

from types import SimpleNamespace

import pytest

from cute_attn.kernels import blocks as room
from cute_attn.kernels.config import FwdConfig
from cute_attn.kernels.mask import Causal, Full, block_range
from cute_attn.kernels.tile_scheduler import OneTile, Tile

ROWS = 64


def parts(monkeypatch, split, mask, seqlen_q, seqlen_k, m_block, tile_n=64):
    """Of each CTA of the cluster: the blocks that it loads, and where its masked and its whole ones begin and end."""
    split_range = room.SplitRange(FwdConfig(64, mask=mask, tile_m=64, tile_n=tile_n, scheduler=OneTile, split=split))
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    w = SimpleNamespace(problem=problem)
    found = []
    for rank in range(split):
        monkeypatch.setattr(room, "rank", lambda rank=rank: rank)
        blocks = split_range.range(Tile(m_block, 0, 0, True), problem)
        found.append((blocks, split_range.own(w, m_block * ROWS, blocks)))
    return found


SIZES = [(1, 1), (64, 40), (64, 8192), (300, 200), (100, 700), (130, 64)]


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=lambda mask: mask.name)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_every_block_is_one_cta_s(monkeypatch, split, mask, seqlen_q, seqlen_k):
    for m_block in range(-(-seqlen_q // ROWS)):
        found = parts(monkeypatch, split, mask, seqlen_q, seqlen_k, m_block)
        problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        _, _, n_whole, n_max = block_range(mask, m_block * ROWS, ROWS, 64, problem)
        loaded = [n for (first, end), _ in found for n in range(first, end)]
        assert sorted(n for n in loaded if n < n_max) == list(range(n_max)), "each once"
        assert all(n == n_max for n in loaded if n >= n_max), "beyond the last is only what the mask hides"
        for (first, end), (own_first, full_first, full_end, own_end) in found:
            assert own_first == full_first == first
            assert own_end == end > first, "it multiplies all that it loads, at least one block"
            assert first <= full_end < end, "its first block is masked"
            assert full_end <= max(n_whole, first), "only whole blocks go without a mask"
