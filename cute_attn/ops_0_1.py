"""The operators of version 0.1, each a call of `ops`'s: an exported program, or a pickled graph, that has them runs.

Their schemas are as they were, and stay so.
"""

import warnings

import torch

from .operator import alias
from .ops import TENSORS, named

_SIDES = "SymInt? window_left=None, SymInt? window_right=None"
_DENSE = "bool causal, float? scale, str layout, bool return_lse, bool constant_time=False"
_DENSE = f"{_DENSE}, {_SIDES}, float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None"
_DENSE = f"{_DENSE}, float dropout_p=0.0, Tensor? rng_state=None"
_PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q"
_PACKED = f"{_PACKED}, SymInt? max_seqlen_k, bool causal, float? scale, SymInt? window_left, SymInt? window_right"
_PACKED = f"{_PACKED}, bool return_lse"
_OUT = f"{TENSORS}, Tensor(a!) out"


def _alias(name: str, schema: str, first: int | None, row_max: bool = False) -> None:
    """Of so many outputs, or of the first alone, with `first` None."""
    arguments, base = named(schema), "attention_out" if "(a!)" in schema else "attention"
    text = f"torch.ops.cute_attn.{name} is for programs of version 0.1; use torch.ops.cute_attn.{base}"

    def call(*args):
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        named = arguments(*args)._asdict() | (dict(return_row_max=True) if row_max else {})
        found = getattr(torch.ops.cute_attn, base)(**dict(layout="thd") | named)
        return found[0] if first is None else found[:first]

    alias(name, schema, call)


_alias("flash_fwd", f"({TENSORS}, {_DENSE}) -> (Tensor, Tensor)", 2)
_alias("flash_fwd_row_max", f"({TENSORS}, {_DENSE}) -> (Tensor, Tensor, Tensor)", 3, row_max=True)
_alias("flash_fwd_out", f"({_OUT}, {_DENSE}) -> Tensor", None)
_alias("flash_fwd_varlen", f"({TENSORS}, {_PACKED}) -> (Tensor, Tensor)", 2)
_alias("flash_fwd_varlen_out", f"({_OUT}, {_PACKED}) -> Tensor", None)
