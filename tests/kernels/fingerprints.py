"""Fingerprints of machine code: the PTX of a kernel of each combination of features that a call can reach.

python tests/kernels/fingerprints.py [--update] [--only WORD]...

A refactoring leaves them as they are. Compares with fingerprints.json, some 10 minutes on two cores, and exits with 1
where any differs; --update writes the file anew, for a change that alters machine code on purpose, or another DSL.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain, combinations, product
from pathlib import Path

import cutlass

from cute_attn import compile
from cute_attn.kernels.config import FwdConfig, SparseBlocks
from cute_attn.kernels.decode_plan import DecodePlanConfig
from cute_attn.kernels.mask import CausalOfEach, WindowOfEach
from cute_attn.kernels.merge_sm90 import ELEMENTS, LSE_LAYOUTS, MergeConfig
from cute_attn.kernels.registry import KernelConfig
from cute_attn.mods import prepare
from cute_attn.plan import EQUAL_HEAD_DIMS, FeatureKey, Problem, kvcache, plan, prebuilt, prebuilt_varlen, varlen
from cute_attn.tools.benchmark.ablation import configs as stages

GOLDEN = Path(__file__).parent / "fingerprints.json"
SIZES = ((2, 12, 12, 3000, 3000), (1, 8, 8, 512, 512), (2, 32, 4, 8, 1000))  # many tiles, few, several heads to a tile
HEAD_DIMS = ((64, 0), (128, 0), (320, 0), (192, 128))  # four warpgroups, three, two that share rows, a pair
COMMENT = re.compile(r"//.*")


def distance(score, b, h, q_idx, kv_idx):
    return score - (q_idx - kv_idx)


def nearby(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 100


def feature_keys() -> Iterator[FeatureKey]:
    """Every set of features that a call can ask for at once, each with a value of its own."""
    asked = dict(
        window=True,
        softcap=True,
        alibi=True,
        sinks=True,
        score_mod=prepare("score_mod", distance, ()).kernel,
        mask_mod=prepare("mask_mod", nearby, ()).kernel,
        sparse=SparseBlocks(128, 128, True),
        row_max=True,
        dropout=True,
    )
    for some in chain.from_iterable(combinations(asked, n) for n in range(len(asked) + 1)):
        yield FeatureKey(**{name: asked[name] for name in some})


def cache_feature_keys() -> Iterator[FeatureKey]:
    """Of a K/V cache: each feature, and some together."""
    one = [key for key in feature_keys() if len(key) <= 1]
    yield from (key for key in one if not (key.sparse or key.row_max or key.dropout))
    yield FeatureKey(causal_of_each=CausalOfEach())
    yield FeatureKey(window=True, causal_of_each=WindowOfEach())
    yield FeatureKey(softcap=True, alibi=True, sinks=True)
    yield FeatureKey(window=True, softcap=True, sinks=True)


def planned() -> Iterator[FwdConfig]:
    """The kernels of all calls, as far as they may differ in more than their sizes."""
    yield from prebuilt(ratio=8, dims=(*EQUAL_HEAD_DIMS, *HEAD_DIMS[2:], (64, 512)))
    yield from prebuilt_varlen(ratio=8)
    for (d, d_v), asked, causal in product(HEAD_DIMS, feature_keys(), (False, True)):
        for size, constant in product(SIZES, (False, True)):
            how = dict(causal=causal, constant_time=constant, features=asked, head_dim_v=d_v)
            yield from legal(lambda size=size, d=d, how=how: plan(Problem(*size, d, **how)))
        yield from legal(lambda d=d, causal=causal, asked=asked, d_v=d_v: varlen(d, "bf16", causal, asked, None, d_v))
    for (d, d_v), asked, causal in product(HEAD_DIMS, cache_feature_keys(), (False, True)):
        for longest, page, batch in product((1, 12, 4096), (None, 1, 16), (1, 40, 200)):
            how = d, "bf16", causal, asked, None, d_v, 8, longest, page, batch
            yield from legal(lambda how=how: kvcache(*how))
            if not asked:
                yield from legal(lambda how=how: replace(kvcache(*how), planned=True))
    for causal in (False, True):
        yield from stages(Problem(4, 16, 16, 2048, 2048, 64, causal=causal))
        yield replace(plan(Problem(4, 16, 16, 2048, 2048, 64, causal=causal)), timeline=True)


def legal(make: Callable[[], FwdConfig]) -> Iterator[FwdConfig]:
    """None where the features exclude each other: a call that asks for them is refused before it is planned."""
    try:
        yield make()
    except AssertionError:
        return


def combination(c: FwdConfig) -> tuple:
    """Which features a kernel is made of."""
    sparse = "sparse" if c.sparse else ""
    return (
        *(schedule(c), c.timeline, c.head_dim_splits > 1, bool(c.score.name), c.sinks, c.dropout, c.row_max),
        *(c.mask.windowed and not c.sparse, c.diagonal_first, sparse, c.varlen, c.pack > 1),
        *(c.cache and (c.cache.paged, c.cache.gathers), c.mask.of_each),
        *(c.shares, c.row_blocks > 1 and c.shares, c.fixup, c.ctas, c.planned),
    )


def schedule(c: FwdConfig) -> str:
    if c.split > 1:
        return "split"
    if not c.overlap:
        return "serial"
    return "constant" if c.constant_time else "speculative" if c.speculative else "lazy"


def values(c: FwdConfig) -> tuple:
    """Which mask and score it has."""
    return c.mask.name, c.score.name, c.diagonal_first, schedule(c)


def tiles(c: FwdConfig) -> tuple:
    """How its tiles come and go."""
    rings = c.q_stages > 1, c.q_in_regs, c.stages_o, bool(c.registers)
    return (c.warpgroups, c.head_dim_splits, c.cluster, c.scheduler.name, c.pingpong, schedule(c), *rings)


@lru_cache(maxsize=1)
def chosen() -> dict[str, KernelConfig]:
    """The first kernel of each combination, of each mask and score, and of each way of its tiles; all merges."""
    seen: set[tuple] = set()
    found = {}
    for config in dict.fromkeys(planned()):
        new = {view(config) for view in (combination, values, tiles)} - seen
        if new:
            seen |= new
            found[named(config)] = config
    return found | {config.name: config for config in (*merges(), *decode_plans(found.values()))}


def decode_plans(found: Iterable[KernelConfig]) -> Iterator[DecodePlanConfig]:
    """One for each mask, with pages and without, and number of rows."""
    cached = [c for c in found if isinstance(c, FwdConfig) and c.shares and c.score.name == ""]
    first = {(c.mask.name, c.cache and c.cache.paged, c.tile_m): c for c in reversed(cached)}
    yield from (DecodePlanConfig(replace(config, planned=True)) for config in first.values())


def merges() -> Iterator[MergeConfig]:
    """Of every type and layout, of as many states as usual and of a stack."""
    yield from (MergeConfig(*kind) for kind in product(ELEMENTS, LSE_LAYOUTS, (0, 2)))


def named(c: FwdConfig) -> str:
    """By all that its machine code depends on, and `FwdConfig.name` leaves out."""
    turns = ("" if c.pingpong else " no ping-pong") + ("" if c.overlap else " serial")
    return f"{c.name} {c.layout} {c.stages} stages {c.q_stages} of q{' in registers' if c.q_in_regs else ''}{turns}"


def fingerprint(config: KernelConfig) -> str:
    """Of the PTX without comments and without the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        with compile.lock:  # nobody runs the machine code
            compile.compile(config, f"--keep-ptx --dump-dir {folder} --ptxas-options -O1")
        (path,) = Path(folder).glob("*.ptx")
        ptx = COMMENT.sub("", path.read_text()).replace(config.name, "kernel")
    return hashlib.sha256(ptx.encode()).hexdigest()


def known() -> dict[str, str]:
    """By the file; ValueError where another DSL wrote it."""
    golden = json.loads(GOLDEN.read_text())
    if golden["cutlass_dsl"] != cutlass.__version__:
        raise ValueError(f"{GOLDEN.name}: of nvidia-cutlass-dsl {golden['cutlass_dsl']}, here is {cutlass.__version__}")
    return golden["kernels"]


def different(found: dict[str, str], golden: dict[str, str]) -> list[str]:
    """What a run says of each kernel that is not as the file has it."""
    changed = [f"{name}: its PTX is another" for name, x in found.items() if golden.get(name, x) != x]
    return changed + [f"{name}: is not in {GOLDEN.name}" for name in found if name not in golden]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write fingerprints.json anew")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="kernels whose name has one of these words")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th of them")
    arguments = parser.parse_args()
    configs = chosen()
    if arguments.only:
        configs = {name: c for name, c in configs.items() if any(word in name for word in arguments.only)}
    configs = dict(list(configs.items())[:: arguments.every])
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(configs, pool.imap(fingerprint, configs.values()), strict=True))
    whole = not arguments.only and arguments.every == 1
    if arguments.update:
        rest = {} if whole else {name: x for name, x in known().items() if name in chosen()}
        golden = dict(cutlass_dsl=cutlass.__version__, kernels=rest | found)
        GOLDEN.write_text(json.dumps(golden, indent=0, sort_keys=True) + "\n")
    said = different(found, known())
    print(*said, f"{len(found)} kernels, {len(said)} others than in {GOLDEN.name}", sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
