"""The second kernel of a split over the grid: merges the parts of a tile, and writes O and LSE.

A CTA is for a place of the workspace where a tile may be announced, and for 32 columns of O. Its threads hold rows and
columns as those did that wrote the parts, so the softmax's `merge` and the epilogue are the forward's.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, cute

from .config import FwdConfig
from .epilogue import Epilogue
from .grid_split import place_of
from .layout import acc_mn
from .parts import Parts
from .ping_pong import WARPGROUP
from .split_head_dim import NOBODY, WholeHeadDim
from .state import ROWS, Frag, Gmem, Problem, Tiling, Warpgroup, wait_for_stream

COLUMNS = 32  # of a CTA: four threads of a row store 16 bytes each


class Columns(WholeHeadDim):
    """`wg` says which."""

    columns = COLUMNS

    def row_block(self, wg):
        return 0  # a tile has one

    def first_column(self, wg):
        return wg * COLUMNS

    def stored_row(self, row, wg):
        """By the first."""
        return row | cutlass.min(wg, 1) * NOBODY


class Combine:
    def __init__(self, config: FwdConfig, parts: Parts):
        self.config, self.split = config, parts.split
        self.parts = parts._replace(head_dim=Columns(config))
        self.epilogue = Epilogue(config, self.parts)

    @property
    def slices(self) -> int:
        """CTAs to a tile."""
        return self.config.d_v // COLUMNS

    @cute.jit
    def launch(self, gmem: Gmem, problem: Problem, tiling: Tiling, ctas: Int32, stream: cuda.CUstream):
        """Behind the forward kernel of so many CTAs."""
        self.kernel.set_name_prefix(f"{self.config.name}_combine", keep_mangled_name=False)
        self.kernel(gmem, problem, tiling).launch(
            grid=(ctas * self.slices, 1, 1), block=(WARPGROUP, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, gmem: Gmem, problem: Problem, tiling: Tiling):
        wait_for_stream()
        block, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0] // self.slices
        tile = self.split.announced(block // self.slices, ctas, problem)
        if tile.valid:
            own = self.parts.sequences.problem_of(tile, problem)
            self.tile(Warpgroup(gmem, None, None, tiling, own, self.fragments(block % self.slices, tiling, own)), tile)

    def fragments(self, columns, tiling: Tiling, problem: Problem) -> Frag:
        """A thread's rows of O, by so many columns."""
        c, thread = self.config, cute.arch.thread_idx()[0]
        thr = tiling.mma_qk.get_slice(thread)
        cS = acc_mn(thr.partition_C(cute.make_identity_tensor((ROWS, c.tile_n))))  # (rows, cols)
        acc_O = cute.make_rmem_tensor(((2, 2, COLUMNS // 8), 1, 1), Float32)
        scale_log2 = c.score.scale_log2(problem, problem.args.score)
        softmax = self.parts.softmax.state.create(scale_log2, 2)
        return Frag(columns, thread, None, None, None, None, acc_O, softmax, cS)

    @cute.jit
    def tile(self, w: Warpgroup, tile):
        """All parts, from the first keys on."""
        w.frag.softmax.reset()
        w.frag.acc_O.fill(0.0)
        for r in cutlass.range_constexpr(2):
            query = self.split.is_query(w, tile, r)
            if cute.arch.vote_any_sync(query):
                whose = self._whose(w, r, query)
                for row in cutlass.range(tile.first_row, tile.last_row + 1, unroll=4):  # loads in flight
                    self.add(w, tile, row, r, whose)
        self.epilogue.store(w, tile)

    def _whose(self, w: Warpgroup, r: int, query):
        """Thread and row to read from: of a row that is no query those of the warp's first, which then is one."""
        thread = w.frag.thread
        return cutlass.select_(query, thread, thread - thread % 32 // 4 * 4), cutlass.select_(query, Int32(r), Int32(0))

    def add(self, w: Warpgroup, tile, row: Int32, r: int, whose):
        """A part of a thread's r-th row."""
        f, place = w.frag, place_of(row, tile.first_row, tile.head, w.problem)
        part = self.split.part(place, w.problem, *whose)  # (2, d_v / 8 + 1)
        O, state = cute.make_rmem_tensor((2, COLUMNS // 8), Float32), cute.make_rmem_tensor(2, Float32)
        own = cute.local_tile(part, (2, COLUMNS // 8), (0, f.wg))
        cute.autovec_copy(own, O)
        cute.autovec_copy(part[None, self.config.d_v // 8], state)
        keep, add = f.softmax.merge(r, state[0], state[1], self.config.margin)
        mine = acc_mn(f.acc_O)[r, None]  # (cols,)
        theirs = cute.make_tensor(O.iterator, cute.make_layout(mine.shape))
        mine.store(mine.load() * keep + theirs.load() * add)
