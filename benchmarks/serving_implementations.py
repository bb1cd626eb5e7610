"""Who is timed over K/V caches: ours, torch's, FlashAttention-3 and -4, FlashInfer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from typing import Any

import torch
from caches import Cache, CacheSpec, InTurn, of_sets

from cute_attn import flash_fwd_kvcache
from cute_attn.tools.benchmark.implementations import BASELINES, OURS, CuteAttn, Implementation, Package, Prepared

WORKSPACE_BYTES = 512 << 20  # of FlashInfer


def anything(spec: CacheSpec) -> str | None:
    return None


def equal_only(spec: CacheSpec) -> str | None:
    """Of those that have no lengths of each sequence, and no pages."""
    if spec.problem.page:
        return "not supported (pages)"
    return "not supported (a length of each sequence)" if spec.lengths else None


def no_pages(spec: CacheSpec) -> str | None:
    return "not supported (pages: that build has none)" if spec.problem.page else None


def pages_only(spec: CacheSpec) -> str | None:
    return None if spec.problem.page else "not supported (a cache without pages)"


@dataclass(frozen=True)
class OverCaches:
    name: str
    prepare: Callable[[Cache], Prepared]
    refuses: Callable[[CacheSpec], str | None] = anything  # why a cell is not for it; None where it may be
    package: Any = None  # where it comes from; None: from here, or from torch

    def absent(self) -> str | None:
        return self.package.absent() if self.package else None

    def version(self) -> str | None:
        return self.package.version() if self.package else f"torch {torch.__version__}"


def ours(cache: Cache) -> Prepared:
    where = dict(cache_seqlens=cache.seqlens, page_table=cache.page_table)
    return of_sets(cache, partial(flash_fwd_kvcache, cache.q, causal=cache.spec.problem.causal, **where))


def dense(one: Implementation, cache: Cache) -> Prepared:
    """One that takes q, k and v alone."""
    first, *others = [one.prepare(inputs) for inputs in cache.inputs()]
    every = InTurn([x.call.run for x in (first, *others)])
    return Prepared(replace(first.call, run=every), first.bhsd)


def like_cudnn(spec: CacheSpec) -> str | None:
    return equal_only(spec) or BASELINES["cudnn"].refuses(spec.problem)


def flash(cache: Cache) -> Prepared:
    """torch's FlashAttention-2, causal aligned to the last key."""
    p = cache.spec.problem
    how = (None, None, p.seqlen_q, p.seqlen_k, 0.0, p.causal, False)
    return of_sets(cache, lambda k, v: torch.ops.aten._flash_attention_forward(cache.q, k, v, *how))


def with_kvcache(cache: Cache) -> Prepared:
    """FlashAttention-3's own function for this."""
    call, causal = BASELINES["fa3"].function("flash_attn_with_kvcache"), cache.spec.problem.causal
    where = dict(cache_seqlens=cache.seqlens, page_table=cache.page_table)
    return of_sets(cache, lambda k, v: call(cache.q, k, v, causal=causal, **where))


def fa3_operator(library: str, metadata: bool, cache: Cache) -> Prepared:
    """FlashAttention-3's operator. Scheduler metadata, where it takes lengths, are made before, or by each call."""
    op, p = getattr(torch.ops, library), cache.spec.problem
    used = cache.seqlens if p.page or cache.spec.lengths else None
    made = scheduler_metadata(op, cache) if metadata and used is not None else None
    places = *[None] * 8, used, None, None, cache.page_table, *[None] * 8
    scale = p.head_dim**-0.5
    return of_sets(cache, lambda k, v: op.fwd(cache.q, k, v, *places, scale, p.causal, scheduler_metadata=made))


def scheduler_metadata(op: Any, cache: Cache) -> torch.Tensor:
    p = cache.spec.problem
    sizes = p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.heads_kv, p.head_dim, p.d_v, cache.q.dtype
    no_window, chunk, softcap, splits = (-1, -1), 0, False, 0
    how = *[None] * 5, p.page or None, 0, p.causal, *no_window, chunk, softcap, splits, None, 0
    return op.get_scheduler_metadata(*sizes, cache.seqlens, *how)


def fa4(cache: Cache) -> Prepared:
    """With lengths where there are lengths or pages."""
    spec = cache.spec
    if equal_only(spec) is None:
        return dense(BASELINES["fa4"], cache)
    call = BASELINES["fa4"].function("flash_attn_varlen_func")
    where = dict(seqused_k=cache.seqlens, page_table=cache.page_table, causal=spec.problem.causal)
    return of_sets(cache, lambda k, v: call(cache.q, k, v, **where))


@once
def workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def flashinfer(cache: Cache) -> Prepared:
    """Planned before the calls."""
    q, tokens = cache.q.flatten(0, 1), cache.spec.problem.seqlen_q
    wrapper = decode_wrapper(cache) if tokens == 1 else prefill_wrapper(cache)
    return of_sets(cache, lambda k, v: wrapper.run(q, (k, v)).unflatten(0, (-1, tokens)))


def decode_wrapper(cache: Cache) -> Any:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    p, kind = cache.spec.problem, cache.q.dtype
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(cache.q.device), "NHD", use_tensor_cores=True)
    sizes = p.heads, p.heads_kv, p.head_dim, p.page
    wrapper.plan(*page_lists(cache), *sizes, q_data_type=kind, kv_data_type=kind)
    return wrapper


def prefill_wrapper(cache: Cache) -> Any:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    p, kind = cache.spec.problem, cache.q.dtype
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(cache.q.device), "NHD")
    queries = torch.arange(p.batch + 1, dtype=torch.int32) * p.seqlen_q
    sizes = p.heads, p.heads_kv, p.head_dim, p.page
    wrapper.plan(queries, *page_lists(cache), *sizes, causal=p.causal, q_data_type=kind, kv_data_type=kind)
    return wrapper


def page_lists(cache: Cache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each sequence's pages begin; all pages, sequence by sequence; how many keys lie in each last one."""
    pages, keys = (torch.tensor(x, dtype=torch.int32) for x in (cache.spec.pages, cache.spec.keys))
    starts = torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
    rows = zip(cache.page_table, cache.spec.pages, strict=True)
    return starts, torch.cat([row[:count] for row, count in rows]), (keys - 1) % cache.spec.problem.page + 1


FLASH_ATTN_3 = Package("flash_attn_3", "flash_attn_3._C")

IMPLEMENTATIONS = (
    OverCaches(OURS, ours, package=CuteAttn()),
    OverCaches("flash_fwd", partial(dense, CuteAttn()), equal_only, CuteAttn()),
    OverCaches("cudnn", partial(dense, BASELINES["cudnn"]), like_cudnn, BASELINES["cudnn"]),
    OverCaches("flash", flash, equal_only),
    OverCaches("fa3", with_kvcache, package=BASELINES["fa3"]),
    OverCaches("fa3_fwd", partial(fa3_operator, "fa3_fwd", True), no_pages, Package("fa3_fwd", "fa3_fwd._C")),
    OverCaches("flash_attn_3", partial(fa3_operator, "flash_attn_3", False), package=FLASH_ATTN_3),
    OverCaches("fa4", fa4, package=BASELINES["fa4"]),
    OverCaches("flashinfer", flashinfer, pages_only, Package("flashinfer", "flashinfer")),
)
