"""The main loop of an MMA warpgroup: its 64 rows of a tile, block after block.

A step: QK of this block and PV of the one before are issued together; softmax of this block starts when its QK is done,
beside the PV and beside the other warpgroups' GEMMs (FlashAttention-3, arXiv:2407.08608).
"""

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warpgroup

from .config import FwdConfig
from .layout import acc_as_A, acc_mn
from .parts import Parts
from .ping_pong import WARPGROUP, PingPong
from .state import ELEMENT, ROWS, At, Frag, Pipes, Problem, Rows, Smem, Tiling, Warpgroup, before, release_if
from .tile_scheduler import Tile


class Overlapped:
    """PV runs beside the next block's QK and softmax."""

    def __init__(self, config: FwdConfig, parts: Parts):
        self.config, self.parts, self.dtype = config, parts, ELEMENT[config.dtype]
        self.rows, self.blocks, self.softmax, self.weights = parts.rows, parts.blocks, parts.softmax, parts.weights
        self.head_dim, self.gemms, self.trace = parts.head_dim, parts.gemms, parts.trace
        self.turns = PingPong(config.warpgroups, config.pingpong)

    def fragments(self, smem: Smem, tiling: Tiling, problem: Problem) -> Frag:
        c = self.config
        tid = cute.arch.thread_idx()[0]
        wg, thread = cute.arch.make_warp_uniform(tid // WARPGROUP), tid % WARPGROUP
        wg = wg if c.producer_last else wg - 1
        thr, pv, qk = tiling.mma_qk.get_slice(thread), tiling.mma_pv.get_slice(0), tiling.mma_qk.get_slice(thread)
        if c.q_in_regs:
            tSrQ = cute.make_rmem_tensor(thr.partition_shape_A((ROWS, c.head_dim)), self.dtype)
        else:
            sQ = smem.q if c.q_stages > 1 else smem.q[None, None, self.head_dim.row_block(wg)]
            tSrQ = qk.make_fragment_A(qk.partition_A(sQ))  # (MMA, M, d / 16[, slots])
        tSrK = qk.make_fragment_B(qk.partition_B(smem.k))  # (MMA, N, d / 16, stages)
        sVt = cute.make_tensor(smem.v.iterator, cute.select(smem.v.layout, mode=[1, 0, 2]))  # (d_v, tile_n, stages)
        tOrV = pv.make_fragment_B(pv.partition_B(sVt))  # (MMA, N, tile_n / 16, stages)
        acc_O = cute.make_rmem_tensor(pv.partition_shape_C((ROWS, c.columns_v)), Float32)
        acc_S = self.gemms.acc_S(tiling)
        tOrP = cute.make_rmem_tensor_like(acc_as_A(acc_S), self.dtype)  # ((2, 2, 2), 1, tile_n / 16)
        cS = acc_mn(thr.partition_C(cute.make_identity_tensor((ROWS, c.tile_n))))  # (rows, cols)
        scale_log2 = c.score.scale_log2(problem, problem.args.score)  # what turns a score into an exponent of 2
        softmax = self.softmax.state.create(scale_log2, cute.size(cS, mode=[0]))
        for output in self.parts.outputs:
            softmax = output.watch(softmax)
        return Frag(wg, thread, tSrQ, tSrK, tOrV, tOrP, acc_O, softmax, cS)

    def of_rows(self, tile: Tile, row0, problem: Problem) -> Rows:
        """What is kept of a tile's rows for all of its blocks."""
        weights = self.weights.begin(tile, problem)
        score = self.config.score.begin(tile.head, tile.batch, problem.args.score)
        return Rows(row0, tile.head, tile.batch, score, weights, self.blocks.of_rows(tile))

    @cute.jit
    def tile(self, w: Warpgroup, rows: Rows, blocks, q_state, kv_state):
        """A warpgroup's 64 rows of a tile, over the walk's segments.

        kv_state is where K's next block lies; V is multiplied a block later, from the same place of its own ring.
        """
        walk = self.blocks.walk(w, rows, blocks)
        self._begin_rows(w, q_state)
        if cutlass.const_expr(walk.before is not None):
            for _ in cutlass.range(walk.before(), unroll=1):
                kv_state = self.skip_block(w, kv_state)
        at, cursor = walk.first()
        kv_state = self.first(w, q_state, kv_state, at)
        for i in cutlass.range_constexpr(len(walk.segments)):
            if cutlass.const_expr(walk.segments[i].rows_seen is not None):
                if walk.segments[i].rows_seen():
                    self.softmax.set_slow(w.frag)
            for n in cutlass.range(walk.segments[i].start, walk.segments[i].end(), unroll=1):
                at, cursor = walk.segments[i].at(n, cursor)
                kv_state = self.step(w, q_state, kv_state, at, walk.segments[i].masked)
        release_if(not self.config.q_in_regs, w.pipes.q, q_state)
        self.last(w, kv_state)
        if cutlass.const_expr(walk.after is not None):
            for _ in cutlass.range(walk.after(), unroll=1):
                kv_state = self.skip_block(w, kv_state)
        return kv_state

    def _begin_rows(self, w: Warpgroup, q_state):
        """Nothing summed yet, and Q as the tile's steps take it."""
        w.frag.softmax.reset()
        w.frag.acc_O.fill(0.0)
        self._sign_q(w, q_state)
        self._read_q(w, q_state)
        release_if(self.config.q_in_regs, w.pipes.q, q_state)

    @cute.jit
    def skip_tile(self, w: Warpgroup, blocks, kv_state):
        """A tile whose rows of this warpgroup all lie beyond the last query: the others get the tensor cores."""
        for _ in cutlass.range(blocks[1] - blocks[0] - 1, unroll=1):
            kv_state = self.skip_block(w, kv_state)
        return self._release_block(w.pipes, kv_state)

    @cute.jit
    def skip_block(self, w: Warpgroup, kv_state):
        """A block that only other warpgroups' rows see."""
        kv_state = self._release_block(w.pipes, kv_state)
        self.turns.take(w.frag.wg)
        self.turns.give(w.frag.wg)
        return kv_state

    @cute.jit
    def _release_block(self, pipes: Pipes, kv_state):
        for pipe in (pipes.k, pipes.v):
            pipe.consumer_wait(kv_state)
            pipe.consumer_release(kv_state)
        kv_state.advance()
        return kv_state

    @cute.jit
    def _sign_q(self, w: Warpgroup, q_state):
        """A scale of 0 or below, once a tile: the softmax then always sees a positive one, and needs no cases."""
        if w.problem.q_sign != 1.0:
            flat = cute.make_layout(ROWS * self.config.head_dim)  # any order serves, swizzled or not
            sQ = cute.make_tensor(w.smem.q[None, None, self.gemms.slot(w.frag, q_state)].iterator, flat)
            sharer = self.head_dim.sharer(w.frag)
            for i in cutlass.range(sharer, cute.size(flat), WARPGROUP * self.config.head_dim_splits, unroll=1):
                sQ[i] = (sQ[i].to(Float32) * w.problem.q_sign).to(self.dtype)
            cute.arch.fence_view_async_shared()
            self.head_dim.sync(w.frag.wg)

    def _read_q(self, w: Warpgroup, q_state):
        if self.config.q_in_regs:
            f = w.frag
            read = self.gemms.ldmatrix(4, cute.make_tiled_copy_A, w.tiling.mma_qk, f.thread)
            read(w.smem.q[None, None, self.gemms.slot(f, q_state)], f.tSrQ)  # (64, d)

    @cute.jit
    def first(self, w: Warpgroup, q_state, kv_state, at: At):
        """P of the first block, so that every step finds one."""
        f = w.frag
        w.pipes.k.consumer_wait(kv_state)
        acc_S = self.gemms.issue_qk(w, q_state, kv_state)
        warpgroup.wait_group(0)
        w.pipes.k.consumer_release(kv_state)
        kv_state.advance()
        S = acc_mn(acc_S)  # (rows, cols)
        self.softmax.score(w, S, at)
        self.trace.mark_of(w, "softmax")
        self.softmax.first(w, S, at)
        self.weights.apply(w, S, at)
        self._to_P(f, acc_S)
        return kv_state

    @cute.jit
    def step(self, w: Warpgroup, q_state, kv_state, at: At, masked: cutlass.Constexpr):
        """QK of this block and PV of the one before, then softmax of this block."""
        self.trace.mark_of(w, "step")
        f, pipes, v_state = w.frag, w.pipes, before(kv_state)
        pipes.k.consumer_wait(kv_state)
        self.turns.take(f.wg)
        acc_S = self.gemms.issue_qk(w, q_state, kv_state)
        pipes.v.consumer_wait(v_state)
        self.gemms.issue_pv(w, v_state)
        self.turns.give(f.wg)
        warpgroup.wait_group(self.gemms.pv_pending)
        self._softmax(w, acc_S, q_state, kv_state, at, masked)
        pipes.v.consumer_release(v_state)
        self._to_P(f, acc_S)
        kv_state.advance()
        return kv_state

    def _softmax(self, w: Warpgroup, acc_S, q_state, k_state, at: At, masked: bool):
        """S becomes P, as V is multiplied by it."""
        self.trace.mark_of(w, "softmax")
        self.softmax.step(w, acc_S, q_state, k_state, at, masked)
        self.weights.apply(w, acc_mn(acc_S), at)

    def last(self, w: Warpgroup, kv_state):
        """PV of the last block."""
        self.gemms.multiply_v(w, before(kv_state))
        self.trace.mark_of(w, "PV done")

    def _to_P(self, f: Frag, acc_S):
        P = acc_as_A(acc_S)  # ((2, 2, 2), 1, tile_n / 16)
        for k in range(cute.size(P, mode=[2])):  # by 8: a whole-tensor .to() is not cvt.rn.bf16x2 at tile_n 80
            f.tOrP[None, None, k].store(P[None, None, k].load().to(self.dtype))


class Serial(Overlapped):
    """QK, softmax and PV of a block, one after the other, then the next block's: the ladder's first stages."""

    @cute.jit
    def first(self, w: Warpgroup, q_state, kv_state, at: At):
        kv_state = Overlapped.first(self, w, q_state, kv_state, at)
        self.gemms.multiply_v(w, before(kv_state))
        return kv_state

    @cute.jit
    def step(self, w: Warpgroup, q_state, kv_state, at: At, masked: cutlass.Constexpr):
        self.trace.mark_of(w, "step")
        w.pipes.k.consumer_wait(kv_state)
        self.turns.take(w.frag.wg)
        acc_S = self.gemms.issue_qk(w, q_state, kv_state)
        self.turns.give(w.frag.wg)
        warpgroup.wait_group(0)
        self._softmax(w, acc_S, q_state, kv_state, at, masked)
        self._to_P(w.frag, acc_S)
        self.gemms.multiply_v(w, kv_state)
        kv_state.advance()
        return kv_state

    def last(self, w: Warpgroup, kv_state):
        """Nothing is left to multiply."""
