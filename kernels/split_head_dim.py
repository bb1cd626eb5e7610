"""Which columns of V and O a warpgroup owns: all of its rows', or, beyond 256, a part that it shares the rows for.

64 rows of 512 float32 columns are all the registers of two warpgroups. So two own the same 64 rows, each with half of
the columns of V and O. Each multiplies QK and works out the softmax for itself, so they exchange nothing, and QK is
done twice: of head dims that are equal half as many FLOPs again.
"""

from cutlass import cute

from .part import Part
from .ping_pong import WARPGROUP
from .state import Frag, Warpgroup, issue

OWN_BARRIER = 1  # and the next two: one named barrier per warpgroup
NOBODY = 1 << 30  # with this bit a row lies beyond the last query


class WholeHeadDim(Part):
    def row_block(self, wg):
        """Which 64 rows of a tile are a warpgroup's."""
        return wg

    @property
    def columns(self) -> int:
        """Of V and O, a warpgroup's."""
        return self.config.columns_v

    def first_column(self, wg):
        """Where they begin."""
        return 0

    def sharer(self, f: Frag):
        """A thread's number among those that own its rows."""
        return f.thread

    def sync(self, wg):
        """Of all that own these rows."""
        cute.arch.barrier(barrier_id=OWN_BARRIER + wg, number_of_threads=WARPGROUP)

    def issue_pv(self, w: Warpgroup, v_state):
        f = w.frag
        issue(w.tiling.mma_pv, f.acc_O, f.tOrP, f.tOrV[None, None, None, v_state.index], True)

    def stored_row(self, row, wg):
        """The row for which this warpgroup writes an lse."""
        return row


class SplitHeadDim(WholeHeadDim):
    """A stage of V has a slot for each part."""

    def row_block(self, wg):
        return 0  # a tile has one

    def first_column(self, wg):
        return wg * self.config.columns_v

    def sharer(self, f: Frag):
        return f.thread + f.wg * WARPGROUP

    def sync(self, wg):
        """What they sync for is Q, which they share."""
        cute.arch.barrier(barrier_id=OWN_BARRIER, number_of_threads=WARPGROUP * self.config.head_dim_splits)

    def issue_pv(self, w: Warpgroup, v_state):
        f = w.frag
        slot = v_state.index * self.config.head_dim_splits + f.wg
        issue(w.tiling.mma_pv, f.acc_O, f.tOrP, f.tOrV[None, None, None, slot], True)

    def stored_row(self, row, wg):
        """By the first of them."""
        return row | wg * NOBODY
