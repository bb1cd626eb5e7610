"""score_mod, mask_mod and lists of blocks, and calls with them held to float64."""

import functools
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, noop_mask

from cute_attn import BlockLists, flash_fwd, reference
from tests.support.attention import bound, close_lse, inputs, visible

LENGTH = 1100  # that the tables reach to
FACTOR = 0.25


class Tables(NamedTuple):
    bias: torch.Tensor  # (H, 2 LENGTH)
    documents: torch.Tensor  # (LENGTH,)
    hidden: torch.Tensor  # (B, LENGTH) bool
    factor: torch.Tensor  # ()


def tables(device) -> Tables:
    return Tables(
        torch.randn(4, 2 * LENGTH, device=device),
        (torch.arange(LENGTH, device=device) // 90).to(torch.int32),
        torch.rand(2, LENGTH, device=device) < 0.3,
        torch.tensor(0.5, device=device),
    )


def score_mods(device) -> dict:
    t = tables(device)

    def sloped(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) * 0.01 * (h + 1)

    def by_table(score, b, h, q_idx, kv_idx):
        return score + t.bias[h, kv_idx - q_idx + LENGTH]

    def row_by_row(score, b, h, q_idx, kv_idx):
        return score * t.factor + t.bias[h][q_idx] * FACTOR

    def capped(score, b, h, q_idx, kv_idx):
        return 2 * torch.tanh(score / 2)

    def hiding(score, b, h, q_idx, kv_idx):
        return torch.where((q_idx - kv_idx).abs() % 3 == 0, score, -float("inf"))

    def floored(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) % 7 * 0.1 - (q_idx - kv_idx) // 5 * 0.1 + (score - 0.5) % 0.75

    def many(score, b, h, q_idx, kv_idx):
        x = torch.clamp(score, min=-3, max=3) + torch.sigmoid(score) - torch.maximum(score, -score) ** 2 / 9
        return torch.where(torch.logical_not(b == 0), x, torch.exp(-(score**2))) + (h // 2) - h % 2

    return dict(
        sloped=sloped,
        by_table=by_table,
        row_by_row=row_by_row,
        capped=capped,
        hiding=hiding,
        floored=floored,
        many=many,
    )


def mask_mods(device) -> dict:
    t = tables(device)

    def prefix(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx < 70)

    def documents(b, h, q_idx, kv_idx):
        return t.documents[q_idx] == t.documents[kv_idx]

    def padded(b, h, q_idx, kv_idx):
        return ~t.hidden[b, kv_idx]

    def of_heads(b, h, q_idx, kv_idx):
        return (h == 0) | ((q_idx + kv_idx) % (h + 1) == 0)

    return dict(
        prefix=prefix,
        documents=documents,
        padded=padded,
        of_heads=of_heads,
        both=and_masks(prefix, documents),
        partial=functools.partial(lambda seen, b, h, q_idx, kv_idx: seen[kv_idx] > 2, t.documents),
        all=noop_mask,
    )


def held_to_the_bound(q, k, v, dense=None, **how):
    """Against float64, and torch's arithmetic with P in q's dtype; on a poisoned output. dense: of block_mask."""
    out = torch.full_like(q, torch.nan)
    o, lse = flash_fwd(q, k, v, out=out, return_lse=True, **how)
    assert o is out
    if how.pop("block_mask", None) is not None:
        how["mask_mod"] = dense
    want, want_lse = reference.attention(q, k, v, **how)
    bound(o, want, by_hand(q, k, v, **how))
    close_lse(lse, want_lse)


def by_hand(q, k, v, score_mod=None, mask_mod=None, causal=False, window=None):
    """float32 but for the operands and P; NaN where a row sees nothing."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
    s = q.float() @ k.float().mT * q.shape[3] ** -0.5
    i, j = (torch.arange(n, device=q.device) for n in s.shape[2:])
    for b, h in product(*map(range, s.shape[:2])):
        places = torch.tensor(b, device=q.device), torch.tensor(h, device=q.device), i[:, None], j
        s[b, h] = s[b, h] if score_mod is None else score_mod(s[b, h], *places)
        if mask_mod is not None:
            s[b, h].masked_fill_(~mask_mod(*places).expand_as(s[b, h]), -torch.inf)
    s.masked_fill_(~visible(len(i), len(j), causal, q.device, window), -torch.inf)
    return s.softmax(dim=3).to(v.dtype) @ v


def pairs_of(seqlen_q, seqlen_k, device):
    """A score_mod and a mask_mod by tensors that end where the sequences do: within a block, and beyond its first."""
    table = torch.randn(4, seqlen_q, seqlen_k, device=device)
    every_other = torch.randn(2 * seqlen_k, device=device)[::2]
    hidden = torch.rand(seqlen_q, seqlen_k, device=device) < 0.3

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[h, q_idx, kv_idx] + every_other[kv_idx]

    def mask_mod(b, h, q_idx, kv_idx):
        return ~hidden[q_idx, kv_idx]

    return dict(score_mod=score_mod, mask_mod=mask_mod)


def beyond(device):
    """Of a tensor of 100: a score_mod whose indices go beyond both of its ends, and one that keeps them inside."""
    table = torch.randn(100, device=device)
    ours = lambda score, b, h, i, j: score + table[j + 5] + table[i - j]  # noqa: E731
    inside = lambda score, b, h, i, j: score + table[(j + 5).clamp(max=99)] + table[(i - j).clamp(0, 99)]  # noqa: E731
    return ours, inside


def of(counts, *indices, **how):
    """Lists of one sequence and head, of blocks of 64: a row of each for every block of queries."""
    made = torch.tensor(counts, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)
    return BlockLists(*(x[None, None] for x in made), block_size=(64, 64), **how)


BEYOND = {
    "counted beyond the list": ([2**31 - 1], [2, 1, 0], [0, 1, 2]),
    "counted by one too many": ([4], [2, 1, 0], [0, 1, 2]),
    "counted below 0": ([-(2**31)], [2, 1, 0], []),
    "blocks that are none": ([3], [1, 3, -1], [1]),
    "blocks far out": ([3], [2**31 - 1, -(2**31), 0], [0]),
    "blocks whose keys overflow": ([3], [2**25, 2**26 + 1, 2], [2]),
}


def never_beyond(counts, indices, seen, device):
    """What is counted beyond a list is not read, a block that there is not has no keys; behind k and v lies NaN."""
    room = [torch.full((1, 2, 300, 64), torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2)]
    q, *kv = inputs(1, 2, 2, 64, 190, 64, device=device)
    k, v = (x[:, :, 50:240].copy_(y) for x, y in zip(room, kv, strict=True))
    mask = BlockLists(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in of(counts, indices)))
    o, lse = flash_fwd(q, k, v, block_mask=mask, return_lse=True)
    which = torch.tensor([n // 64 in seen for n in range(190)], device=device)
    want, want_lse = flash_fwd(q, k[:, :, which], v[:, :, which], return_lse=True)
    torch.testing.assert_close(o, want, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)


beyond_lists = pytest.mark.parametrize(("counts", "indices", "seen"), BEYOND.values(), ids=BEYOND)
