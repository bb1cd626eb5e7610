"""Who would compute a call, and why not we: nothing is compiled or launched for the answer."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import api, arrays, backward, by_operator, checks, features, kvcache, notices, varlen
from .decode import IN_PLACE_OF, DecodePlan
from .integrations import dlpack
from .kvcache_operands import PLACES, Cached, of_each
from .operands import Dense, Ragged
from .request import Outputs, Request, request

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
        function: `cute_attn.flash_fwd`, `cute_attn.flash_fwd_varlen`, `cute_attn.flash_fwd_kvcache`,
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
        kvcache.flash_fwd_kvcache: _kvcache,
        F.scaled_dot_product_attention: _sdpa,
        transformers.attention: _transformers,
    }
    tell = told.get(function)
    if tell is None:
        names = "flash_fwd, flash_fwd_varlen, flash_fwd_kvcache, scaled_dot_product_attention, transformers.attention"
        raise TypeError(f"function: {function!r} came; {names} are explained")
    try:
        return tell(*args, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        return Explanation("nobody", reason=f"it raises {type(error).__name__}: {error}")


def _bound(function: Callable, args, options) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return dict(bound.arguments)


def _flash_fwd(*args, **options) -> Explanation:
    a = _bound(api.flash_fwd, args, options)
    if not isinstance(a["q"], torch.Tensor) and hasattr(a["q"], "__dlpack__"):
        given = {name: a[name] for name in ("q", "k", "v", "out") if a[name] is not None}
        a.update(zip(given, dlpack.shared(**given), strict=True))
    return _ours(Dense(**{name: a.pop(name) for name in Dense._fields}), a)


def _varlen(*args, **options) -> Explanation:
    a = _bound(varlen.flash_fwd_varlen, args, options)
    return _ours(Ragged(**{name: a.pop(name) for name in Ragged._fields}), a)


def _kvcache(*args, **options) -> Explanation:
    a = _bound(kvcache.flash_fwd_kvcache, args, options)
    made = a["cache_seqlens"] if isinstance(a["cache_seqlens"], DecodePlan) else None
    if made is not None:
        a.update(
            zip(("cache_seqlens", *IN_PLACE_OF), made.in_place_of(*(a[name] for name in IN_PLACE_OF)), strict=True)
        )
    a["causal"], each = of_each(a["causal"])
    names = "q", "k_cache", "v_cache", "out", *PLACES, "max_seqlen_q"
    return _ours(Cached._make([*(a.pop(name) for name in names), each, made]), a)


def _ours(operands: Any, asked: dict[str, Any]) -> Explanation:
    """In the order of `Request.run`."""
    outputs = Outputs(**{name: asked.get(f"return_{name}", False) for name in Outputs._fields})
    given = {name: x for name, x in asked.items() if name in features.DEFAULTS}
    how = asked["causal"], asked["scale"], asked.get("constant_time", False)
    wanted = request(operands, outputs, *how, given)
    problem, gpu, config, specs = wanted.planned()
    if wanted.scale is not None:
        checks.scale(wanted.scale)
    q, k, v, out = operands.tensors
    learning = _backward(wanted) if arrays.learns(q, k, v) else None
    features.fitted(wanted.features, problem, q.device)
    if out is not None:
        checks.out_memory(out, q, k, v, [x.nbytes for x in specs], operands.names)
    if gpu is None:
        return Explanation("torch in float32", reason=notices.CPU, backward=learning and "torch in float32")
    if operands.nothing(problem):
        return Explanation("nobody", reason="there is nothing to multiply: a size is 0", backward=learning)
    checks.addresses(**wanted.named(), out=q if out is None else out)
    return Explanation(OURS, config.name, backward=learning)


def _backward(wanted: Request) -> str:
    by_operator.check_gradients(wanted)
    q, k, *_ = wanted.operands.tensors
    dense = isinstance(wanted.operands, Dense) and wanted.features.window is None
    by_cudnn = dense and backward.cudnn_serves(q, k, wanted.scale, wanted.operands.layout)
    return "torch's cuDNN" if by_cudnn else "torch's FlashAttention-2"


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
            learning = arrays.learns(query, key, value)
            return found._replace(backward="torch's FlashAttention-2" if learning else None)
        why = found.reason
    return Explanation("torch's flash attention", reason=why)


def _transformers(*args, **options) -> Explanation:
    from .integrations import transformers as cute

    a = SimpleNamespace(**_bound(cute.attention, args, options))
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
