"""torch.ops.cute_attn.append_kv and append_behind: what tracers see of what writes to a cache."""

import torch

from .append import Behind, Rotary, Slots
from .kvcache_operands import Cached
from .operator import operator

NEW = "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache"
ROTARY = "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"
SCHEMA = f"({NEW}, Tensor slot_mapping, {ROTARY}, Tensor? rotary_positions) -> ()"
WHERE = "Tensor? cache_seqlens, SymInt? cache_length, Tensor? page_table, Tensor? cache_batch_idx"
WHERE = f"{WHERE}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k_new"
SCHEMA_BEHIND = f"(Tensor q, {NEW}, {WHERE}, {ROTARY}, Tensor? rotary_seqlens, bool spread) -> (Tensor, Tensor)"


def _fake(*arguments):
    return None


@operator(_fake, SCHEMA)
def append_kv_op(*arguments) -> None:
    """`append_kv`."""
    *tensors, cos, sin, interleaved, positions = arguments
    Slots._make([*tensors, Rotary(cos, sin, interleaved, positions)]).run()


def _behind(
    q,
    k,
    v,
    k_cache,
    v_cache,
    seqlens,
    length,
    table,
    index,
    cu_seqlens_q,
    cu_seqlens_k_new,
    cos,
    sin,
    interleaved,
    where,
    spread,
) -> Behind:
    """Of the operator's arguments."""
    lengths = seqlens if length is None else length
    into = Cached(q, k_cache, v_cache, None, lengths, table, index, None, cu_seqlens_q, None, None)
    return Behind(into, k, v, cu_seqlens_k_new, Rotary(cos, sin, interleaved, where), spread)


def _fake_behind(*arguments):
    new = _behind(*arguments)
    q = new.into.q
    q_out = q.new_empty(0) if new.rotary.cos is None else torch.empty_like(q)
    return q_out, q.new_empty(new.into.batch, dtype=torch.int32)


@operator(_fake_behind, SCHEMA_BEHIND)
def append_behind_op(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, cache_seqlens) of `flash_fwd_kvcache` with k and v, for the attention that follows; q without elements where
    it is not rotated.
    """
    new = _behind(*arguments)
    q, seqlens = new.run()
    return (q.new_empty(0) if new.rotary.cos is None else q), seqlens
