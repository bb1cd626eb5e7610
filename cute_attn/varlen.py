"""`flash_fwd_varlen`: sequences of any lengths, which only the device knows."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .features import NONE
from .operands import Ragged
from .request import Outputs, Request, request, seen_before


def flash_fwd_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    softcap: float | None = None,
    attention_chunk: int | None = None,
    spans: Tensor | None = None,
    draft_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: Sequence[Tensor | int | float] = (),
    return_row_max: bool = False,
    return_max_logit: bool = False,
) -> Any:
    """`flash_fwd` for B sequences of any lengths, packed one behind the other (FlashAttention's varlen), in one launch.

    Args:
        q: (total_q, H, D) bf16 or fp16; D, devices and strides as `flash_fwd` takes them.
        k, v: (total_k, Hk, D) with Hk dividing H, v of D columns or others.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device. Sequence b begins at row cu_seqlens[b] and ends before
            cu_seqlens[b + 1]; it may be empty, and its Sq and Sk may differ. No row of q is in two sequences.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length. Gradients need them. A small max_seqlen_q
            has the heads that share a K/V head packed into a tile (PackGQA); longer sequences are right all the same.
        seqused_q, seqused_k: (B,) int32 on q's device, the length of each sequence in place of the distance to the next
            one's beginning.
        causal, scale, window, attention_chunk: as of `flash_fwd`; aligned to the last key of each sequence.
        spans, draft_mask: as of `flash_fwd`, of packed keys and queries: int32 (total_k, 2), places counted within a
            sequence, and (total_q, words), of as many words of 32 bits as the longest sequence of drafts needs.
        softcap, alibi_slopes, sinks, score_mod, mask_mod, aux: as of `flash_fwd`, with places counted within a
            sequence; b, and the first dimension of alibi_slopes (B, H), say which. Without gradients; score_mod and
            mask_mod in eager calls only.
        return_lse: also return the natural log of each row's sum of exp(scale q k^T), float32 (H, total_q).
        out: written in place and returned as o; like q, with v's columns, sharing no memory with q, k, v.
        return_row_max, return_max_logit: as of `flash_fwd`, float32 (H, total_q), -inf in the rows of no sequence too,
            and (H,).

    Returns:
        o (total_q, H, Dv), or a tuple of o[, lse][, row_max][, max_logit]. A row that sees no key gives o = 0,
        lse = -inf. Rows of q that are in no sequence, and those beyond seqused_q, are not written, as FlashAttention-3
        leaves them: they hold what `out` did, and without `out` anything.

    Lengths are read by the kernel, never by the host. So they may be the work of what runs before on the stream, and
    may change between replays of a CUDA graph, in which only the tensors' sizes are fixed; and they are not checked.
    Sequences that reach beyond q, k or v end with them.

    Differentiable once in q, k and v, where D == Dv <= 256; lse is not. The backward is torch's FlashAttention-2, and
    takes max_seqlen_q and max_seqlen_k at their word: rows beyond them get wrong gradients. No seqused, and no `out`.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    operands = Ragged(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    if (
        window is attention_chunk is spans is draft_mask is None
        and softcap is alibi_slopes is sinks is score_mod is mask_mod is None
        and return_row_max is return_max_logit is False
        and type(aux) is tuple
        and not aux
        and type(causal) is type(return_lse) is bool
    ):
        call = seen_before(q, k, v, operands.key, (), causal, False)
        if call is not None:
            operands.check()
            o, lse = Request(operands, causal, scale, False, NONE, Outputs(return_lse)).run_again(call)
            return (o, lse) if return_lse else o
    given = dict(
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
        return_row_max=return_row_max,
        return_max_logit=return_max_logit,
    )
    return request(operands, Outputs(return_lse, return_row_max, return_max_logit), causal, scale, False, given).run()
