"""What becomes of a score before its softmax. One class per way; `apply` leaves what `scale_log2` turns into exponents.

A score comes as Q K^T with the scale's sign in Q: times problem.scale_log2 it is the scaled score in units of log 2.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cutlass_dsl import select_

from .layout import not_before
from .softmax import LN2, LOG2_E, Exponents
from .user_mod import UserMod

LARGEST = 3.4028234663852886e38  # the largest float32
SIGN = -0x80000000  # of an int32: a float32's sign
# tanh(x) / 4x by powers of (4x)^2, for |x| < 1/2: within 7e-7 of it, the least error that three powers allow
TANH = (0.249999866, -0.00520723732, 0.000128811487, -2.71009685e-06)
NEAR = 0.3
# tanh(x) / x by powers of x^2 - NEAR^2, for |x| < NEAR: tanh within 1.8e-7, the least error that two powers allow
NEAR_TANH = (0.97104261, -0.31043413, 0.12522591)


class Score:
    """What holds where a way does not say otherwise. `args` are the run-time arguments of `signature`."""

    name = ""
    quick = True  # leaves registers for a step that is recomputed
    falls_from_diagonal = False  # scores fall with the distance from the diagonal, on both of its sides

    def signature(self) -> tuple:
        """One value of each run-time argument, for its type."""
        return ()

    def scale_log2(self, problem, args):
        return problem.scale_log2

    def begin(self, head, batch, args) -> tuple:
        """What a warpgroup keeps in registers for a tile: `at.rows.score`."""
        return ()

    def exponents(self, cS, at, tile_n, problem, args) -> Exponents | None:
        """From Q K^T to the exponents of P by less than `apply` takes, for most blocks; None: there is no such way."""
        return None


@dataclass(frozen=True)
class Plain(Score):
    """As it is."""

    def apply(self, S, cS, at, tile_n, problem, args):
        """Nothing."""


@dataclass(frozen=True)
class Softcap(Score):
    """softcap * tanh(scaled score / softcap) (Gemma 2, arXiv:2408.00118); args: softcap."""

    exact: bool = False  # tanh by exponentials for every score, as for those above softcap: no branch depends on one
    name = "softcap"

    def signature(self) -> tuple:
        return (Float32(0.0),)

    def scale_log2(self, problem, args):
        return args[0] * LOG2_E

    @cute.jit
    def apply(self, S: cute.Tensor, cS: cute.Tensor, at, tile_n: cutlass.Constexpr, problem, args):
        """S (rows, cols) becomes tanh of it; a warp with scores up to half of softcap takes a polynomial."""
        four = cutlass.min(problem.scale_log2 * (4 * LN2) / args[0], Float32(LARGEST))
        bits = Int32(0)
        for i in cutlass.range_constexpr(cute.size(S)):
            S[i] = S[i] * four
            bits = bits | S[i].bitcast(Int32)
        if cutlass.const_expr(self.exact):
            by_exponentials(S)
        else:
            self._by_powers(S, bits)

    def exponents(self, cS, at, tile_n, problem, args):
        return Capped(problem.scale_log2, args[0])

    @cute.jit
    def _by_powers(self, S: cute.Tensor, bits: Int32):
        if cute.arch.vote_any_sync(bits & 0x40000000 != 0):  # an exponent's top bit: some |4x| is 2 or more
            by_exponentials(S)
        else:
            for i in cutlass.range_constexpr(cute.size(S)):
                S[i] = S[i] * polynomial(S[i] * S[i])


@dataclass(frozen=True)
class Alibi(Score):
    """Less slope |i + Sk - Sq - j| (ALiBi, arXiv:2108.12409); args: those of `before`, an address, a batch's stride."""

    before: Plain | Softcap = Plain()
    causal: bool = False  # no later key is seen, so that the distance has one sign

    @property
    def name(self) -> str:
        return self.before.name + "alibi"

    @property
    def quick(self) -> bool:
        return self.before == Plain()

    @property
    def falls_from_diagonal(self) -> bool:
        return not self.causal

    def signature(self) -> tuple:
        return *self.before.signature(), Int64(0), Int32(0)

    def scale_log2(self, problem, args):
        return Float32(LOG2_E)

    def begin(self, head, batch, args) -> tuple:
        *_, address, stride = args
        slopes = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4)
        return (cute.make_tensor(slopes + (Int64(batch) * stride + head), 1)[0],)

    def exponents(self, cS, at, tile_n, problem, args):
        return Sloped(at, cS, tile_n, problem)

    @cute.jit
    def apply(self, S: cute.Tensor, cS: cute.Tensor, at, tile_n: cutlass.Constexpr, problem, args):
        """S (rows, cols) becomes scaled scores with their bias: no branch, since one would cost more."""
        self.before.apply(S, cS, at, tile_n, problem, args[:-2])
        scale, slope = self.before.scale_log2(problem, args[:-2]) * LN2, at.rows.score[0]
        slope = cutlass.max(cutlass.min(slope, Float32(LARGEST)), Float32(-LARGEST))
        n_block = not_before(S, at.n_block)
        first = at.rows.row0 + problem.seqlen_k - problem.seqlen_q - n_block * tile_n  # row less column, top left
        negative = slope.bitcast(Int32) & SIGN
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            bias = -slope * Float32(first + cS[r, 0][0] - cS[r, 0][1])  # of the thread's first column
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                here = slope * Float32(cS[0, c][1] - cS[0, 0][1]) + bias
                if cutlass.const_expr(not self.causal):  # minus the slope's sign, whichever side
                    here = -(((here.bitcast(Int32) & ~SIGN) | negative).bitcast(Float32))
                S[r, c] = S[r, c] * scale + here


@dataclass(frozen=True)
class UserScore(Score):
    """What a user's score_mod(score, b, h, q_idx, kv_idx) makes of it, scaled; args: those of `before`, its own."""

    mod: UserMod
    before: Plain | Softcap | Alibi = Plain()

    @property
    def name(self) -> str:
        return f"{self.before.name}score_mod"

    @property
    def quick(self) -> bool:
        return self.before == Plain() and not self.mod.arrays

    @property
    def falls_from_diagonal(self) -> bool:
        return self.before.falls_from_diagonal

    def signature(self) -> tuple:
        return *self.before.signature(), *self.mod.signature()

    def scale_log2(self, problem, args):
        return Float32(LOG2_E)

    def begin(self, head, batch, args) -> tuple:
        return self.before.begin(head, batch, self._divide(args)[0])

    def _divide(self, args):
        n = len(args) - len(self.mod.arrays)
        return args[:n], args[n:]

    def apply(self, S, cS, at, tile_n, problem, args):
        earlier, own = self._divide(args)
        self.before.apply(S, cS, at, tile_n, problem, earlier)
        scale = self.before.scale_log2(problem, earlier) * LN2

        def changed(mod, score, rows, places):
            return Float32(mod(score * scale, rows.batch, rows.head, *places))

        self.mod.of_block(S, cS, at, tile_n, own, changed)


class Capped(Exponents):
    """Softcap's, of products s whose scaled score is below NEAR of the cap; a block with a larger one is recomputed.

    s times a polynomial of s^2 less its largest, whose sign then tells; softcap and scale are in the coefficients.
    """

    def __init__(self, scale_log2, softcap):
        x = scale_log2 * LN2 / softcap  # of a product of 1
        largest = (NEAR * NEAR) / (x * x)
        usual = (x > 2.0**-20) & (x < 2.0**20)  # else a factor may be subnormal or inf: all recomputed
        self.largest = Float32(select_(usual, largest, Float32(-1.0)))
        self.powers = [scale_log2 * NEAR_TANH[0], scale_log2 * NEAR_TANH[1] * x * x]
        self.powers += [scale_log2 * NEAR_TANH[2] * (x * x) * (x * x)]
        self.below = Int32(-1)

    def of(self, row, r, running_max):
        for c in range(cute.size(row)):
            u = row[c] * row[c] - self.largest
            self.below = self.below & u.bitcast(Int32)
            row[c] = row[c] * horner(self.powers, u) - running_max
        return row.load()

    def must_recompute(self, overflow):
        return overflow | (self.below >= 0)


class Sloped(Exponents):
    """ALiBi's, of a block that lies on one side of the diagonal: its bias is linear, and joins the running max."""

    def __init__(self, at, cS, tile_n, problem):
        super().__init__(problem.scale_log2)
        own = at.rows.row0 + problem.seqlen_k - problem.seqlen_q  # the first row's key
        distance = at.n_block * tile_n - own
        slope = at.rows.score[0] * LOG2_E
        self.slope = Float32(select_(distance <= 0, slope, -slope))
        self.distance, self.cS = distance, cS

    def of(self, row, r, running_max):
        cS = self.cS  # (rows, cols)
        first = self.slope * Float32(self.distance + cS[r, 0][1] - cS[r, 0][0]) - running_max
        for c in range(cute.size(row)):
            bias = self.slope * Float32(cS[0, c][1] - cS[0, 0][1]) + first
            row[c] = row[c] * self.scale_log2 + bias
        return row.load()


def by_exponentials(S: cute.Tensor):
    """S, 4x, becomes tanh(x) = 1 - 2 / (e^2x + 1): to 2e-7, and right for infinities."""
    for i in range(cute.size(S)):
        power = cute.math.exp2(S[i] * (LOG2_E / 2), fastmath=True)
        S[i] = 1.0 - 2.0 * cute.arch.rcp_approx(power + 1.0)


def polynomial(u):
    """Of TANH."""
    return horner(TANH, u)


def horner(powers, u):
    total = powers[-1]
    for c in powers[-2::-1]:
        total = total * u + c
    return total
