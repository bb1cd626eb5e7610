"""Few queries: all CTAs share the keys of all sequences, and a second kernel merges what several found of one tile.

A row of CTAs, one for each head, takes a run of key blocks, all runs equal to within a block: Stream-K (Osama et al.,
arXiv:2301.03598) over the sequences' blocks. The heads of a row walk through the same keys at once, since a cache has
them side by side. Of a run's tiles at most the two at its ends are shared with other rows. A CTA writes what it has of
these to the workspace, in float32, and `Combine` adds the parts up in one order: results do not depend on time.
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
from .split_head_dim import WholeHeadDim
from .state import ROWS, Gmem, Problem, Warpgroup, wait_for_stream
from .tile_scheduler import Static
from .varlen_scheduler import LANES, running_sum

AT_ONCE = 4  # times 32 lengths that a warp asks for
FEW = 16  # parts that `Combine` reads at once
GROUP = 16  # rows: a warp's of the MMA warpgroup


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
    first_row: Int32  # of CTAs that share it; until `completed`, its first block in the list of all
    last_row: Int32  # and its last
    row: Int32  # this CTA's
    part: Int32  # its place in the workspace; below 0: no other CTA shares the tile


class Place(NamedTuple):
    """Of a CTA: its row, of how many, and its head."""

    row: Int32
    rows: Int32
    head: Int32
    head_kv: Int32


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
    end: Any  # blocks up to the end of these
    own: Lane  # a lane's
    own_end: Any  # blocks up to the end of its sequence


class List(NamedTuple):
    """Of all blocks, as a warp knows it that looks at the first 32 sequences."""

    own: Lane
    own_end: Any
    end: Any
    of_group: Any  # a lane's: blocks of as many-th 32 sequences; the first lane has none
    total: Any
    rows: Any


class EqualShares(Static):
    """`least` blocks to a run, or fewer CTAs than there are have one."""

    varlen, shares, tile, name, min_blocks = True, True, SharedTile, "shares", 2

    @classmethod
    def least(cls, queries):
        """Blocks of a run, of tiles with so many rows that are queries: a part costs more the more there are."""
        return cls.min_blocks + queries // 32

    @staticmethod
    def rows(heads, room):
        """Of CTAs, for which the GPU has room. The host's workspace is by this too."""
        return cutlass.max(room // heads, 1)


def over(a, b):
    """a // b of numbers that are not negative: unsigned division is shorter."""
    plain = isinstance(a, int) and isinstance(b, int)
    return a // b if plain else Int32(cutlass.Uint32(a) // cutlass.Uint32(b))


def begin_of(row, total, rows):
    """The first block of a row's run."""
    each = over(total, rows)
    return each * row + cutlass.min(row, total - each * rows)


def rows_with_runs(total, rows, least, few):
    """Fewer than there are where runs would be shorter than that; a few may have runs of two blocks."""
    worth = cutlass.max(over(total, least), cutlass.min(over(total, 2), few))
    return cutlass.max(cutlass.min(rows, worth), 1)


@cute.jit
def rows_of_whole(batch: Int32, rows: Int32, sixteenths: Int32) -> Int32:
    """Of equal sequences: as many rows as each have some of them whole, or as share one, where these are nearly all."""
    each = over(batch + rows - 1, rows)
    whole = over(batch, each)
    if batch < rows:
        whole = over(rows, batch) * batch
    elif whole * each != batch:
        whole = rows
    if whole * 16 < rows * sixteenths:
        whole = rows
    return whole


def row_of(block, total, rows):
    """The row whose run has this block."""
    each = over(total, rows)
    longer = total - each * rows  # so many rows have one more
    shorter = over(cutlass.max(block - longer * (each + 1), 0), cutlass.max(each, 1))
    return cutlass.min(over(block, each + 1), longer) + shorter


def place_of(row, first_row, head, problem: Problem):
    """Of a row's part of a tile: each CTA has two places, the second for a tile that it begins."""
    return 2 * (row * problem.grid.heads + head) + Int32(row == first_row)


class SharedCached(Cached):
    """The tiles of a CTA are those of its run."""

    def clusters(self, grid, room):
        return self.config.scheduler.rows(grid.heads, self.config.ctas * room) * grid.heads

    def place(self, problem: Problem) -> Place:
        """Known before the lengths are."""
        return self.place_in_grid(cute.arch.block_idx()[0], cute.arch.grid_dim()[0], problem)

    def place_in_grid(self, block, ctas, problem: Problem) -> Place:
        heads = problem.grid.heads
        row = over(block, heads)
        head = block - row * heads
        return Place(row, over(ctas, heads), head, over(head, problem.group))

    @cute.jit
    def wait(self, place: Place):
        """On a condition that always holds, so that ptxas does not leave its divisions for later."""
        if place.row + place.rows + place.head_kv > 0:
            wait_for_stream()

    def head_kv(self, tile: SharedTile, problem: Problem, place: Place):
        return place.head_kv

    def first(self, problem: Problem, place: Place) -> Run:
        """Run, like all of these, by one warp; the lengths must be there."""
        return self._run(place.row, self._list(problem, place), problem)

    @cute.jit
    def _list(self, problem: Problem, place: Place) -> List:
        own, batch = self._lane(Int32(0), problem), problem.grid.batch
        others = most = of_group = Int32(0)
        for i in cutlass.range(1, (batch + LANES - 1) // LANES, AT_ONCE, unroll=1):
            blocks = [self._lane((i + j) * LANES, problem).blocks for j in range(AT_ONCE)]  # none beyond the last one
            for j in cutlass.range_constexpr(AT_ONCE):
                found = cute.arch.warp_redux_sync(blocks[j], "add")
                of_group = found if cute.arch.lane_idx() == i + j else of_group
                others, most = others + found, cutlass.max(most, blocks[j])
        most = cutlass.max(most, own.blocks)
        own_end = running_sum(own.blocks)
        end = cute.arch.shuffle_sync(own_end, LANES - 1)
        total = end + others
        least, few = self.config.scheduler.least(self.queries(problem)), 0 if self.config.fixup else FEW
        rows = rows_with_runs(total, place.rows, least, few)
        if Int64(cute.arch.warp_redux_sync(most, "max")) * batch == Int64(total):
            rows = rows_of_whole(batch, rows, cutlass.select_(rows < place.rows, Int32(12), Int32(15)))
        return List(own, own_end, end, of_group, total, rows)

    def _run(self, row: Int32, blocks: List, problem: Problem) -> Run:
        total, rows = blocks.total, blocks.rows
        run = (begin_of(cutlass.min(row + i, rows), total, rows) for i in range(2))
        run = Run(*run, total, rows, Int32(0), blocks.end, blocks.own, blocks.own_end)
        return self._seek(self._jump(run, blocks, problem), problem)

    @cute.jit
    def _jump(self, run: Run, blocks: List, problem: Problem) -> Run:
        """To the 32 sequences of its first block, among the first 32 times 32."""
        group, end, own, own_end = run.group, run.end, run.own, run.own_end
        if run.block >= end:
            of_group = end if cute.arch.lane_idx() == 0 else blocks.of_group
            ends = running_sum(of_group)
            n = cutlass.min(cute.arch.popc(cute.arch.vote_ballot_sync(ends <= run.block)), LANES - 1)
            group = n * LANES
            own = self._lane(group, problem)
            own_end = cute.arch.shuffle_sync(ends - of_group, n) + running_sum(own.blocks)
            end = cute.arch.shuffle_sync(own_end, LANES - 1)
        return run._replace(group=group, end=end, own=own, own_end=own_end)

    def queries(self, problem: Problem):
        """Rows of a tile that are, at most."""
        tile_m = self.config.tile_m
        return cutlass.min(cutlass.min(problem.grid.q.length, tile_m) * self.config.pack, tile_m)

    def units(self, problem: Problem, ctas: Int32):
        """How many tiles `merged` may find of a head, and its m_blocks, 0: it looks by rows of CTAs."""
        c, g, rows = self.config, problem.grid, over(ctas, problem.grid.heads)
        length = cutlass.min(g.q.length, (LANES + 1) * c.tile_m)  # of more the product may be too large
        m_blocks = (length * c.pack + c.tile_m - 1) // c.tile_m
        tiles = cutlass.min(g.batch, LANES + 1) * cutlass.min(m_blocks, LANES + 1)
        by_tile = (g.q.cu_seqlens == 0) & (tiles <= cutlass.min(rows, LANES))
        return cutlass.select_(by_tile, tiles, rows), cutlass.select_(by_tile, m_blocks, Int32(0))

    @cute.jit
    def _lane(self, group: Int32, problem: Problem) -> Lane:
        c, g = self.config, problem.grid
        b = group + cute.arch.lane_idx()
        sequence = cutlass.min(b, g.batch - 1)
        q, k = g.q.of(sequence), g.k.of(sequence)
        rows = q.length * c.pack
        own = problem._replace(seqlen_q=q.length, seqlen_k=k.length)
        own = self.with_mask(own, sequence, q.start, Int32(0))
        seen = mask_ops.block_range(c.row_mask, Int32(0), cutlass.max(rows, 1), c.tile_n, own)
        each = Int32(seen.end - seen.first)
        blocks = (rows + c.tile_m - 1) // c.tile_m * each if b < g.batch else Int32(0)
        return Lane(q.start, q.length, k.length, Int32(seen.first), each, blocks)

    @cute.jit
    def _seek(self, run: Run, problem: Problem) -> Run:
        """Forward to the 32 sequences of its next block; no further than there are, whatever the total says."""
        group, end, own, own_end = run.group, run.end, run.own, run.own_end
        while (run.block >= end) & (end < run.total) & (group + LANES < problem.grid.batch):
            group = group + LANES
            own = self._lane(group, problem)
            own_end = end + running_sum(own.blocks)
            end = cute.arch.shuffle_sync(own_end, LANES - 1)
        return run._replace(group=group, end=end, own=own, own_end=own_end)

    @cute.jit
    def decode(self, run: Run, problem: Problem, place: Place) -> SharedTile:
        c = self.config
        before = cute.arch.vote_ballot_sync(run.own_end <= run.block)  # whose blocks lie before this one
        who = cutlass.min(cute.arch.popc(before), LANES - 1)
        behind = run.block - cute.arch.shuffle_sync(run.own_end - run.own.blocks, who)
        start_q, seqlen_q, seqlen_k, low, each = [cute.arch.shuffle_sync(x, who) for x in run.own[:5]]
        m_block, first = Int32(0), behind
        if seqlen_q * c.pack > c.tile_m:
            m_block = over(behind, each)
            first = behind - m_block * each
        start, end = run.block - first, cutlass.min(first + run.stop - run.block, each)
        where = m_block, place.head, run.group + who, run.block < run.stop
        blocks = low + first, low + end, start, start + each - 1
        return SharedTile(*where, start_q, seqlen_q, Int32(0), seqlen_k, *blocks, place.row, Int32(-1))

    def completed(self, tile: SharedTile, run: Run, problem: Problem) -> SharedTile:
        """With the rows of CTAs that share it."""
        first, last = (row_of(block, run.total, run.rows) for block in (tile.first_row, tile.last_row))
        part = cutlass.select_(first == last, Int32(-1), place_of(tile.row, first, tile.head, problem))
        return tile._replace(first_row=first, last_row=last, part=part)

    @cute.jit
    def merged(self, place: Place, m_blocks: Int32, problem: Problem) -> SharedTile:
        """A tile that several CTAs may share: the one whose last part is in the place's row of CTAs.

        Or, where a sequence has no more than so many m_blocks, of up to 32 tiles the one with the row's number. Not
        valid where a single CTA has it.
        """
        blocks, unit, row, right = self._list(problem, place), place.row, place.row, Boolean(True)
        batch = m_block = Int32(0)
        if m_blocks > 0:
            batch = over(unit, m_blocks)
            m_block = unit - batch * m_blocks
            end, all_blocks, each = (
                cute.arch.shuffle_sync(x, batch) for x in (blocks.own_end, blocks.own.blocks, blocks.own.each)
            )
            row = row_of(cutlass.max(end - all_blocks + (m_block + 1) * each - 1, 0), blocks.total, blocks.rows)
        place = place._replace(row=row)
        run = self._run(row, blocks, problem)
        tile = self.completed(self.decode(run, problem, place), run, problem)
        if m_blocks > 0:
            right = (tile.batch == batch) & (tile.m_block == m_block)
        ends = tile.valid & (tile.first_row < row) & (tile.last_row == row)
        return tile._replace(valid=ends & right)

    def upcoming(self, run: Run, tile: SharedTile, gmem: Gmem, problem: Problem) -> Run:
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
    """A CTA writes its parts to its places in the workspace."""

    def __init__(self, config, rows: OneHead, head_dim: WholeHeadDim):
        super().__init__(config)
        self.rows, self.head_dim = rows, head_dim

    def send(self, w: Warpgroup, tile: SharedTile):
        self.write(w, tile)

    @cute.jit
    def write(self, w: Warpgroup, tile: SharedTile):
        """This CTA's part, where there are others: each thread's O, and the running max and the sum of its rows."""
        f, O = w.frag, acc_mn(w.frag.acc_O)  # (rows, cols)
        if tile.part >= 0:
            for r in cutlass.range_constexpr(2):
                if self.is_query(w, tile, f.wg, r):
                    n = cute.size(O, mode=[1])
                    values, state = cute.make_rmem_tensor((4, n // 4), Float32), cute.make_rmem_tensor(2, Float32)
                    for c in cutlass.range_constexpr(n):
                        values[c] = O[r, c]
                    state[0], state[1] = f.softmax.running_max[r], f.softmax.row_sum[r]
                    row = f.wg * ROWS + f.cS[r, 0][0]
                    to, to_state = self.part(tile.part, row, f.thread % 4, w.problem)
                    cute.autovec_copy(values, to)
                    cute.autovec_copy(state, to_state)

    def stores(self, w: Warpgroup, tile: SharedTile):
        return tile.part < 0

    def is_query(self, w: Warpgroup, tile: SharedTile, block, r: int):
        """Whether a thread's r-th row of so-many-th 64 is one: no others are kept."""
        row = tile.m_block * self.config.tile_m + block * ROWS + w.frag.cS[r, 0][0]
        return self.rows.owner(row, tile, w.gmem)[0] < w.problem.seqlen_q

    def row_read(self, row, query):
        """In place of a row that is no query the first of a warp's, which is one if any is."""
        return cutlass.select_(query, row, row // GROUP * GROUP)

    def part(self, place, row, quarter, problem: Problem):
        """Where of a part lies what one of four threads has of a row: O (4, d_v / 16), and its softmax (2,).

        The columns are in the accumulators' order: a thread's values of a row are neighbours by fours.
        """
        c = self.config
        begin = problem.args.split[0] + Int64(place) * c.part_bytes
        O = cute.make_layout((4, c.d_v // 16), stride=(1, 16))
        return (
            cute.make_tensor(float32_at(begin + (row * c.d_v + quarter * 4) * 4, 16), O),
            cute.make_tensor(float32_at(begin + (c.tile_m * c.d_v + (row * 4 + quarter) * 2) * 4, 8), 2),
        )


def float32_at(address: Int64, align: int):
    return cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=align)
