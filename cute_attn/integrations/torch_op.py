"""torch.ops.cute_attn.flash_fwd: what tracers (torch.compile, make_fx, jit.trace, ...) and autograd see of flash_fwd.

`flash_fwd` calls it by itself where it is traced or differentiated, and only there: any other eager call has no
dispatcher to go through. Its gradients are `flash_bwd`'s or `cudnn_bwd`'s, torch's own kernels fed with our o and lse.
"""

import os

import torch

from .. import api, checks, reference, strides
from ..modifiers import Modifiers
from .operator import gradients, operator


def _lse_like(q, layout, asked):
    h, s = layout.index("h"), layout.index("s")
    return q.new_empty((q.shape[0], q.shape[h], q.shape[s]) if asked else (0,), dtype=torch.float32)


def o_like(q, v):
    """api.o_like, where sizes and strides may be symbols too."""
    columns = v.shape[-1]
    o = torch.empty_like(q if q.shape[-1] == columns else q[..., :1].expand(*q.shape[:-1], columns))
    return o.new_empty_strided(o.shape, strides.plain(o.shape, o.stride()))


def _fake(q, k, v, causal, scale, layout, return_lse, *_):
    return o_like(q, v), _lse_like(q, layout, return_lse)


def _fake_row_max(q, k, v, causal, scale, layout, return_lse, *_):
    return o_like(q, v), _lse_like(q, layout, return_lse), _lse_like(q, layout, True)


def _fake_out(q, k, v, out, causal, scale, layout, return_lse, *_):
    return _lse_like(q, layout, return_lse)


def _fake_bwd(grad, q, k, v, o, lse, causal, scale, layout, window_left=None, window_right=None):
    return _grad_like(q, layout), _grad_like(k, layout), _grad_like(v, layout)


def _fake_cudnn(grad, q, k, v, o, lse, causal, scale, layout):
    return _grad_like(q, layout, "bhsd"), _grad_like(k, layout, "bhsd"), _grad_like(v, layout, "bhsd")


@operator(_fake)
def flash_fwd_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
    constant_time: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of `cute_attn.flash_fwd`; lse has no elements where it is not asked for, as gradients do."""
    how: api.Options = dict(causal=causal, scale=scale, layout=layout, constant_time=constant_time)
    how |= api.Options(window=(window_left, window_right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks)
    how |= api.Options(dropout_p=dropout_p, rng_state=rng_state)
    with torch.no_grad():
        result = api.flash_fwd(q, k, v, return_lse=return_lse, **how)
    return result if return_lse else (result, _lse_like(q, layout, False))


@operator(_fake_row_max)
def flash_fwd_row_max_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
    constant_time: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(o, lse, row_max), as flash_fwd: row_max has no gradient."""
    how: api.Options = dict(causal=causal, scale=scale, layout=layout, constant_time=constant_time)
    how |= api.Options(window=(window_left, window_right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks)
    how |= api.Options(dropout_p=dropout_p, rng_state=rng_state)
    with torch.no_grad():
        o, *lse, row_max = api.flash_fwd(q, k, v, return_lse=return_lse, return_row_max=True, **how)
    return o, lse[0] if return_lse else _lse_like(q, layout, False), row_max


@operator(_fake_out, mutates_args=("out",))
def flash_fwd_out_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
    constant_time: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """lse of `cute_attn.flash_fwd(..., out=out)`; no elements where it is not asked for."""
    how: api.Options = dict(causal=causal, scale=scale, layout=layout, out=out, constant_time=constant_time)
    how |= api.Options(window=(window_left, window_right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks)
    how |= api.Options(dropout_p=dropout_p, rng_state=rng_state)
    with torch.no_grad():
        result = api.flash_fwd(q, k, v, return_lse=return_lse, **how)
    return result[1] if return_lse else _lse_like(q, layout, False)


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
    checks.together(q, grad=grad, k=k, v=v, o=o, lse=lse)
    causal, window = checks.window((window_left, window_right), causal)
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
    checks.together(q, grad=grad, k=k, v=v, o=o, lse=lse)
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


def _save(ctx, inputs, output):
    (q, k, v, causal, scale, layout, return_lse, _, *sides), (o, lse, *row_max) = inputs, output
    if not return_lse:
        raise ValueError("return_lse: False came, and gradients need lse; pass True, as cute_attn.flash_fwd does")
    dropout = checks.dropout(sides[5], None, sides[6])
    checks.trained_head_dims(q, v)
    checks.gradients(q, layout, Modifiers(None, *sides[2:5], dropout=dropout))
    ctx.mark_non_differentiable(lse, *row_max)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.options, ctx.others = (causal, scale, layout, *sides[:2]), len(inputs) - 3


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * (3 + ctx.others)
    saved, (causal, scale, layout, *sides) = ctx.saved_tensors, ctx.options  # once: a checkpoint computes them anew
    causal, window = checks.window(sides, causal)
    if window is None and cudnn_serves(*saved[:2], scale, layout):
        grads = torch.ops.cute_attn.cudnn_bwd(grad, *saved, causal, scale, layout)
    else:
        grads = torch.ops.cute_attn.flash_bwd(grad, *saved, *ctx.options)
    return (*grads, *(None,) * ctx.others)


def _no_backward(ctx, *grads):
    raise NotImplementedError(
        "flash_fwd has no second derivative; for one use torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


gradients("flash_fwd", _backward, _save)
gradients("flash_fwd_row_max", _backward, _save)
gradients("flash_bwd", _no_backward)
gradients("cudnn_bwd", _no_backward)
