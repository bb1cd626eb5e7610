"""Who would compute a call, and why not we: nothing is compiled or launched for the answer."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import api, checks, notices, varlen
from .integrations import by_operator, dlpack, torch_op
from .modifiers import Modifiers
from .problem import Problem

OURS = "cute_attn"


class Explanation(NamedTuple):
    """Of one call. As text, a sentence."""

    by: str  # "cute_attn"; "torch ..." or "transformers ..."; or "nobody", where the call raises or has nothing to do
    kernel: str | None = None  # ours, by its name
    reason: str | None = None  # why it is not ours
    backward: str | None = None  # whose, where one may follow

    def __str__(self) -> str:
        what = f"computed by {self.by}" + (f", kernel {self.kernel}" if self.kernel else "")
        after = f"; the backward by {self.backward}" if self.backward else ""
        return what + (f": {self.reason}" if self.reason else "") + after


def explain(*args: Any, function: Callable = api.flash_fwd, **options: Any) -> Explanation:
    """Which kernel would compute `function(*args, **options)`, and if it is not ours, why not.

    Args:
        function: `cute_attn.flash_fwd`, `cute_attn.flash_fwd_varlen`,
            `torch.nn.functional.scaled_dot_product_attention` as it is inside of `sdpa.use()`, or
            `cute_attn.integrations.transformers.attention`, with the arguments that a model gives it.
        args, options: the call's own.

    Returns:
        an Explanation: `by` whom, our `kernel`'s name, the `reason` why it is not ours (an error's own words, where
        the call raises), and whose `backward` may follow. Nothing is compiled, launched, drawn or written.

    Raises:
        TypeError: the function is none of these, or does not take such arguments.
    """
    from .integrations import transformers

    told: dict[Any, Callable] = {
        api.flash_fwd: _flash_fwd,
        varlen.flash_fwd_varlen: _varlen,
        F.scaled_dot_product_attention: _sdpa,
        transformers.attention: _transformers,
    }
    tell = told.get(function)
    if tell is None:
        names = "flash_fwd, flash_fwd_varlen, scaled_dot_product_attention and transformers.attention"
        raise TypeError(f"function: {function!r} came; {names} are explained")
    try:
        return tell(*args, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        return Explanation("nobody", reason=f"it raises {type(error).__name__}: {error}")


def _bound(function: Callable, args, options) -> SimpleNamespace:
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _flash_fwd(*args, **options) -> Explanation:
    """In its order."""
    a = _bound(api.flash_fwd, args, options)
    checks.flags(**{name: getattr(a, name) for name in api.ASKED})
    causal, modifiers = _modifiers(a, checks.dropout(a.dropout_p, a.generator, a.rng_state))
    if not isinstance(a.q, torch.Tensor) and hasattr(a.q, "__dlpack__"):
        given = dict(q=a.q, k=a.k, v=a.v) | ({} if a.out is None else dict(out=a.out))
        vars(a).update(zip(given, dlpack.shared(**given), strict=True))
    problem, gpu, config, specs = api.planned(a.q, a.k, a.v, a.out, causal, a.layout, a.constant_time, modifiers.kinds)
    scale = None if a.scale is None else checks.scale(a.scale)
    checks.fitted(modifiers, problem, a.q.device)
    backward = _backward(a, modifiers, scale) if checks.learns(a.q, a.k, a.v) else None
    if a.out is not None:
        checks.out_memory(a.out, a.q, a.k, a.v, [x.nbytes for x in specs])
    return _answer(gpu, config, problem.empty, (a.q, a.k, a.v, a.q if a.out is None else a.out), backward)


def _modifiers(a: SimpleNamespace, dropout) -> tuple[bool, Modifiers]:
    causal, window = checks.window(a.window, a.causal)
    mods = checks.mods(a.score_mod, a.mask_mod, a.aux, getattr(a, "block_mask", None))
    row_max = a.return_row_max or a.return_max_logit
    return causal, Modifiers(window, checks.softcap(a.softcap), a.alibi_slopes, a.sinks, *mods, dropout, row_max)


def _answer(gpu, config, empty: bool, tensors, backward: str | None) -> Explanation:
    if gpu is None:
        return Explanation("torch in float32", reason=notices.CPU, backward=backward and "torch in float32")
    if empty:
        return Explanation("nobody", reason="there is nothing to multiply: a size is 0", backward=backward)
    checks.addresses(*tensors)
    return Explanation(OURS, config.name, backward=backward)


def _backward(a: SimpleNamespace, modifiers: Modifiers, scale: float | None) -> str:
    checks.trained_head_dims(a.q, a.v)
    checks.gradients(a.q, a.layout, modifiers)
    if a.out is not None:
        raise ValueError(by_operator.OUT_LEARNS)
    by_cudnn = modifiers.window is None and torch_op.cudnn_serves(a.q, a.k, scale, a.layout)
    return "torch's cuDNN" if by_cudnn else "torch's FlashAttention-2"


def _varlen(*args, **options) -> Explanation:
    a = _bound(varlen.flash_fwd_varlen, args, options)
    lengths, hints = (a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k), (a.max_seqlen_q, a.max_seqlen_k)
    checks.flags(**{name: getattr(a, name) for name in api.ASKED[:3]})
    causal, modifiers = _modifiers(a, None)
    batch, gpu, config, specs = varlen.planned(a.q, a.k, a.v, lengths, hints, a.out, causal, modifiers.kinds)
    if a.scale is not None:
        checks.scale(a.scale)
    backward = None
    if checks.learns(a.q, a.k, a.v):
        varlen.operator_takes(modifiers)
        checks.trained_head_dims(a.q, a.v)
        checks.packed_gradients(*hints, *lengths[2:])
        backward = "torch's FlashAttention-2"
    checks.fitted(modifiers, Problem(batch, a.q.shape[1], a.k.shape[1], len(a.q), len(a.k), a.q.shape[2]), a.q.device)
    if a.out is not None:
        checks.out_memory(a.out, a.q, a.k, a.v, [x.nbytes for x in specs])
    return _answer(gpu, config, 0 in (batch, a.q.numel()), (a.q, a.k, a.v, a.q if a.out is None else a.out), backward)


def _sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Explanation:
    """As inside of `sdpa.use()`, whether it holds or not."""
    from .integrations import sdpa

    why = sdpa.elsewhere(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if why is not None:
        return Explanation("torch, by another backend than flash attention", reason=why)
    why = sdpa.obstacle(query, key, value, dropout_p, scale=scale)
    if why is None:
        with torch.no_grad():
            found = explain(query, key, value, causal=is_causal, scale=scale)
        if found.by == OURS:
            learning = checks.learns(query, key, value)
            return found._replace(backward="torch's FlashAttention-2" if learning else None)
        why = found.reason
    return Explanation("torch's flash attention", reason=why)


def _transformers(*args, **options) -> Explanation:
    from .integrations import transformers as cute

    a = _bound(cute.attention, args, options)
    cute.not_sparse(a.kwargs)
    told = cute.sequences(a.query, a.kwargs)
    seen = cute.visible(a.module, a.query, a.key, a.attention_mask, a.is_causal, told)
    why = cute.obstacle(seen, a.attention_mask, a.query, a.key, a.value, a.dropout, a.kwargs)
    if seen is None or why is not None:
        return Explanation(cute.other(a.kwargs), reason=why)
    how = cute.options(seen, a.scaling, a.kwargs)
    if isinstance(seen.among, cute.Sequences):
        q, k, v = (x[0].transpose(0, 1) for x in (a.query, a.key, a.value))
        longest = int(seen.among.longest_queries), int(seen.among.longest_keys)
        hints = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True))
        return explain(q, k, v, *seen.among[:2], function=varlen.flash_fwd_varlen, **how, **hints)
    key, value = a.key[:, :, : seen.keys], a.value[:, :, : seen.keys]
    if isinstance(seen.among, cute.Padding):
        return explain(cute.grouped(a.query, key, how), key, value, **how, **seen.among.options)
    return explain(a.query, key, value, **how)
