"""torch.ops.cute_attn.attention and attention_out: what tracers (torch.compile, make_fx, jit.trace, ...) and autograd
see of `flash_fwd`, `flash_fwd_varlen` and `flash_fwd_kvcache`, which call them where they are traced or differentiated.

torch differentiates no operator that writes to an argument, so there are two. Their schema is made of the features',
and of what was added since they were first exported, which stands behind.
`ops_0_1` has the names of before.
"""

from collections import namedtuple
from typing import Any

import torch

from . import backward, checks, features, strides
from .features.window import window as bounded
from .kvcache_operands import Cached
from .operands import HINTS, LENGTHS, Dense, Operands, Ragged
from .operator import gradients, operator
from .request import Outputs, request

TENSORS = "Tensor q, Tensor k, Tensor v"
BASE = (
    *("bool causal", "float? scale", "bool return_lse", "str layout"),
    *(f"Tensor? {name}=None" for name in LENGTHS),
    *(f"SymInt? {name}=None" for name in HINTS),
    "bool constant_time=False",
)
CACHES = "cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "causal_each"
BEHIND = *(f"Tensor? {name}=None" for name in CACHES), "SymInt? cache_length=None"
OPTIONS = ", ".join((*BASE, *features.SCHEMA, *BEHIND, *features.SCHEMA_LATER))
SCHEMA = f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
SCHEMA_OUT = f"({TENSORS}, Tensor(a!) out, {OPTIONS}) -> (Tensor, Tensor)"


def named(schema: str) -> Any:
    """A namedtuple of the schema's arguments: the dispatcher leaves out defaults that come last."""
    arguments = torch._C.parse_schema(f"attention{schema}").arguments
    defaults = [x.default_value for x in arguments if x.has_default_value()]
    return namedtuple("Arguments", [x.name for x in arguments], defaults=defaults)


Arguments, ArgumentsOut = named(SCHEMA), named(SCHEMA_OUT)


def o_like(q, v):
    """operands.o_like, where sizes and strides may be symbols too."""
    columns = v.shape[-1]
    o = torch.empty_like(q if q.shape[-1] == columns else q[..., :1].expand(*q.shape[:-1], columns))
    return o.new_empty_strided(o.shape, strides.plain(o.shape, o.stride()))


def _of_rows(a, asked: bool) -> torch.Tensor:
    """lse or row_max, empty: without elements where it is not asked for."""
    return a.q.new_empty(_operands(a).rows() if asked else (0,), dtype=torch.float32)


def _operands(a, out=None) -> Operands:
    of_packed = {name: getattr(a, name) for name in (*LENGTHS, *HINTS)}
    of_cache = {name: getattr(a, name) for name in CACHES}
    if a.cache_length is not None or a.cache_seqlens is not None:
        return _cached(a, out, of_packed, of_cache)
    _none(of_cache, "without cache_seqlens or cache_length; keys in a cache have one of them")
    if a.layout != "thd":
        _none(of_packed, f'with layout {a.layout!r}; packed sequences have "thd"')
        return Dense(a.q, a.k, a.v, out, a.layout)
    return Ragged(a.q, a.k, a.v, out, **of_packed)


def _cached(a, out, of_packed: dict[str, Any], of_cache: dict[str, Any]) -> Cached:
    """Of a layout that says as well whether queries are packed."""
    q = {name: of_packed.pop(name) for name in ("cu_seqlens_q", "max_seqlen_q")}
    _none(of_packed, "with cache_seqlens or cache_length, which say how long keys are")
    want = "bshd" if a.cu_seqlens_q is None else "thd"
    if a.layout != want:
        raise ValueError(
            f"layout: {a.layout!r} came; over caches q is {want!r} with{'' if want == 'thd' else 'out'} cu_seqlens_q"
        )
    if a.cache_length is not None:
        _none({"cache_seqlens": a.cache_seqlens}, "with cache_length; pass one of them")
        of_cache["cache_seqlens"] = a.cache_length
    return Cached(a.q, a.k, a.v, out, **of_cache, **q)


def _none(arguments: dict[str, Any], why: str) -> None:
    given = [name for name, x in arguments.items() if x is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: given {why}")


def _run(a, out=None) -> list[torch.Tensor]:
    """o, lse and row_max."""
    asked = features.of_operator(a._asdict())
    outputs = Outputs(a.return_lse, a.return_row_max)
    with torch.no_grad():
        found = request(_operands(a, out), outputs, a.causal, a.scale, a.constant_time, asked).run()
    o, *rest = found if isinstance(found, tuple) else (found,)
    lse = rest.pop(0) if a.return_lse else _of_rows(a, False)
    return [o, lse, rest.pop(0) if a.return_row_max else _of_rows(a, False)]


def _fake(*args):
    a = Arguments(*args)
    return o_like(a.q, a.v), _of_rows(a, a.return_lse), _of_rows(a, a.return_row_max)


def _fake_out(*args):
    a = ArgumentsOut(*args)
    return _of_rows(a, a.return_lse), _of_rows(a, a.return_row_max)


@operator(_fake, SCHEMA)
def attention_op(*args) -> tuple[torch.Tensor, ...]:
    """(o, lse, row_max) of `flash_fwd`; of `flash_fwd_kvcache` where there are cache_seqlens or cache_length; else of
    `flash_fwd_varlen` where there are cu_seqlens. Those not asked for have no elements. Gradients need lse.
    """
    return tuple(_run(Arguments(*args)))


@operator(_fake_out, SCHEMA_OUT)
def attention_out_op(*args) -> tuple[torch.Tensor, ...]:
    """(lse, row_max), with o written to out."""
    a = ArgumentsOut(*args)
    return tuple(_run(a, a.out)[1:])


def _save(ctx, inputs, output):
    a, (o, lse, row_max) = Arguments(*inputs), output
    operands = _operands(a)
    operands.differentiable()
    if not a.return_lse:
        raise ValueError("return_lse: False came, and gradients need lse; pass True, as cute_attn.flash_fwd does")
    checks.trained_head_dims(a.q, a.v)
    features.differentiable(features.collect(a.causal, features.of_operator(a._asdict()))[1])
    operands.lacks_gradient()
    ctx.mark_non_differentiable(lse, row_max)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.q, a.k, a.v, o, lse, a.cu_seqlens_q, a.cu_seqlens_k)
    ctx.sides, ctx.hints = (a.window_left, a.window_right), (a.max_seqlen_q, a.max_seqlen_k)
    ctx.how, ctx.inputs = (a.causal, a.scale, a.layout), len(inputs)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * ctx.inputs
    *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors  # once: a checkpoint computes them anew
    causal, scale, layout = ctx.how
    if cu_seqlens_q is not None:
        how = (cu_seqlens_q, cu_seqlens_k, *ctx.hints, causal, scale, *ctx.sides)
        grads = torch.ops.cute_attn.flash_bwd_varlen(grad, *saved, *how)
    elif bounded(ctx.sides, causal)[1] is None and backward.cudnn_serves(*saved[:2], scale, layout):
        causal, _ = bounded(ctx.sides, causal)
        grads = torch.ops.cute_attn.cudnn_bwd(grad, *saved, causal, scale, layout)
    else:
        grads = torch.ops.cute_attn.flash_bwd(grad, *saved, *ctx.how, *ctx.sides)
    return (*grads, *(None,) * (ctx.inputs - 3))


gradients("attention", _backward, _save)
