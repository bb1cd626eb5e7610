"""Where a sequence's rows lie: in a dense tensor of equal lengths, or one behind the other in (total, heads, d)."""

import cutlass
from cutlass import Int32, Int64, cute

from .part import Part
from .seqlen import SeqlenInfo, Seqlens, heads_of, ragged, ragged_heads, rows_of
from .state import L2_KV_BYTES, Gmem, Problem, Warpgroup, rank
from .tile_scheduler import Grid, Tile
from .varlen_scheduler import VarlenGrid, VarlenTile


class Dense(Part):
    reads = False  # the first tile is known without a look at memory

    def view(self, t: cute.Tensor) -> cute.Tensor:
        """q, k, v or o as TMA sees it."""
        return t

    def head(self, t: cute.Tensor, head, sequence) -> cute.Tensor:
        """A head's rows of one sequence, (s, d), of q, k, v or o."""
        return t[None, None, head, sequence]

    def pack(self, t: cute.Tensor, heads_kv) -> cute.Tensor:
        """q or o, (s, d, h, b), with the heads that share a K/V head beside the rows: ((ratio, s), d, h_kv, b)."""
        (s, d, heads, b), (ds, dd, dh, db) = t.shape, t.stride
        ratio = heads // heads_kv
        layout = cute.make_layout(((ratio, s), d, heads_kv, b), stride=((dh, ds), dd, dh * ratio, db))
        return cute.make_tensor(t.iterator, layout)

    def packed_heads(self, t: cute.Tensor, head_kv, ratio, sequence) -> cute.Tensor:
        """Of `pack`'s tensor the rows of a K/V head's queries of one sequence: ((ratio, s), d)."""
        return t[None, None, head_kv, sequence]

    def ratio(self, t: cute.Tensor, gmem: Gmem):
        """Query heads per K/V head, of q or o as `pack` makes it."""
        return t.shape[0][0]

    def lse_layout(self, mQ: cute.Tensor, rows, sequences):
        _, _, heads, batch = mQ.shape
        return cute.make_layout((batch, heads, rows), stride=(Int64(heads) * rows, Int64(rows), 1))

    def grid(self, counts, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, sequences) -> Grid:
        """counts: of rows, of heads, and how many of these share a K/V head."""
        c = self.config
        (rows, heads, ratio), seqlen_k, batch = counts, mK.shape[0], mQ.shape[3]
        group = cutlass.max(L2_KV_BYTES // (Int64(seqlen_k) * (2 * (c.head_dim + c.d_v))) * ratio, 1)
        m_blocks = cute.ceil_div(rows, c.tile_m * c.cluster)
        return Grid(Int32(m_blocks), Int32(heads), Int32(batch), Int32(group))

    def clusters(self, grid: Grid, room):
        """Clusters to launch, of which the GPU holds so many at once."""
        return self.config.scheduler.grid(grid, room)

    def first(self, problem: Problem):
        """Where this CTA begins in the order of tiles."""
        return cute.arch.block_idx()[0] // self.config.cluster_size

    def decode(self, index, problem: Problem) -> Tile:
        """The tile of this CTA, its cluster's first or second."""
        c, tile = self.config, self.config.scheduler.decode(index, problem.grid)
        return tile._replace(m_block=tile.m_block * c.cluster + rank()) if c.cluster > 1 else tile

    def upcoming(self, index, gmem: Gmem, problem: Problem):
        clusters = cute.arch.grid_dim()[0] // self.config.cluster_size
        return self.config.scheduler.upcoming(index, problem.grid, gmem.tile_counter, clusters)

    def of_tile(self, tile: Tile):
        """What says to `head` where the tile's queries are, and where its keys."""
        return tile.batch, tile.batch

    def of_output(self, tile: Tile, problem: Problem):
        """And where its rows of o are."""
        return self.of_tile(tile)[0]

    def problem_of(self, tile: Tile, problem: Problem) -> Problem:
        """With the lengths of the tile's own sequence, and what the mask needs to know of it."""
        return self.with_mask(problem, tile.batch, Int32(0), Int32(0))

    def with_mask(self, problem: Problem, batch, start_q, start_k) -> Problem:
        mask = self.config.mask
        return problem._replace(of_mask=mask.own(problem, batch, start_q, start_k)) if mask.of_tile else problem

    def load_q(self, load, tile: Tile, q_state):
        """Each warpgroup's rows of a tile."""
        blocks = self.config.row_blocks
        for wg in range(blocks):
            load(tile.m_block * blocks + wg, wg + blocks * q_state.index, q_state)

    @cute.jit
    def store_row(self, t: cute.Tensor, w: Warpgroup, tile: Tile, query, head, value):
        """A row's number, by one of the four threads that hold it, where it is asked for."""
        if (w.frag.thread % 4 == 0) & (query < t.shape[2]):
            t[tile.batch, head, query] = value


class Varlen(Dense):
    """FlashAttention's varlen: q, o (total_q, h, d) and k, v (total_k, h_kv, d). A tile is of one sequence."""

    reads = True

    def view(self, t: cute.Tensor) -> cute.Tensor:
        return ragged(t)

    def head(self, t: cute.Tensor, head, sequence: SeqlenInfo) -> cute.Tensor:
        if cute.rank(t) == 3:  # o, stored from registers
            return cute.domain_offset((sequence.start, 0), t[None, None, head])
        return rows_of(t, head, sequence)

    def pack(self, t: cute.Tensor, heads_kv) -> cute.Tensor:
        """((h, total), d, y, z): TMA has no sixth dimension for the K/V head, so its first head is an offset."""
        return ragged_heads(t)

    def packed_heads(self, t: cute.Tensor, head_kv, ratio, sequence: SeqlenInfo) -> cute.Tensor:
        """Beyond its heads lie the next K/V head's: loaded as rows that are nobody's, and never stored by TMA."""
        return heads_of(t, head_kv * ratio, sequence)

    def ratio(self, t: cute.Tensor, gmem: Gmem):
        return t.shape[0][0] // gmem.k.tensor.shape[2]

    def lse_layout(self, mQ: cute.Tensor, rows, sequences):
        return cute.make_layout((mQ.shape[2], rows), stride=(Int64(rows), 1))

    def grid(self, counts, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, sequences) -> VarlenGrid:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch = sequences
        total_q, total_k = mQ.shape[0], mK.shape[0]
        _, heads, ratio = counts
        q, k = Seqlens(cu_seqlens_q, seqused_q, Int32(total_q)), Seqlens(cu_seqlens_k, seqused_k, Int32(total_k))
        l2_rows = Int32(L2_KV_BYTES // (2 * (self.config.head_dim + self.config.d_v)))
        return VarlenGrid(q, k, Int32(heads), batch, Int32(ratio), l2_rows)

    @property
    def _queries(self) -> int:
        """Of a tile."""
        return self.config.tile_m // self.config.pack

    def clusters(self, grid: VarlenGrid, room):
        return self.config.scheduler.grid(grid, room, self._queries)

    def first(self, problem: Problem):
        return self.config.scheduler.first(cute.arch.block_idx()[0], problem.grid, self._queries)

    def decode(self, place, problem: Problem) -> VarlenTile:
        return self.config.scheduler.decode(place, problem.grid, self._queries)

    def upcoming(self, place, gmem: Gmem, problem: Problem):
        ctas = cute.arch.grid_dim()[0]
        return self.config.scheduler.upcoming(place, problem.grid, gmem.tile_counter, ctas, self._queries)

    def of_tile(self, tile: VarlenTile):
        return SeqlenInfo(tile.start_q, tile.seqlen_q), SeqlenInfo(tile.start_k, tile.seqlen_k)

    def problem_of(self, tile: VarlenTile, problem: Problem) -> Problem:
        own = problem._replace(seqlen_q=tile.seqlen_q, seqlen_k=tile.seqlen_k)
        return self.with_mask(own, tile.batch, tile.start_q, tile.start_k)

    @cute.jit
    def load_q(self, load: cutlass.Constexpr, tile: VarlenTile, q_state):
        """In a loop that stays one: unrolled, with five coordinates, ptxas spills at d128 causal."""
        blocks = self.config.row_blocks
        for wg in cutlass.range(blocks, unroll=1):
            load(tile.m_block * blocks + wg, wg + blocks * q_state.index, q_state)

    @cute.jit
    def store_row(self, t: cute.Tensor, w: Warpgroup, tile: VarlenTile, query, head, value):
        rows = cutlass.min(tile.seqlen_q, t.shape[1])
        if (w.frag.thread % 4 == 0) & (query < rows):
            t[head, tile.start_q + query] = value
