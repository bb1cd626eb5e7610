"""Hugging Face transformers: `register()`, then `attn_implementation="cute_attn"`.

The kernel computes what it takes: causal or full attention, sliding windows, softcaps and attention sinks, that is
encoders, training, prefill (in one or in chunks), and decoding with a cache that grows; without gradients in padded
batches too, and packed sequences with and without. Right padding alone is left to causality, with gradients too: real
tokens get what they get of sdpa attention, padding tokens see padding, which counts only for a loss that counts them.
Whatever else comes (other padding with gradients, decoding with a static cache, dropout, other types) goes to
transformers' own attention, which computes it as it would have without us: sdpa's, or the model's eager one for
softcaps and sinks, which sdpa has not. A model that computes its attention itself raises, by transformers_models when
it is made, or by transformers_masks when it takes our mask for a number.

What counts is the mask alone, as with sdpa: of a model's `sliding_window=` argument nothing follows. But where
FlashAttentionKwargs (`cu_seq_lens_q` and so on) come they are followed, as by transformers' flash attention.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import api, notices, varlen
from ..arrays import learns, type_word, wraps
from ..checks import DTYPES, GRADIENTS_HEAD_DIM_MAX, HEAD_DIM_MAX
from .transformers_masks import BLOCK, LazyMask, Packing, Padding, Sequences, mask, sides_of
from .transformers_models import watch

NAME = "cute_attn"
SPARSE = ("indices", "block_indices")  # arguments of models that leave it to all but eager and sdpa to choose the keys
EAGER = ("softcap", "s_aux", "sinks")  # that sdpa attention has not: a cap, a logit per head, a logit per query
BEYOND = ("position_bias", "cache", "sinks")  # the kernel
MISLABELLED = ("BridgeTowerSelfAttention",)  # with is_causal, and no mask over text and images that see each other
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # FlashAttentionKwargs


def register() -> str:
    """Make "cute_attn" known to transformers (4.53 or later), for models that are made or loaded from then on.

    Returns:
        the name, for `from_pretrained(..., attn_implementation=register())`. Models that never ask for the attention of
        that name raise ValueError when they are made.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    watch(NAME)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention function: query (B, H, Sq, D), key and value (B, Hk, Sk, D) -> (o (B, Sq, H, D), None).

    Raises:
        NotImplementedError: for what sdpa attention would leave out in silence: sparse attention, and attention sinks
            of a model that has no eager attention.
        ValueError: for causal attention of fewer queries than keys, if no mask says which keys the queries see.
    """
    not_sparse(kwargs)
    told = sequences(query, kwargs)
    seen = visible(module, query, key, attention_mask, is_causal, told)
    why = obstacle(seen, attention_mask, query, key, value, dropout, kwargs)
    if seen is None or why is not None:
        if not torch.compiler.is_compiling():
            notices.once(f"{type(module).__name__}: computed by {other(kwargs)}, not by cute_attn: {why}")
        if seen is not None and seen.among is told is not None:  # of which sdpa attention would know nothing
            attention_mask, is_causal = told.mask(query.shape[2], key.shape[2], seen.causal, seen.window), False
        return fallback(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    how = options(seen, scaling, kwargs)
    if isinstance(seen.among, Sequences):
        return packed(query, key, value, seen.among, how), None
    key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
    if learns(query, key, value):
        return api.flash_fwd(query, key, value, **how).transpose(1, 2).contiguous(), None
    o = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    if isinstance(seen.among, Padding):
        padded(query, key, value, o.transpose(1, 2), seen.among, how)
    else:
        api.flash_fwd(query, key, value, **how, out=o.transpose(1, 2))
    return o, None


def padded(query, key, value, out, padding: Padding, how: dict[str, Any]):
    """`flash_fwd` of a padded batch."""
    query, out = (grouped(x, key, how) for x in (query, out))
    api.flash_fwd(query, key, value, **how, **padding.options, out=out)


def grouped(x, key, how: dict[str, Any]):
    """A query's heads that share a K/V head are queries of one head where nothing else tells them apart.

    So a decoding step reads the cache once for all of them. x: query, or out.
    """
    heads_kv, ratio = key.shape[1], x.shape[1] // key.shape[1]
    alike = x.shape[2] == 1 and ratio <= BLOCK and how["window"] is None and "sinks" not in how
    return x.squeeze(2).unflatten(1, (heads_kv, ratio)) if alike else x


def packed(query, key, value, lengths: Sequences, how: dict[str, Any]) -> torch.Tensor:
    """o (1, S, H, D) of one row's sequences; rows of none are 0 without gradients, and nobody's with them."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if learns(query, key, value):
        how |= dict(max_seqlen_q=int(lengths.longest_queries), max_seqlen_k=int(lengths.longest_keys))
        return varlen.flash_fwd_varlen(q, k, v, lengths.queries, lengths.keys, **how)[None]
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    varlen.flash_fwd_varlen(q, k, v, lengths.queries, lengths.keys, **how, out=o)
    return o[None]


def not_sparse(kwargs: dict[str, Any]) -> None:
    for name in SPARSE:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: sparse attention is not supported; use attn_implementation="eager"')


def options(seen: "Visible", scaling: float | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`flash_fwd`'s, but for padding."""
    how = dict(causal=seen.causal, scale=scaling, window=seen.window, softcap=kwargs.get("softcap"))
    return how if kwargs.get("s_aux") is None else how | dict(sinks=kwargs["s_aux"].float())


class Visible(NamedTuple):
    """What the kernel is asked for: the first `keys` keys, and of those what causality, a window, and `among` leave."""

    keys: int
    causal: bool
    window: tuple[int, int] | None = None
    among: Padding | Sequences | None = None


def sequences(query, kwargs: dict[str, Any]) -> Sequences | None:
    """Those of one row, where all of FlashAttentionKwargs tell; of several rows the mask does, as with sdpa."""
    given: list[Any] = [kwargs.get(name) for name in PACKED]
    if len(query) != 1 or any(x is None for x in given):
        return None
    return Sequences(*(x.to(query.device, torch.int32) for x in given[:2]), *given[2:])


def visible(module, query, key, mask, is_causal, told: Sequences | None = None) -> Visible | None:
    """By the mask, and what was told of sequences; None where the mask is a tensor of its own, or does not fit."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        return _by_mask(mask, told) if mask.shape == (len(query), 1, queries, keys) else None
    if mask is not None:
        return None
    causal = queries > 1 and ordered(module, is_causal)
    if told is not None:
        return Visible(keys, causal, among=told)
    if causal and keys < queries:
        return None
    if causal and keys > queries:
        if not torch.compiler.is_compiling():
            raise ValueError(
                f"attention_mask: None came with {queries} queries, causal, and {keys} keys, and does not say whether "
                'these are the first or the last queries; pass a mask, or use attn_implementation="sdpa"'
            )
        keys = queries  # an empty static cache, of which the rest is not filled yet
    return Visible(keys, causal)


def _by_mask(mask: LazyMask, told: Sequences | None) -> Visible | None:
    """Padding comes before what was told, as in transformers' flash attention, and that before what is to be read."""
    if mask.keys is None:
        return None
    window = sides_of(mask.causal, mask.window)
    among = mask.among if isinstance(mask.among, Padding) else told
    if among is None and isinstance(mask.among, Packing):
        among = None if torch.compiler.is_compiling() else mask.among.sequences
        if among is None:
            return None
    return Visible(mask.keys, mask.causal and mask.shape[2] > 1, window, among)


def obstacle(seen: Visible | None, mask, query, key, value, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why transformers computes a call; None where the kernel does."""
    if seen is None and mask is not None and not isinstance(mask, LazyMask):
        return "attention_mask: a tensor of its own; causality, a causal sliding window and its padding are taken"
    if seen is None:
        return "attention_mask: it does not say which keys these queries see, or does not fit their number"
    return unserved(query, key, value, dropout, kwargs) or unfit(seen, query, key, value, kwargs)


def unfit(seen: Visible, query, key, value, kwargs: dict[str, Any]) -> str | None:
    """Why the kernel has no padding, or packed sequences, together with the rest."""
    compiling = torch.compiler.is_compiling()
    if isinstance(seen.among, Padding):
        learning = learns(query, key, value)
        return (
            "attention_mask: padding under torch.compile, or on the left with gradients"
            if compiling or learning
            else None
        )
    modified = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    both = seen.among is not None and compiling and modified
    return "softcap, s_aux: of packed sequences under torch.compile" if both else None


def ordered(module, is_causal: bool | None) -> bool:
    """Whether no mask means causality, for several queries."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and type(module).__name__ not in MISLABELLED
    return bool(is_causal)


def unserved(query, key, value, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """What the kernel does not compute just so."""
    learning = learns(query, key, value)
    if dropout:
        return "dropout: torch's backward cannot redo our mask"
    for name in BEYOND:
        if kwargs.get(name) is not None:
            return f"{name}: the kernel has none"
    if not _on_hopper(query.device):
        return "query: its GPU is no Hopper GPU (sm_90)"
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if sinks is not None and (sinks.shape != query.shape[1:2] or learns(sinks, sinks, sinks)):
        return "s_aux: it requires grad, or is not a number for each head"
    if learning and not softcap is sinks is None:
        return "softcap, s_aux: they have no backward"
    if not torch.compiler.is_compiling() and any(map(wraps, (query, key, value))):
        return f"query, key, value: {type_word(query)} has no memory of its own"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"query: {query.dtype}; torch.bfloat16 and torch.float16 are taken, the same for all three"
    d, d_v = query.shape[3], value.shape[3]
    if d % 8 or d_v % 8 or max(d, d_v) > HEAD_DIM_MAX:
        return f"query, value: head dims are taken that are multiples of 8 up to {HEAD_DIM_MAX}"
    if learning and not d == d_v <= GRADIENTS_HEAD_DIM_MAX:
        return f"query, value: gradients take one head dim for both, up to {GRADIENTS_HEAD_DIM_MAX}"
    return None


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    """A Hopper GPU; or the CPU, where torch computes for us, so that the same code runs anywhere."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0))


def other(kwargs: dict[str, Any]) -> str:
    """Whose attention computes what the kernel does not."""
    only = any(kwargs.get(name) is not None for name in EAGER)
    return "the model's own eager attention" if only else "transformers' sdpa attention"


def fallback(module, query, key, value, mask, dropout, scaling, is_causal, kwargs):
    """The same by transformers: the model's own eager attention for what only that has, else sdpa attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask, is_causal = spelled_out(module, mask, is_causal, query, key)
    how = dict(dropout=dropout, scaling=scaling, **kwargs)
    only = [name for name in EAGER if kwargs.get(name) is not None]
    broadcast = mask is not None and mask.shape[-1] == 1 < key.shape[2]
    if not only and not broadcast:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **how)
    eager = eager_of(type(module))
    if eager is None and only:
        raise NotImplementedError(f"{only[0]}: not supported here, and {type(module).__name__} has no eager attention")
    if eager is None:  # torch's kernels would read the places of all keys, beyond the mask's end
        mask = mask.expand(*mask.shape[:-1], key.shape[2]).contiguous()
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **how)
    if mask is None and query.shape[2] > 1 and ordered(module, is_causal):
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:  # eager attention adds its mask
        mask = torch.where(mask, query.new_zeros(()), torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **how)[0], None


def spelled_out(module, mask, is_causal: bool | None, query, key):
    """A mask as sdpa attention takes it, and is_causal: no mask where is_causal says it all."""
    if not isinstance(mask, LazyMask):
        return mask, ordered(module, is_causal)
    queries, keys = query.shape[2], key.shape[2]
    fits = mask.keys == keys and mask.shape == (len(query), 1, queries, keys)
    if fits and mask.window is mask.among is None and not (mask.causal and queries not in (1, keys)):
        return None, mask.causal
    return mask.make(), False


@lru_cache
def eager_of(kind: type) -> Callable | None:
    """Of a model's attention module: the function that its file has beside it."""
    beside = (getattr(sys.modules.get(x.__module__), "eager_attention_forward", None) for x in kind.__mro__)
    return next(filter(None, beside), None)
