"""How a step of the main loop makes P of S: three ways, by what a kernel asks of the running maximum."""

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warp

from .blocks import Range
from .gemms import Gemms
from .layout import acc_mn, scale_rows
from .part import Part
from .softmax import LARGEST_SUM, Constant, Exponents, Softmax
from .state import ROWS, At, Frag, Warpgroup


class Lazy(Part):
    """A running max with a margin: O is rescaled where a score exceeds it (FlashAttention-4's lazy rescaling)."""

    state = Softmax

    def __init__(self, config, blocks: Range, gemms: Gemms):
        super().__init__(config)
        self.blocks, self.gemms = blocks, gemms

    @cute.jit
    def first(self, w: Warpgroup, S, at: At):
        """S (rows, cols) of a tile's first block becomes P."""
        if self.blocks.is_partial(w, at):
            self.blocks.mask(w, S, at)
        w.frag.softmax.step(S, self.config.margin)
        if cutlass.const_expr(self.blocks.mixed):
            w.frag.softmax.set_slow()  # any step may be either

    @cute.jit
    def step(self, w: Warpgroup, acc_S, q_state, k_state, at: At, masked: cutlass.Constexpr):
        """S becomes P. Releases K, waits for PV, and O is rescaled where a row's running max has changed."""
        S = acc_mn(acc_S)  # (rows, cols)
        w.pipes.k.consumer_release(k_state)
        self.score(w, S, at)
        if cutlass.const_expr(masked):
            self.masked(w, S, at)
        else:
            self.unmasked(w, S)

    @cute.jit
    def masked(self, w: Warpgroup, S, at: At):
        """S (rows, cols) of a partial block, with a maximum."""
        f = w.frag
        self.blocks.mask(w, S, at)
        if cutlass.const_expr(self.blocks.mixed):
            self.unmasked(w, S)
        else:
            changed = f.softmax.step(S, self.config.margin)
            self.gemms.wait_for_pv(w)
            if changed:
                scale_rows(f.acc_O, f.softmax.rescale)

    @cute.jit
    def unmasked(self, w: Warpgroup, S):
        """S (rows, cols) becomes P by the running maxima as they are, but where a score exceeds one."""
        f = w.frag
        if f.softmax.slow[0] != 0:
            f.softmax.renew_any(S, self.config.margin)
            f.softmax.set_slow()
            self.gemms.wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        elif f.softmax.exponents(S):
            f.softmax.raise_running_max(S, self.config.margin)
            self.gemms.wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        f.softmax.exp(S)
        self.gemms.wait_for_pv(w)

    def score(self, w: Warpgroup, S, at: At):
        """Where S (rows, cols), Q K^T, becomes what the softmax is of, but for a factor."""
        self.config.score.apply(S, w.frag.cS, at, self.config.tile_n, w.problem, w.problem.args.score)

    def set_slow(self, f: Frag):
        """Between the steps that mask and those that do not."""
        f.softmax.set_slow()


class LazyWithScores(Lazy):
    """With registers enough to keep S until its exponents are known to do: a split merges no row that lost its S."""

    @cute.jit
    def unmasked(self, w: Warpgroup, S):
        f, kept = w.frag, cute.make_rmem_tensor_like(S)
        kept.store(S.load())
        if f.softmax.exponents(S) | (f.softmax.slow[0] != 0):
            S.store(kept.load())
            f.softmax.renew_any(S, self.config.margin)
            f.softmax.set_slow()
            self.gemms.wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        f.softmax.exp(S)
        self.gemms.wait_for_pv(w)


class Speculative(Lazy):
    """Speculative softmax: P by the running max as it is, checked afterwards by the row sums of P alone.

    On overflow or NaN, which is rare, S is multiplied once more and the step recomputed with a maximum; K's stage is
    held until then. So nothing but arithmetic stands between S and P: no signs to look at, no vote to wait for.
    """

    @cute.jit
    def step(self, w: Warpgroup, acc_S, q_state, k_state, at: At, masked: cutlass.Constexpr):
        softmax, S = w.frag.softmax, acc_mn(acc_S)  # (rows, cols)
        if cutlass.const_expr(masked):
            w.pipes.k.consumer_release(k_state)
            self.score(w, S, at)
            self.masked(w, S, at)
        else:
            sums, overflow = softmax.quick_step(S, LARGEST_SUM[self.config.dtype], self._exponents(w, S, at))
            self.gemms.wait_for_pv(w)
            if overflow:
                self._recompute_qk(w, acc_S, q_state, k_state)
                self.score(w, S, at)
                softmax.renew_any(S, self.config.margin)
                softmax.exp(S)
                scale_rows(w.frag.acc_O, softmax.rescale)
                sums.fill(0.0)
            softmax.add(sums)
            w.pipes.k.consumer_release(k_state)

    def _exponents(self, w: Warpgroup, S, at: At) -> Exponents:
        """What makes P's exponents of S: the score's own, where it has a shorter way to them."""
        c = self.config
        own = c.score.exponents(w.frag.cS, at, c.tile_n, w.problem, w.problem.args.score)
        if own is None or (c.score.falls_from_diagonal and not c.diagonal_first):
            self.score(w, S, at)
            return Exponents(w.frag.softmax.scale_log2)
        return own

    def set_slow(self, f: Frag):
        """A row that has seen no key keeps its running max of -inf, and its next step is recomputed."""

    @cute.jit
    def _recompute_qk(self, w: Warpgroup, acc_S, q_state, k_state):
        """S, by a warp on its own: mma.sync's accumulators lie as WGMMA's do (PTX ISA, Matrix Fragments)."""
        c, f = self.config, w.frag
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.gemms.dtype, Float32, (16, 8, 16)), (4, 1, 1))
        thread = cute.arch.shuffle_sync_bfly(f.thread, 0)  # opaque, or ptxas holds addresses in registers
        thr = mma.get_slice(thread)
        read_q = self.gemms.ldmatrix(4, cute.make_tiled_copy_A, mma, thread)
        read_k = self.gemms.ldmatrix(2, cute.make_tiled_copy_B, mma, thread)
        sQ = cute.local_tile(
            w.smem.q[None, None, self.gemms.slot(f, q_state)], (ROWS, 16), (0, None)
        )  # (64, 16, d / 16)
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


class ConstantTime(Lazy):
    """The same instructions whatever the data: for inputs that are secret, and for whoever mistrusts the shorter ways.

    Every step looks for its rows' maxima and rescales O (FlashAttention-2's softmax, arXiv:2307.08691); no branch
    depends on a score. Only the polling of barriers varies, with time.
    """

    state = Constant

    @cute.jit
    def step(self, w: Warpgroup, acc_S, q_state, k_state, at: At, masked: cutlass.Constexpr):
        f, S = w.frag, acc_mn(acc_S)  # (rows, cols)
        w.pipes.k.consumer_release(k_state)
        self.score(w, S, at)
        if cutlass.const_expr(masked):
            self.blocks.mask(w, S, at)
        f.softmax.step(S, self.config.margin)
        self.gemms.wait_for_pv(w)
        scale_rows(f.acc_O, f.softmax.rescale)

    def set_slow(self, f: Frag):
        """Each step finds its rows' running maxima as they are, -inf too."""
