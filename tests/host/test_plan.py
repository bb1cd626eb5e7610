"""The plan, without a GPU: every problem gets a kernel that serves it, and the prebuilt list has them all."""

import dataclasses
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cute_attn import plan as room
from cute_attn.kernels.config import SMEM_BYTES, FwdConfig, KvCache, SparseBlocks
from cute_attn.kernels.grid_split import EqualShares
from cute_attn.kernels.mask import Causal, Window
from cute_attn.kernels.score import Alibi, Softcap
from cute_attn.kernels.tile_scheduler import DynamicLongest, OneTile, StaticTiles
from cute_attn.kernels.varlen_scheduler import VarlenScheduler
from cute_attn.plan import FeatureKey, Problem, kvcache, plan, prebuilt
from tests.host import plans

PROBLEMS = st.builds(
    Problem,
    batch=st.integers(1, 9),
    heads=st.just(8),
    heads_kv=st.sampled_from([1, 2, 8]),
    seqlen_q=st.integers(1, 20_000),
    seqlen_k=st.integers(1, 20_000),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(["bf16", "fp16"]),
    layout=st.sampled_from(["bhsd", "bshd"]),
    causal=st.booleans(),
    constant_time=st.booleans(),
    features=st.sampled_from([FeatureKey(), FeatureKey(window=True)]),
    head_dim_v=st.just(0),
    page=st.none(),
)
CACHED = st.builds(
    kvcache,
    head_dim=st.integers(1, 64).map(lambda n: 8 * n),
    dtype=st.sampled_from(["bf16", "fp16"]),
    causal=st.booleans(),
    ratio=st.sampled_from([1, 2, 3, 8, 71]),
    max_seqlen_q=st.none() | st.integers(0, 5000),
    page_size=st.none() | st.integers(1, 300),
)


every_kernel = lru_cache(lambda ratio: set(prebuilt(ratio=ratio)))


@given(problem=PROBLEMS)
def test_a_kernel_that_serves_the_problem_and_is_prebuilt(problem):
    config = plan(problem)
    assert config.head_dim >= problem.head_dim
    assert config.head_dim - problem.head_dim < 32
    assert (config.dtype, config.layout) == (problem.dtype, problem.layout)
    assert config.mask.name == ("window" if problem.features.window else "causal" if problem.causal else "full")
    assert config.constant_time == problem.constant_time
    assert config in every_kernel(problem.ratio)


def test_problems_have_the_kernels_that_they_had():
    assert plans.different() == [], "on purpose? python -m tests.host.plans --update"


def test_every_head_dim():
    for head_dim in range(8, 257, 8):
        assert plan(Problem(1, 1, 1, 128, 128, head_dim)).head_dim in room.HEAD_DIMS


def test_prebuilt_kernels_are_distinct_by_name_dtype_and_layout():
    configs = prebuilt()
    assert len(set(configs)) == len(configs)
    assert all(c.smem_bytes <= SMEM_BYTES for c in configs)
    assert all(c.dtype in c.name and f"d{c.head_dim}" in c.name and c.mask.name in c.name for c in configs)


def test_uneven_tiles_have_a_dynamic_scheduler():
    """256 rows a tile: 600 queries leave warpgroups of the third tile without rows, 760 do not."""
    assert plan(Problem(16, 16, 16, 600, 512, 64)).scheduler is DynamicLongest
    assert plan(Problem(16, 16, 16, 760, 512, 64)).scheduler is StaticTiles
    assert plan(Problem(16, 16, 16, 64 * 256 + 1, 512, 64)).scheduler is StaticTiles


def test_few_tiles_reach_more_sms():
    """At most 132 tiles: smaller ones, and keys split over a cluster, where there are enough of them."""
    for heads, seqlen_k, tile_m, split in ((64, 512, 64, 2), (24, 1024, 64, 4), (8, 8192, 64, 8), (64, 128, 64, 1)):
        config = plan(Problem(1, heads, heads, 64, seqlen_k, 64))
        assert (config.tile_m, config.split) == (tile_m, split), (heads, seqlen_k)
        assert heads * config.split <= 132
    assert plan(Problem(1, 264, 264, 64, 512, 64)).tile_m == 128
    assert plan(Problem(1, 265, 265, 64, 512, 64)).tile_m == 256


@given(config=CACHED)
def test_a_cache_kernel_for_whatever_comes(config):
    """TMA has a lane for each box, and boxes of one row end at 128 bytes."""
    assert config.cache and config.cache_boxes <= 32
    assert config.cache.box > 1 or config.head_dim % 64 == 0 == config.columns_v % 64
    assert config.smem_bytes <= SMEM_BYTES


def test_the_config_is_the_compile_key():
    """Each field makes another key, and prints, since the disk cache's key is the printed config."""
    base = FwdConfig(128)
    others = dict(dtype="fp16", layout="bshd", mask=Causal(), tile_m=192, tile_n=64, stages=1, scheduler=DynamicLongest)
    others |= dict(head_dim=64, pingpong=False, q_in_regs=True, cluster=2, q_stages=2, split=2, speculative=True)
    others |= dict(constant_time=True, timeline=True, overlap=False)
    others |= dict(score=Softcap(), sinks=True, dropout=True, row_max=True, sparse=SparseBlocks(128, 128, True), pack=8)
    others |= dict(head_dim_v=64, cache=KvCache(64), fixup=True, ctas=2, planned=True)
    assert set(others) == {field.name for field in dataclasses.fields(FwdConfig)}
    few = FwdConfig(128, tile_m=64, scheduler=OneTile)  # the kind of kernel that may split its keys
    varlen = FwdConfig(128, layout="thd", scheduler=VarlenScheduler)
    shares = dataclasses.replace(varlen, tile_m=64, tile_n=64, stages=1, scheduler=EqualShares, cache=KvCache(64))
    bases = dict.fromkeys(others, base) | dict(split=few, cache=varlen, fixup=shares, ctas=shares, planned=shares)
    configs = [
        base,
        few,
        varlen,
        shares,
        *(dataclasses.replace(bases[name], **{name: value}) for name, value in others.items()),
    ]
    assert len({repr(c) for c in configs}) == len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    "fields",
    [
        dict(head_dim=520),
        dict(head_dim=72),
        dict(head_dim=64, tile_m=96),
        dict(head_dim=64, tile_m=320),
        dict(head_dim=64, tile_m=64, split=2),
        dict(head_dim=64, tile_m=128, split=2, scheduler=OneTile),
        dict(head_dim=256, tile_m=64, tile_n=64, split=8, scheduler=OneTile),
        dict(head_dim=64, speculative=True, q_in_regs=True),
        dict(head_dim=64, speculative=True, overlap=False),
        dict(head_dim=64, speculative=True, tile_m=64, split=2, scheduler=OneTile),
        dict(head_dim=64, tile_n=24),
        dict(head_dim=64, dtype="fp8"),
        dict(head_dim=256, tile_n=128),
        dict(head_dim=64, cluster=4),
        dict(head_dim=64, constant_time=True, speculative=True),
        dict(head_dim=64, mask=Window(), overlap=False),
        dict(head_dim=64, mask=Window(), tile_m=64, scheduler=OneTile, split=2),
        dict(head_dim=64, tile_m=64, scheduler=OneTile, split=2, timeline=True),
        dict(head_dim=64, pack=3),
        dict(head_dim=64, pack=128),
        dict(head_dim=64, pack=8, score=Alibi()),
        dict(head_dim=64, pack=8, sparse=SparseBlocks(128, 128, True)),
        dict(head_dim=64, head_dim_v=64),
        dict(head_dim=64, head_dim_v=520),
        dict(head_dim=64, head_dim_v=288, tile_m=64),
        dict(head_dim=64, head_dim_v=512),
        dict(head_dim=64, head_dim_v=512, tile_m=64, scheduler=OneTile, split=2),
        dict(head_dim=64, head_dim_v=512, tile_m=64, speculative=True),
        dict(head_dim=64, head_dim_v=512, tile_m=64, pack=8),
    ],
    ids=str,
)
def test_impossible_configs(fields):
    with pytest.raises(AssertionError):
        FwdConfig(**fields)


def test_planning_needs_no_torch():
    """In a process where torch cannot be imported, and without the package's __init__, which imports it."""
    init = str(Path(room.__file__).parents[1] / "__init__.py")
    code = (
        "import sys, importlib.util as u\n"
        "sys.modules['torch'] = None\n"
        f"sys.modules['cute_attn'] = u.module_from_spec(u.spec_from_file_location('cute_attn', {init!r}))\n"
        "from cute_attn.plan import Problem, plan, prebuilt\n"
        "print(plan(Problem(16, 16, 16, 600, 600, 64)).scheduler.name, len(prebuilt()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["drawn", str(len(prebuilt()))]


# The rules


def test_each_rule_has_a_name_and_a_reason():
    assert len({rule.name for rule in room.RULES}) == len(room.RULES) >= 20
    assert all(rule.why for rule in room.RULES)


@given(problem=PROBLEMS)
def test_explain_ends_with_the_plan(problem):
    """Each step is a rule or an exception that changed something, in the order of the list."""
    first, *steps = room.explain(problem)
    assert [first, *steps][-1].config == plan(problem)
    assert first.name == "the tuned table"
    for before, step in zip([first, *steps], steps, strict=False):
        assert room.changes(before.config, step.config)
    names = [rule.name for rule in room.RULES]
    order = [names.index(step.name) for step in steps if not step.name.startswith("exception: ")]
    assert order == sorted(set(order))


def explained(*sizes, layout="bhsd", **how):
    return [step.name for step in room.explain(Problem(*sizes, layout=layout, **how))[1:]]


def test_what_explain_says():
    many = 2, 16, 16, 4096, 4096
    assert explained(*many, 64) == []
    assert explained(*many, 100, head_dim_v=200, dtype="fp16") == ["a pair of head dims", "element type and layout"]
    assert explained(*many, 64, features=FeatureKey(window=True)) == [
        "window",
        "exception: d64, window: no speculative softmax",
    ]
    assert explained(*many, 96, features=FeatureKey(softcap=True, row_max=True, sinks=True)) == [
        *("scores and mask_mod: fit registers", "scores: speculative softmax", "scores: three stages"),
        *("sinks", "row_max"),
    ]
    assert explained(1, 32, 4, 1, 8192, 96, constant_time=True) == [
        *("constant time", "few rows", "few rows: split keys", "PackGQA")
    ]
    assert explained(1, 8, 1, 1, 1, 256, layout="thd", causal=True) == ["varlen", "few rows", "PackGQA"]
    assert room.explain(Problem(*many, 512))[0].name == "large head dims"


def test_varlen_is_a_problem_of_its_own_layout():
    key = FeatureKey(softcap=True)
    found = plan(Problem(1, 8, 1, 3, 1, 64, layout="thd", causal=True, features=key))
    assert found == room.varlen(64, "bf16", True, key, ratio=8, max_seqlen_q=3) and found.pack == 8


@pytest.mark.parametrize("dims", [(128, 0), (64, 128), (96, 128)], ids=str)
def test_lists_of_192_rows_with_window_and_softcap(dims):
    """Their blocks of 64 keys are no whole number of blocks of 48."""
    key = FeatureKey(window=True, softcap=True, sparse=SparseBlocks(192, 128, True))
    found = plan(Problem(2, 12, 12, 3000, 3000, dims[0], features=key, head_dim_v=dims[1]))
    assert (found.tile_m, found.tile_n, found.sparse) == (192, 64, key.sparse)
