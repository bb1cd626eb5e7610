"""Times lists of random blocks of keys beside the dense kernel, by density and by size of block.

python benchmarks/lists.py [--out FILE]

bf16, B=16, H=96, S=4096, D=128; each head has lists of its own. `times_dense` is how many times as fast as dense.
Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_tests import where
from script import record_of

from cute_attn import BlockLists, flash_fwd, reference
from cute_attn.block_mask import as_lists
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.implementations import make_inputs
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.timing import METHOD, CudaTimer, Timer, compare

PROBLEM = Problem(16, 96, 96, 4096, 4096, 128)
DENSITIES, SIZES = (0.1, 0.017), ((128, 128), (192, 128))
ERROR_MAX = 1e-2  # of ours beside float64, relative


def chosen_blocks(p: Problem, size: tuple[int, int], density: float, device: torch.device) -> torch.Tensor:
    """(B, H, blocks of queries, blocks of keys) bool."""
    blocks = -(-p.seqlen_q // size[0]), -(-p.seqlen_k // size[1])
    return torch.rand(p.batch, p.heads, *blocks, device=device) < density


def whole_blocks(chosen: torch.Tensor, size: tuple[int, int]) -> BlockLists:
    """Lists of these, none of them to be cut."""
    counts, order = as_lists(chosen)
    return BlockLists(torch.zeros_like(counts), order, counts, order, block_size=size)


def error(o: torch.Tensor, q, k, v, chosen: torch.Tensor, size: tuple[int, int]) -> float:
    """Of one head's output (Sq, D), relative, beside float64's."""

    def seen(b, h, q_idx, kv_idx):
        return chosen[q_idx // size[0], kv_idx // size[1]]

    true = reference.attention(*(x[None, None] for x in (q, k, v)), mask_mod=seen)[0][0, 0]
    return ((o.double() - true).norm() / true.norm()).item()


def entries(p: Problem, device: torch.device, timer: Timer) -> list[dict]:
    q, k, v = make_inputs(p, device)[:3]
    calls: dict[str, Callable[[], torch.Tensor]] = {"dense": partial(flash_fwd, q, k, v)}
    found: dict[str, dict[str, Any]] = {"dense": dict(density=1.0)}
    for size, density in product(SIZES, DENSITIES):
        chosen = chosen_blocks(p, size, density, device)
        name, last = f"{size[0]},{size[1]} {density}", (p.batch - 1, p.heads - 1)
        calls[name] = partial(flash_fwd, q, k, v, block_mask=whole_blocks(chosen, size))
        o = calls[name]()
        found[name] = dict(
            block_size=list(size),
            density=chosen.float().mean().item(),
            relative_error=error(o[last], q[last], k[last], v[last], chosen[last], size),
        )
    stats = compare(calls, timer=timer)
    dense, heads = stats["dense"].p50_us, p.batch * p.heads
    return [
        found[name] | dict(us=s.p50_us, spread=s.spread, us_per_head=s.p50_us / heads, times_dense=dense / s.p50_us)
        for name, s in stats.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    out = record_of("lists", __doc__, argv)
    found = entries(PROBLEM, torch.device("cuda"), CudaTimer())
    for entry in found:
        print(entry, flush=True)
    shape = f"{PROBLEM.batch},{PROBLEM.heads},{PROBLEM.seqlen_q},{PROBLEM.head_dim}"
    write_json(out, {**where(), "method": METHOD, "shape": shape, "entries": found})
    return 1 if any(entry.get("relative_error", 0.0) > ERROR_MAX for entry in found) else 0


if __name__ == "__main__":
    sys.exit(main())
