"""Hugging Face transformers: `register()`, then `attn_implementation="cute_attn"`.

The kernel computes what it takes: causal or full attention without a mask, that is training, prefill, and decoding
with a cache that grows; and causal sliding windows, for which no mask is made. Whatever else comes (padded batches,
decoding with a static cache, dropout, other types) goes to transformers' own sdpa attention, which computes it as it
would have without us.
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

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def mask(*, mask_function=None, local_size=None, **how) -> torch.Tensor | None:
    """transformers' mask function: sdpa's, None where causality says it all, or with it a sliding window."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function
    if local_size is not None and not torch.compiler.is_compiling() and slides(function, local_size):
        local_size = None  # which would have sdpa make a mask; `attention` is told the window
    return sdpa_mask(mask_function=function, local_size=local_size, **how)


def slides(mask_function, size: int) -> bool:
    """Whether a local mask is a causal sliding window; a chunk, or a window to both sides, is something else."""
    zero, one, before, at, after = (torch.tensor(place) for place in (0, 1, size - 1, size, size + 1))
    seen = [bool(mask_function(zero, zero, at, key)) for key in (zero, one, before, at, after)]
    return seen == [False, True, size > 1, True, False]


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention function: query (B, H, Sq, D), key and value (B, Hk, Sk, D) -> (o (B, Sq, H, D), None).

    Raises:
        NotImplementedError: for attention sinks, which sdpa attention would leave out in silence.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError('attention sinks (s_aux) are not supported; use attn_implementation="eager"')
    seqlen_q = query.shape[2]
    order = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = seqlen_q > 1 and order
    if causal and attention_mask is None and key.shape[2] > seqlen_q:
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]  # an empty static cache: the rest is not filled yet
    size = kwargs.get("sliding_window") if order and attention_mask is None else None
    window = (size - 1, 0) if size is not None and key.shape[2] > size else None
    if not serves(query, key, value, attention_mask, dropout, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if window is not None:  # `mask` has left it to us
            attention_mask = _window_mask(seqlen_q, key.shape[2], size, query.device)
        how = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    how = dict(causal=causal, scale=scaling, window=window)
    if learns(query, key, value):
        return api.flash_fwd(query, key, value, **how).transpose(1, 2), None
    o = query.new_empty(query.shape[0], seqlen_q, query.shape[1], query.shape[3])
    api.flash_fwd(query, key, value, **how, out=o.transpose(1, 2))
    return o, None


def _window_mask(seqlen_q: int, seqlen_k: int, size: int, device: torch.device) -> torch.Tensor:
    """(Sq, Sk) bool: each query's own key, aligned to the last one, and those before it, `size` in all."""
    pairs = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return pairs.tril(seqlen_k - seqlen_q).triu(seqlen_k - seqlen_q - size + 1)


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
