"""When a kernel does what: the first CTA's producer and warpgroups write it down, by the SM's clock, or nobody does."""

import cutlass
from cutlass import Int32, cute
from cutlass.memory import SmemAllocator

from .part import Part
from .ping_pong import WARPGROUP
from .state import Gmem, Smem

EVENTS = ("load q", "load k", "load v", "step", "QK", "PV", "PV done", "softmax", "store", "store done")
SAMPLES = 512  # of the producer and of each warpgroup: (event, clock), behind the tile counter's 16 bytes
HEAD = 4  # int32s


class NoTrace(Part):
    def allocate(self, alloc: SmemAllocator):
        return None

    def mark(self, gmem: Gmem, smem: Smem, role, event: str):
        """Nothing is emitted."""

    def mark_of(self, w, event: str):
        """By an MMA warpgroup."""


class Timeline(NoTrace):
    def allocate(self, alloc: SmemAllocator):
        counts = alloc.allocate_tensor(Int32, cute.make_layout(1 + self.config.warpgroups), 16)
        for role in range(1 + self.config.warpgroups):
            counts[role] = 0
        return counts

    @cute.jit
    def mark(self, gmem: Gmem, smem: Smem, role, event: cutlass.Constexpr):
        """One thread of the role notes the time; it takes some 60 cycles."""
        block, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        if (block == 0) & (thread % WARPGROUP == 0):
            n = smem.counts[role]
            if n < SAMPLES:
                smem.counts[role] = n + 1
                at = gmem.tile_counter.iterator + (HEAD + 2 * (role * SAMPLES + n))
                sample = cute.make_tensor(at, 2)
                sample[0] = EVENTS.index(event) + 1
                sample[1] = Int32(cute.arch.clock())

    def mark_of(self, w, event: str):
        self.mark(w.gmem, w.smem, w.frag.wg + 1, event)
