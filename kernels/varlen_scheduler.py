"""Dynamic persistent scheduler for varlen: only the device knows the lengths; the longest sequences come first (LPT).

The order: sequences by the highest bit of their number of keys, from the highest down; among equals as they
lie; within one as `within` says. A warp looks at 32 sequences at a time, one a lane. A CTA's tile numbers only grow,
so it goes on from where it was: in all it sees every sequence once for each of the bits that occur.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Int32, cute

from .seqlen import SeqlenInfo
from .tile_scheduler import Dynamic, Grid, HeadByHead, LongestFirst, next_tile

LANES = 32


class VarlenGrid(NamedTuple):
    q: Any  # Seqlens, or of a cache its Queries
    k: Any  # and its BatchKeys or PagedKeys
    heads: Int32
    batch: Int32
    ratio: Int32  # query heads per K/V head
    l2_rows: Int32  # of one head's K and V together, that L2 keeps


class VarlenTile(NamedTuple):
    m_block: Int32  # of its sequence
    head: Int32
    batch: Int32
    valid: Boolean
    start_q: Int32
    seqlen_q: Int32
    start_k: Int32
    seqlen_k: Int32


class Place(NamedTuple):
    """A tile's number in the order of all, and the 32 sequences among which it is."""

    number: Int32
    tiles: Int32  # of all sequences
    bits: Int32  # of the lengths still to come: their highest bits
    group: Int32  # the first of the 32 sequences
    before: Int32  # tiles before those of the 32 whose lengths have the highest of these bits


class Lane(NamedTuple):
    """What a lane knows of its sequence."""

    q: SeqlenInfo
    k: SeqlenInfo
    tiles: Int32
    bit: Int32  # the highest of its number of keys; 0: it has no tiles


@cute.jit
def lane(g: VarlenGrid, group: Int32, tile_m: cutlass.Constexpr) -> Lane:
    b = group + cute.arch.lane_idx()
    own = cutlass.min(b, g.batch - 1)
    q, k = g.q.of(own), g.k.of(own)
    tiles = (q.length + tile_m - 1) // tile_m * g.heads if b < g.batch else Int32(0)
    bit = top(k.length) if tiles > 0 else Int32(0)
    return Lane(q, k, tiles, bit)


def top(x: Int32) -> Int32:
    """The highest bit of x, which is not negative; 1 of 0."""
    return Int32(1) << Int32(cute.arch.bfind(cutlass.max(x, 1)))


@cute.jit
def running_sum(x: Int32) -> Int32:
    """Over the lanes, up to this one and with it."""
    for i in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(x, 1 << i)
        x = x + below if cute.arch.lane_idx() >= 1 << i else x
    return x


class VarlenScheduler(Dynamic):
    """`within` orders the tiles of a sequence."""

    varlen, tile, within, name = True, VarlenTile, HeadByHead, "packed"

    @staticmethod
    def grid(g: VarlenGrid, room: Int32, tile_m: int) -> Int32:
        """How many CTAs: no more than there may be tiles, if no row is in two sequences; enough for any in any case."""
        return cutlass.min((g.q.total // tile_m + g.batch) * g.heads, room)

    @staticmethod
    @cute.jit
    def first(number: Int32, g: VarlenGrid, tile_m: cutlass.Constexpr) -> Place:
        """A CTA's first place. Run, like all that follows, by one warp; cu_seqlens must be there."""
        tiles, bits = Int32(0), Int32(0)
        for i in cutlass.range((g.batch + LANES - 1) // LANES, unroll=1):
            own = lane(g, i * LANES, tile_m)
            tiles = tiles + own.tiles
            bits = bits | own.bit
        tiles, bits = cute.arch.warp_redux_sync(tiles, "add"), cute.arch.warp_redux_sync(bits, "or")
        return seek(Place(number, tiles, bits, Int32(0), Int32(0)), g, tile_m)

    @staticmethod
    @cute.jit
    def upcoming(
        place: Place, g: VarlenGrid, tile_counter: cute.Tensor, ctas: Int32, tile_m: cutlass.Constexpr
    ) -> Place:
        return seek(place._replace(number=next_tile(tile_counter, place.tiles) + ctas), g, tile_m)

    @classmethod
    def decode(cls, place: Place, g: VarlenGrid, tile_m: int) -> VarlenTile:
        return _decode(place, g, tile_m, cls.within)


class VarlenLongest(VarlenScheduler):
    within, name = LongestFirst, "packed_longest"


@cute.jit
def seek(place: Place, g: VarlenGrid, tile_m: cutlass.Constexpr) -> Place:
    """Forward to the 32 sequences that the place's number belongs to."""
    bits, group, before = place.bits, place.group, place.before
    after = before + tiles_of(lane(g, group, tile_m), bits)
    while (place.number >= after) & (place.number < place.tiles):
        before, group = after, group + LANES
        if group >= g.batch:
            group = Int32(0)
            bits = bits ^ top(bits)
        after = before + tiles_of(lane(g, group, tile_m), bits)
    return place._replace(bits=bits, group=group, before=before)


def tiles_of(own: Lane, bits: Int32) -> Int32:
    """Of the 32 sequences, those of the length whose turn it is."""
    return cute.arch.warp_redux_sync(turn(own, bits), "add")


@cute.jit
def turn(own: Lane, bits: Int32) -> Int32:
    """A lane's tiles where its length's turn it is, else none."""
    return own.tiles if own.bit == top(bits) else Int32(0)


@cute.jit
def _decode(place: Place, g: VarlenGrid, tile_m: cutlass.Constexpr, within: cutlass.Constexpr) -> VarlenTile:
    own = lane(g, place.group, tile_m)
    mine = turn(own, place.bits)
    after = place.before + running_sum(mine)
    who = cute.arch.popc(cute.arch.vote_ballot_sync(after <= place.number))  # so many lanes' tiles come earlier
    first, start_q, seqlen_q, start_k, seqlen_k = [
        cute.arch.shuffle_sync(x, who) for x in (after - mine, *own.q, *own.k)
    ]
    m_blocks = cutlass.max((seqlen_q + tile_m - 1) // tile_m, 1)
    group = cutlass.max(g.l2_rows // cutlass.max(seqlen_k, 1) * g.ratio, 1)
    tile = within.decode(place.number - first, Grid(m_blocks, g.heads, Int32(1), group))
    valid = place.number < place.tiles
    return VarlenTile(tile.m_block, tile.head, place.group + who, valid, start_q, seqlen_q, start_k, seqlen_k)
