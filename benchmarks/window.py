"""Times sliding windows beside FlashAttention-2's (torch's own) and, where it is installed, FlashAttention-4's.

python benchmarks/window.py [--out FILE] [--only WORD]

Causal windows of 256 and 1024 keys back, at 8k and 32k tokens, bf16. Exit status 1 where an output is wrong; 2 without
a Hopper GPU.
"""

import sys
from functools import partial
from itertools import product

import torch
from script import absent, main

from cute_attn import flash_fwd
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.cells import Truth
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import BASELINES, OURS, from_bshd, make_inputs
from cute_attn.tools.benchmark.workload import Spec, shape_word

LEFTS, SEQLENS, HEAD_DIMS, TOKENS = (256, 1024), (8192, 32768), (64, 128, 256), 32768
FA4 = BASELINES["fa4"]


def rows(problem: Problem, left: int, device: torch.device) -> list[Row]:
    x, window = make_inputs(problem, device), (left, 0)
    q, k, v = x.bshd()

    def flash():
        """torch's FlashAttention-2."""
        how = (None, None, q.shape[1], k.shape[1], 0.0, True, False)
        return torch.ops.aten._flash_attention_forward(q, k, v, *how, window_size_left=left, window_size_right=0)

    calls = {
        OURS: lambda: flash_fwd(q, k, v, causal=True, window=window, layout="bshd"),
        "flash": flash,
        "fa4": lambda: FA4.function("flash_attn_func")(q, k, v, causal=True, window_size=window),
    }
    calls = {name: from_bshd(call) for name, call in calls.items()}
    truth = Truth(x, causal=True, window=window)
    return [Row(Spec(problem, window), calls, truth, baseline="flash", absent=absent([FA4]))]


PROBLEMS = [
    Problem(TOKENS // s, 2048 // d, 2048 // d, s, s, d, "bf16", "bshd", True) for d, s in product(HEAD_DIMS, SEQLENS)
]
GROUPS = {f"{shape_word(p)} {left}": partial(rows, p, left) for p, left in product(PROBLEMS, LEFTS)}

if __name__ == "__main__":
    sys.exit(main("window", __doc__, GROUPS, baselines=[FA4]))
