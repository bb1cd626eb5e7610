"""Bidirectional spans inside of a causal prompt: tokens of an image that see each other (Gemma 3, vLLM's prefixes)."""

from typing import Any, NamedTuple

import torch

from ..kernels.mask import Spans
from .chunks import given
from .feature import Feature
from .per_query import numbers


class Around(NamedTuple):
    table: Any  # int32 (B, places, 2), or (total_k, 2): of each place (first, end) of the span that it is in
    windowed: bool


class SpansFeature(Feature):
    """The value is Around."""

    name, keywords, part, schema, later = "spans", ("spans",), "mask", ("Tensor? spans=None",), True

    def given(self, asked):
        windowed = not asked["causal"]  # which a window has taken over
        if windowed and not given(asked, "window"):
            raise ValueError("spans: given without causal=True or a window, where all keys are seen; omit it")
        return Around(asked["spans"], windowed)

    def key(self, value):
        return Spans(value.windowed)

    def fitted(self, value, problem, device):
        packed = "k" in problem.packed
        shape = (problem.seqlen_k, 2) if packed else (problem.batch, None, 2)
        want = f"({'total_k' if packed else 'B, places'}, 2), the first place and the end of each place's span"
        numbers("spans", value.table, shape, want, device)
        return value

    def arguments(self, value):
        table = value.table
        if table.dim() == 2:
            return table.data_ptr(), 0, 1 << 30
        return table.data_ptr(), table.stride(0) if len(table) > 1 else 0, table.shape[1]

    def by_name(self, value):
        return dict(spans=value.table)

    def operator_arguments(self, value):
        return (None if value is None else value.table,)


def spans(span_ids: torch.Tensor) -> torch.Tensor:
    """The `spans` of flash_fwd, flash_fwd_varlen and flash_fwd_kvcache, made once for all layers.

    Args:
        span_ids: (B, S) int32 or int64: neighbours with the same number, 0 or more, are one span; a negative number
            says that a token is in none.

    Returns:
        int32 (B, S, 2): the first place and the end of each token's span; of a token in none, its own place and the
        next. For packed sequences take each one's rows of its (1, S, 2), one behind the other.

    Raises:
        TypeError, ValueError: span_ids is not as above.
    """
    if not isinstance(span_ids, torch.Tensor):
        raise TypeError(f"span_ids: {type(span_ids).__name__} came; an int32 or int64 tensor is needed")
    if span_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"span_ids: {span_ids.dtype} came; torch.int32 or torch.int64 is needed")
    if span_ids.dim() != 2:
        raise ValueError(f"span_ids: shape {tuple(span_ids.shape)} came; (B, S) is needed")
    n = span_ids.shape[-1]
    place = torch.arange(n, device=span_ids.device).expand_as(span_ids)
    same = (span_ids[..., 1:] == span_ids[..., :-1]) & (span_ids[..., 1:] >= 0)
    none = same.new_zeros((len(same), min(n, 1)))
    first = torch.where(torch.cat((none, same), -1), 0, place).cummax(-1).values if n else place
    last = torch.where(torch.cat((same, none), -1), n, place).flip(-1).cummin(-1).values.flip(-1) if n else place
    return torch.stack((first, last + 1), -1).to(torch.int32)
