"""What appending asks of its tensors. Everything wrong raises here, before any launch."""

from typing import Any

import torch

from . import arrays, checks
from .checks import ALIGNMENT, Spec

COUNT_MAX = (1 << 31) - (1 << 16)  # of 16 bytes: threads are numbered by int32
ROTARY_COLUMNS = 16  # that R is a multiple of: 16 bytes of each half


def no_scales(**scales: Any) -> None:
    for name, x in scales.items():
        if x is not None:
            raise NotImplementedError(f"{name}: FP8 caches are not supported yet; pass None, and a cache of k's type")


def slots(named: dict[str, torch.Tensor]) -> dict[str, Spec]:
    """Of `append_kv`'s tensors."""
    specs = _specs(named)
    k, slot_mapping = specs["k"], specs["slot_mapping"]
    rows(specs, "(T, Hk, D)", 3)
    caches(specs, "(pages, page_size, Hk, D)")
    if slot_mapping.dtype != torch.int64:
        what = f"{slot_mapping.dtype} came, torch.int64 is needed; convert it with .to(torch.int64)"
        raise TypeError(f"slot_mapping: {what}")
    _row_of_numbers("slot_mapping", slot_mapping, k.shape[0], "a slot for each row of k")
    count(k, specs["v"])
    return specs


def behind(named: dict[str, torch.Tensor], batch: int) -> dict[str, Spec]:
    """Of what `flash_fwd_kvcache` appends."""
    for name in ("k", "v"):
        if name not in named:
            given = "v" if name == "k" else "k"
            given = given if given in named else next(x for x in named if x.startswith(("rotary", "cu_seqlens_k")))
            raise ValueError(f"{name}: None came with {given}; pass k and v, the new tokens, or omit {given}")
    specs = _specs(named)
    packed = "cu_seqlens_k_new" in specs
    rows(specs, "(total, Hk, D), with cu_seqlens_k_new," if packed else "(B, S_new, Hk, D)", 3 if packed else 4)
    caches(specs, "(B_cache, S, Hk, D), or (pages, page_size, Hk, D)")
    k = specs["k"]
    if packed:
        checks.lengths("cu_seqlens_k_new", specs["cu_seqlens_k_new"], batch + 1, specs["q"])
    elif k.shape[0] != batch:
        raise ValueError(f"k: {k.shape[0]} sequences came with q's {batch}; k is (B, S_new, Hk, D) with q's B")
    count(k, specs["v"], specs["q"])
    return specs


def room(rows: int, new: int, capacity: int) -> None:
    """Of each sequence."""
    if rows + new > capacity:
        what = f"{rows} rows and {new} new ones came, and {capacity} lie in a sequence's part of the cache"
        raise ValueError(f"cache_seqlens: {what}; use a larger cache")


def _specs(named: dict[str, torch.Tensor]) -> dict[str, Spec]:
    for name, x in named.items():
        arrays.tensor(name, x)
    _nothing_learns(named)
    specs = {name: Spec.of(x) for name, x in named.items()}
    where = specs["k"].device
    for name, spec in specs.items():
        if spec.device != where:
            raise ValueError(f"{name}: on {spec.device}, but k is on {where}; move one with .to(device)")
    return specs


def _nothing_learns(named: dict[str, torch.Tensor]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in named.items():
        if x.requires_grad:
            what = "requires grad, and what is written to a cache has no backward"
            raise ValueError(f"{name}: {what}; pass {name}.detach(), or call under torch.no_grad()")


def rows(specs: dict[str, Spec], shape: str, dims: int) -> None:
    """k and v, of new tokens: both are of one type and fit together."""
    k, v = specs["k"], specs["v"]
    for name, x in (("k", k), ("v", v)):
        if len(x.shape) != dims:
            raise ValueError(f"{name}: {len(x.shape)} dimensions, shape {tuple(x.shape)}; {shape} is needed")
        _elements(name, x, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit k's {tuple(k.shape)}; all but the last size is k's")


def caches(specs: dict[str, Spec], shape: str) -> None:
    """Fit together, and to k and v."""
    for name, new in (("k_cache", specs["k"]), ("v_cache", specs["v"])):
        x = specs[name]
        if len(x.shape) != 4:
            raise ValueError(f"{name}: {len(x.shape)} dimensions, shape {tuple(x.shape)}; {shape} is needed")
        _elements(name, x, specs["k"])
        if x.shape[2:] != new.shape[-2:]:
            what = f"{tuple(x.shape[2:])} heads and columns came, and {name[0]} has {tuple(new.shape[-2:])}"
            raise ValueError(f"{name}: {what}; both have the same")
    k, v = specs["k_cache"], specs["v_cache"]
    if v.shape[:2] != k.shape[:2]:
        what = f"shape {tuple(v.shape)} does not fit k_cache's {tuple(k.shape)}"
        raise ValueError(f"v_cache: {what}; v_cache has k_cache's first three sizes")


def _elements(name: str, x: Spec, k: Spec) -> None:
    if x.dtype not in checks.DTYPES:
        raise TypeError(f"{name}: {x.dtype} came; bf16 or fp16 is needed; convert it with .to(torch.bfloat16)")
    if x.dtype != k.dtype:
        raise TypeError(f"{name}: {x.dtype} does not match k's {k.dtype}; convert one with .to(dtype)")
    if x.shape[-1] % ALIGNMENT or not x.shape[-1]:
        raise ValueError(f"{name}: head_dim {x.shape[-1]} came; a multiple of {ALIGNMENT} is needed")
    strided(name, x)


def strided(name: str, x: Spec) -> None:
    """A contiguous last dimension, and rows at multiples of 16 bytes."""
    if x.stride[-1] != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: stride {x.stride[-1]} in the last dimension, 1 is needed; use {name}.contiguous()")
    step = 16 // x.dtype.itemsize
    if any(n > 1 and stride % step for n, stride in zip(x.shape[:-1], x.stride[:-1], strict=True)):
        what = f"strides {x.stride}; multiples of {step} elements are needed before the last"
        raise ValueError(f"{name}: {what}; use {name}.contiguous()")


def _row_of_numbers(name: str, x: Spec, length: int, why: str) -> None:
    if tuple(x.shape) != (length,):
        raise ValueError(f"{name}: shape {tuple(x.shape)} came, ({length},) is needed: {why}")
    if length > 1 and x.stride[0] != 1:
        raise ValueError(f"{name}: stride {x.stride[0]} came, 1 is needed; use {name}.contiguous()")


def rotary(interleaved: Any, specs: dict[str, Spec], where: str, length: int) -> None:
    """cos and sin, both or neither, and where each token, or sequence, begins in them."""
    arrays.flags(rotary_interleaved=interleaved)
    cos, sin = specs.get("rotary_cos"), specs.get("rotary_sin")
    given = [name for name in ("rotary_cos", "rotary_sin", where) if name in specs]
    if cos is None or sin is None:
        if given:
            raise ValueError(f"{given[0]}: given without {'rotary_sin' if sin is None else 'rotary_cos'}; pass both")
        return
    k = specs["k"]
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dtype not in (torch.float32, k.dtype):
            raise TypeError(f"{name}: {x.dtype} came; torch.float32 or k's {k.dtype} is needed")
        if len(x.shape) != 2 or not x.shape[0]:
            raise ValueError(f"{name}: shape {tuple(x.shape)} came; (places, R / 2) is needed, R columns being rotated")
        columns = 2 * x.shape[1]
        if columns % ROTARY_COLUMNS or not 0 < columns <= k.shape[-1]:
            what = f"{x.shape[1]} angles, for R = {columns} of {k.shape[-1]} columns"
            raise ValueError(f"{name}: {what}; R is a multiple of {ROTARY_COLUMNS} up to k's D")
        strided(name, x)
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        what = f"{sin.dtype} of shape {tuple(sin.shape)} came beside rotary_cos's {cos.dtype} of {tuple(cos.shape)}"
        raise ValueError(f"rotary_sin: {what}; they have the same")
    if where in specs:
        x = specs[where]
        if x.dtype != torch.int32:
            raise TypeError(f"{where}: {x.dtype} came, torch.int32 is needed; convert it with .to(torch.int32)")
        _row_of_numbers(where, x, length, "a place of the table for each")
    elif where == "rotary_positions":
        raise ValueError("rotary_positions: None came with rotary_cos; pass each token's place, int32 (T,)")


def count(*tensors: Spec) -> None:
    """All threads have a number."""
    most = max(x.shape.numel() for x in tensors) // ALIGNMENT
    if most * len(tensors) >= COUNT_MAX:
        raise ValueError(f"k: {most} times 16 bytes in one call; append in several, of below {COUNT_MAX // 2} each")


def aligned(named: dict[str, torch.Tensor]) -> None:
    for name, x in named.items():
        if x.is_floating_point():
            checks.aligned(name, x)


def memory(named: dict[str, torch.Tensor]) -> None:
    """What no look-up says: nothing learns, and the caches share no element with what is read."""
    _nothing_learns(named)
    for name in named.keys() - {"k_cache", "v_cache"}:
        for cache in ("k_cache", "v_cache"):
            if _meet(named[name], named[cache]) and checks.overlap(named[name], named[cache]):
                raise ValueError(f"{name}: shares memory with {cache}, which is written; pass {name}.clone()")


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + Spec.of(b).nbytes and other < start + Spec.of(a).nbytes
