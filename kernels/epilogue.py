"""The epilogue: O and LSE of a warpgroup's rows, to global memory."""

import cutlass
from cutlass import Int32, cute
from cutlass.cute.nvgpu import cpasync, warp

from .config import FwdConfig
from .layout import normalise_rows, quad_transpose
from .parts import Parts
from .state import ELEMENT, ROWS, Warpgroup
from .tile_scheduler import Tile


class Epilogue:
    def __init__(self, config: FwdConfig, parts: Parts):
        self.config, self.parts, self.dtype = config, parts, ELEMENT[config.dtype]
        self.rows, self.sequences, self.head_dim, self.trace = parts.rows, parts.sequences, parts.head_dim, parts.trace

    @cute.jit
    def finish(self, w: Warpgroup, tile: Tile):
        """A tile whose last block is multiplied."""
        self.trace.mark_of(w, "store")
        self.parts.split.send(w, tile)
        if self.parts.split.stores(w, tile):
            self.parts.split.merge(w, tile)
            self.store(w, tile)
        self.trace.mark_of(w, "store done")

    @cute.jit
    def store(self, w: Warpgroup, tile: Tile):
        """O and LSE of this warpgroup's rows. No other warpgroup is waited for."""
        f = w.frag
        lse, seen = self._totals(w, tile)
        normalise_rows(f.acc_O, f.softmax.rescale, seen)
        rO = cute.make_rmem_tensor_like(f.acc_O, self.dtype)
        rO.store(f.acc_O.load().to(self.dtype))
        if cutlass.const_expr(self.config.stages_o):
            self._store_by_tma(w, rO, tile)
        else:
            self._store_from_registers(w, rO, tile)
        for r in cutlass.range_constexpr(cute.size(lse)):
            self.store_row(w.gmem.lse, w, tile, self.row0(w, tile) + f.cS[r, 0][0], lse[r])

    def row0(self, w: Warpgroup, tile: Tile):
        """A warpgroup's first row, of its tile's head."""
        return tile.m_block * self.config.tile_m + self.head_dim.row_block(w.frag.wg) * ROWS

    def store_row(self, t: cute.Tensor, w: Warpgroup, tile: Tile, row, value):
        """A number of a row, to where lse lies or a tensor like it."""
        query, head = self.rows.owner(self.head_dim.stored_row(row, w.frag.wg), tile, w.gmem)
        self.sequences.store_row(t, w, tile, query, head, value)

    def _totals(self, w: Warpgroup, tile: Tile):
        """The rows' natural-log sums, and those of the keys that they saw; softmax.rescale normalises O."""
        lse = seen = w.frag.softmax.finish(self.config.margin)
        for output in self.parts.outputs:
            lse = output.finish(self, w, tile, lse, seen)
        return lse, seen

    @cute.jit
    def _store_by_tma(self, w: Warpgroup, rO: cute.Tensor, tile: Tile):
        """Through shared memory: TMA writes whole rows, and none beyond the last query."""
        c, f = self.config, w.frag
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, w.tiling.mma_pv).get_slice(f.thread)
        sO = w.smem.o[None, None, f.wg]  # (64, d_v)
        if f.thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # the tile before has left sO
        self.head_dim.sync(f.wg)
        cute.copy(copy, copy.retile(rO), copy.partition_D(sO))
        cute.arch.fence_view_async_shared()
        self.head_dim.sync(f.wg)
        if f.thread // 32 == 0:
            g = self.rows.tiles(w.gmem, "o", tile.head, self.sequences.of_output(tile, w.problem))  # (64, d_v, blocks)
            g = g[None, None, tile.m_block * c.warpgroups + f.wg]  # (64, d_v)
            sT, gT = cpasync.tma_partition(
                w.gmem.o.atom, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(g, 0, 2)
            )
            cute.copy(w.gmem.o.atom, sT, gT)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _store_from_registers(self, w: Warpgroup, rO: cute.Tensor, tile: Tile):
        """16 bytes a thread at a time, so that Q's place is free for the next tile's Q."""
        f = w.frag
        words = cute.recast_tensor(rO, Int32)  # ((1, 2, d_v / 8), 1, 1)
        row0 = self.row0(w, tile)
        for r in cutlass.range_constexpr(2):
            query, head = self.rows.owner(row0 + f.cS[r, 0][0], tile, w.gmem)
            g = self.sequences.head(w.gmem.o, head, self.sequences.of_output(tile, w.problem))  # (s, d_v)
            for n in cutlass.range_constexpr(0, self.head_dim.columns // 8, 4):
                x = quad_transpose([words[(0, r, n + i), 0, 0] for i in range(4)], f.thread)
                col = self.head_dim.first_column(f.wg) + n * 8 + f.thread % 4 * 8
                if (query < w.problem.seqlen_q) & (col < w.gmem.o.shape[1]):
                    at = g.iterator + cute.crd2idx((query, col), g.layout)
                    to = cute.make_tensor(cute.make_ptr(Int32, at.toint(), cute.AddressSpace.gmem, assumed_align=16), 4)
                    out = cute.make_rmem_tensor(4, Int32)
                    for i in cutlass.range_constexpr(4):
                        out[i] = x[i]
                    to.store(out.load())
