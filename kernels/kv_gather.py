"""Keys and values in pages of few rows, or of odd sizes: threads copy them, since boxes of TMA would be small.

The warps of the producer share the rows of a stage. What their threads copy, 16 bytes each, is swizzled as TMA would
have it. It is there when all of them have arrived, and a reader fences it before WGMMA, the async proxy, sees it.
"""

from dataclasses import fields
from math import gcd

import cutlass
from cutlass import Int32, Int64, cute, pipeline

from .kv_cache import Boxes, Origin, Paged
from .seqlen import REACH
from .state import Gmem, Pipes, Problem, Smem, Tma

BYTES = 16  # of a copy: 8 elements
UNROLL = 8  # copies: all of them together take more registers than a producer has
ATOM = 64  # columns, 128 bytes: of the swizzle, which exchanges their 16 bytes by the row


class Copied(pipeline.PipelineTmaAsync):
    def consumer_wait(self, *state):
        super().consumer_wait(*state)
        cute.arch.fence_view_async_shared()


class Gathered(Paged):
    """`place` is where a warp's rows of some blocks lie."""

    @property
    def arrivals(self) -> int:
        return 32 * self.config.producer_warps

    @property
    def rows(self) -> int:
        """Of a warp, of a stage."""
        return self.config.tile_n // self.config.producer_warps

    @property
    def blocks_at_once(self) -> int:
        return 32 // self.rows

    def ring(self, ring):
        return Copied(**{field.name: getattr(ring, field.name) for field in fields(ring)})

    def tma(self, t: cute.Tensor, smem: cute.Layout, columns: int, unit: Int64) -> Tma:
        """There is none: (units, d, h)."""
        (_, d, heads, _), (_, _, head, _) = t.shape, t.stride
        layout = cute.make_layout((Int32(REACH), d, heads), stride=(unit, 1, head))
        return Tma(None, cute.make_tensor(t.iterator, layout))

    @cute.jit
    def place(self, n_block: Int32, seqlen_k: Int32, origin: Origin, problem: Problem, number) -> Boxes:
        """A lane's row, 1 for `row` where it is a key's."""
        c, keys, n = self.config, problem.grid.k.keys, self.blocks_at_once
        first, lane = n_block // n * n, cute.arch.lane_idx()
        key = (first + lane // self.rows) * c.tile_n + self._first_row(number) + lane % self.rows
        page, row = self.look_up(key, key < seqlen_k, origin, problem)
        y_k, y_v = (page * x.page + row * x.row for x in (keys.k, keys.v))
        return Boxes(first, Int32(key < seqlen_k), y_k, y_v)

    def _first_row(self, number):
        """Of a warp's, of a stage."""
        return 0 if number is None else number * self.rows

    def loader(self, gmem: Gmem, smem: Smem, pipes: Pipes, name: str, head, sequence):
        """As `Paged.loader`."""
        t, to, pipe = getattr(gmem, name).tensor, getattr(smem, name).iterator.toint(), getattr(pipes, name)
        begin = t.iterator.toint() + Int64(head) * t.stride[2] * 2

        def load(boxes: Boxes, n_block, stage, state, number):
            self.trace.mark(gmem, smem, 0, f"load {name}")
            self._copy_rows(name, t, begin, to, boxes, n_block, stage, number)
            cute.arch.cp_async_mbarrier_arrive_noinc(pipe.producer_get_barrier(state))

        return load

    @cute.jit
    def _copy_rows(
        self, name: cutlass.Constexpr, t: cute.Tensor, begin, to, boxes: Boxes, n_block: Int32, stage: Int32, number
    ):
        """A warp's rows of a stage, each by neighbouring lanes."""
        y, own = boxes.y_k if name == "k" else boxes.y_v, self._first_row(number)
        first = (n_block - boxes.first) * self.rows  # lane, of those that know where these rows are
        columns = self.config.d_v if name == "v" else self.config.head_dim
        chunks = columns * 2 // BYTES  # of a row
        at_once, lane = gcd(chunks, 32), cute.arch.lane_idx()
        for i in cutlass.range(0, self.rows, 32 // at_once, unroll=UNROLL):
            row = i + lane // at_once
            is_key, its_y = (cute.arch.shuffle_sync(x, first + row) for x in (boxes.row, y))
            source = begin + Int64(its_y) * t.stride[0] * 2
            for j in cutlass.range_constexpr(0, chunks, at_once):
                chunk = j + lane % at_once
                count = cutlass.select_((is_key != 0) & (chunk * 8 < t.shape[1]), Int32(BYTES), Int32(0))
                copy(to + self.offset(name, stage, own + row, chunk), source + chunk * BYTES, count)

    def offset(self, name: str, stage, row, chunk):
        """In bytes, of a row's 16: rows of an atom's columns follow each other, then come the next atom's."""
        c, atoms = self.config, (self.config.columns_v if name == "v" else self.config.head_dim) // ATOM
        atom, parts = chunk // 8, c.head_dim_splits if name == "v" else 1
        slot = stage * parts * atoms + atom  # parts of V are slots of their own, one behind the other
        return (slot * c.tile_n + row) * 128 + ((chunk % 8) ^ (row % 8)) * BYTES


def copy(to: Int32, source: Int64, count: Int32):
    """So many of 16 bytes, then zeros."""
    cute.arch.inline_ptx("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[to, source, count])
