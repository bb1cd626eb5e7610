"""The second kernel of a split over the grid: merges the parts of a tile, and writes O and LSE.

A CTA merges 16 rows of a tile that CTAs of the forward have shared, by 32 columns, or several such. Its warps share the
parts. Their threads hold rows and columns as those did that wrote the parts, so the softmax's `merge` and the
epilogue are the forward's.
"""

from functools import reduce
from operator import or_
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, cute
from cutlass.memory import SmemAllocator

from .config import FwdConfig
from .epilogue import Epilogue
from .grid_split import GROUP, SharedTile, over, place_of
from .layout import acc_mn, in_registers, not_before, scale_and_add
from .parts import Parts
from .split_head_dim import NOBODY, WholeHeadDim
from .state import ROWS, Frag, Gmem, Problem, Tiling, Warpgroup, wait_for_stream

COLUMNS = 32  # of a CTA: the four threads of a row store 16 bytes each
WARPS = 4
AT_ONCE = 4  # parts that a warp reads
CTAS_PER_SM, LEAST_CTAS = 4, 3  # at most; that ptxas leaves registers for
OWN = COLUMNS // 2 + 4  # float32s of a thread: of two rows a quarter of the columns, the running max and the sum


class Work(NamedTuple):
    """Some rows and columns of a tile are an item; of which tiles `SharedCached.units` says."""

    rows: Int32  # of the forward's CTAs
    m_blocks: Int32
    groups: Int32  # of rows, of a tile
    items: Int32
    each: Int32  # of a CTA, neighbours


class Columns(WholeHeadDim):
    """`wg` says which, and of which 64 rows."""

    columns = COLUMNS

    @property
    def slices(self) -> int:
        return self.config.d_v // COLUMNS

    def row_block(self, wg):
        return wg // self.slices

    def slice(self, wg):
        return wg % self.slices

    def first_column(self, wg):
        return self.slice(wg) * COLUMNS

    def stored_row(self, row, wg):
        """By the first."""
        return row | cutlass.min(self.slice(wg), 1) * NOBODY


class Combine:
    def __init__(self, config: FwdConfig, parts: Parts):
        self.config, self.split, self.sequences = config, parts.split, parts.sequences
        self.columns = Columns(config)
        self.parts = parts._replace(head_dim=self.columns)
        self.epilogue = Epilogue(config, self.parts)

    @cute.jit
    def launch(self, gmem: Gmem, problem: Problem, tiling: Tiling, ctas: Int32, stream: cuda.CUstream):
        """Behind the forward kernel of so many CTAs."""
        heads, groups = problem.grid.heads, cute.ceil_div(self.sequences.queries(problem), GROUP)
        units, m_blocks = self.sequences.units(problem, ctas)
        items = units * heads * groups * self.columns.slices
        each = cute.ceil_div(items, CTAS_PER_SM * ctas)
        self.kernel.set_name_prefix(f"{self.config.name}_combine", keep_mangled_name=False)
        self.kernel(gmem, problem, tiling, Work(over(ctas, heads), m_blocks, groups, items, each)).launch(
            grid=(cute.ceil_div(items, each), 1, 1),
            block=(32 * WARPS, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=LEAST_CTAS,
            preferred_smem_carveout=100,  # as the forward has it, and so that the DSL asks no GPU
        )

    @cute.kernel
    def kernel(self, gmem: Gmem, problem: Problem, tiling: Tiling, work: Work):
        """The forward has waited for the lengths before it let this kernel begin, so they are read beside it."""
        alloc = SmemAllocator()
        shared = alloc.allocate_tensor(Int32, cute.make_layout(len(SharedTile._fields)), 16)
        sums = alloc.allocate_tensor(Float32, cute.make_layout((OWN, 32, WARPS - 1)), 16)
        block, known = cute.arch.block_idx()[0], Int32(-1)
        begin = block * work.each
        for item in cutlass.range(begin, cutlass.min(begin + work.each, work.items), unroll=1):
            whose, columns = over(item, self.columns.slices), item % self.columns.slices
            of_head = over(whose, work.groups)
            if of_head != known:
                self._find(shared, of_head, work, problem)
            known = of_head
            self._item(gmem, problem, tiling, shared, sums, whose - of_head * work.groups, columns)
        if block == 0:
            wait_for_stream()  # or this kernel might end before the forward

    @cute.jit
    def _item(
        self,
        gmem: Gmem,
        problem: Problem,
        tiling: Tiling,
        shared: cute.Tensor,
        sums: cute.Tensor,
        group: Int32,
        columns: Int32,
    ):
        """Rows and columns of a tile that are to be merged, or there is nothing to do."""
        tile = SharedTile(*(cute.arch.make_warp_uniform(shared[i]) for i in range(len(SharedTile._fields))))
        own, thread = self.sequences.problem_of(tile, problem), cute.arch.lane_idx() + group % (ROWS // GROUP) * 32
        wg = group // (ROWS // GROUP) * self.columns.slices + columns
        w = Warpgroup(gmem, None, None, tiling, own, self._fragments(wg, thread, tiling, own))
        rows, some = self._rows(w, tile)
        if some & (tile.valid != 0):
            self._wait(rows)
            self._tile(w, tile, rows, sums)

    @cute.jit
    def _find(self, shared: cute.Tensor, of_head: Int32, work: Work, problem: Problem):
        """A tile: by one warp, for all."""
        cute.arch.sync_threads()  # the one before is no longer read
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            self._tell(shared, of_head, work, problem)
        cute.arch.sync_threads()

    @cute.jit
    def _tell(self, shared: cute.Tensor, of_head: Int32, work: Work, problem: Problem):
        cute.arch.fence_acq_rel_gpu()  # lengths that an SM has cached may be of before the forward
        place = self.sequences.place_in_grid(of_head, work.rows * problem.grid.heads, problem)
        tile = self.sequences.merged(place, work.m_blocks, problem)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(len(tile)):
                shared[i] = Int32(tile[i])

    @cute.jit
    def _wait(self, rows: list):
        """On a condition that always holds, so that ptxas does not leave for later what they need."""
        if rows[0] + rows[1] >= 0:
            wait_for_stream()

    def _fragments(self, columns, thread, tiling: Tiling, problem: Problem) -> Frag:
        """Of a thread of an MMA warpgroup, by some of its columns."""
        c = self.config
        thr = tiling.mma_qk.get_slice(thread)
        cS = acc_mn(thr.partition_C(cute.make_identity_tensor((ROWS, c.tile_n))))  # (rows, cols)
        acc_O = cute.make_rmem_tensor(((2, 2, COLUMNS // 8), 1, 1), Float32)
        scale_log2 = c.score.scale_log2(problem, problem.args.score)
        softmax = self.parts.softmax.state.create(scale_log2, 2)
        return Frag(columns, thread, None, None, None, None, acc_O, softmax, cS)

    def _rows(self, w: Warpgroup, tile):
        """Which a thread reads, and whether the warp has queries."""
        block = self.columns.row_block(w.frag.wg)
        queries = [self.split.is_query(w, tile, block, r) for r in range(2)]
        rows = [block * ROWS + w.frag.cS[r, 0][0] for r in range(2)]
        rows = [self.split.row_read(row, query) for query, row in zip(queries, rows, strict=True)]
        return rows, cute.arch.vote_any_sync(queries[0] | queries[1])

    @cute.jit
    def _tile(self, w: Warpgroup, tile, rows: list, sums: cute.Tensor):
        """Each warp its parts, then the first one what all have."""
        w.frag.softmax.reset()
        w.frag.acc_O.fill(0.0)
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        for first in cutlass.range(tile.first_row + warp, tile.last_row + 1, WARPS * AT_ONCE, unroll=1):
            self._add_some(w, tile, first, rows)
        cute.arch.sync_threads()  # the sums of the rows before are no longer read
        if warp > 0:
            cute.autovec_copy(self._sum(w), sums[None, lane, warp - 1])
        cute.arch.sync_threads()
        if warp == 0:
            self._add(w, [in_registers(sums[None, lane, i]) for i in range(WARPS - 1)])
            self.epilogue.store(w, tile)

    @cute.jit
    def _add_some(self, w: Warpgroup, tile, first: Int32, rows: list):
        """So many of a warp's parts, all of them on their way before one is used: ptxas would save registers."""
        parts = [self._part(w, tile, first + WARPS * i, rows) for i in range(AT_ONCE)]
        words = [cute.recast_tensor(part, Int32) for part in parts]
        last = not_before([reduce(or_, (x[i] for x in words for i in range(OWN)))], tile.last_row)
        for i in cutlass.range_constexpr(1, AT_ONCE):
            for r in cutlass.range_constexpr(2):
                softmax = self._views(parts[i], r)[1]
                there = first + WARPS * i <= last
                softmax[0] = softmax[0] if there else -Float32.inf
                softmax[1] = softmax[1] if there else Float32(0.0)
        self._add(w, parts)

    def _part(self, w: Warpgroup, tile, whose, rows: list) -> cute.Tensor:
        """What a thread reads of one; beyond the last, of that again."""
        place = place_of(cutlass.min(whose, tile.last_row), tile.first_row, tile.head, w.problem)
        part = cute.make_rmem_tensor(OWN, Float32)
        for r, row in enumerate(rows):
            O, softmax = self.split.part(place, row, w.frag.thread % 4, w.problem)
            its_O, its_softmax = self._views(part, r)
            cute.autovec_copy(cute.local_tile(O, its_O.shape, (0, self.columns.slice(w.frag.wg))), its_O)
            cute.autovec_copy(softmax, its_softmax)
        return part

    def _sum(self, w: Warpgroup) -> cute.Tensor:
        """What a thread has found, like a part."""
        own, f = cute.make_rmem_tensor(OWN, Float32), w.frag
        for r in range(2):
            O, softmax = self._views(own, r)
            for i in range(cute.size(O)):
                O[i] = acc_mn(f.acc_O)[r, i]
            softmax[0], softmax[1] = f.softmax.running_max[r], f.softmax.row_sum[r]
        return own

    def _views(self, own: cute.Tensor, r: int):
        """Of a row of what a thread reads: O (4, columns / 16), and its running max and sum (2,)."""
        n = COLUMNS // 4
        O = cute.make_tensor(own.iterator + r * n, cute.make_layout((4, n // 4)))
        return O, cute.make_tensor(own.iterator + (2 * n + 2 * r), cute.make_layout(2))

    @cute.jit
    def _add(self, w: Warpgroup, parts: list):
        """Those whose rows have running maxima at once; one that is anchored is merged alone."""
        softmax = w.frag.softmax
        maxima = [self._views(part, r)[1][0] for part in parts for r in range(2)]
        maxima += [softmax.running_max[r] for r in range(2)]
        if cute.arch.vote_any_sync(reduce(or_, (x != x for x in maxima))):
            for i in cutlass.range_constexpr(len(parts)):
                self._add_any(w, parts[i])
        else:
            self._add_plain(w, parts)

    def _add_any(self, w: Warpgroup, part: cute.Tensor):
        for r in range(2):
            O, softmax = self._views(part, r)
            keep, add = w.frag.softmax.merge(r, softmax[0], softmax[1], self.config.margin)
            scale_and_add(acc_mn(w.frag.acc_O)[r, None], keep, [O], [add])

    def _add_plain(self, w: Warpgroup, parts: list):
        for r in range(2):
            rows = [self._views(part, r) for part in parts]
            keep, *factors = w.frag.softmax.merge_plain(r, [x[0] for _, x in rows], [x[1] for _, x in rows])
            scale_and_add(acc_mn(w.frag.acc_O)[r, None], keep, [O for O, _ in rows], factors)
