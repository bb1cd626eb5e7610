"""Another kernel: new keys and values go into a cache, each token's to its place, rotated on the way where asked for.

Rotary embeddings: RoPE, Su et al., arXiv:2104.09864. A thread has 16 bytes of a row of k and of v; or of a row of q, of
which only a rotated copy is made. All is read once and written once.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .layout import in_registers
from .seqlen import int32_at
from .state import ELEMENT, wait_for_stream

ELEMENTS = ELEMENT | {"fp32": Float32}
WHERE = "slots", "batch", "pages"  # what says where a token's row is: its slot, or its sequence's length
ROTARY = "", "interleaved", "halves"  # which columns are a pair: neighbours, or one of each half
THREADS, VECTOR = 256, 8  # elements of 16 bytes


@dataclass(frozen=True)
class AppendConfig:
    dtype: str = "bf16"
    where: str = "slots"
    rotary: str = ""
    table: str = ""  # type of cos and sin
    queries: bool = False  # q is rotated too

    def __post_init__(self):
        assert self.dtype in ELEMENT and self.where in WHERE and self.rotary in ROTARY
        assert bool(self.rotary) == bool(self.table) and self.table in ("", self.dtype, "fp32")
        assert self.rotary or not self.queries, "what else becomes of q"

    @property
    def name(self) -> str:
        rotary = f"_{self.rotary}_{self.table}" if self.rotary else ""
        return f"append_sm90_{self.dtype}_{self.where}{rotary}" + ("_queries" if self.queries else "")

    def arguments(self) -> tuple:
        """Of `AppendSm90.__call__`."""
        sizes = [cute.sym_int() for _ in range(11)]
        outer, tokens, outer_q, rows, heads, heads_kv, pages, page_size, d, d_v, angles = sizes

        def tensor(*shape, dtype=self.dtype):
            strides = (*(cute.sym_int64() for _ in shape[1:]), 1)
            return make_fake_tensor(ELEMENTS[dtype], shape, strides, assumed_align=16)

        new = [tensor(outer, tokens, heads_kv, n) for n in (d, d_v)]
        caches = [tensor(pages, page_size, heads_kv, n) for n in (d, d_v)]
        queries = [tensor(outer_q, rows, heads, d) for _ in range(2 * self.queries)]
        table = [tensor(cute.sym_int(), angles, dtype=self.table) for _ in range(2)] if self.rotary else []
        numbers = Slots.signature() if self.where == "slots" else Sequences.signature()
        return *new, *caches, make_fake_stream(use_tvm_ffi_env_stream=True), *chain(queries, table, numbers)


class Slots(NamedTuple):
    """Of each token: address of (tokens,) int64, a row's number among all of the cache; and of int32 positions."""

    slots: Int64
    positions: Int64  # 0: nothing is rotated

    @staticmethod
    def signature() -> tuple:
        return Int64(0), Int64(0)


class Sequences(NamedTuple):
    """Of each sequence."""

    batch: Int32
    cu_seqlens_new: Int64  # address of (batch + 1,) int32: whose tokens are which; 0: each has `new`
    new: Int32
    seqlens: Int64  # address of (batch,) int32: rows before these; 0: `length`
    length: Int32
    rotary_seqlens: Int64  # address of (batch,) int32: angles before these; 0: as many as rows
    capacity: Int32  # rows that a sequence can have
    pages: Int64  # address of page numbers (batch, pages of a sequence), or of (batch,) rows of the cache; 0: its own
    stride: Int32  # of page numbers
    seqlens_out: Int64  # address of (batch,) int32: rows with these
    cu_seqlens_q: Int64  # as those of new tokens, of queries
    seqlen_q: Int32
    spread: Int32  # 1: a sequence's queries follow each other; 0: all are at the first one's place

    @staticmethod
    def signature() -> tuple:
        kinds = Int32, Int64, Int32, Int64, Int32, Int64, Int32, Int64, Int32, Int64, Int64, Int32, Int32
        return tuple(kind(0) for kind in kinds)


class Extent(NamedTuple):
    """Of all rows of k and v, or of q: how many 16 bytes there are."""

    columns: Any  # of a head: the larger of k's and v's
    of_token: Any  # of its heads
    of_outer: Any  # tokens: of a sequence, or of all packed ones
    count: Int32  # in all

    @classmethod
    def of(cls, columns, heads, tokens, outer) -> "Extent":
        divisors = (cute.FastDivmodDivisorV2(cutlass.max(Int32(n), 1)) for n in (columns, columns * heads, tokens))
        return cls(*divisors, Int32(columns * heads * tokens * outer))

    def split(self, index):
        """(sequence or 0, token), head and column."""
        token, rest = divmod(index, self.of_token)
        head, column = divmod(rest, self.columns)
        return divmod(token, self.of_outer), head, column


class Pair(NamedTuple):
    k: Any
    v: Any


class Place(NamedTuple):
    """Where a token's rows go, if anywhere, and its place in its sequence."""

    there: Boolean
    page: Int32
    row: Int32
    position: Int32


class Member(NamedTuple):
    """A token's sequence, and its number there."""

    there: Boolean
    sequence: Int32
    number: Int32


class AppendSm90:
    """One append kernel; `__call__` is what the host compiles and calls."""

    def __init__(self, config: AppendConfig):
        self.config, self.dtype = config, ELEMENT[config.dtype]

    @cute.jit
    def __call__(
        self,
        mK: cute.Tensor,  # (sequences, tokens of each, h_kv, d), or (1, tokens, h_kv, d); and of d_v
        mV: cute.Tensor,
        mK_cache: cute.Tensor,  # (pages, page_size, h_kv, d), and of d_v
        mV_cache: cute.Tensor,
        stream: cuda.CUstream,
        *extras,  # q and its copy, like mK; cos and sin, (places, angles); then as of Slots or Sequences
    ):
        c, extras = self.config, list(extras)
        queries = [extras.pop(0) for _ in range(2 * c.queries)]
        table = [extras.pop(0) for _ in range(2 * bool(c.rotary))]
        where: Any = Slots(*extras) if c.where == "slots" else Sequences(*extras)
        outer, tokens, heads, d = mK.shape
        columns = Pair(*(Int32(n) // VECTOR for n in (d, mV.shape[3])))
        new, of_q = Extent.of(cutlass.max(*columns), heads, tokens, outer), None
        threads = new.count
        if cutlass.const_expr(c.queries):
            outer_q, rows, heads_q, _ = queries[0].shape
            of_q = Extent.of(columns.k, heads_q, rows, outer_q)
            threads += of_q.count
        if cutlass.const_expr(c.where != "slots"):
            threads = cutlass.max(threads, where.batch)
        self.kernel.set_name_prefix(c.name, keep_mangled_name=False)
        self.kernel(new, of_q, columns, Pair(mK, mV), Pair(mK_cache, mV_cache), queries, table, where).launch(
            grid=(cute.ceil_div(threads, THREADS), 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, extent: Extent, of_q, columns: Pair, new: Pair, caches: Pair, queries: list, table: list, where):
        wait_for_stream()
        index = Int32(cute.arch.block_idx()[0]) * THREADS + cute.arch.thread_idx()[0]
        if index < extent.count:
            self._token(index, extent, columns, new, caches, table, where)
        if cutlass.const_expr(self.config.queries):
            if (index >= extent.count) & (index - extent.count < of_q.count):
                self._query(index - extent.count, of_q, queries, table, where)
        if cutlass.const_expr(self.config.where != "slots"):
            if index < where.batch:
                self._count(index, where)

    @cute.jit
    def _token(self, index: Int32, extent: Extent, columns: Pair, new: Pair, caches: Pair, table: list, where):
        token, head, column = extent.split(index)
        place = self._place(token, caches.k, where)
        if place.there:
            self._move((*token, head), column, place, columns, new, caches, table)

    @cute.jit
    def _move(self, row: tuple, column: Int32, place: Place, columns: Pair, new: Pair, caches: Pair, table: list):
        """Both are on their way before one is stored."""
        of_k, of_v = (cutlass.min(column, n - 1) for n in columns)
        k, v = self._load(new.k, row, of_k), self._load(new.v, row, of_v)
        if cutlass.const_expr(self.config.rotary):
            self._rotate(k, new.k, row, of_k, place.position, table)
        at = place.page, place.row, row[2]
        if column < columns.k:
            cute.autovec_copy(k, self._vector(caches.k, at, column))
        if column < columns.v:
            cute.autovec_copy(v, self._vector(caches.v, at, column))

    @cute.jit
    def _query(self, index: Int32, extent: Extent, queries: list, table: list, where):
        token, head, column = extent.split(index)
        row = (*token, head)
        q = self._load(queries[0], row, column)
        member = self._member(token, where.cu_seqlens_q, where.seqlen_q, where)
        if member.there:
            position = self._angle(member.sequence, where) + member.number * where.spread
            self._rotate(q, queries[0], row, column, position, table)
        cute.autovec_copy(q, self._vector(queries[1], row, column))

    @cute.jit
    def _count(self, sequence: Int32, where: Sequences):
        """What the attention that follows reads as lengths."""
        new = where.new
        if where.cu_seqlens_new != 0:
            ends = cute.make_tensor(int32_at(where.cu_seqlens_new) + sequence, 2)
            new = cutlass.max(ends[1] - ends[0], 0)
        rows = cutlass.min(self._rows(sequence, where), where.capacity)
        rows += cutlass.min(new, where.capacity - rows)
        cute.make_tensor(int32_at(where.seqlens_out) + sequence, 1)[0] = rows

    @cute.jit
    def _place(self, token: tuple, cache: cute.Tensor, where) -> Place:
        pages, page_size = Int32(cache.shape[0]), Int32(cache.shape[1])
        if cutlass.const_expr(self.config.where == "slots"):
            place = self._slot(token[1], pages, page_size, where)
        else:
            place = self._next_row(token, pages, page_size, where)
        return place

    @cute.jit
    def _slot(self, token: Int32, pages: Int32, page_size: Int32, where: Slots) -> Place:
        """Of one that is none, such as -1, nowhere."""
        slot = cute.make_tensor(cute.make_ptr(Int64, where.slots, cute.AddressSpace.gmem) + token, 1)[0]
        there = (slot >= 0) & (slot < Int64(pages) * page_size)
        page, position = Int32(0), Int32(0)
        row = Int32(0)
        if there:
            page = Int32(slot // page_size)
            row = Int32(slot - Int64(page) * page_size)
            if where.positions != 0:
                position = cute.make_tensor(int32_at(where.positions) + token, 1)[0]
        return Place(there, page, row, position)

    @cute.jit
    def _next_row(self, token: tuple, pages: Int32, page_size: Int32, where: Sequences) -> Place:
        """Behind the rows that its sequence has; nowhere beyond those that it can have, or in a page that is none."""
        there, sequence, number = self._member(token, where.cu_seqlens_new, where.new, where)
        rows = self._rows(sequence, where)
        there = there & (rows < where.capacity) & (number < where.capacity - rows)
        page, row = sequence, rows + number
        if there:
            if cutlass.const_expr(self.config.where == "pages"):
                n = (rows + number) // page_size
                row = rows + number - n * page_size
                at = where.pages + 4 * (Int64(sequence) * where.stride + n)
                page = cute.make_tensor(int32_at(at), 1)[0]
            else:
                if where.pages != 0:
                    page = cute.make_tensor(int32_at(where.pages) + sequence, 1)[0]
        there = there & (page >= 0) & (page < pages)
        return Place(there, page, row, self._angle(sequence, where) + number)

    @cute.jit
    def _member(self, token: tuple, cu_seqlens: Int64, each: Int32, where: Sequences) -> Member:
        sequence, start, length = token[0], Int32(0), each
        if cu_seqlens != 0:
            beyond = where.batch
            while beyond - sequence > 1:
                middle = (sequence + beyond) // 2
                before = cute.make_tensor(int32_at(cu_seqlens) + middle, 1)[0] <= token[1]
                sequence = middle if before else sequence
                beyond = beyond if before else middle
            ends = cute.make_tensor(int32_at(cu_seqlens) + sequence, 2)
            start = ends[0]
            length = ends[1] - ends[0]
        number = token[1] - start
        return Member((number >= 0) & (number < length), sequence, number)

    @cute.jit
    def _rows(self, sequence: Int32, where: Sequences) -> Int32:
        rows = where.length
        if where.seqlens != 0:
            rows = cute.make_tensor(int32_at(where.seqlens) + sequence, 1)[0]
        return cutlass.max(rows, 0)

    @cute.jit
    def _angle(self, sequence: Int32, where: Sequences) -> Int32:
        """The place of a sequence's first new token, by which it is rotated."""
        angle = self._rows(sequence, where)
        if where.rotary_seqlens != 0:
            angle = cute.make_tensor(int32_at(where.rotary_seqlens) + sequence, 1)[0]
        return angle

    @cute.jit
    def _rotate(self, x: cute.Tensor, t: cute.Tensor, row: tuple, column: Int32, position: Int32, table: list):
        """x, the column-th 16 bytes of a row of t, in place. Angles end with the table."""
        angles = Int32(table[0].shape[1])
        if column < angles * 2 // VECTOR:
            at = cutlass.max(cutlass.min(position, Int32(table[0].shape[0]) - 1), 0)
            if cutlass.const_expr(self.config.rotary == "interleaved"):
                self._rotate_neighbours(x, column, at, table)
            else:
                self._rotate_halves(x, t, row, column, at, angles // VECTOR, table)

    def _rotate_neighbours(self, x: cute.Tensor, column, at, table: list):
        cos, sin = (self._angles(t, at, column, VECTOR // 2) for t in table)
        for i in range(VECTOR // 2):
            a, b = Float32(x[2 * i]), Float32(x[2 * i + 1])
            x[2 * i] = (a * cos[i] - b * sin[i]).to(self.dtype)
            x[2 * i + 1] = (a * sin[i] + b * cos[i]).to(self.dtype)

    def _rotate_halves(self, x: cute.Tensor, t: cute.Tensor, row: tuple, column, at, half, table: list):
        """With the other half's 16 bytes."""
        first = column < half
        other = self._load(t, row, cutlass.select_(first, column + half, column - half))
        cos, sin = (self._angles(table_, at, cutlass.select_(first, column, column - half), VECTOR) for table_ in table)
        sign = cutlass.select_(first, Float32(-1.0), Float32(1.0))
        for i in range(VECTOR):
            x[i] = (Float32(x[i]) * cos[i] + Float32(other[i]) * sin[i] * sign).to(self.dtype)

    def _angles(self, t: cute.Tensor, at, column, n: int) -> list:
        """n neighbours of a row of cos or sin."""
        found = in_registers(self._part(t, (at,), column, n))
        return [Float32(found[i]) for i in range(n)]

    def _load(self, t: cute.Tensor, row: tuple, column) -> cute.Tensor:
        return in_registers(self._vector(t, row, column))

    def _vector(self, t: cute.Tensor, row: tuple, column) -> cute.Tensor:
        """16 bytes of a row, where they lie."""
        return self._part(t, row, column, VECTOR)

    def _part(self, t: cute.Tensor, row: tuple, column, n: int) -> cute.Tensor:
        """The column-th n elements of a row. In 64 bits throughout: CuTe's own offsets need not be."""
        elements = reduce(lambda a, b: a + b, (Int64(i) * s for i, s in zip(row, t.stride, strict=False)))
        size = t.element_type.width // 8
        at = t.iterator.toint() + (elements + Int64(column) * n) * size
        return cute.make_tensor(
            cute.make_ptr(t.element_type, at, cute.AddressSpace.gmem, assumed_align=min(n * size, 16)), n
        )
