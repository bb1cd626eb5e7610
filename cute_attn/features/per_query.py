"""What is an int32 number, or some, for each query or key; and the trees of drafts, whose bits are."""

from typing import Any

import torch

from ..arrays import memory, type_word
from ..checks import Spec, extent
from ..kernels.mask import Drafts
from .chunks import alone
from .feature import Feature

WORD = 32
REACH_MAX = 1 << 31  # numbers: counted by int32


class DraftsFeature(Feature):
    """Trees of speculative decoding: which of the last Sq keys each query sees. The value is int32 words of bits."""

    name, keywords, part, schema, later = "drafts", ("draft_mask",), "mask", ("Tensor? draft_mask=None",), True

    def given(self, asked):
        alone("draft_mask", asked, "window", "spans", "attention_chunk", "block_mask")
        if asked["causal"]:
            raise ValueError("draft_mask: given with causal=True, whose place it takes: set bits up to the diagonal")
        return asked["draft_mask"]

    def key(self, value):
        return Drafts()

    def fitted(self, value, problem, device):
        words = -(-problem.seqlen_q // WORD)
        if "q" in problem.packed:
            numbers("draft_mask", value, (problem.seqlen_q, None), "(total_q, words), a bit for each draft", device)
        else:
            shape = problem.batch, problem.seqlen_q, words
            numbers("draft_mask", value, shape, f"{shape}, a bit for each of Sq drafts", device)
        return value

    def arguments(self, value):
        return value.data_ptr(), value.shape[-1], value.shape[1] if value.dim() == 3 else 0


def numbers(name: str, x: Any, shape: tuple[int | None, ...], want: str, device: torch.device) -> None:
    """x is int32, where q is, of that shape, None being any size but 0, rows one behind the other; only a first
    dimension of three may have a stride of its own.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: a torch.Tensor is needed, int32 {want}; {type_word(x)} came")
    memory(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: {x.dtype} came, torch.int32 is needed; convert it with .to(torch.int32)")
    fits = len(x.shape) == len(shape)
    if not fits or any(n != m if m is not None else n == 0 for n, m in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: shape {tuple(x.shape)} came; {want} is needed")
    if x.numel() and extent(Spec.of(x).dims) >= REACH_MAX:
        raise ValueError(
            f"{name}: strides {tuple(x.stride())} reach over 2^31 numbers or more; use {name}.contiguous()"
        )
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, but q is on {device}; move it with .to(device)")
    inner = x[0] if len(shape) == 3 and len(x) and shape[1] is None else x
    if not inner.is_contiguous():
        raise ValueError(f"{name}: strides {tuple(x.stride())} came; use {name}.contiguous()")
