"""FlashAttention-3 forward (arXiv:2407.08608): a TMA producer warp, and warpgroups that own 64 query rows each.

A step of the main loop, per warpgroup: QK of this block and PV of the one before are issued together; softmax of this
block starts when its QK is done, beside the PV and beside the other warpgroups' GEMMs.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from . import mask as mask_ops
from .config import MODES, FwdConfig
from .layout import acc_as_A, acc_mn, normalise_rows, scale_rows
from .ping_pong import WARPGROUP, PingPong
from .softmax import SLACK_LOG2, Softmax
from .tile_scheduler import Grid, HandOver, Tile

ROWS = 64  # query rows of a warpgroup: the M of one WGMMA
OWN_BARRIER = 1  # and the next two: one named barrier per warpgroup
L2_KV_BYTES = 16 << 20  # K/V of the heads worked on at a time, of 50 MB
LOG2_E = 1.4426950408889634
TINY = 1.401298464324817e-45  # the least float32: times a hidden score's -inf it is still -inf, not NaN
ELEMENT = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


class Tma(NamedTuple):
    atom: cute.CopyAtom
    tensor: cute.Tensor


class Gmem(NamedTuple):
    q: Tma
    k: Tma
    v: Tma
    o: Tma | cute.Tensor  # cute.Tensor: (s, d, h, b), stored from registers
    lse: cute.Tensor  # (b, h, s), or (b, h, 0): not asked for; packed: (h, total), or (h, 0)
    ticket: cute.Tensor  # (1,) Int32, 0 between launches


class Smem(NamedTuple):
    q: cute.Tensor  # (64, d, warpgroups * q_stages)
    k: cute.Tensor  # (tile_n, d, stages)
    v: cute.Tensor  # (tile_n, d_v, stages)
    o: cute.Tensor | None  # (64, d_v, warpgroups)
    parts: cute.Tensor | None  # (128, d_v / 2 + 4, split - 1) float32: what the other CTAs of a split have found
    tile: cute.Tensor  # (4, 2) the tiles to do: m_block, head, batch, valid; packed: 8, `PackedTile`
    hand_over: HandOver | None  # where a cluster draws its tiles


class Pipes(NamedTuple):
    q: pipeline.PipelineAsync
    k: pipeline.PipelineAsync
    v: pipeline.PipelineAsync
    tile: pipeline.PipelineAsync


class Tiling(NamedTuple):
    """Static tiling: MLIR values, so it crosses into the kernel as an argument, never via self."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    sQ: cute.ComposedLayout  # (64, d, warpgroups * q_stages)
    sO: cute.ComposedLayout  # (64, d_v, warpgroups)
    sK: cute.ComposedLayout  # (tile_n, d, stages)
    sV: cute.ComposedLayout  # (tile_n, d_v, stages)


class Problem(NamedTuple):
    grid: Grid
    seqlen_q: Int32
    seqlen_k: Int32
    group: Int32  # query heads per K/V head
    scale_log2: Float32  # |scale| * log2(e)
    q_sign: Float32  # 1, 0 or -1: the scale's sign, applied to Q
    mask_args: tuple  # what the mask takes: a Window's left and right
    score_args: tuple  # what the score takes
    others: tuple  # what the kernel's mixins take


class Rows(NamedTuple):
    """A warpgroup's 64 query rows of a tile."""

    row0: Int32
    head: Int32
    batch: Int32
    score: tuple  # what the score keeps of them
    draws: tuple = ()  # what dropout does


class At(NamedTuple):
    """A block of scores: its rows, and which block of keys."""

    rows: Rows
    n_block: Int32


class Frag(NamedTuple):
    """What one warpgroup multiplies, and where it accumulates."""

    wg: Int32  # which one
    thread: Int32  # of its 128
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tOrV: cute.Tensor
    tOrP: cute.Tensor
    acc_O: cute.Tensor  # ((2, 2, d_v / 8), 1, 1)
    softmax: Softmax
    cS: cute.Tensor  # (rows, cols) coordinates of this thread's S


class Warpgroup(NamedTuple):
    """All that an MMA warpgroup works with, from its first tile to its last."""

    gmem: Gmem
    smem: Smem
    pipes: Pipes
    tiling: Tiling
    problem: Problem
    frag: Frag


class FlashFwdSm90:
    """One forward kernel, as its config says; `__call__` is what the host compiles and calls."""

    kind_of_softmax = Softmax

    def __init__(self, config: FwdConfig):
        self.config = config
        self.dtype = ELEMENT[config.dtype]
        self.slack = SLACK_LOG2[config.dtype]
        # GEMMs in flight beside the softmax: with four warpgroups it runs beside the others' GEMMs anyway
        self.pv_pending = 1 if config.overlap and config.warpgroups < 4 else 0
        self.turns = PingPong(config.warpgroups, config.pingpong)
        self.mask = config.mask

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (b, h, s_q, d) or (b, s_q, h, d), as the layout says; mO alike, of d_v
        mK: cute.Tensor,  # (b, h_kv, s_k, d) or (b, s_k, h_kv, d); mV alike, of d_v
        mV: cute.Tensor,
        mO: cute.Tensor,
        lse: Int64,  # address of (b, h, s_q) float32, row-major; 0: not asked for
        ticket: Int64,  # address of an int32, zeroed once by the host
        scale: Float32,
        num_sms: Int32,
        stream: cuda.CUstream,
        *extras,  # what mask, score and mixins take, in this order: `FwdConfig.signature`
    ):
        """Mode order, TMA atoms, tiled MMAs, grid, launch."""
        c = self.config
        mQ, mK, mV, mO = [
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=MODES[c.layout])) for t in (mQ, mK, mV, mO)
        ]  # (s, d, h, b)
        tiling = self._tiling()
        q, k, v, o = (cute.select(s, mode=[0, 1]) for s in (tiling.sQ, tiling.sK, tiling.sV, tiling.sO))
        g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        shared, tma = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.cluster > 1 else g2s, self._tma_view
        gmem = Gmem(
            self._rows_tma(g2s, mQ, mK, q, c.head_dim),
            Tma(*cpasync.make_tiled_tma_atom(shared, tma(mK), k, (c.tile_n, c.head_dim), num_multicast=c.cluster)),
            Tma(*cpasync.make_tiled_tma_atom(shared, tma(mV), v, (c.tile_n, c.columns_v), num_multicast=c.cluster)),
            self._rows_tma(s2g, mO, mK, o, c.d_v) if c.stages_o else mO,
            cute.make_tensor(address(Float32, lse), self._lse_layout(mQ, mQ.shape[0] if lse != 0 else 0)),
            cute.make_tensor(address(Int32, ticket), 1),
        )
        *parts, sequences = c.divide(extras)
        grid = self._grid(mQ, mK, sequences)
        q_sign = Float32(1.0 if scale > 0.0 else (-1.0 if scale < 0.0 else 0.0))
        scale_log2 = cutlass.max(scale * q_sign * LOG2_E, Float32(TINY)) if scale != 0.0 else Float32(1.0)
        sizes = Int32(mQ.shape[0]), Int32(mK.shape[0]), Int32(self._rows_and_heads(mQ, mK)[2])
        problem = Problem(grid, *sizes, scale_log2, q_sign, *parts)
        self.kernel.set_name_prefix(c.name, keep_mangled_name=False)
        clusters = self._ctas(grid, num_sms // c.cluster)
        self.kernel(gmem, problem, tiling).launch(
            grid=(clusters * c.cluster_size, 1, 1),
            block=(WARPGROUP * (1 + c.warpgroups), 1, 1),
            cluster=(c.cluster_size, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1 if c.d_v < c.head_dim else 0,  # or ptxas ignores setmaxnreg: O has few columns
        )

    def _tma_view(self, t: cute.Tensor) -> cute.Tensor:
        """q, k, v or o as TMA sees it."""
        return t

    def _rows_tma(self, op, t: cute.Tensor, mK: cute.Tensor, smem: cute.Layout, d: int) -> Tma:
        """Of q or o, by 64 rows."""
        return Tma(*cpasync.make_tiled_tma_atom(op, self._tma_view(t), smem, (ROWS, d)))

    def _lse_layout(self, mQ: cute.Tensor, rows):
        _, _, heads, batch = mQ.shape
        return cute.make_layout((batch, heads, rows), stride=(Int64(heads) * rows, Int64(rows), 1))

    def _rows_and_heads(self, mQ: cute.Tensor, mK: cute.Tensor):
        """What tiles are made of: rows, heads, and how many of these share a K/V head."""
        return mQ.shape[0], mQ.shape[2], mQ.shape[2] // mK.shape[2]

    def _grid(self, mQ: cute.Tensor, mK: cute.Tensor, sequences) -> Grid:
        c = self.config
        (rows, heads, ratio), seqlen_k, batch = self._rows_and_heads(mQ, mK), mK.shape[0], mQ.shape[3]
        group = cutlass.max(L2_KV_BYTES // (Int64(seqlen_k) * (2 * (c.head_dim + c.d_v))) * ratio, 1)
        m_blocks = cute.ceil_div(rows, c.tile_m * c.cluster)
        return Grid(Int32(m_blocks), Int32(heads), Int32(batch), Int32(group))

    def _ctas(self, grid: Grid, room):
        """Clusters to launch, of which the GPU holds so many at once."""
        return self.config.scheduler.grid(grid, room)

    def _tiling(self) -> Tiling:
        c = self.config
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM

        def mma(b_major, n, a_source):
            one = (1, 1, 1)
            return sm90.make_trivial_tiled_mma(
                self.dtype, self.dtype, K, b_major, Float32, one, (ROWS, n), a_source=a_source
            )

        q_source = rmem if c.q_in_regs else smem

        def smem(rows, d, slots):
            swizzle = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, d)
            atom = warpgroup.make_smem_layout_atom(swizzle, self.dtype)
            return cute.tile_to_shape(atom, (rows, d, slots), (0, 1, 2))

        return Tiling(
            mma(K, c.tile_n, q_source),
            mma(MN, c.columns_v, rmem),
            smem(ROWS, c.head_dim, c.row_blocks * c.q_stages),
            smem(ROWS, c.columns_v, c.warpgroups),
            smem(c.tile_n, c.head_dim, c.stages),
            smem(c.tile_n, c.columns_v, c.parts_v * c.stages),
        )

    @cute.kernel
    def kernel(self, gmem: Gmem, problem: Problem, tiling: Tiling):
        """Allocate, then split into one producer warpgroup and the MMA warpgroups."""
        c = self.config
        registers = c.registers
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for tma in (gmem.q, gmem.k, gmem.v):
                cpasync.prefetch_descriptor(tma.atom)
        smem, pipes = self._allocate(tiling)
        self._cta_sync()
        if warp < 4:
            if cutlass.const_expr(registers):
                cute.arch.setmaxregister_decrease(registers[0])
            if warp == 0:
                self.load(gmem, smem, pipes, problem)
            self._loaded()
        else:
            if cutlass.const_expr(registers):
                cute.arch.setmaxregister_increase(registers[1])
            self.mma(gmem, smem, pipes, problem, tiling)
        if cutlass.const_expr(c.cluster > 1):
            self._cta_sync()  # a peer may still write here

    def _cta_sync(self):
        if self.config.cluster_size > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def _allocate(self, tiling: Tiling):
        c = self.config
        alloc = SmemAllocator()
        q = alloc.allocate_tensor(self.dtype, tiling.sQ.outer, 1024, tiling.sQ.inner)
        k = alloc.allocate_tensor(self.dtype, tiling.sK.outer, 1024, tiling.sK.inner)
        v = alloc.allocate_tensor(self.dtype, tiling.sV.outer, 1024, tiling.sV.inner)
        o = alloc.allocate_tensor(self.dtype, tiling.sO.outer, 1024, tiling.sO.inner) if c.stages_o else None
        parts = self._allocate_parts(alloc)
        tile = alloc.allocate_tensor(Int32, cute.make_layout((len(self.kind_of_tile._fields), 2)), 16)
        hand_over = HandOver.create(alloc) if c.cluster > 1 and c.scheduler.draws else None

        def group(n):
            return pipeline.CooperativeGroup(pipeline.Agent.Thread, n)

        def ring(stages, rows, d, cluster=1):
            return pipeline.PipelineTmaAsync.create(
                barrier_storage=alloc.allocate_array(Int64, 2 * stages),
                num_stages=stages,
                producer_group=group(1),
                consumer_group=group(4 * c.warpgroups * cluster),
                tx_count=rows * d * self.dtype.width // 8,
                cta_layout_vmnk=cute.make_layout((1, cluster, 1, 1)),
            )

        tiles = pipeline.PipelineAsync.create(
            barrier_storage=alloc.allocate_array(Int64, 4),
            num_stages=2,
            producer_group=group(1),
            consumer_group=group(WARPGROUP * c.warpgroups),  # each reader arrives for itself: racecheck sees that
        )
        q_ring = ring(c.q_stages, c.tile_m, c.head_dim)
        kv_rings = (ring(c.stages, c.tile_n, d, c.cluster) for d in (c.head_dim, c.d_v))
        pipes = Pipes(q_ring, *kv_rings, tiles)
        return Smem(q, k, v, o, parts, tile, hand_over), pipes

    def _allocate_parts(self, alloc: SmemAllocator):
        return None

    @cute.jit
    def load(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem):
        """Run by warp 0. Tells the others each tile; fills empty stages: Q once, K one block ahead of V, last first."""
        q_state, k_state, v_state, t_state = self._states(pipeline.PipelineUserType.Producer)
        index, tile = self._begin(problem)
        done = Int32(0)
        while tile.valid:
            t_state = tell(smem, pipes, t_state, tile)
            head_kv, (queries, keys) = tile.head // problem.group, self._sequences(tile)
            load_q = self._tma_load(gmem, smem, pipes, "q", (tile.head, queries))
            load_k = self._tma_load(gmem, smem, pipes, "k", (head_kv, keys))
            load_v = self._tma_load(gmem, smem, pipes, "v", (head_kv, keys))
            own = self._problem_of(tile, problem)
            (first, n_max), order = self._blocks(tile, own), self._order(tile, own)
            pipes.k.producer_acquire(k_state)
            load_k(order(n_max - 1), k_state.index, k_state)
            k_state.advance()
            pipes.q.producer_acquire(q_state)
            self._load_q(load_q, tile, q_state)
            q_state.advance()
            for i in cutlass.range(1, n_max - first, unroll=1):
                pipes.k.producer_acquire(k_state)
                load_k(order(n_max - 1 - i), k_state.index, k_state)
                k_state.advance()
                pipes.v.producer_acquire(v_state)
                load_v(order(n_max - i), v_state.index, v_state)
                v_state.advance()
            pipes.v.producer_acquire(v_state)
            load_v(order(first), v_state.index, v_state)
            v_state.advance()
            index = self._upcoming(index, done, gmem, smem, problem)
            tile = self._decode(index, problem)
            done += 1
        tell(smem, pipes, t_state, tile)

    @property
    def kind_of_tile(self) -> type:
        """What the producer tells the others of a tile."""
        return self.config.scheduler.tile

    def _begin(self, problem: Problem):
        """Where this CTA begins, and its first tile; it may not touch global memory before it has waited."""
        index = self._first_index()
        tile = self._decode(index, problem)
        self._wait_for_stream()
        return index, tile

    def _wait_for_stream(self):
        """For what ran before on this stream; what comes next may set itself up."""
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

    def _first_index(self):
        return cute.arch.block_idx()[0] // self.config.cluster_size

    def _decode(self, index, problem: Problem) -> Tile:
        """The tile of this CTA, its cluster's first or second."""
        c, tile = self.config, self.config.scheduler.decode(index, problem.grid)
        return tile._replace(m_block=tile.m_block * c.cluster + rank()) if c.cluster > 1 else tile

    @cute.jit
    def _upcoming(self, index, done, gmem: Gmem, smem: Smem, problem: Problem):
        """The first CTA of a cluster asks the scheduler; the other hears of it."""
        if cutlass.const_expr(smem.hand_over is not None):
            if rank() == 0:
                index = self._ask(index, gmem, problem)
                smem.hand_over.give(index, done)
            else:
                index = smem.hand_over.take(done)
        else:
            index = self._ask(index, gmem, problem)
        return index

    def _ask(self, index, gmem: Gmem, problem: Problem):
        clusters = cute.arch.grid_dim()[0] // self.config.cluster_size
        return self.config.scheduler.upcoming(index, problem.grid, gmem.ticket, clusters)

    def _blocks(self, tile: Tile, problem: Problem):
        """The blocks of keys that this CTA multiplies for a tile, with its cluster: from, and up to but without."""
        c, rows = self.config, self.config.tile_m * self.config.cluster
        blocks = mask_ops.block_range(self.mask, tile.m_block // c.cluster * rows, rows, c.tile_n, problem)
        return blocks.first, blocks.end

    def _order(self, tile: Tile, problem: Problem):
        """Where the n-th of those blocks lies."""
        return lambda n: n

    def _loaded(self):
        """Where the producer warpgroup is done."""

    def _states(self, user):
        c = self.config
        return [pipeline.make_pipeline_state(user, n) for n in (c.q_stages, c.stages, c.stages, 2)]  # q, k, v, tile

    def _problem_of(self, tile: Tile, problem: Problem) -> Problem:
        """With the lengths of the tile's own sequence."""
        return problem

    def _sequences(self, tile: Tile):
        """What says to `_head` where the tile's queries are, and where its keys."""
        return tile.batch, tile.batch

    def _head(self, t: cute.Tensor, head, sequence) -> cute.Tensor:
        """A head's rows of one sequence, (s, d), of q, k, v or o."""
        return t[None, None, head, sequence]

    def _load_q(self, load, tile: Tile, q_state):
        """Each warpgroup's rows of a tile."""
        blocks = self.config.row_blocks
        for wg in range(blocks):
            load(tile.m_block * blocks + wg, wg + blocks * q_state.index, q_state)

    def _tma_load(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head_sequence):
        """What loads a block of one head's q, k or v into a slot."""
        c = self.config
        if name == "q":
            g = self._row_blocks(gmem.q.tensor, *head_sequence, c.head_dim)  # (64, d, blocks)
        else:
            g = self._head(getattr(gmem, name).tensor, *head_sequence)  # (s, d)
            g = cute.local_tile(g, (c.tile_n, c.d_v if name == "v" else c.head_dim), (None, 0))  # (tile_n, d, blocks)
        return self._tma_copy(gmem, smem, pipes, name, g)

    def _tma_copy(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, g: cute.Tensor):
        """What loads one of g's blocks into a slot; a cluster's CTAs each load their part of k and v."""
        tma, s, pipe = getattr(gmem, name), getattr(smem, name), getattr(pipes, name)
        cluster = 1 if name == "q" else self.config.cluster
        sT, gT = cpasync.tma_partition(
            tma.atom,
            rank() if cluster > 1 else 0,
            cute.make_layout(cluster),
            cute.group_modes(s, 0, 2),
            cute.group_modes(g, 0, 2),
        )
        share = dict(mcast_mask=cutlass.Int16((1 << cluster) - 1)) if cluster > 1 else {}

        def copy(block, slot, state):
            barrier = pipe.producer_get_barrier(state)
            cute.copy(tma.atom, gT[None, block], sT[None, slot], tma_bar_ptr=barrier, **share)

        return copy

    def _row_blocks(self, t: cute.Tensor, head, sequence, d: int) -> cute.Tensor:
        """(64, d, blocks) of a tile's head, of q or o."""
        return cute.local_tile(self._head(t, head, sequence), (ROWS, d), (None, 0))

    def _query(self, row):
        """Which one a row is of."""
        return row

    def _whose(self, row, tile: Tile, gmem: Gmem):
        """The query and the head of a row; of a row that is nobody's, a query beyond the last."""
        return row, tile.head

    @cute.jit
    def mma(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem, tiling: Tiling):
        """Run by each MMA warpgroup on its own 64 rows. Waits for full Q, K, V stages and releases them."""
        c = self.config
        f = self._fragments(smem, tiling, problem)
        kv_state, done = nth(Int32(0), c.stages), Int32(0)  # tiles
        self.turns.start(f.wg)
        tile = hear(smem, pipes, nth(done, 2), self.kind_of_tile)
        while tile.valid:
            w = Warpgroup(gmem, smem, pipes, tiling, self._problem_of(tile, problem), f)
            q_state = nth(done, c.q_stages)
            row0 = tile.m_block * c.tile_m + self._row_block(f.wg) * ROWS
            blocks = self._blocks(tile, w.problem)
            pipes.q.consumer_wait(q_state)
            if self._query(row0) < w.problem.seqlen_q:
                kv_state = self._tile(w, self._rows(tile, row0, w.problem), blocks, q_state, kv_state)
                self._finish(w, tile)
            else:
                kv_state = self._sit_out(w, blocks, kv_state)
                pipes.q.consumer_release(q_state)
            done += 1
            tile = hear(smem, pipes, nth(done, 2), self.kind_of_tile)
        self.turns.finish(f.wg)
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _row_block(self, wg):
        """Which 64 rows of a tile are a warpgroup's."""
        return wg

    def _rows(self, tile: Tile, row0, problem: Problem) -> Rows:
        return Rows(row0, tile.head, tile.batch, ())

    @cute.jit
    def _tile(self, w: Warpgroup, rows: Rows, blocks, q_state, kv_state):
        """A warpgroup's 64 rows of a tile, blocks from the last to the first: those the mask cuts, then the rest.

        kv_state is where K's next block lies; V is multiplied a block later, from the same place of its own ring.
        """
        c, f = self.config, w.frag
        own = self._own_blocks(w, rows.row0, blocks)
        self._begin_rows(w, q_state)
        for _ in cutlass.range(blocks[1] - own.end, unroll=1):
            kv_state = self._pass_over(w, kv_state)
        kv_state = self._first(w, q_state, kv_state, At(rows, own.end - 1))
        if cutlass.const_expr(c.mask.causal):  # else the mask cuts the last block only
            for n in cutlass.range(own.end - 1 - own.whole_end, unroll=1):
                kv_state = self._step(w, q_state, kv_state, At(rows, own.end - 2 - n), True)
        self._settle(f)
        for n in cutlass.range(own.whole_end - own.whole_first, unroll=1):
            kv_state = self._step(w, q_state, kv_state, At(rows, own.whole_end - 1 - n), False)
        release_if(not c.q_in_regs, w.pipes.q, q_state)
        self._last(w, kv_state)
        return kv_state

    def _begin_rows(self, w: Warpgroup, q_state):
        """Nothing summed yet, and Q as the tile's steps take it."""
        w.frag.softmax.reset()
        w.frag.acc_O.fill(0.0)
        self._sign_q(w, q_state)
        self._read_q(w, q_state)
        release_if(self.config.q_in_regs, w.pipes.q, q_state)

    def _own_blocks(self, w: Warpgroup, row0, blocks):
        """The blocks that these 64 rows need, of those that the CTA multiplies."""
        return mask_ops.block_range(self.mask, row0, ROWS, self.config.tile_n, w.problem)

    def _finish(self, w: Warpgroup, tile: Tile):
        self.epilogue(w, tile)

    @cute.jit
    def _sit_out(self, w: Warpgroup, blocks, kv_state):
        """A tile whose rows of this warpgroup all lie beyond the last query: the others get the tensor cores."""
        for _ in cutlass.range(blocks[1] - blocks[0] - 1, unroll=1):
            kv_state = self._pass_over(w, kv_state)
        return self._drop(w.pipes, kv_state)

    def _fragments(self, smem: Smem, tiling: Tiling, problem: Problem) -> Frag:
        c = self.config
        tid = cute.arch.thread_idx()[0]
        wg, thread = cute.arch.make_warp_uniform(tid // WARPGROUP) - 1, tid % WARPGROUP
        qk, pv, thr = tiling.mma_qk.get_slice(0), tiling.mma_pv.get_slice(0), tiling.mma_qk.get_slice(thread)
        if c.q_in_regs:
            tSrQ = cute.make_rmem_tensor(thr.partition_shape_A((ROWS, c.head_dim)), self.dtype)
        else:
            sQ = smem.q if c.q_stages > 1 else smem.q[None, None, self._row_block(wg)]
            tSrQ = qk.make_fragment_A(qk.partition_A(sQ))  # (MMA, M, d / 16[, slots])
        tSrK = qk.make_fragment_B(qk.partition_B(smem.k))  # (MMA, N, d / 16, stages)
        sVt = cute.make_tensor(smem.v.iterator, cute.select(smem.v.layout, mode=[1, 0, 2]))  # (d_v, tile_n, stages)
        tOrV = pv.make_fragment_B(pv.partition_B(sVt))  # (MMA, N, tile_n / 16, stages)
        acc_O = cute.make_rmem_tensor(pv.partition_shape_C((ROWS, c.columns_v)), Float32)
        acc_S = self._acc_S(tiling)
        tOrP = cute.make_rmem_tensor_like(acc_as_A(acc_S), self.dtype)  # ((2, 2, 2), 1, tile_n / 16)
        cS = acc_mn(thr.partition_C(cute.make_identity_tensor((ROWS, c.tile_n))))  # (rows, cols)
        softmax = self.kind_of_softmax.create(self._scale_log2(problem), cute.size(cS, mode=[0]))
        return Frag(wg, thread, tSrQ, tSrK, tOrV, tOrP, acc_O, softmax, cS)

    def _scale_log2(self, problem: Problem):
        """What turns a score into an exponent of 2."""
        return problem.scale_log2

    def _acc_S(self, tiling: Tiling):
        return cute.make_rmem_tensor(tiling.mma_qk.get_slice(0).partition_shape_C((ROWS, self.config.tile_n)), Float32)

    def _slot(self, f: Frag, q_state):
        """Where this warpgroup's part of a Q stage lies."""
        return self._row_block(f.wg) + self.config.row_blocks * q_state.index

    @cute.jit
    def _sign_q(self, w: Warpgroup, q_state):
        """A scale of 0 or below, once a tile: the softmax then always sees a positive one, and needs no cases."""
        if w.problem.q_sign != 1.0:
            flat = cute.make_layout(ROWS * self.config.head_dim)  # any order serves, swizzled or not
            sQ = cute.make_tensor(w.smem.q[None, None, self._slot(w.frag, q_state)].iterator, flat)
            for i in cutlass.range(self._sharer(w.frag), cute.size(flat), WARPGROUP * self.config.parts_v, unroll=1):
                sQ[i] = (sQ[i].to(Float32) * w.problem.q_sign).to(self.dtype)
            cute.arch.fence_view_async_shared()
            self._warpgroup_sync(w.frag.wg)

    def _sharer(self, f: Frag):
        """A thread's number among those that own its rows."""
        return f.thread

    def _read_q(self, w: Warpgroup, q_state):
        if self.config.q_in_regs:
            f = w.frag
            read = self._ldmatrix(4, cute.make_tiled_copy_A, w.tiling.mma_qk, f.thread)
            read(w.smem.q[None, None, self._slot(f, q_state)], f.tSrQ)  # (64, d)

    def _ldmatrix(self, matrices: int, tiled_copy, mma, thread):
        """What reads an operand of `mma` from shared memory into a thread's registers."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=matrices), self.dtype)
        copy = tiled_copy(atom, mma).get_slice(thread)
        return lambda s, r: cute.copy(copy, copy.partition_S(s), copy.retile(r))

    @cute.jit
    def _pass_over(self, w: Warpgroup, kv_state):
        """A block that only later warpgroups' rows see."""
        kv_state = self._drop(w.pipes, kv_state)
        self.turns.take(w.frag.wg)
        self.turns.give(w.frag.wg)
        return kv_state

    @cute.jit
    def _drop(self, pipes: Pipes, kv_state):
        for pipe in (pipes.k, pipes.v):
            pipe.consumer_wait(kv_state)
            pipe.consumer_release(kv_state)
        kv_state.advance()
        return kv_state

    @cute.jit
    def _first(self, w: Warpgroup, q_state, kv_state, at: At):
        """P of the last block, so that every step finds one."""
        f = w.frag
        w.pipes.k.consumer_wait(kv_state)
        acc_S = self._issue_qk(w, q_state, kv_state)
        warpgroup.wait_group(0)
        w.pipes.k.consumer_release(kv_state)
        kv_state.advance()
        S = acc_mn(acc_S)  # (rows, cols)
        self._score(w, S, at)
        self._begin_softmax(w, S, at)
        self._to_P(f, acc_S)
        return kv_state

    @cute.jit
    def _begin_softmax(self, w: Warpgroup, S, at: At):
        """S (rows, cols) of a tile's first block becomes P."""
        if self._cut(w, at):
            self._mask(w, S, at)
        w.frag.softmax.step(S, self.slack)

    def _score(self, w: Warpgroup, S, at: At):
        """Where S (rows, cols), Q K^T, becomes what the softmax is of, but for a factor."""

    def _cut(self, w: Warpgroup, at: At):
        """Whether the mask hides a key of this block from any of these 64 rows."""
        return mask_ops.cuts(self.mask, at.rows.row0, ROWS, at.n_block, self.config.tile_n, w.problem)

    @cute.jit
    def _step(self, w: Warpgroup, q_state, kv_state, at: At, edge: cutlass.Constexpr):
        """QK of this block and PV of the one before, then softmax of this block. edge: the mask may cut it."""
        f, pipes, v_state = w.frag, w.pipes, before(kv_state)
        pipes.k.consumer_wait(kv_state)
        self.turns.take(f.wg)
        acc_S = self._issue_qk(w, q_state, kv_state)
        pipes.v.consumer_wait(v_state)
        self._issue_pv(w, v_state)
        self.turns.give(f.wg)
        warpgroup.wait_group(self.pv_pending)
        self._softmax(w, acc_S, q_state, kv_state, at, edge)
        pipes.v.consumer_release(v_state)
        self._to_P(f, acc_S)
        kv_state.advance()
        return kv_state

    @cute.jit
    def _softmax(self, w: Warpgroup, acc_S, q_state, k_state, at: At, edge: cutlass.Constexpr):
        """S becomes P. Releases K, waits for PV, and O follows where a row's offset has changed."""
        S = acc_mn(acc_S)  # (rows, cols)
        w.pipes.k.consumer_release(k_state)
        self._score(w, S, at)
        if cutlass.const_expr(edge):
            self._masked_softmax(w, S, at)
        else:
            self._exponentials(w, S)

    @cute.jit
    def _exponentials(self, w: Warpgroup, S):
        """S (rows, cols) becomes P by the offsets as they are, but where a score exceeds one."""
        f = w.frag
        if f.softmax.slow[0] != 0:
            f.softmax.renew_any(S, self.slack)
            f.softmax.settle()
            self._wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        elif f.softmax.exponents(S):
            f.softmax.raise_offsets(S, self.slack)
            self._wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        f.softmax.exp(S)
        self._wait_for_pv(w)

    @cute.jit
    def _masked_softmax(self, w: Warpgroup, S, at: At):
        """S (rows, cols) of a block that the mask may cut, with a maximum."""
        f = w.frag
        self._mask(w, S, at)
        changed = f.softmax.step(S, self.slack)
        self._wait_for_pv(w)
        if changed:
            scale_rows(f.acc_O, f.softmax.rescale)

    def _wait_for_pv(self, w: Warpgroup):
        if self.pv_pending:
            warpgroup.wait_group(0)

    def _settle(self, f: Frag):
        """Between the steps that mask and those that do not."""
        f.softmax.settle()

    def _last(self, w: Warpgroup, kv_state):
        self._multiply_v(w, before(kv_state))

    @cute.jit
    def _multiply_v(self, w: Warpgroup, v_state):
        """PV with nothing beside it."""
        w.pipes.v.consumer_wait(v_state)
        self._issue_pv(w, v_state)
        warpgroup.wait_group(0)
        w.pipes.v.consumer_release(v_state)

    def _issue_qk(self, w: Warpgroup, q_state, k_state):
        f, acc_S = w.frag, self._acc_S(w.tiling)
        tSrQ = f.tSrQ if cute.rank(f.tSrQ) == 3 else f.tSrQ[None, None, None, self._slot(f, q_state)]
        issue(w.tiling.mma_qk, acc_S, tSrQ, f.tSrK[None, None, None, k_state.index], False)
        return acc_S

    def _issue_pv(self, w: Warpgroup, v_state):
        f = w.frag
        issue(w.tiling.mma_pv, f.acc_O, f.tOrP, f.tOrV[None, None, None, v_state.index], True)

    def _mask(self, w: Warpgroup, S, at: At):
        mask_ops.apply(self.mask, S, w.frag.cS, at.rows.row0, at.n_block * self.config.tile_n, w.problem)
        self.mask.hide(S, w.frag.cS, at, self.config.tile_n, w.problem)

    def _to_P(self, f: Frag, acc_S):
        P = acc_as_A(acc_S)  # ((2, 2, 2), 1, tile_n / 16)
        for k in range(cute.size(P, mode=[2])):  # by 8: a whole-tensor .to() is not cvt.rn.bf16x2 at tile_n 80
            f.tOrP[None, None, k].store(P[None, None, k].load().to(self.dtype))

    @cute.jit
    def epilogue(self, w: Warpgroup, tile: Tile):
        """O and LSE of this warpgroup's rows. No other warpgroup is waited for."""
        c, f = self.config, w.frag
        lse, seen = self._totals(w, tile)
        normalise_rows(f.acc_O, f.softmax.rescale, seen)
        rO = cute.make_rmem_tensor_like(f.acc_O, self.dtype)
        rO.store(f.acc_O.load().to(self.dtype))
        if cutlass.const_expr(c.stages_o):
            self._store_by_tma(w, rO, tile)
        else:
            self._store(w, rO, tile)
        for r in cutlass.range_constexpr(cute.size(lse)):
            self._store_lse(w, tile, tile.m_block * c.tile_m + self._row_block(f.wg) * ROWS + f.cS[r, 0][0], lse[r])

    @cute.jit
    def _store_lse(self, w: Warpgroup, tile: Tile, row, lse):
        """A row's, by one of the four threads that hold it, where it is asked for."""
        if (w.frag.thread % 4 == 0) & (row < w.gmem.lse.shape[2]):
            w.gmem.lse[tile.batch, tile.head, row] = lse

    def _totals(self, w: Warpgroup, tile: Tile):
        """The rows' natural-log sums, and those of the keys that they saw; softmax.rescale normalises O."""
        lse = w.frag.softmax.finish(self.slack)
        return lse, lse

    @cute.jit
    def _store_by_tma(self, w: Warpgroup, rO: cute.Tensor, tile: Tile):
        """Through shared memory: TMA writes whole rows, and none beyond the last query."""
        c, f = self.config, w.frag
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, w.tiling.mma_pv).get_slice(f.thread)
        sO = w.smem.o[None, None, f.wg]  # (64, d_v)
        if f.thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # the tile before has left sO
        self._warpgroup_sync(f.wg)
        cute.copy(copy, copy.retile(rO), copy.partition_D(sO))
        cute.arch.fence_view_async_shared()
        self._warpgroup_sync(f.wg)
        if f.thread // 32 == 0:
            g = self._row_blocks(w.gmem.o.tensor, tile.head, self._sequences(tile)[0], c.d_v)  # (64, d_v, blocks)
            g = g[None, None, tile.m_block * c.warpgroups + f.wg]  # (64, d_v)
            sT, gT = cpasync.tma_partition(
                w.gmem.o.atom, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(g, 0, 2)
            )
            cute.copy(w.gmem.o.atom, sT, gT)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _store(self, w: Warpgroup, rO: cute.Tensor, tile: Tile):
        """From registers, 16 bytes a thread at a time, so that Q's place is free for the next tile's Q."""
        c, f = self.config, w.frag
        words = cute.recast_tensor(rO, Int32)  # ((1, 2, d_v / 8), 1, 1)
        row0 = tile.m_block * c.tile_m + self._row_block(f.wg) * ROWS
        for r in cutlass.range_constexpr(2):
            query, head = self._whose(row0 + f.cS[r, 0][0], tile, w.gmem)
            g = self._head(w.gmem.o, head, self._sequences(tile)[0])  # (s, d_v)
            for n in cutlass.range_constexpr(0, c.columns_v // 8, 4):
                x = quad_transpose([words[(0, r, n + i), 0, 0] for i in range(4)], f.thread)
                col = self._first_column(f.wg) + n * 8 + f.thread % 4 * 8
                if (query < w.problem.seqlen_q) & (col < w.gmem.o.shape[1]):
                    at = g.iterator + cute.crd2idx((query, col), g.layout)
                    to = cute.make_tensor(cute.make_ptr(Int32, at.toint(), cute.AddressSpace.gmem, assumed_align=16), 4)
                    out = cute.make_rmem_tensor(4, Int32)
                    for i in cutlass.range_constexpr(4):
                        out[i] = x[i]
                    to.store(out.load())

    def _first_column(self, wg):
        """Of V and O, a warpgroup's."""
        return 0

    def _warpgroup_sync(self, wg):
        cute.arch.barrier(barrier_id=OWN_BARRIER + wg, number_of_threads=WARPGROUP)


@cute.jit
def tell(smem: Smem, pipes: Pipes, state, tile: Tile):
    """The producer hands the next tile to the MMA warpgroups, decoded: divisions stay off their path."""
    pipes.tile.producer_acquire(state)
    with cute.arch.elect_one():
        for i in cutlass.range_constexpr(len(tile)):
            smem.tile[i, state.index] = Int32(tile[i])
        pipes.tile.producer_commit(state)
    state.advance()
    return state


@cute.jit
def hear(smem: Smem, pipes: Pipes, state, kind: cutlass.Constexpr) -> Tile:
    pipes.tile.consumer_wait(state)
    told = [cute.arch.make_warp_uniform(smem.tile[i, state.index]) for i in range(len(kind._fields))]
    pipes.tile.consumer_release(state)
    tile = kind(*told)
    return tile._replace(valid=tile.valid != 0)


@cute.jit
def quad_transpose(x, thread):
    """Thread t of four has x[0] to x[3]; it gets the four threads' x[t]."""
    x = list(x)
    for bit in cutlass.range_constexpr(2):
        step = 1 << bit
        high = (thread >> bit) % 2 == 1
        for i in cutlass.range_constexpr(4):
            if cutlass.const_expr(i & step == 0):
                give = x[i] if high else x[i + step]
                got = cute.arch.shuffle_sync_bfly(give, step)
                low_word, high_word = x[i], x[i + step]
                x[i] = got if high else low_word
                x[i + step] = high_word if high else got
    return x


def rank():
    """This CTA's place in its cluster."""
    return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())


def address(dtype, value: Int64):
    return cute.make_ptr(dtype, value, cute.AddressSpace.gmem, assumed_align=4)


def nth(done: Int32, stages: int):
    """A consumer's state in a ring after so many loads: one counter serves the rings that move on once a tile."""
    return pipeline.PipelineState(stages, done, done % stages, done // stages % 2)


def before(state):
    """The state a block ago."""
    state = state.clone()
    state.reverse()
    return state


def release_if(when, pipe, state):
    if when:
        pipe.consumer_release(state)


def issue(mma, acc, A, B, accumulate):
    """One asynchronous GEMM, acc (+)= A B: one commit group."""
    warpgroup.fence()
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in range(cute.size(A.shape[2])):
        cute.gemm(atom, acc, A[None, None, k], B[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
