"""The whole path of a call: check -> plan -> compile -> allocate -> launch."""

from itertools import product

import torch

from . import checks, compile, device, reference
from .plan import HEAD_DIMS, plan


def flash_fwd(q, k, v, *, causal=False, scale=None, layout="bhsd", return_lse=False, out=None):
    """Exact attention, softmax(scale q k^T) v, by one fused kernel (FlashAttention-3, arXiv:2407.08608).

    Args:
        q: (B, H, Sq, D) bf16 or fp16, D a multiple of 8 up to 256, on a Hopper GPU (sm_90) or the CPU. Any strides
            with a contiguous last dimension and rows at multiples of 16 bytes run without a copy, expanded ones too.
        k, v: (B, Hk, Sk, D) with Hk dividing H: MHA, GQA or MQA.
        causal: query i sees the keys up to i + Sk - Sq (aligned to the last key, bottom right).
        scale: of the scores, any finite number; default D ** -0.5. A new value compiles nothing.
        layout: "bhsd" as above, torch SDPA's order; "bshd" for FlashAttention's (B, S, H, D).
        return_lse: also return the natural log of each row's sum of exp(scale q k^T), float32 (B, H, Sq).
        out: written in place and returned as o; like q, sharing no memory with q, k, v.

    Returns:
        o, like q; or (o, lse). Accumulated in float32, rounded once. A row that sees no key gives o = 0, lse = -inf.

    Runs on torch's current stream of the tensors' device, and may be captured in a CUDA graph after one call. CPU
    tensors are computed by torch in float32 and rounded once. No gradients yet: inputs that require grad raise in grad
    mode.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    problem = checks.problem(checks.spec("q", q), checks.spec("k", k), checks.spec("v", v), causal, layout)
    scale = checks.scale(scale, problem.head_dim)
    checks.gradients(q, k, v)
    if type(return_lse) is not bool:
        raise TypeError(f"return_lse: a bool is needed, {return_lse!r} came")
    if out is not None:
        checks.out(out, q, k, v, layout)
    if not q.is_cuda:
        return _on_cpu(problem, q, k, v, scale, return_lse, out)
    gpu = device.get(q.device.index)
    o = out if out is not None else _empty_like(q)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32) if return_lse else gpu.no_lse
    if problem.empty:
        o.zero_()
        lse.fill_(-torch.inf)
    else:
        tuned = plan(problem)
        ticket = gpu.ticket() if tuned.scheduler.draws else gpu.no_ticket
        args = (_for_tma("q", q), _for_tma("k", k), _for_tma("v", v), _for_tma("out", o))
        compile.get(tuned)(*args, lse, ticket, scale, gpu.num_sms)
    return (o, lse) if return_lse else o


def warmup(head_dim=HEAD_DIMS, *, dtype=("bf16", "fp16"), layout=("bhsd", "bshd"), causal=(False, True)):
    """Compile ahead of time, into memory and the disk cache; needs no GPU. About 2 s for each kernel not there yet.

    Args:
        head_dim: one or several D, multiples of 8 up to 256; default: one of each kernel.
        dtype: "bf16", "fp16" (or torch's), one or several; layout, causal: as of `flash_fwd`, one or several.

    Returns:
        the FwdConfigs that are ready.
    """
    asked = [x if isinstance(x, (tuple, list)) else (x,) for x in (head_dim, dtype, layout, causal)]
    ready = list(dict.fromkeys(plan(checks.warmup_problem(*one)) for one in product(*asked)))
    for config in ready:
        compile.get(config)
    return ready


def _empty_like(q):
    """Like q, as torch's empty_like makes it: q's order of dimensions, dense."""
    o = torch.empty_like(q, requires_grad=False)
    return o if not checks.odd(o.stride()) else torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _for_tma(name, x):
    """x itself, its start checked; or a view of it whose sizes of 1 have strides that TMA takes."""
    checks.address(name, x)
    if not checks.odd(x.stride()):
        return x
    return x.as_strided(x.shape, [s if n > 1 else d for n, s, d in zip(x.shape, x.stride(), (8, 8, 8, 1), strict=True)])


def _on_cpu(problem, q, k, v, scale, return_lse, out):
    how = dict(causal=problem.causal, scale=scale, layout=problem.layout, dtype=torch.float32)
    o, lse = reference.attention(q.detach(), k.detach(), v.detach(), **how)
    o = o.to(q.dtype) if out is None else out.copy_(o)
    return (o, lse) if return_lse else o
