"""The kernels that `warmup` and the tests compile ahead of a call."""

from collections import namedtuple
from collections.abc import Iterable
from itertools import product
from typing import Any

from .. import tuned
from ..kernels.config import DTYPES, LAYOUTS, FwdConfig
from ..problem import PLAIN, FeatureKey, Problem
from . import kv_cache, pack_gqa
from .candidates import EQUAL_HEAD_DIMS, HEAD_DIMS, configs
from .features import constant_time, with_features
from .planner import kvcache, varlen

PREBUILT_FEATURES = {
    False: [FeatureKey(alibi=True)],
    True: [FeatureKey(softcap=True), FeatureKey(softcap=True, alibi=True, sinks=True)],
}


CLASS = [name for name in tuned.DEFAULTS if name not in (*tuned.TUNED, "pack", "timeline", "overlap", "fixup", "ctas")]
LIMITS = kv_cache.SOME_TILES + 1, pack_gqa.SMS  # of tiles, over a cache: from so many on kernels are others
COUNTS = sorted({-(-limit // packs) for limit in LIMITS for packs in range(1, pack_gqa.SMS + 1)})  # of heads' packs
BATCHES = (  # sequences, K/V heads, and keys of a sequence that there is room for
    *((kv_cache.SOME_SEQUENCES, 1, kv_cache.MANY_KEYS), (kv_cache.MANY_SEQUENCES + 1, 1, 1)),
    *((n, 1, room) for n, room in product(COUNTS, (1, kv_cache.MANY_KEYS))),
    *((1, n, room) for n, room in product(COUNTS, (1, kv_cache.MANY_KEYS))),
)
_named: Any = namedtuple  # whose fields mypy would read here
KernelClass = _named("KernelClass", CLASS)  # of FwdConfig's fields those that a caller chooses


def kernel_class(config: FwdConfig) -> Any:
    """What a caller chooses, beside the sizes: they may take one kernel or another of a class."""
    values = (getattr(config, name) for name in CLASS)
    return KernelClass(*(getattr(value, "name", value) for value in values))


def prebuilt(
    gpu: str | None = None, ratio: int = 1, dims: Iterable[tuple[int, int]] = EQUAL_HEAD_DIMS
) -> list[FwdConfig]:
    """The kernels of each class, of some lengths only, windowed, constant-time; and with other features one of each.

    With a ratio, of query heads to a K/V head, those that pack them too, for few queries. Features combine, and so do
    head dims, of which `dims` names others: any other kernel is compiled by its first call.
    """
    every = product(dims, DTYPES, LAYOUTS, (False, True))
    rows = [configs(d, dtype, layout, causal, gpu, d_v) for (d, d_v), dtype, layout, causal in every]
    always, some = [found[-1] for found in rows], [c for found in rows for c in found[:-1]]
    windows = [with_features(config, FeatureKey(window=True)) for config in always if config.mask.causal]
    plain = [c for c in always if (c.dtype, c.layout) == ("bf16", "bhsd")]
    others = [with_features(config, key) for config in plain for key in PREBUILT_FEATURES[config.mask.causal]]
    others += map(constant_time, [*always, *(config for config in some if config.split > 1), *windows])
    packs = pack_gqa.kernels([*always, *windows, *others], some, ratio)
    return list(dict.fromkeys([*always, *some, *windows, *others, *packs]))


def prebuilt_kvcache(problem: Problem, ratio: int, page_size: int, gpu: str | None = None) -> list[FwdConfig]:
    """Every kernel over a cache of such pages, 0: without pages, that calls like the problem with any queries reach."""
    p, longest = problem, (*(1 << n for n in range(8)), 65, 192, None)  # more queries are as many as are not known
    kind = p.head_dim, p.dtype, p.causal, p.features, gpu, p.head_dim_v, ratio
    return list(dict.fromkeys(kvcache(*kind, most, page_size or None, *n) for most, n in product(longest, BATCHES)))


def prebuilt_varlen(gpu: str | None = None, ratio: int = 1) -> list[FwdConfig]:
    """Every kernel that some varlen call can reach; with a ratio those with PackGQA too."""
    masks = (False, PLAIN), (True, PLAIN), (False, FeatureKey(window=True))
    found = [varlen(d, dtype, *mask, gpu) for d, dtype, mask in product(HEAD_DIMS, DTYPES, masks)]
    return found if ratio < 2 else found + pack_gqa.sequences_kernels(found, ratio)
