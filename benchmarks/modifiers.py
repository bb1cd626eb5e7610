"""Times what changes scores beside the plain kernel, and user functions and block masks beside compiled FlexAttention.

python benchmarks/modifiers.py [--out FILE]

bf16. `over_plain` is the time over that of our plain kernel on the same shape; `times_ours` that of FlexAttention over
ours. Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from gpu_tests import where
from script import record_of
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cute_attn import flash_fwd
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.implementations import OURS, make_inputs
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.timing import METHOD, CudaTimer, compare

ERROR_MAX = 1e-2  # of ours beside FlexAttention's, relative
Entry = dict[str, Any]


def changed(head_dim: int, seqlen: int, causal: bool, device: torch.device) -> list[Entry]:
    """softcap, alibi_slopes and sinks beside the plain kernel."""
    heads = 2048 // head_dim
    problem = Problem(16384 // seqlen, heads, heads, seqlen, seqlen, head_dim, causal=causal)
    q, k, v = make_inputs(problem, device)[:3]
    slopes, sinks = torch.linspace(0.01, 0.5, heads, device=device), torch.zeros(heads, device=device)
    asked: dict[str, dict] = {
        "plain": {},
        "softcap": dict(softcap=50.0),
        "alibi_slopes": dict(alibi_slopes=slopes),
        "sinks": dict(sinks=sinks),
        "all": dict(softcap=50.0, alibi_slopes=slopes, sinks=sinks),
    }
    calls = {name: lambda how=how: flash_fwd(q, k, v, causal=causal, **how) for name, how in asked.items()}
    stats = compare(calls, timer=CudaTimer())
    shape = dict(shape=f"{problem.batch},{heads},{seqlen},{head_dim}", causal=causal)
    plain = stats["plain"].p50_us
    return [
        shape | dict(contender=n, us=s.p50_us, spread=s.spread, over_plain=s.p50_us / plain) for n, s in stats.items()
    ]


def beside_flex(name: str, head_dim: int, seqlen: int, ours: dict, flex: dict, device: torch.device) -> list[Entry]:
    heads = 2048 // head_dim
    problem = Problem(16384 // seqlen, heads, heads, seqlen, seqlen, head_dim)
    q, k, v = make_inputs(problem, device)[:3]
    theirs = torch.compile(flex_attention)
    calls = {OURS: lambda: flash_fwd(q, k, v, **ours), "flex": lambda: theirs(q, k, v, **flex)}
    shape = dict(case=name, shape=f"{problem.batch},{heads},{seqlen},{head_dim}")
    try:
        found, want = (call().float() for call in calls.values())
    except Exception as error:  # Inductor may find no configuration that fits
        return [shape | dict(contender="flex", us=None, reason=f"{type(error).__name__}: {error}"[:200])]
    stats = compare(calls, timer=CudaTimer())
    entries = [
        shape | dict(contender=n, us=s.p50_us, spread=s.spread, times_ours=s.p50_us / stats[OURS].p50_us)
        for n, s in stats.items()
    ]
    return [*entries, shape | dict(contender="error", relative_error=((found - want).norm() / want.norm()).item())]


def cases(head_dim: int, seqlen: int, device: torch.device) -> dict[str, tuple[dict, dict]]:
    """What ours and FlexAttention are called with, by name."""
    heads = 2048 // head_dim
    bias = torch.randn(heads, 2 * seqlen, device=device)
    documents = torch.arange(seqlen, device=device, dtype=torch.int32) // 600

    def relative(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) * 0.01

    def table(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx - q_idx + seqlen]

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def document(b, h, q_idx, kv_idx):
        return (documents[q_idx] == documents[kv_idx]) & (q_idx >= kv_idx)

    def blocks(mod) -> BlockMask:
        return create_block_mask(mod, 1, 1, seqlen, seqlen, device=device)

    by_mask = {
        name: dict(block_mask=blocks(mod)) for name, mod in (("causal mask_mod", causal), ("document", document))
    }
    return {
        "relative bias": (dict(score_mod=relative), dict(score_mod=relative)),
        "relative bias, causal": (
            dict(score_mod=relative, causal=True),
            dict(score_mod=relative, block_mask=blocks(causal)),
        ),
        "bias by table": (dict(score_mod=table), dict(score_mod=table)),
        **{name: (how, how) for name, how in by_mask.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    out = record_of("modifiers", __doc__, argv)
    device = torch.device("cuda")
    found: list[Entry] = []

    def note(entries: list[Entry]) -> None:
        found.extend(entries)
        for entry in entries:
            print(entry, flush=True)
        write_json(out, {**where(), "method": METHOD, "entries": found})

    for head_dim in (128, 64):
        for seqlen in (2048, 8192):
            for causal in (False, True):
                note(changed(head_dim, seqlen, causal, device))
    for head_dim in (128, 64):
        for name, (ours, flex) in cases(head_dim, 4096, device).items():
            note(beside_flex(name, head_dim, 4096, ours, flex, device))
    return 1 if any(entry.get("relative_error", 0.0) > ERROR_MAX for entry in found) else 0


if __name__ == "__main__":
    sys.exit(main())
