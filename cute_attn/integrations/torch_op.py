"""torch.ops.cute_attn.flash_fwd: the operator that torch.compile and torch.export see where Python calls flash_fwd.

`flash_fwd` calls it by itself while it is traced, and only then: an eager call has no dispatcher to go through.
"""

import torch

from .. import api


@torch.library.custom_op("cute_attn::flash_fwd", mutates_args=())
def flash_fwd_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None, layout: str, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of `cute_attn.flash_fwd`; lse has no elements where it is not asked for."""
    result = api.flash_fwd(q, k, v, causal=causal, scale=scale, layout=layout, return_lse=return_lse)
    return result if return_lse else (result, _lse_like(q, layout, False))


@flash_fwd_op.register_fake
def _(q, k, v, causal, scale, layout, return_lse):
    return torch.empty_like(q), _lse_like(q, layout, return_lse)


@torch.library.custom_op("cute_attn::flash_fwd_out", mutates_args=("out",))
def flash_fwd_out_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
) -> torch.Tensor:
    """lse of `cute_attn.flash_fwd(..., out=out)`; no elements where it is not asked for."""
    result = api.flash_fwd(q, k, v, causal=causal, scale=scale, layout=layout, return_lse=return_lse, out=out)
    return result[1] if return_lse else _lse_like(q, layout, False)


@flash_fwd_out_op.register_fake
def _(q, k, v, out, causal, scale, layout, return_lse):
    return _lse_like(q, layout, return_lse)


def _lse_like(q, layout, asked):
    h, s = layout.index("h"), layout.index("s")
    return q.new_empty((q.shape[0], q.shape[h], q.shape[s]) if asked else (0,), dtype=torch.float32)


def traced(q, k, v, *, causal, scale, layout, return_lse, out):
    """What flash_fwd does while torch traces it: one operator in the graph."""
    if out is None:
        o, lse = torch.ops.cute_attn.flash_fwd(q, k, v, causal, scale, layout, return_lse)
    else:
        o, lse = out, torch.ops.cute_attn.flash_fwd_out(q, k, v, out, causal, scale, layout, return_lse)
    return (o, lse) if return_lse else o
