"""What becomes of a tile's partial O: this CTA has all of its keys, or a cluster's CTAs each a part of them.

Split: small grids (fewer tiles than SMs). The CTAs of a cluster each process part of the keys, and the first merges
what they found, FlashDecoding's way (Dao et al., 2023), through distributed shared memory and in the same launch.
"""

import cutlass
from cutlass import Float32, cute
from cutlass.memory import SmemAllocator

from .layout import acc_mn
from .part import Part
from .ping_pong import WARPGROUP
from .state import Warpgroup, cluster_sync, rank
from .tile_scheduler import Tile


class NoSplit(Part):
    def allocate(self, alloc: SmemAllocator):
        return None

    def loaded(self):
        """Where the producer warpgroup is done."""

    def send(self, w: Warpgroup, tile: Tile):
        """To whom stores the tile."""

    def stores(self, w: Warpgroup, tile: Tile):
        """Whether this CTA does."""
        return True

    def merge(self, w: Warpgroup, tile: Tile):
        """What the others sent, into this warpgroup's O and softmax."""


class ClusterSplit(NoSplit):
    """`split` CTAs to a tile of 64 rows, one tile to a cluster."""

    def allocate(self, alloc: SmemAllocator):
        c = self.config
        shape = (WARPGROUP, c.d_v // 2 + 4, c.split - 1)  # O, two running maxima, two sums of each thread
        return alloc.allocate_tensor(Float32, cute.make_layout(shape), 128)

    def loaded(self):
        cluster_sync(self.config.cluster_size)

    @cute.jit
    def send(self, w: Warpgroup, tile: Tile):
        if rank() > 0:
            self._send(w)
        cluster_sync(self.config.cluster_size)

    def stores(self, w: Warpgroup, tile: Tile):
        return rank() == 0

    def merge(self, w: Warpgroup, tile: Tile):
        for other in range(self.config.split - 1):
            self._merge(w, other)

    @cute.jit
    def _send(self, w: Warpgroup):
        """To the first CTA: each thread's O, and the running max and the sum of each of its rows."""
        f = w.frag
        here = w.smem.partials[f.thread, None, rank() - 1]
        there = cute.arch.map_dsmem_ptr(here.iterator, 0).toint()
        n = cute.size(f.acc_O)
        for i in cutlass.range_constexpr(n):
            store_there(there + 4 * cute.crd2idx(i, here.layout), f.acc_O[i])
        for r in cutlass.range_constexpr(2):
            store_there(there + 4 * cute.crd2idx(n + r, here.layout), f.softmax.running_max[r])
            store_there(there + 4 * cute.crd2idx(n + 2 + r, here.layout), f.softmax.row_sum[r])

    @cute.jit
    def _merge(self, w: Warpgroup, other: cutlass.Constexpr):
        """Adds another CTA's O and sums to this one's, both relative to the larger running max."""
        f = w.frag
        theirs = w.smem.partials[f.thread, None, other]
        n = cute.size(f.acc_O)
        O = cute.make_rmem_tensor_like(f.acc_O, Float32)
        for i in cutlass.range_constexpr(n):
            O[i] = theirs[i]
        mine_mn, theirs_mn = acc_mn(f.acc_O), acc_mn(O)  # (rows, cols)
        for r in cutlass.range_constexpr(2):
            keep, add = f.softmax.merge(r, theirs[n + r], theirs[n + 2 + r], self.config.margin)
            mine_mn[r, None].store(mine_mn[r, None].load() * keep + theirs_mn[r, None].load() * add)


def store_there(address, value: Float32):
    """Into another CTA's shared memory; the cluster's barrier orders it before the reads there."""
    cute.arch.inline_ptx("st.shared::cluster.f32 [{$r0}], {$r1};", read_only_args=[address, value])
