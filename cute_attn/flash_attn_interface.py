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

from . import api, varlen
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
        softcap: a score s, scaled, becomes softcap * tanh(s / softcap); 0.0: it does not. Without gradients only.
        num_splits, pack_gqa, sm_margin: checked, and not followed, as above.
        deterministic: True with gradients asks for a backward whose sums have a fixed order, which torch's has under
            torch.use_deterministic_algorithms(True); it raises without that. The forward's always have.
        return_attn_probs: as there, return the natural log of each row's sum too, float32 (B, H, Sq).

    Returns:
        o (B, Sq, H, D); or (o, lse).

    Raises:
        NotImplementedError: qv, q_descale, k_descale, v_descale (FP8), attention_chunk.
        TypeError, ValueError: as `flash_fwd`.
    """
    asked = Asked(q, k, v, causal, window_size, softcap, deterministic)
    asked.check(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale), attention_chunk)
    flags(return_attn_probs=return_attn_probs)
    hints(num_splits, pack_gqa, sm_margin)
    how = dict(causal=causal, scale=softmax_scale, window=asked.window(), softcap=asked.cap(), layout="bshd")
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
    asked.check(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale), attention_chunk)
    flags(return_attn_probs=return_attn_probs)
    hints(num_splits, pack_gqa, sm_margin)
    lengths: dict[str, Any] = dict(
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k
    )
    how: dict[str, Any] = dict(causal=causal, scale=softmax_scale, window=asked.window(), softcap=asked.cap())
    return varlen.flash_fwd_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=return_attn_probs, **lengths, **how)


class Asked(NamedTuple):
    """What both functions are asked for in the same words."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool

    def check(self, tensors: dict[str, Tensor | None], attention_chunk: int) -> None:
        hints = dict(
            qv="torch.cat([q, qv], -1) and torch.cat([k, v], -1) give these scores, up to a head dim of 512",
            attention_chunk="use window_size, or torch.nn.attention.flex_attention for chunks",
        )
        scaled = "FP8 is not supported; dequantise to bf16: (x.float() * descale).to(torch.bfloat16)"
        chunk = integer(attention_chunk)
        if chunk is None:
            raise TypeError(f"attention_chunk: {attention_chunk!r} came; 0 is needed: chunks are not supported")
        flags(causal=self.causal, deterministic=self.deterministic)
        for name, x in dict(**tensors, attention_chunk=chunk or None).items():
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


def hints(num_splits: Any, pack_gqa: Any, sm_margin: Any) -> None:
    """Of the right type, if nothing else."""
    for name, value in dict(num_splits=num_splits, sm_margin=sm_margin).items():
        if integer(value) is None or value < 0:
            raise ValueError(f"{name}: {value!r} came; an int of at least 0 is needed (a hint that is not followed)")
    if pack_gqa is not None and type(pack_gqa) is not bool:
        raise ValueError(f"pack_gqa: {pack_gqa!r} came; a bool or None is needed (a hint that is not followed)")
