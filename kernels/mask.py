"""Which (query, key) pairs may attend. One class per mask: query `row` sees the keys from `first` up to below `limit`.

Neither falls from one row to the next. Everything here but `apply` also runs on plain ints, so a test without a GPU can
hold it against brute force.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from .user_mod import UserMod, number, where


class Mask:
    """What holds where a mask does not say otherwise."""

    causal = False  # rows differ in what they see
    windowed = False  # `first` differs from row to row too
    everywhere = False  # `hide` may hide any pair, so no block is full
    of_each = False  # some sequences have it, and others see all keys: problem.slack

    def first(self, row, problem):
        return 0

    def signature(self) -> tuple:
        """One value of each run-time argument, for its type."""
        return ()

    def hide(self, S, cS, at, tile_n, problem):
        """Other pairs than those beyond `first` and `limit`."""


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
    """Causal for the sequences whose problem.slack is 0; that of the others is beyond all keys."""

    causal, of_each, name = True, True, "causal_of_each"

    def limit(self, row, problem):
        return problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + problem.slack, 0)  # below 2^31


@dataclass(frozen=True)
class WindowOfEach(Window):
    """With nothing to the right for the sequences whose problem.slack is 0."""

    of_each, name = True, "window_of_each"

    def limit(self, row, problem):
        right = cutlass.min(problem.args.mask[1], problem.slack)
        return problem.seqlen_k + cutlass.min(row + 1 - problem.seqlen_q + right, 0)


@dataclass(frozen=True)
class PackGqaMask(Mask):
    """`mask` where `pack` rows, a power of two, are one query's."""

    mask: Full | Causal | CausalOfEach | Window
    pack: int

    @property
    def causal(self) -> bool:
        return self.mask.causal

    @property
    def of_each(self) -> bool:
        return self.mask.of_each

    @property
    def windowed(self) -> bool:
        return self.mask.windowed

    def query(self, row):
        return row >> (self.pack.bit_length() - 1)

    def first(self, row, problem):
        return self.mask.first(self.query(row), problem)

    def limit(self, row, problem):
        return self.mask.limit(self.query(row), problem)


@dataclass(frozen=True)
class UserMask(Mask):
    """Of the pairs that `base` leaves those for which a user's mask_mod(b, h, q_idx, kv_idx) holds.

    problem.args.mask: those of `base`, then its own.
    """

    mod: UserMod
    base: Full | Causal | CausalOfEach | Window = Full()
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

    def limit(self, row, problem):
        return self.base.limit(row, problem)

    def hide(self, S, cS, at, tile_n, problem):
        def hidden(mod, score, rows, places):
            return number(where(mod(rows.batch, rows.head, *places), score, -Float32.inf))

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
    limit, least_limit = mask.limit(last, problem), mask.limit(row0, problem)
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
    above = mask.limit(row0, problem) < (n_block + 1) * tile_n
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
