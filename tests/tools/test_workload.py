"""What a benchmark's row says of its work: pairs by brute force, bytes and rooflines by hand."""

from itertools import product

import pytest
import torch

from cute_attn.plan import Problem
from cute_attn.tools.benchmark.edges import visible
from cute_attn.tools.benchmark.workload import Roofline, Spec, Workload, block_pairs, mask_pairs

CPU = torch.device("cpu")
LENGTHS = [(1, 1), (1, 40), (40, 1), (24, 24), (9, 31), (31, 9)]


def problem(seqlen_q, seqlen_k, causal=False, **how):
    return Problem(2, 6, 2, seqlen_q, seqlen_k, 16, causal=causal, **how)


def counted(seqlen_q, seqlen_k, causal, window=None):
    return int(visible(seqlen_q, seqlen_k, causal, CPU, window).sum())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(None, None), (0, 0), (3, 0), (5, 2), (None, 4), (7, None), (100, 100)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pairs_are_counted(lengths, window, causal):
    spec = Spec(problem(*lengths, causal), window)
    assert spec.visible() == 2 * 6 * counted(*lengths, causal, window)
    assert spec.workload().flops == 4 * 16 * spec.visible()
    assert Spec(problem(*lengths, causal, head_dim_v=48), window).workload().flops == 2 * (16 + 48) * spec.visible()


@pytest.mark.parametrize("window", [(None, None), (3, 0)])
def test_pairs_of_packed_sequences_are_those_of_each(window):
    spec = Spec(problem(40, 40, True), window, tuple(LENGTHS))
    assert spec.visible() == 6 * sum(counted(*lengths, True, window) for lengths in LENGTHS)
    rows, keys = (sum(n) for n in zip(*LENGTHS, strict=True))
    if window[0] is None:
        assert spec.workload().bytes == 2 * (2 * 6 * 16 * rows + 2 * 2 * 16 * keys) + 4 * 6 * rows


def test_pairs_of_blocks_and_of_masks():
    p = problem(70, 50)
    chosen = torch.rand(2, 6, 3, 2, generator=torch.Generator().manual_seed(0)) < 0.5  # blocks of (32, 48)

    def mask(b, h, q_idx, kv_idx):
        return chosen[b, h, q_idx // 32, kv_idx // 48]

    pairs = sum(int(chosen[b, h, q // 32, k // 48]) for b, h, q, k in product(*map(range, (2, 6, 70, 50))))
    assert block_pairs(chosen, (32, 48), 70, 50) == mask_pairs(mask, p, CPU) == pairs
    assert mask_pairs(lambda b, h, q, kv: kv < 3, p, CPU) == 2 * 6 * 70 * 3
    assert Spec(p, pairs=pairs).workload() == (4.0 * 16 * pairs, Spec(p).workload().bytes)


def test_bytes_of_shared_heads_and_other_dims_of_v():
    """q and o in 6 heads, k and v in 2, of 2 bytes; lse of 4."""
    assert Spec(problem(10, 30)).workload().bytes == 2 * (2 * (6 * 10 * 32 + 2 * 30 * 32) + 4 * 6 * 10)
    q, o, kv = 6 * 10 * 16, 6 * 10 * 48, 2 * 30 * (16 + 48)
    assert Spec(problem(10, 30, head_dim_v=48)).workload().bytes == 2 * (2 * (q + o + kv) + 4 * 6 * 10)


@pytest.mark.parametrize(("lengths", "seen"), [((1, 40), 4), ((10, 40), 13), ((40, 40), 40), ((60, 40), 40)])
def test_keys_that_no_query_sees_need_not_move(lengths, seen):
    assert visible(*lengths, True, CPU, (3, 0)).any(dim=0).sum() == seen
    moved = [Spec(problem(*lengths, True), window).workload().bytes for window in ((None, None), (3, 0))]
    assert moved[0] - moved[1] == 2 * 2 * 2 * 32 * (lengths[1] - seen)


def test_the_backward_takes_five_products_more():
    forward, both = (Spec(problem(10, 30, True), backward=x).workload() for x in (False, True))
    assert both.flops == 3.5 * forward.flops
    q, kv = 2 * 2 * 6 * 10 * 16, 2 * 2 * 2 * 30 * 32  # bytes; o, dO and dQ are as large as q
    assert both.bytes == 2 * forward.bytes + q + q + kv


def test_rooflines_by_hand():
    """Of the H200: 989 TFLOPS, 4.8 TB/s."""
    full = Spec(Problem(1, 16, 16, 16384, 16384, 128)).workload()
    assert full == (4 * 128 * 16 * 16384**2, 16 * 16384 * (4 * 128 * 2 + 4))
    assert full.roofline("NVIDIA H200") == (pytest.approx(2223.5, abs=0.1), "compute")
    assert Workload(989e6, 4.8e6).roofline("NVIDIA H200") == Roofline(1.0, "compute")
    assert Workload(1.0, 9.6e6).roofline("NVIDIA H200") == Roofline(2.0, "memory")
    assert Workload(989e6, 6.7e6).roofline("NVIDIA H100 80GB HBM3") == Roofline(2.0, "memory")


@pytest.mark.parametrize("gpu", [None, "NVIDIA A100-SXM4-80GB", "NVIDIA H200 MIG 1g.18gb"])
def test_an_unknown_gpu_has_no_roofline(gpu):
    assert Workload(1.0, 1.0).roofline(gpu) is None


@pytest.mark.parametrize("causal", [False, True])
def test_decode_is_bound_by_the_bytes_of_keys_and_values(causal):
    """64 and 8 heads, 8 sequences of 8k: 268 MB of K and V take 56 us, whatever the mask of the one query."""
    work = Spec(Problem(8, 64, 8, 1, 8192, 128, causal=causal)).workload()
    kv = 2 * 2 * 8 * 8 * 8192 * 128
    assert work.flops == 4 * 128 * 8 * 64 * 8192 and kv < work.bytes < 1.01 * kv
    assert work.roofline("NVIDIA H200") == (pytest.approx(kv / 4.8e6, rel=0.01), "memory")
