"""Every compile-time choice of a forward kernel; the config is the compile key."""

from dataclasses import dataclass
from itertools import chain, islice
from math import gcd

from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .mask import Causal, CausalOfEach, Full, Mask, PackGqaMask, UserMask, Window
from .score import Alibi, Plain, Softcap, UserScore
from .softmax import MARGIN_LOG2
from .state import ELEMENT, Arguments
from .tile_scheduler import OneTile, Static, StaticTiles

SMEM_BYTES = 227 * 1024  # of one CTA on sm_90
HEAD_DIM_MAX = 512
DTYPES = ("bf16", "fp16")
LAYOUTS = ("bhsd", "bshd")
MODES = {"bhsd": (2, 3, 1, 0), "bshd": (1, 3, 2, 0), "thd": (0, 2, 1)}  # where s, d, h, b stand in q, k, v and o
PACKS = (1, 2, 4, 8, 16, 32, 64)
# MMA warpgroups: registers per thread (producer, consumer), together no more than launched with; None: as launched
REGISTERS = {1: None, 2: (24, 240), 3: (32, 160), 4: (24, 112)}
# a producer that reads of its tiles, loads each block in many boxes, or in an order of its own
BUSY_REGISTERS = {1: None, 2: (40, 232), 3: (32, 160), 4: (32, 112)}
PART_COUNTERS = 512  # no fewer than CTAs, or MMA warpgroups, that a Hopper GPU has room for
CACHE_REGISTERS = 56, 224  # a producer that looks for its part of all keys, loads many boxes, or copies rows


def _tensor(dtype, rank: int):
    """Of any shape and strides, for its type."""
    return make_fake_tensor(dtype, [cute.sym_int() for _ in range(rank)], [cute.sym_int64() for _ in range(rank)])


@dataclass(frozen=True)
class SparseBlocks:
    """Sizes of the block-sparse indices' blocks, of queries and of keys; has_full: some are listed as full."""

    block_m: int
    block_n: int
    has_full: bool

    @property
    def arguments(self) -> int:
        return 4 if self.has_full else 2


@dataclass(frozen=True)
class KvCache:
    """Rows of a box of TMA. paged: each box has a page of its own. gathers: threads copy rows, in place of boxes."""

    box: int
    paged: bool = False
    gathers: bool = False

    @property
    def name(self) -> str:
        return "gathers" if self.gathers else f"{'paged' if self.paged else 'cache'}{self.box}"


@dataclass(frozen=True)
class FwdConfig:
    head_dim: int  # columns of a tile; D may be smaller: TMA reads zeros beyond it and writes nothing there
    dtype: str = "bf16"
    layout: str = "bhsd"
    mask: Full | Causal | CausalOfEach | Window | UserMask = Full()
    tile_m: int = 128  # query rows per CTA, 64 per MMA warpgroup
    tile_n: int = 128  # key rows per K/V stage
    stages: int = 2  # K/V ring depth
    scheduler: type[Static] = StaticTiles
    pingpong: bool = True  # MMA warpgroups issue their GEMMs in turn
    q_in_regs: bool = False  # Q is read from shared memory once per tile, not once per block
    cluster: int = 1  # or 2: CTAs along the query that share each K/V load, and so the blocks of a tile
    q_stages: int = 1  # Q tiles in shared memory: with 2, the next one is loaded while this one is used
    split: int = 1  # CTAs of a cluster that share a tile's keys
    speculative: bool = False  # softmax: P unchecked, its row sums tested afterwards, the block recomputed on overflow
    constant_time: bool = False  # no branch depends on a score
    timeline: bool = False  # the first CTA writes down when it does what
    overlap: bool = True  # PV runs beside the next block's QK and softmax; without: for the ladder
    score: Plain | Softcap | Alibi | UserScore = Plain()
    sinks: bool = False  # a logit per head joins the denominator
    sparse: SparseBlocks | None = None  # a tile multiplies the blocks that its indices name
    dropout: bool = False  # some entries of P are left out
    row_max: bool = False  # each row's largest score is written too
    pack: int = 1  # rows of a query: as many heads, rounded up to a power of two, share a K/V head (PackGQA)
    head_dim_v: int = 0  # columns of V and O, where they are others than Q's and K's
    fixup: bool = False  # of a tile that CTAs share the last one merges the parts; without: a second kernel does
    ctas: int = 1  # of an SM, that share all keys
    cache: KvCache | None = None  # k and v are a cache, of whose rows only the device knows how many count
    planned: bool = False  # a decode plan says where each CTA's part of all keys begins

    def __post_init__(self):
        assert self.dtype in DTYPES and self.layout in MODES
        assert self.head_dim % 32 == 0 and self.head_dim <= HEAD_DIM_MAX, "whole swizzle atoms"
        assert self.head_dim_v != self.head_dim, "one key for a kernel"
        assert self.columns_v % 32 == 0 and self.columns_v <= 256, "whole swizzle atoms, one WGMMA N"
        assert self.tile_m % 64 == 0 and self.warpgroups in REGISTERS
        assert self.head_dim_splits == 1 or self.plain_rows, "a split head dim has no other"
        assert self.tile_n % 16 == 0 and 16 <= self.tile_n <= 256
        assert self.cluster in (1, 2), "ClusterBroadcast goes from the first CTA to one other"
        assert self.split == 1 or (self.tile_m, self.cluster, self.scheduler) == (64, 1, OneTile), "one merge per CTA"
        again = self.overlap and self.split == 1 and not self.q_in_regs
        assert again or not self.speculative, "a recomputed block reads Q and K once more"
        assert not self.constant_time or (self.overlap and not self.speculative), "one softmax per kernel"
        assert not (self.mask.windowed and (self.split > 1 or not self.overlap)), "not with a window"
        assert not self.speculative or self.score.quick, "ptxas spills"
        assert not (self.row_max and (self.speculative or self.split > 1)), "RowMax sees each S once, and whole rows"
        assert not self.dropout or self.tile_n % 32 == 0, "a call of Philox is for 32 keys of a row"
        plain = self.cluster == 1 and not self.speculative and not self.constant_time
        assert self.sparse is None or plain, "with block-sparse indices any step may mask"
        assert self.sparse is None or self.sparse.block_m % self.tile_m == 0 == self.sparse.block_n % self.tile_n
        whole = self.pack in PACKS or (self.shares and self.pack == self.tile_m)
        assert whole, "a block of 64 rows has whole queries, TMA's boxes no others; or a tile has one"
        assert self.pack == 1 or self.packable, "what is asked of a tile has one head"
        assert self.varlen == self.scheduler.varlen, "lengths on the device, and a scheduler that reads them there"
        assert not self.varlen or self.cluster_size == 1, "a cluster's tiles are of one sequence"
        assert not (self.varlen and self.sparse), "block-sparse indices are of equal lengths"
        assert not (self.timeline and self.split > 1), "no trace of a split"
        assert self.cache is None or (self.varlen and self.tile_n % self.cache.box == 0), "a stage has whole boxes"
        assert self.cache is None or self.cache_boxes <= 32, "a lane for each box"
        assert not self.shares or (self.cache and self.tile_m <= 128 and self.head_dim_splits == 1), "registers suffice"
        assert not self.shares or (self.overlap and not self.speculative), "a merge needs a row's running max"
        assert not self.shares or not (self.row_max or self.dropout), "of whole rows"
        assert self.shares or (self.ctas, self.fixup, self.planned) == (1, False, False), "who shares the keys"
        assert self.smem_bytes <= self.smem_most, f"{self} takes {self.smem_bytes} bytes of shared memory"

    @property
    def d_v(self) -> int:
        """Columns of V and O."""
        return self.head_dim_v or self.head_dim

    @property
    def widest(self) -> int:
        return max(self.head_dim, self.d_v)

    @property
    def head_dim_splits(self) -> int:
        """Warpgroups that own the same rows, each with its part of V's and O's columns."""
        return -(-self.d_v // 256)

    @property
    def columns_v(self) -> int:
        """Of V and O, a warpgroup's."""
        return self.d_v // self.head_dim_splits

    @property
    def plain_rows(self) -> bool:
        """A CTA has one block of 64 rows, for itself, and nothing asks for a second look at it."""
        return (self.tile_m, self.cluster, self.split, self.pack, self.speculative) == (64, 1, 1, 1, False)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 query rows in a tile."""
        return self.tile_m // 64

    @property
    def warpgroups(self) -> int:
        return self.row_blocks * self.head_dim_splits

    @property
    def producer_last(self) -> bool:
        """The producer has no warps to spare, and is behind the MMA warpgroup: registers are left for `Combine`."""
        return self.shares and self.warpgroups == 1

    @property
    def producer_warps(self) -> int:
        """That load. One suffices for few boxes, and for some where memory is what takes the time."""
        if self.cache and self.cache.gathers:
            return 4
        return gcd(max(self.cache_boxes // 4, 1) if self.shares else self.cache_boxes, 4)

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + (32 * self.producer_warps if self.producer_last else 128)

    @property
    def registers_held(self) -> int:
        """By a thread of the MMA warpgroups: O and a block's scores, float32; P, and Q where it stays, half of that."""
        n = self.tile_n
        return self.columns_v // 2 + n // 2 + n // 4 + (self.head_dim // 4 if self.q_in_regs else 0)

    @property
    def registers(self) -> tuple[int, int] | None:
        """What setmaxnreg asks for; None where two warpgroups have enough as launched, and ptxas would ignore it."""
        if self.warpgroups == 2 and self.registers_held <= 80:
            return None
        if self.warpgroups == 2 and (self.shares or self.producer_warps == 4):
            return CACHE_REGISTERS
        busy = self.varlen or self.sparse or self.widest > 256 or self.diagonal_first
        return (BUSY_REGISTERS if busy else REGISTERS)[self.warpgroups]

    @property
    def cluster_size(self) -> int:
        return self.cluster * self.split

    @property
    def stages_o(self) -> bool:
        """O goes through shared memory and TMA; where it does not fit beside Q, each thread stores its own part."""
        if self.shares or (self.varlen and self.pack > 1):  # TMA would write rows of another K/V head's queries
            return False
        return self.head_dim_splits == 1 and self._smem_bytes(o_tiles=1) <= SMEM_BYTES

    @property
    def packable(self) -> bool:
        """Whether a tile's rows may be of several heads: no score and no list of blocks asks for one."""
        plain = self.score.name in ("", "softcap") and not self.mask.everywhere
        return plain and self.sparse is None and not self.dropout and self.widest <= 256

    @property
    def diagonal_first(self) -> bool:
        """Blocks begin where the scores are largest. In constant time each step rescales all the same."""
        usual = not (self.sparse or self.shares or self.constant_time) and self.split == 1 and self.overlap
        return usual and self.score.falls_from_diagonal and isinstance(self.mask, Full)

    @property
    def smem_bytes(self) -> int:
        return self._smem_bytes(o_tiles=1 if self.stages_o else 0)

    @property
    def smem_most(self) -> int:
        """Of a CTA: an SM has 1024 bytes more, and keeps as many for each."""
        return (SMEM_BYTES + 1024) // self.ctas - 1024

    def _smem_bytes(self, o_tiles: int) -> int:
        rows, keys = self.tile_m, self.stages * self.tile_n
        tiles = 2 * self.head_dim * (self.q_stages * rows + keys) + 2 * self.d_v * (o_tiles * rows + keys)
        return tiles + (self.split - 1) * self.part_bytes + 1024  # barriers, the tile slots, and alignment

    @property
    def part_bytes(self) -> int:
        """Of what a CTA has of a tile that it shares."""
        return 4 * self.tile_m * (self.d_v + 8)

    @property
    def split_max(self) -> int:
        """CTAs that may share the keys of a tile which one has to itself now: what the others send must fit."""
        return 1 + (SMEM_BYTES - self._smem_bytes(o_tiles=0)) // self.part_bytes

    @property
    def shares(self) -> bool:
        """All CTAs share all keys."""
        return self.scheduler.shares

    @property
    def cache_boxes(self) -> int:
        """Of TMA, to a stage of a cache's K or V."""
        return self.tile_n // self.cache.box if self.cache and not self.cache.gathers else 1

    @property
    def ctas_per_sm(self) -> int:
        """That ptxas leaves registers for; 0: as it likes. Where O has few columns it ignores setmaxnreg else."""
        return self.ctas if self.shares or self.d_v < self.head_dim else 0

    def packs(self, heads: int, heads_kv: int) -> int:
        """What is one head to a tile's rows."""
        return heads_kv * -(-(heads // heads_kv) // self.pack) if self.pack > 1 else heads

    @property
    def counters(self) -> int:
        """That a launch counts by: of tiles that CTAs draw, or of parts of each tile that they share; 0: none."""
        return PART_COUNTERS if self.fixup else int(self.scheduler.dynamic)

    def workspace_bytes(self, num_sms: int, heads: int, heads_kv: int) -> int:
        """That a launch needs, for the parts of tiles; 0: none."""
        if not self.shares:
            return 0
        return self.rows_of_ctas(num_sms, heads, heads_kv) * self.packs(heads, heads_kv) * 2 * self.part_bytes

    def rows_of_ctas(self, num_sms: int, heads: int, heads_kv: int) -> int:
        """Of those that share all keys, a row one for each pack of heads."""
        return self.scheduler.rows(self.packs(heads, heads_kv), self.ctas * num_sms)

    @property
    def varlen(self) -> bool:
        """q, k, v and o are sequences of any lengths, one behind the other in (total, heads, d)."""
        return self.layout == "thd"

    @property
    def layout_kv(self) -> str:
        """Of k and v; a cache has pages in place of a batch."""
        return "bshd" if self.cache else self.layout

    def arguments(self) -> tuple:
        """Of `FlashFwdSm90.__call__`."""
        b, h, h_kv, s_q, s_k, d, d_v = (cute.sym_int() for _ in range(7))

        def tensor(heads, seqlen, d):
            shapes = {"bhsd": (b, heads, seqlen, d), "bshd": (b, seqlen, heads, d), "thd": (seqlen, heads, d)}
            shape = shapes[self.layout]
            strides = (*(cute.sym_int64(divisibility=8) for _ in shape[1:]), 1)
            return make_fake_tensor(ELEMENT[self.dtype], shape, strides, assumed_align=16)

        def cached(d):
            shape = (cute.sym_int(), s_k, h_kv, d)
            strides = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
            return make_fake_tensor(ELEMENT[self.dtype], shape, strides, assumed_align=16)

        k, v = (cached(d), cached(d_v)) if self.cache else (tensor(h_kv, s_k, d), tensor(h_kv, s_k, d_v))
        rows_o = cute.sym_int() if self.cache else s_q  # a cache's sequences may lie at other distances in q and in o
        return (
            *(tensor(h, s_q, d), k, v, tensor(h, rows_o, d_v)),
            *(Int64(0), Int64(0), Float32(1.0), Int32(1)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            *chain(*self.signature()),
        )

    @property
    def margin(self) -> float:
        """By how much, in powers of 2, a row's running max starts above its first block's."""
        return MARGIN_LOG2[self.dtype]

    @property
    def row_mask(self) -> Mask:
        """The mask by a tile's rows, of which `pack` are one query's."""
        return PackGqaMask(self.mask, self.pack) if self.pack > 1 else self.mask

    def signature(self) -> Arguments:
        """What `__call__` takes behind the stream: one value of each argument, for its type."""
        block_indices = [_tensor(Int32, 3 + i % 2) for i in range(self.sparse.arguments)] if self.sparse else ()
        return Arguments(
            mask=self.mask.signature(),
            score=self.score.signature(),
            sinks=(Int64(0),) if self.sinks else (),
            dropout=(Int64(0), Int32(0), Float32(0.0)) if self.dropout else (),  # address of seed, offset; kept, scale
            row_max=(_tensor(Float32, 2 if self.varlen else 3),) if self.row_max else (),  # like lse
            block_indices=tuple(block_indices),
            sequences=self._sequences(),
            plan=(Int64(0),) if self.planned else (),  # address of (rows of CTAs, 4) int32
            split=(Int64(0),) if self.shares else (),  # address of the workspace
        )

    def _sequences(self) -> tuple:
        if self.cache is None:
            return (*[Int64(0)] * 4, Int32(0)) if self.varlen else ()  # two cu_seqlens, two seqused; how many
        # cu_seqlens_q; Sq, steps in q and o, batch; cache_seqlens; a length for all, capacity; units of k and v
        lengths = Int64(0), *[Int32(0)] * 4, Int64(0), Int32(0), Int32(0), Int64(8), Int64(8)
        # page_table and its stride; or cache_batch_idx and cache_leftpad
        where = Int64(0), Int32(0) if self.cache.paged else Int64(0)
        causal = (Int64(0),) if self.mask.of_each else ()  # which sequences are
        return *lengths, *where, *causal

    def divide(self, extras: tuple) -> Arguments:
        """Those arguments by who takes them."""
        left = iter(extras)
        return Arguments(*(tuple(islice(left, len(part))) for part in self.signature()))

    @property
    def name(self) -> str:
        tile = f"{self.tile_m}x{self.tile_n}_{self.scheduler.name}" + (f"_split{self.split}" if self.split > 1 else "")
        tile += (f"_{self.ctas}ctas" if self.ctas > 1 else "") + ("_fixup" if self.fixup else "")
        tile += f"_cluster{self.cluster}" if self.cluster > 1 else ""
        tile += ("_redo" if self.speculative else "") + ("_constant" if self.constant_time else "")
        tile += f"_pack{self.pack}" if self.pack > 1 else ""
        tile += "_timeline" if self.timeline else ""
        tile += (f"_{self.cache.name}" if self.cache else "") + ("_planned" if self.planned else "")
        features = [name for name in ("sinks", "dropout", "row_max", "sparse") if getattr(self, name)]
        kind = "_".join(filter(None, (self.mask.name, self.score.name, *features)))
        dims = f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else "")
        return f"flash_fwd_sm90_{self.dtype}_{dims}_{kind}_{tile}"
