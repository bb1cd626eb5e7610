"""`decode_plan`: where each CTA's part of all keys begins, found once a step for the attention of all layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import arrays, compile, device, features
from . import kvcache_checks as asked
from .kernels.decode_plan import NUMBERS, DecodePlanConfig
from .kvcache_operands import Cached, Kind, of_each
from .request import Outputs, Request, request, traced

# Of flash_fwd_kvcache's arguments
IN_PLACE_OF = "cache_leftpad", "cu_seqlens_q", "max_seqlen_q", "causal", "window", "attention_chunk"


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """What `decode_plan` returns: pass it to `flash_fwd_kvcache` as cache_seqlens. It has copies of the lengths, which
    nobody else may write: its entries would be of others.
    """

    kind: Kind = field(repr=False)
    entries: Tensor | None  # (rows of CTAs, 4) int32; None: the kernel needs none
    cache_seqlens: Tensor | int
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    causal: bool | Tensor
    window: tuple[int | None, int | None] | None
    attention_chunk: int | None
    key: str = field(init=False, repr=False)  # of `kind`, whose hash is slow

    def __post_init__(self):
        object.__setattr__(self, "key", repr(tuple(self.kind)))  # of a NamedTuple itself torch._dynamo makes an error

    def in_place_of(self, *given: Any) -> tuple:
        """cache_seqlens, and IN_PLACE_OF: those of a call that has this plan."""
        own = tuple(getattr(self, name) for name in IN_PLACE_OF)
        for name, value, planned in zip(IN_PLACE_OF, given, own, strict=True):
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and value is not False and not _same(value, planned):
                raise ValueError(
                    f"{name}: given with a DecodePlan as cache_seqlens, which was made with its own; omit it"
                )
        return self.cache_seqlens, *own


def decode_plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool | Tensor = False,
    window: tuple[int | None, int | None] | None = None,
    attention_chunk: int | None = None,
    draft_mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: Sequence[Tensor | int | float] = (),
    out: DecodePlan | None = None,
) -> DecodePlan:
    """Once a step, for `flash_fwd_kvcache` in all layers: which part of all keys each CTA takes.

    Optional. Without it each CTA adds up the blocks of all sequences in every layer, which takes longer the more
    sequences there are; docs/api.md has numbers. Results have the same bits.

    Args:
        q, k_cache, v_cache and the others: as of a layer's `flash_fwd_kvcache`. Of q and the caches only shapes,
            strides, types and device matter, of page_table and cache_batch_idx nothing but that they are there.
        out: a plan of like calls, written in place and returned: what CUDA graphs that were captured with it read.

    Returns:
        a `DecodePlan`, cache_seqlens of layers with such arguments. It has copies of the lengths and of causal, made
        in the order of the current stream, so later changes of the tensors need a new plan, or one written in place.

    Under CUDA graphs it is captured like any kernel: lengths are read when the graph is replayed. Layers with another
    window, head dim or number of heads need a plan of their own; those with `spans` have none. The first plan of a kind
    compiles two kernels, which `warmup` does not: make one before a graph is captured.

    Raises:
        TypeError, ValueError: as `flash_fwd_kvcache` does; for an `out` of other calls; in a call that is traced.
    """
    every, each = of_each(causal)
    lengths = cache_seqlens, page_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q
    operands = Cached(q, k_cache, v_cache, None, *lengths, each)
    modifiers = dict(
        window=window,
        attention_chunk=attention_chunk,
        draft_mask=draft_mask,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        aux=aux,
    )
    made = request(operands, Outputs(), every, None, False, modifiers)
    if is_compiling() or traced(made):
        asked.no_plan_in_a_trace()
    for name, x in made.named().items():
        arrays.tensor(name, x)
        arrays.real(name, x)
    operands.check()
    return _made(made, causal, window, attention_chunk, out)


def _made(of: Request, causal: Any, window: Any, chunk: int | None, out: DecodePlan | None) -> DecodePlan:
    problem, gpu, config, _ = of.planned()
    q, operands = of.operands.q, of.operands
    of = of._replace(features=features.started(features.fitted(of.features, problem, q.device), q))
    config = None if config is None or not config.shares or operands.nothing(problem) else config
    kernel = None if config is None else compile.get(DecodePlanConfig(replace(config, planned=True)))
    kind = operands.kind(problem, config)
    lengths: dict[str, Any] = dict(cache_seqlens=operands.cache_seqlens, cache_leftpad=operands.cache_leftpad)
    lengths |= dict(cu_seqlens_q=operands.cu_seqlens_q, causal=causal)
    fixed: dict[str, Any] = dict(max_seqlen_q=operands.max_seqlen_q, attention_chunk=chunk)
    fixed["window"] = None if window is None else tuple(window)
    if out is None:
        own: dict[str, Any] = {name: torch.empty_like(x) if isinstance(x, Tensor) else x for name, x in lengths.items()}
        out = DecodePlan(kind, _entries(q, kind, gpu), **own, **fixed)
    else:
        _like(out, kind, lengths | fixed)
    for name, x in lengths.items():
        if isinstance(x, Tensor):
            getattr(out, name).copy_(x)
    if kernel is not None:
        _list(of, kernel, gpu, out)
    return out


def _entries(q: Tensor, kind: Kind, gpu: device.Device | None) -> Tensor | None:
    if gpu is None or kind.config is None:
        return None
    rows = kind.config.rows_of_ctas(gpu.num_sms, kind.heads, kind.heads_kv)
    return q.new_empty(rows, NUMBERS, dtype=torch.int32)


def _like(out: Any, kind: Kind, given: dict[str, Any]) -> None:
    """Of the same calls: what a plan has no copy of is the same, what it has a copy of fits it."""
    if type(out) is not DecodePlan:
        raise TypeError(f"out: {type(out).__name__} came; a DecodePlan is needed, as decode_plan returns it")
    if out.kind != kind:
        raise ValueError(f"out: a DecodePlan of {out.kind.text} came, and this call has {kind.text}; omit out")
    for name, x in given.items():
        own = getattr(out, name)
        if not _same(own, x) and not (isinstance(own, Tensor) and isinstance(x, Tensor)):
            raise ValueError(f"{name}: {_said(x)} came, and out was made with {_said(own)}; omit out")


def _same(x: Any, y: Any) -> bool:
    return x is y or (not (isinstance(x, Tensor) or isinstance(y, Tensor)) and x == y)


def _said(x: Any) -> str:
    return "a tensor" if isinstance(x, Tensor) else repr(x)


def _list(of: Request, kernel: Callable, gpu: device.Device, out: DecodePlan) -> None:
    """Launches what writes the entries, by the copies of the lengths."""
    kind, each = out.kind, out.causal if isinstance(out.causal, Tensor) else None
    assert kind.config is not None
    own = dict(cache_seqlens=out.cache_seqlens, cache_leftpad=out.cache_leftpad, cu_seqlens_q=out.cu_seqlens_q)
    operands = of.operands._replace(**own, causal_each=each)
    packs = kind.config.packs(kind.heads, kind.heads_kv)
    arguments = *features.arguments(of.features), *operands.arguments(operands.q)
    device.launcher(gpu, kernel)(out.entries, packs, packs // kind.heads_kv, *arguments)
