"""Hugging Face transformers: `register()`, then `attn_implementation="cute_attn"`.

The kernel computes what it takes: causal or full attention without a mask, that is training, prefill, and decoding
with a cache that grows. Whatever else comes (padded batches, decoding with a static cache, dropout, other types) goes
to transformers' own sdpa attention, which computes it as it would have without us.
"""

from functools import lru_cache
from typing import Any

import torch

from .. import api
from ..checks import DTYPES, learns
from ..plan import HEAD_DIM_MAX

NAME = "cute_attn"


def register() -> str:
    """Make "cute_attn" known to transformers (4.53 or later), for models that are made or loaded from then on.

    Returns:
        the name, for `from_pretrained(..., attn_implementation=register())`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # None wherever causality, or nothing, is all that it says
    return NAME


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention function: query (B, H, Sq, D), key and value (B, Hk, Sk, D) -> (o (B, Sq, H, D), None).

    Raises:
        NotImplementedError: for attention sinks, which sdpa attention would leave out in silence.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError('attention sinks (s_aux) are not supported; use attn_implementation="eager"')
    if not serves(query, key, value, attention_mask, dropout, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        how = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    seqlen_q = query.shape[2]
    causal = seqlen_q > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and key.shape[2] > seqlen_q:  # an empty static cache: no query sees what is not filled yet
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    how = dict(causal=causal, scale=scaling)
    if learns(query, key, value):
        return api.flash_fwd(query, key, value, **how).transpose(1, 2), None
    o = query.new_empty(query.shape[0], seqlen_q, query.shape[1], query.shape[3])
    api.flash_fwd(query, key, value, **how, out=o.transpose(1, 2))
    return o, None


def serves(query, key, value, attention_mask, dropout: float, kwargs: dict[str, Any]) -> bool:
    """Whether the kernel computes just this."""
    others = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is not None or dropout or others or not _on_hopper(query.device):
        return False
    head_dim = query.shape[3]
    fits = head_dim % 8 == 0 and head_dim <= HEAD_DIM_MAX and value.shape[3] == head_dim
    return fits and query.dtype in DTYPES and query.dtype == key.dtype == value.dtype


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    """A Hopper GPU; or the CPU, where torch computes for us, so that the same code runs anywhere."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0))
