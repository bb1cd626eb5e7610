"""The producer: warp 0 publishes each work tile and loads its Q, K and V by TMA."""

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync

from .config import FwdConfig
from .parts import Parts
from .state import Gmem, Pipes, Problem, Smem, publish, rank
from .tile_scheduler import Tile


class Producer:
    def __init__(self, config: FwdConfig, parts: Parts):
        self.config = config
        self.rows, self.sequences, self.blocks, self.trace = parts.rows, parts.sequences, parts.blocks, parts.trace

    @cute.jit
    def load(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem):
        """Run by warp 0. Publishes each tile; fills empty stages: Q once, K one block ahead of V, last first."""
        q_state, k_state, v_state, t_state = self._states(pipeline.PipelineUserType.Producer)
        index, tile = self._begin(problem)
        done = Int32(0)
        while tile.valid:
            t_state = publish(smem, pipes, t_state, tile)
            head_kv, (queries, keys) = tile.head // problem.group, self.sequences.of_tile(tile)
            load_q = self._tma_load(gmem, smem, pipes, "q", (tile.head, queries))
            load_k = self._tma_load(gmem, smem, pipes, "k", (head_kv, keys))
            load_v = self._tma_load(gmem, smem, pipes, "v", (head_kv, keys))
            own = self.sequences.problem_of(tile, problem)
            (first, n_max), order = self.blocks.range(tile, own), self.blocks.order(tile, own)
            pipes.k.producer_acquire(k_state)
            load_k(order(n_max - 1), k_state.index, k_state)
            k_state.advance()
            pipes.q.producer_acquire(q_state)
            self.sequences.load_q(load_q, tile, q_state)
            q_state.advance()
            for i in cutlass.range(1, n_max - first, unroll=1):
                pipes.k.producer_acquire(k_state)
                load_k(order(n_max - 1 - i), k_state.index, k_state)
                k_state.advance()
                pipes.v.producer_acquire(v_state)
                load_v(order(n_max - i), v_state.index, v_state)
                v_state.advance()
            pipes.v.producer_acquire(v_state)
            load_v(order(first), v_state.index, v_state)
            v_state.advance()
            index = self._upcoming(index, done, gmem, smem, problem)
            tile = self._decode(index, problem)
            done += 1
        publish(smem, pipes, t_state, tile)

    def _states(self, user):
        c = self.config
        return [pipeline.make_pipeline_state(user, n) for n in (c.q_stages, c.stages, c.stages, 2)]  # q, k, v, tile

    def _begin(self, problem: Problem):
        """Where this CTA begins, and its first tile; it may not touch global memory before it has waited."""
        early = self.sequences.reads or self.blocks.reads  # what these read may be the stream's doing
        if early:
            wait_for_stream()
        index = self.sequences.first(problem)
        tile = self._decode(index, problem)
        if not early:
            wait_for_stream()
        return index, tile

    def _decode(self, index, problem: Problem) -> Tile:
        return self.blocks.tile(self.sequences.decode(index, problem), problem)

    @cute.jit
    def _upcoming(self, index, done, gmem: Gmem, smem: Smem, problem: Problem):
        """The first CTA of a cluster asks the scheduler, and publishes the tile's number to the other."""
        if cutlass.const_expr(smem.broadcast is not None):
            if rank() == 0:
                index = self.sequences.upcoming(index, gmem, problem)
                smem.broadcast.publish(index, done)
            else:
                index = smem.broadcast.consume(done)
        else:
            index = self.sequences.upcoming(index, gmem, problem)
        return index

    def _tma_load(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head_sequence):
        """What loads a block of one head's q, k or v into a slot."""
        c = self.config
        if name == "q":
            return self._tma_copy(gmem, smem, pipes, name, [self.rows.tiles(gmem, name, *head_sequence)])
        g = self.sequences.head(getattr(gmem, name).tensor, *head_sequence)  # (s, d)
        if name == "k":
            return self._tma_copy(gmem, smem, pipes, name, [cute.local_tile(g, (c.tile_n, c.head_dim), (None, 0))])
        columns = [cute.local_tile(g, (c.tile_n, c.columns_v), (None, i)) for i in range(c.head_dim_splits)]
        return self._tma_copy(gmem, smem, pipes, name, columns)

    def _tma_copy(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, columns: list[cute.Tensor]):
        """What loads one of the blocks of each of the `columns`, (rows, d, blocks), into a stage's slots.

        A cluster's CTAs each load their part of k and v.
        """
        tma, s, pipe = getattr(gmem, name), getattr(smem, name), getattr(pipes, name)
        cluster, parts = 1 if name == "q" else self.config.cluster, len(columns)
        place, layout = rank() if cluster > 1 else 0, cute.make_layout(cluster)
        smem_tile = cute.group_modes(s, 0, 2)
        shares = [
            cpasync.tma_partition(tma.atom, place, layout, smem_tile, cute.group_modes(g, 0, 2)) for g in columns
        ]  # (sT, gT)
        share = dict(mcast_mask=cutlass.Int16((1 << cluster) - 1)) if cluster > 1 else {}

        def copy(block, stage, state):
            self.trace.mark(gmem, smem, 0, f"load {name}")
            barrier = pipe.producer_get_barrier(state)
            for i, (sT, gT) in enumerate(shares):
                slot = stage if parts == 1 else stage * parts + i
                cute.copy(tma.atom, gT[None, block], sT[None, slot], tma_bar_ptr=barrier, **share)

        return copy


def wait_for_stream():
    """For what ran before on this stream; what comes next may set itself up."""
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()
