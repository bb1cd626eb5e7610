"""What is asked of a kernel: sizes, types and features of one call, whatever its addresses and values."""

from typing import Any, NamedTuple


class FeatureKey(tuple):
    """Which features a call has, by their names in `features.FEATURES`, whatever their values; the others are False.

    FeatureKey(window=True, sparse=SparseBlocks(128, 128, True)). A part of the key of plans and kernels.
    """

    __slots__ = ()

    def __new__(cls, **features: Any) -> "FeatureKey":
        return cls.of(sorted(pair for pair in features.items() if pair[1]))

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> "FeatureKey":
        """Of the features that there are, in the order of their names."""
        return super().__new__(cls, pairs)

    def joined(self, **features: Any) -> "FeatureKey":
        """These and others."""
        return FeatureKey(**dict(tuple(self)), **features)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return next((value for feature, value in self if feature == name), False)

    def __reduce__(self) -> tuple:
        return _feature_key, (tuple(self),)


def _feature_key(features: tuple) -> FeatureKey:
    return FeatureKey(**dict(features))


PLAIN = FeatureKey()


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
    features: FeatureKey = PLAIN
    head_dim_v: int = 0  # of v and o, where it is another than q's and k's
    page: int | None = None  # of a K/V cache: rows of a page, 0 where it has none
    packed: str = ""  # which have no dimension of sequences: "qk" of varlen, "q" over a cache

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
