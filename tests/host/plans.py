"""Which kernel each of many problems gets: `plans.json` has, for each pair of head dims and mask, a digest of them all.

python -m tests.host.plans [--update]

A refactoring leaves them as they are. Prints the classes of problems whose kernels are others than in the file, and
exits with 1 if there are any; --update writes the file anew, for another table or a rule that changed on purpose.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import chain, combinations, product
from pathlib import Path

from cute_attn.kernels.config import SparseBlocks
from cute_attn.mods import prepare
from cute_attn.plan import EVERY_HEAD_DIM, FeatureKey, Problem, plan
from tests.kernels.fingerprints import distance, named, nearby

GOLDEN = Path(__file__).parent / "plans.json"
PAIRS = ((32, 64), (96, 128), (128, 96), (192, 128), (64, 512))
CLASSES = [*product([*((d, 0) for d in EVERY_HEAD_DIM), *PAIRS], (False, True))]
MANY, FEW, SHARED = (2, 12, 12, 3000, 3000), (1, 8, 8, 64, 1024), (2, 32, 4, 8, 1000)
VARLEN = (1, 1, 1, 0, 1), (1, 8, 1, 3, 1)


def feature_keys() -> Iterator[FeatureKey]:
    """Each set of up to three features."""
    asked = dict.fromkeys(("window", "softcap", "alibi", "sinks", "row_max", "dropout"), True)
    asked["score_mod"] = prepare("score_mod", distance, ()).kernel
    asked["mask_mod"] = prepare("mask_mod", nearby, ()).kernel
    for some in chain.from_iterable(combinations(asked, n) for n in range(4)):
        yield FeatureKey(**{name: asked[name] for name in some})
    for blocks, dropout in product(((64, 64), (128, 192), (192, 128)), (False, True)):
        yield FeatureKey(sparse=SparseBlocks(*blocks, True), dropout=dropout)


def problems(head_dim: int, head_dim_v: int, causal: bool) -> Iterator[Problem]:
    """With each set of features; the plain one also of other lengths, batches and heads."""
    how = dict(causal=causal, head_dim_v=head_dim_v)
    for key, constant in product(feature_keys(), (False, True)):
        for size in (MANY, FEW, SHARED) if not (key.sparse and constant) else ():
            yield Problem(*size, head_dim, constant_time=constant, features=key, **how)
        for size in VARLEN if not (key.sparse or constant) else ():
            yield Problem(*size, head_dim, layout="thd", features=key, **how)
    for b, (h, h_kv), (q, k) in product(
        (1, 4, 32), ((1, 1), (8, 8), (32, 4)), ((1, 8192), (16, 500), (64, 2048), (600, 600), (4096, 4096))
    ):
        yield Problem(b, h, h_kv, q, k, head_dim, "fp16", "bshd", **how)


def digest(head_dim: int, head_dim_v: int, causal: bool) -> str:
    """Of the kernels of a class of problems."""
    names = [named(plan(problem)) for problem in problems(head_dim, head_dim_v, causal)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def found() -> dict[str, str]:
    words = {False: "full", True: "causal"}
    return {f"d{d}{f'v{d_v}' if d_v else ''} {words[causal]}": digest(d, d_v, causal) for (d, d_v), causal in CLASSES}


def different() -> list[str]:
    """The classes with a problem whose kernel is another than in the file."""
    golden, now = json.loads(GOLDEN.read_text()), found()
    return sorted(name for name in golden.keys() | now.keys() if golden.get(name) != now.get(name))


if __name__ == "__main__":
    if "--update" in sys.argv:
        GOLDEN.write_text(json.dumps(found(), indent=0) + "\n")
    changed = different()
    print(*changed, f"{len(changed)} classes of problems have other kernels than in {GOLDEN.name}", sep="\n")
    sys.exit(bool(changed))
