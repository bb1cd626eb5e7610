"""Every compile-time choice of a forward kernel; the config is the compile key."""

from dataclasses import dataclass

from .mask import Causal, Full
from .tile_scheduler import Static, StaticTiles

SMEM_BYTES = 227 * 1024  # of one CTA on sm_90
DTYPES = ("bf16", "fp16")
LAYOUTS = {"bhsd": (2, 3, 1, 0), "bshd": (1, 3, 2, 0)}  # where s, d, h, b stand in q, k, v and o
REGISTERS = {2: (24, 240), 3: (32, 160)}  # MMA warpgroups: registers per thread (producer, consumer)


@dataclass(frozen=True)
class FwdConfig:
    head_dim: int  # columns of a tile; D may be smaller: TMA reads zeros beyond it and writes nothing there
    dtype: str = "bf16"
    layout: str = "bhsd"
    mask: Full | Causal = Full()
    tile_m: int = 128  # query rows per CTA, 64 per MMA warpgroup
    tile_n: int = 128  # key rows per K/V stage
    stages: int = 2  # K/V ring depth
    scheduler: type[Static] = StaticTiles
    pingpong: bool = True  # MMA warpgroups issue their GEMMs in turn
    q_in_regs: bool = False  # Q is read from shared memory once per tile, not once per block
    cluster: int = 1  # CTAs along the query that share each K/V load; needs equal trip counts: Full, static

    def __post_init__(self):
        assert self.dtype in DTYPES and self.layout in LAYOUTS
        assert self.head_dim % 32 == 0 and self.head_dim <= 256, "whole swizzle atoms, one WGMMA N"
        assert (
            self.tile_m // 64 in REGISTERS
            and self.tile_m % 64 == 0
            and self.tile_n % 16 == 0
            and 16 <= self.tile_n <= 256
        )
        assert self.cluster == 1 or not (self.mask.causal or self.scheduler.draws), "a cluster's CTAs must stay in step"
        assert self.smem_bytes <= SMEM_BYTES, f"{self} takes {self.smem_bytes} bytes of shared memory"

    @property
    def warpgroups(self) -> int:
        return self.tile_m // 64

    @property
    def separate_o(self) -> bool:
        """sO beside sQ lets the next Q load start before this tile is stored; where it fits."""
        return self._smem_bytes(q_tiles=2) <= SMEM_BYTES

    @property
    def early_q(self) -> bool:
        """Q leaves shared memory as soon as it is in registers."""
        return self.q_in_regs and self.separate_o

    @property
    def smem_bytes(self) -> int:
        return self._smem_bytes(q_tiles=2 if self.separate_o else 1)

    def _smem_bytes(self, q_tiles: int) -> int:
        tiles = 2 * self.head_dim * (q_tiles * self.tile_m + 2 * self.stages * self.tile_n)
        return tiles + 1024  # barriers, the tile slots, and alignment

    @property
    def name(self) -> str:
        tile = f"{self.tile_m}x{self.tile_n}_{self.scheduler.name}"
        return f"flash_fwd_sm90_{self.dtype}_d{self.head_dim}_{self.mask.name}_{tile}"
