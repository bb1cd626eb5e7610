"""A kernel that writes down when it does what: the first CTA's producer and warpgroups, by the SM's clock."""

import cutlass
from cutlass import Int32, cute
from cutlass.memory import SmemAllocator

from .flash_fwd_sm90 import WARPGROUP, Gmem, Pipes, Smem, Warpgroup
from .tile_scheduler import Tile

EVENTS = ("load q", "load k", "load v", "step", "QK", "PV", "PV done", "softmax", "store", "store done")
SAMPLES = 512  # of the producer and of each warpgroup: (event, clock), behind the tile counter's 16 bytes
HEAD = 4  # int32s


class Timeline:
    """Goes before a kernel's class: `type(name, (Timeline, FlashFwdSm90), {})`."""

    def _allocate_parts(self, alloc: SmemAllocator):
        counts = alloc.allocate_tensor(Int32, cute.make_layout(1 + self.config.warpgroups), 16)
        for role in range(1 + self.config.warpgroups):
            counts[role] = 0
        return counts

    @cute.jit
    def _mark(self, gmem: Gmem, smem: Smem, role, event: cutlass.Constexpr):
        """One thread of the role notes the time; it takes some 60 cycles."""
        block, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        if (block == 0) & (thread % WARPGROUP == 0):
            n = smem.parts[role]
            if n < SAMPLES:
                smem.parts[role] = n + 1
                at = gmem.ticket.iterator + (HEAD + 2 * (role * SAMPLES + n))
                sample = cute.make_tensor(at, 2)
                sample[0] = EVENTS.index(event) + 1
                sample[1] = Int32(cute.arch.clock())

    def _note(self, w: Warpgroup, event: str):
        self._mark(w.gmem, w.smem, w.frag.wg + 1, event)

    def _tma_load(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head_batch):
        load = super()._tma_load(gmem, smem, pipes, name, head_batch)

        def noted(block, slot, state):
            self._mark(gmem, smem, 0, f"load {name}")
            load(block, slot, state)

        return noted

    def _cut(self, w: Warpgroup, at):
        self._note(w, "softmax")  # of the first block
        return super()._cut(w, at)

    def _step(self, w: Warpgroup, q_state, kv_state, at, edge):
        self._note(w, "step")
        return super()._step(w, q_state, kv_state, at, edge)

    def _issue_qk(self, w: Warpgroup, q_state, k_state):
        self._note(w, "QK")
        return super()._issue_qk(w, q_state, k_state)

    def _issue_pv(self, w: Warpgroup, v_state):
        self._note(w, "PV")
        super()._issue_pv(w, v_state)

    def _wait_for_pv(self, w: Warpgroup):
        super()._wait_for_pv(w)
        self._note(w, "PV done")

    def _softmax(self, w: Warpgroup, acc_S, q_state, k_state, at, edge):
        self._note(w, "softmax")
        super()._softmax(w, acc_S, q_state, k_state, at, edge)

    def _last(self, w: Warpgroup, kv_state):
        super()._last(w, kv_state)
        self._note(w, "PV done")

    def _finish(self, w: Warpgroup, tile: Tile):
        self._note(w, "store")
        super()._finish(w, tile)
        self._note(w, "store done")
