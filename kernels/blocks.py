"""Which blocks of keys a tile multiplies, in which order, and which of its steps mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass

from . import mask as mask_ops
from .mask import Blocks
from .part import Part
from .state import ROWS, At, Problem, Rows, Warpgroup, rank
from .tile_scheduler import Tile


class Segment(NamedTuple):
    """Steps of one kind. Functions, so that each number is computed where it is used."""

    masked: bool  # these blocks are partial
    end: Callable  # () -> the number behind the last step's
    at: Callable  # (n, cursor) -> the n-th step's block of scores, and the next cursor
    start: int = 0  # the first step's number
    rows_seen: Callable | None = None  # () -> True: before it every row has seen a key, where this holds


class Walk(NamedTuple):
    """A warpgroup's way through its tile's blocks; `cursor` is what a step needs to know of the one before."""

    first: Callable  # () -> the first block of scores, and the cursor
    segments: list[Segment]
    before: Any = None  # () -> blocks that only later warpgroups' rows see
    after: Any = None  # () -> blocks that only earlier ones' do


class Range(Part):
    """From the last block to the first: partial ones, full ones, and under a window partial ones again."""

    reads = False  # a tile says all of itself without a look at memory
    mixed = False  # a step masks, or it does not

    @property
    def tile_type(self) -> type:
        """What the producer publishes of a tile."""
        return self.config.scheduler.tile

    def tile(self, tile: Tile, problem: Problem):
        """With what these blocks need to know of it."""
        return tile

    def of_rows(self, tile: Tile) -> tuple:
        """What a warpgroup keeps for a tile: `at.rows.blocks`."""
        return ()

    def range(self, tile: Tile, problem: Problem):
        """The blocks that this CTA multiplies for a tile, with its cluster: from, and up to but without."""
        c, rows = self.config, self.config.tile_m * self.config.cluster
        blocks = mask_ops.block_range(c.row_mask, tile.m_block // c.cluster * rows, rows, c.tile_n, problem)
        return blocks.first, blocks.end

    def order(self, tile: Tile, problem: Problem):
        """Where the n-th of those blocks lies."""
        return lambda n: n

    def own(self, w: Warpgroup, row0, blocks) -> Blocks:
        """The blocks that 64 rows need, of those that the CTA multiplies."""
        return mask_ops.block_range(self.config.row_mask, row0, ROWS, self.config.tile_n, w.problem)

    def walk(self, w: Warpgroup, rows: Rows, blocks) -> Walk:
        """A narrow window has blocks that are partial on both sides, and no full ones."""
        own = self.own(w, rows.row0, blocks)

        def down(masked, begin, end, rows_seen=None):
            """From the block below `begin` to `end`."""

            def at(n, cursor):
                return At(rows, begin() - 1 - n), cursor

            return Segment(masked, lambda: begin() - end(), at, rows_seen=rows_seen)

        def first():
            return At(rows, own.end - 1), ()

        def before():
            return blocks[1] - own.end

        if self.config.row_mask.windowed:
            full_end = cutlass.max(own.full_end, own.first)
            left_end = cutlass.min(cutlass.max(own.full_first, own.first), full_end)  # of those partial on the left
            right = down(True, lambda: own.end - 1, lambda: full_end)
            full = down(False, lambda: full_end, lambda: left_end, lambda: full_end > left_end)
            left = down(True, lambda: left_end, lambda: own.first)
            return Walk(first, [right, full, left], before, lambda: own.first - blocks[0])
        right = [down(True, lambda: own.end - 1, lambda: own.full_end)] if self.config.mask.causal else []
        full = down(False, lambda: own.full_end, lambda: own.full_first, lambda: True)
        return Walk(first, [*right, full], before)

    def is_partial(self, w: Warpgroup, at: At):
        """Whether the mask hides a key of this block from any of these 64 rows."""
        return mask_ops.is_partial(self.config.row_mask, at.rows.row0, ROWS, at.n_block, self.config.tile_n, w.problem)

    def mask(self, w: Warpgroup, S, at: At):
        """S (rows, cols): -inf where the mask hides the key."""
        mask, tile_n = self.config.row_mask, self.config.tile_n
        mask_ops.apply(mask, S, w.frag.cS, at.rows.row0, at.n_block * tile_n, w.problem)
        mask.hide(S, w.frag.cS, at, tile_n, w.problem)


class SplitRange(Range):
    """The CTAs of a cluster each take a part. One without a block of its own takes one that the mask hides."""

    def range(self, tile: Tile, problem: Problem):
        _, n_max = super().range(tile, problem)
        each = (n_max + self.config.split - 1) // self.config.split
        first = cutlass.min(rank() * each, n_max)
        return first, cutlass.max(cutlass.min(first + each, n_max), first + 1)

    def own(self, w: Warpgroup, row0, blocks) -> Blocks:
        full_end = super().own(w, row0, blocks).full_end
        return Blocks(blocks[0], blocks[0], cutlass.max(cutlass.min(full_end, blocks[1] - 1), blocks[0]), blocks[1])


class DiagonalFirst(Range):
    """Scores that fall with the distance from the diagonal, such as ALiBi's without causal: its block comes early.

    The last block, which alone may be partial, then those from the diagonal of the tile's last row to the first, then
    the others. From the last block to the first each step up to the diagonal would find larger scores and rescale O.
    And a block that lies on one side of the diagonal has a bias that is linear in the distance.
    """

    def _diagonal(self, m_block, n_blocks, problem: Problem):
        """The block of the last key that the tile's rows, with its cluster's, would see under a causal mask."""
        c = self.config
        row = (m_block // c.cluster + 1) * c.cluster * c.tile_m - 1
        return cutlass.max(cutlass.min((row + problem.seqlen_k - problem.seqlen_q) // c.tile_n, n_blocks - 1), 0)

    def order(self, tile: Tile, problem: Problem):
        """On plain ints too."""
        n_blocks = self.range(tile, problem)[1]
        last, start = n_blocks - 1, self._diagonal(tile.m_block, n_blocks, problem)

        def order(n):
            later = (n - last) >> 31  # -1; 0 for the last block
            return above(start + skipped(start, last) - (last - n), last) & later | last & ~later

        return order

    def walk(self, w: Warpgroup, rows: Rows, blocks) -> Walk:
        """With a maximum those blocks that a diagonal of these rows crosses; the others lie on one side of it."""
        c, last = self.config, blocks[1] - 1
        start = self._diagonal(rows.row0 // c.tile_m, blocks[1], w.problem)
        end = cutlass.max(cutlass.min((rows.row0 + w.problem.seqlen_k - w.problem.seqlen_q) // c.tile_n, start), 0)
        crossed = start - end + skipped(start, last)  # without the last block, whose step looks for a maximum anyway
        n_block = start + skipped(start, last)

        def at(n, before):
            n_block = above(before - 1, last)
            return At(rows, n_block), n_block

        one_side = Segment(False, lambda: last - crossed, at, rows_seen=lambda: True)
        return Walk(lambda: (At(rows, last), n_block), [Segment(True, lambda: crossed, at), one_side])


def skipped(start, last):
    """1 where the last block, which comes first, is not passed again."""
    return cutlass.min(last - start, 1)


def above(n_block, last):
    """Below the first block those follow that are below the last."""
    return n_block + (last & (n_block >> 31))
