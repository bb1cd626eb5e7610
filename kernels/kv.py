"""K and V on their way to shared memory: which view TMA has of them, and what loads a block into a stage."""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync

from .part import Part
from .sequences import Dense
from .state import Gmem, Pipes, Smem, Tma, rank
from .trace import NoTrace


class Contiguous(Part):
    """A sequence's keys follow each other: a stage is one box of TMA. A cluster's CTAs each load their part of it."""

    def __init__(self, config, sequences: Dense, trace: NoTrace):
        super().__init__(config)
        self.sequences, self.trace = sequences, trace

    arrivals = 1  # for a stage that is loaded

    def ring(self, ring):
        """That stages of K or V go round in, as its reader waits for them."""
        return ring

    def units(self, sequences):
        """What the strides of k and of v are multiples of, where TMA's view is made of it."""
        return None, None

    def tma(self, t: cute.Tensor, smem: cute.Layout, columns: int, unit) -> Tma:
        """Of k or v, by a stage's rows and so many columns."""
        c = self.config
        multicast = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.cluster > 1 else cpasync.CopyBulkTensorTileG2SOp()
        box = c.tile_n, columns
        atom = cpasync.make_tiled_tma_atom(multicast, self.sequences.view(t), smem, box, num_multicast=c.cluster)
        return Tma(*atom)

    def loader(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head, sequence):
        """What loads a block of one head's k or v into a stage: (block, stage, state)."""
        c = self.config
        g = self.sequences.head(getattr(gmem, name).tensor, head, sequence)  # (s, d)
        if name == "k":
            columns = [cute.local_tile(g, (c.tile_n, c.head_dim), (None, 0))]
        else:
            columns = [cute.local_tile(g, (c.tile_n, c.columns_v), (None, i)) for i in range(c.head_dim_splits)]
        return tma_copy(self.trace, gmem, smem, pipes, name, columns, c.cluster)


def tma_copy(trace: NoTrace, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, columns: list, cluster: int = 1):
    """What loads one of the blocks of each of the `columns`, (rows, d, blocks...), into a stage's slots."""
    tma, s, pipe, parts = getattr(gmem, name), getattr(smem, name), getattr(pipes, name), len(columns)
    place, layout = rank() if cluster > 1 else 0, cute.make_layout(cluster)
    smem_tile = cute.group_modes(s, 0, 2)
    shares = [
        cpasync.tma_partition(tma.atom, place, layout, smem_tile, cute.group_modes(g, 0, 2)) for g in columns
    ]  # (sT, gT)
    share = dict(mcast_mask=cutlass.Int16((1 << cluster) - 1)) if cluster > 1 else {}

    def copy(block, stage, state):
        trace.mark(gmem, smem, 0, f"load {name}")
        barrier = pipe.producer_get_barrier(state)
        where = block if isinstance(block, tuple) else (block,)
        for i, (sT, gT) in enumerate(shares):
            slot = stage if parts == 1 else stage * parts + i
            cute.copy(tma.atom, gT[(None, *where)], sT[None, slot], tma_bar_ptr=barrier, **share)

    return copy
