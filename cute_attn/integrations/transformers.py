"""Hugging Face transformers: `register()`, then `attn_implementation="cute_attn"`.

The kernel computes what it takes: causal or full attention, causal sliding windows, softcaps and attention sinks, where
no key is padding, that is training, prefill (in one or in chunks), and decoding with a cache that grows. Whatever else
comes (padded batches, decoding with a static cache, dropout, other types) goes to transformers' own attention, which
computes it as it would have without us: sdpa's, or the model's eager one for softcaps and sinks, which sdpa has not.

What counts is the mask alone, as with sdpa: of a model's `sliding_window=` argument nothing follows.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from inspect import isfunction
from typing import Any, NamedTuple

import torch

from .. import api
from ..checks import DTYPES, GRADIENTS_HEAD_DIM_MAX, HEAD_DIM_MAX, learns

NAME = "cute_attn"
SPARSE = ("indices", "block_indices")  # arguments of models that leave it to all but eager and sdpa to choose the keys
EAGER = ("softcap", "s_aux", "sinks")  # that sdpa attention has not: a cap, a logit per head, a logit per query
BEYOND = ("position_bias", "cache", "sinks")  # the kernel


def register() -> str:
    """Make "cute_attn" known to transformers (4.53 or later), for models that are made or loaded from then on.

    Returns:
        the name, for `from_pretrained(..., attn_implementation=register())`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


class CausalMask(torch.Tensor):
    """The causal mask of `keys` keys, in a sliding window or without one, that is not made until somebody looks.

    To a model it is the (B, 1, Sq, Sk) bool tensor that sdpa attention gets: it may ask for its shape, type or device,
    keep it in a dict, or hand it on. Any operation on it (a slice, a padding, a sum) has transformers make that tensor,
    and goes on with it, so what comes out is never taken for the whole mask. `attention` reads `keys` and `window`.
    """

    make: Callable[[], Any]  # the tensor, once
    keys: int  # those up to the last query's own; behind them are places that a static cache has not filled yet
    window: int | None  # each query's own key and those before it; None: all of them

    @staticmethod
    def __new__(cls, make: Callable[[], Any], shape, device, keys, window):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.make, self.keys, self.window = lru_cache(make), keys, window
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, bits = kwargs or {}, (None, torch.bool)
        if operation is torch.ops.aten._to_copy.default and kwargs.get("device") and kwargs.get("dtype") in bits:
            (self,) = args  # on its way to another GPU, where one has the first layers and another the next
            return cls(lambda: operation(self.make(), **kwargs), self.shape, kwargs["device"], self.keys, self.window)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda x: x.make(), (args, kwargs))
        return operation(*args, **kwargs)

    def __repr__(self):
        return f"CausalMask({tuple(self.shape)}, keys={self.keys}, window={self.window})"


def mask(*, mask_function=None, local_size=None, **how) -> torch.Tensor | None:
    """transformers' mask function: None where causality says it all, a CausalMask where that does, else sdpa's mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    how |= dict(mask_function=mask_function or causal_mask_function, local_size=local_size)
    at = None if torch.compiler.is_compiling() or torch.jit.is_tracing() else place(**how)
    if at is None:
        return sdpa_mask(**how)
    window = local_size if local_size is not None and local_size < at.keys else None
    if window is None and at.keys == how["kv_length"] and at.queries in (1, at.keys):
        return None
    shape = how["batch_size"], 1, at.queries, how["kv_length"]
    return CausalMask(lambda: sdpa_mask(**how | dict(allow_is_causal_skip=False)), shape, at.device, at.keys, window)


class Place(NamedTuple):
    """Of `queries` queries, the last aligned to the last of `keys` keys; none of these is padding."""

    queries: int
    keys: int
    device: torch.device | str


def place(
    *, kv_length, kv_offset=0, mask_function, attention_mask=None, local_size, allow_is_causal_skip=True, **how
) -> Place | None:
    """What a mask function's arguments say, where they say no more than causality or a causal sliding window.

    They do where transformers lets sdpa's mask function leave a mask out: not for packed sequences, images and such,
    nor for decoding with a static cache, whose length is on the GPU and is not read in every step.
    """
    if not allow_is_causal_skip or not slides(mask_function, local_size):
        return None
    queries, first, device = _queries(**how)
    if isinstance(first, torch.Tensor):
        first = 0 if _holds(first == 0) else -1
    keys = first + queries - kv_offset
    if not kv_offset <= first <= first + queries <= kv_offset + kv_length:
        return None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : first + queries]
        if real.shape[1] < keys or not _holds(real.all()):
            return None
    return Place(queries, keys, device)


def _queries(q_length=None, q_offset=0, device="cpu", cache_position=None, **_):
    """How many, the first one's place (a tensor with a static cache), the device; transformers 4 gives every place."""
    if cache_position is None:
        return q_length, q_offset, device
    return len(cache_position), int(cache_position[0]), cache_position.device


def _holds(fact: torch.Tensor) -> bool:
    """Read from the GPU, as sdpa's mask function does; what cannot be read is not taken to hold."""
    readable = type(fact) is torch.Tensor and not fact.is_meta
    return readable and not (fact.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(fact)


def slides(mask_function, size: int | None) -> bool:
    """Whether a mask function is transformers' own of causality (size None) or of a causal sliding window."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    return same(mask_function, causal_mask_function if size is None else sliding_window_causal_mask_function(size))


def same(ours, theirs) -> bool:
    """Whether two functions are one: the same code, over the same numbers and functions."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if not isfunction(ours) or not isfunction(theirs):
        return type(ours) is type(theirs) is int and ours == theirs
    held = (tuple(cell.cell_contents for cell in x.__closure__ or ()) for x in (ours, theirs))
    return ours.__code__ is theirs.__code__ and same(*held)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention function: query (B, H, Sq, D), key and value (B, Hk, Sk, D) -> (o (B, Sq, H, D), None).

    Raises:
        NotImplementedError: for what sdpa attention would leave out in silence: sparse attention, and attention sinks
            of a model that has no eager attention.
        ValueError: for causal attention of fewer queries than keys, if no mask says which keys the queries see.
    """
    for name in SPARSE:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: sparse attention is not supported; use attn_implementation="eager"')
    seen = visible(module, query, key, attention_mask, is_causal)
    if seen is None or not serves(query, key, value, dropout, kwargs):
        return others(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
    how = dict(causal=seen.causal, scale=scaling, window=seen.window, softcap=kwargs.get("softcap"))
    if kwargs.get("s_aux") is not None:
        how["sinks"] = kwargs["s_aux"].float()
    if learns(query, key, value):
        return api.flash_fwd(query, key, value, **how).transpose(1, 2), None
    o = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    api.flash_fwd(query, key, value, **how, out=o.transpose(1, 2))
    return o, None


class Visible(NamedTuple):
    """What the kernel is asked for: the first `keys` keys, and of those what causality and a window leave."""

    keys: int
    causal: bool
    window: tuple[int, int] | None = None


def visible(module, query, key, mask, is_causal) -> Visible | None:
    """By the mask; None where it is a tensor of its own, or does not fit these keys."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, CausalMask):
        window = None if mask.window is None else (mask.window - 1, 0)
        return Visible(mask.keys, queries > 1, window) if mask.shape[2:] == (queries, keys) else None
    if mask is not None:
        return None
    causal = queries > 1 and ordered(module, is_causal)
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


def ordered(module, is_causal: bool | None) -> bool:
    """Whether no mask means causality, for several queries."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def serves(query, key, value, dropout: float, kwargs: dict[str, Any]) -> bool:
    """Whether the kernel computes just this."""
    if dropout or any(kwargs.get(name) is not None for name in BEYOND) or not _on_hopper(query.device):
        return False  # dropout trains, and torch's backward cannot redo our mask
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if sinks is not None and (sinks.shape != query.shape[1:2] or learns(sinks, sinks, sinks)):
        return False
    if (softcap is not None or sinks is not None) and learns(query, key, value):
        return False  # there is no backward for them
    d, d_v = query.shape[3], value.shape[3]
    fits = d % 8 == d_v % 8 == 0 and max(d, d_v) <= HEAD_DIM_MAX
    if learns(query, key, value):
        fits = fits and d == d_v <= GRADIENTS_HEAD_DIM_MAX
    return fits and query.dtype in DTYPES and query.dtype == key.dtype == value.dtype


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    """A Hopper GPU; or the CPU, where torch computes for us, so that the same code runs anywhere."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0))


def others(module, query, key, value, mask, dropout, scaling, is_causal, kwargs):
    """The same by transformers: the model's own eager attention for what only that has, else sdpa attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = mask.make() if isinstance(mask, CausalMask) else mask
    how = dict(dropout=dropout, scaling=scaling, **kwargs)
    only = [name for name in EAGER if kwargs.get(name) is not None]
    if not only:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **how)
    eager = eager_of(type(module))
    if eager is None:
        raise NotImplementedError(f"{only[0]}: not supported here, and {type(module).__name__} has no eager attention")
    if mask is None and query.shape[2] > 1 and ordered(module, is_causal):
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:  # eager attention adds its mask
        mask = torch.where(mask, query.new_zeros(()), torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **how)[0], None


@lru_cache
def eager_of(kind: type) -> Callable | None:
    """Of a model's attention module: the function that its file has beside it."""
    beside = (getattr(sys.modules.get(x.__module__), "eager_attention_forward", None) for x in kind.__mro__)
    return next(filter(None, beside), None)
