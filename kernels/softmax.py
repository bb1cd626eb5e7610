"""Online softmax (Milakov & Gimelshein, arXiv:1805.02867) in base 2, over one warpgroup's rows."""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, cute

LAZY_LOG2 = 8.0  # a stale maximum may be exceeded by this much: P <= 2^8, and bf16 keeps its precision there
LOWEST = -3.4028234663852886e38  # the least finite float32
LN2 = 0.6931471805599453


class Softmax(NamedTuple):
    scale_log2: Float32  # |softmax_scale| * log2(e) > 0; its sign is in Q
    row_max: cute.Tensor  # (rows,) running max of S, raw units; may be stale by LAZY_LOG2
    row_sum: cute.Tensor  # (rows,) running sum of exp2, this thread's columns
    rescale: cute.Tensor  # (rows,) what O must be multiplied by

    @staticmethod
    def create(scale_log2, num_rows):
        return Softmax(scale_log2, *(cute.make_rmem_tensor(num_rows, Float32) for _ in range(3)))

    def reset(self):
        self.row_max.fill(-Float32.inf)
        self.row_sum.fill(0.0)

    @cute.jit
    def step(self, S: cute.Tensor) -> Boolean:
        """S (rows, cols) becomes P; True for a warp that must rescale O. A row may have seen no key yet."""
        changed = Boolean(False)
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            old = self.row_max[r]
            new = row_max([S[r, c] for c in range(cute.size(S, mode=[1]))] + [old])
            new = old if (new - old) * self.scale_log2 <= LAZY_LOG2 else new
            changed = changed | (new != old)
            offset = cute.arch.fmax(new * self.scale_log2, LOWEST)  # finite: -inf - -inf would be NaN
            scale = cute.math.exp2(old * self.scale_log2 - offset, fastmath=True)
            p = cute.math.exp2(S[r, None].load() * self.scale_log2 - offset, fastmath=True)
            self.row_sum[r] = p.reduce(cute.ReductionOp.ADD, self.row_sum[r] * scale, 0)
            self.row_max[r] = new
            self.rescale[r] = scale
            S[r, None].store(p)
        return cute.arch.vote_any_sync(changed)

    @cute.jit
    def finish(self) -> cute.Tensor:
        """Leaves in `rescale` what normalises O; returns each row's natural-log sum, -inf where it saw no key."""
        lse = cute.make_rmem_tensor_like(self.row_sum, Float32)
        for r in cutlass.range_constexpr(cute.size(self.row_sum)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            log2_sum = self.row_max[r] * self.scale_log2 + cute.math.log2(total, fastmath=True)
            self.rescale[r] = 1.0 / total
            lse[r] = -Float32.inf if total == 0.0 else log2_sum * LN2
        return lse


def row_max(x):
    """Four chains instead of one, then across the four threads that hold the row."""
    lanes = x[:4]
    for i, value in enumerate(x[4:]):
        lanes[i % 4] = cute.arch.fmax(lanes[i % 4], value)
    x = cute.arch.fmax(cute.arch.fmax(lanes[0], lanes[1]), cute.arch.fmax(lanes[2], lanes[3]))
    return cute.arch.warp_reduction_max(x, threads_in_group=4)
