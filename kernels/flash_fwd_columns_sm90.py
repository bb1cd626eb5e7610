"""O of more than 256 columns: two warpgroups own the same 64 rows, each with half of the columns of V and O.

64 rows of 512 float32 columns are all the registers of two warpgroups. Each multiplies QK and works out the softmax for
itself, so they exchange nothing, and QK is done twice: of head dims that are equal half as many FLOPs again.
"""

from cutlass import cute

from .flash_fwd_sm90 import OWN_BARRIER, WARPGROUP, Frag, Gmem, Pipes, Smem, Warpgroup, issue

NOBODY = 1 << 30  # with this bit a row lies beyond the last query


class SharedRows:
    """Goes before a kernel's class: `type(name, (SharedRows, FlashFwdSm90), {})`. A stage of V has a slot for each."""

    def _row_block(self, wg):
        return 0  # a tile has one

    def _first_column(self, wg):
        return wg * self.config.columns_v

    def _sharer(self, f: Frag):
        return f.thread + f.wg * WARPGROUP

    def _warpgroup_sync(self, wg):
        """Of all that own these rows: what they sync for is Q, which they share."""
        cute.arch.barrier(barrier_id=OWN_BARRIER, number_of_threads=WARPGROUP * self.config.parts_v)

    def _tma_load(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head_sequence):
        if name != "v":
            return super()._tma_load(gmem, smem, pipes, name, head_sequence)
        c, parts = self.config, self.config.parts_v
        g = self._head(gmem.v.tensor, *head_sequence)  # (s, d_v)
        blocks = [cute.local_tile(g, (c.tile_n, c.columns_v), (None, i)) for i in range(parts)]
        loads = [self._tma_copy(gmem, smem, pipes, name, x) for x in blocks]

        def load(block, slot, state):
            for i in range(parts):
                loads[i](block, slot * parts + i, state)

        return load

    def _issue_pv(self, w: Warpgroup, v_state):
        f = w.frag
        slot = v_state.index * self.config.parts_v + f.wg
        issue(w.tiling.mma_pv, f.acc_O, f.tOrP, f.tOrV[None, None, None, slot], True)

    def _store_lse(self, w: Warpgroup, tile, row, lse):
        """By the first of them."""
        super()._store_lse(w, tile, row | w.frag.wg * NOBODY, lse)
