"""The kernel with nothing overlapped inside a warpgroup: the ladder's first stages (`cute_attn.bench --ladder`)."""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warpgroup

from .flash_fwd_sm90 import FlashFwdSm90, Warpgroup
from .layout import acc_mn


class FlashFwdSerialSm90(FlashFwdSm90):
    """QK, softmax and PV of a block, one after the other, then the next block's."""

    @cute.jit
    def _first(self, w: Warpgroup, q_state, k_state, v_state, at):
        k_state, v_state = FlashFwdSm90._first(self, w, q_state, k_state, v_state, at)
        return k_state, self._multiply_v(w, v_state)

    @cute.jit
    def _step(self, w: Warpgroup, q_state, k_state, v_state, at, edge: cutlass.Constexpr):
        w.pipes.k.consumer_wait(k_state)
        self.turns.take(w.frag.wg)
        acc_S = self._issue_qk(w, q_state, k_state)
        self.turns.give(w.frag.wg)
        warpgroup.wait_group(0)
        w.pipes.k.consumer_release(k_state)
        k_state.advance()
        self._softmax(w, acc_mn(acc_S), at, edge)
        self._to_P(w.frag, acc_S)
        return k_state, self._multiply_v(w, v_state)

    def _last(self, w: Warpgroup, v_state):
        return v_state
