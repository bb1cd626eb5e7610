"""The producer: warp 0 publishes each work tile and loads its Q, K and V by TMA."""

import cutlass
from cutlass import Int32, cute, pipeline

from .config import FwdConfig
from .kv import tma_copy
from .parts import Parts
from .state import Gmem, Pipes, Problem, Smem, publish, rank, wait_for_stream
from .tile_scheduler import Tile


class Producer:
    def __init__(self, config: FwdConfig, parts: Parts):
        self.config = config
        self.rows, self.sequences, self.kv = parts.rows, parts.sequences, parts.kv
        self.blocks, self.trace = parts.blocks, parts.trace

    @cute.jit
    def load(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem):
        """Run by warp 0. Publishes each tile; fills empty stages: Q once, K one block ahead of V, last first."""
        q_state, k_state, v_state, t_state = self._states(pipeline.PipelineUserType.Producer)
        index, tile = self._begin(problem)
        done = Int32(0)
        while tile.valid:
            t_state = publish(smem, pipes, t_state, tile)
            head_kv, (queries, keys) = tile.head // problem.group, self.sequences.of_tile(tile)
            load_q = self._load_q(gmem, smem, pipes, tile.head, queries)
            load_k, load_v = (self.kv.loader(gmem, smem, pipes, name, head_kv, keys) for name in "kv")
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

    def _load_q(self, gmem: Gmem, smem: Smem, pipes: Pipes, head, sequence):
        """What loads 64 rows of q into a slot."""
        return tma_copy(self.trace, gmem, smem, pipes, "q", [self.rows.tiles(gmem, "q", head, sequence)])


class CachedProducer(Producer):
    """Looks up a block's pages once, for K and then for V, while its stage is not free yet.

    A tile's first K is asked for as soon as its place is known, and the tile published after that.
    """

    @cute.jit
    def load(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem):
        """As `Producer.load`."""
        q_state, k_state, v_state, t_state = self._states(pipeline.PipelineUserType.Producer)
        place = self.sequences.place(problem)
        self.sequences.wait(place)
        index = self.sequences.first(problem, place)
        tile = self.sequences.decode(index, problem, place)
        while tile.valid:
            head_kv, (queries, keys) = self.sequences.head_kv(tile, problem, place), self.sequences.of_tile(tile)
            load_k, load_v = (self.kv.loader(gmem, smem, pipes, name, head_kv, keys) for name in "kv")
            (first, n_max), order = self._blocks(tile, problem)
            origin = problem.grid.k.origin(tile.batch)
            boxes = self.kv.place(order(n_max - 1), tile.seqlen_k, origin, problem)
            pipes.k.producer_acquire(k_state)
            load_k(boxes, k_state.index, k_state)
            k_state.advance()
            t_state = publish(smem, pipes, t_state, self.sequences.completed(tile, index, problem))
            load_q = self._load_q(gmem, smem, pipes, tile.head, queries)
            pipes.q.producer_acquire(q_state)
            self.sequences.load_q(load_q, tile, q_state)
            q_state.advance()
            for i in cutlass.range(1, n_max - first, unroll=1):
                boxes_v = boxes
                boxes = self.kv.place(order(n_max - 1 - i), tile.seqlen_k, origin, problem)
                pipes.k.producer_acquire(k_state)
                load_k(boxes, k_state.index, k_state)
                k_state.advance()
                pipes.v.producer_acquire(v_state)
                load_v(boxes_v, v_state.index, v_state)
                v_state.advance()
            pipes.v.producer_acquire(v_state)
            load_v(boxes, v_state.index, v_state)
            v_state.advance()
            index = self.sequences.upcoming(index, tile, gmem, problem)
            tile = self.sequences.decode(index, problem, place)
        publish(smem, pipes, t_state, tile)

    def _blocks(self, tile: Tile, problem: Problem):
        own = self.sequences.problem_of(tile, problem)
        return self.blocks.range(tile, own), self.blocks.order(tile, own)
