"""torch.ops.cute_attn.merge_states and merge_states_out: what tracers and autograd see of `merge_states`."""

import torch

from . import reference, states
from .merge import Merge
from .operator import gradients, operator
from .ops import o_like
from .states import States

SCHEMA = "(Tensor[] o, Tensor[] lse, str layout, bool base2) -> (Tensor, Tensor)"
SCHEMA_OUT = "(Tensor[] o, Tensor[] lse, Tensor(a!) out, Tensor(b!) out_lse, str layout, bool base2) -> ()"


def _fake(o, lse, layout, base2):
    return o_like(o[0], o[0]), o[0].new_empty(states.rows_of(o[0], layout), dtype=torch.float32)


def _fake_out(o, lse, out, out_lse, layout, base2):
    return None


def _run(o, lse, out, out_lse, layout, base2) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return Merge(States("o", o), States("lse", lse), out, out_lse, layout, base2).run()


@operator(_fake, SCHEMA)
def merge_states_op(o, lse, layout, base2) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of `merge_states`."""
    return _run(o, lse, None, None, layout, base2)


@operator(_fake_out, SCHEMA_OUT)
def merge_states_out_op(o, lse, out, out_lse, layout, base2) -> None:
    """With o written to out, and lse to out_lse."""
    _run(o, lse, out, out_lse, layout, base2)


def _save(ctx, inputs, output):
    o, lse, ctx.layout, ctx.base2 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*o, *lse)


def _backward(ctx, grad, grad_lse):
    """Of softmax over the states: w_i = exp(lse_i - lse), do_i = w_i do, dlse_i = w_i (do . (o_i - o) + dlse)."""
    saved = ctx.saved_tensors
    o, lse = saved[: len(saved) // 2], torch.stack(saved[len(saved) // 2 :])
    weights, empty = reference.shares(lse, ctx.base2), lse.isinf()
    grads: list = [None] * len(o)
    slopes = torch.zeros_like(lse)
    if grad is not None:
        grad = grad.float()
        grads = [(reference.of_rows(w, ctx.layout) * grad).to(x.dtype) for w, x in zip(weights, o, strict=True)]
        dots = torch.stack([_dot(grad, x, hidden, ctx.layout) for x, hidden in zip(o, empty, strict=True)])
        slopes = reference.unit(ctx.base2) * (dots - (weights * dots).sum(0))
    if grad_lse is not None:
        slopes = slopes + grad_lse
    return grads, list((weights * slopes).unbind()), None, None


def _dot(grad, o, empty, layout):
    """Each row's, like lse."""
    dots = (grad * o.float().masked_fill(reference.of_rows(empty, layout), 0)).sum(-1)
    return dots if layout == "bhsd" else dots.transpose(-1, -2)


gradients("merge_states", _backward, _save)
