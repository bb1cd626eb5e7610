"""Online softmax (Milakov & Gimelshein, arXiv:1805.02867) in base 2, over one warpgroup's rows.

P = 2^(scale S - offset), and O and the row sums carry the same offset, so any offset is right that keeps P in range. A
row's offset starts `slack` above the maximum of its first block; as long as no score exceeds it, P <= 1 and there is no
maximum to look for: the steady loop only asks for the signs of its exponents (`exponents`), or whether the sums of P
are still small (`quick_step`).
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, cute

SLACK_LOG2 = {"bf16": 8.0, "fp16": 3.0}  # fp16's least number is 2^-24: P must not start much below 1
LARGEST_SUM = {"bf16": 2.0**30, "fp16": 2.0**15}  # of a thread's P of a row and block: P fits its type, O float32
LOWEST = -3.4028234663852886e38  # the least finite float32
LN2 = 0.6931471805599453
LOG2_E = 1.4426950408889634


class Exponents:
    """Of P, for a block of scores that are nothing but products."""

    def __init__(self, scale_log2):
        self.scale_log2 = scale_log2

    def of(self, row: cute.Tensor, r: int, offset):
        """Those of one row, the r-th of a thread's."""
        return row.load() * self.scale_log2 - offset

    def doubtful(self, doubt):
        """Whether any is, or there was a doubt before."""
        return doubt


class Softmax(NamedTuple):
    scale_log2: Float32  # |softmax_scale| * log2(e) > 0; its sign is in Q
    offset: cute.Tensor  # (rows,) of the exponents; -inf: the row has seen no key
    row_sum: cute.Tensor  # (rows,) running sum of P, this thread's columns
    rescale: cute.Tensor  # (rows,) what O must be multiplied by

    seen: cute.Tensor  # (1,) -1: each of this thread's rows has seen a key; else 0
    top: cute.Tensor | None = None  # (rows,) each row's largest S, this thread's columns: Maxima

    @staticmethod
    def create(scale_log2, num_rows):
        rows = [cute.make_rmem_tensor(num_rows, Float32) for _ in range(3)]
        return Softmax(scale_log2, *rows, cute.make_rmem_tensor(1, Int32))

    def reset(self):
        self.offset.fill(-Float32.inf)
        self.row_sum.fill(0.0)

    @cute.jit
    def step(self, S: cute.Tensor, slack: cutlass.Constexpr) -> Boolean:
        """S (rows, cols) becomes P; True for a warp that must rescale O. A row may see no key, now or ever."""
        changed = Boolean(False)
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            old = self.offset[r]
            top = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))]) * self.scale_log2
            new = top + slack if top > old else old
            changed = changed | (new != old)
            offset = cute.arch.fmax(new, LOWEST)  # finite: -inf - -inf would be NaN
            self.offset[r] = new
            self.rescale[r] = cute.math.exp2(old - offset, fastmath=True)
            self.row_sum[r] = self.row_sum[r] * self.rescale[r]
            S[r, None].store(S[r, None].load() * self.scale_log2 - offset)
        self.exp(S)
        return cute.arch.vote_any_sync(changed)

    @cute.jit
    def settle(self):
        """After the last `step`: finite offsets, for `exponents`."""
        self.seen[0] = -1
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            fresh = self.offset[r] == -Float32.inf
            self.offset[r] = 0.0 if fresh else self.offset[r]
            self.seen[0] = 0 if fresh else self.seen[0]

    @cute.jit
    def exponents(self, S: cute.Tensor) -> Boolean:
        """S (rows, cols) becomes the exponents of P; True for a warp that must `raise_offsets` before `exp`."""
        signs = self.seen[0]  # the top bit stays set while every exponent is negative
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            S[r, None].store(S[r, None].load() * self.scale_log2 - self.offset[r])
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                signs = signs & S[r, c].bitcast(Int32)
        return cute.arch.vote_any_sync(signs >= 0)

    @cute.jit
    def raise_offsets(self, S: cute.Tensor, slack: cutlass.Constexpr):
        """New offsets for rows (rows, cols) with an exponent above 0, or whose first keys these are."""
        self.seen[0] = -1
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            top = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))])
            fresh = cute.arch.warp_reduction_max(self.row_sum[r], threads_in_group=4) == 0.0
            shift = top + slack if (top > 0.0) | (fresh & (top > -Float32.inf)) else Float32(0.0)
            self.seen[0] = 0 if fresh & (top == -Float32.inf) else self.seen[0]
            self.offset[r] = self.offset[r] + shift
            self.rescale[r] = 1.0 if fresh else cute.math.exp2(-shift, fastmath=True)
            self.row_sum[r] = self.row_sum[r] * self.rescale[r]
            S[r, None].store(S[r, None].load() - shift)

    @cute.jit
    def exp(self, S: cute.Tensor):
        """Exponents (rows, cols) become P, and are summed."""
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            p = cute.math.exp2(S[r, None].load(), fastmath=True)
            self.row_sum[r] = p.reduce(cute.ReductionOp.ADD, self.row_sum[r], 0)
            S[r, None].store(p)

    @cute.jit
    def quick_step(self, S: cute.Tensor, largest: cutlass.Constexpr, exponents: cutlass.Constexpr):
        """S (rows, cols) becomes P by the offsets as they are; its sums, and True for a warp that must `step` instead.

        That is where a sum is above `largest`, or NaN; a row that has seen no key has an offset of -inf, and so either.
        And where `exponents`, which turn a row of S into exponents, are not sure of them.
        """
        sums, fits = cute.make_rmem_tensor_like(self.row_sum, Float32), Boolean(True)
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            S[r, None].store(cute.math.exp2(exponents.of(S[r, None], r, self.offset[r]), fastmath=True))
            total = S[r, 0]
            for c in cutlass.range_constexpr(1, cute.size(S, mode=[1])):
                total = total + S[r, c]
            sums[r] = total
            fits = fits & (total <= largest)
        return sums, cute.arch.vote_any_sync(exponents.doubtful(not fits))

    def add(self, sums: cute.Tensor):
        self.row_sum.store(self.row_sum.load() + sums.load())

    @cute.jit
    def join(self, logits: cute.Tensor, lse: cute.Tensor) -> cute.Tensor:
        """After `finish`: each row's logit, in units of log 2, joins its sum; its lse, and `rescale` follows."""
        joined = cute.make_rmem_tensor_like(lse, Float32)
        for r in cutlass.range_constexpr(cute.size(lse)):
            mine = lse[r] * LOG2_E
            top = cute.arch.fmax(cute.arch.fmax(mine, logits[r]), LOWEST)
            share = cute.math.exp2(mine - top, fastmath=True)
            total = share + cute.math.exp2(logits[r] - top, fastmath=True)
            self.rescale[r] = self.rescale[r] * share * cute.arch.rcp_approx(total)
            joined[r] = (top + cute.math.log2(total, fastmath=True)) * LN2
        return joined

    @cute.jit
    def finish(self) -> cute.Tensor:
        """Leaves in `rescale` what normalises O; returns each row's natural-log sum, -inf where it saw no key."""
        lse = cute.make_rmem_tensor_like(self.row_sum, Float32)
        for r in cutlass.range_constexpr(cute.size(self.row_sum)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            log2_sum = self.offset[r] + cute.math.log2(total, fastmath=True)
            self.rescale[r] = cute.arch.rcp_approx(total)
            lse[r] = -Float32.inf if total == 0.0 else log2_sum * LN2
        return lse


def row_max(x):
    """Four chains instead of one, then across the four threads that hold the row."""
    lanes = x[:4]
    for i, value in enumerate(x[4:]):
        lanes[i % 4] = cute.arch.fmax(lanes[i % 4], value)
    x = cute.arch.fmax(cute.arch.fmax(lanes[0], lanes[1]), cute.arch.fmax(lanes[2], lanes[3]))
    return cute.arch.warp_reduction_max(x, threads_in_group=4)
