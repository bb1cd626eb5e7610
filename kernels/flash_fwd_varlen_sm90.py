"""Packed sequences of any lengths (FlashAttention's varlen): q, o (total_q, h, d) and k, v (total_k, h_kv, d)."""

import cutlass
from cutlass import Int32, Int64, cute

from .flash_fwd_sm90 import L2_KV_BYTES, Gmem, Problem, Smem, Warpgroup
from .packed_scheduler import PackedGrid, PackedTile
from .seqlen import Packing, Part, ragged, rows_of


class Varlen:
    """Goes before a kernel's class: `type(name, (Varlen, FlashFwdSm90), {})`. A tile is of one sequence."""

    def _tma_view(self, t: cute.Tensor) -> cute.Tensor:
        return ragged(t)

    def _lse_layout(self, mQ: cute.Tensor, rows):
        return cute.make_layout((mQ.shape[2], rows), stride=(Int64(rows), 1))

    def _grid(self, mQ: cute.Tensor, mK: cute.Tensor, sequences) -> PackedGrid:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch = sequences
        (total_q, _, heads), (total_k, _, heads_kv) = mQ.shape, mK.shape
        q, k = Packing(cu_seqlens_q, seqused_q, Int32(total_q)), Packing(cu_seqlens_k, seqused_k, Int32(total_k))
        l2_rows = Int32(L2_KV_BYTES // (2 * (self.config.head_dim + self.config.d_v)))
        return PackedGrid(q, k, Int32(heads), batch, Int32(heads // heads_kv), l2_rows)

    def _ctas(self, grid: PackedGrid, room):
        return self.config.scheduler.grid(grid, room, self.config.tile_m)

    def _begin(self, problem: Problem):
        self._wait_for_stream()  # before the lengths, which may be its doing
        c = self.config
        place = c.scheduler.first(cute.arch.block_idx()[0], problem.grid, c.tile_m)
        return place, self._decode(place, problem)

    def _decode(self, place, problem: Problem) -> PackedTile:
        return self.config.scheduler.decode(place, problem.grid, self.config.tile_m)

    def _upcoming(self, place, done, gmem: Gmem, smem: Smem, problem: Problem):
        ctas = cute.arch.grid_dim()[0]
        return self.config.scheduler.upcoming(place, problem.grid, gmem.ticket, ctas, self.config.tile_m)

    def _problem_of(self, tile: PackedTile, problem: Problem) -> Problem:
        return problem._replace(seqlen_q=tile.seqlen_q, seqlen_k=tile.seqlen_k)

    def _sequences(self, tile: PackedTile):
        return Part(tile.start_q, tile.seqlen_q), Part(tile.start_k, tile.seqlen_k)

    def _head(self, t: cute.Tensor, head, sequence: Part) -> cute.Tensor:
        if cute.rank(t) == 3:  # o, stored from registers
            return cute.domain_offset((sequence.start, 0), t[None, None, head])
        return rows_of(t, head, sequence)

    @cute.jit
    def _load_q(self, load: cutlass.Constexpr, tile: PackedTile, q_state):
        """In a loop that stays one: unrolled, with five coordinates, ptxas spills at d128 causal."""
        blocks = self.config.row_blocks
        for wg in cutlass.range(blocks, unroll=1):
            load(tile.m_block * blocks + wg, wg + blocks * q_state.index, q_state)

    @cute.jit
    def _store_lse(self, w: Warpgroup, tile: PackedTile, row, lse):
        rows = cutlass.min(tile.seqlen_q, w.gmem.lse.shape[1])
        if (w.frag.thread % 4 == 0) & (row < rows):
            w.gmem.lse[tile.head, tile.start_q + row] = lse
