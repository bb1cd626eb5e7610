"""Few tiles: the CTAs of a cluster share one, each with its part of the keys, and the first merges what they found.

The merge is FlashDecoding's (Dao et al., 2023), through distributed shared memory and in the same launch.
"""

import cutlass
from cutlass import Float32, cute
from cutlass.memory import SmemAllocator

from .flash_fwd_sm90 import WARPGROUP, FlashFwdSm90, Problem, Warpgroup, rank
from .layout import acc_mn, scale_rows
from .mask import Blocks
from .tile_scheduler import Tile


class FlashFwdSplitSm90(FlashFwdSm90):
    """`split` CTAs to a tile of 64 rows, one tile to a cluster."""

    def _allocate_parts(self, alloc: SmemAllocator):
        c = self.config
        shape = (WARPGROUP, c.d_v // 2 + 4, c.split - 1)  # O, two offsets, two sums of each thread
        return alloc.allocate_tensor(Float32, cute.make_layout(shape), 128)

    def _blocks(self, tile: Tile, problem: Problem):
        """A CTA without a block of its own takes one beyond the last, which the mask hides."""
        _, n_max = super()._blocks(tile, problem)
        each = (n_max + self.config.split - 1) // self.config.split
        first = cutlass.min(rank() * each, n_max)
        return first, cutlass.max(cutlass.min(first + each, n_max), first + 1)

    def _own_blocks(self, w: Warpgroup, row0, blocks):
        whole_end = super()._own_blocks(w, row0, blocks).whole_end
        return Blocks(blocks[0], blocks[0], cutlass.max(cutlass.min(whole_end, blocks[1] - 1), blocks[0]), blocks[1])

    def _loaded(self):
        self._cta_sync()

    @cute.jit
    def _finish(self, w: Warpgroup, tile: Tile):
        if rank() > 0:
            self._send(w)
        self._cta_sync()
        if rank() == 0:
            for part in cutlass.range_constexpr(self.config.split - 1):
                self._merge(w, part)
            self.epilogue(w, tile)

    @cute.jit
    def _send(self, w: Warpgroup):
        """To the first CTA: each thread's O, and the offset and the sum of each of its rows."""
        f = w.frag
        here = w.smem.parts[f.thread, None, rank() - 1]
        there = cute.arch.map_dsmem_ptr(here.iterator, 0).toint()
        n = cute.size(f.acc_O)
        for i in cutlass.range_constexpr(n):
            store_there(there + 4 * cute.crd2idx(i, here.layout), f.acc_O[i])
        for r in cutlass.range_constexpr(2):
            store_there(there + 4 * cute.crd2idx(n + r, here.layout), f.softmax.offset[r])
            store_there(there + 4 * cute.crd2idx(n + 2 + r, here.layout), f.softmax.row_sum[r])

    @cute.jit
    def _merge(self, w: Warpgroup, part: cutlass.Constexpr):
        """Add one CTA's part to this one's O and sums, both in the terms of whose row has the larger scores."""
        f = w.frag
        theirs = w.smem.parts[f.thread, None, part]
        n = cute.size(f.acc_O)
        O = cute.make_rmem_tensor_like(f.acc_O, Float32)
        for i in cutlass.range_constexpr(n):
            O[i] = theirs[i]
        mine_mn, theirs_mn = acc_mn(f.acc_O), acc_mn(O)  # (rows, cols)
        for r in cutlass.range_constexpr(2):
            keep, add = f.softmax.merge(r, theirs[n + r], theirs[n + 2 + r], self.slack)
            mine_mn[r, None].store(mine_mn[r, None].load() * keep + theirs_mn[r, None].load() * add)

    @cute.jit
    def _exponentials(self, w: Warpgroup, S):
        """With registers enough to keep S until its exponents are known to do: `merge` knows no row that lost it."""
        f, kept = w.frag, cute.make_rmem_tensor_like(S)
        kept.store(S.load())
        if f.softmax.exponents(S) | (f.softmax.slow[0] != 0):
            S.store(kept.load())
            f.softmax.renew_any(S, self.slack)
            f.softmax.settle()
            self._wait_for_pv(w)
            scale_rows(f.acc_O, f.softmax.rescale)
        f.softmax.exp(S)
        self._wait_for_pv(w)


def store_there(address, value: Float32):
    """Into another CTA's shared memory; the cluster's barrier orders it before the reads there."""
    cute.arch.inline_ptx("st.shared::cluster.f32 [{$r0}], {$r1};", read_only_args=[address, value])
