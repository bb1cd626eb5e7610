"""Dropout: 16 bits of Philox4x32-10 (Salmon et al., SC'11) say of an entry of P whether it is kept, by its place alone.

A call of Philox serves eight entries of a row: of 32 keys those that one thread has, 8i + 2t and 8i + 2t + 1 for the
t-th of four threads, i < 4. Its counter is (which 32 keys, and t; query; sequence and head; 0), so the mask knows
nothing of tiles. `cute_attn.reference.keep_mask` computes the same.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Uint32, Uint64, cute

from .layout import not_before
from .outputs import Output
from .state import At, Problem, Warpgroup, address
from .tile_scheduler import Tile
from .weights import Weights

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
BUMPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round
LEVELS = 1 << 16  # of 16 bits: so many of them, `kept`, keep an entry


class RandomBits(NamedTuple):
    """Of a tile: what all its counters and keys have in common."""

    key: tuple  # (Uint32, Uint32)
    head: Uint32  # of which sequence, too


class Dropout(Weights):
    """Row sums, and so lse, are without. Arguments: the address of seed and offset, levels kept, the scale of O."""

    def begin(self, tile: Tile, problem: Problem) -> RandomBits:
        state, *_ = problem.args.dropout
        words = cute.make_tensor(address(Uint32, state), 4)
        head = Uint32(tile.batch * problem.grid.heads + tile.head)
        return RandomBits(key_of([words[i] for i in range(4)]), head)

    def apply(self, w: Warpgroup, P, at: At):
        _, kept, _ = w.problem.args.dropout
        col0 = not_before(P, at.n_block) * self.config.tile_n
        leave_out(P, w.frag.cS, at.rows.row0, col0, at.rows.weights, kept)


class DropoutScale(Output):
    """O is divided by the share of weights that dropout keeps."""

    def finish(self, epilogue, w: Warpgroup, tile: Tile, lse, seen):
        *_, scale = w.problem.args.dropout
        rescale = w.frag.softmax.rescale
        rescale.store(rescale.load() * scale)
        return lse


def key_of(state) -> tuple:
    """Philox's key: two words made of seed and offset, a word of each low half first."""
    *seed, low, high = state
    return philox((low, high, Uint32(0), Uint32(0)), seed)[:2]


def philox(counter, key) -> tuple:
    """Philox4x32-10: four words of a counter of four and a key of two."""
    a, b, c, d = counter
    k, l = key
    for _ in range(ROUNDS):
        left, right = (Uint64(x) * Uint64(m) for x, m in zip((a, c), MULTIPLIERS, strict=True))
        a, b, c, d = Uint32(right >> 32) ^ b ^ k, Uint32(right), Uint32(left >> 32) ^ d ^ l, Uint32(left)
        k, l = k + Uint32(BUMPS[0]), l + Uint32(BUMPS[1])
    return a, b, c, d


@cute.jit
def leave_out(P: cute.Tensor, cS: cute.Tensor, row0: Int32, col0: Int32, bits: RandomBits, kept: Int32):
    """P (rows, cols) of the block at (row0, col0): 0 where it is not kept."""
    limit, zero = Uint32(kept), Float32(0.0)
    for r in cutlass.range_constexpr(cute.size(P, mode=[0])):
        query, place = Uint32(row0 + cS[r, 0][0]), Uint32(col0 // 8 + cS[r, 0][1] // 2)
        for group in cutlass.range_constexpr(cute.size(P, mode=[1]) // 8):
            words = philox((place + Uint32(4 * group), query, bits.head, Uint32(0)), bits.key)
            for i in cutlass.range_constexpr(4):
                c = 8 * group + 2 * i
                P[r, c] = P[r, c] if (words[i] & Uint32(LEVELS - 1)) < limit else zero
                P[r, c + 1] = P[r, c + 1] if (words[i] >> Uint32(16)) < limit else zero
