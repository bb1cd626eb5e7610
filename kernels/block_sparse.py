"""Block sparsity: a tile multiplies the blocks of keys that its indices name, and no others."""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, Uint32, cute

from . import mask as mask_ops
from .blocks import Range, Segment, Walk
from .mask import UserMask
from .state import ROWS, At, Problem, Rows, Warpgroup
from .tile_scheduler import Tile

INT_MAX = 2**31 - 1


class SparseTile(NamedTuple):
    """A tile, and how many blocks of keys its indices name: read once, by the producer."""

    m_block: Int32
    head: Int32
    batch: Int32
    valid: Boolean
    partial: Int32
    full: Int32


class Counts(NamedTuple):
    partial: Int32
    full: Int32


class BlockIndices(NamedTuple):
    """Of one block of queries: how many blocks of keys it needs, partial ones first, then full ones."""

    partial: Int32
    partial_index: cute.Tensor  # (blocks,)
    full: Int32
    full_index: cute.Tensor  # (blocks,)


class BlockSparse(Range):
    """Blocks are numbered by their places among the indices; `_place` says where they lie.

    Arguments: counts (b, h, m_blocks) and indices (b, h, m_blocks, n_blocks), int32: of partial blocks, some of
    which mask_mod may hide, and, where the config says so, of full ones.
    """

    reads = True
    mixed = True
    tile_type = SparseTile

    @property
    def _each(self) -> int:
        """Blocks of the kernel to one that the indices name."""
        return self.config.sparse.block_n // self.config.tile_n

    def tile(self, tile: Tile, problem: Problem) -> SparseTile:
        return SparseTile(*tile, *self._counts(tile, problem))

    @cute.jit
    def _counts(self, tile: Tile, problem: Problem):
        """How many partial and full blocks; of each no more than its indices have places."""
        partial, full = Int32(0), Int32(0)
        counts, indices = problem.args.block_indices[::2], problem.args.block_indices[1::2]
        if tile.valid:
            at = tile.batch, tile.head, self._m_block_of(tile.m_block * self.config.tile_m)
            partial = cutlass.max(cutlass.min(counts[0][at], indices[0].shape[3]), 0)
            if cutlass.const_expr(self.config.sparse.has_full):
                full = cutlass.max(cutlass.min(counts[1][at], indices[1].shape[3]), 0)
        return partial, full

    def _m_block_of(self, row0):
        """Which block of queries a row is in."""
        return row0 // self.config.sparse.block_m

    def of_rows(self, tile: SparseTile) -> Counts:
        return Counts(tile.partial, tile.full)

    def _indices_of(self, row0, tile, counts, problem: Problem) -> BlockIndices:
        """Of a row. tile: its sequence and head."""
        indices = problem.args.block_indices[1::2]
        partial_index, *more = [index[tile.batch, tile.head, self._m_block_of(row0), None] for index in indices]
        return BlockIndices(counts.partial, partial_index, counts.full, *(more or [partial_index]))

    def range(self, tile: SparseTile, problem: Problem):
        """A tile without any takes one beyond the last key, which the mask hides."""
        return 0, cutlass.max((tile.partial + tile.full) * self._each, 1)

    def order(self, tile: SparseTile, problem: Problem):
        own = self._indices_of(tile.m_block * self.config.tile_m, tile, tile, problem)
        return lambda n: self._place(own, n, problem)[0]

    @cute.jit
    def _place(self, own: BlockIndices, n: Int32, problem: Problem):
        """Which block of keys the n-th is, counted down to 0, and whether it is partial."""
        i = (own.partial + own.full) - 1 - n // self._each
        n_block, partial = Int32(0), i < own.partial
        if i < 0:
            n_block = (problem.seqlen_k + self.config.tile_n - 1) // self.config.tile_n
        elif partial:
            n_block = self._inside(own.partial_index[i]) * self._each + n % self._each
        else:
            n_block = self._inside(own.full_index[i - own.partial]) * self._each + n % self._each
        return n_block, partial

    def _inside(self, block: Int32) -> Int32:
        """The block, or for one below 0 or so far out that its keys overflow, one behind every last key."""
        return Int32(cutlass.min(Uint32(block), Uint32(INT_MAX // self.config.sparse.block_n - 1)))

    def walk(self, w: Warpgroup, rows: Rows, blocks) -> Walk:
        """Each step asks whether its block is partial. Where a block lies is read a step ahead."""
        own = self._indices_of(rows.row0, rows, rows.blocks, w.problem)

        def first():
            at = At(rows, *self._place(own, blocks[1] - 1, w.problem))
            return at, self._place(own, cutlass.max(blocks[1] - 2, 0), w.problem)

        def at(n, place):
            return At(rows, *place), self._place(own, cutlass.max(blocks[1] - 2 - n, 0), w.problem)

        return Walk(first, [Segment(True, lambda: blocks[1], at, start=1)])

    def is_partial(self, w: Warpgroup, at: At):
        """Each block asks for itself, in `mask`."""
        return True

    @cute.jit
    def mask(self, w: Warpgroup, S, at: At):
        """In partial blocks. Its base hides keys of full ones too."""
        c, f = self.config, w.frag
        base = c.mask.base if isinstance(c.mask, UserMask) else c.mask
        if mask_ops.is_partial(base, at.rows.row0, ROWS, at.n_block, c.tile_n, w.problem):
            mask_ops.apply(base, S, f.cS, at.rows.row0, at.n_block * c.tile_n, w.problem)
        if at.partial:
            c.mask.hide(S, f.cS, at, c.tile_n, w.problem)
