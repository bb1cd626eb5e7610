"""Block sparsity: a tile multiplies the blocks of keys that its lists name, and no others."""

from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Int32, Uint32, cute

from . import mask as mask_ops
from .flash_fwd_sm90 import ROWS, Problem, Warpgroup, release_if
from .mask import UserMask
from .tile_scheduler import Tile

INT_MAX = 2**31 - 1


class Listed(NamedTuple):
    """A tile, and how many blocks of keys its lists name: read once, by the producer."""

    m_block: Int32
    head: Int32
    batch: Int32
    valid: Boolean
    cut: Int32
    whole: Int32


class ListedRows(NamedTuple):
    """`Rows`, and the tile's numbers of blocks."""

    row0: Int32
    head: Int32
    batch: Int32
    score: tuple
    draws: tuple
    cut: Int32
    whole: Int32


class Lists(NamedTuple):
    """Of one block of queries: how many blocks of keys it needs, those that the mask may cut first, then whole ones."""

    cut: Int32
    cut_index: cute.Tensor  # (blocks,)
    whole: Int32
    whole_index: cute.Tensor  # (blocks,)


class SparseAt(NamedTuple):
    """A block of scores, as `At`, and whether the mask may cut it."""

    rows: ListedRows
    n_block: Int32
    cut: Boolean


class Sparse:
    """Goes before a kernel's class. Blocks are numbered by their places in the lists; `_place` says where they lie.

    problem.others ends with counts (b, h, m_blocks) and indices (b, h, m_blocks, n_blocks), int32: of the blocks that
    the mask may cut, and, where the config says so, of the whole ones.
    """

    kind_of_tile = Listed

    def _begin(self, problem: Problem):
        self._wait_for_stream()  # before the counts, which may be its doing
        index = self._first_index()
        return index, self._decode(index, problem)

    def _decode(self, index, problem: Problem) -> Listed:
        tile = super()._decode(index, problem)
        return Listed(*tile, *self._counts(tile, problem))

    @cute.jit
    def _counts(self, tile: Tile, problem: Problem):
        """Blocks that the mask may cut, and whole ones; of each no more than its list has places."""
        sparse, cut, whole = self.config.sparse, Int32(0), Int32(0)
        counts: Any = problem.others[-sparse.arguments :: 2]
        indices: Any = problem.others[-sparse.arguments + 1 :: 2]
        if tile.valid:
            at = tile.batch, tile.head, self._list_of(tile.m_block * self.config.tile_m)
            cut = cutlass.max(cutlass.min(counts[0][at], indices[0].shape[3]), 0)
            if cutlass.const_expr(sparse.whole):
                whole = cutlass.max(cutlass.min(counts[1][at], indices[1].shape[3]), 0)
        return cut, whole

    def _list_of(self, row0):
        """Which block of queries a row is in."""
        return row0 // self.config.sparse.block_m

    def _lists(self, row0, of, problem: Problem) -> Lists:
        """Of a row, by what is known of its tile."""
        sparse = self.config.sparse
        indices: Any = problem.others[-sparse.arguments + 1 :: 2]
        cut_index, *more = [index[of.batch, of.head, self._list_of(row0), None] for index in indices]
        return Lists(of.cut, cut_index, of.whole, *(more or [cut_index]))

    def _rows(self, tile: Listed, row0, problem: Problem) -> ListedRows:
        return ListedRows(*super()._rows(tile, row0, problem), tile.cut, tile.whole)

    def _blocks(self, tile: Listed, problem: Problem):
        """A tile without any takes one beyond the last key, which the mask hides."""
        return 0, cutlass.max((tile.cut + tile.whole) * self._each, 1)

    @property
    def _each(self) -> int:
        """Blocks of the kernel to one of the lists."""
        return self.config.sparse.block_n // self.config.tile_n

    def _order(self, tile: Listed, problem: Problem):
        lists = self._lists(tile.m_block * self.config.tile_m, tile, problem)
        return lambda n: self._place(lists, n, problem)[0]

    @cute.jit
    def _place(self, lists: Lists, n: Int32, problem: Problem):
        """Which block of keys the n-th is, counted down to 0, and whether the mask may cut it."""
        i = (lists.cut + lists.whole) - 1 - n // self._each
        n_block, cut = Int32(0), i < lists.cut
        if i < 0:
            n_block = (problem.seqlen_k + self.config.tile_n - 1) // self.config.tile_n
        elif cut:
            n_block = self._inside(lists.cut_index[i]) * self._each + n % self._each
        else:
            n_block = self._inside(lists.whole_index[i - lists.cut]) * self._each + n % self._each
        return n_block, cut

    def _inside(self, block: Int32) -> Int32:
        """The block, or for one below 0 or so far out that its keys overflow, one behind every last key."""
        return Int32(cutlass.min(Uint32(block), Uint32(INT_MAX // self.config.sparse.block_n - 1)))

    @cute.jit
    def _tile(self, w: Warpgroup, rows: ListedRows, blocks, q_state, kv_state):
        """Each step asks whether the mask cuts; offsets are such from the start that any step may be either.

        Where a block lies is read a step ahead.
        """
        lists = self._lists(rows.row0, rows, w.problem)
        self._begin_rows(w, q_state)
        at = SparseAt(rows, *self._place(lists, blocks[1] - 1, w.problem))
        n_block, cut = self._place(lists, cutlass.max(blocks[1] - 2, 0), w.problem)
        kv_state = self._first(w, q_state, kv_state, at)
        for n in cutlass.range(1, blocks[1], unroll=1):
            at = SparseAt(rows, n_block, cut)
            n_block, cut = self._place(lists, cutlass.max(blocks[1] - 2 - n, 0), w.problem)
            kv_state = self._step(w, q_state, kv_state, at, True)
        release_if(not self.config.q_in_regs, w.pipes.q, q_state)
        self._last(w, kv_state)
        return kv_state

    @cute.jit
    def _begin_softmax(self, w: Warpgroup, S, at: SparseAt):
        self._mask(w, S, at)
        w.frag.softmax.step(S, self.slack)
        w.frag.softmax.settle()

    def _masked_softmax(self, w: Warpgroup, S, at: SparseAt):
        self._mask(w, S, at)
        self._exponentials(w, S)

    @cute.jit
    def _mask(self, w: Warpgroup, S, at: SparseAt):
        """Where it may cut: by its base in blocks that the lists call whole too."""
        c, f = self.config, w.frag
        base = c.mask.base if isinstance(c.mask, UserMask) else c.mask
        if mask_ops.cuts(base, at.rows.row0, ROWS, at.n_block, c.tile_n, w.problem):
            mask_ops.apply(base, S, f.cS, at.rows.row0, at.n_block * c.tile_n, w.problem)
        if at.cut:
            c.mask.hide(S, f.cS, at, c.tile_n, w.problem)
