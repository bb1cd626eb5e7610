"""FlashAttention-3 forward (arXiv:2407.08608): a TMA producer warp, and warpgroups that own 64 query rows each.

Launch order only: tensors to TMA atoms and tiled MMAs, shared memory and pipelines, then the two roles.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from .combine import Combine
from .config import MODES, FwdConfig
from .epilogue import Epilogue
from .mainloop import Overlapped, Serial
from .parts import parts_of
from .ping_pong import WARPGROUP
from .producer import CachedProducer, Producer
from .softmax import LOG2_E
from .state import (
    ELEMENT,
    ROWS,
    Gmem,
    Pipes,
    Problem,
    Smem,
    Tiling,
    Warpgroup,
    address,
    cluster_sync,
    consume,
    nth,
)
from .tile_scheduler import ClusterBroadcast

TINY = 1.401298464324817e-45  # the least float32: times a hidden score's -inf it is still -inf, not NaN


class FlashFwdSm90:
    """One forward kernel, as its config says; `__call__` is what the host compiles and calls."""

    def __init__(self, config: FwdConfig):
        self.config, self.dtype, self.parts = config, ELEMENT[config.dtype], parts_of(config)
        self.producer = (CachedProducer if config.cache else Producer)(config, self.parts)
        self.mainloop = (Overlapped if config.overlap else Serial)(config, self.parts)
        self.epilogue = Epilogue(config, self.parts)
        self.combine = Combine(config, self.parts) if config.shares and not config.fixup else None

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (b, h, s_q, d) or (b, s_q, h, d), as the layout says; mO alike, of d_v
        mK: cute.Tensor,  # (b, h_kv, s_k, d) or (b, s_k, h_kv, d); mV alike, of d_v
        mV: cute.Tensor,
        mO: cute.Tensor,
        lse: Int64,  # address of (b, h, s_q) float32, row-major; 0: not asked for
        tile_counter: Int64,  # address of an int32, zeroed once by the host
        scale: Float32,
        num_sms: Int32,
        stream: cuda.CUstream,
        *extras,  # what the parts take, in the order of `state.Arguments`
    ):
        """Mode order, TMA atoms, tiled MMAs, grid, launch."""
        c, args = self.config, self.config.divide(extras)
        mQ, mK, mV, mO = [
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=MODES[layout]))
            for t, layout in ((mQ, c.layout), (mK, c.layout_kv), (mV, c.layout_kv), (mO, c.layout))
        ]  # (s, d, h, b); of a cache (row, d, h, page)
        tiling = self._tiling()
        lse_rows = mQ.shape[0] if lse != 0 else 0
        lse_layout = self.parts.sequences.lse_layout(mQ, lse_rows, args.sequences)
        mLSE = cute.make_tensor(address(Float32, lse), lse_layout)
        gmem = Gmem(*self._tma(mQ, mK, mV, mO, tiling, args), mLSE, cute.make_tensor(address(Int32, tile_counter), 1))
        counts = self.parts.rows.counts(mQ, mK)
        grid = self.parts.sequences.grid(counts, mQ, mK, mV, args.sequences)
        q_sign = Float32(1.0 if scale > 0.0 else (-1.0 if scale < 0.0 else 0.0))
        scale_log2 = cutlass.max(scale * q_sign * LOG2_E, Float32(TINY)) if scale != 0.0 else Float32(1.0)
        sizes = Int32(mQ.shape[0]), Int32(mK.shape[0]), Int32(counts[2])
        problem = Problem(grid, *sizes, scale_log2, q_sign, args._replace(sequences=()))
        self.kernel.set_name_prefix(c.name, keep_mangled_name=False)
        clusters = self.parts.sequences.clusters(grid, num_sms // c.cluster)
        self.kernel(gmem, problem, tiling).launch(
            grid=(clusters * c.cluster_size, 1, 1),
            block=(c.threads, 1, 1),
            cluster=(c.cluster_size, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=c.ctas_per_sm,
            preferred_smem_carveout=100 if c.ctas > 1 else None,  # or the DSL asks a GPU how much two need
        )
        if cutlass.const_expr(self.combine is not None):
            self.combine.launch(gmem, problem, tiling, clusters, stream)

    def _tma(self, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mO: cute.Tensor, tiling: Tiling, args) -> tuple:
        """Of q, k, v and o; o itself where it is stored from registers."""
        c, rows, kv = self.config, self.parts.rows, self.parts.kv
        q, k, v, o = (cute.select(s, mode=[0, 1]) for s in (tiling.sQ, tiling.sK, tiling.sV, tiling.sO))
        k_unit, v_unit = kv.units(args.sequences)
        g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        return (
            rows.tma(g2s, mQ, mK, q, c.head_dim),
            kv.tma(mK, k, c.head_dim, k_unit),
            kv.tma(mV, v, c.columns_v, v_unit),
            rows.tma(s2g, mO, mK, o, c.d_v) if c.stages_o else mO,
        )

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
            smem(c.tile_n, c.columns_v, c.head_dim_splits * c.stages),
        )

    @cute.kernel
    def kernel(self, gmem: Gmem, problem: Problem, tiling: Tiling):
        """Allocate, then split into one producer warpgroup and the MMA warpgroups."""
        c = self.config
        registers = c.registers
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for tma in (gmem.q, gmem.k, gmem.v):
                if cutlass.const_expr(tma.atom is not None):
                    cpasync.prefetch_descriptor(tma.atom)
        smem, pipes = self._allocate(tiling)
        cluster_sync(c.cluster_size)
        first = 4 * c.warpgroups if c.producer_last else 0  # the producer's warp
        if warp >= first if c.producer_last else warp < 4:
            if cutlass.const_expr(registers):
                cute.arch.setmaxregister_decrease(registers[0])
            if warp == first:
                self.producer.load(gmem, smem, pipes, problem)
            if cutlass.const_expr(c.producer_warps > 1):
                if (warp > first) & (warp < first + c.producer_warps):
                    self.producer.help(gmem, smem, pipes, problem, warp - first)
            self.parts.split.loaded()
        else:
            if cutlass.const_expr(registers):
                cute.arch.setmaxregister_increase(registers[1])
            self.mma(gmem, smem, pipes, problem, tiling)
        if cutlass.const_expr(c.cluster > 1):
            cluster_sync(c.cluster_size)  # a peer may still write here

    def _allocate(self, tiling: Tiling):
        c = self.config
        alloc = SmemAllocator()
        q = alloc.allocate_tensor(self.dtype, tiling.sQ.outer, 1024, tiling.sQ.inner)
        k = alloc.allocate_tensor(self.dtype, tiling.sK.outer, 1024, tiling.sK.inner)
        v = alloc.allocate_tensor(self.dtype, tiling.sV.outer, 1024, tiling.sV.inner)
        o = alloc.allocate_tensor(self.dtype, tiling.sO.outer, 1024, tiling.sO.inner) if c.stages_o else None
        partials, counts = self.parts.split.allocate(alloc), self.parts.trace.allocate(alloc)
        tile = alloc.allocate_tensor(Int32, cute.make_layout((len(self.parts.blocks.tile_type._fields), 2)), 16)
        broadcast = ClusterBroadcast.create(alloc) if c.cluster > 1 and c.scheduler.dynamic else None
        return Smem(q, k, v, o, partials, counts, tile, broadcast), self._pipes(alloc)

    def _pipes(self, alloc: SmemAllocator) -> Pipes:
        c = self.config

        def group(n):
            return pipeline.CooperativeGroup(pipeline.Agent.Thread, n)

        def ring(stages, rows, d, cluster=1, arrivals=1):
            return pipeline.PipelineTmaAsync.create(
                barrier_storage=alloc.allocate_array(Int64, 2 * stages),
                num_stages=stages,
                producer_group=group(arrivals),
                consumer_group=group(4 * c.warpgroups * cluster),
                tx_count=rows * d * self.dtype.width // 8,
                cta_layout_vmnk=cute.make_layout((1, cluster, 1, 1)),
            )

        tiles = pipeline.PipelineAsync.create(
            barrier_storage=alloc.allocate_array(Int64, 4),
            num_stages=2,
            producer_group=group(1),
            consumer_group=group(
                WARPGROUP * c.warpgroups + 32 * (c.producer_warps - 1)
            ),  # each reader arrives for itself: racecheck sees that
        )
        q_ring = ring(c.q_stages, c.tile_m, c.head_dim)
        kv, dims = self.parts.kv, (c.head_dim, c.d_v)
        kv_rings = (kv.ring(ring(c.stages, c.tile_n, d, c.cluster, kv.arrivals)) for d in dims)
        return Pipes(q_ring, *kv_rings, tiles)

    @cute.jit
    def mma(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem, tiling: Tiling):
        """Run by each MMA warpgroup on its own 64 rows. Waits for full Q, K, V stages and releases them."""
        c = self.config
        f = self.mainloop.fragments(smem, tiling, problem)
        kv_state, done = nth(Int32(0), c.stages), Int32(0)  # tiles
        self.mainloop.turns.start(f.wg)
        tile = consume(smem, pipes, nth(done, 2), self.parts.blocks.tile_type)
        while tile.valid:
            w = Warpgroup(gmem, smem, pipes, tiling, self.parts.sequences.problem_of(tile, problem), f)
            q_state = nth(done, c.q_stages)
            row0 = self.epilogue.row0(w, tile)
            blocks = self.parts.blocks.range(tile, w.problem)
            pipes.q.consumer_wait(q_state)
            if self.parts.rows.query(row0) < w.problem.seqlen_q:
                kv_state = self.mainloop.tile(
                    w, self.mainloop.of_rows(tile, row0, w.problem), blocks, q_state, kv_state
                )
                self.epilogue.finish(w, tile)
            else:
                kv_state = self.mainloop.skip_tile(w, blocks, kv_state)
                pipes.q.consumer_release(q_state)
            done += 1
            tile = consume(smem, pipes, nth(done, 2), self.parts.blocks.tile_type)
        self.mainloop.turns.finish(f.wg)
        cute.arch.cp_async_bulk_wait_group(0, read=True)
