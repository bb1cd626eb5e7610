"""Times attention over K/V caches, as serving asks for it, beside FlashAttention-2, -3, -4, cuDNN and FlashInfer.

python benchmarks/serving.py [--out FILE] [--only WORD] [--rounds N]

bf16: decode over dense caches, over pages and of ragged lengths; chunks of a causal prefill. CUDA-graph replays, with K
and V from memory: consecutive calls take copies of them in turn. Exit status 1 where an output is wrong; 2 without a
Hopper GPU.
"""

import sys
from functools import cache, partial
from itertools import product

import torch
from caches import COLD_BYTES, MOST_SETS, CacheSpec, CacheTruth, build, over_keys, random_lengths
from script import absent, main
from serving_implementations import IMPLEMENTATIONS

from cute_attn.tools.benchmark import frame
from cute_attn.tools.benchmark.frame import Row
from cute_attn.tools.benchmark.implementations import CuteAttn
from cute_attn.tools.benchmark.timing import GRAPH_US, METHOD

K = 1024
MOST_BYTES = 60e9  # of K and V
GQA = (64, 8), (32, 8)
HEADS = (*GQA, (8, 8), (128, 1))
KEYS, BATCHES = (K, 8 * K, 32 * K), (1, 32, 128)
SEQUENCES, CHUNK = 64, 2 * K


def decode() -> list[CacheSpec]:
    """One new token, then several, then one at other head dims."""
    one = product((1, 8, 32, 128, 256), HEADS, (1,), (*KEYS, 128 * K))
    several = product((1, 32), GQA, (2, 4, 8), KEYS)
    dims = [
        (*cell, d) for heads, d in (((64, 8), 64), ((32, 8), 256)) for cell in product(BATCHES, [heads], (1,), KEYS)
    ]
    every = [over_keys(*cell) for cell in (*one, *several, *dims)]
    return [spec for spec in every if spec.kv_bytes <= MOST_BYTES]


def paged() -> list[CacheSpec]:
    cells = product((1, 16, 64, 256), KEYS, BATCHES)
    return [over_keys(batch, (64, 8), 1, keys, page=page) for page, keys, batch in cells]


def ragged() -> list[CacheSpec]:
    lengths = random_lengths(SEQUENCES)
    return [over_keys(SEQUENCES, (64, 8), 1, lengths, page=page) for page in (0, 64, 4, 1)]


def chunk() -> list[CacheSpec]:
    """Causal prefill of so many new tokens over keys that theirs are among."""
    cells = product((0, 16, 64, 128, 256), GQA, KEYS[1:], (1, 4))
    return [over_keys(batch, heads, CHUNK, keys, page=page) for page, heads, keys, batch in cells]


CELLS = {"decode": decode(), "paged": paged(), "ragged": ragged(), "chunk": chunk()}


def name(case: str, spec: CacheSpec) -> str:
    p, keys = spec.problem, spec.shape.rpartition(",")[2]
    where = f"page {p.page}" if p.page else "dense"
    return f"{case} {p.heads}/{p.heads_kv} d{p.head_dim} B{p.batch} Sq{p.seqlen_q} Sk{keys} {where}"


@cache
def missing() -> dict[str, str]:
    """Who is not on this machine."""
    return absent(IMPLEMENTATIONS)


def rows(case: str, spec: CacheSpec, device: torch.device) -> list[Row]:
    caches = build(spec, device)
    reasons = {one.name: one.refuses(spec) for one in IMPLEMENTATIONS} | missing()
    return [
        Row(
            spec,
            {one.name: partial(one.prepare, caches) for one in IMPLEMENTATIONS},
            CacheTruth(caches),
            case,
            baseline="fa3",
            absent={name: reason for name, reason in reasons.items() if reason},
            sets=spec.sets,
        )
    ]


class Run(frame.Run):
    method = METHOD | {
        "inputs": f"random normal, the same for every implementation; K and V in `sets` copies, of at least "
        f"{COLD_BYTES / 1e6:g} MB together but at most {MOST_SETS}, which consecutive calls take in turn",
        "graph": f"CUDA-graph replays of whole rounds over the sets, about {GRAPH_US / 1000:g} ms; per call",
    }


GROUPS = {name(case, spec): partial(rows, case, spec) for case, specs in CELLS.items() for spec in specs}

PEERS = [one for one in IMPLEMENTATIONS if not isinstance(one.package, CuteAttn)]

if __name__ == "__main__":
    sys.exit(main("serving", __doc__, GROUPS, make=Run, baselines=PEERS, lengths=random_lengths(SEQUENCES)))
