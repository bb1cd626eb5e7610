"""Keys and values in a cache: of a batch, or in pages; how many there are of each sequence only the device knows.

TMA sees k and v as `ragged` does, so a box ends at the sequence's last key: what lies behind that is never read, and a
NaN there costs nothing. A stage of K or V is one box, or comes as several of `box` rows, each from a page of its own.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from .kv import Contiguous
from .seqlen import REACH, ROWS_MAX, WRAP, SeqlenInfo, int32_at
from .sequences import Varlen
from .state import L2_KV_BYTES, SLACK, Gmem, Pipes, Problem, Smem, Tma, Warpgroup, wait_for_stream
from .varlen_scheduler import VarlenGrid, VarlenTile


class Queries(NamedTuple):
    """Each sequence's rows of q: one behind the other, or as many of each."""

    cu_seqlens: Int64  # address of (batch + 1,) int32; 0: each sequence has `length`
    total: Int32  # of all sequences
    length: Int32
    step: Int32  # rows of q, by its stride, from one sequence to the next
    step_o: Int32  # and of o
    causal: Any = None  # address of (batch,) int32, not 0 for those that are: `CausalOfEach`

    @cute.jit
    def slack(self, b: Int32) -> Int32:
        """0 of a sequence that is."""
        return cutlass.select_(cute.make_tensor(int32_at(self.causal) + b, 1)[0] != 0, Int32(0), Int32(SLACK))

    @cute.jit
    def of(self, b: Int32) -> SeqlenInfo:
        start, length = b * self.step, self.length
        if self.cu_seqlens != 0:
            ends = cute.make_tensor(int32_at(self.cu_seqlens) + b, 2)
            start = cutlass.min(cutlass.max(ends[0], 0), self.total)
            length = cutlass.max(cutlass.min(ends[1] - ends[0], self.total - start), 0)
        return SeqlenInfo(start, length)

    def start_o(self, tile: VarlenTile):
        """A sequence's first row of o."""
        return cutlass.select_(self.cu_seqlens != 0, tile.start_q, tile.batch * self.step_o)

    def start_lse(self, tile: VarlenTile):
        """And of its head's lse."""
        return cutlass.select_(self.cu_seqlens != 0, tile.start_q, Int32(0))


class Strides(NamedTuple):
    """Of k or v, in units: what a page's and a row's stride are multiples of."""

    page: Int32
    row: Int32


class Keys(NamedTuple):
    """Each sequence's keys, and where they lie."""

    seqlens: Int64  # address of (batch,) int32: rows of the cache that each sequence has; 0: `length`
    length: Int32
    capacity: Int32  # rows that a sequence can have
    pages: Int32  # of the cache; of one without pages its batch
    k: Strides
    v: Strides

    @cute.jit
    def rows(self, b: Int32) -> Int32:
        """Of a sequence, whatever is written there: no more than it can have."""
        rows = self.length
        if self.seqlens != 0:
            rows = cute.make_tensor(int32_at(self.seqlens) + b, 1)[0]
        return cutlass.max(cutlass.min(rows, self.capacity), 0)

    def page(self, number):
        """A page's number, whatever is written there: none beyond the cache."""
        return cutlass.max(cutlass.min(number, self.pages - 1), 0)


class BatchKeys(NamedTuple):
    """Of a cache (batch, rows, h_kv, d)."""

    keys: Keys
    batch_idx: Int64  # address of (batch,) int32: whose rows of the cache are a sequence's; 0: its own
    leftpad: Int64  # address of (batch,) int32: rows before its first key; 0: none

    @cute.jit
    def pad(self, b: Int32) -> Int32:
        pad = Int32(0)
        if self.leftpad != 0:
            pad = cutlass.max(cute.make_tensor(int32_at(self.leftpad) + b, 1)[0], 0)
        return pad

    def of(self, b: Int32) -> SeqlenInfo:
        return SeqlenInfo(Int32(0), cutlass.max(self.keys.rows(b) - self.pad(b), 0))

    @cute.jit
    def origin(self, b: Int32) -> "Origin":
        page = b
        if self.batch_idx != 0:
            page = cute.make_tensor(int32_at(self.batch_idx) + b, 1)[0]
        return Origin(self.keys.page(page), self.pad(b), Int64(0))


class PagedKeys(NamedTuple):
    """Of a cache (pages, page_size, h_kv, d)."""

    keys: Keys
    table: Int64  # address of (batch, pages of a sequence) int32
    table_stride: Int32
    page_size: Any  # FastDivmodDivisorV2

    def of(self, b: Int32) -> SeqlenInfo:
        return SeqlenInfo(Int32(0), self.keys.rows(b))

    def origin(self, b: Int32) -> "Origin":
        return Origin(Int32(0), Int32(0), self.table + Int64(b) * self.table_stride * 4)


class Origin(NamedTuple):
    """Where a sequence's first key lies: its page and row, or the address of its page numbers."""

    page: Int32
    row: Int32
    table: Int64


class Boxes(NamedTuple):
    """Of some blocks of keys, each lane's box, by the coordinates of `in_cache`."""

    first: Int32  # block
    row: Int32
    y_k: Int32
    y_v: Int32


class Cached(Varlen):
    """q and o of varlen sequences, or of equal ones: (rows, h, d) with a step from one to the next."""

    def lse_layout(self, mQ: cute.Tensor, rows, sequences):
        """(batch, h, rows)."""
        cu_seqlens_q, seqlen_q, heads = sequences[0], sequences[1], mQ.shape[2]
        of_each = cutlass.select_(cu_seqlens_q != 0, Int32(0), heads * seqlen_q)
        shape = sequences[4], heads, cutlass.min(Int32(rows), seqlen_q)
        return cute.make_layout(shape, stride=(Int64(of_each), Int64(seqlen_q), 1))

    def grid(self, counts, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, sequences) -> VarlenGrid:
        strides = (strides_of(t, unit) for t, unit in zip((mK, mV), sequences[8:10], strict=True))
        return self.grid_of(counts, Int32(mK.shape[3]), Int32(mK.shape[0]), *strides, sequences)

    def grid_of(self, counts, pages: Int32, page_size: Int32, k: Strides, v: Strides, sequences) -> VarlenGrid:
        """Of a cache of so many pages."""
        cu_seqlens_q, seqlen_q, step_q, step_o, batch, seqlens, length, capacity, _, _, *where = sequences
        _, heads, ratio = counts
        total = cutlass.select_(cu_seqlens_q != 0, seqlen_q, batch * seqlen_q)
        causal = (where.pop(),) if self.config.mask.of_each else ()
        q = Queries(cu_seqlens_q, total, seqlen_q, step_q, step_o, *causal)
        keys = Keys(seqlens, length, capacity, pages, k, v)
        if self.config.cache.paged:
            of_keys: Any = PagedKeys(keys, *where, cute.FastDivmodDivisorV2(page_size))
        else:
            of_keys = BatchKeys(keys, *where)
        l2_rows = Int32(L2_KV_BYTES // (2 * (self.config.head_dim + self.config.d_v)))
        return VarlenGrid(q, of_keys, Int32(heads), batch, Int32(ratio), l2_rows)

    def place(self, problem: Problem):
        """What a CTA knows before it has waited for the stream."""
        return ()

    def wait(self, place):
        """For what ran before on the stream, such as what wrote the lengths."""
        wait_for_stream()

    def head_kv(self, tile: VarlenTile, problem: Problem, place):
        return tile.head // problem.group

    def first(self, problem: Problem, place):
        return super().first(problem)

    def decode(self, index, problem: Problem, place):
        return super().decode(index, problem)

    def completed(self, tile: VarlenTile, index, problem: Problem):
        """What the MMA warpgroups need to know besides."""
        return tile

    def upcoming(self, index, tile: VarlenTile, gmem: Gmem, problem: Problem):
        return super().upcoming(index, gmem, problem)

    def of_output(self, tile: VarlenTile, problem: Problem):
        return SeqlenInfo(problem.grid.q.start_o(tile), tile.seqlen_q)

    @cute.jit
    def store_row(self, t: cute.Tensor, w: Warpgroup, tile: VarlenTile, query, head, value):
        rows = cutlass.min(tile.seqlen_q, t.shape[2])
        if (w.frag.thread % 4 == 0) & (query < rows):
            t[tile.batch, head, w.problem.grid.q.start_lse(tile) + query] = value


class Paged(Contiguous):
    """K and V of a cache. `place` is where some blocks lie, for K and V, worked out before their stages are free."""

    @property
    def blocks_at_once(self) -> int:
        """As many as there are lanes for the boxes of; without pages a block's place needs no look at memory."""
        return 32 // self.config.cache_boxes if self.config.cache.paged else 1

    def units(self, sequences):
        return sequences[8:10]

    def tma(self, t: cute.Tensor, smem: cute.Layout, columns: int, unit: Int64) -> Tma:
        """By boxes of rows."""
        box = self.config.cache.box, columns
        boxes = cute.select(cute.flat_divide(smem, box), mode=[0, 1])
        op = cpasync.CopyBulkTensorTileG2SOp()
        return Tma(*cpasync.make_tiled_tma_atom(op, in_cache(t, unit), boxes, box))

    @cute.jit
    def next_place(self, boxes: Boxes, n_block: Int32, seqlen_k: Int32, origin: Origin, problem: Problem, number):
        """The same, where the block is among these."""
        n = n_block - boxes.first
        if (n < 0) | (n >= self.blocks_at_once):
            boxes = self.place(n_block, seqlen_k, origin, problem, number)
        return boxes

    @cute.jit
    def place(self, n_block: Int32, seqlen_k: Int32, origin: Origin, problem: Problem, number) -> Boxes:
        """Lane i works out where the i-th box lies; one beyond the last key is nowhere, and reads zeros."""
        c, keys, n = self.config, problem.grid.k.keys, self.blocks_at_once
        first = n_block // n * n
        box = cute.arch.lane_idx() if c.cache.paged else 0
        key = first * c.tile_n + box * c.cache.box
        left = cutlass.max(cutlass.min(seqlen_k - key, c.cache.box), 0)  # rows of it
        page, row = origin.page, origin.row + key
        if cutlass.const_expr(c.cache.paged):
            page, row = self.look_up(key, (left > 0) & (box < n * c.cache_boxes), origin, problem)
        y_k, y_v = (page * x.page + (row + left) * x.row for x in (keys.k, keys.v))
        return Boxes(first, ROWS_MAX - left, y_k, y_v)

    @cute.jit
    def look_up(self, key: Int32, there, origin: Origin, problem: Problem):
        """A key's page, and its row there."""
        page, row = Int32(0), Int32(0)
        if there:
            n, row = divmod(key, problem.grid.k.page_size)
            page = problem.grid.k.keys.page(cute.make_tensor(int32_at(origin.table) + n, 1)[0])
        return page, row

    def loader(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head, sequence):
        """What loads a block into a stage: (boxes, block, stage, state, which of the producer's warps).

        TMA takes its coordinates from uniform registers.
        """
        c, columns = self.config, self.config.columns_v if name == "v" else self.config.head_dim
        tma, pipe, box = getattr(gmem, name), getattr(pipes, name), (self.config.cache.box, columns)
        parts = c.head_dim_splits if name == "v" else 1
        s = cute.group_modes(cute.flat_divide(getattr(smem, name), box), 0, 2)  # (box, boxes, 1, slots)

        def load(boxes: Boxes, n_block, stage, state, number):
            self.trace.mark(gmem, smem, 0, f"load {name}")
            barrier = pipe.producer_get_barrier(state)
            for i in range(0, c.cache_boxes, c.producer_warps):
                i = i if number is None else i + number
                lane = (n_block - boxes.first) * c.cache_boxes + i if c.cache.paged else None
                row, y = (uniform(x, lane) for x in (boxes.row, boxes.y_k if name == "k" else boxes.y_v))
                g = cute.domain_offset((row, 0), tma.tensor[None, None, head, y, ROWS_MAX])
                for part in range(parts):
                    gT = cute.group_modes(cute.local_tile(g, box, (0, part)), 0, 2)
                    sT = s[None, i, 0, stage * parts + part if parts > 1 else stage]
                    sT, gT = cpasync.tma_partition(tma.atom, 0, cute.make_layout(1), sT, gT)
                    cute.copy(tma.atom, gT, sT, tma_bar_ptr=barrier)

        return load


def uniform(x, lane):
    """What a lane has; None: what all of them have."""
    return cute.arch.make_warp_uniform(x if lane is None else cute.arch.shuffle_sync(x, lane))


def strides_of(t: cute.Tensor, unit: Int64) -> Strides:
    """Of k or v, (row, d, h, page)."""
    return Strides(Int32(t.stride[3] // unit), Int32(t.stride[0] // unit))


def in_cache(t: cute.Tensor, unit: Int64) -> cute.Tensor:
    """(row, d, h, page) -> (2^30, d, h, y, z): at (2^30 - n, c, h, y, 2^30) begin the n rows that end before y units.

    See `seqlen.ragged`. Behind the n-th row the first coordinate is out of bounds, and TMA gives zeros.
    """
    (_, d, heads, _), (row, _, head, _) = t.shape, t.stride
    shape = (Int32(ROWS_MAX), d, heads, Int32(REACH), Int32(REACH))
    back, unit = (cute.assume(x, divby=8) for x in (Int64(WRAP) - row, unit))
    return cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(row, 1, head, unit, back)))
