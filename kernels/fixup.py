"""The last CTA of a shared tile merges it: Stream-K's fix-up (Osama et al., arXiv:2301.03598), with no second kernel.

Which CTA is the last depends on time, but it adds all parts up in their order, its own among them, as it was written.
"""

from functools import reduce
from operator import or_
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass.memory import SmemAllocator

from .grid_split import GridSplit, SharedTile, place_of
from .layout import acc_mn, in_registers, scale_and_add
from .state import ROWS, Frag, Warpgroup

NUMBERS = 64  # that a thread reads at once, of a row: of several parts where O has few columns


class Row(NamedTuple):
    """Of a part: what a thread has of a row."""

    O: cute.Tensor
    running_max: cute.Tensor  # (1,)
    row_sum: cute.Tensor


class Fixup(GridSplit):
    """Each shared tile has a counter for each warpgroup: how many CTAs have written their part."""

    @property
    def at_once(self) -> int:
        """Parts."""
        return max(NUMBERS * 4 // self.config.d_v, 1)

    def allocate(self, alloc: SmemAllocator) -> cute.Tensor:
        """Whether this CTA was the last, (warpgroups,)."""
        return alloc.allocate_tensor(Int32, cute.make_layout(self.config.warpgroups), 16)

    @cute.jit
    def send(self, w: Warpgroup, tile: SharedTile):
        self.write(w, tile)
        if tile.part >= 0:
            self._arrive(w, tile)

    @cute.jit
    def _arrive(self, w: Warpgroup, tile: SharedTile):
        """By one thread for all: what they have written is seen by who comes later (PTX ISA, causality order)."""
        wg = w.frag.wg
        self.head_dim.sync(wg)
        if w.frag.thread == 0:
            cute.arch.fence_acq_rel_gpu()
            last = tile.last_row - tile.first_row
            before = cute.arch.inline_ptx(
                "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",  # the last one leaves 0 behind
                write_only_types=[Int32],
                read_only_args=[self._counter(w, tile), last],
            )
            cute.arch.fence_acq_rel_gpu()
            w.smem.partials[wg] = Int32(before == last)
        self.head_dim.sync(wg)

    def _counter(self, w: Warpgroup, tile: SharedTile) -> Int64:
        number = (tile.first_row * w.problem.grid.heads + tile.head) * self.config.warpgroups + w.frag.wg
        return w.gmem.tile_counter.iterator.toint() + 4 * Int64(number)

    @cute.jit
    def stores(self, w: Warpgroup, tile: SharedTile):
        stores = Boolean(True)
        if tile.part >= 0:
            stores = w.smem.partials[w.frag.wg] != 0
        return stores

    @cute.jit
    def merge(self, w: Warpgroup, tile: SharedTile):
        """All parts of the rows that a thread has, into its own O and softmax."""
        if tile.part >= 0:
            w.frag.softmax.reset()
            w.frag.acc_O.fill(0.0)
            for first in cutlass.range(tile.first_row, tile.last_row + 1, self.at_once, unroll=1):
                self._add_some(w, tile, first)

    @cute.jit
    def _add_some(self, w: Warpgroup, tile: SharedTile, first: Int32):
        for r in cutlass.range_constexpr(2):
            there = self.is_query(w, tile, w.frag.wg, r)
            if cute.arch.vote_any_sync(there):
                self._add_row(w, tile, first, r, there)

    @cute.jit
    def _add_row(self, w: Warpgroup, tile: SharedTile, first: Int32, r: cutlass.Constexpr, there: Boolean):
        f = w.frag
        row = self.row_read(f.wg * ROWS + f.cS[r, 0][0], there)
        parts = [self._part(w, tile, cutlass.min(first + i, tile.last_row), row) for i in range(self.at_once)]
        for i in cutlass.range_constexpr(1, self.at_once):
            there = first + i <= tile.last_row
            parts[i].running_max[0] = parts[i].running_max[0] if there else -Float32.inf
            parts[i].row_sum[0] = parts[i].row_sum[0] if there else Float32(0.0)
        maxima, sums = [part.running_max[0] for part in parts], [part.row_sum[0] for part in parts]
        if cute.arch.vote_any_sync(reduce(or_, (x != x for x in (f.softmax.running_max[r], *maxima)))):
            for i in cutlass.range_constexpr(self.at_once):
                self._add_any(f, r, parts[i])
        else:
            keep, *factors = f.softmax.merge_plain(r, maxima, sums)
            scale_and_add(acc_mn(f.acc_O)[r, None], keep, [part.O for part in parts], factors)

    def _add_any(self, f: Frag, r: int, part: Row):
        """One whose running max may be an anchor."""
        keep, factor = f.softmax.merge(r, part.running_max[0], part.row_sum[0], self.config.margin)
        scale_and_add(acc_mn(f.acc_O)[r, None], keep, [part.O], [factor])

    def _part(self, w: Warpgroup, tile: SharedTile, whose, row) -> Row:
        """Of a row of one CTA's part what a thread has."""
        place = place_of(whose, tile.first_row, tile.head, w.problem)
        O, state = (in_registers(there) for there in self.part(place, row, w.frag.thread % 4, w.problem))
        return Row(O, *(cute.make_tensor(state.iterator + i, 1) for i in range(2)))
