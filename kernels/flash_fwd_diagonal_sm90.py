"""Scores that fall with the distance from the diagonal, such as ALiBi's without causal: its block comes first.

From the last block to the first each step up to the diagonal would find larger scores, raise its rows' offsets, and
rescale O.
"""

import cutlass
from cutlass import cute

from .flash_fwd_sm90 import At, Problem, Rows, Warpgroup, release_if
from .tile_scheduler import Tile


class FromDiagonal:
    """Goes before a kernel's class: down from the tile's last row's diagonal to the first block, then from the last."""

    def _diagonal(self, m_block, n_blocks, problem: Problem):
        """The block of the last key that the tile's rows, with its cluster's, would see under a causal mask."""
        c = self.config
        row = (m_block // c.cluster + 1) * c.cluster * c.tile_m - 1
        return cutlass.max(cutlass.min((row + problem.seqlen_k - problem.seqlen_q) // c.tile_n, n_blocks - 1), 0)

    def _order(self, tile: Tile, problem: Problem):
        return self._downwards(tile.m_block, self._blocks(tile, problem)[1], problem)

    def _downwards(self, m_block, n_blocks, problem: Problem):
        """Where the n-th block lies, n being counted down to 0: n_blocks more where it would be below the first."""
        above = n_blocks - 1 - self._diagonal(m_block, n_blocks, problem)
        return lambda n: n - above + (n_blocks & ((n - above) >> 31))

    @cute.jit
    def _tile(self, w: Warpgroup, rows: Rows, blocks, q_state, kv_state):
        """The last block, which alone the mask may cut, may come at any step."""
        c, f, n_blocks = self.config, w.frag, blocks[1]
        order = self._downwards(rows.row0 // c.tile_m, n_blocks, w.problem)
        self._begin_rows(w, q_state)
        kv_state = self._first(w, q_state, kv_state, At(rows, order(n_blocks - 1)))
        self._settle(f)
        for n in cutlass.range(1, n_blocks, unroll=1):
            kv_state = self._step(w, q_state, kv_state, At(rows, order(n_blocks - 1 - n)), True)
        release_if(not c.q_in_regs, w.pipes.q, q_state)
        self._last(w, kv_state)
        return kv_state

    @cute.jit
    def _masked_softmax(self, w: Warpgroup, S, at: At):
        if self._cut(w, at):
            self._mask(w, S, at)
        self._exponentials(w, S)
