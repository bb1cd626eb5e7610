"""Few queries: all CTAs share the keys of all sequences, and a second kernel merges what several found of one tile.

A row of CTAs, one for each head, takes a run of key blocks, all runs equal to within a block: Stream-K (Osama et al.,
arXiv:2301.03598) over the sequences' blocks. The heads of a row walk through the same keys at once, since a cache has
them side by side. Of a run's tiles at most the two at its ends are shared with other rows. A CTA writes what it has of
these to the workspace, in float32, and `Combine` adds the parts up in the keys' order: results do not depend on time.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from . import mask as mask_ops
from .blocks import Range
from .cluster_split import NoSplit
from .kv_cache import Cached
from .layout import acc_mn
from .mask import Blocks
from .pack_gqa import OneHead
from .ping_pong import WARPGROUP
from .seqlen import int32_at
from .state import ROWS, Gmem, Problem, Warpgroup
from .tile_scheduler import Static
from .varlen_scheduler import LANES, running_sum

FIELDS = 16  # int32s of a tile in the workspace


class SharedTile(NamedTuple):
    """A tile, and which of its blocks the CTA takes."""

    m_block: Int32
    head: Int32
    batch: Int32
    valid: Boolean
    start_q: Int32
    seqlen_q: Int32
    start_k: Int32
    seqlen_k: Int32
    first: Int32  # block
    end: Int32
    first_row: Int32  # of CTAs that share it
    last_row: Int32


class Lane(NamedTuple):
    """What a lane knows of its sequence."""

    start_q: Any
    seqlen_q: Any
    seqlen_k: Any
    first: Any  # block that any query sees
    each: Any  # blocks of a tile: without keys it has one, which the mask hides
    blocks: Any  # of all tiles of a head


class Run(NamedTuple):
    """Of a row of CTAs: from `block` up to `stop`, in the list of all blocks; and where it is."""

    block: Any
    stop: Any
    total: Any
    rows: Any  # of CTAs that have a run
    group: Any  # the first of the 32 sequences that the warp looks at
    before: Any  # blocks before theirs
    own: Lane  # a lane's


class EqualShares(Static):
    """`min_blocks` to a run at least, or fewer CTAs than there are have one."""

    varlen, shares, tile, name, min_blocks = True, True, SharedTile, "shares", 2


def begin_of(row, total, rows):
    """The first block of a row's run."""
    return total // rows * row + cutlass.min(row, total % rows)


def rows_with_runs(total, rows, min_blocks):
    """Fewer than there are where runs would be shorter than that."""
    return cutlass.max(cutlass.min(rows, total // min_blocks), 1)


def row_of(block, total, rows):
    """The row whose run has this block."""
    each, longer = total // rows, total % rows  # so many rows have one more
    shorter = cutlass.max(block - longer * (each + 1), 0) // cutlass.max(each, 1)
    return cutlass.min(block // (each + 1), longer) + shorter


class Share(NamedTuple):
    """What a row of CTAs takes of a tile: the tile's number in its sequence, blocks, and the rows that share it."""

    tile: Any
    first: Any
    end: Any
    first_row: Any
    last_row: Any


def share_of(block, stop, begin, each, total, rows) -> Share:
    """Of the tile that `block` is in, by a run up to `stop`; `each` blocks to a tile, from `begin` on."""
    tile, first = (block - begin) // each, (block - begin) % each
    start = block - first
    end = cutlass.min(first + stop - block, each)
    return Share(tile, first, end, row_of(start, total, rows), row_of(start + each - 1, total, rows))


def rows_of_ctas(heads, room):
    """How many rows the GPU has room for."""
    return cutlass.max(room // heads, 1)


class SharedCached(Cached):
    """The tiles of a CTA are those of its run."""

    def clusters(self, grid, room):
        return rows_of_ctas(grid.heads, room * self.config.ctas_per_sm) * grid.heads

    def first(self, problem: Problem) -> Run:
        """Run, like all of these, by one warp; the lengths must be there."""
        rows = cute.arch.grid_dim()[0] // problem.grid.heads
        return self._first(cute.arch.block_idx()[0] // problem.grid.heads, rows, problem)

    @cute.jit
    def _first(self, row: Int32, rows: Int32, problem: Problem) -> Run:
        own = self._lane(Int32(0), problem)
        total = own.blocks
        for i in cutlass.range(1, (problem.grid.batch + LANES - 1) // LANES, unroll=1):
            total = total + self._lane(i * LANES, problem).blocks
        total = cute.arch.warp_redux_sync(total, "add")
        rows = rows_with_runs(total, rows, self.config.scheduler.min_blocks)
        run = (begin_of(cutlass.min(row + i, rows), total, rows) for i in range(2))
        return self._seek(Run(*run, total, rows, Int32(0), Int32(0), own), problem)

    @cute.jit
    def _lane(self, group: Int32, problem: Problem) -> Lane:
        c, g = self.config, problem.grid
        b = group + cute.arch.lane_idx()
        sequence = cutlass.min(b, g.batch - 1)
        q, k = g.q.of(sequence), g.k.of(sequence)
        rows = q.length * c.pack
        own = self.with_slack(problem._replace(seqlen_q=q.length, seqlen_k=k.length), sequence)
        seen = mask_ops.block_range(c.row_mask, Int32(0), cutlass.max(rows, 1), c.tile_n, own)
        each = Int32(seen.end - seen.first)
        blocks = (rows + c.tile_m - 1) // c.tile_m * each if b < g.batch else Int32(0)
        return Lane(q.start, q.length, k.length, Int32(seen.first), each, blocks)

    @cute.jit
    def _seek(self, run: Run, problem: Problem) -> Run:
        """Forward to the 32 sequences of its next block."""
        group, before, own = run.group, run.before, run.own
        after = before + cute.arch.warp_redux_sync(own.blocks, "add")
        while (run.block >= after) & (after < run.total):
            before, group = after, group + LANES
            own = self._lane(group, problem)
            after = before + cute.arch.warp_redux_sync(own.blocks, "add")
        return run._replace(group=group, before=before, own=own)

    @cute.jit
    def decode(self, run: Run, problem: Problem) -> SharedTile:
        ends = run.before + running_sum(run.own.blocks)
        who = cutlass.min(cute.arch.popc(cute.arch.vote_ballot_sync(ends <= run.block)), LANES - 1)
        begin = cute.arch.shuffle_sync(ends - run.own.blocks, who)
        start_q, seqlen_q, seqlen_k, low, each = [cute.arch.shuffle_sync(x, who) for x in run.own[:5]]
        m_block, first, end, *rows = share_of(run.block, run.stop, begin, each, run.total, run.rows)
        head, valid = cute.arch.block_idx()[0] % problem.grid.heads, run.block < run.stop
        lengths = start_q, seqlen_q, Int32(0), seqlen_k
        return SharedTile(m_block, head, run.group + who, valid, *lengths, low + first, low + end, *rows)

    @cute.jit
    def upcoming(self, run: Run, gmem: Gmem, problem: Problem) -> Run:
        tile = self.decode(run, problem)
        return self._seek(run._replace(block=run.block + (tile.end - tile.first)), problem)


class SharedRange(Range):
    def range(self, tile: SharedTile, problem: Problem):
        return tile.first, tile.end

    def own(self, w: Warpgroup, row0, blocks) -> Blocks:
        """Where none of the CTA's blocks is one, the mask hides the one that is multiplied."""
        own = super().own(w, row0, blocks)
        end = cutlass.max(cutlass.min(own.end, blocks[1]), blocks[0] + 1)
        first = cutlass.min(cutlass.max(own.first, blocks[0]), end - 1)
        full_end = cutlass.max(cutlass.min(own.full_end, end - 1), first)
        return Blocks(first, cutlass.max(own.full_first, first), full_end, end)


class GridSplit(NoSplit):
    """In the workspace each CTA has two places for parts, the second for a tile that it begins, and one for a tile."""

    def __init__(self, config, rows: OneHead):
        super().__init__(config)
        self.rows = rows

    @cute.jit
    def announce(self, tile: SharedTile, problem: Problem):
        """What `Combine` has to do: the CTA with the last part of a tile says so."""
        block, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        row = block // problem.grid.heads
        ends = tile.valid & (tile.first_row < row) & (tile.last_row == row)
        at = self._tile(block, ctas, problem)
        tile = tile._replace(valid=ends)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(len(tile)):
                at[i] = Int32(tile[i])

    def announced(self, block, ctas, problem: Problem) -> SharedTile:
        at = self._tile(block, ctas, problem)
        tile = SharedTile(*(at[i] for i in range(len(SharedTile._fields))))
        return tile._replace(valid=tile.valid != 0)

    @cute.jit
    def send(self, w: Warpgroup, tile: SharedTile):
        """This CTA's part, where there are others: each thread's O, and the running max and the sum of its rows."""
        f, O = w.frag, acc_mn(w.frag.acc_O)  # (rows, cols)
        if tile.first_row != tile.last_row:
            for r in cutlass.range_constexpr(2):
                if self.is_query(w, tile, r):
                    n = cute.size(O, mode=[1])
                    values = cute.make_rmem_tensor((2, n // 2 + 1), Float32)
                    for c in cutlass.range_constexpr(n):
                        values[c] = O[r, c]
                    values[n], values[n + 1] = f.softmax.running_max[r], f.softmax.row_sum[r]
                    row = cute.arch.block_idx()[0] // w.problem.grid.heads
                    cute.autovec_copy(values, self.part(tile, row, w.problem, f.thread, r))

    def stores(self, tile: SharedTile):
        return tile.first_row == tile.last_row

    def is_query(self, w: Warpgroup, tile: SharedTile, r: int):
        """Whether a thread's r-th row is one: no others are kept."""
        row = tile.m_block * ROWS + w.frag.cS[r, 0][0]
        return self.rows.owner(row, tile, w.gmem)[0] < w.problem.seqlen_q

    def part(self, tile: SharedTile, row, problem: Problem, thread, r):
        """Where a thread's r-th row lies of the part of a row of CTAs: (2, d_v / 8 + 1), the last pair its softmax."""
        pairs, cta = self.config.d_v // 8 + 1, row * problem.grid.heads + tile.head
        place = 2 * cta + Int32(row == tile.first_row)
        begin = Int64(place * 2 + r) * (pairs * WARPGROUP * 8) + thread * 8
        pointer = cute.make_ptr(Float32, problem.args.split[0] + begin, cute.AddressSpace.gmem, assumed_align=8)
        return cute.make_tensor(pointer, cute.make_layout((2, pairs), stride=(1, 2 * WARPGROUP)))

    def _tile(self, block, ctas, problem: Problem):
        """Where a CTA's word to `Combine` lies, behind all parts."""
        begin = problem.args.split[0] + Int64(ctas) * (2 * self.config.part_bytes) + block * (4 * FIELDS)
        return cute.make_tensor(int32_at(begin), FIELDS)
