"""Varlen sequences of few queries, whose heads that share a K/V head fill one tile: varlen with PackGQA."""

from itertools import product

import pytest
import torch

from cute_attn import flash_fwd_varlen, plan, reference
from cute_attn.plan import HEAD_DIMS, FeatureKey, pack_gqa
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.attention import DTYPES
from tests.support.nightly import sample
from tests.support.requirements import interpreter
from tests.support.varlen import check, varlen_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ((1, 7), (3, 163), (0, 5), (4, 0), (2, 70), (4, 2))
MASKS = {"full": {}, "causal": dict(causal=True), "window": dict(window=(30, 1))}
RATIOS = (2, 3, 5, 8, 16, 40, 71)  # whole tiles, rows without a head, heads of the next K/V head behind, two packs
TESTED = [(ratio, mask) for ratio, mask in product(RATIOS, MASKS)]


def few(ratio, head_dim=64, dtype=torch.bfloat16, where="cpu", heads_kv=2, sizes=FEW, **how):
    """Heads of K/V that lie behind each other, with NaN in every row that is in no sequence."""
    *tensors, lengths = varlen_inputs(sizes, ratio * heads_kv, heads_kv, head_dim, dtype, where, **how)
    return *tensors, lengths | dict(max_seqlen_q=max(n for n, _ in sizes))


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("ratio", "mask"), [*((3, m) for m in MASKS), (8, "causal"), (71, "full")])
def test_interpreted(ratio, mask):
    with interpreted() as asked:
        check(*few(ratio, sizes=FEW[1:] if ratio < 71 else FEW[:2], slack=2), **MASKS[mask])
    assert all(config.varlen and config.pack == pack_gqa.pack_of(ratio) for config in asked)


@interpreter
@pytest.mark.machine_code
def test_what_else_is_asked_for():
    """A softcap, sinks, and each row's largest score, of all heads."""
    q, k, v, how = few(3, sizes=((3, 70), (1, 5)), margin=0)
    asked = dict(softcap=2.0, sinks=torch.linspace(-2, 2, q.shape[1]))
    with interpreted() as configs:
        o, lse, row_max = flash_fwd_varlen(q, k, v, **how, **asked, return_lse=True, return_row_max=True)
    assert all(config.pack == 4 for config in configs)
    lengths = how["cu_seqlens_q"], how["cu_seqlens_k"]
    for rows, want, *exact in reference.varlen(q, k, v, *lengths, return_row_max=True, dtype=torch.float64, **asked):
        assert (o[rows] - want).abs().max() < 0.02
        for ours, theirs in zip((lse, row_max), exact, strict=True):
            torch.testing.assert_close(ours[:, rows].double(), theirs, rtol=1e-5, atol=2e-5)


@interpreter
@pytest.mark.machine_code
def test_a_hint_that_is_too_small():
    """It chooses the tiles and nothing else."""
    q, k, v, how = few(4, sizes=((70, 90), (1, 3)))
    with interpreted() as asked:
        check(q, k, v, how | dict(max_seqlen_q=2), causal=True)
    assert all(config.pack == 4 and config.tile_m == 64 for config in asked)


def test_the_plan():
    """Few queries fill a tile with heads; many do not need to, nor does a score of one head's own."""
    for d, causal, ratio in product(HEAD_DIMS, (False, True), (2, 4, 7, 16, 71)):
        base = plan.varlen(d, "bf16", causal)
        assert plan.varlen(d, "bf16", causal, ratio=ratio) == base, "without a hint"
        assert plan.varlen(d, "bf16", causal, ratio=ratio, max_seqlen_q=4096) == base
        found = plan.varlen(d, "bf16", causal, ratio=ratio, max_seqlen_q=1)
        assert found.pack == pack_gqa.pack_of(ratio) and found.tile_m == 64 and not found.stages_o
        assert found.scheduler is base.scheduler
    assert plan.varlen(64, "bf16", True, FeatureKey(alibi=True), ratio=8, max_seqlen_q=1).pack == 1
    assert plan.varlen(64, "bf16", True, ratio=1, max_seqlen_q=1).pack == 1
    assert plan.varlen(64, "bf16", True, ratio=8, max_seqlen_q=0).pack == 1


REACHED = plan.prebuilt_varlen(ratio=8)[len(plan.prebuilt_varlen()) :]


@pytest.mark.machine_code
@pytest.mark.parametrize("config", sample(3, REACHED), ids=lambda config: config.name)
def test_healthy(config):
    assert config.pack == 8 and inspect.report(config).problems() == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("ratio", "mask"), TESTED)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 192, 256])
def test_right(head_dim, ratio, mask, dtype):
    long = ((4, 3000), (1, 1), (0, 9), (7, 0), (5, 1200), *[(1, 400)] * 40)
    check(*few(ratio, head_dim, dtype, "cuda", sizes=long, slack=1), **MASKS[mask])
    rows = ((40, 300), (33, 20), (1, 1000))  # more than 64 rows of a K/V head
    check(*few(ratio, head_dim, dtype, "cuda", sizes=rows), scale=-0.2, **MASKS[mask])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_as_without_a_hint(head_dim):
    """Where every row is whole, PackGQA changes no more than the order of sums."""
    q, k, v, how = few(8, head_dim, where="cuda", sizes=[(3, 900)] * 20, margin=0)
    hint = how.pop("max_seqlen_q")
    plain = flash_fwd_varlen(q, k, v, **how, causal=True)
    torch.testing.assert_close(
        flash_fwd_varlen(q, k, v, **how, causal=True, max_seqlen_q=hint), plain, atol=4e-3, rtol=0
    )
