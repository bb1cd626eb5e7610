"""What a row gives beside O and lse, and what joins its denominator: a sink's logit, and the row's largest score."""

import cutlass
from cutlass import Boolean, Float32, cute

from .part import Part
from .softmax import LN2
from .state import ROWS, Warpgroup
from .tile_scheduler import Tile


class Output(Part):
    def watch(self, softmax):
        """The softmax, with what this output keeps of each step."""
        return softmax

    def finish(self, epilogue, w: Warpgroup, tile: Tile, lse: cute.Tensor, seen: cute.Tensor) -> cute.Tensor:
        """At the end of a tile: the rows' lse. `seen` is without sinks; softmax.rescale normalises O."""
        return lse


class Watched:
    """Goes before a softmax's class. Looks at S, scores and mask done, before its exponents are taken: once a step."""

    def reset(self):
        super().reset()
        self.top.fill(-Float32.inf)

    def renew(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        self._watch(S)
        return super().renew(S, margin)

    def renew_any(self, S: cute.Tensor, margin: cutlass.Constexpr) -> Boolean:
        self._watch(S)
        return super().renew_any(S, margin)

    def exponents(self, S: cute.Tensor) -> Boolean:
        self._watch(S)
        return super().exponents(S)

    def _watch(self, S: cute.Tensor):
        for r in range(cute.size(self.top)):
            for c in range(cute.size(S, mode=[1])):
                self.top[r] = cute.arch.fmax(self.top[r], S[r, c])


class RowMax(Output):
    """Each row's largest score, written as lse is. The running max is not it: it has a margin. Argument: a tensor."""

    def watch(self, softmax):
        kind = type("Watched", (Watched, type(softmax)), {})
        top = cute.make_rmem_tensor_like(softmax.row_sum, Float32)
        return kind(**softmax._asdict() | dict(top=top))

    @cute.jit
    def finish(self, epilogue: cutlass.Constexpr, w: Warpgroup, tile: Tile, lse: cute.Tensor, seen: cute.Tensor):
        """In natural units. `fmax` passes over a NaN; the log of the row's sum, `seen`, does not."""
        softmax = w.frag.softmax
        (row_max,) = w.problem.args.row_max
        for r in cutlass.range_constexpr(cute.size(seen)):
            top = cute.arch.warp_reduction_max(softmax.top[r], threads_in_group=4) * (softmax.scale_log2 * LN2)
            top = top if (seen[r] == seen[r]) | (top == Float32.inf) else seen[r]
            row = tile.m_block * self.config.tile_m + w.frag.wg * ROWS + w.frag.cS[r, 0][0]
            epilogue.store_row(row_max, w, tile, row, top)
        return lse


class Sinks(Output):
    """A logit of each head joins its rows' denominators (arXiv:2309.17453). Argument: the address of (H,) float32."""

    def finish(self, epilogue, w: Warpgroup, tile: Tile, lse, seen):
        (address,) = w.problem.args.sinks
        sinks = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=4)
        logits = cute.make_rmem_tensor_like(seen, Float32)
        for r in range(cute.size(seen)):
            row = epilogue.row0(w, tile) + w.frag.cS[r, 0][0]
            _, head = epilogue.rows.owner(row, tile, w.gmem)
            logits[r] = cute.make_tensor(sinks + head, 1)[0]
        return w.frag.softmax.join(logits, seen)
