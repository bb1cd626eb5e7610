"""Which (query, key) pairs may attend. One class per mask: query `row` sees the keys from `first` up to below `limit`.

Neither falls from one row to the next. Everything here but `apply` also runs on plain ints, so a test without a GPU can
hold it against brute force.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute

from .layout import within_thread
from .seqlen import int32_at
from .user_mod import UserMod, number, where


class Mask:
    """What holds where a mask does not say otherwise."""

    causal = False  # rows differ in what they see
    windowed = False  # `first` differs from row to row too
    everywhere = False  # `hide` may hide any pair, so no block is full
    of_each = False  # some sequences have it, and others see all keys: problem.of_mask is their slack

    @property
    def of_tile(self) -> bool:
        """Whether it needs problem.of_mask, what `own` finds of a tile's sequence."""
        return self.of_each

    def first(self, row, problem):
        return 0

    def whole(self, row, problem):
        """Of the keys from `first` on it sees all up to below this one; some of those from here up to `limit`."""
        return self.limit(row, problem)

    def own(self, problem, batch, start_q, start_k):
        """Of a sequence, whose rows begin there in q and in k where sequences are packed."""

    def signature(self) -> tuple:
        """One value of each run-time argument, for its type."""
        return ()

    def hide(self, S, cS, at, tile_n, problem, query: Callable = lambda row: row):
        """Other pairs than those beyond `first` and `limit`. query: which one a row is of."""


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    name = "full"

    def limit(self, row, problem):
        return problem.seqlen_k


@dataclass(frozen=True)
class Causal(Mask):
    """Query i sees keys up to i, aligned to the last key (bottom right)."""

    causal, name = True, "causal"

    def limit(self, row, problem):
        return cutlass.min(row + 1 + problem.seqlen_k - problem.seqlen_q, problem.seqlen_k)


@dataclass(frozen=True)
class Window(Mask):
    """Query i sees the keys from i - left to i + right, aligned to the last key; problem.args.mask is (left, right)."""

    windowed, name = True, "window"

    def signature(self) -> tuple:
        return Int32(0), Int32(0)

    def first(self, row, problem):
        return cutlass.max(row + problem.seqlen_k - problem.seqlen_q - problem.args.mask[0], 0)

    def limit(self, row, problem):
        return problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + problem.args.mask[1], 0)  # below 2^31


@dataclass(frozen=True)
class CausalOfEach(Mask):
    """Causal for the sequences whose slack is 0; that of the others is beyond all keys."""

    causal, of_each, name = True, True, "causal_of_each"

    def own(self, problem, batch, start_q, start_k):
        return problem.grid.q.slack(batch)

    def limit(self, row, problem):
        return problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + problem.of_mask, 0)  # below 2^31


@dataclass(frozen=True)
class WindowOfEach(Window):
    """With nothing to the right for the sequences whose slack is 0."""

    of_each, name = True, "window_of_each"

    def own(self, problem, batch, start_q, start_k):
        return problem.grid.q.slack(batch)

    def limit(self, row, problem):
        right = cutlass.min(problem.args.mask[1], problem.of_mask)
        return problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + right, 0)


@dataclass(frozen=True)
class Chunks(Mask):
    """Keys and queries lie in chunks of problem.args.mask[0] places, counted from the first key, and a query sees those
    of its own; to_diagonal: none behind itself (Llama 4's chunked attention).
    """

    to_diagonal: bool
    windowed = True

    @property
    def name(self) -> str:
        return "chunks_causal" if self.to_diagonal else "chunks"

    def signature(self) -> tuple:
        return (Int32(0),)

    def _chunk(self, row, problem):
        """Its number; -1 of all places before the first key."""
        size = problem.args.mask[0]
        return (cutlass.max(row + problem.seqlen_k - problem.seqlen_q, -1) + size) // size - 1

    def first(self, row, problem):
        return cutlass.max(self._chunk(row, problem) * problem.args.mask[0], 0)

    def limit(self, row, problem):
        end = (self._chunk(row, problem) + 1) * problem.args.mask[0]
        if self.to_diagonal:
            end = cutlass.min(end, row + 1 + problem.seqlen_k - problem.seqlen_q)
        return cutlass.min(end, problem.seqlen_k)


@dataclass(frozen=True)
class Spans(Mask):
    """Causal, or a window, and each query also sees the keys of the span around its own place, if it is in one.

    problem.args.mask: the window's, then the address of (first, end) of each place's span, int32 (batch, places, 2), or
    (total, 2) of packed keys; elements from a sequence to the next; and how many places a sequence has.
    """

    windowed: bool
    causal, of_tile = True, True

    @property
    def name(self) -> str:
        return "spans_window" if self.windowed else "spans"

    def signature(self) -> tuple:
        return (*(Window().signature() if self.windowed else ()), Int64(0), Int32(0), Int32(0))

    def own(self, problem, batch, start_q, start_k):
        """Numbers before its first place's."""
        return batch * self._arguments(problem)[1] + 2 * start_k

    def _arguments(self, problem):
        return problem.args.mask[2:5] if self.windowed else problem.args.mask[:3]

    @cute.jit
    def _span(self, row: Int32, problem):
        """(first, end) of its place's, or of the place alone."""
        place = row + problem.seqlen_k - problem.seqlen_q
        first, end = place, place + 1
        address, _, places = self._arguments(problem)
        if (place >= 0) & (place < cutlass.min(places, problem.seqlen_k)):
            span = cute.make_tensor(int32_at(address) + (problem.of_mask + 2 * place), 2)
            first = cutlass.min(first, span[0])
            end = cutlass.max(end, span[1])
        return first, end

    def first(self, row, problem):
        left = row + problem.seqlen_k - problem.seqlen_q - problem.args.mask[0] if self.windowed else 0
        return cutlass.max(cutlass.min(left, self._span(row, problem)[0]), 0) if self.windowed else 0

    def limit(self, row, problem):
        end = self._span(row, problem)[1]
        if self.windowed:
            right = problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + problem.args.mask[1], 0)
            end = cutlass.max(end, right)
        return cutlass.min(end, problem.seqlen_k)


@dataclass(frozen=True)
class Drafts(Mask):
    """Of the last Sq keys those whose bits are set, and all before them: trees of speculative decoding.

    problem.args.mask: address of int32 (batch, Sq, words), or (total_q, words) of packed queries; words; and Sq, or 0
    of packed queries. Bit j % 32 of a query's word j / 32 says whether it sees the j-th of its sequence's last Sq keys.
    """

    causal, of_tile, name = True, True, "drafts"

    def signature(self) -> tuple:
        return Int64(0), Int32(0), Int32(0)

    def own(self, problem, batch, start_q, start_k):
        """Words before its first query's."""
        _, words, rows = problem.args.mask[:3]
        return words * (batch * rows + cutlass.select_(rows == 0, Int32(start_q), Int32(0)))

    def limit(self, row, problem):
        return problem.seqlen_k

    def whole(self, row, problem):
        return cutlass.max(problem.seqlen_k - problem.seqlen_q, 0)

    def hide(self, S, cS, at, tile_n, problem, query=lambda row: row):
        n = at.n_block * tile_n + cS[0, 0][1] - (problem.seqlen_k - problem.seqlen_q)  # of the thread's first column
        for r in range(cute.size(S, mode=[0])):
            row = cutlass.min(query(at.rows.row0 + cS[r, 0][0]), problem.seqlen_q - 1)
            words = self._bits(row, n, -(-tile_n // 32), problem)
            for c in range(cute.size(S, mode=[1])):
                _, column = within_thread(r, c)
                bit = (words[column // 32] >> column % 32) & 1
                S[r, c] = cutlass.select_(bit != 0, S[r, c], -Float32.inf)

    def _bits(self, row, n, count: int, problem) -> list:
        """Of a query, for so many times 32 of the last keys from the n-th on; all are set before the first."""
        first, shift = n >> 5, Int64(n & 31)
        found = [Int64(self._word(row, first + i, problem)) & 0xFFFFFFFF for i in range(count + 1)]
        return [Int32((low | high << 32) >> shift) for low, high in pairwise(found)]

    def _word(self, row, n, problem):
        address, words = problem.args.mask[:2]
        at = problem.of_mask + row * words + cutlass.max(cutlass.min(n, words - 1), 0)
        word = cute.make_tensor(int32_at(address) + at, 1)[0]
        return cutlass.select_(n < 0, Int32(-1), cutlass.select_(n < words, word, Int32(0)))


@dataclass(frozen=True)
class PackGqaMask(Mask):
    """`mask` where `pack` rows, a power of two, are one query's."""

    mask: Any
    pack: int

    @property
    def causal(self) -> bool:
        return self.mask.causal

    @property
    def windowed(self) -> bool:
        return self.mask.windowed

    def query(self, row):
        return row >> (self.pack.bit_length() - 1)

    def first(self, row, problem):
        return self.mask.first(self.query(row), problem)

    def whole(self, row, problem):
        return self.mask.whole(self.query(row), problem)

    def limit(self, row, problem):
        return self.mask.limit(self.query(row), problem)

    def hide(self, S, cS, at, tile_n, problem, query=lambda row: row):
        self.mask.hide(S, cS, at, tile_n, problem, self.query)


@dataclass(frozen=True)
class UserMask(Mask):
    """Of the pairs that `base` leaves those for which a user's mask_mod(b, h, q_idx, kv_idx) holds.

    problem.args.mask: those of `base`, then its own.
    """

    mod: UserMod
    base: Any = Full()
    causal = everywhere = True

    @property
    def of_each(self) -> bool:
        return self.base.of_each

    @property
    def name(self) -> str:
        return f"{self.base.name}_mask_mod"

    @property
    def windowed(self) -> bool:
        return self.base.windowed

    def signature(self) -> tuple:
        return *self.base.signature(), *self.mod.signature()

    def first(self, row, problem):
        return self.base.first(row, problem)

    @property
    def of_tile(self) -> bool:
        return self.base.of_tile

    def own(self, problem, batch, start_q, start_k):
        return self.base.own(problem, batch, start_q, start_k)

    def limit(self, row, problem):
        return self.base.limit(row, problem)

    def hide(self, S, cS, at, tile_n, problem, query=lambda row: row):
        def hidden(mod, score, rows, places):
            return number(where(mod(rows.batch, rows.head, *places), score, -Float32.inf))

        self.base.hide(S, cS, at, tile_n, problem)
        self.mod.of_block(S, cS, at, tile_n, problem.args.mask[len(self.base.signature()) :], hidden)


class Blocks(NamedTuple):
    """Of keys, for some rows: those that any of them needs, one or more; and full ones, which all of them see whole."""

    first: Any
    full_first: Any
    full_end: Any  # below `end`: the last block is never among them; may lie below full_first: there are none
    end: Any


def block_range(mask, row0, rows, tile_n, problem) -> Blocks:
    """Of `rows` rows from row0 on."""
    last = row0 + rows - 1
    limit, least_limit = mask.limit(last, problem), mask.whole(row0, problem)
    end = cutlass.max((limit + tile_n - 1) // tile_n, 1)
    full_end = cutlass.min(cutlass.max(least_limit // tile_n, 0), end - 1)
    if mask.everywhere:
        first = cutlass.min(mask.first(row0, problem) // tile_n, end - 1)
        return Blocks(first, first, first, end)
    if not mask.windowed:
        return Blocks(0, 0, full_end, end)
    first = cutlass.min(mask.first(row0, problem) // tile_n, end - 1)
    return Blocks(first, (mask.first(last, problem) + tile_n - 1) // tile_n, full_end, end)


def is_partial(mask, row0, rows, n_block, tile_n, problem):
    """Whether the mask hides a key of this block from any of these rows."""
    if mask.everywhere:
        return True
    above = mask.whole(row0, problem) < (n_block + 1) * tile_n
    return above | (mask.first(row0 + rows - 1, problem) > n_block * tile_n) if mask.windowed else above


@cute.jit
def apply(mask: cutlass.Constexpr, S: cute.Tensor, cS: cute.Tensor, row0: Int32, col0: Int32, problem):
    """S (rows, cols) of the block at (row0, col0): -inf where the mask hides the key."""
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        row = row0 + cS[r, 0][0]
        limit = mask.limit(row, problem) - col0 - cS[r, 0][1]
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if cS[0, c][1] - cS[0, 0][1] < limit else -Float32.inf
        if cutlass.const_expr(mask.windowed):
            first = mask.first(row, problem) - col0 - cS[r, 0][1]
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if cS[0, c][1] - cS[0, 0][1] >= first else -Float32.inf
