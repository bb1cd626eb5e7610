"""Exact attention for NVIDIA Hopper (sm_90a), in CuTe's Python DSL. Importing compiles nothing and needs no GPU."""

from . import ops, ops_0_1, ops_append, ops_merge  # noqa: F401  torch.ops.cute_attn.*
from .api import flash_fwd, warmup
from .append import append_kv
from .block_mask import BlockLists
from .decode import DecodePlan, decode_plan
from .explanation import explain
from .features.spans import spans
from .kvcache import flash_fwd_kvcache
from .merge import merge_states
from .varlen import flash_fwd_varlen

__version__ = "0.1.0"
__all__ = [
    "BlockLists",
    "DecodePlan",
    "__version__",
    "append_kv",
    "decode_plan",
    "explain",
    "flash_fwd",
    "flash_fwd_kvcache",
    "flash_fwd_varlen",
    "merge_states",
    "spans",
    "warmup",
]
