"""What becomes of a score before its softmax. One class per way; `apply` leaves what `scale_log2` turns into exponents.

A score comes as Q K^T with the scale's sign in Q: times problem.scale_log2 it is the scaled score in units of log 2.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, Int64, cute

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
# tanh(x) / (sqrt(2) x) by powers of 2 x^2, for |x| < 1: within 6e-7 of it, the least error that five powers allow
TANH = (0.70710635, -0.11783596, 0.02347848, -0.00456134, 0.000739948, -6.7773071e-05)


class Score:
    """What holds where a way does not say otherwise."""

    name = ""

    def signature(self) -> tuple:
        """One value of each run-time argument, for its type."""
        return ()

    def scale_log2(self, problem):
        return problem.scale_log2

    def begin(self, head, batch, problem) -> tuple:
        """What a warpgroup keeps in registers for a tile."""
        return ()


@dataclass(frozen=True)
class Plain(Score):
    """As it is."""


@dataclass(frozen=True)
class Softcap(Score):
    """softcap * tanh(scaled score / softcap) (Gemma 2, arXiv:2408.00118); problem.score_args is (softcap,)."""

    exact: bool = False  # tanh by exponentials for every score, as for those above softcap: no branch depends on one
    name = "softcap"

    def signature(self) -> tuple:
        return (Float32(0.0),)

    def scale_log2(self, problem):
        return problem.score_args[0] * LOG2_E

    @cute.jit
    def apply(self, S: cute.Tensor, cS: cute.Tensor, at, tile_n: cutlass.Constexpr, problem):
        """S (rows, cols) becomes tanh of it; a warp with scores up to softcap takes a polynomial."""
        inner = problem.scale_log2 * (LN2 * SQRT2) / problem.score_args[0]
        if cutlass.const_expr(self.exact):
            self._by_exponentials(S, inner)
        else:
            bits = Int32(0)
            for i in cutlass.range_constexpr(cute.size(S)):
                x = S[i] * inner
                bits = bits | (x * x).bitcast(Int32)  # 2 x^2 < 2 where its exponent's top bit is 0
            if cute.arch.vote_any_sync(bits >= 0x40000000):
                self._by_exponentials(S, inner)
            else:
                for i in cutlass.range_constexpr(cute.size(S)):
                    x = S[i] * inner
                    S[i] = x * polynomial(x * x)

    @cute.jit
    def _by_exponentials(self, S: cute.Tensor, inner):
        """tanh(x) = 1 - 2 / (e^2x + 1): to 2e-7, and right for infinities."""
        for i in cutlass.range_constexpr(cute.size(S)):
            power = cute.math.exp2(S[i] * (inner * (SQRT2 * LOG2_E)), fastmath=True)
            S[i] = 1.0 - 2.0 * cute.arch.rcp_approx(power + 1.0)


@dataclass(frozen=True)
class Alibi(Score):
    """Less slope |i + Sk - Sq - j| (ALiBi, arXiv:2108.12409); problem.score_args: an address, and a batch's stride."""

    causal: bool = False  # no later key is seen, so the distance needs no sign
    name = "alibi"

    def signature(self) -> tuple:
        return Int64(0), Int32(0)

    def scale_log2(self, problem):
        return Float32(LOG2_E)

    def begin(self, head, batch, problem) -> tuple:
        address, stride = problem.score_args
        slopes = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4)
        return (cute.make_tensor(slopes + (Int64(batch) * stride + head), 1)[0],)

    @cute.jit
    def apply(self, S: cute.Tensor, cS: cute.Tensor, at, tile_n: cutlass.Constexpr, problem):
        """S (rows, cols) becomes the scaled score with its bias."""
        (slope,), scale = at.rows.score, problem.scale_log2 * LN2
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            row = at.rows.row0 + cS[r, 0][0] + problem.seqlen_k - problem.seqlen_q
            distance = Float32(row - at.n_block * tile_n - cS[r, 0][1])  # of the thread's first column
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                away = distance - Float32(cS[0, c][1] - cS[0, 0][1])
                if cutlass.const_expr(not self.causal):
                    away = cute.arch.fmax(away, -away)
                S[r, c] = S[r, c] * scale - slope * away


def polynomial(u):
    """Of TANH, by Horner."""
    total = TANH[-1]
    for c in TANH[-2::-1]:
        total = total * u + c
    return total
