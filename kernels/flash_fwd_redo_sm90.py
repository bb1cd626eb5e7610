"""Where the softmax weighs most: a step takes the rows' offsets as they are, and questions them by the sums of P.

A sum that is too large, which is rare, has S multiplied once more and the step redone with a maximum; K's stage is held
until then. So nothing but arithmetic stands between S and P: no signs to look at, no vote to wait for.
"""

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warp

from .flash_fwd_sm90 import ROWS, At, FlashFwdSm90, Frag, Warpgroup
from .layout import acc_mn, scale_rows
from .softmax import LARGEST_SUM, Exponents


class FlashFwdRedoSm90(FlashFwdSm90):
    """Questions asked after the exponentials, not before."""

    @cute.jit
    def _softmax(self, w: Warpgroup, acc_S, q_state, k_state, at, edge: cutlass.Constexpr):
        softmax, S = w.frag.softmax, acc_mn(acc_S)  # (rows, cols)
        if cutlass.const_expr(edge):
            w.pipes.k.consumer_release(k_state)
            self._score(w, S, at)
            self._masked_softmax(w, S, at)
        else:
            sums, redo = softmax.quick_step(S, LARGEST_SUM[self.config.dtype], self._exponents(w, S, at))
            self._wait_for_pv(w)
            if redo:
                self._qk_again(w, acc_S, q_state, k_state)
                self._score(w, S, at)
                softmax.renew_any(S, self.slack)
                softmax.exp(S)
                scale_rows(w.frag.acc_O, softmax.rescale)
                sums.fill(0.0)
            softmax.add(sums)
            w.pipes.k.consumer_release(k_state)

    def _exponents(self, w: Warpgroup, S, at: At) -> Exponents:
        """What makes P's exponents of S."""
        return Exponents(w.frag.softmax.scale_log2)

    def _settle(self, f: Frag):
        """A row that has seen no key keeps its offset of -inf, and its next step is redone."""

    @cute.jit
    def _qk_again(self, w: Warpgroup, acc_S, q_state, k_state):
        """S, by a warp on its own: mma.sync's accumulators lie as WGMMA's do (PTX ISA, Matrix Fragments)."""
        c, f = self.config, w.frag
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)), (4, 1, 1))
        thread = cute.arch.shuffle_sync_bfly(f.thread, 0)  # opaque, or ptxas holds addresses in registers
        thr = mma.get_slice(thread)
        read_q = self._ldmatrix(4, cute.make_tiled_copy_A, mma, thread)
        read_k = self._ldmatrix(2, cute.make_tiled_copy_B, mma, thread)
        sQ = cute.local_tile(w.smem.q[None, None, self._slot(f, q_state)], (ROWS, 16), (0, None))  # (64, 16, d / 16)
        sK = cute.local_tile(w.smem.k[None, None, k_state.index], (8, 16), (None, None))  # (8, 16, tile_n / 8, d / 16)
        rQ = thr.make_fragment_A(thr.partition_A(sQ[None, None, 0]))
        rK = thr.make_fragment_B(thr.partition_B(sK[None, None, 0, 0]))
        acc = cute.make_tensor(acc_S.iterator, cute.make_layout(((2, 2), 1, 1, c.tile_n // 8)))
        acc.fill(0.0)
        for k in cutlass.range_constexpr(c.head_dim // 16):
            read_q(sQ[None, None, k], rQ)
            for n in cutlass.range_constexpr(c.tile_n // 8):
                read_k(sK[None, None, n, k], rK)
                cute.gemm(mma, acc[None, None, None, n], rQ, rK, acc[None, None, None, n])
