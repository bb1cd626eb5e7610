"""Scores that fall with the distance from the diagonal, such as ALiBi's without causal: its block comes early.

From the last block to the first each step up to the diagonal would find larger scores, raise its rows' offsets, and
rescale O. And a block that lies on one side of the diagonal has a bias that is linear in the distance.
"""

import cutlass
from cutlass import cute

from .flash_fwd_sm90 import At, Problem, Rows, Warpgroup, release_if
from .tile_scheduler import Tile


class FromDiagonal:
    """Goes before a kernel's class: the last block, which alone the mask may cut, then those from the diagonal of the
    tile's last row to the first, then the others.
    """

    def _diagonal(self, m_block, n_blocks, problem: Problem):
        """The block of the last key that the tile's rows, with its cluster's, would see under a causal mask."""
        c = self.config
        row = (m_block // c.cluster + 1) * c.cluster * c.tile_m - 1
        return cutlass.max(cutlass.min((row + problem.seqlen_k - problem.seqlen_q) // c.tile_n, n_blocks - 1), 0)

    def _order(self, tile: Tile, problem: Problem):
        """On plain ints too."""
        n_blocks = self._blocks(tile, problem)[1]
        last, start = n_blocks - 1, self._diagonal(tile.m_block, n_blocks, problem)

        def order(n):
            later = (n - last) >> 31  # -1; 0 for the last block
            return above(start + skipped(start, last) - (last - n), last) & later | last & ~later

        return order

    @cute.jit
    def _tile(self, w: Warpgroup, rows: Rows, blocks, q_state, kv_state):
        """With a maximum those blocks that a diagonal of these rows crosses; the others lie on one side of it."""
        c, f, last = self.config, w.frag, blocks[1] - 1
        start = self._diagonal(rows.row0 // c.tile_m, blocks[1], w.problem)
        end = cutlass.max(cutlass.min((rows.row0 + w.problem.seqlen_k - w.problem.seqlen_q) // c.tile_n, start), 0)
        crossed = start - end + skipped(start, last)  # without the last block, whose step looks for a maximum anyway
        n_block = start + skipped(start, last)
        self._begin_rows(w, q_state)
        kv_state = self._first(w, q_state, kv_state, At(rows, last))
        for _ in cutlass.range(crossed, unroll=1):
            n_block = above(n_block - 1, last)
            kv_state = self._step(w, q_state, kv_state, At(rows, n_block), True)
        self._settle(f)
        for _ in cutlass.range(last - crossed, unroll=1):
            n_block = above(n_block - 1, last)
            kv_state = self._step(w, q_state, kv_state, At(rows, n_block), False)
        release_if(not c.q_in_regs, w.pipes.q, q_state)
        self._last(w, kv_state)
        return kv_state


def skipped(start, last):
    """1 where the last block, which comes first, is not passed again."""
    return cutlass.min(last - start, 1)


def above(n_block, last):
    """Below the first block those follow that are below the last."""
    return n_block + (last & (n_block >> 31))
