"""The plan's exceptions, measured: how many bytes ptxas spills in the kernels that need one, with it and without it.

python -m tests.host.exceptions [--update] [--only WORD]... [--most N]

For each entry of cute_attn/plan/exceptions.json it compiles kernels that calls reach, as they would be without that
entry, and prints what they spill. --update puts the counts into the file, beside those of other versions of the DSL and
of ptxas. Needs no GPU; about 3 s a kernel.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple

import cutlass
import torch

from cute_attn import compile, plan
from cute_attn.kernels.config import FwdConfig, SparseBlocks
from cute_attn.mods import prepare
from cute_attn.plan import FeatureKey, Problem, exceptions
from cute_attn.plan.exceptions import Entry
from cute_attn.tools import inspect

FILE = Path(exceptions.__file__).with_name("exceptions.json")
HEAD_DIMS = (*plan.EQUAL_HEAD_DIMS, *[(a, b) for a, b in product(plan.HEAD_DIMS, repeat=2) if a < b <= 128], (192, 128))
# many tiles; several heads to a tile; varlen, and several heads to a tile of it
SIZES = ((2, 12, 12, 3000, 3000), (32, 32, 8, 64, 4096), (1, 1, 1, 0, 1), (1, 4, 1, 70, 1))
bias, document = torch.zeros(4, 100, 100, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.int32)


def distance(score, b, h, q_idx, kv_idx):
    return score - (q_idx - kv_idx)


def biased(score, b, h, q_idx, kv_idx):
    return score + bias[h, q_idx, kv_idx]


def nearby(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 100


def documents(b, h, q_idx, kv_idx):
    return document[q_idx] == document[kv_idx]


class Case(NamedTuple):
    """A kernel that needs an exception, and what it would be without."""

    features: int  # asked for: the fewer, the more calls it stands for
    kernel: FwdConfig
    without: FwdConfig


def feature_keys() -> Iterator[FeatureKey]:
    """Every set of up to three features, the functions with and without a tensor that they read."""
    asked: dict[str, list] = {name: [True] for name in ("window", "softcap", "alibi", "sinks", "row_max", "dropout")}
    asked |= dict(score_mod=[prepare("score_mod", f, ()).kernel for f in (biased, distance)])
    asked |= dict(mask_mod=[prepare("mask_mod", f, ()).kernel for f in (documents, nearby)])
    asked |= dict(sparse=[SparseBlocks(192, 128, True)])
    for some in chain.from_iterable(combinations(asked, n) for n in range(4)):
        for values in product(*(asked[name] for name in some)):
            yield FeatureKey(**dict(zip(some, values, strict=True)))


def problems() -> Iterator[Problem]:
    for kind, size, (d, d_v), causal in product(feature_keys(), SIZES, HEAD_DIMS, (False, True)):
        varlen = size[3] * size[4] < 100
        if not (varlen and kind.sparse):
            yield Problem(*size, d, "bf16", "thd" if varlen else "bhsd", causal, features=kind, head_dim_v=d_v)


@contextlib.contextmanager
def without(entry: Entry) -> Iterator[None]:
    """Plans are made as if there were no such entry."""
    rest = tuple(x for x in exceptions.entries() if x != entry)
    whole, exceptions.entries = exceptions.entries, lambda: rest
    try:
        yield
    finally:
        exceptions.entries = whole


@lru_cache(maxsize=1)
def cases() -> dict[str, list[Case]]:
    """Of each exception, by its name: the kernels of its last changes, those with the fewest features first."""
    found: dict[str, dict[FwdConfig, Case]] = {entry.name: {} for entry in exceptions.entries()}
    for problem in problems():
        with contextlib.suppress(AssertionError):  # features that exclude each other
            steps = plan.explain(problem)
            names = {step.name for step in steps}
            for entry in (x for x in exceptions.entries() if x.title in names):
                with without(entry):
                    config = plan.explain(problem)[-1].config
                if entry.matches(config):
                    case = Case(sum(map(bool, problem.features)), steps[-1].config, config)
                    found[entry.name].setdefault(config, case)
    return {name: sorted(those.values(), key=lambda case: case.features) for name, those in found.items()}


def spilled(config: FwdConfig) -> int:
    """Bytes that ptxas stores."""
    with compile.lock, contextlib.redirect_stderr(io.StringIO()) as log:
        compile.compile(config, options="remarks{ptx}")
    return inspect.spill_stores(log.getvalue())


def measure(entry: Entry, most: int) -> dict:
    """Of about so many kernels without the entry how many spill, and the worst of them."""
    found = []
    for case in some(cases()[entry.name], most):
        found.append((spilled(case.without), case.without.name))
        print("  {:4} bytes {}".format(*found[-1]), flush=True)
    spilled_bytes, worst = max(found, key=lambda each: each[0])
    counts = dict(kernels=len(found), spilled=sum(count > 0 for count, _ in found), spilled_bytes=spilled_bytes)
    return version() | counts | (dict(worst=worst) if spilled_bytes else {})


def some(those: list[Case], most: int) -> list[Case]:
    """The first of them, and as many from all over the rest."""
    first, rest = those[: most // 2], those[most // 2 :]
    return first + rest[:: max(1, -(-len(rest) // (most - most // 2)))]


def version() -> dict[str, str]:
    cuda = cutlass.CUDA_VERSION
    return dict(cutlass_dsl=cutlass.__version__, ptxas=f"{cuda.major}.{cuda.minor}")


def written(entries: list[dict]) -> str:
    """One line for each part of an entry."""
    parts = [",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in entry.items()) for entry in entries]
    return "[\n" + ",\n".join("{\n" + part + "\n}" for part in parts) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="put the counts into exceptions.json")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="entries whose name has one of these")
    parser.add_argument("--most", type=int, default=16, metavar="N", help="kernels for each entry; default 16")
    arguments = parser.parse_args()
    entries = json.loads(FILE.read_text())
    for entry in entries:
        if not any(word in entry["name"] for word in arguments.only):
            continue
        print(entry["name"], f"of {len(cases()[entry['name']])} kernels")
        found = measure(next(x for x in exceptions.entries() if x.name == entry["name"]), arguments.most)
        others = [x for x in entry["measured"] if version().items() - x.items()]
        entry["measured"] = sorted([*others, found], key=lambda x: (x["cutlass_dsl"], x["ptxas"]))
        if arguments.update:
            FILE.write_text(written(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
