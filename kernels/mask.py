"""Which (query, key) pairs may attend. One class per mask: query `row` sees the keys below `limit`.

Everything here but `apply` also runs on plain ints, so a test without a GPU can hold it against brute force.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute


@dataclass(frozen=True)
class Full:
    """Every query sees every key."""

    causal, name = False, "full"

    def limit(self, row, seqlen_q, seqlen_k):
        return seqlen_k


@dataclass(frozen=True)
class Causal:
    """Query i sees keys up to i, aligned to the last key (bottom right)."""

    causal, name = True, "causal"

    def limit(self, row, seqlen_q, seqlen_k):
        return cutlass.min(row + 1 + seqlen_k - seqlen_q, seqlen_k)


def block_range(mask, row0, rows, tile_n, problem):
    """(blocks that any of these rows needs, at least one; blocks that all of them see whole, less than that)."""
    last = mask.limit(row0 + rows - 1, problem.seqlen_q, problem.seqlen_k)
    first = mask.limit(row0, problem.seqlen_q, problem.seqlen_k)
    n_max = cutlass.max((last + tile_n - 1) // tile_n, 1)
    return n_max, cutlass.min(cutlass.max(first // tile_n, 0), n_max - 1)


@cute.jit
def apply(mask: cutlass.Constexpr, S: cute.Tensor, cS: cute.Tensor, row0: Int32, col0: Int32, problem):
    """S (rows, cols) of the block at (row0, col0): -inf where the mask hides the key."""
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        limit = mask.limit(row0 + cS[r, 0][0], problem.seqlen_q, problem.seqlen_k) - col0 - cS[r, 0][1]
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if cS[0, c][1] - cS[0, 0][1] < limit else -Float32.inf
