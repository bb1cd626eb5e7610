"""The two GEMMs of an MMA warpgroup, S = Q K^T and O += P V: how they are issued, and waited for."""

from cutlass import Float32, cute
from cutlass.cute.nvgpu import warp, warpgroup

from .config import FwdConfig
from .split_head_dim import WholeHeadDim
from .state import ELEMENT, ROWS, Frag, Tiling, Warpgroup, issue
from .trace import NoTrace


class Gemms:
    def __init__(self, config: FwdConfig, head_dim: WholeHeadDim, trace: NoTrace):
        self.config, self.dtype, self.head_dim, self.trace = config, ELEMENT[config.dtype], head_dim, trace
        # in flight beside the softmax; with four warpgroups it runs beside the others' GEMMs anyway
        self.pv_pending = 1 if config.overlap and config.warpgroups < 4 else 0

    def acc_S(self, tiling: Tiling):
        return cute.make_rmem_tensor(tiling.mma_qk.get_slice(0).partition_shape_C((ROWS, self.config.tile_n)), Float32)

    def slot(self, f: Frag, q_state):
        """Where this warpgroup's part of a Q stage lies."""
        return self.head_dim.row_block(f.wg) + self.config.row_blocks * q_state.index

    def ldmatrix(self, matrices: int, tiled_copy, mma, thread):
        """What reads an operand of `mma` from shared memory into a thread's registers."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=matrices), self.dtype)
        copy = tiled_copy(atom, mma).get_slice(thread)
        return lambda s, r: cute.copy(copy, copy.partition_S(s), copy.retile(r))

    def issue_qk(self, w: Warpgroup, q_state, k_state):
        self.trace.mark_of(w, "QK")
        f, acc_S = w.frag, self.acc_S(w.tiling)
        tSrQ = f.tSrQ if cute.rank(f.tSrQ) == 3 else f.tSrQ[None, None, None, self.slot(f, q_state)]
        issue(w.tiling.mma_qk, acc_S, tSrQ, f.tSrK[None, None, None, k_state.index], False)
        return acc_S

    def issue_pv(self, w: Warpgroup, v_state):
        self.trace.mark_of(w, "PV")
        self.head_dim.issue_pv(w, v_state)

    def wait_for_pv(self, w: Warpgroup):
        """Where it is in flight beside the softmax."""
        if self.pv_pending:
            warpgroup.wait_group(0)
        self.trace.mark_of(w, "PV done")

    @cute.jit
    def multiply_v(self, w: Warpgroup, v_state):
        """PV with nothing beside it."""
        w.pipes.v.consumer_wait(v_state)
        self.issue_pv(w, v_state)
        warpgroup.wait_group(0)
        w.pipes.v.consumer_release(v_state)
