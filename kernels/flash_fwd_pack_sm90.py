"""Few queries, several heads to a K/V head: a tile's rows are those heads' queries, so K and V are read once for all.

Row p of a tile is query p // pack, head p % pack of those that share a K/V head: q and o become (pack heads, queries)
by columns, and TMA reads zeros and writes nothing where there are fewer heads than pack. Of more heads than that, each
`pack` are packed as if they had a K/V head of their own. (FlashAttention-3's PackGQA, arXiv:2407.08608's repository.)
"""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync

from .config import FwdConfig
from .flash_fwd_sm90 import ROWS, Gmem, Tma
from .mask import PackedRows
from .tile_scheduler import Tile

NOBODY = (1 << 31) - 1  # no query has this number


class Packed:
    """Goes before a kernel's class: `type(name, (Packed, FlashFwdSm90), {})`. A tile's head is a pack of them."""

    def __init__(self, config: FwdConfig):
        super().__init__(config)
        self.mask = PackedRows(config.mask, config.pack)
        self.tiler = ((config.pack, ROWS // config.pack), config.head_dim)

    def _rows_tma(self, op, m: cute.Tensor, smem: cute.Layout, heads_kv) -> Tma:
        (s, d, heads, b), (ds, dd, dh, db) = m.shape, m.stride
        ratio = heads // heads_kv
        shape, stride = ((ratio, s), d, heads_kv, b), ((dh, ds), dd, dh * ratio, db)
        m = cute.make_tensor(m.iterator, cute.make_layout(shape, stride=stride))  # ((ratio, s), d, h_kv, b)
        return Tma(*cpasync.make_tiled_tma_atom(op, m, smem, self.tiler))

    def _shape(self, seqlen_q, heads, heads_kv):
        packs = cute.ceil_div(heads // heads_kv, self.config.pack)
        return seqlen_q * self.config.pack, heads_kv * packs, packs

    def _row_blocks(self, tma: Tma, head, batch):
        packs = cute.ceil_div(tma.tensor.shape[0][0], self.config.pack)
        tiles = cute.local_tile(tma.tensor[None, None, head // packs, batch], self.tiler, ((head % packs, None), 0))
        return tiles  # ((pack, 64 / pack), d, blocks)

    def _query(self, row):
        return self.mask.query(row)

    def _whose(self, row, tile: Tile, gmem: Gmem):
        """By shifts, and on plain ints too. A row without a head has the last one's number, for what is read by it."""
        pack, ratio = self.config.pack, gmem.q.tensor.shape[0][0]
        packs = (ratio + pack - 1) // pack
        place = tile.head % packs * pack + row % pack  # among the heads of the K/V head
        beyond = (ratio - 1 - place) >> 31  # -1 where there is none, else 0
        return self._query(row) | (beyond & NOBODY), tile.head // packs * ratio + cutlass.min(place, ratio - 1)
