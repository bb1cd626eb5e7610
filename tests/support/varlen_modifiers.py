"""What changes scores, in varlen sequences, held to float64 sequence by sequence."""

import torch

from cute_attn import flash_fwd_varlen, reference
from tests.support.attention import bound, close_lse, sdpa
from tests.support.mods import by_hand, mask_mods, score_mods
from tests.support.varlen import MARK, marked, one_sequence

SEQUENCES = [(1, 1), (0, 0), (65, 63), (0, 17), (33, 0), (70, 130)]
HEADS, BATCH = 4, len(SEQUENCES)


def cases(device) -> dict[str, dict]:
    per_head = torch.linspace(-0.3, 0.5, HEADS, device=device)
    per_sequence = torch.linspace(-0.2, 0.6, BATCH * HEADS, device=device).view(BATCH, HEADS)
    return {
        "softcap": dict(softcap=2.0),
        "softcap, causal": dict(softcap=2.0, causal=True),
        "alibi": dict(alibi_slopes=per_head),
        "alibi of each sequence, causal": dict(alibi_slopes=per_sequence, causal=True),
        "sinks, window": dict(sinks=per_head, window=(30, 5)),
        "all": dict(softcap=2.0, alibi_slopes=per_sequence, sinks=per_head, causal=True),
    }


def functions(device) -> dict[str, dict]:
    every = torch.linspace(0.5, 1.5, BATCH, device=device)

    def of_sequence(score, b, h, q_idx, kv_idx):
        return score * every[b] + (h + 1) * 0.01 * (q_idx - kv_idx)

    def odd_sequences(b, h, q_idx, kv_idx):
        return (b % 2 == 0) | (kv_idx % 3 != 0)

    return {
        "score_mod": dict(score_mod=of_sequence),
        "by table, causal": dict(score_mod=score_mods(device)["by_table"], causal=True),
        "mask_mod": dict(mask_mod=odd_sequences),
        "documents, causal": dict(mask_mod=mask_mods(device)["documents"], causal=True),
        "both, window": dict(score_mod=of_sequence, mask_mod=odd_sequences, window=(30, 5)),
    }


def alone(n, alibi_slopes=None, score_mod=None, mask_mod=None, **how) -> dict:
    """The n-th sequence's own arguments: as the 0-th of a batch of one."""
    if alibi_slopes is not None:
        how["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[n : n + 1]
    if score_mod is not None:
        how["score_mod"] = lambda s, b, *places: score_mod(s, torch.full_like(b, n), *places)
    if mask_mod is not None:
        how["mask_mod"] = lambda b, *places: mask_mod(torch.full_like(b, n), *places)
    return how


def check(q, k, v, lengths, **how):
    """Against float64, sequence by sequence; rows of none stay as they were. Maxima beside."""
    out = marked(q)
    o, lse, row_max = flash_fwd_varlen(q, k, v, **lengths, **how, return_lse=True, return_row_max=True, out=out)
    again = flash_fwd_varlen(q, k, v, **lengths, **how, out=marked(q))
    untouched = torch.ones(len(q), dtype=torch.bool, device=q.device)
    queries = reference.parts(lengths["cu_seqlens_q"], lengths.get("seqused_q"), len(q))
    keys = reference.parts(lengths["cu_seqlens_k"], lengths.get("seqused_k"), len(k))
    for n, (a, b) in enumerate(zip(queries, keys, strict=True)):
        untouched[a] = False
        if a.stop == a.start:
            continue
        one, own = one_sequence(q, k, v, a, b), alone(n, **how)
        theirs = by_hand if "score_mod" in how or "mask_mod" in how else sdpa
        want, want_lse, want_max = reference.attention(*one, **own, return_row_max=True)
        allowed = theirs(*one, **dict(causal=False) | own) if b.stop > b.start else want
        for found in (o, again):
            bound(found[None, a].transpose(1, 2), want, allowed)
        close_lse(lse[None, :, a], want_lse)
        close_lse(row_max[None, :, a], want_max)
    for found in (o, again):
        assert (found[untouched].view(torch.int16) == MARK).all(), "a row of no sequence was written"
