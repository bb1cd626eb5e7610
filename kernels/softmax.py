"""Online softmax (Milakov & Gimelshein, arXiv:1805.02867) in base 2, over one warpgroup's rows.

P = 2^(scale S - running_max), and O and the row sums are relative to the same running max, so any value serves that
keeps P in range: it has a margin. A row's running max starts `margin` above the maximum of its first block. As long as
no score exceeds it, P <= 1 and nothing is rescaled: the steady loop only tests the signs of its exponents
(`exponents`), or whether the row sums of P are still small (`quick_step`).

The running max is a float32, so beyond `LARGEST_RUNNING_MAX` its rounding error would be as large as an exponent. Such
a row is `anchored`: it has a score in place of a running max, and exponents scale (S - anchor) - margin, which are
exact for equal scores of any size. `running_max` then differs among the four threads that hold the row: NaN in the
first, so that no quick way takes it for a running max; the anchor in the second. A `Line` says what that means.
"""

from functools import reduce
from operator import add as plus
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, cute
from cutlass.cutlass_dsl import select_

MARGIN_LOG2 = {"bf16": 8.0, "fp16": 3.0}  # fp16's least number is 2^-24: P must not start much below 1
LARGEST_SUM = {"bf16": 2.0**30, "fp16": 2.0**15}  # of a thread's P of a row and block: P fits its type, O float32
LARGEST_RUNNING_MAX = 2.0**20  # of its size: exponents are rounded by 2^-5 at most, in whatever order computed
LEAST_RUNNING_MAX = -(2.0**8)  # exponents relative to a lower one would be too coarse for scores about 0
LOWEST = -3.4028234663852886e38  # the least finite float32
LN2 = 0.6931471805599453
LOG2_E = 1.4426950408889634


class Exponents:
    """Of P, for a block of scores that are nothing but products."""

    def __init__(self, scale_log2):
        self.scale_log2 = scale_log2

    def of(self, row: cute.Tensor, r: int, running_max):
        """Those of one row, the r-th of a thread's."""
        less(row, self.scale_log2, running_max)
        return row.load()

    def must_recompute(self, overflow):
        """Whether the block must be recomputed: on overflow, or where some scores are not for this way."""
        return overflow


class Line(NamedTuple):
    """A row's exponents: c (a S - b) - f."""

    a: Float32
    b: Float32
    c: Float32
    f: Float32

    def of(self, s):
        return cute.math.fma(cute.math.fma(s, self.a, -self.b), self.c, -self.f)

    def kept_unless(self, changed, other: "Line") -> "Line":
        """The other one where it has changed."""
        return Line(*(select_(changed, x, mine) for mine, x in zip(self, other, strict=True)))


class Softmax(NamedTuple):
    scale_log2: Float32  # |softmax_scale| * log2(e) > 0; its sign is in Q
    running_max: cute.Tensor  # (rows,) with a margin, or what `anchored` made of it; -inf: the row has seen no key
    row_sum: cute.Tensor  # (rows,) running sum of P, this thread's columns
    rescale: cute.Tensor  # (rows,) what O must be multiplied by
    slow: cute.Tensor  # (1,) Int32, of the warp: whether the next step needs a maximum, by `set_slow`
    top: cute.Tensor | None = None  # (rows,) each row's largest S, this thread's columns: Maxima

    @classmethod
    def create(cls, scale_log2, num_rows):
        rows = [cute.make_rmem_tensor(num_rows, Float32) for _ in range(3)]
        return cls(scale_log2, *rows, cute.make_rmem_tensor(1, Int32))

    def reset(self):
        self.running_max.fill(-Float32.inf)
        self.row_sum.fill(0.0)

    def step(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        """S (rows, cols) becomes P; True for a warp that must rescale O. A row may see no key, now or ever."""
        changed = self.renew(S, margin)
        self.exp(S)
        return changed

    @cute.jit
    def renew(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        """S (rows, cols) becomes the exponents of P, by new running maxima; True where O must be rescaled."""
        changed, usual = Boolean(False), Boolean(True)
        news = cute.make_rmem_tensor_like(self.running_max, Float32)
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            old, largest = self.running_max[r], row_max([S[r, c] for c in range(cute.size(S, mode=[1]))])
            top = largest * self.scale_log2
            news[r] = top + margin if top > old else old
            none = (largest == -Float32.inf) & (old == -Float32.inf)
            usual = usual & (moderate(news[r]) | none)
            changed = changed | (news[r] != old)
        if cute.arch.vote_any_sync(not usual):
            changed = self.renew_any(S, margin)
        else:
            for r in cutlass.range_constexpr(cute.size(self.running_max)):
                running_max = cute.arch.fmax(news[r], LOWEST)  # finite: -inf - -inf would be NaN
                self.rescale[r] = cute.math.exp2(self.running_max[r] - running_max, fastmath=True)
                self.row_sum[r] = self.row_sum[r] * self.rescale[r]
                self.running_max[r] = news[r]
                less(S[r, None], self.scale_log2, running_max)
        return cute.arch.vote_any_sync(changed)

    @cute.jit
    def renew_any(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        """The same for scores of any sizes."""
        changed = Boolean(False)
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            top = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))])
            running_max, old = top * self.scale_log2 + margin, self._line(self.running_max[r], margin)
            none = of_quad(self.running_max[r], 0) == -Float32.inf
            here = old.of(top)
            raised = (here > 0.0) | (none & (top > -Float32.inf))
            plain = moderate(running_max)
            mine = select_(plain, running_max, anchored(top, -Float32.inf))
            line = old.kept_unless(raised, self._line(mine, margin))
            self.rescale[r] = cute.math.exp2(line.of(top) - here, fastmath=True) if raised else Float32(1.0)
            self.row_sum[r] = self.row_sum[r] * self.rescale[r]
            self.running_max[r] = mine if raised else self.running_max[r]
            changed = changed | raised
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = line.of(S[r, c])
        return changed

    def _line(self, running_max, margin) -> Line:
        """What a row's `running_max` means, as its four threads hold it."""
        first, second, third = (of_quad(running_max, i) for i in range(3))
        none, lost = first == -Float32.inf, (first != first) & (third > -Float32.inf)
        plain = first > -Float32.inf
        scaled, one = plain | lost, Float32(1.0)
        return Line(
            select_(scaled, self.scale_log2, one),
            select_(none, Float32(LOWEST), second),
            select_(scaled, one, self.scale_log2),
            select_(plain, Float32(0.0), select_(lost, third, Float32(margin))),
        )

    def set_slow(self):
        """After each `renew`: whether `exponents` may be the next, or another."""
        low = Boolean(False)
        for r in range(cute.size(self.running_max)):
            low = low | ~(self.running_max[r] >= LEAST_RUNNING_MAX)  # NaN too
        self.slow[0] = Int32(cute.arch.vote_any_sync(low))

    @cute.jit
    def exponents(self, S: cute.Tensor) -> Boolean:
        """S (rows, cols) becomes the exponents of P; True for a warp that must `raise_running_max` before `exp`."""
        signs = Int32(-1)  # the top bit stays set while every exponent is negative
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            less(S[r, None], self.scale_log2, self.running_max[r])
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                signs = signs & S[r, c].bitcast(Int32)
        return cute.arch.vote_any_sync(signs >= 0)

    @cute.jit
    def raise_running_max(self, S: cute.Tensor, margin: cutlass.Constexpr):
        """New running maxima for rows (rows, cols) with an exponent above 0.

        S is gone. Where a running max would be too large, the row keeps the one it has, and less its largest exponent.
        """
        slow = Boolean(False)
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            top = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))])
            new = self.running_max[r] + (top + margin if top > 0.0 else Float32(0.0))
            large = not (new <= LARGEST_RUNNING_MAX)
            shift = top if large else new - self.running_max[r]
            self.running_max[r] = select_(large, anchored(self.running_max[r], top), new)
            slow = slow | large
            self.rescale[r] = cute.math.exp2(-shift, fastmath=True)
            self.row_sum[r] = self.row_sum[r] * self.rescale[r]
            S[r, None].store(S[r, None].load() - shift)
        self.slow[0] = Int32(cute.arch.vote_any_sync(slow))

    @cute.jit
    def exp(self, S: cute.Tensor):
        """Exponents (rows, cols) become P, and are summed."""
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            p = cute.math.exp2(S[r, None].load(), fastmath=True)
            self.row_sum[r] = p.reduce(cute.ReductionOp.ADD, self.row_sum[r], 0)
            S[r, None].store(p)

    @cute.jit
    def quick_step(self, S: cute.Tensor, largest: cutlass.Constexpr, exponents: cutlass.Constexpr):
        """S (rows, cols) becomes P by the running max as it is; its sums, and True for a warp that must recompute.

        Overflow check: a sum is above `largest` or NaN, as that of a row without keys, whose running max is -inf.
        `exponents` turn a row of S into exponents, and may ask for a recomputation too.
        """
        sums, fits = cute.make_rmem_tensor_like(self.row_sum, Float32), Boolean(True)
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            S[r, None].store(cute.math.exp2(exponents.of(S[r, None], r, self.running_max[r]), fastmath=True))
            total = S[r, 0]
            for c in cutlass.range_constexpr(1, cute.size(S, mode=[1])):
                total = total + S[r, c]
            sums[r] = total
            fits = fits & (total <= largest)
        return sums, cute.arch.vote_any_sync(exponents.must_recompute(not fits))

    def add(self, sums: cute.Tensor):
        self.row_sum.store(self.row_sum.load() + sums.load())

    @cute.jit
    def merge(self, r: cutlass.Constexpr, running_max: Float32, row_sum: Float32, margin: cutlass.Constexpr):
        """Another softmax's running max and sum of a row join this one's; the factors of this O and of the other."""
        mine, other = self._line(self.running_max[r], margin), self._line(running_max, margin)
        score = mine.b if mine.f > 0.0 else Float32(0.0)  # an anchor of either, where equal ones must weigh the same
        score = other.b if other.f > 0.0 else score
        lead = mine.of(score) - other.of(score)  # over the other's running max
        mine_none, other_none = (of_quad(x, 0) == -Float32.inf for x in (self.running_max[r], running_max))
        lead = -Float32.inf if other_none else (Float32.inf if mine_none else lead)
        keep = cute.math.exp2(-lead, fastmath=True) if lead > 0.0 else Float32(1.0)
        add = Float32(1.0) if lead > 0.0 else cute.math.exp2(lead, fastmath=True)
        self.running_max[r] = running_max if lead > 0.0 else self.running_max[r]
        self.row_sum[r] = self.row_sum[r] * keep + row_sum * add
        return keep, add

    def merge_plain(self, r: int, running_maxima: list, row_sums: list) -> list:
        """`merge` of several at once, none of them and not this one anchored: the factors of this O, and of theirs."""
        maxima, sums = [self.running_max[r], *running_maxima], [self.row_sum[r], *row_sums]
        top = reduce(cute.arch.fmax, maxima)
        least = cute.arch.fmax(top, LOWEST)  # finite: -inf - -inf would be NaN
        factors = [cute.math.exp2(x - least, fastmath=True) for x in maxima]
        self.running_max[r] = top
        self.row_sum[r] = reduce(plus, (x * factor for x, factor in zip(sums, factors, strict=True)))
        return factors

    @cute.jit
    def join(self, logits: cute.Tensor, lse: cute.Tensor) -> cute.Tensor:
        """After `finish`: each row's logit joins its sum; its lse, and `rescale` follows."""
        joined = cute.make_rmem_tensor_like(lse, Float32)
        for r in cutlass.range_constexpr(cute.size(lse)):
            top = cute.arch.fmax(cute.arch.fmax(lse[r], logits[r]), LOWEST)
            share = cute.math.exp2((lse[r] - top) * LOG2_E, fastmath=True)
            total = share + cute.math.exp2((logits[r] - top) * LOG2_E, fastmath=True)
            self.rescale[r] = self.rescale[r] * share * cute.arch.rcp_approx(total)
            joined[r] = top + cute.math.log2(total, fastmath=True) * LN2
        return joined

    @cute.jit
    def finish(self, margin: cutlass.Constexpr) -> cute.Tensor:
        """Leaves in `rescale` what normalises O; returns each row's natural-log sum, -inf where it saw no key."""
        lse, totals = (cute.make_rmem_tensor_like(self.row_sum, Float32) for _ in range(2))
        odd = Boolean(False)
        for r in cutlass.range_constexpr(cute.size(self.row_sum)):
            totals[r] = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            self.rescale[r] = cute.arch.rcp_approx(totals[r])
            lse[r] = (self.running_max[r] + cute.math.log2(totals[r], fastmath=True)) * LN2
            odd = odd | (self.running_max[r] != self.running_max[r])
        if cute.arch.vote_any_sync(odd):
            for r in cutlass.range_constexpr(cute.size(lse)):
                lse[r] = log_sum(self._line(self.running_max[r], margin), totals[r])
        for r in cutlass.range_constexpr(cute.size(lse)):
            lse[r] = -Float32.inf if totals[r] == 0.0 else lse[r]
        return lse


class Constant(Softmax):
    """The same instructions whatever the scores: each row has its maximum for an anchor, in all of its threads."""

    @cute.jit
    def renew(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        for r in cutlass.range_constexpr(cute.size(self.running_max)):
            old = self.running_max[r]
            top = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))])
            new = cute.arch.fmax(cute.arch.fmax(top, old), LOWEST)
            self.running_max[r] = new
            self.rescale[r] = cute.math.exp2((old - new) * self.scale_log2, fastmath=True)
            self.row_sum[r] = self.row_sum[r] * self.rescale[r]
            S[r, None].store((S[r, None].load() - new) * self.scale_log2)
        return Boolean(True)

    def merge(self, r: int, running_max: Float32, row_sum: Float32, margin: float):
        new = cute.arch.fmax(self.running_max[r], running_max)
        keep, add = (
            cute.math.exp2((x - new) * self.scale_log2, fastmath=True) for x in (self.running_max[r], running_max)
        )
        self.running_max[r] = new
        self.row_sum[r] = self.row_sum[r] * keep + row_sum * add
        return keep, add

    @cute.jit
    def finish(self, margin: cutlass.Constexpr) -> cute.Tensor:
        lse = cute.make_rmem_tensor_like(self.row_sum, Float32)
        for r in cutlass.range_constexpr(cute.size(self.row_sum)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            self.rescale[r] = cute.arch.rcp_approx(total)
            line = Line(Float32(1.0), self.running_max[r], self.scale_log2, Float32(0.0))
            lse[r] = -Float32.inf if total == 0.0 else log_sum(line, total)
        return lse


def less(row: cute.Tensor, scale, running_max):
    """A row of S becomes scale S - running max, rounded once: the same in every step."""
    for c in range(cute.size(row)):
        row[c] = cute.math.fma(row[c], scale, -running_max)


def log_sum(line: Line, total):
    """The natural log of a row's sum of P by a line; that of the least scores is no -inf."""
    lse = line.b * (line.c * LN2) + (line.f + cute.math.log2(total, fastmath=True)) * LN2
    return select_(lse < LOWEST, Float32(LOWEST), lse)


def moderate(running_max):
    """Whether it may be one; not NaN."""
    return (running_max >= -LARGEST_RUNNING_MAX) & (running_max <= LARGEST_RUNNING_MAX)


def anchored(anchor, largest):
    """A thread's `running_max` of a row whose exponents are scale (S - anchor) - margin.

    Or, with a largest one, scale S - anchor - largest: anchor is a running max then, and S was gone when it was needed.
    """
    place = cute.arch.shuffle_sync_bfly(cute.arch.thread_idx()[0], 0) % 4  # opaque, or it takes a register all along
    return select_(place == 0, Float32(float("nan")), select_(place == 1, anchor, largest))


def of_quad(value, place: int):
    """What the place-th of the four threads that hold a row has."""
    return cute.arch.shuffle_sync(value, place, mask_and_clamp=(32 - 4) << 8 | 31)


def row_max(x):
    """Four chains instead of one, then across the four threads that hold the row."""
    lanes = x[:4]
    for i, value in enumerate(x[4:]):
        lanes[i % 4] = cute.arch.fmax(lanes[i % 4], value)
    x = cute.arch.fmax(cute.arch.fmax(lanes[0], lanes[1]), cute.arch.fmax(lanes[2], lanes[3]))
    return cute.arch.warp_reduction_max(x, threads_in_group=4)
