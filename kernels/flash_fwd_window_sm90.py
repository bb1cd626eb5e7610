"""A sliding window: a tile begins at the first key that one of its rows sees, so work scales with the window, not S."""

import cutlass
from cutlass import cute

from .flash_fwd_sm90 import At, Rows, Warpgroup, release_if


class Windowed:
    """Goes before a kernel's class: `type(name, (Windowed, FlashFwdSm90), {})`."""

    @cute.jit
    def _tile(self, w: Warpgroup, rows: Rows, blocks, q_state, kv_state):
        """From the last block to the first: those the mask cuts on the right, whole ones, those it cuts on the left.

        A narrow window has blocks that it cuts on both sides, and no whole ones.
        """
        c, f = self.config, w.frag
        own = self._own_blocks(w, rows.row0, blocks)
        whole_end = cutlass.max(own.whole_end, own.first)
        left_end = cutlass.min(cutlass.max(own.whole_first, own.first), whole_end)  # of those cut on the left
        self._begin_rows(w, q_state)
        for _ in cutlass.range(blocks[1] - own.end, unroll=1):
            kv_state = self._pass_over(w, kv_state)
        kv_state = self._first(w, q_state, kv_state, At(rows, own.end - 1))
        for n in cutlass.range(own.end - 1 - whole_end, unroll=1):
            kv_state = self._step(w, q_state, kv_state, At(rows, own.end - 2 - n), True)
        if whole_end > left_end:
            self._settle(f)  # then every row has seen a key when the left edge comes
        for n in cutlass.range(whole_end - left_end, unroll=1):
            kv_state = self._step(w, q_state, kv_state, At(rows, whole_end - 1 - n), False)
        for n in cutlass.range(left_end - own.first, unroll=1):
            kv_state = self._step(w, q_state, kv_state, At(rows, left_end - 1 - n), True)
        release_if(not c.q_in_regs, w.pipes.q, q_state)
        self._last(w, kv_state)
        for _ in cutlass.range(own.first - blocks[0], unroll=1):
            kv_state = self._pass_over(w, kv_state)
        return kv_state
