"""The kernel with nothing overlapped inside a warpgroup: the ladder's first stages (`cute_attn.bench --ladder`)."""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warpgroup

from .flash_fwd_sm90 import FlashFwdSm90, Warpgroup, before


class FlashFwdSerialSm90(FlashFwdSm90):
    """QK, softmax and PV of a block, one after the other, then the next block's."""

    @cute.jit
    def _first(self, w: Warpgroup, q_state, kv_state, at):
        kv_state = FlashFwdSm90._first(self, w, q_state, kv_state, at)
        self._multiply_v(w, before(kv_state))
        return kv_state

    @cute.jit
    def _step(self, w: Warpgroup, q_state, kv_state, at, edge: cutlass.Constexpr):
        w.pipes.k.consumer_wait(kv_state)
        self.turns.take(w.frag.wg)
        acc_S = self._issue_qk(w, q_state, kv_state)
        self.turns.give(w.frag.wg)
        warpgroup.wait_group(0)
        self._softmax(w, acc_S, q_state, kv_state, at, edge)
        self._to_P(w.frag, acc_S)
        self._multiply_v(w, kv_state)
        kv_state.advance()
        return kv_state

    def _last(self, w: Warpgroup, kv_state):
        """Nothing is left to multiply."""
