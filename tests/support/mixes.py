"""Calls of which one argument is on another GPU than q, and what each is to raise."""

from collections.abc import Callable

import torch

from cute_attn import BlockLists, flash_fwd, flash_fwd_varlen
from tests.support.attention import inputs


def qkv(put, gpu):
    return [put(x, gpu) for x in inputs(2, 4, 2, 40, 50, 64, device="cpu")]


def lengths(put, gpu, *ends):
    return put(torch.tensor(ends, dtype=torch.int32), gpu)


def varlen_inputs(put, gpu, keys=12):
    q, k, v = (put(torch.randn(n, 2, 64, dtype=torch.bfloat16), gpu) for n in (10, keys, keys))
    return q, k, v, lengths(put, gpu, 0, 3, 10), lengths(put, gpu, 0, 5, keys)


def mixes(put: Callable) -> dict[str, tuple[Callable, str]]:
    """Name -> a call with q on cuda:1, and the words of its error; `put(x, index)` is the CPU tensor x on that GPU."""

    def dense(**other):
        return flash_fwd(*qkv(put, 1), **other)

    def one_of_three(i, put_other=put):
        return flash_fwd(*(qkv(put_other, 0)[n] if n == i else x for n, x in enumerate(qkv(put, 1))))

    def of_varlen(i):
        given = [varlen_inputs(put, 0)[n] if n == i else x for n, x in enumerate(varlen_inputs(put, 1))]
        return flash_fwd_varlen(*given)

    def lists(name):
        x = BlockLists(*(put(torch.ones(shape, dtype=torch.int32), 1) for shape in ((1, 1, 1), (1, 1, 1, 1))))
        return x._replace(**{name: put(torch.ones(getattr(x, name).shape, dtype=torch.int32), 0)})

    table, heads = put(torch.randn(50), 0), put(torch.zeros(4), 0)
    state, on = put(torch.zeros(2, dtype=torch.int64), 0), "on cuda:0, but q is on cuda:1"
    captured = f"it captures a tensor {on}"
    return {
        "k": (lambda: one_of_three(1), f"k: {on}"),
        "v": (lambda: one_of_three(2), f"v: {on}"),
        "v on the CPU": (lambda: one_of_three(2, lambda x, gpu: x), "v: on cpu, but q is on cuda:1"),
        "out": (lambda: dense(out=torch.empty_like(qkv(put, 0)[0])), f"out: {on}"),
        "sinks": (lambda: dense(sinks=heads), f"sinks: {on}"),
        "alibi_slopes": (lambda: dense(alibi_slopes=heads), f"alibi_slopes: {on}"),
        "score_mod": (
            lambda: dense(score_mod=lambda s, b, h, q_idx, kv_idx: s + table[kv_idx]),
            f"score_mod: {captured}",
        ),
        "aux": (
            lambda: dense(mask_mod=lambda b, h, q_idx, kv_idx, positive: positive[kv_idx] > 0, aux=(table,)),
            f"mask_mod: {captured}",
        ),
        "lists' counts": (lambda: dense(block_mask=lists("kv_num_blocks")), f"block_mask: kv_num_blocks: {on}"),
        "lists": (lambda: dense(block_mask=lists("kv_indices")), f"block_mask: kv_indices: {on}"),
        "rng_state": (lambda: dense(dropout_p=0.1, rng_state=state), f"rng_state: {on}"),
        "varlen k": (lambda: of_varlen(1), f"k: {on}"),
        "varlen v": (lambda: of_varlen(2), f"v: {on}"),
        "cu_seqlens_q": (lambda: of_varlen(3), f"cu_seqlens_q: {on}"),
        "cu_seqlens_k": (lambda: of_varlen(4), f"cu_seqlens_k: {on}"),
        "seqused_k": (
            lambda: flash_fwd_varlen(*varlen_inputs(put, 1), seqused_k=lengths(put, 0, 3, 4)),
            f"seqused_k: {on}",
        ),
        "varlen out": (lambda: flash_fwd_varlen(*varlen_inputs(put, 1), out=varlen_inputs(put, 0)[0]), f"out: {on}"),
        "varlen sinks": (
            lambda: flash_fwd_varlen(*varlen_inputs(put, 1), sinks=put(torch.zeros(2), 0)),
            f"sinks: {on}",
        ),
    }


MIXES = tuple(mixes(lambda x, gpu: x))


def look_alikes(put) -> None:
    """Calls that are known from then on by all that the look-up asks."""
    flash_fwd(*qkv(put, 1))
    flash_fwd(*qkv(put, 1), out=qkv(put, 1)[0])
    flash_fwd_varlen(*varlen_inputs(put, 1))
    flash_fwd_varlen(*varlen_inputs(put, 1), out=varlen_inputs(put, 1)[0])
