"""Whose a tile's rows are: one head's queries, or by PackGQA those of the heads that share a K/V head.

PackGQA (FlashAttention-3, arXiv:2407.08608): row p of a tile is query p // pack, head p % pack of those that share a
K/V head, so K and V are read once for all. q and o become (pack heads, queries) by columns, and TMA reads zeros and
writes nothing where there are fewer heads than pack. Of more heads than that, each `pack` are packed as if they had a
K/V head of their own.
"""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync

from .part import Part
from .sequences import Dense
from .state import ROWS, Gmem, Tma
from .tile_scheduler import Tile

NOBODY = (1 << 31) - 1  # no query has this number


class OneHead(Part):
    """Row p of a tile is its p-th query."""

    def block(self, number):
        """Where the number-th 64 rows of a head lie, of `tiles`."""
        return number

    def __init__(self, config, sequences: Dense):
        super().__init__(config)
        self.sequences = sequences

    def tma(self, op, t: cute.Tensor, mK: cute.Tensor, smem: cute.Layout, d: int) -> Tma:
        """Of q or o, (s, d, h[, b]), by 64 rows."""
        return Tma(*cpasync.make_tiled_tma_atom(op, self.sequences.view(t), smem, (ROWS, d)))

    def counts(self, mQ: cute.Tensor, mK: cute.Tensor):
        """What tiles are made of: rows, heads, and how many of these share a K/V head."""
        return mQ.shape[0], mQ.shape[2], mQ.shape[2] // mK.shape[2]

    def tiles(self, gmem: Gmem, name: str, head, sequence) -> cute.Tensor:
        """(64, d, blocks) of a tile's head, of q or o."""
        g = self.sequences.head(getattr(gmem, name).tensor, head, sequence)  # (s, d)
        return cute.local_tile(g, (ROWS, self._columns(name)), (None, 0))

    def _columns(self, name: str) -> int:
        return self.config.d_v if name == "o" else self.config.head_dim

    def query(self, row):
        """Which one a row is of."""
        return row

    def owner(self, row, tile: Tile, gmem: Gmem):
        """The query and the head of a row; of a row that is nobody's, a query beyond the last."""
        return row, tile.head


class PackGQA(OneHead):
    """A tile's head is a pack of them."""

    @property
    def box(self) -> tuple[int, int]:
        """Heads and queries of 64 rows."""
        return min(self.config.pack, ROWS), max(ROWS // self.config.pack, 1)

    @property
    def blocks_of_query(self) -> int:
        """Of 64 rows."""
        return max(self.config.pack // ROWS, 1)

    def block(self, number):
        n = self.blocks_of_query
        return (number % n, number // n) if n > 1 else number

    def tma(self, op, t: cute.Tensor, mK: cute.Tensor, smem: cute.Layout, d: int) -> Tma:
        return Tma(*cpasync.make_tiled_tma_atom(op, self.sequences.pack(t, mK.shape[2]), smem, (self.box, d)))

    def counts(self, mQ: cute.Tensor, mK: cute.Tensor):
        seqlen_q, heads, ratio = super().counts(mQ, mK)
        packs = cute.ceil_div(ratio, self.config.pack)
        return seqlen_q * self.config.pack, heads // ratio * packs, packs

    def tiles(self, gmem: Gmem, name: str, head, sequence) -> cute.Tensor:
        t = getattr(gmem, name).tensor
        ratio = self.sequences.ratio(t, gmem)
        packs = cute.ceil_div(ratio, self.config.pack)
        g = self.sequences.packed_heads(t, head // packs, ratio, sequence)  # ((ratio, s), d)
        box, n = (self.box, self._columns(name)), self.blocks_of_query
        if n == 1:
            return cute.local_tile(g, box, ((head % packs, None), 0))  # ((pack, 64 / pack), d, blocks)
        g = cute.domain_offset(((head % packs * self.config.pack, 0), 0), g)
        return cute.local_tile(g, box, ((None, None), 0))  # ((64, 1), d, blocks of a query, queries)

    def query(self, row):
        return self.config.row_mask.query(row)

    def owner(self, row, tile: Tile, gmem: Gmem):
        """By shifts, and on plain ints too. A row without a head has the last one's number, for what is read by it."""
        pack, ratio = self.config.pack, self.sequences.ratio(gmem.q.tensor, gmem)
        packs = (ratio + pack - 1) // pack
        place = tile.head % packs * pack + row % pack  # among the heads of the K/V head
        beyond = (ratio - 1 - place) >> 31  # -1 where there is none, else 0
        return self.query(row) | (beyond & NOBODY), tile.head // packs * ratio + cutlass.min(place, ratio - 1)
