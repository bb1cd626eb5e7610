"""What flash_fwd and flash_fwd_varlen do where torch traces or differentiates them: one operator in the graph.

The operators are asked for by name: torch_op.py and varlen_op.py, which define them, call flash_fwd in their kernels.
"""

import torch

from .. import checks

OUT_LEARNS = "out: given with inputs that require grad; omit it, or call under torch.no_grad()"


def dense(q, k, v, causal, scale, layout, return_lse, out, constant_time, modifiers):
    """What flash_fwd does where torch traces it or differentiates it: one operator in the graph.

    Returns o, lse, row_max and rng_state, each of the last two None where there is none.
    """
    checks.no_tangents(q=q, k=k, v=v, alibi_slopes=modifiers.alibi_slopes, sinks=modifiers.sinks, out=out)
    if isinstance(q, torch.fx.Proxy):
        return _by_proxy(q, k, v, causal, scale, layout, out, constant_time, modifiers)
    learns = checks.learns(q, k, v)
    if not learns:
        checks.traceable(modifiers)
    if learns:
        checks.trained_head_dims(q, v)
        checks.gradients(q, layout, modifiers)
    modifiers = modifiers.drawn(q)
    state, how = modifiers.rng_state, (causal, scale, layout, return_lse or learns, constant_time, *modifiers.flat())
    if out is None and modifiers.row_max:
        return *torch.ops.cute_attn.flash_fwd_row_max(q, k, v, *how), state
    if out is None:
        return *torch.ops.cute_attn.flash_fwd(q, k, v, *how), None, state
    if learns:
        raise ValueError(OUT_LEARNS)
    if modifiers.row_max:
        raise ValueError(
            "out: given with return_row_max or return_max_logit under torch.compile, where no operator has both; omit "
            "one of them"
        )
    return out, torch.ops.cute_attn.flash_fwd_out(q, k, v, out, *how), None, state


def _by_proxy(q, k, v, causal, scale, layout, out, constant_time, modifiers):
    """The operator in a graph of torch.fx.symbolic_trace, with lse: whether gradients need it is not known yet."""
    checks.traceable(modifiers)
    if modifiers.dropout is not None and modifiers.rng_state is None:
        raise TypeError("dropout_p: torch.fx's proxies have no device to draw on; pass rng_state")
    how = causal, scale, layout, True, constant_time, *modifiers.flat()
    if out is not None and modifiers.row_max:
        raise ValueError("out: given with return_row_max or return_max_logit to torch.fx; omit one of them")
    if out is not None:
        return out, torch.ops.cute_attn.flash_fwd_out(q, k, v, out, *how), None, modifiers.rng_state
    if modifiers.row_max:
        found = torch.ops.cute_attn.flash_fwd_row_max(q, k, v, *how)
        return found[0], found[1], found[2], modifiers.rng_state
    found = torch.ops.cute_attn.flash_fwd(q, k, v, *how)
    return found[0], found[1], None, modifiers.rng_state


def varlen(q, k, v, lengths, hints, causal, scale, window, return_lse, out):
    """What flash_fwd_varlen does where torch traces it or differentiates it: one operator in the graph."""
    checks.no_tangents(q=q, k=k, v=v, out=out)
    how = *lengths, *hints, causal, scale, *((None, None) if window is None else window)
    if isinstance(q, torch.fx.Proxy):  # whether gradients need lse is not known yet
        if out is None:
            found = torch.ops.cute_attn.flash_fwd_varlen(q, k, v, *how, True)
            o, lse = found[0], found[1]
        else:
            o, lse = out, torch.ops.cute_attn.flash_fwd_varlen_out(q, k, v, out, *how, return_lse)
        return (o, lse) if return_lse else o
    learns = checks.learns(q, k, v)
    if learns:
        checks.trained_head_dims(q, v)
        checks.packed_gradients(*hints, *lengths[2:])
    if out is None:
        o, lse = torch.ops.cute_attn.flash_fwd_varlen(q, k, v, *how, return_lse or learns)
    elif learns:
        raise ValueError(OUT_LEARNS)
    else:
        o, lse = out, torch.ops.cute_attn.flash_fwd_varlen_out(q, k, v, out, *how, return_lse)
    return (o, lse) if return_lse else o
