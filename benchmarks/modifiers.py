"""Times what changes scores beside the plain kernel, and user functions and block masks beside compiled FlexAttention.

python benchmarks/modifiers.py [--out FILE] [--only WORD]

bf16. The baseline of softcap, alibi_slopes and sinks is our plain kernel on the same shape; that of the others is
FlexAttention. Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import sys
from functools import partial
from itertools import product
from typing import Any

import torch
from script import main
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cute_attn import flash_fwd
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.cells import Truth
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import OURS, make_inputs, plain
from cute_attn.tools.benchmark.workload import Spec, cell_word, mask_pairs, shape_word


def changed(p: Problem, device: torch.device) -> list[Row]:
    """softcap, alibi_slopes and sinks beside the plain kernel."""
    x = make_inputs(p, device)
    slopes = dict(alibi_slopes=torch.linspace(0.01, 0.5, p.heads, device=device))
    softcap, sinks = dict(softcap=50.0), dict(sinks=torch.zeros(p.heads, device=device))
    asked: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": softcap,
        "alibi_slopes": slopes,
        "sinks": sinks,
        "all": softcap | slopes | sinks,
    }
    return [
        Row(
            Spec(p, features=dict.fromkeys(how, True)),
            {OURS: plain(partial(flash_fwd, *x[:3], causal=p.causal, **how))},
            Truth(x, **how),
            case=case,
            baseline="plain",
        )
        for case, how in asked.items()
    ]


def beside_flex(p: Problem, case: str, device: torch.device) -> list[Row]:
    """A score or mask function, by ours and by FlexAttention."""
    x = make_inputs(p, device)
    ours, flex, mask_mod = functions(p, device)[case]
    theirs = torch.compile(flex_attention)
    calls = {OURS: plain(partial(flash_fwd, *x[:3], **ours)), "flex": plain(partial(theirs, *x[:3], **flex))}
    score = {name: mod for name, mod in ours.items() if name == "score_mod"}
    truth = Truth(x, **score, **(dict(mask_mod=mask_mod) if mask_mod else {}))
    pairs = mask_pairs(mask_mod, p, device) if mask_mod else None
    return [Row(Spec(p, pairs=pairs, features={case: True}), calls, truth, case, "flex")]


CASES = ("relative bias", "relative bias, causal", "bias by table", "causal mask_mod", "document")


def functions(p: Problem, device: torch.device) -> dict[str, tuple[dict, dict, Any]]:
    """What ours and FlexAttention are called with, and the mask that both mean, by case."""
    bias = torch.randn(p.heads, 2 * p.seqlen_k, device=device)
    documents = torch.arange(p.seqlen_k, device=device, dtype=torch.int32) // 600

    def relative(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) * 0.01

    def table(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx - q_idx + p.seqlen_k]

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def document(b, h, q_idx, kv_idx):
        return (documents[q_idx] == documents[kv_idx]) & (q_idx >= kv_idx)

    def blocks(mod) -> dict:
        return dict(block_mask=create_block_mask(mod, 1, 1, p.seqlen_q, p.seqlen_k, device=device))

    by_relative, by_table = dict(score_mod=relative), dict(score_mod=table)
    found = (
        (by_relative, by_relative, None),
        (by_relative | dict(causal=True), by_relative | blocks(causal), causal),
        (by_table, by_table, None),
        *((blocks(mod), blocks(mod), mod) for mod in (causal, document)),
    )
    return dict(zip(CASES, found, strict=True))


def problem(head_dim: int, seqlen: int, causal: bool = False) -> Problem:
    heads = 2048 // head_dim
    return Problem(16384 // seqlen, heads, heads, seqlen, seqlen, head_dim, causal=causal)


SHAPES = [problem(*sizes) for sizes in product((128, 64), (2048, 8192), (False, True))]
GROUPS = {f"scores {cell_word(p)}": partial(changed, p) for p in SHAPES} | {
    f"{case} {shape_word(p)}": partial(beside_flex, p, case)
    for p, case in product((problem(128, 4096), problem(64, 4096)), CASES)
}

if __name__ == "__main__":
    sys.exit(main("modifiers", __doc__, GROUPS))
