"""The whole path of a call: check -> plan -> compile -> allocate -> launch."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled as _function_modes
from torch._C import _is_tracing as _jit_traces
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from typing_extensions import Unpack

from . import checks, compile, device, notices, reference, strides
from .checks import Spec
from .integrations import by_operator, dlpack
from .kernels.config import FwdConfig
from .modifiers import NONE, UNMODIFIED, Modifiers
from .plan import HEAD_DIMS, kernel_class, plan, prebuilt
from .problem import Problem


class Options(TypedDict, total=False):
    """What flash_fwd takes beside q, k, v and return_lse, for type checkers."""

    causal: bool
    scale: float | None
    layout: str
    out: Tensor | None
    constant_time: bool
    window: tuple[int | None, int | None] | None
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
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    score_mod=None,
    mask_mod=None,
    aux=(),
    block_mask=None,
    return_row_max=False,
    return_max_logit=False,
    dropout_p=0.0,
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
    modifiers, dropout, asked = NONE, None, (return_lse, return_row_max, return_max_logit, return_rng_state)
    if type(return_row_max) is not bool or type(return_max_logit) is not bool or type(return_rng_state) is not bool:
        checks.flags(**dict(zip(ASKED, asked, strict=True)))
    if type(dropout_p) is not float or dropout_p != 0.0 or generator is not None or rng_state is not None:
        dropout = checks.dropout(dropout_p, generator, rng_state)
    more = return_row_max or return_max_logit or dropout is not None
    if (
        more
        or type(aux) is not tuple
        or aux
        or not window is softcap is alibi_slopes is sinks is score_mod is mask_mod is block_mask is None
    ):
        causal, window = checks.window(window, causal)
        mods = checks.mods(score_mod, mask_mod, aux, block_mask)
        row_max = return_row_max or return_max_logit
        modifiers = Modifiers(window, checks.softcap(softcap), alibi_slopes, sinks, *mods, dropout, row_max)
    if is_compiling() or (
        (_dispatch_modes() or _function_modes() or forward_ad._current_level >= 0)
        and traced(q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, out=out)
    ):
        return _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers)
    if not type(q) is type(k) is type(v) is Tensor:
        if isinstance(q, torch.fx.Proxy):
            return _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers)
        if not isinstance(q, Tensor) and hasattr(q, "__dlpack__"):
            how = dict(causal=causal, scale=scale, layout=layout, constant_time=constant_time)
            how |= dict(zip(ASKED, asked, strict=True))
            return dlpack.shared_by(flash_fwd, q, k, v, out=out, **how, **modifiers.by_name())
        if checks.stands_in(q, k, v):
            return _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers)
    if type(causal) is not bool or type(return_lse) is not bool or type(constant_time) is not bool:
        checks.flags(causal=causal, return_lse=return_lse, constant_time=constant_time)
    how = causal, layout, constant_time, UNMODIFIED if modifiers is NONE else modifiers.kinds
    call = _call(q, k, v, out, how)
    if call is None:
        return _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers)
    problem, default_scale, gpu, kernel, draws, plain, nbytes, like = call
    scale = default_scale if scale is None else checks.scale(scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):  # checks.learns, uncalled
        for name, x in zip("qkv", (q, k, v), strict=True):
            checks.tensor(name, x)
        return _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers)
    if modifiers is not NONE:
        modifiers = checks.fitted(modifiers, problem, q.device)
    if out is not None:
        checks.out_memory(out, q, k, v, nbytes)
    if more:
        modifiers = modifiers.started(q, problem)
    if gpu is None:
        return _on_cpu(problem, q, k, v, scale, modifiers, asked, out)
    o = (torch.empty_like(q) if like is None else q.new_empty_strided(*like)) if out is None else out
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32) if return_lse else None
    if kernel is None:
        o.zero_()
        if lse is not None:
            lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks[:, None])
    else:
        address, ticket = 0 if lse is None else lse.data_ptr(), gpu.ticket() if draws else 0
        tensors = (q, k, v, o) if plain else map(_for_tma, (q, k, v, o))
        if device.current() != gpu.index:
            kernel = gpu.guarded(kernel)
        try:
            if modifiers is NONE:
                kernel(*tensors, address, ticket, scale, gpu.num_sms)
            else:
                kernel(*tensors, address, ticket, scale, gpu.num_sms, *modifiers.arguments())
        except Exception:  # where the call's own check has refused them, before the launch, ours says how to mend it
            _prepared(q, k, v, out, *how)
            checks.addresses(q, k, v, o)
            raise
    if modifiers is NONE and not return_rng_state:
        return (o, lse) if return_lse else o
    return results(o, lse, modifiers.row_max, modifiers.rng_state, asked)


ASKED = "return_lse", "return_row_max", "return_max_logit", "return_rng_state"


def results(o, lse, row_max, rng_state, asked):
    """o, or a tuple of it and what else was asked for."""
    return_lse, return_row_max, return_max_logit, return_rng_state = asked
    found = [o, lse] if return_lse else [o]
    if return_row_max or return_max_logit:
        found += reference.maxima(row_max, return_row_max, return_max_logit)
    if return_rng_state:
        found.append(o.new_zeros(2, dtype=torch.int64) if rng_state is None else rng_state)
    return tuple(found) if len(found) > 1 else o


def _by_operator(q, k, v, causal, scale, layout, asked, out, constant_time, modifiers):
    return results(*by_operator.dense(q, k, v, causal, scale, layout, asked[0], out, constant_time, modifiers), asked)


def traced(**tensors) -> bool:
    """Whether something records what is done with tensors (a mode of dispatch, jit.trace): it gets the operator then.

    A mode of functions alone, such as torch.device's, records nothing; but that of make_fx's pre_dispatch does.
    """
    from .integrations import operator

    checks.no_tangents(**tensors)
    if operator.inside():
        return False
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included("PreDispatch")
    if not (before_dispatch or _jit_traces() or _dispatch_modes()):
        return False
    for name, x in tensors.items():
        if isinstance(x, Tensor) and not torch._C._functorch.is_functionaltensor(x):
            checks.untransformed(name, x)
    return True


class Call(NamedTuple):
    """What the shapes, strides, types and devices of a call's arguments say, whatever their addresses and values."""

    problem: Problem
    scale: float  # the default
    gpu: device.Device | None  # None: the CPU
    kernel: Callable | None  # None: the CPU, or nothing to multiply
    draws: bool  # the kernel's CTAs draw their tiles
    plain: bool  # no size of 1 has a stride that TMA would refuse
    nbytes: tuple[int, ...]  # that q, k, v and o reach over
    like: tuple[tuple[int, ...], tuple[int, ...]] | None  # o's shape and strides; None: torch.empty_like's of q


_calls: dict[tuple, Call] = {}
CALLS = 4096  # looked up; with one more all are forgotten


def _call(q, k, v, out, how) -> Call | None:
    """Checked, planned and compiled; a look-up where the like has come before. None under torch.jit.trace, whose sizes
    are tensors, which no key has.

    The key leaves out what the compiled call itself holds against q, k and v before it launches: out's shape, and every
    type and device but q's. `how` says which modifiers there are, not their values.
    """
    try:
        o = None if out is None else out.stride()
        key = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), o, q.dtype, q.get_device(), how)
        call = _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, one without strides, or a layout that has no hash
        return _prepared(q, k, v, out, *how)
    if call is None:
        if _jit_traces() and traced(q=q, k=k, v=v, out=out):
            return None
        call = _prepared(q, k, v, out, *how)
        if call.kernel is not None:
            if len(_calls) >= CALLS:
                _calls.clear()
            _calls[key] = call
    return call


def _prepared(q, k, v, out, *how) -> Call:
    problem, gpu, config, specs = planned(q, k, v, out, *how)
    kernel = None if gpu is None or problem.empty else compile.get(config)
    plain = not any(checks.odd(x.stride) for x in specs)
    nbytes, like = tuple(x.nbytes for x in specs), strides.unlike(q, v.shape[-1])
    return Call(problem, problem.head_dim**-0.5, gpu, kernel, config.scheduler.draws, plain, nbytes, like)


def planned(q, k, v, out, causal, layout, constant_time, kinds):
    """Checked: the problem, its GPU (None: the CPU), the kernel's config, and what was seen of q, k, v and o."""
    checks.words(causal, layout, constant_time)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", q if out is None else out)):
        checks.tensor(name, x)
    q, k, v, o = (Spec.of(x) for x in (q, k, v, q if out is None else out))
    problem = checks.problem(q, k, v, causal, layout, constant_time, kinds)
    if out is not None:
        checks.out(o, q, v, layout)
    gpu = None if q.device.type == "cpu" else device.get(q.device.index)
    config = plan(problem, None if gpu is None else gpu.name)
    return problem, gpu, config, (q, k, v, o)


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

    Returns:
        the FwdConfigs that are ready.
    """
    asked = head_dim, dtype, layout, causal, constant_time, window, head_dim_v
    every = product(*(x if isinstance(x, (tuple, list)) else (x,) for x in asked))
    found = [plan(checks.warmup_problem(*one)) for one in every]
    classes, dims = (
        set(map(kernel_class, found)),
        dict.fromkeys((config.head_dim, config.head_dim_v) for config in found),
    )
    ratios = [checks.ratio(x) for x in (ratio if isinstance(ratio, (tuple, list)) else (ratio,))]
    every_kernel = dict.fromkeys(config for x in ratios for config in prebuilt(device.name(), x, dims))
    ready = [config for config in every_kernel if kernel_class(config) in classes]
    for done, config in enumerate(ready, 1):
        compile.get(config)
        notices.logger.info("warmup: %d of %d kernels, %s", done, len(ready), config.name)
    return ready


def o_like(q, v):
    """Empty, of q's shape with v's head dim: q's dimensions in their order in memory."""
    return q.new_empty_strided(*strides.of_output(q, v.shape[-1]))


def _for_tma(x):
    """A view of x whose sizes of 1 have strides that TMA takes."""
    return x.as_strided(x.shape, [s if n > 1 else d for n, s, d in zip(x.shape, x.stride(), (8, 8, 8, 1), strict=True)])


def _on_cpu(problem, q, k, v, scale, modifiers, asked, out):
    how = dict(
        causal=problem.causal, scale=scale, layout=problem.layout, dtype=torch.float32, **modifiers.for_reference()
    )
    notices.once(f"flash_fwd: {notices.CPU}")
    with torch.autocast("cpu", enabled=False):
        o, lse, row_max = reference.attention(q.detach(), k.detach(), v.detach(), **how, return_row_max=True)
    o = (o_like(q, v) if out is None else out).copy_(o)
    return results(o, lse, row_max, modifiers.rng_state, asked)
