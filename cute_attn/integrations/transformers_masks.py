"""transformers' masks, not made until somebody looks: causal or not, in a window, over padding, of packed sequences."""

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map_only

from ..block_mask import BlockLists, as_lists
from ..streams import is_captured
from .transformers_models import HINT, asks

BLOCK = 128  # of queries and of keys, in lists of blocks
ATEN = torch.ops.aten
NEGATIONS = {ATEN.bitwise_not, ATEN.logical_not}
OF_BITS = {ATEN.where, ATEN.zeros_like, ATEN.ones_like, ATEN.empty_like, ATEN.new_zeros, ATEN.new_ones, ATEN.new_empty}
FILLS = {ATEN.masked_fill, ATEN.masked_fill_}  # where a mask is True
AS_NUMBERS = {ATEN._to_copy, ATEN.eq, ATEN.ne, ATEN.lt, ATEN.le, ATEN.gt, ATEN.ge}


class LazyMask(torch.Tensor):
    """A mask that is not made until somebody looks, and is nothing but a mask.

    To a model it is the (B, 1, Sq, Sk) bool tensor that sdpa attention gets: it may ask for its shape, type or device,
    keep it in a dict, or hand it on. An operation on it (a slice, a padding, a union) has transformers make the
    tensor; what comes out is never taken for the whole mask, but is a mask still. `attention` reads the rest.

    A model that computes its attention itself would add it to the scores, as it adds eager attention's mask of 0 and
    -inf: True would count as a score of 1. So arithmetic with it raises, as do comparisons, and filling what is seen.
    """

    make: Callable[[], Any]  # the tensor, once
    keys: int | None  # those up to the last query's own; behind them are places that a static cache has not filled yet.
    # None: nothing is known but the tensor
    causal: bool
    window: int | None  # of keys up to the query's own, if causal, else of keys on either side of it; None: all of them
    among: "Padding | Packing | None"  # what hides keys beside these
    hides: bool  # True stands for a pair that is not seen

    @staticmethod
    def __new__(cls, make: Callable[[], Any], shape, device, keys=None, causal=False, window=None, among=None):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.make, self.keys, self.causal, self.window, self.among = lru_cache(make), keys, causal, window, among
        self.hides = False
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, bits, hides: bool = False) -> "LazyMask":
        self = cls(lambda: bits, bits.shape, bits.device)
        self.hides = hides
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, what = kwargs or {}, operation.overloadpacket
        if what is ATEN.detach:  # by a checkpoint
            return args[0]._whole(args[0].make, args[0].device, args[0].among)
        if what is ATEN._to_copy and kwargs.get("device") and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._moved(operation, kwargs)
        hides = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)).hides
        args, kwargs = tree_map_only(cls, lambda x: x.make(), (args, kwargs))
        found = operation(*args, **kwargs)
        if not isinstance(found, torch.Tensor):
            return found
        allowed = not found.is_floating_point() or what in (OF_BITS | FILLS if hides else OF_BITS)
        if what in AS_NUMBERS or not allowed:
            raise NotImplementedError(
                f"attn_implementation: {operation} of a mask is by a model that computes its attention itself, and "
                f"would misread the masks of cute_attn; {HINT}"
            )
        return cls.of(found, hides ^ (what in NEGATIONS)) if found.dtype == torch.bool else found

    def _moved(self, operation, kwargs):
        """To another GPU, where one has the first layers and another the next."""
        device, among = kwargs["device"], self.among
        return self._whole(
            lambda: operation(self.make(), **kwargs), device, None if among is None else among.to(device)
        )

    def _whole(self, make, device, among):
        other = LazyMask(make, self.shape, device, self.keys, self.causal, self.window, among)
        other.hides = self.hides
        return other

    def __repr__(self):
        said = f"keys={self.keys}, causal={self.causal}, window={self.window}, among={self.among}"
        return f"LazyMask({tuple(self.shape)}, {said})"


class Padding:
    """Keys of which some are padding, for `flash_fwd`: made when the first layer asks, for all of them."""

    def __init__(self, real, queries: int, causal: bool, window: int | None):
        self.real = real  # (B, keys) bool
        self.queries, self.causal, self.window = queries, causal, window

    def to(self, device) -> "Padding":
        return Padding(self.real.to(device), self.queries, self.causal, self.window)

    @cached_property
    def options(self) -> dict[str, Any]:
        sides = sides_of(self.causal, self.window)
        return dict(mask_mod=only(self.real), block_mask=listed(self.real, self.queries, self.causal, sides))


def only(real: torch.Tensor) -> Callable:
    """The mask_mod that leaves a sequence's real keys: one kernel for any of them, which takes `real` at run time."""

    def mask_mod(b, h, q_idx, kv_idx):
        return real[b, kv_idx]

    return mask_mod


def sides_of(causal: bool, window: int | None) -> tuple[int, int] | None:
    """transformers' size of a window as flash_fwd's: it counts the query's own key if causal, and not otherwise."""
    return None if window is None else (window - 1, 0) if causal else (window, window)


def listed(real: torch.Tensor, queries: int, causal: bool, sides: tuple[int, int] | None) -> BlockLists:
    """The blocks of real keys that causality and the window let a block of queries see.

    Blocks that are padding altogether are in no list, and those without any are full ones, of which mask_mod is not
    asked. Computed where `real` is, without a read to the host.
    """
    keys, device = real.shape[1], real.device
    rows, columns = (BLOCK * torch.arange(-(-n // BLOCK), device=device) for n in (queries, keys))
    beyond = BLOCK * len(columns) - keys
    some, every = (pad(real, (0, beyond), value=x).unflatten(1, (-1, BLOCK)) for x in (False, True))
    some, every = some.any(2)[:, None], every.all(2)[:, None]  # (B, 1, columns)
    left, right = sides or (keys + queries, 0 if causal else keys + queries)
    first, last = rows[:, None], (rows + BLOCK).clamp(max=queries)[:, None] - 1
    near = columns <= last + keys - queries + right  # aligned to the last key
    near &= columns + BLOCK > first + keys - queries - left
    cut, whole = (as_lists(x[:, None]) for x in (near & some & ~every, near & every))  # (B, 1, rows, columns)
    return BlockLists(*cut, *whole, block_size=(BLOCK, BLOCK))


class Sequences(NamedTuple):
    """Packed one behind the other, for `flash_fwd_varlen`: FlashAttention's cu_seqlens, int32, and longest lengths."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int | torch.Tensor
    longest_keys: int | torch.Tensor

    def mask(self, queries: int, keys: int, causal: bool, window: tuple[int, int] | None) -> torch.Tensor:
        """As sdpa attention takes it, (1, 1, queries, keys) bool; rows of no sequence are one of their own."""
        ends = [pad(x[1:], (0, 1), value=n).long() for x, n in zip(self[:2], (queries, keys), strict=True)]
        q, k = (torch.arange(n, device=self.keys.device) for n in (queries, keys))
        of_q, of_k = (torch.bucketize(x, end, right=True) for x, end in zip((q, k), ends, strict=True))
        seen, distance = of_q[:, None] == of_k, (q - ends[0][of_q] + ends[1][of_q])[:, None] - k
        seen = seen & (distance >= 0) if causal else seen
        return (seen if window is None else seen & (distance <= window[0]) & (distance >= -window[1]))[None, None]


class Packing:
    """One row's packed sequences, told by which of them each place is in, and by each place's position there.

    `sequences` is made when the first layer asks, for all of them, with one read to the host, of how many there are and
    of the longest. transformers reads there too, whether there are several.
    """

    def __init__(self, which: torch.Tensor, positions: torch.Tensor | None):
        self.which, self.positions = which, positions

    def to(self, device) -> "Packing":
        return Packing(self.which.to(device), None if self.positions is None else self.positions.to(device))

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        return {tuple(x.shape) for x in (self.which, self.positions) if x is not None}

    @cached_property
    def sequences(self) -> Sequences | None:
        """None where they are not contiguous, positions do not count up by 1 in each, or nothing can be read."""
        which, total = self.which[0], self.which.shape[1]
        starts = which.diff(prepend=which[:1] - 1) != 0
        orderly = (which.diff() >= 0).all()
        if self.positions is not None:
            orderly &= ((self.positions[0].diff() != 1) == starts[1:]).all()
        places = torch.arange(total, device=which.device).where(starts, total).sort().values
        ends = pad(places, (0, 1), value=total)
        facts = read(torch.stack((orderly.long(), starts.sum(), ends.diff().max())))
        if not facts or not facts[0]:
            return None
        cu_seqlens = ends[: facts[1] + 1].to(torch.int32)
        return Sequences(cu_seqlens, cu_seqlens, facts[2], facts[2])


def mask(*, mask_function=None, local_size=None, **how) -> torch.Tensor | None:
    """transformers' mask function: None where one query sees all keys, else a LazyMask, or a tensor for a graph."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    how |= dict(mask_function=mask_function or causal_mask_function, local_size=local_size)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return for_a_graph(**how)
    at = place(**how) or packed_place(**how)
    if at is None and _queries(**how)[0] == 1:  # with a static cache, by whose lengths the step is compiled
        return for_a_graph(**how)
    window = at and (local_size if local_size is not None and local_size < at.keys else None)
    if at and window is at.real is at.packing is None and at.queries == 1 and at.keys == how["kv_length"]:
        return None
    how |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)  # None would leave causality open
    if at is None:
        return LazyMask.of(sdpa_mask(**how))
    left_to_causality = at.real is None or (at.causal and at.padded_right)
    among = at.packing if left_to_causality else Padding(at.real, at.queries, at.causal, window)
    if isinstance(how.get("q_offset"), torch.Tensor):  # a static cache's own, which counts on before anybody looks
        how["q_offset"] = at.keys - at.queries + how.get("kv_offset", 0)
    shape = how["batch_size"], 1, at.queries, how["kv_length"]
    return LazyMask(lambda: sdpa_mask(**how), shape, at.device, at.keys, at.causal, window, among)


def for_a_graph(**how) -> torch.Tensor | None:
    """sdpa's mask; eager's where some attention might add it, which sdpa attention takes too, as nothing can raise."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    config = how.get("config")
    return sdpa_mask(**how) if config is None or asks(type(config)) else eager_mask(**how)


class Place(NamedTuple):
    """Of `queries` queries, and `keys` keys; if causal, the last of one aligned to the last of the other."""

    queries: int
    keys: int
    causal: bool
    device: torch.device | str
    real: torch.Tensor | None = None  # (B, keys) bool, where some keys are padding
    padded_right: bool = False  # all padding is behind the real keys, so that causality hides it from real queries
    packing: Packing | None = None


def place(
    *,
    batch_size,
    kv_length,
    kv_offset=0,
    mask_function,
    attention_mask=None,
    local_size,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    **how,
) -> Place | None:
    """What a mask function's arguments say, where they say no more than causality, a sliding window, and padding.

    They do where transformers lets sdpa's mask function leave a mask out: not for images and such, nor for decoding
    with a static cache, whose length is on the GPU and is not read in every step.
    """
    queries, first, device = _queries(**how)
    if allow_is_causal_skip and slides(mask_function, local_size):
        if isinstance(first, torch.Tensor):
            first = 0 if read(first == 0) else -1
        keys = first + queries - kv_offset
        if not kv_offset <= first <= first + queries <= kv_offset + kv_length:
            return None
    elif allow_is_bidirectional_skip and sees_both_sides(mask_function, local_size):
        keys = kv_length
        if local_size is not None and (type(first) is not int or first != kv_offset or queries != keys):
            return None
    else:
        return None
    causal = allow_is_causal_skip
    if attention_mask is None:
        return Place(queries, keys, causal, device)
    real = attention_mask[:, kv_offset : kv_offset + keys].bool()
    if real.shape != (batch_size, keys):
        return None
    facts = read(torch.stack((real.all(), (real[:, 1:] <= real[:, :-1]).all())))
    if facts is None:
        return None
    whole, padded_right = facts
    return Place(queries, keys, causal, device, *(() if whole else (real, padded_right)))


def packed_place(
    *, batch_size, kv_length, kv_offset=0, mask_function, attention_mask=None, local_size, **how
) -> Place | None:
    """The same of sequences packed into one row, without a cache, of which position_ids alone tell."""
    found = packing(mask_function, local_size)
    if found is None or attention_mask is not None:
        return None
    queries, first, device = _queries(**how)
    whole = type(first) is int and first == kv_offset == 0 and queries == kv_length
    of_one_row = batch_size == 1 and found.shapes == {(1, queries)}
    if not whole or not of_one_row:
        return None
    return Place(queries, queries, True, device, packing=found)


def _queries(q_length=None, q_offset=0, device="cpu", cache_position=None, **_):
    """How many, the first one's place (a tensor with a static cache), the device; transformers 4 gives every place."""
    if cache_position is None:
        return q_length, q_offset, device
    return len(cache_position), int(cache_position[0]), cache_position.device


def read(facts: torch.Tensor) -> Any:
    """From the GPU, as sdpa's mask function does; None where that cannot be."""
    readable = type(facts) is torch.Tensor and not facts.is_meta
    return facts.tolist() if readable and not is_captured(facts) else None


def causality(size: int | None) -> Callable:
    """transformers' mask function of it (size None), or of a causal sliding window."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    return causal_mask_function if size is None else sliding_window_causal_mask_function(size)


def slides(mask_function, size: int | None) -> bool:
    """Whether a mask function is transformers' own of causality (size None) or of a causal sliding window."""
    return same(mask_function, causality(size))


def sees_both_sides(mask_function, size: int | None) -> bool:
    """Whether it is transformers' own of no causality (size None), or of a sliding window on both sides."""
    from transformers import masking_utils as masks

    if size is None:
        return mask_function is getattr(masks, "bidirectional_mask_function", None)
    within = getattr(masks, "sliding_window_bidirectional_mask_function", None)
    return within is not None and same(mask_function, within(size))


def packing(mask_function, size: int | None) -> Packing | None:
    """Of a mask function that is transformers' own of packed sequences, each causal by its positions, or by places.

    Positions came with transformers 5; within a sequence they count up as places do.
    """
    from transformers import masking_utils as masks

    remap = getattr(masks, "remap_positions_for_packed_sequence", None)
    positions, which = None, list(_tensors(mask_function))
    within = causality(size)
    if len(which) == 2 and remap is not None:
        positions = which.pop(0)
        within = remap(within, positions)
    if len(which) != 1:
        return None
    packed = masks.and_masks(within, masks.packed_sequence_mask_function(which[0]))
    return Packing(which[0], positions) if same(mask_function, packed) else None


def same(ours, theirs) -> bool:
    """Whether two functions are one: the same code, over the same numbers, tensors and functions."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours is theirs
    if not isfunction(ours) or not isfunction(theirs):
        return type(ours) is type(theirs) is int and ours == theirs
    return ours.__code__ is theirs.__code__ and same(_held(ours), _held(theirs))


def _held(function) -> tuple:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _tensors(x, depth: int = 3) -> Iterator[torch.Tensor]:
    """That a function holds, or a tuple, or what these hold: a conjunction has a tuple of functions that have some."""
    if isinstance(x, torch.Tensor):
        yield x
    elif depth:
        for part in _held(x) if isfunction(x) else x if isinstance(x, tuple) else ():
            yield from _tensors(part, depth - 1)
