"""Few queries, several heads to a K/V head: a tile's rows are those heads' queries, so K and V are read once for all.

Row p of a tile is query p // pack, head p % pack of those that share a K/V head: q and o become (pack heads, queries)
by columns, and TMA reads zeros and writes nothing where there are fewer heads than pack. Of more heads than that, each
`pack` are packed as if they had a K/V head of their own. (PackGQA of FlashAttention-3, arXiv:2407.08608.)
"""

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync

from .config import FwdConfig
from .flash_fwd_sm90 import ROWS, Gmem, Tma, Warpgroup
from .mask import PackedRows
from .tile_scheduler import Tile

NOBODY = (1 << 31) - 1  # no query has this number


class PackedHeads:
    """Goes before a kernel's class: `type(name, (PackedHeads, FlashFwdSm90), {})`. A tile's head is a pack of them."""

    def __init__(self, config: FwdConfig):
        super().__init__(config)
        self.mask = PackedRows(config.mask, config.pack)
        self.rows = config.pack, ROWS // config.pack

    def _rows_tma(self, op, t: cute.Tensor, mK: cute.Tensor, smem: cute.Layout, d: int) -> Tma:
        (s, columns, heads, b), (ds, dd, dh, db), heads_kv = t.shape, t.stride, mK.shape[2]
        ratio = heads // heads_kv
        layout = cute.make_layout(((ratio, s), columns, heads_kv, b), stride=((dh, ds), dd, dh * ratio, db))
        return Tma(*cpasync.make_tiled_tma_atom(op, cute.make_tensor(t.iterator, layout), smem, (self.rows, d)))

    def _rows_and_heads(self, mQ: cute.Tensor, mK: cute.Tensor):
        seqlen_q, heads, ratio = super()._rows_and_heads(mQ, mK)
        packs = cute.ceil_div(ratio, self.config.pack)
        return seqlen_q * self.config.pack, heads // ratio * packs, packs

    def _row_blocks(self, t: cute.Tensor, head, sequence, d: int) -> cute.Tensor:
        packs = cute.ceil_div(t.shape[0][0], self.config.pack)
        g = t[None, None, head // packs, sequence]  # ((ratio, s), d)
        return cute.local_tile(g, (self.rows, d), ((head % packs, None), 0))  # ((pack, 64 / pack), d, blocks)

    def _query(self, row):
        return self.mask.query(row)

    def _whose(self, row, tile: Tile, gmem: Gmem):
        """By shifts, and on plain ints too. A row without a head has the last one's number, for what is read by it."""
        pack, ratio = self.config.pack, gmem.q.tensor.shape[0][0]
        packs = (ratio + pack - 1) // pack
        place = tile.head % packs * pack + row % pack  # among the heads of the K/V head
        beyond = (ratio - 1 - place) >> 31  # -1 where there is none, else 0
        return self._query(row) | (beyond & NOBODY), tile.head // packs * ratio + cutlass.min(place, ratio - 1)

    @cute.jit
    def _store_lse(self, w: Warpgroup, tile: Tile, row, lse):
        query, head = self._whose(row, tile, w.gmem)
        if (w.frag.thread % 4 == 0) & (query < w.gmem.lse.shape[2]):
            w.gmem.lse[tile.batch, head, query] = lse
