"""FlashAttention-3's interface, so that its users switch by one line:

    from cute_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

Names, order, defaults and results are those of hopper/flash_attn_interface.py at Dao-AILab/flash-attention 0251105
(2026-08-15). What is not supported raises by its name, nothing is left out in silence. Strides are `flash_fwd`'s: where
FlashAttention-3 copies a tensor whose last dimension is not contiguous, this raises.

Three arguments say how FlashAttention-3 is to compute, not what, and are not followed: `num_splits` (keys are split
where tiles are few, as the plan has it, and merged in a fixed order), `pack_gqa` (where few queries leave tiles empty)
and `sm_margin` (a launch may take every SM).
"""

import numbers
from typing import Any, NamedTuple

from torch import Tensor, are_deterministic_algorithms_enabled

from . import api, kvcache, varlen
from .arrays import flags, learns
from .scalars import integer


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_interface.flash_attn_func, by `flash_fwd`.

    Args:
        q: (B, Sq, H, D) bf16 or fp16, D a multiple of 8 up to 512.
        k, v: (B, Sk, Hk, D) with Hk dividing H; v of D columns, or others, which are then o's.
        softmax_scale: of the scores; default D ** -0.5.
        causal: query i sees the keys up to i + Sk - Sq (aligned to the last key).
        window_size: (left, right) numbers of keys, -1 for no bound; with causal the right one is 0, whatever comes.
        attention_chunk: 0, or the number of keys of a chunk, beside no window; without gradients only.
        softcap: a score s, scaled, becomes softcap * tanh(s / softcap); 0.0: it does not. Without gradients only.
        num_splits, pack_gqa, sm_margin: checked, and not followed, as above.
        deterministic: True with gradients asks for a backward whose sums have a fixed order, which torch's has under
            torch.use_deterministic_algorithms(True); it raises without that. The forward's always have.
        return_attn_probs: as there, return the natural log of each row's sum too, float32 (B, H, Sq).

    Returns:
        o (B, Sq, H, D); or (o, lse).

    Raises:
        NotImplementedError: qv, q_descale, k_descale, v_descale (FP8).
        TypeError, ValueError: as `flash_fwd`.
    """
    asked = Asked(q, k, v, causal, window_size, softcap, deterministic)
    asked.check(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale))
    flags(return_attn_probs=return_attn_probs)
    hints(num_splits, pack_gqa, sm_margin)
    how = dict(causal=causal, scale=softmax_scale, window=asked.window(), softcap=asked.cap(), layout="bshd")
    how |= dict(attention_chunk=chunk(attention_chunk))
    return api.flash_fwd(q, k, v, return_lse=return_attn_probs, **how)  # type: ignore[call-overload]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_interface.flash_attn_varlen_func, by `flash_fwd_varlen`: sequences packed one behind the other.

    Args:
        q: (total_q, H, D); k, v: (total_k, Hk, D), v as of `flash_attn_func`.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence begins, and the last one's end.
        max_seqlen_q, max_seqlen_k: of the longest.
        seqused_q, seqused_k: (B,) int32, how much of each sequence counts; None: all of it.
        the others: as of `flash_attn_func`, causal and window_size within each sequence.

    Returns:
        o (total_q, H, D); or (o, lse), lse float32 (H, total_q).

    Raises:
        NotImplementedError: as `flash_attn_func`.
        TypeError, ValueError: as `flash_fwd_varlen`.
    """
    asked = Asked(q, k, v, causal, window_size, softcap, deterministic)
    asked.check(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale))
    flags(return_attn_probs=return_attn_probs)
    hints(num_splits, pack_gqa, sm_margin)
    lengths: dict[str, Any] = dict(
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k
    )
    how: dict[str, Any] = dict(causal=causal, scale=softmax_scale, window=asked.window(), softcap=asked.cap())
    how |= dict(attention_chunk=chunk(attention_chunk))
    return varlen.flash_fwd_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=return_attn_probs, **lengths, **how)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """flash_attn_interface.flash_attn_with_kvcache, by `flash_fwd_kvcache`: attention over a K/V cache.

    Args:
        q: (B, Sq, H, D), or (total_q, H, D) with cu_seqlens_q.
        k_cache, v_cache: (B_cache, S, Hk, D), or with page_table (pages, page_size, Hk, D); v_cache of its own D.
        k, v: new keys and values (B, S_new, Hk, D), or (total, Hk, D) with cu_seqlens_k_new: appended in place.
        rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens: of the new keys and of q, as `flash_fwd_kvcache`;
            float32 tables serve too.
        cache_seqlens: (B,) int32, or an int for all; None: the caches are full.
        cache_batch_idx, cache_leftpad, page_table, cu_seqlens_q, max_seqlen_q: as `flash_fwd_kvcache`.
        softmax_scale, causal, window_size, softcap: as of `flash_attn_func`.
        attention_chunk: 0, or the number of keys of a chunk, beside no window.
        scheduler_metadata: what `get_scheduler_metadata` gives, which is nothing, or None.
        num_splits, pack_gqa, sm_margin: checked, and not followed, as above.
        return_softmax_lse: return the natural log of each row's sum too, float32 (B, H, Sq), or (H, total_q).
        sinks: (H,) float32 logits that join the denominators.

    Returns:
        o like q; or (o, lse), where FlashAttention-3 returns two tensors of its own behind them.

    Raises:
        NotImplementedError: qv, q_descale, k_descale, v_descale.
        TypeError, ValueError: as `flash_fwd_kvcache`.
    """
    asked = Asked(q, k_cache, v_cache, causal, window_size, softcap, False)
    asked.check(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale))
    flags(return_softmax_lse=return_softmax_lse)
    hints(num_splits, pack_gqa, sm_margin)
    if scheduler_metadata is not None:
        raise ValueError("scheduler_metadata: get_scheduler_metadata gives None here; pass that, nothing else serves")
    if cache_seqlens is None:
        pages = 1 if page_table is None else page_table.shape[1]
        cache_seqlens = k_cache.shape[1] * pages
    places: dict[str, Any] = dict(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=page_table)
    places |= dict(cache_seqlens=cache_seqlens, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q)
    new: dict[str, Any] = dict(k=k, v=v, cu_seqlens_k_new=cu_seqlens_k_new, rotary_cos=rotary_cos)
    new |= dict(rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, rotary_seqlens=rotary_seqlens)
    how: dict[str, Any] = dict(causal=causal, scale=softmax_scale, window=asked.window(), softcap=asked.cap())
    how |= dict(attention_chunk=chunk(attention_chunk), sinks=sinks, return_lse=return_softmax_lse)
    return kvcache.flash_fwd_kvcache(q, k_cache, v_cache, **places, **new, **how)


def get_scheduler_metadata(*args: Any, **options: Any) -> None:
    """flash_attn_interface.get_scheduler_metadata, whatever its arguments: None, since a kernel finds its own part.

    `cute_attn.decode_plan` prepares a step of some hundred sequences.
    """


class Asked(NamedTuple):
    """What the functions are asked for in the same words."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool

    def check(self, tensors: dict[str, Tensor | None]) -> None:
        hints = dict(qv="torch.cat([q, qv], -1) and torch.cat([k, v], -1) give these scores, up to a head dim of 512")
        scaled = "FP8 is not supported; dequantise to bf16: (x.float() * descale).to(torch.bfloat16)"
        flags(causal=self.causal, deterministic=self.deterministic)
        for name, x in tensors.items():
            if x is not None:
                raise NotImplementedError(f"{name}: not supported; {hints.get(name, scaled)}")
        if self.deterministic and learns(self.q, self.k, self.v) and not are_deterministic_algorithms_enabled():
            raise ValueError(
                "deterministic: True came with gradients, whose order torch decides for its whole process; call "
                "torch.use_deterministic_algorithms(True) before the backward, or pass False"
            )

    def window(self) -> tuple[int | None, int | None] | None:
        """In `flash_fwd`'s words; None where it bounds nothing."""
        sides = self.window_size
        if isinstance(sides, Tensor) and sides.device.type == "cpu":
            sides = tuple(sides.tolist())
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise ValueError(f"window_size: {sides!r} came; a pair (left, right) is needed, -1 for no bound")
        for side in sides:
            if side is not None and integer(side) is None:
                raise TypeError(f"window_size: {side!r} came; an int is needed, -1 for no bound")
            if side is not None and side < -1:
                raise ValueError(f"window_size: {side} is below -1; use a number of keys, or -1 for no bound")
        left, right = (None if side == -1 else side for side in sides)
        if self.causal:
            right = None  # which causality bounds, as there
        return None if left is right is None else (left, right)

    def cap(self) -> float | None:
        """In `flash_fwd`'s words; 0 is none."""
        given = self.softcap
        if isinstance(given, bool) or not isinstance(given, numbers.Real):
            raise TypeError(f"softcap: {given!r} came; a number is needed, 0.0 for no cap")
        return float(given) or None


def chunk(attention_chunk: Any) -> int | None:
    """In `flash_fwd`'s words; 0 is none."""
    size = integer(attention_chunk)
    if size is None or size < 0:
        raise TypeError(f"attention_chunk: {attention_chunk!r} came; a number of keys is needed, 0 for no chunks")
    return size or None


def hints(num_splits: Any, pack_gqa: Any, sm_margin: Any) -> None:
    """Of the right type, if nothing else."""
    for name, value in dict(num_splits=num_splits, sm_margin=sm_margin).items():
        if integer(value) is None or value < 0:
            raise ValueError(f"{name}: {value!r} came; an int of at least 0 is needed (a hint that is not followed)")
    if pack_gqa is not None and type(pack_gqa) is not bool:
        raise ValueError(f"pack_gqa: {pack_gqa!r} came; a bool or None is needed (a hint that is not followed)")
