"""What cute_attn's functions do where torch traces or differentiates them: one operator in the graph.

The operators are asked for by name: ops.py, which defines them, runs requests in their kernels.
"""

from typing import Any

import torch

from . import arrays, checks, features


def attention(request: Any) -> tuple:
    """o, lse, row_max and rng_state of a request, each but o None where there is none."""
    operands = request.operands
    q, k, v, out = operands.tensors
    is_proxy = isinstance(q, torch.fx.Proxy)
    named = {name: x for name, x in features.by_name(request.features).items() if isinstance(x, torch.Tensor)}
    arrays.no_tangents(**dict(zip(operands.names, operands.tensors, strict=True)), **named)
    learns = not is_proxy and arrays.learns(q, k, v)
    if learns:
        check_gradients(request)
    features.traceable(request.features)
    asked = features.started(request.features, q)
    return_lse = request.outputs.lse or learns or (is_proxy and out is None)  # of a proxy nobody knows if it learns
    how = request.causal, request.scale, return_lse, *operands.operator_arguments()
    how = *how, request.constant_time, *features.operator_arguments(asked)
    rng_state = None if asked.dropout is None else asked.dropout.rng_state
    more = operands.operator_keywords() | features.operator_keywords(asked)
    if out is None:
        found = torch.ops.cute_attn.attention(q, k, v, *how, **more)
        return found[0], found[1], found[2], rng_state
    found = torch.ops.cute_attn.attention_out(q, k, v, out, *how, **more)
    return out, found[0], found[1], rng_state


def check_gradients(request: Any) -> None:
    """
    Raises:
        ValueError: the request has no backward; the message says what serves.
    """
    q, _, v, out = request.operands.tensors
    request.operands.differentiable()
    checks.trained_head_dims(q, v)
    features.differentiable(request.features)
    request.operands.lacks_gradient()
    if out is not None:
        raise ValueError("out: given with inputs that require grad; omit it, or call under torch.no_grad()")
