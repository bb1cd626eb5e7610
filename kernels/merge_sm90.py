"""Partial results of the same queries, merged: o and lse of several sets of keys become those of all of them.

o = sum of w_i o_i, w_i = exp(lse_i - lse), lse = log of the sum of exp(lse_i) (FlashDecoding, Dao et al., 2023). All is
read once and written once. A thread has the same vectors of a row in every state and in the result, which may replace a
state. A CTA has whole rows, as many as its threads suffice for.
"""

from dataclasses import dataclass
from functools import reduce
from operator import mul, or_
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .layout import not_before
from .state import ELEMENT, address, wait_for_stream

ELEMENTS = ELEMENT | {"fp32": Float32}
LSE_LAYOUTS = {"bhsd": "bhs", "bshd": "bhs", "thd": "ht"}
THREADS = 256
VECTOR_BYTES = 16
VECTORS = 2  # of a row that a thread has: it finds the row, and the weights, for all of them
STATES_MAX = 8  # tensors of their own
STATES_AT_ONCE = 4  # of a stack


@dataclass(frozen=True)
class MergeConfig:
    dtype: str = "bf16"  # of o
    layout: str = "bhsd"
    states: int = 2  # how many are merged, each o and lse a tensor; 0: stacked, any number

    def __post_init__(self):
        assert self.dtype in ELEMENTS and self.layout in LSE_LAYOUTS and 0 <= self.states <= STATES_MAX

    @property
    def name(self) -> str:
        return f"merge_sm90_{self.dtype}_{self.layout}_{self.states or 'stacked'}"

    @property
    def vector(self) -> int:
        """Elements."""
        return VECTOR_BYTES * 8 // ELEMENTS[self.dtype].width

    @property
    def lse_modes(self) -> list[int]:
        """Where lse has the dimensions of o's rows."""
        return [LSE_LAYOUTS[self.layout].index(x) for x in self.layout[:-1]]

    def arguments(self) -> tuple:
        """Of `MergeSm90.__call__`."""
        sizes, stack = {x: cute.sym_int() for x in "kbhstd"}, "" if self.states else "k"

        def state(stack=""):
            o, lse = stack + self.layout, stack + LSE_LAYOUTS[self.layout]
            strides = [cute.sym_int64() for _ in o + lse]
            return (
                make_fake_tensor(
                    ELEMENTS[self.dtype], [sizes[x] for x in o], (*strides[1 : len(o)], 1), assumed_align=16
                ),
                make_fake_tensor(Float32, [sizes[x] for x in lse], tuple(strides[len(o) :])),
            )

        states = [x for _ in range(self.states or 1) for x in state(stack)]
        return *state(), Float32(1.0), Float32(1.0), make_fake_stream(use_tvm_ffi_env_stream=True), *states


class State(NamedTuple):
    o: cute.Tensor  # (rows' dimensions, d); a stack's dimension comes first
    lse: cute.Tensor  # (rows' dimensions), in o's order


class Sizes(NamedTuple):
    rows: tuple  # of their dimensions
    count: Uint32  # of all rows
    vectors: Uint32  # of a row
    threads: Uint32  # of a row
    per_cta: Uint32  # rows of a CTA


class Base(NamedTuple):
    """lse's: what makes logarithms to base 2 of it, and what makes it of those."""

    to_log2: Float32
    of_log2: Float32


class Part(NamedTuple):
    """A thread's part of a row, 16 bytes in each of some columns."""

    row: tuple  # its index in each dimension
    columns: tuple
    stores: tuple  # for each column, whether no other thread has the same


class MergeSm90:
    """One merge kernel; `__call__` is what the host compiles and calls."""

    def __init__(self, config: MergeConfig):
        self.config, self.dtype = config, ELEMENTS[config.dtype]

    @cute.jit
    def __call__(
        self,
        mO: cute.Tensor,  # as the layout says; it may be one of the states'
        mLSE: cute.Tensor,  # (b, h, s) or (h, t)
        to_log2: Float32,  # 1 where lse is to base 2
        of_log2: Float32,
        stream: cuda.CUstream,
        *extras,  # like mO and mLSE, of each state; or one pair, the states' dimension first
    ):
        c = self.config
        rows, vectors = tuple(Uint32(n) for n in mO.shape[:-1]), Uint32(mO.shape[-1]) // c.vector
        threads = (vectors + VECTORS - 1) // VECTORS
        sizes = Sizes(rows, reduce(mul, rows), vectors, threads, THREADS // threads)
        states = [self._state(*extras[i : i + 2]) for i in range(0, len(extras), 2)]
        self.kernel.set_name_prefix(c.name, keep_mangled_name=False)
        self.kernel(sizes, Base(to_log2, of_log2), self._state(mO, mLSE), states).launch(
            grid=(cute.ceil_div(sizes.count, sizes.per_cta), 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    def _state(self, o: cute.Tensor, lse: cute.Tensor) -> State:
        stack = cute.rank(lse) - len(self.config.lse_modes)
        modes = [*range(stack), *(stack + mode for mode in self.config.lse_modes)]
        return State(o, cute.make_tensor(lse.iterator, cute.select(lse.layout, mode=modes)))

    @cute.kernel
    def kernel(self, sizes: Sizes, base: Base, out: State, states: list):
        wait_for_stream()
        part = self._part(sizes)
        if cutlass.const_expr(self.config.states):
            acc, lse = self._merge(states, part, base)
        else:
            acc, lse = self._merge_stack(states[0], part, base)
        self._store(out.o, part, acc)
        if part.stores[0] & (part.columns[0] == 0):
            self._store_lse(out.lse, part, lse)

    def _part(self, sizes: Sizes) -> Part:
        """This thread's. One that is left over does what another one does, and stores nothing."""
        thread, block = (Uint32(x()[0]) for x in (cute.arch.thread_idx, cute.arch.block_idx))
        mine, column, first = thread // sizes.threads, thread % sizes.threads, block * sizes.per_cta
        rest, index = cutlass.min(first + cutlass.min(mine, sizes.per_cta - 1), sizes.count - 1), ()
        for n in reversed(sizes.rows[1:]):
            rest, index = rest // n, (rest % n, *index)
        mine_alone = (mine < sizes.per_cta) & (first + mine < sizes.count)
        columns = [column + sizes.threads * i for i in range(VECTORS)]
        stores = tuple(mine_alone & (column < sizes.vectors) for column in columns)
        return Part((rest, *index), tuple(cutlass.min(column, sizes.vectors - 1) for column in columns), stores)

    @cute.jit
    def _merge(self, states: list, part: Part, base: Base):
        """Of so many states."""
        parts = [self._load(state.o, part.row, part) for state in states]
        lses = [self._lse(state.lse, part.row) for state in states]
        cute.arch.sync_threads()  # a row's lse is read by all before it may be replaced
        top = self._not_before(parts, self._finite(reduce(cute.arch.fmax, lses)))
        weights = [self._weight(lse, top, base) for lse in lses]
        total = reduce(lambda a, b: a + b, weights)
        acc, scale = self._zeros(), self._inverse(total)
        for vectors, lse, weight in zip(parts, lses, weights, strict=True):
            self._add(acc, vectors, lse, weight * scale)
        return acc, self._total(top, total, base)

    @cute.jit
    def _merge_stack(self, stack: State, part: Part, base: Base):
        """Of any number: lse is read for its maximum, for the weights' sum, and beside o."""
        acc, top, total, count = self._zeros(), -Float32.inf, Float32(0.0), stack.lse.shape[0]
        for i in cutlass.range(count, unroll=STATES_MAX):
            top = cute.arch.fmax(top, self._lse(stack.lse, (i, *part.row)))
        top = self._finite(top)
        for i in cutlass.range(count, unroll=STATES_MAX):
            total += self._weight(self._lse(stack.lse, (i, *part.row)), top, base)
        scale = self._inverse(total)
        for first in cutlass.range(0, count, STATES_AT_ONCE):
            self._add_some(acc, stack, first, part, base, (top, scale))
        cute.arch.sync_threads()  # as in `_merge`
        return acc, self._total(top, total, base)

    @cute.jit
    def _add_some(self, acc: cute.Tensor, stack: State, first: Int32, part: Part, base: Base, relative: tuple):
        """Of a stack, so many states from the first on; one beyond the last counts as one without keys."""
        top, scale = relative
        places = [(first + i, cutlass.min(first + i, stack.lse.shape[0] - 1)) for i in range(STATES_AT_ONCE)]
        parts = [self._load(stack.o, (i, *part.row), part) for _, i in places]
        lses = [self._lse(stack.lse, (i, *part.row)) for _, i in places]
        top = self._not_before(parts, top)
        for vectors, lse, (i, last) in zip(parts, lses, places, strict=True):
            x = lse if i == last else -Float32.inf
            self._add(acc, vectors, x, self._weight(x, top, base) * scale)

    def _not_before(self, parts: list, x: Float32):
        """x, but known no sooner than what was loaded: ptxas would load one bit after another, to save registers."""
        words = [vectors[0, i] for vectors in parts for i in range(VECTORS)]
        return x + Float32(not_before([reduce(or_, words)], Int32(0)))

    @cute.jit
    def _finite(self, top: Float32):
        """-inf, of rows that no state has keys for, would make NaN of their weights."""
        return Float32(0.0) if top == -Float32.inf else top

    def _weight(self, lse: Float32, top: Float32, base: Base):
        """Relative to the largest: up to 1. The difference comes first, so lse may be of any size."""
        return cute.math.exp2((lse - top) * base.to_log2, fastmath=True)

    @cute.jit
    def _inverse(self, total: Float32):
        """0 where no state has keys."""
        return Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)

    def _total(self, top: Float32, total: Float32, base: Base):
        return top + cute.math.log2(total, fastmath=True) * base.of_log2

    def _zeros(self):
        acc = cute.make_rmem_tensor((self.config.vector, VECTORS), Float32)
        acc.fill(0.0)
        return acc

    @cute.jit
    def _add(self, acc: cute.Tensor, vectors: cute.Tensor, lse: Float32, weight: Float32):
        """A state without keys has no o, whatever lies there."""
        for i in cutlass.range_constexpr(cute.size(vectors)):
            vectors[i] = Int32(0) if lse == -Float32.inf else vectors[i]
        o = cute.recast_tensor(vectors, self.dtype)
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = cute.math.fma(Float32(o[i]), weight, acc[i])

    @cute.jit
    def _lse(self, lse: cute.Tensor, row: tuple):
        """+inf is read as -inf."""
        x = self._number(lse, row)[0]
        return -Float32.inf if x == Float32.inf else x

    def _store_lse(self, lse: cute.Tensor, part: Part, value: Float32):
        self._number(lse, part.row)[0] = value

    def _number(self, lse: cute.Tensor, row: tuple):
        """A row's, where it lies."""
        return cute.make_tensor(address(Float32, self._address(lse, row)), 1)

    def _load(self, o: cute.Tensor, row: tuple, part: Part):
        vectors = cute.make_rmem_tensor((4, VECTORS), Int32)
        for i, words in enumerate(self._words(o, row, part)):
            vectors[None, i].store(words.load())
        return vectors

    @cute.jit
    def _store(self, o: cute.Tensor, part: Part, acc: cute.Tensor):
        vectors = cute.make_rmem_tensor_like(acc, self.dtype)
        vectors.store(acc.load().to(self.dtype))
        rounded = cute.recast_tensor(vectors, Int32)
        for i in cutlass.range_constexpr(VECTORS):
            if part.stores[i]:
                self._store_words(self._words(o, part.row, part)[i], rounded[None, i])

    def _store_words(self, words: cute.Tensor, vector: cute.Tensor):
        words.store(vector.load())

    def _words(self, o: cute.Tensor, row: tuple, part: Part) -> list[cute.Tensor]:
        """A thread's part of a row, where it lies."""
        found = []
        for column in part.columns:
            at = self._address(o, row) + Int64(column) * VECTOR_BYTES
            to = cute.make_ptr(Int32, at, cute.AddressSpace.gmem, assumed_align=VECTOR_BYTES)
            found.append(cute.make_tensor(to, 4))
        return found

    def _address(self, t: cute.Tensor, row: tuple) -> Int64:
        """In 64 bits throughout: CuTe's own offsets need not be."""
        elements = reduce(lambda a, b: a + b, (Int64(i) * s for i, s in zip(row, t.stride, strict=False)))
        return t.iterator.toint() + elements * (t.element_type.width // 8)
