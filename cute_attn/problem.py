"""What is asked of a kernel: sizes, types and features of one call, whatever its addresses and values."""

from typing import NamedTuple

from .kernels.config import SparseBlocks
from .kernels.user_mod import UserMod


class Kinds(NamedTuple):
    """Which modifiers a call has, whatever their values."""

    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    score_mod: UserMod | None = None
    mask_mod: UserMod | None = None
    sparse: SparseBlocks | None = None
    row_max: bool = False
    dropout: bool = False


UNMODIFIED = Kinds()


class Problem(NamedTuple):
    """What is asked of one call: sizes, element type ("bf16" or "fp16"), mode order and mask."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "bf16"
    layout: str = "bhsd"
    causal: bool = False
    constant_time: bool = False
    kinds: Kinds = UNMODIFIED
    head_dim_v: int = 0  # of v and o, where it is another than q's and k's

    @property
    def d_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def ratio(self) -> int:
        """Query heads to a K/V head."""
        return self.heads // self.heads_kv if self.heads_kv else 1

    @property
    def empty(self) -> bool:
        """Nothing to multiply: no output, or no keys."""
        return 0 in (self.batch, self.heads, self.seqlen_q, self.seqlen_k)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 queries in all heads and sequences."""
        return self.batch * self.heads * -(-self.seqlen_q // 64)

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.seqlen_q
