"""Times lists of random blocks of keys beside the dense kernel, by density and by size of block.

python benchmarks/lists.py [--out FILE] [--only WORD]

bf16, B=16, H=96, S=4096, D=128; each head has lists of its own. The baseline is the dense kernel. Exit status 1 where
an output is wrong; 2 without a Hopper GPU.
"""

import sys
from functools import partial
from itertools import product

import torch
from script import main

from cute_attn import BlockLists, flash_fwd
from cute_attn.block_mask import as_lists
from cute_attn.plan import Problem
from cute_attn.tools.benchmark.cells import Truth
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import OURS, Inputs, make_inputs, plain
from cute_attn.tools.benchmark.workload import Spec, block_pairs

PROBLEM = Problem(16, 96, 96, 4096, 4096, 128)
DENSITIES, SIZES = (0.1, 0.017), ((128, 128), (192, 128))


def chosen_blocks(p: Problem, size: tuple[int, int], density: float, device: torch.device) -> torch.Tensor:
    """(B, H, blocks of queries, blocks of keys) bool."""
    blocks = -(-p.seqlen_q // size[0]), -(-p.seqlen_k // size[1])
    return torch.rand(p.batch, p.heads, *blocks, device=device) < density


def whole_blocks(chosen: torch.Tensor, size: tuple[int, int]) -> BlockLists:
    """Indices of these, all of them full."""
    counts, order = as_lists(chosen)
    return BlockLists(torch.zeros_like(counts), order, counts, order, block_size=size)


def sparse(x: Inputs, chosen: torch.Tensor, size: tuple[int, int], case: str) -> Row:
    def seen(b, h, q_idx, kv_idx):
        return chosen[b, h, q_idx // size[0], kv_idx // size[1]]

    p, density = x.problem, chosen.float().mean().item()
    pairs = block_pairs(chosen, size, p.seqlen_q, p.seqlen_k)
    spec = Spec(p, pairs=pairs, features=dict(block_size=list(size), density=density))
    calls = {OURS: plain(partial(flash_fwd, *x[:3], block_mask=whole_blocks(chosen, size)))}
    return Row(spec, calls, Truth(x, mask_mod=seen), case, "dense")


def rows(p: Problem, device: torch.device) -> list[Row]:
    x = make_inputs(p, device)
    dense = Row(Spec(p), {OURS: plain(partial(flash_fwd, *x[:3]))}, Truth(x), "dense", "dense")
    cases = {f"{size[0]},{size[1]} {density}": (size, density) for size, density in product(SIZES, DENSITIES)}
    return [dense, *(sparse(x, chosen_blocks(p, *how, device), how[0], case) for case, how in cases.items())]


if __name__ == "__main__":
    sys.exit(main("lists", __doc__, {"lists": partial(rows, PROBLEM)}))
