"""Times sliding windows beside FlashAttention-2's (torch's own) and, where it is installed, FlashAttention-4's.

python benchmarks/window.py [--out FILE]

Causal windows of 256 and 1024 keys back, at 8k and 32k tokens, bf16. Exit status 1 where an output is wrong; 2 without
a Hopper GPU.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from gpu_tests import where
from script import record_of

from cute_attn import flash_fwd
from cute_attn.plan import Kinds, Problem
from cute_attn.tools.benchmark.implementations import BASELINES, OURS, make_inputs
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.timing import METHOD, CudaTimer, Timer, compare

LEFTS, SEQLENS, HEAD_DIMS, TOKENS = (256, 1024), (8192, 32768), (64, 128, 256), 32768
ERROR_MAX = 1e-2  # of ours beside the first peer's, relative


def flash(q, k, v, left: int) -> torch.Tensor:
    """torch's FlashAttention-2."""
    how = (None, None, q.shape[1], k.shape[1], 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(q, k, v, *how, window_size_left=left, window_size_right=0)[0]


def fa4() -> Callable | None:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, left: flash_attn_func(q, k, v, causal=True, window_size=(left, 0))[0]


def entries(
    problem: Problem, left: int, peers: dict[str, Callable], device: torch.device, timer: Timer
) -> list[dict[str, Any]]:
    """Times of ours and of each peer; a peer that does not take it has none, and says why."""
    q, k, v = (x.transpose(1, 2) for x in make_inputs(problem, device)[:3])  # (B, S, H, D)

    def ours(q, k, v, left):
        return flash_fwd(q, k, v, causal=True, window=(left, 0), layout="bshd")

    outputs, failed = {}, {}
    for name, call in {OURS: ours, **peers}.items():
        try:
            outputs[name] = call(q, k, v, left)
        except Exception as error:  # a peer may refuse in any way
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    calls = {OURS: ours, **peers}
    stats = compare({name: lambda call=calls[name]: call(q, k, v, left) for name in outputs}, timer=timer)
    first = next((outputs[name].float() for name in peers if name in outputs), outputs[OURS].float())
    error = ((outputs[OURS].float() - first).norm() / first.norm()).item()
    shape = dict(shape=f"{problem.batch},{problem.heads},{problem.seqlen_q},{problem.head_dim}", window=[left, 0])
    return [
        *(
            shape | dict(contender=n, us=s.p50_us, spread=s.spread, times_ours=s.p50_us / stats[OURS].p50_us)
            for n, s in stats.items()
        ),
        *(shape | dict(contender=name, us=None, reason=reason) for name, reason in failed.items()),
        shape | dict(contender="error", relative_error=error),
    ]


def problems() -> list[Problem]:
    return [
        Problem(TOKENS // s, 2048 // d, 2048 // d, s, s, d, layout="bshd", kinds=Kinds(window=True))
        for d, s in product(HEAD_DIMS, SEQLENS)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    out = record_of("window", __doc__, argv)
    device, other = torch.device("cuda"), fa4()
    peers = {"flash": flash} | ({"fa4": other} if other else {})
    versions = {name: BASELINES[name].version() for name in peers if BASELINES[name].absent() is None}
    found = []
    for problem, left in product(problems(), LEFTS):
        for entry in entries(problem, left, peers, device, CudaTimer()):
            print(entry, flush=True)
            found.append(entry)
        write_json(out, {**where(), "peers": versions, "method": METHOD, "entries": found})
    return 1 if any(entry.get("relative_error", 0.0) > ERROR_MAX for entry in found) else 0


if __name__ == "__main__":
    sys.exit(main())
