"""Dropout: its random bits, its mask, which every tile and the reference agree on, and the numbers that follow."""

from itertools import product

import cutlass
import cutlass.utils.hopper_helpers as sm90
import numpy as np
import pytest
import torch
from cutlass import Float32, Int32, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.runtime import from_dlpack

from cute_attn import compile, features, flash_fwd, plan, reference
from cute_attn.features.dropout import DropoutFeature
from cute_attn.features.dropout import dropout as dropout_of
from cute_attn.kernels import dropout as room
from cute_attn.kernels.config import FwdConfig, SparseBlocks
from cute_attn.kernels.layout import acc_mn
from cute_attn.plan import HEAD_DIMS, FeatureKey, Problem
from cute_attn.reference import LEVELS, keep_mask, levels_kept
from cute_attn.tools import inspect
from tests.support.attention import DTYPES, EDGES, bound, close_lse, inputs
from tests.support.dropout import check
from tests.support.nightly import sample
from tests.support.score import score_features

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
pytestmark = pytest.mark.usefixtures("one_thread")

# Random123's kat_vectors, philox4x32 of 10 rounds: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def state(seed, offset, device="cpu"):
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


# The random bits


@cute.jit
def philox_on_the_host(words: cute.Tensor, out: cute.Tensor):
    given = [Uint32(words[i]) for i in range(6)]
    found = room.philox(given[:4], given[4:])
    for i in cutlass.range_constexpr(4):
        out[i] = Int32(found[i])


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want):
    """Of the reference, on ints and on tensors, and of the kernel's own code, compiled for this machine."""
    assert reference.philox(counter, key) == want
    tensors = [[torch.tensor([x]) for x in words] for words in (counter, key)]
    assert tuple(int(x) for x in reference.philox(*tensors)) == want
    words, out = torch.tensor([*counter, *key]).to(torch.uint32).view(torch.int32), torch.zeros(4, dtype=torch.int32)
    philox_on_the_host(from_dlpack(words), from_dlpack(out))
    assert tuple(out.view(torch.uint32).tolist()) == want


@cute.jit
def leave_out_on_the_host(
    words: cute.Tensor,
    out: cute.Tensor,
    row0: Int32,
    col0: Int32,
    head: Int32,
    kept: Int32,
    thread: Int32,
    tile_n: cutlass.Constexpr,
):
    """What one thread of a warpgroup leaves of its ones, where the WGMMA has them."""
    K = OperandMajorMode.K
    mma = sm90.make_trivial_tiled_mma(cutlass.BFloat16, cutlass.BFloat16, K, K, Float32, (1, 1, 1), (64, tile_n))
    cS = acc_mn(mma.get_slice(thread).partition_C(cute.make_identity_tensor((64, tile_n))))
    P = cute.make_rmem_tensor(cute.make_layout((2, tile_n // 4)), Float32)
    P.fill(1.0)
    bits = room.RandomBits(room.key_of([Uint32(words[i]) for i in range(4)]), Uint32(head))
    room.leave_out(P, cS, row0, col0, bits, kept)
    for r in cutlass.range_constexpr(2):
        for c in cutlass.range_constexpr(tile_n // 4):
            out[cS[r, c][0], cS[r, c][1]] = P[r, c]


@pytest.mark.parametrize("tile_n", [32, 64, 96, 128])
def test_every_tile_leaves_out_what_the_reference_does(tile_n):
    """The kernel's own code, thread by thread of a tile, compiled for this machine."""
    rng_state, out, p = state(-(2**61) - 12345, 2**33 + 7), torch.full((64, tile_n), torch.nan), 0.3
    words, kept = from_dlpack(rng_state.view(torch.int32)), levels_kept(p)
    zeros = [Int32(0)] * 5
    how = f"--gpu-arch {compile.ARCH}"  # whose WGMMA it asks; nothing runs on a GPU
    run = cute.compile(leave_out_on_the_host, words, from_dlpack(out), *zeros, tile_n, options=how)
    mask = keep_mask(rng_state, p, 2, 3, 192, 4 * tile_n)
    for m_block, n_block, b, h in ((0, 0, 0, 0), (1, 3, 1, 2), (2, 1, 0, 1)):
        row0, col0 = 64 * m_block, tile_n * n_block
        for thread in range(128):
            run(words, from_dlpack(out), row0, col0, 3 * b + h, kept, thread)
        assert torch.equal(out == 1, mask[b, h, row0 : row0 + 64, col0 : col0 + tile_n])
        assert set(out.unique().tolist()) == {0.0, 1.0}


@DEVICES
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_statistics_of_the_mask(p, device):
    """Entries are kept with probability 1 - p, each by itself: beside, below, in other heads, by other states."""
    kept = keep_mask(state(5, 7, device), p, 2, 3, 400, 333).double()
    others = [
        keep_mask(state(*other, device), p, 2, 3, 400, 333).double() for other in ((6, 7), (5, 8), (5, 7 + 2**32))
    ]
    share = levels_kept(p) / LEVELS
    deviation = 6 * (share * (1 - share)) ** 0.5
    assert abs(kept.mean().item() - share) < deviation / kept.numel() ** 0.5
    for dim, size in ((2, 400), (3, 333)):
        by_line = kept.mean((0, 1, dim))
        assert (by_line - share).abs().max() < deviation / (6 * size) ** 0.5
    apart = kept - share
    pairs = [(apart[..., 1:], apart[..., :-1]), (apart[..., 2:], apart[..., :-2]), (apart[..., 8:], apart[..., :-8])]
    pairs += [(apart[..., 1:, :], apart[..., :-1, :]), (apart[0], apart[1]), (apart[:, 0], apart[:, 1])]
    for a, b in [*pairs, *((apart, other - share) for other in others)]:
        assert (a * b).mean().abs() < 6 * share * (1 - share) / a.numel() ** 0.5


def test_an_entry_depends_on_its_place_alone():
    """Not on how many queries and keys there are, nor on the batch."""
    whole = keep_mask(state(1, 2), 0.4, 3, 4, 130, 200)
    assert whole.shape == (3, 4, 130, 200) and whole.dtype == torch.bool
    for batch, seqlen_q, seqlen_k in ((1, 1, 1), (2, 130, 33), (3, 64, 65), (3, 5, 31)):
        part = keep_mask(state(1, 2), 0.4, batch, 4, seqlen_q, seqlen_k)
        assert torch.equal(part, whole[:batch, :, :seqlen_q, :seqlen_k])
    assert keep_mask(state(1, 2), 0.0, 1, 1, 9, 9).all() and not keep_mask(state(1, 2), 1.0, 1, 1, 9, 9).any()
    assert keep_mask(state(1, 2), 0.5, 0, 4, 3, 3).shape == (0, 4, 3, 3)
    assert (keep_mask(state(1, 2), 0.2, 3, 4, 130, 200) | ~whole).all(), "a smaller p keeps what a larger one keeps"


# What comes out


@CAUSAL
def test_the_reference_by_definition(causal):
    q, k, v = (x.double() for x in inputs(2, 4, 2, 5, 9, 8, device="cpu"))
    s = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    s = s.masked_fill(~torch.ones(5, 9).tril(4).bool(), -torch.inf) if causal else s
    weights = s.softmax(3) * keep_mask(state(3, 4), 0.25, 2, 4, 5, 9) / 0.75
    o, lse = reference.attention(q, k, v, causal=causal, dropout_p=0.25, rng_state=state(3, 4))
    torch.testing.assert_close(o, weights @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(lse, s.logsumexp(3))


@DEVICES
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_small(p, device):
    calls = [{}, dict(causal=True), dict(window=(2, 3)), score_features(2, 4, device)]
    for sizes, scale, how in product([(5, 9), (9, 5), (1, 1)], (None, -0.7), calls):
        check(*inputs(2, 4, 2, *sizes, 16, device=device), p, scale=scale, **how)
        check(*inputs(2, 4, 2, *sizes, 16, device=device, layout="bshd"), p, scale=scale, layout="bshd", **how)


@DEVICES
def test_none_and_all(device):
    q, k, v = inputs(2, 4, 2, 70, 90, 64, device=device)
    o, lse = flash_fwd(q, k, v, return_lse=True)
    for nothing in (0, 0.0, 2.0**-18):
        got, used = flash_fwd(q, k, v, dropout_p=nothing, return_rng_state=True)
        assert torch.equal(got, o) and torch.equal(used, state(0, 0, device))
    got, got_lse = flash_fwd(q, k, v, dropout_p=1.0, return_lse=True)
    assert (got == 0).all()
    close_lse(got_lse, lse.double())
    for empty in (q[:, :, :0], q[:0]):
        assert flash_fwd(empty, k[: len(empty)], v[: len(empty)], dropout_p=0.5).shape == empty.shape
    assert (flash_fwd(q, k[:, :, :0], v[:, :, :0], dropout_p=0.5) == 0).all()


@DEVICES
def test_reproducible(device):
    """By torch.manual_seed, by a generator, and by the state that was used."""
    q, k, v = inputs(2, 4, 2, 70, 90, 64, device=device)
    torch.manual_seed(11)
    o, used = flash_fwd(q, k, v, dropout_p=0.2, return_rng_state=True)
    again = flash_fwd(q, k, v, dropout_p=0.2)
    assert used.dtype == torch.int64 and used.shape == (2,) and used.device == q.device
    torch.manual_seed(11)
    assert torch.equal(flash_fwd(q, k, v, dropout_p=0.2), o) and torch.equal(flash_fwd(q, k, v, dropout_p=0.2), again)
    assert torch.equal(flash_fwd(q, k, v, dropout_p=0.2, rng_state=used), o) and not torch.equal(again, o)
    generator = torch.Generator(device).manual_seed(5)
    first, second = (flash_fwd(q, k, v, dropout_p=0.2, generator=generator) for _ in range(2))
    assert torch.equal(flash_fwd(q, k, v, dropout_p=0.2, generator=generator.manual_seed(5)), first)
    assert not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@CAUSAL
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 160, 192, 224, 256])
def test_at_the_edges(head_dim, causal, dtype):
    for sizes, p in product(EDGES, (0.1, 0.6)):
        check(*inputs(2, 4, 2, *sizes, head_dim, dtype), p, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_beside_everything_else(head_dim):
    """Heads, layouts, windows, scores and sinks, each alone and all; constant time; several tiles for each CTA."""
    extra = score_features(2, 4, "cuda")
    for how in (*({name: x} for name, x in extra.items()), extra, dict(window=(100, 30)), dict(scale=-0.3)):
        for sizes, constant_time in product([(203, 331), (1024, 1023)], (False, True)):
            check(*inputs(2, 4, 2, *sizes, head_dim), 0.3, constant_time=constant_time, **how)
    for heads, heads_kv, layout in ((1, 1, "bhsd"), (8, 1, "bshd"), (6, 3, "bshd")):
        for sizes in [(1, 1000), (77, 333)]:
            check(*inputs(3, heads, heads_kv, *sizes, head_dim, layout=layout), 0.3, layout=layout, causal=True)
    for causal in (False, True):
        check(*inputs(4, 16, 4, 1500, 1800, head_dim), 0.3, causal=causal)


@pytest.mark.gpu
def test_lists_of_blocks_and_maxima():
    from torch.nn.attention.flex_attention import create_block_mask

    def prefix(b, h, q_idx, kv_idx):
        return (kv_idx < 70) | (kv_idx <= q_idx - 200)

    q, k, v = inputs(2, 4, 2, 700, 900, 64)
    lists = create_block_mask(prefix, None, None, 700, 900, device="cuda", BLOCK_SIZE=128)
    rng_state = state(17, 3, "cuda")
    how = dict(dropout_p=0.3, rng_state=rng_state)
    want, _, want_max = reference.attention(q, k, v, mask_mod=prefix, return_row_max=True, **how)
    pairs = prefix(0, 0, torch.arange(700, device="cuda")[:, None], torch.arange(900, device="cuda"))
    weights = pairs * keep_mask(rng_state, 0.3, 2, 4, 700, 900) * (LEVELS / levels_kept(0.3))
    s = (q.float() @ k.float().repeat_interleave(2, 1).mT / 8).masked_fill(~pairs, -torch.inf)
    theirs = (s.softmax(3) * weights).bfloat16() @ v.repeat_interleave(2, 1)
    for mask in (dict(block_mask=lists), dict(mask_mod=prefix)):
        o, row_max = flash_fwd(q, k, v, return_row_max=True, **mask, **how)
        bound(o, want, theirs)
        close_lse(row_max, want_max)


@pytest.mark.gpu
def test_new_values_compile_nothing(monkeypatch):
    q, k, v = inputs(2, 4, 2, 100, 100, 64)
    flash_fwd(q, k, v, dropout_p=0.1)
    monkeypatch.setattr(compile, "compile", None)
    for p in (0.2, 0.7):
        check(q, k, v, p)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator"])
def test_a_graph_draws_anew(own):
    """Each replay has a mask of its own, which its rng_state tells; capture reads nothing back."""
    q, k, v = inputs(2, 4, 2, 200, 300, 64)
    generator = torch.Generator("cuda").manual_seed(1) if own else None
    flash_fwd(q, k, v, dropout_p=0.3, generator=generator)
    graph = torch.cuda.CUDAGraph()
    if own:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        o, used = flash_fwd(q, k, v, dropout_p=0.3, generator=generator, return_rng_state=True)
    seen = set()
    for _ in range(3):
        graph.replay()
        assert torch.equal(flash_fwd(q, k, v, dropout_p=0.3, rng_state=used), o)
        seen.add(tuple(used.tolist()))
    assert len(seen) == 3


@DEVICES
def test_every_way_in(device):
    """Compiled whole, by the operator, into `out`, from other arrays: as the eager call."""
    q, k, v = inputs(2, 4, 2, 33, 47, 64, torch.float16, device=device)
    how = dict(causal=True, dropout_p=0.3, rng_state=state(9, 1, device))
    o, lse, row_max = flash_fwd(q, k, v, return_lse=True, return_row_max=True, **how)
    graph = dict(backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.compile(lambda q: flash_fwd(q, k, v, **how), **graph)(q), o)
    out = torch.full_like(q, torch.nan)
    assert torch.equal(torch.compile(lambda out: flash_fwd(q, k, v, out=out, **how) * 1, **graph)(out), o)
    drawn = torch.compile(lambda q: flash_fwd(q, k, v, causal=True, dropout_p=0.3, return_rng_state=True), **graph)
    (first, used), (second, _) = drawn(q), drawn(q)
    assert torch.equal(flash_fwd(q, k, v, **how | dict(rng_state=used)), first) and not torch.equal(first, second)
    args = (q, k, v, True, None, "bhsd", True, False, *(None,) * 5, 0.3, how["rng_state"])
    assert all(map(torch.equal, torch.ops.cute_attn.flash_fwd(*args), (o, lse)))
    assert torch.equal(torch.ops.cute_attn.flash_fwd_row_max(*args)[2], row_max)
    torch.library.opcheck(torch.ops.cute_attn.flash_fwd.default, args)
    if device == "cpu":
        arrays = dict(how, rng_state=how["rng_state"].numpy())
        got, used = flash_fwd(*(x.numpy() for x in (q, k, v)), return_rng_state=True, **arrays)
        assert np.array_equal(got, o.numpy()) and np.array_equal(used, arrays["rng_state"])


WRONG = {
    "p below 0": (dict(dropout_p=-0.1), ValueError, "dropout_p: -0.1 came; use a probability, from 0 to 1"),
    "p above 1": (dict(dropout_p=2), ValueError, "dropout_p: 2.0 came"),
    "p of NaN": (dict(dropout_p=float("nan")), ValueError, "dropout_p: nan came"),
    "p as bool": (dict(dropout_p=True), TypeError, "dropout_p: True came; a number from 0 to 1 is needed"),
    "p as tensor": (dict(dropout_p=torch.tensor(0.5)), TypeError, r"dropout_p: tensor\(0.5"),
    "a seed": (
        dict(dropout_p=0.5, generator=3),
        TypeError,
        "generator: builtins.int came; a torch.Generator is needed",
    ),
    "both": (
        dict(dropout_p=0.5, generator=torch.Generator(), rng_state=state(1, 2)),
        ValueError,
        "generator: given with rng_state, which is used as it is; omit one of them",
    ),
    "a pair": (dict(dropout_p=0.5, rng_state=(1, 2)), TypeError, r"rng_state: a torch.Tensor is needed, int64 \(2,\)"),
    "int32": (dict(dropout_p=0.5, rng_state=state(1, 2).int()), ValueError, "rng_state: torch.int32 of shape"),
    "seed alone": (dict(dropout_p=0.5, rng_state=state(1, 2)[:1]), ValueError, r"of shape \(1,\)"),
    "elsewhere": (dict(dropout_p=0.5, rng_state=state(1, 2).to("meta")), ValueError, "rng_state: on meta, but q is on"),
    "a state without dropout": (
        dict(rng_state=state(1, 2)),
        ValueError,
        "rng_state: given with dropout_p 0.0, by which",
    ),
    "a state, and too little": (
        dict(dropout_p=1e-9, rng_state=state(1, 2)),
        ValueError,
        "rng_state: given with dropout_p",
    ),
    "a generator without": (
        dict(generator=torch.Generator()),
        ValueError,
        "generator: given with dropout_p 0.0, by which",
    ),
    "a flag": (dict(return_rng_state=1), TypeError, "return_rng_state: a bool is needed, 1 came"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    extra, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        flash_fwd(*inputs(2, 4, 2, 8, 8, 16, device="cpu"), **extra)


def test_neither_gradients_nor_generators_in_graphs():
    q, k, v = inputs(2, 4, 2, 8, 8, 16, device="cpu")
    learns, before = q.clone().requires_grad_(), torch.get_rng_state()
    raises = pytest.raises(ValueError, match=r"dropout_p: 0\.5 came with inputs that require grad")
    with raises:
        flash_fwd(learns, k, v, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn"
    how = (False, None, "bhsd", True, False, *(None,) * 5, 0.5, state(1, 2))
    with raises:
        torch.ops.cute_attn.flash_fwd(learns, k, v, *how)
    flash_fwd(learns, k, v, dropout_p=0.0).sum().backward()
    assert learns.grad.abs().sum() > 0
    graph = torch.compile(lambda q, g: flash_fwd(q, k, v, dropout_p=0.5, generator=g), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"generator|Generator"):
        graph(q, torch.Generator())


# The kernels


@pytest.mark.machine_code
@pytest.mark.parametrize(("head_dim", "causal"), sample(2, HEAD_DIMS, [False, True]))
def test_healthy(head_dim, causal):
    config = plan.plan(Problem(4, 16, 16, 4096, 4096, head_dim, causal=causal, features=FeatureKey(dropout=True)))
    report = inspect.report(config)
    assert config.dropout and "_dropout_" in config.name and report.problems() == []
    assert report.steady_loop.selects >= config.tile_n // 2, "one for each of a thread's weights"


def with_the_rest() -> dict[str, FwdConfig]:
    blocks = SparseBlocks(128, 128, True)
    keys = dict(softcap=True, sinks=True, alibi=True), dict(window=True, row_max=True), dict(sparse=blocks)
    configs = [
        plan.with_features(plan.config(128, "bf16", "bhsd", True), FeatureKey(dropout=True, **key)) for key in keys
    ]
    return {config.name: config for config in (*configs, plan.constant_time(configs[0]))}


@pytest.mark.machine_code
@pytest.mark.parametrize("name", sample(2, with_the_rest()))
def test_healthy_with_the_rest(name):
    assert inspect.report(with_the_rest()[name]).problems() == []


def test_the_plan():
    """Whole runs of 32 keys, heads not packed, and nothing of it in plain calls."""
    for head_dim, causal, queries in product(HEAD_DIMS, (False, True), (1, 4096)):
        problem = Problem(4, 32, 4, queries, 4096, head_dim, causal=causal, features=FeatureKey(dropout=True))
        config = plan.plan(problem)
        assert config.dropout and config.tile_n % 32 == 0 and config.pack == config.split == 1
        plain = plan.plan(problem._replace(features=FeatureKey()))
        assert not plain.dropout and plain.signature().dropout == ()
    with pytest.raises(AssertionError, match="a call of Philox"):
        FwdConfig(64, tile_n=80, dropout=True)
    with pytest.raises(AssertionError, match="has one head"):
        FwdConfig(64, pack=8, dropout=True)
    dropout = dropout_of(0.25, None, state(1, 2))
    assert features.key(features.Features(dropout=dropout)) == FeatureKey(dropout=True)
    assert features.key(features.NONE) == FeatureKey()
    assert DropoutFeature().arguments(dropout)[1:] == (3 * LEVELS // 4, 4 / 3)
    for keys in (dict(dropout=True), dict(sinks=True, dropout=True, row_max=True)):
        taken = plan.with_features(plan.config(64, "bf16", "bhsd", True), FeatureKey(**keys)).signature()
        assert len(taken.dropout) == 3 and len(taken.sinks) == len(taken.row_max) == (len(keys) == 3)
