"""transformers' masks, not made until somebody looks: causal ones, in a window, over padding, of packed sequences."""

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..block_mask import BlockLists, as_lists

BLOCK = 128  # of queries and of keys, in lists of blocks


class CausalMask(torch.Tensor):
    """The causal mask of `keys` keys, in a sliding window or without one, that is not made until somebody looks.

    To a model it is the (B, 1, Sq, Sk) bool tensor that sdpa attention gets: it may ask for its shape, type or device,
    keep it in a dict, or hand it on. Any operation on it (a slice, a padding, a sum) has transformers make that tensor,
    and goes on with it, so what comes out is never taken for the whole mask. `attention` reads the rest.
    """

    make: Callable[[], Any]  # the tensor, once
    keys: int  # those up to the last query's own; behind them are places that a static cache has not filled yet
    window: int | None  # each query's own key and those before it; None: all of them
    among: "Padding | Packing | None"  # what hides keys beside these two

    @staticmethod
    def __new__(cls, make: Callable[[], Any], shape, device, keys, window, among=None):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.make, self.keys, self.window, self.among = lru_cache(make), keys, window, among
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, bits = kwargs or {}, (None, torch.bool)
        if operation is torch.ops.aten._to_copy.default and kwargs.get("device") and kwargs.get("dtype") in bits:
            (self,) = args  # on its way to another GPU, where one has the first layers and another the next
            device, among = kwargs["device"], self.among
            among = None if among is None else among.to(device)
            return cls(lambda: operation(self.make(), **kwargs), self.shape, device, self.keys, self.window, among)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda x: x.make(), (args, kwargs))
        return operation(*args, **kwargs)

    def __repr__(self):
        return f"CausalMask({tuple(self.shape)}, keys={self.keys}, window={self.window}, among={self.among})"


class Padding:
    """Keys of which some are padding, for `flash_fwd`: made when the first layer asks, for all of them."""

    def __init__(self, real: torch.Tensor, queries: int, window: int | None):
        self.real, self.queries, self.window = real, queries, window  # real: (B, keys) bool

    def to(self, device) -> "Padding":
        return Padding(self.real.to(device), self.queries, self.window)

    @cached_property
    def options(self) -> dict[str, Any]:
        return dict(mask_mod=only(self.real), block_mask=listed(self.real, self.queries, self.window))


def only(real: torch.Tensor) -> Callable:
    """The mask_mod that leaves a sequence's real keys: one kernel for any of them, which takes `real` at run time."""

    def mask_mod(b, h, q_idx, kv_idx):
        return real[b, kv_idx]

    return mask_mod


def listed(real: torch.Tensor, queries: int, window: int | None) -> BlockLists:
    """The blocks of real keys that causality and the window let a block of queries see.

    Blocks that are padding altogether are in no list, and those without any are full ones, of which mask_mod is not
    asked. Computed where `real` is, without a read to the host.
    """
    keys, device = real.shape[1], real.device
    rows, columns = (BLOCK * torch.arange(-(-n // BLOCK), device=device) for n in (queries, keys))
    beyond = BLOCK * len(columns) - keys
    some, every = (pad(real, (0, beyond), value=x).unflatten(1, (-1, BLOCK)) for x in (False, True))
    some, every = some.any(2)[:, None], every.all(2)[:, None]  # (B, 1, columns)
    ends = (rows + BLOCK).clamp(max=queries)[:, None] + keys - queries  # aligned to the last key
    near = columns < ends
    if window is not None:
        near &= columns + BLOCK > rows[:, None] + keys - queries - window + 1
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
        return (seen if window is None else seen & (distance <= window[0]))[None, None]


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
    """transformers' mask function: None where causality says it all, a CausalMask where that does, else sdpa's mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    how |= dict(mask_function=mask_function or causal_mask_function, local_size=local_size)
    at = None if torch.compiler.is_compiling() or torch.jit.is_tracing() else place(**how) or packed_place(**how)
    if at is None:
        return sdpa_mask(**how)
    window = local_size if local_size is not None and local_size < at.keys else None
    if window is at.real is at.packing is None and at.keys == how["kv_length"] and at.queries in (1, at.keys):
        return None
    among = at.packing if at.real is None or at.padded_right else Padding(at.real, at.queries, window)
    how["allow_is_causal_skip"] = False
    if isinstance(how.get("q_offset"), torch.Tensor):  # a static cache's own, which counts on before anybody looks
        how["q_offset"] = at.keys - at.queries + how.get("kv_offset", 0)
    shape = how["batch_size"], 1, at.queries, how["kv_length"]
    return CausalMask(lambda: sdpa_mask(**how), shape, at.device, at.keys, window, among)


class Place(NamedTuple):
    """Of `queries` queries, the last aligned to the last of `keys` keys."""

    queries: int
    keys: int
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
    **how,
) -> Place | None:
    """What a mask function's arguments say, where they say no more than causality, a sliding window, and padding.

    They do where transformers lets sdpa's mask function leave a mask out: not for images and such, nor for decoding
    with a static cache, whose length is on the GPU and is not read in every step.
    """
    if not allow_is_causal_skip or not slides(mask_function, local_size):
        return None
    queries, first, device = _queries(**how)
    if isinstance(first, torch.Tensor):
        first = 0 if read(first == 0) else -1
    keys = first + queries - kv_offset
    if not kv_offset <= first <= first + queries <= kv_offset + kv_length:
        return None
    if attention_mask is None:
        return Place(queries, keys, device)
    real = attention_mask[:, kv_offset : first + queries].bool()
    if real.shape != (batch_size, keys):
        return None
    facts = read(torch.stack((real.all(), (real[:, 1:] <= real[:, :-1]).all())))
    if facts is None:
        return None
    whole, padded_right = facts
    return Place(queries, keys, device) if whole else Place(queries, keys, device, real, padded_right)


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
    return Place(queries, queries, device, packing=found)


def _queries(q_length=None, q_offset=0, device="cpu", cache_position=None, **_):
    """How many, the first one's place (a tensor with a static cache), the device; transformers 4 gives every place."""
    if cache_position is None:
        return q_length, q_offset, device
    return len(cache_position), int(cache_position[0]), cache_position.device


def read(facts: torch.Tensor) -> Any:
    """From the GPU, as sdpa's mask function does; None where that cannot be."""
    readable = type(facts) is torch.Tensor and not facts.is_meta
    return facts.tolist() if readable and not (facts.is_cuda and torch.cuda.is_current_stream_capturing()) else None


def causality(size: int | None) -> Callable:
    """transformers' mask function of it (size None), or of a causal sliding window."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    return causal_mask_function if size is None else sliding_window_causal_mask_function(size)


def slides(mask_function, size: int | None) -> bool:
    """Whether a mask function is transformers' own of causality (size None) or of a causal sliding window."""
    return same(mask_function, causality(size))


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
