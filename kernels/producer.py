"""The producer: warp 0 publishes each work tile and loads its Q, K and V by TMA."""

import cutlass
from cutlass import Int32, cute, pipeline

from .config import FwdConfig
from .kv import tma_copy
from .parts import Parts
from .state import Gmem, Pipes, Problem, Smem, consume, nth, publish, rank, wait_for_stream
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
        copy = tma_copy(self.trace, gmem, smem, pipes, "q", [self.rows.tiles(gmem, "q", head, sequence)])
        return lambda block, slot, state: copy(self.rows.block(block), slot, state)


class CachedProducer(Producer):
    """Looks up the pages of some blocks at once, for K and then for V, while their stages are not free yet.

    A stage's boxes are shared by `config.producer_warps`: the first one, which leads, publishes the tiles and loads Q;
    the others read the tiles as the MMA warpgroups do. Alone, it publishes a tile when the first K is on its way.
    """

    @cute.jit
    def load(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem):
        """As `Producer.load`."""
        alone = self.config.producer_warps == 1
        q_state, k_state, v_state, t_state = self._states(pipeline.PipelineUserType.Producer)
        place = self.sequences.place(problem)
        self.sequences.wait(place)
        index = self.sequences.first(problem, place)
        tile = self.sequences.decode(index, problem, place)
        while tile.valid:
            head_kv, queries = self.sequences.head_kv(tile, problem, place), self.sequences.of_tile(tile)[0]
            if cutlass.const_expr(not alone):
                t_state = publish(smem, pipes, t_state, self.sequences.completed(tile, index, problem))
            walk = self._walk(gmem, smem, pipes, tile, head_kv, problem)
            boxes, k_state = self._first_k(pipes, walk, k_state, tile, problem, None)
            if cutlass.const_expr(alone):
                t_state = publish(smem, pipes, t_state, self.sequences.completed(tile, index, problem))
            load_q = self._load_q(gmem, smem, pipes, tile.head, queries)
            pipes.q.producer_acquire(q_state)
            self.sequences.load_q(load_q, tile, q_state)
            q_state.advance()
            k_state, v_state = self._rest(pipes, walk, boxes, k_state, v_state, tile, problem, None)
            index = self.sequences.upcoming(index, tile, gmem, problem)
            tile = self.sequences.decode(index, problem, place)
        publish(smem, pipes, t_state, tile)

    @cute.jit
    def help(self, gmem: Gmem, smem: Smem, pipes: Pipes, problem: Problem, number: Int32):
        """The number-th of the producer's warps, from 1 on."""
        _, k_state, v_state, _ = self._states(pipeline.PipelineUserType.Producer)
        done, place = Int32(0), self.sequences.place(problem)
        tile = consume(smem, pipes, nth(done, 2), self.blocks.tile_type)
        while tile.valid:
            walk = self._walk(gmem, smem, pipes, tile, self.sequences.head_kv(tile, problem, place), problem)
            boxes, k_state = self._first_k(pipes, walk, k_state, tile, problem, number)
            k_state, v_state = self._rest(pipes, walk, boxes, k_state, v_state, tile, problem, number)
            done += 1
            tile = consume(smem, pipes, nth(done, 2), self.blocks.tile_type)

    def _walk(self, gmem: Gmem, smem: Smem, pipes: Pipes, tile: Tile, head_kv, problem: Problem):
        """What loads a tile's K and V, from which block to which, in which order, and where its keys begin."""
        own, keys = self.sequences.problem_of(tile, problem), self.sequences.of_tile(tile)[1]
        loads = [self.kv.loader(gmem, smem, pipes, name, head_kv, keys) for name in "kv"]
        return *loads, *self.blocks.range(tile, own), self.blocks.order(tile, own), problem.grid.k.origin(tile.batch)

    @cute.jit
    def _first_k(self, pipes: Pipes, walk: cutlass.Constexpr, k_state, tile: Tile, problem: Problem, number):
        load_k, _, _, n_max, order, origin = walk
        boxes = self.kv.place(order(n_max - 1), tile.seqlen_k, origin, problem, number)
        self._acquire(pipes.k, k_state, number)
        load_k(boxes, order(n_max - 1), k_state.index, k_state, number)
        k_state.advance()
        return boxes, k_state

    @cute.jit
    def _rest(
        self, pipes: Pipes, walk: cutlass.Constexpr, boxes, k_state, v_state, tile: Tile, problem: Problem, number
    ):
        """All but the first K, which is one block ahead of V."""
        load_k, load_v, first, n_max, order, origin = walk
        for i in cutlass.range(1, n_max - first, unroll=1):
            boxes_v, n_block = boxes, order(n_max - 1 - i)
            boxes = self.kv.next_place(boxes, n_block, tile.seqlen_k, origin, problem, number)
            self._acquire(pipes.k, k_state, number)
            load_k(boxes, n_block, k_state.index, k_state, number)
            k_state.advance()
            self._acquire(pipes.v, v_state, number)
            load_v(boxes_v, order(n_max - i), v_state.index, v_state, number)
            v_state.advance()
        self._acquire(pipes.v, v_state, number)
        load_v(boxes, order(first), v_state.index, v_state, number)
        v_state.advance()
        return k_state, v_state

    def _acquire(self, pipe, state, number):
        """A free stage. If TMA fills it, the leading warp announces its bytes."""
        if number is None and not self.config.cache.gathers:
            pipe.producer_acquire(state)
        else:
            pipe.sync_object_empty.wait(state.index, state.phase)
