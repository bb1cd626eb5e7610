"""What is a float32 number for each head: ALiBi's slopes, and sinks."""

from typing import Any

import torch

from ..arrays import memory, type_word
from .feature import Feature


class AlibiFeature(Feature):
    """ALiBi (arXiv:2108.12409): a score loses slope * |distance|. The value is (H,) or (B, H)."""

    name, keywords, part, schema = "alibi", ("alibi_slopes",), "score", ("Tensor? alibi_slopes=None",)

    def fitted(self, value, problem, device):
        per_head("alibi_slopes", value, ((problem.heads,), (problem.batch, problem.heads)), device)
        return value

    def arguments(self, value):
        return value.data_ptr(), value.stride(0) if value.dim() == 2 else 0


class SinksFeature(Feature):
    """A logit of each head joins its rows' denominators (arXiv:2309.17453). The value is (H,)."""

    name, keywords, part, schema = "sinks", ("sinks",), "sinks", ("Tensor? sinks=None",)

    def fitted(self, value, problem, device):
        per_head("sinks", value, ((problem.heads,),), device)
        return value

    def without_keys(self, value, lse):
        lse.copy_(value[:, None])

    def arguments(self, value):
        return (value.data_ptr(),)


def per_head(name: str, x: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    """x is float32, where q is, of one of these shapes, and gets no gradient."""
    want = " or ".join(map(str, shapes))
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: a torch.Tensor is needed, float32 {want}; {type_word(x)} came")
    memory(name, x)
    if x.dtype != torch.float32:
        raise TypeError(f"{name}: {x.dtype} came, torch.float32 is needed; use {name}.float()")
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: shape {tuple(x.shape)} came; {want} is needed, a number for each of q's heads")
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, but q is on {device}; move one with .to(device)")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: stride {x.stride(-1)} in the last dimension; 1 is needed: use {name}.contiguous()")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, and flash_fwd has no gradient for it; pass {name}.detach()")
