"""What `flash_fwd_kvcache` asks of its tensors beside what `checks` asks of any call's."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from . import checks
from .checks import ALIGNMENT, SIZE_MAX, Spec
from .scalars import integer

UNITS_MAX = (1 << 31) - (1 << 16)  # int32 counts the units of a cache's rows, and those by which a tile reaches over
HELP = dict(
    cache_batch_idx="whose rows say where a sequence's keys lie; pass page_table[cache_batch_idx] alone",
    cache_leftpad="whose pages begin with a sequence's first key; leave whole pages out of page_table and of "
    "cache_seqlens, and write no padding into the first one",
)


def queries(q: Spec, packed: bool) -> None:
    """(B, Sq, H, D), or of packed sequences (total_q, H, D)."""
    checks.dense("q", q.storage)
    if len(q.shape) != (3 if packed else 4):
        want = "3 are needed with cu_seqlens_q: (total_q, H, D)"
        want = want if packed else "4 are needed: (B, Sq, H, D), or (total_q, H, D) with cu_seqlens_q"
        raise ValueError(f"q: {len(q.shape)} dimensions, shape {tuple(q.shape)}; {want}")
    checks.element("q", q)
    checks.placed("q", q)


def tiles(q: Spec, batch: int, packed: bool) -> None:
    """As many as a launch numbers, of as many rows as its indices reach."""
    if packed:
        checks.packed_tiles(q.shape[0], batch, q.shape[1])
        return
    found = -(-q.shape[1] // 64) * q.shape[2] * batch
    if found >= SIZE_MAX:
        raise ValueError(f"q: {found} tiles of 64 rows in one call; split the batch to stay below {SIZE_MAX}")


def rows(name: str, x: Spec) -> None:
    """(B, S, H, D) whose sequences lie at a distance of whole rows: as rows of one tensor, a kernel takes them."""
    if 0 in x.shape:
        return
    row, step = row_step(x.shape, x.stride)
    batch, seqlen = x.shape[:2]
    whole = seqlen == 1 or batch == 1 or (x.stride[0] == row * step and (step >= seqlen or step == 0))
    total = (batch - 1) * step + seqlen
    if whole and total <= SIZE_MAX:
        return
    what = f"strides {x.stride} of shape {tuple(x.shape)}"
    if not whole:
        why = "the batch's stride is no multiple of the row's"
        raise ValueError(f"{name}: {what}: {why}, by at least Sq rows; use {name}.contiguous()")
    raise ValueError(f"{name}: {what} reach over {total} rows; at most {SIZE_MAX} are supported: {name}.contiguous()")


class Rows(NamedTuple):
    """(B, S, H, D) as a kernel gets it: (rows, H, D), where a sequence's begin `step` rows behind the one before's."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    step: int


@lru_cache(maxsize=4096)
def as_rows(shape: Any, stride: Any) -> Rows:
    row, step = row_step(shape, stride)
    batch, seqlen, heads, columns = shape
    return Rows(((batch - 1) * step + seqlen, heads, columns), (row, stride[2] if heads > 1 else ALIGNMENT, 1), step)


def row_step(shape: Any, stride: Any) -> tuple[int, int]:
    """Of (B, S, H, D): elements from a row to the next, and rows from a sequence's first to the next one's."""
    (batch, seqlen), (outer, row) = shape[:2], stride[:2]
    if seqlen == 1:
        return (ALIGNMENT if batch == 1 else outer), 1
    return (row, seqlen) if batch == 1 or row == 0 else (row, outer // row)


def caches(k: Spec, v: Spec, q: Spec, paged: bool) -> None:
    """Both are caches of q's type and place, and fit together and to q."""
    for name, x in (("k_cache", k), ("v_cache", v)):
        _cache(name, x, q, paged)
    if v.shape[:3] != k.shape[:3]:
        what = f"shape {tuple(v.shape)} does not fit k_cache's {tuple(k.shape)}"
        raise ValueError(f"v_cache: {what}; v_cache is {_shape(paged, 'Dv')} with k_cache's first three")
    heads, heads_kv = q.shape[-2], k.shape[2]
    if k.shape[3] != q.shape[-1]:
        what = f"shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}"
        raise ValueError(f"k_cache: {what}; k_cache is {_shape(paged)} with q's D")
    if heads and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(f"k_cache: {heads_kv} heads do not divide q's {heads}; use Hk with H % Hk == 0 (GQA, MQA)")


def _cache(name: str, x: Spec, q: Spec, paged: bool) -> None:
    checks.dense(name, x.storage)
    if len(x.shape) != 4:
        what = f"{len(x.shape)} dimensions, shape {tuple(x.shape)}"
        raise ValueError(f"{name}: {what}; 4 are needed{' with page_table' if paged else ''}: {_shape(paged)}")
    checks.element(name, x)
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: {x.dtype} does not match q's {q.dtype}; keep the cache in q's type, or convert q")
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move one with .to(device)")
    checks.placed(name, x)
    (page, row, *_), unit = as_pages(x.shape, x.stride)
    units = ((x.shape[0] - 1) * page + x.shape[1] * row) // unit  # up to behind the last row: where boxes end
    if units >= UNITS_MAX:
        what = f"strides {x.stride} of shape {tuple(x.shape)} reach over {units} times {unit} elements"
        why = f"the greatest common divisor of its first two; below {UNITS_MAX} are supported"
        raise ValueError(f"{name}: {what}, {why}: allocate it with a larger one")


class Pages(NamedTuple):
    """How a kernel gets a cache: its strides, and of how many elements the distance of any two rows is a multiple."""

    strides: tuple[int, ...]
    unit: int


@lru_cache(maxsize=4096)
def as_pages(shape: Any, stride: Any) -> Pages:
    """Of a cache: what the stride of a size of 1 is says nothing, and may be no TMA's."""
    (pages, page_size, heads, columns), (page, row, head, _) = shape, stride
    if page_size == 1:
        row = columns if pages == 1 else page
    page = row if pages == 1 else page
    return Pages((page, row, ALIGNMENT if heads == 1 else head, 1), math.gcd(page, row) or ALIGNMENT)


def _shape(paged: bool, d: str = "D") -> str:
    return f"({'pages, page_size' if paged else 'B_cache, S'}, Hk, {d})"


def which_rows(k: Spec, batch: int, capacity: int, page_table, cache_batch_idx, cache_leftpad) -> None:
    """What says where each sequence's keys lie goes together, and a cache of each has as many as there are."""
    if capacity > SIZE_MAX:
        name, what = ("k_cache", "in a sequence") if page_table is None else ("page_table", "in a row's pages")
        raise ValueError(f"{name}: {capacity} keys {what}; at most {SIZE_MAX} are supported")
    for name, given in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if page_table is not None and given is not None:
            raise ValueError(f"{name}: given with page_table, {HELP[name]}")
    if page_table is cache_batch_idx is None and k.shape[0] != batch:
        how = f"pass k_cache[:{batch}] and v_cache[:{batch}]" if k.shape[0] > batch else "pass a longer cache"
        what = f"of {k.shape[0]} sequences came with q's {batch}"
        raise ValueError(f"k_cache: {what}; {how}, or say by cache_batch_idx which row is a sequence's")


def page_table(x: Spec, batch: int, q: Spec) -> None:
    """int32 (B, pages_per_seq) beside q, each row's entries one behind the other."""
    checks.dense("page_table", x.storage)
    if x.dtype != torch.int32:
        raise TypeError(f"page_table: {x.dtype} came, torch.int32 is needed; convert it with .to(torch.int32)")
    if len(x.shape) != 2 or x.shape[0] != batch:
        want = f"({batch}, pages_per_seq) is needed"
        raise ValueError(f"page_table: shape {tuple(x.shape)} came, {want}: a row for each of q's sequences")
    if x.shape[1] > 1 and x.stride[1] != 1:
        what = f"stride {x.stride[1]} in the last dimension"
        raise ValueError(f"page_table: {what}, 1 is needed; use page_table.contiguous()")
    if x.device != q.device:
        raise ValueError(f"page_table: on {x.device}, but q is on {q.device}; move it with .to(device)")


def length(given: Any) -> Any:
    """cache_seqlens where it is no tensor: a number of keys, for every sequence."""
    found = integer(given)
    if found is None:
        raise TypeError(f"cache_seqlens: {given!r} came; an int32 tensor (B,) is needed, or an int for every sequence")
    return found


def no_other_mask(key: Any) -> None:
    """Beside causal of each sequence."""
    given = [name for name, x in dict(attention_chunk=key.chunks, spans=key.spans, draft_mask=key.drafts).items() if x]
    if given:
        raise ValueError(f"causal: a tensor came with {given[0]}; pass True or False, for every sequence")


def planned(made: Any, call: Any) -> None:
    """A decode plan is of calls like this one."""
    if made != call:
        what = f"a DecodePlan of {made.text} came"
        raise ValueError(f"cache_seqlens: {what}, and this call has {call.text}; make one with this call's arguments")


def no_plan_in_a_trace() -> None:
    raise TypeError(
        "cache_seqlens: a DecodePlan came in a call that is traced, and it cannot pass the operator that tracers see; "
        "pass the int32 tensor of lengths, or call flash_fwd_kvcache outside of the trace"
    )


def fits(given: int, capacity: int) -> None:
    if not 0 <= given <= capacity:
        raise ValueError(
            f"cache_seqlens: {given} came; from 0 to {capacity} keys lie in a sequence's part of the cache"
        )


def hint(max_seqlen_q: Any, packed: bool) -> None:
    """max_seqlen_q, which only packed sequences have."""
    checks.max_seqlen("max_seqlen_q", max_seqlen_q)
    if max_seqlen_q is not None and not packed:
        raise ValueError("max_seqlen_q: given without cu_seqlens_q, and q (B, Sq, H, D) says Sq itself; omit it")


def plain(constant_time: bool, features: Any) -> None:
    """Nothing is asked for that no kernel over caches has, and that the operator's arguments can say."""
    asked = dict(
        constant_time=constant_time,
        dropout_p=features.dropout,
        block_mask=features.sparse,
        return_row_max=features.row_max,
    )
    given = [name for name, value in asked.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: given with cache_seqlens, and caches have no such kernel; omit it")
