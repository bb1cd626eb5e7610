"""Gradients: torch's own backward kernels, fed with our o and lse.

torch.ops.cute_attn.flash_bwd, cudnn_bwd and flash_bwd_varlen.
"""

import os

import torch

from . import reference, strides
from .arrays import together
from .features.window import window as bounded
from .operator import gradients, operator


def _fake_bwd(grad, q, k, v, o, lse, causal, scale, layout, window_left=None, window_right=None):
    return _grad_like(q, layout), _grad_like(k, layout), _grad_like(v, layout)


def _fake_cudnn(grad, q, k, v, o, lse, causal, scale, layout):
    return _grad_like(q, layout, "bhsd"), _grad_like(k, layout, "bhsd"), _grad_like(v, layout, "bhsd")


def _fake_varlen(grad, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, causal, scale, left, right):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(_fake_bwd)
def flash_bwd_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    window_left: int | None = None,
    window_right: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from o's grad, and from o and lse of the forward."""
    together(q, grad=grad, k=k, v=v, o=o, lse=lse)
    causal, window = bounded((window_left, window_right), causal)
    if q.device.type == "cpu" or q.numel() == 0 or k.numel() == 0:
        with torch.autocast("cpu", enabled=False):
            how = dict(causal=causal, scale=scale, window=window, layout=layout, dtype=torch.float32)
            found = reference.gradients(grad, q, k, v, **how)
        dq, dk, dv = (_grad_like(x, layout).copy_(dx) for x, dx in zip((q, k, v), found, strict=True))
        return dq, dk, dv
    if scale is not None and scale <= 0:  # FlashAttention-2 multiplies masked scores, -inf, by it: q takes the sign
        sign = -1 if scale < 0 else 0
        sides = window_left, window_right
        dq, dk, dv = flash_bwd_op(grad, q * sign, k, v, o, lse, causal, -scale or 1.0, layout, *sides)
        return dq * sign, dk, dv
    seqlen_q, seqlen_k = (x.shape[layout.index("s")] for x in (q, k))
    if seqlen_q > seqlen_k and (causal or window is not None):
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # as FlashAttention-2 marks a row without keys
    grad, q, k, v, o = (_in_order(x, layout, "bshd") for x in (grad, q, k, v, o))
    bshd = [aligned(grad.contiguous()), fit(q), fit(k), fit(v), aligned(o.contiguous())]
    lse = lse.contiguous()
    parts = [(slice(None), causal, None, None)] if window is None else list(_parts(seqlen_q, seqlen_k, *window))
    dq, dk, dv = _of_parts(bshd, lse, parts, scale)
    return _in_order(dq, "bshd", layout), _in_order(dk, "bshd", layout), _in_order(dv, "bshd", layout)


def _parts(seqlen_q, seqlen_k, left, right):
    """(queries, causal, left, right): calls of FlashAttention-2's backward that together are a window's.

    It takes a side of Sk keys or more for no bound; but where Sq > Sk a right side of that many still bounds the first
    queries. And beside a bounded left side it takes no right bound for Sk, which would hide keys from them.
    """
    if seqlen_q <= seqlen_k or right < seqlen_k:
        yield slice(None), False, left, right
        return
    bounded = max(seqlen_q - right, 0)  # queries with no bound but the right one: causal, as part of these alone
    if bounded:
        yield slice(0, bounded), True, None, None
    if seqlen_q - seqlen_k > bounded:
        yield slice(bounded, seqlen_q - seqlen_k), False, None, None
    yield slice(seqlen_q - seqlen_k, seqlen_q), False, left, None


def _of_parts(bshd, lse, parts, scale):
    """(dq, dk, dv) of (B, S, H, D) tensors; those of several parts are added in float32."""
    grad, q, k, v, o = bshd
    unused = q.new_empty(0, dtype=torch.uint64)  # dropout's random state
    found = []
    for rows, causal, left, right in parts:
        queries, whole = q[:, rows], rows == slice(None)
        given = (grad[:, rows], queries, k, v, o[:, rows], lse if whole else lse[:, :, rows].contiguous())
        how = (None, None, queries.shape[1], k.shape[1], 0.0, causal, unused, unused)
        sides = {} if left is right is None else dict(window_size_left=left, window_size_right=right)
        found.append(torch.ops.aten._flash_attention_backward(*given, *how, scale=scale, **sides))
    if len(found) == 1:
        return found[0]
    dq, dk, dv = zip(*found, strict=True)
    sums = torch.cat(dq, dim=1), *(torch.stack(x).sum(0, dtype=torch.float32) for x in (dk, dv))
    return tuple(torch.empty_like(x).copy_(dx) for x, dx in zip((q, k, v), sums, strict=True))


@operator(_fake_cudnn)
def cudnn_bwd_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As flash_bwd, by cuDNN: about twice as fast on Hopper. For what `cudnn_serves`.

    torch keeps cuDNN's graphs by the sizes and strides of q, k and v, and no others (`run_cudnn_SDP_bprop` in
    aten/src/ATen/native/cudnn/MHA.cpp): so those of o, of its gradient and of lse follow from q's here.
    """
    together(q, grad=grad, k=k, v=v, o=o, lse=lse)
    grad, q, k, v, o = (_in_order(x, layout, "bhsd") for x in (grad, q, k, v, o))
    q, k, v = fit(q), fit(k), fit(v)
    order = strides.dense(q.shape, q.stride())
    grad, o, lse = laid(grad, order), laid(o, order), lse.contiguous().unsqueeze(-1)
    seqlen = q.shape[2]
    unused = q.new_empty((), dtype=torch.int64)  # dropout's random state
    how = (unused, unused, None, None, None, seqlen, seqlen, 0.0, causal)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, o, lse, *how, scale=scale)
    return _in_order(dq, "bhsd", layout), _in_order(dk, "bhsd", layout), _in_order(dv, "bhsd", layout)


def cudnn_serves(q, k, scale, layout) -> bool:
    """Its causal is aligned to the first key, its sums are in no fixed order, and it wants a positive scale.

    torch's key of its graphs holds strides of 32 bits; and AVOID_RECOMPILE, torch's experiment, wants another lse.
    """
    s = layout.index("s")
    if not q.is_cuda or q.shape[s] != k.shape[s] or q.shape[s] < 2 or q.numel() == 0:
        return False
    if q.shape[1] * q.shape[2] * q.shape[3] > STRIDE_MAX or os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        return False
    if torch.are_deterministic_algorithms_enabled() or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    wide = q.shape[3] > 128 and (torch.backends.cudnn.version() or 0) < 91_100
    return not wide and (scale is None or scale > 0)


STRIDE_MAX = (1 << 31) - 1


def fit(x):
    """q, k or v as torch's backward kernels address it: itself, or a copy of the same order in memory without gaps.

    A copy is made where columns are not contiguous, rows or data do not start at multiples of 16 bytes, or a stride
    does not fit 32 bits; never for what flash_fwd took on a GPU, but for the last.
    """
    order = strides.plain(x.shape, x.stride())
    *outer, columns = order
    if columns == 1 and max(outer) <= STRIDE_MAX and not any(s % 8 for s in outer) and x.data_ptr() % 16 == 0:
        return x if order == x.stride() else x.as_strided(x.shape, order)
    return x.contiguous() if columns != 1 else laid(x, strides.dense(x.shape, x.stride()))


def laid(x, order):
    """x with these strides, and data at a multiple of 16 bytes: itself, a view where sizes of 1 differ, or a copy."""
    if x.data_ptr() % 16 == 0 and strides.plain(x.shape, x.stride()) == strides.plain(x.shape, order):
        return x if x.stride() == order else x.as_strided(x.shape, order)
    return x.new_empty_strided(x.shape, order).copy_(x)


def aligned(x):
    return x.clone() if x.data_ptr() % 16 else x


def _in_order(x, layout, other):
    return x if layout == other else x.transpose(1, 2)


def _grad_like(x, layout, order="bshd"):
    """Empty, in the order in which torch's backward allocates the gradient of x."""
    return _in_order(torch.empty_like(_in_order(x, layout, order)), order, layout)


@operator(_fake_varlen)
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
    together(q, grad=grad, k=k, v=v, o=o, lse=lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    causal, window = bounded((window_left, window_right), causal)
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


def _no_backward(ctx, *grads):
    raise NotImplementedError(
        "flash_fwd has no second derivative; for one use torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def _no_backward_varlen(ctx, *grads):
    raise NotImplementedError(
        "flash_fwd_varlen has no second derivative; for one use torch.nn.functional.scaled_dot_product_attention on "
        "each sequence, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


gradients("flash_bwd", _no_backward)
gradients("cudnn_bwd", _no_backward)
gradients("flash_bwd_varlen", _no_backward_varlen)
