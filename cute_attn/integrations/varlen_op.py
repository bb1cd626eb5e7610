"""torch.ops.cute_attn.flash_fwd_varlen: what torch.compile, torch.export and autograd see of `flash_fwd_varlen`.

As in torch_op.py only calls that are traced or differentiated come here. The gradients are FlashAttention-2's, torch's
own kernel fed with our o and lse.
"""

import torch

from .. import checks, reference, varlen
from .operator import gradients, operator
from .torch_op import aligned, fit, o_like


def _lse_like(q, asked):
    return q.new_empty((q.shape[1], q.shape[0]) if asked else (0,), dtype=torch.float32)


def _fake(q, k, v, cu_q, cu_k, used_q, used_k, max_q, max_k, causal, scale, left, right, return_lse):
    return o_like(q, v), _lse_like(q, return_lse)


def _fake_out(q, k, v, out, cu_q, cu_k, used_q, used_k, max_q, max_k, causal, scale, left, right, return_lse):
    return _lse_like(q, return_lse)


def _fake_bwd(grad, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, causal, scale, left, right):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(_fake)
def flash_fwd_varlen_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of `cute_attn.flash_fwd_varlen`; lse has no elements where it is not asked for, as gradients do."""
    with torch.no_grad():
        result = varlen.flash_fwd_varlen(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k),
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            causal=causal,
            scale=scale,
            window=(window_left, window_right),
            return_lse=return_lse,
        )
    return result if return_lse else (result, _lse_like(q, False))


@operator(_fake_out, mutates_args=("out",))
def flash_fwd_varlen_out_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    return_lse: bool,
) -> torch.Tensor:
    """lse of `cute_attn.flash_fwd_varlen(..., out=out)`; no elements where it is not asked for."""
    with torch.no_grad():
        result = varlen.flash_fwd_varlen(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k),
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            causal=causal,
            scale=scale,
            window=(window_left, window_right),
            return_lse=return_lse,
            out=out,
        )
    return result[1] if return_lse else _lse_like(q, False)


@operator(_fake_bwd)
def flash_bwd_varlen_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from o's grad, and from o and lse of the forward; 0 in the rows of no sequence."""
    checks.together(q, grad=grad, k=k, v=v, o=o, lse=lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    causal, window = checks.window((window_left, window_right), causal)
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    if q.device.type == "cpu" or q.numel() == 0 or k.numel() == 0 or len(cu_seqlens_q) == 1:
        return _by_reference(grad, q, k, v, *cu_seqlens, causal=causal, scale=scale, window=window)
    if scale is not None and scale <= 0:  # FlashAttention-2 multiplies masked scores, -inf, by it: q takes the sign
        sign = -1 if scale < 0 else 0
        how = (max_seqlen_q, max_seqlen_k, causal, -scale or 1.0, window_left, window_right)
        dq, dk, dv = flash_bwd_varlen_op(grad, q * sign, k, v, o, lse, *cu_seqlens, *how)
        return dq * sign, dk, dv
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # as FlashAttention-2 marks a row without keys
    grad, q, k, v, o = aligned(grad.contiguous()), fit(q), fit(k), fit(v), aligned(o.contiguous())
    unused = q.new_empty(0, dtype=torch.uint64)  # dropout's random state
    # Of windows it takes a side of max_k keys or more for no bound, which holds if no sequence has more queries either.
    max_k = max_seqlen_k if window is None else max(max_seqlen_q, max_seqlen_k)
    sides = {} if window is None else dict(window_size_left=window[0], window_size_right=window[1])
    found = torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, o, lse.contiguous(), *cu_seqlens, max_seqlen_q, max_k, 0.0, causal, unused, unused),
        scale=scale,
        **sides,
    )
    ends = cu_seqlens_q, cu_seqlens_k, cu_seqlens_k
    dq, dk, dv = (_within(dx, cu) for dx, cu in zip(found, ends, strict=True))
    return dq, dk, dv


def _by_reference(grad, q, k, v, cu_seqlens_q, cu_seqlens_k, **how):
    if 0 in (q.numel(), k.numel(), len(cu_seqlens_q) - 1):  # nothing depends on anything, on whatever device
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        return dq, dk, dv
    with torch.autocast("cpu", enabled=False):
        found = reference.varlen_gradients(grad, q, k, v, cu_seqlens_q, cu_seqlens_k, dtype=torch.float32, **how)
    dq, dk, dv = (torch.empty_like(x).copy_(dx) for x, dx in zip((q, k, v), found, strict=True))
    return dq, dk, dv


def _within(dx, cu_seqlens):
    """0 in the rows before the first sequence and after the last: torch's backward does not write them."""
    rows = torch.arange(len(dx), device=dx.device)
    return dx.masked_fill_(((rows < cu_seqlens[0]) | (rows >= cu_seqlens[-1]))[:, None, None], 0.0)


def _save(ctx, inputs, output):
    (q, k, v, cu_q, cu_k, used_q, used_k, max_q, max_k, causal, scale, *window, return_lse), (o, lse) = inputs, output
    if not return_lse:
        raise ValueError("return_lse: False came, and gradients need lse; pass True, as flash_fwd_varlen does")
    checks.trained_head_dims(q, v)
    checks.packed_gradients(max_q, max_k, used_q, used_k)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
    ctx.options, ctx.others = (max_q, max_k, causal, scale, *window), len(inputs) - 3


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * (3 + ctx.others)
    grads = torch.ops.cute_attn.flash_bwd_varlen(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * ctx.others)


def _no_backward(ctx, *grads):
    raise NotImplementedError(
        "flash_fwd_varlen has no second derivative; for one use torch.nn.functional.scaled_dot_product_attention on "
        "each sequence, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


gradients("flash_fwd_varlen", _backward, _save)
gradients("flash_bwd_varlen", _no_backward)
