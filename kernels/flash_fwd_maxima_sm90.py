"""Each row's largest score beside O: the offset that a row carries is not its maximum, so this one is kept too."""

import cutlass
from cutlass import Boolean, Float32, cute

from .flash_fwd_sm90 import ROWS, Frag, Problem, Smem, Tiling, Warpgroup
from .softmax import LN2
from .tile_scheduler import Tile


class Watched:
    """Goes before a softmax's class. Looks at S, scores and mask done, before its exponents are taken: once a step."""

    def reset(self):
        super().reset()
        self.top.fill(-Float32.inf)

    def renew(self, S: cute.Tensor, slack: cutlass.Constexpr) -> Boolean:
        self._watch(S)
        return super().renew(S, slack)

    def renew_any(self, S: cute.Tensor, slack: cutlass.Constexpr) -> Boolean:
        self._watch(S)
        return super().renew_any(S, slack)

    def exponents(self, S: cute.Tensor) -> Boolean:
        self._watch(S)
        return super().exponents(S)

    def _watch(self, S: cute.Tensor):
        for r in range(cute.size(self.top)):
            for c in range(cute.size(S, mode=[1])):
                self.top[r] = cute.arch.fmax(self.top[r], S[r, c])


class Maxima:
    """Goes before a kernel's class: `type(name, (Maxima, FlashFwdSm90), {})`. Writes the rows' maxima as lse is."""

    def _fragments(self, smem: Smem, tiling: Tiling, problem: Problem) -> Frag:
        f = super()._fragments(smem, tiling, problem)
        kind = type("Watched", (Watched, type(f.softmax)), {})
        top = cute.make_rmem_tensor_like(f.softmax.row_sum, Float32)
        return f._replace(softmax=kind(**f.softmax._asdict() | dict(top=top)))

    def _totals(self, w: Warpgroup, tile: Tile):
        lse, seen = super()._totals(w, tile)
        self._store_maxima(w, tile, seen)
        return lse, seen

    @cute.jit
    def _store_maxima(self, w: Warpgroup, tile: Tile, seen: cute.Tensor):
        """In natural units. `fmax` passes over a NaN; the log of the row's sum, `seen`, does not."""
        c, softmax = self.config, w.frag.softmax
        (row_max,) = c.own("row_max", w.problem.others)
        there = w._replace(gmem=w.gmem._replace(lse=row_max))
        for r in cutlass.range_constexpr(cute.size(seen)):
            top = cute.arch.warp_reduction_max(softmax.top[r], threads_in_group=4) * (softmax.scale_log2 * LN2)
            top = top if (seen[r] == seen[r]) | (top == Float32.inf) else seen[r]
            self._store_lse(there, tile, tile.m_block * c.tile_m + w.frag.wg * ROWS + w.frag.cS[r, 0][0], top)
