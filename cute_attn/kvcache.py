"""`flash_fwd_kvcache`: attention of new queries over keys and values that lie in a cache, dense or of pages."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .append import Behind, Rotary
from .decode import DecodePlan
from .features import NONE
from .kvcache_operands import Cached, of_each
from .request import Outputs, Request, request, seen_before, seen_by_tracer


def flash_fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | DecodePlan,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool | Tensor = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    attention_chunk: int | None = None,
    spans: Tensor | None = None,
    draft_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: Sequence[Tensor | int | float] = (),
    k: Tensor | None = None,
    v: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotary_seqlens: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """`flash_fwd` over a K/V cache, for decoding, chunked prefill and speculative decoding (FlashAttention's
    flash_attn_with_kvcache; pages as of PagedAttention, arXiv:2309.06180).

    Args:
        q: (B, Sq, H, D) bf16 or fp16, or (total_q, H, D) with cu_seqlens_q; D and devices as `flash_fwd` takes them.
        k_cache, v_cache: (B_cache, S, Hk, D) and (B_cache, S, Hk, Dv), Hk dividing H; with page_table of pages instead,
            (pages, page_size, Hk, D) and (pages, page_size, Hk, Dv), of any page_size. Of q's type. Any strides with a
            contiguous last dimension and the others at multiples of 8 elements: heads before rows as a transposed view,
            K beside V in one buffer. Without page_table and cache_batch_idx, B_cache is B.
        cache_seqlens: (B,) int32 on q's device, or an int for every sequence: sequence b's keys are the first
            cache_seqlens[b] rows of its part of the cache, no more than that has. Or a `decode_plan` of calls like this
            one, which has cache_seqlens, cache_leftpad, cu_seqlens_q, max_seqlen_q, causal, window and attention_chunk:
            omit these.
        page_table: (B, pages_per_seq) int32 on q's device: the pages of each sequence's keys, in their order. Entries
            beyond a sequence's length are never read. Sequences may share pages.
        cache_batch_idx: (B,) int32: which row of a dense cache is each sequence's; default the b-th.
        cache_leftpad: (B,) int32: rows at the beginning of each sequence's part of a dense cache that are none of its
            keys; cache_seqlens counts them, so cache_seqlens - cache_leftpad keys are left.
        cu_seqlens_q: (B + 1,) int32 on q's device, as of `flash_fwd_varlen`: how many queries each sequence has.
        max_seqlen_q: with cu_seqlens_q, the most queries of a sequence: a hint by which tiles are chosen; sequences of
            more are right all the same.
        causal: query i of Sq sees the keys up to i + Sk - Sq, Sk being how many the sequence has (aligned to the last
            key). Or (B,) int32 on q's device, not 0 for the sequences that are causal.
        scale, window, attention_chunk, softcap, alibi_slopes, sinks, score_mod, mask_mod, aux: as of
            `flash_fwd_varlen`, places counted within a sequence; score_mod and mask_mod in eager calls only.
        spans, draft_mask: as of `flash_fwd`, spans of no more places than a sequence has room for; with cu_seqlens_q
            draft_mask (total_q, words).
        k, v: new keys and values (B, S_new, Hk, D) and (B, S_new, Hk, Dv), or with cu_seqlens_k_new (total, Hk, D):
            they are written into the cache, in place, behind the cache_seqlens[b] rows that each sequence has, and this
            call sees them. Nothing else of the cache changes; what a sequence has no room for is not written. Default:
            the new keys are in the cache before, and cache_seqlens counts them.
        cu_seqlens_k_new: (B + 1,) int32: which rows of k and v are each sequence's.
        rotary_cos, rotary_sin: with k and v, (places, R / 2), float32 or q's type, R a multiple of 16 up to D: the
            first R columns of k, as it is appended, and of q are rotated (RoPE, arXiv:2104.09864), in float32 and
            rounded once. The i-th new key is at place cache_seqlens[b] + i, and so is the i-th query if the call is
            causal or has a window, chunks, spans or drafts; else all queries are at cache_seqlens[b]. Places end with
            the table.
        rotary_interleaved: columns 2i and 2i + 1 are a pair; False: columns i and i + R / 2, as in GPT-NeoX and Llama.
        rotary_seqlens: (B,) int32: the first place of each sequence's new tokens, in place of cache_seqlens.
        return_lse: also return the natural log of each row's sum of exp(scale q k^T), float32 (B, H, Sq), or
            (H, total_q).
        out: written in place and returned as o; like q, with v_cache's columns; it shares no memory with the others.

    Returns:
        o (B, Sq, H, Dv) or (total_q, H, Dv); or (o, lse). A row that sees no key gives o = 0 and lse = -inf, or its
        sink. Rows of q that are in no sequence are not written: they hold what `out` did, without `out` anything.

    Lengths, page_table, cache_batch_idx and cache_leftpad are read by the kernel, never by the host. So they may change
    between replays of a CUDA graph, and are not checked: lengths end with the cache, and pages and rows must be ones
    that it has. (On the CPU others raise.)

    No gradients. On a GPU q (B, Sq, H, D), and `out`, are rows of one tensor: their batch stride is a multiple of the
    row stride, as in any dense order of dimensions but that of rows before the batch.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    appends = not (k is v is cu_seqlens_k_new is rotary_cos is rotary_sin is rotary_seqlens is None)
    made = None
    if type(cache_seqlens) is DecodePlan:
        made = cache_seqlens
        if appends:
            raise ValueError(
                "k: given with a DecodePlan as cache_seqlens, whose lengths are fixed; append by append_kv"
            )
        given = cache_leftpad, cu_seqlens_q, max_seqlen_q, causal, window, attention_chunk
        cache_seqlens, *planned = made.in_place_of(*given)
        cache_leftpad, cu_seqlens_q, max_seqlen_q, causal, window, attention_chunk = planned
    causal, each = of_each(causal)
    places = cache_seqlens, page_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q
    operands = Cached(q, k_cache, v_cache, out, *places, each, made)
    if (
        not appends
        and window is attention_chunk is spans is draft_mask is None
        and softcap is alibi_slopes is sinks is score_mod is mask_mod is None
        and type(aux) is tuple
        and not aux
        and type(causal) is type(return_lse) is bool
    ):
        call = seen_before(q, k_cache, v_cache, operands.key, (), causal, False)
        if call is not None:
            operands.check()
            o, lse = Request(operands, causal, scale, False, NONE, Outputs(return_lse)).run_again(call)
            return (o, lse) if return_lse else o
    modifiers = dict(
        window=window,
        attention_chunk=attention_chunk,
        spans=spans,
        draft_mask=draft_mask,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        aux=aux,
    )
    asked = request(operands, Outputs(return_lse), causal, scale, False, modifiers)
    if not appends:
        return asked.run()
    rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens)
    follow = attention_chunk, spans, draft_mask, window, each
    spread = asked.causal or any(x is not None for x in follow)
    return _appending(Behind(operands, k, v, cu_seqlens_k_new, rotary, spread), asked)


def _appending(new: Behind, asked: Request) -> Any:
    """Everything is checked before anything is written."""
    if seen_by_tracer(new.named()):
        q, lengths = new.by_operator()
    else:
        asked.operands.check()
        found = asked.prepared()
        assert found is not None, "under torch.jit.trace the operator is recorded"
        asked.checked(found)
        q, lengths = new.run()
    return asked._replace(operands=asked.operands._replace(q=q, cache_seqlens=lengths)).run()
