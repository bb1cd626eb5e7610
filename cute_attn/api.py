"""`flash_fwd` and `warmup`, what users call."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import checks, compile, device, notices
from .call import Call
from .features.dropout import NO_DROPOUT
from .kernels.config import FwdConfig
from .operands import Dense, dense_key
from .plan import HEAD_DIMS, kernel_class, plan, prebuilt, prebuilt_kvcache
from .request import Outputs, request, seen_before


class Options(TypedDict, total=False):
    """What flash_fwd takes beside q, k, v and return_lse, for type checkers."""

    causal: bool
    scale: float | None
    layout: str
    out: Tensor | None
    constant_time: bool
    window: tuple[int | None, int | None] | None
    attention_chunk: int | None
    spans: Tensor | None
    draft_mask: Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    score_mod: Callable | None
    mask_mod: Callable | None
    aux: Sequence[Tensor | int | float]
    block_mask: Any
    dropout_p: float
    generator: torch.Generator | None
    rng_state: Tensor | None


@overload
def flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
) -> Tensor: ...
@overload
def flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_row_max: bool = ...,
    return_max_logit: bool = ...,
    return_rng_state: bool = ...,
    **options: Unpack[Options],
) -> Any: ...


def flash_fwd(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    layout="bhsd",
    return_lse=False,
    out=None,
    constant_time=False,
    window=None,
    attention_chunk=None,
    spans=None,
    draft_mask=None,
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    score_mod=None,
    mask_mod=None,
    aux=(),
    block_mask=None,
    return_row_max=False,
    return_max_logit=False,
    dropout_p=NO_DROPOUT,
    generator=None,
    rng_state=None,
    return_rng_state=False,
):
    """Exact attention, softmax(scale q k^T) v, by one fused kernel (FlashAttention-3, arXiv:2407.08608).

    Args:
        q: (B, H, Sq, D) bf16 or fp16, D a multiple of 8 up to 512, on a Hopper GPU (sm_90) or the CPU. Any strides
            with a contiguous last dimension and rows at multiples of 16 bytes run without a copy, expanded ones too.
        k: (B, Hk, Sk, D) with Hk dividing H: MHA, GQA or MQA.
        v: (B, Hk, Sk, Dv), Dv as D may be, the same or another.
        causal: query i sees the keys up to i + Sk - Sq (aligned to the last key, bottom right).
        scale: of the scores, any finite number; default D ** -0.5. A new value compiles nothing.
        layout: "bhsd" as above, torch SDPA's order; "bshd" for FlashAttention's (B, S, H, D).
        return_lse: also return the natural log of each row's sum of exp(scale q k^T), float32 (B, H, Sq).
        out: written in place and returned as o; like q, of Dv columns, sharing no memory with q, k, v.
        constant_time: run the kernel in which no branch depends on a value of q, k or v, so that its time says nothing
            of them; it rescales O in every step, and is slower. The same bound on errors.
        window: (left, right), each a number of keys or None for no bound: query i sees the keys from i + Sk - Sq - left
            to i + Sk - Sq + right. With causal, right is None or 0. Time follows the window, not Sk.
        attention_chunk: a number of keys: keys and queries lie in chunks of so many places, counted from the first key,
            and a query sees those of its own chunk (Llama 4); with causal, up to its own place.
        spans: with causal or a window, int32 (B, places, 2), as `cute_attn.spans(span_ids)` makes it: the first place
            and the end of the span that each place is in. A query also sees the keys of its own span, as tokens of an
            image see each other inside a prompt (Gemma 3). Spans are intervals; places beyond the table are in none.
        draft_mask: without causal, int32 (B, Sq, ceil(Sq / 32)): bit j % 32 of word j // 32 of row i says whether query
            i sees the j-th of the last Sq keys; it sees all before them. Trees of speculative decoding.
        softcap: a score s, scaled, becomes softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118).
        alibi_slopes: (H,) or (B, H) float32: a score then loses slope * |i + Sk - Sq - j| (ALiBi, arXiv:2108.12409).
        sinks: (H,) float32 logits, each of which joins the denominator of its head's rows and lse, as the score of a
            key without a value (arXiv:2309.17453). A new value of any of these compiles nothing.
        score_mod, mask_mod: FlexAttention's (arXiv:2412.05496): score_mod(score, b, h, q_idx, kv_idx, *aux) of the
            scaled score, capped and biased before, and mask_mod(b, h, q_idx, kv_idx, *aux), which holds for the pairs
            that attend; causal and window apply too. Compiled into the kernel, some 2 s for a new function or constant,
            wherever it is read; the tensors that they read, and aux, tensors and numbers, are run-time arguments.
        block_mask: FlexAttention's BlockMask, whose mask_mod then applies, or `cute_attn.BlockLists`: the blocks of
            keys that each block of queries needs; the others cost nothing.
        return_row_max: also return each row's largest score as the softmax takes it: scaled, capped, biased, after the
            masks; float32 (B, H, Sq), -inf where a row sees no key. No sink counts.
        return_max_logit: also return the largest of these of each head, float32 (H,), for QK-clip (arXiv:2507.20534).
        dropout_p: the probability, to 1/65536, with which a weight is left out, after the softmax; the others are
            divided by 1 - dropout_p. lse is without. 0 is the plain kernel; another value compiles nothing.
        generator: a torch.Generator of q's device to draw from; None for torch's own. The draw stays on the device.
        rng_state: (2,) int64 on q's device, seed and offset, in place of a draw: the same weights are left out again.
        return_rng_state: also return the rng_state used, for `cute_attn.reference.keep_mask`; zeros without dropout.

    Returns:
        o (B, H, Sq, Dv), its dimensions in q's order in memory; or a tuple of o[, lse][, row_max][, max_logit]
        [, rng_state]. Accumulated in float32, rounded once. A row that sees no key gives o = 0 and lse = -inf, or its
        sink.

    Arrays of NumPy, CuPy, JAX and others that speak DLPack are taken too, all of one library, without a copy; what
    comes back is then of that library. They run eagerly only, outside of `jax.jit`.

    Runs on torch's current stream of the tensors' device, and may be captured in a CUDA graph after one call. CPU
    tensors are computed by torch in float32 and rounded once.

    Differentiable once in q, k and v, where D == Dv <= 256, but with no modifier other than a window; only o is. The
    backward is torch's: cuDNN's where Sq == Sk, the scale is positive and there is no window, else FlashAttention-2's,
    and that everywhere under torch.use_deterministic_algorithms or without torch.backends.cuda.enable_cudnn_sdp. At
    most 65,535 batches and heads; no `out`; a backward through the backward raises, as do the transforms of torch.func.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    if (
        window
        is attention_chunk
        is spans
        is draft_mask
        is softcap
        is alibi_slopes
        is sinks
        is score_mod
        is mask_mod
        is block_mask
        is generator
        is rng_state
        is None
        and return_row_max is return_max_logit is return_rng_state is False
        and dropout_p is NO_DROPOUT
        and type(aux) is tuple
        and not aux
        and type(causal) is type(return_lse) is type(constant_time) is bool
    ):
        call = seen_before(q, k, v, dense_key, (q, k, v, out, layout), causal, constant_time)
        if call is not None:
            return _plain(call, q, k, v, out, layout, causal, scale, return_lse)
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
        block_mask=block_mask,
        dropout_p=dropout_p,
        generator=generator,
        rng_state=rng_state,
        return_row_max=return_row_max,
        return_max_logit=return_max_logit,
    )
    outputs = Outputs(return_lse, return_row_max, return_max_logit, return_rng_state)
    return request(Dense(q, k, v, out, layout), outputs, causal, scale, constant_time, given).run()


def _plain(call: Call, q, k, v, out, layout, causal, scale, return_lse):
    """Of `Request.run` what a plain call needs that was prepared before."""
    scale = call.scale if scale is None else checks.scale(scale)
    if out is not None:
        checks.out_memory(out, q, k, v, call.nbytes)
    o = call.output(q) if out is None else out
    lse = q.new_empty(call.problem.lse_shape, dtype=torch.float32) if return_lse else None
    try:
        call.launch((q, k, v, o) if call.plain else Dense(q, k, v, out, layout).for_tma(o), lse, scale, ())
    except Exception:
        asked: tuple = causal, scale, call.problem.constant_time, {}
        request(Dense(q, k, v, out, layout), Outputs(), *asked).refused(o)
        raise
    return (o, lse) if return_lse else o


def warmup(
    head_dim: int | Sequence[int] = HEAD_DIMS,
    *,
    dtype: str | torch.dtype | Sequence[str | torch.dtype] = ("bf16", "fp16"),
    layout: str | Sequence[str] = ("bhsd", "bshd"),
    causal: bool | Sequence[bool] = (False, True),
    constant_time: bool | Sequence[bool] = False,
    window: bool | Sequence[bool] = False,
    ratio: int | Sequence[int] = 1,
    head_dim_v: int | Sequence[int | None] | None = None,
    page_size: int | Sequence[int] | None = None,
) -> list[FwdConfig]:
    """Compile ahead of time, into memory and the disk cache; needs no GPU. About 2 s for each kernel not there yet.

    The logger "cute_attn" tells each kernel that is ready, at level INFO.

    Args:
        head_dim: one or several D, multiples of 8 up to 512; default: one of each kernel up to 256.
        dtype: "bf16", "fp16" (or torch's), one or several.
        layout, causal, constant_time: as of `flash_fwd`, one or several.
        window: True for the kernel of every window, with causal or without.
        ratio: H / Hk, one or several; above 1 also the kernels that pack the heads of a K/V head, for few queries.
        head_dim_v: of v and o, one or several for each D; None: D.
        page_size: one or several: the kernels of `flash_fwd_kvcache` over pages of so many keys, 0: over a dense cache,
            for any numbers of queries, in place of `flash_fwd`'s. There layout does not matter.

    Returns:
        the FwdConfigs that are ready.
    """
    asked = head_dim, dtype, layout, causal, constant_time, window, head_dim_v
    every = product(*map(_several, asked))
    problems = [checks.warmup_problem(*one) for one in every]
    ratios = [checks.ratio(x) for x in _several(ratio)]
    if page_size is None:
        ready = _without_cache([plan(problem) for problem in problems], ratios)
    else:
        sizes = [checks.warmup_page(x) for x in _several(page_size)]
        checks.no_constant_time(problems)
        cases = product(problems, ratios, sizes)
        ready = list(dict.fromkeys(config for case in cases for config in prebuilt_kvcache(*case, device.name())))
    for done, config in enumerate(ready, 1):
        compile.get(config)
        notices.logger.info("warmup: %d of %d kernels, %s", done, len(ready), config.name)
    return ready


def _several(x: Any) -> Sequence[Any]:
    """What was given alone, as one of several."""
    return x if isinstance(x, (tuple, list)) else (x,)


def _without_cache(found: Sequence[FwdConfig], ratios: Sequence[int]) -> list[FwdConfig]:
    """Every kernel of the classes of these, for problems of other sizes."""
    classes, dims = (
        set(map(kernel_class, found)),
        dict.fromkeys((config.head_dim, config.head_dim_v) for config in found),
    )
    every = dict.fromkeys(config for x in ratios for config in prebuilt(device.name(), x, dims))
    return [config for config in every if kernel_class(config) in classes]
