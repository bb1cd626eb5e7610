"""The kernels themselves, without a GPU: what the DSL compiles is interpreted. Against float64, as on a GPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from cute_attn import BlockLists, block_mask, flash_fwd, plan
from cute_attn.block_mask import as_lists
from cute_attn.kernels.config import FwdConfig
from cute_attn.plan import Problem
from cute_attn.reference import attention
from tests.interpreter import Deadlock, Fault, get, interpreted
from tests.interpreter.cases import DTYPES, SEQUENCES, run
from tests.support import mod_values as values
from tests.support.attention import check, close_lse, inputs
from tests.support.dropout import check as check_dropout
from tests.support.maxima import check as check_maxima
from tests.support.mods import (
    beyond,
    beyond_lists,
    held_to_the_bound,
    mask_mods,
    never_beyond,
    of,
    pairs_of,
    score_mods,
)
from tests.support.nightly import sample
from tests.support.requirements import interpreter
from tests.support.score_sizes import check as check_sizes
from tests.support.score_sizes import chunked
from tests.support.varlen import check as check_varlen
from tests.support.varlen import varlen_inputs
from tests.support.varlen_modifiers import cases as features_of_varlen
from tests.support.varlen_modifiers import check as check_more
from tests.support.varlen_modifiers import functions as functions_of_varlen

pytestmark = [pytest.mark.machine_code, pytest.mark.usefixtures("one_thread"), interpreter]
LONG = 4096


def planned(head_dim, causal=False, batch=4, heads=16, seqlen_q=LONG, seqlen_k=LONG, heads_kv=None, **how) -> FwdConfig:
    """The kernel of a problem that is too large to be interpreted."""
    sizes = batch, heads, heads_kv or heads, seqlen_q, seqlen_k, head_dim
    return plan.plan(Problem(*sizes, causal=causal, **how))


KERNELS = {
    "d64 full, speculative softmax": planned(64),
    "d64 causal, dynamic": planned(64, True),
    "d64 fp16": planned(64, dtype="fp16"),
    "d96 causal": planned(96, True),
    "d128 full, long, cluster, Q in registers": planned(128, batch=16, heads=32),
    "d128 causal, dynamic, cluster": planned(128, True),
    "d128 fp16, lazy rescale": planned(128, batch=16, heads=32, dtype="fp16"),
    "d128 bshd": planned(128, seqlen_q=1024, seqlen_k=1024, layout="bshd"),
    "d256 full, O from registers": planned(256),
    "d256 causal": planned(256, True),
    "one tile per CTA": planned(64, batch=1, heads=8, seqlen_q=1024, seqlen_k=256),
    "keys split over a cluster": planned(128, batch=1, heads=4, seqlen_q=512),
    "keys split, causal": planned(64, True, batch=1, heads=4, seqlen_q=512, seqlen_k=2048),
    "constant time": planned(64, constant_time=True),
    "constant time, causal": planned(128, True, constant_time=True),
    "constant time, keys split, causal": planned(64, True, batch=1, heads=4, seqlen_q=512, constant_time=True),
    "without overlap": FwdConfig(64, overlap=False),
}


def launches(config: FwdConfig) -> list[tuple]:
    """One row; ends within a tile; causal rows that see no key; scores that exceed the running maxima all the time."""
    return [
        (1, 1, None),
        (113, 203, None),
        *([(130, 65, None)] if config.mask.causal else []),
        (70, 265, 40.0),
        (70, 265, 1e9),
    ]


@pytest.mark.parametrize("kind", KERNELS)
def test_right(kind):
    """And nine tenths of the instructions are run: the rest is for negative scales, or jumps back to a wait."""
    config = KERNELS[kind]
    for seed, (seqlen_q, seqlen_k, scale) in enumerate(launches(config)):
        run(config, seqlen_q, seqlen_k, seed=seed, scale=scale)
    with interpreted(config):  # scores of any size, in three blocks of keys of each CTA
        keys = config.tile_n * config.split // 2
        tensors = chunked(config.head_dim, DTYPES[config.dtype], "cpu", rows=70, chunk=keys)
        check_sizes(*tensors, causal=config.mask.causal, layout=config.layout, constant_time=config.constant_time)
    (kernel,) = get(config).kernels.values()
    assert len(kernel.never_ran()) < 0.1 * len(kernel.steps)


def test_every_choice_of_a_schedule_is_there():
    configs = KERNELS.values()
    assert any(c.cluster > 1 and c.scheduler.dynamic for c in configs)
    assert any(c.cluster > 1 and not c.scheduler.dynamic for c in configs)
    assert {c.warpgroups for c in configs} == {1, 2, 3, 4}
    for choice in ("speculative", "q_in_regs", "constant_time", "stages_o", "overlap", "pingpong"):
        assert {bool(getattr(c, choice)) for c in configs} == {False, True}, choice
    for choice in ("q_stages", "split"):
        assert {getattr(c, choice) > 1 for c in configs} == {False, True}, choice


WITH_FEATURES = {
    "window": dict(window=(40, 10)),
    "window, constant time": dict(window=(40, None), constant_time=True),
    "softcap, causal": dict(softcap=5.0, causal=True),
    "alibi": dict(alibi_slopes=torch.tensor([0.3, 0.01])),
    "softcap, alibi, sinks, causal": dict(
        softcap=5.0, alibi_slopes=torch.tensor([[0.3, 0.01]]), sinks=torch.tensor([1.0, -2.0]), causal=True
    ),
}


@pytest.mark.parametrize("how", WITH_FEATURES.values(), ids=WITH_FEATURES)
def test_features(how):
    for seqlen_q, seqlen_k in ((1, 1), (113, 203), (130, 65)):
        with interpreted() as asked:
            check(*inputs(1, 2, 2, seqlen_q, seqlen_k, 64, device="cpu"), **how)
        assert len(asked) == 1


def relative(score, b, h, q_idx, kv_idx):
    return score + (kv_idx - q_idx) * 0.05


SCORED = {
    "softcap, causal": (64, dict(softcap=20.0, causal=True)),
    "softcap": (128, dict(softcap=20.0)),
    "softcap far below every score": (64, dict(softcap=1e-6)),
    "softcap far above": (64, dict(softcap=1e30)),
    "alibi, causal": (128, dict(alibi_slopes=torch.tensor([0.3, -0.2]), causal=True)),
    "alibi on both sides of the diagonal": (128, dict(alibi_slopes=torch.tensor([0.3, -0.2]))),
    "score_mod": (128, dict(score_mod=relative)),
    "score_mod, causal": (96, dict(score_mod=relative, causal=True)),
}


@pytest.mark.parametrize(("name", "factor"), sample(3, SCORED, [1, 8]))
def test_scores_of_the_speculative_softmax(name, factor):
    """With scores that all lie near 0; and with some that softcap's short polynomial is not for, or that overtake."""
    head_dim, how = SCORED[name]
    for seqlen_q, seqlen_k in ((113, 203), (70, 330)):
        q, k, v = inputs(1, 2, 2, seqlen_q, seqlen_k, head_dim, device="cpu")
        with interpreted() as asked:
            (held_to_the_bound if "score_mod" in how else check)(q * factor, k, v, **how)
        (config,) = set(asked)
        assert config.speculative and config.score.name


@pytest.mark.parametrize(("seqlen_q", "heads"), [(1, 8), (3, 6)])
def test_pack_gqa(seqlen_q, heads):
    """Of six heads, two of a query's eight rows are nobody's."""
    with interpreted() as asked:
        check(*inputs(1, heads, 1, seqlen_q, 203, 128, device="cpu"), causal=seqlen_q > 1)
    assert asked[0].pack == 8


@pytest.mark.parametrize(
    ("head_dim", "slack", "mask"),
    [(64, 0, {}), (128, 2, dict(causal=True)), (64, 2, dict(window=(30, 5)))],
    ids=["full", "causal", "window"],
)
def test_varlen(head_dim, slack, mask):
    """What lies between the sequences is NaN, and stays as it was."""
    with interpreted() as asked:
        check_varlen(*varlen_inputs(SEQUENCES, 2, 1, head_dim, where="cpu", slack=slack), **mask)
    assert asked[0].varlen


@pytest.mark.parametrize("name", ["alibi", "all", "both, window"])
def test_varlen_with_more(name):
    """Without their maxima, and with them; ALiBi alone begins at each sequence's own diagonal."""
    how = {**features_of_varlen("cpu"), **functions_of_varlen("cpu")}[name]
    with interpreted() as asked:
        check_more(*varlen_inputs(SEQUENCES, 4, 2, 64, where="cpu", slack=2), **how)
    assert [config.row_max for config in asked] == [True, False]
    assert asked[0].diagonal_first == (name == "alibi")


@pytest.mark.parametrize("name", ["by_table", "many"])
def test_score_mods(name):
    with interpreted():
        held_to_the_bound(*inputs(2, 4, 2, 65, 130, 64, device="cpu"), score_mod=score_mods("cpu")[name])


@pytest.mark.parametrize("lengths", [(130, 200), (64, 64), (1, 65)], ids=str)
def test_tensors_that_end_with_the_sequences(lengths):
    with interpreted():
        held_to_the_bound(*inputs(1, 4, 2, *lengths, 64, device="cpu"), **pairs_of(*lengths, "cpu"))


def test_an_index_beyond_the_end_is_the_last():
    q, k, v = inputs(1, 2, 2, 130, 200, 64, device="cpu")
    with interpreted():
        ours, inside = (flash_fwd(q, k, v, score_mod=mod) for mod in beyond("cpu"))
    torch.testing.assert_close(ours, inside)


@pytest.mark.parametrize("name", values.TOGETHER)
def test_what_a_score_mod_holds(name):
    """As on the CPU, which computes the same nodes: every operation, whole numbers beyond 32 bits, constant scores."""
    tensors, mod = inputs(1, 2, 2, 9, 7, 64, device="cpu"), values.together(values.TOGETHER[name])
    want, want_lse = flash_fwd(*tensors, score_mod=mod, return_lse=True)
    with interpreted() as asked:
        o, lse = flash_fwd(*tensors, score_mod=mod, return_lse=True)
    torch.testing.assert_close(o, want, atol=0.01, rtol=0.01)
    torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-4)
    assert len(asked) == 1


def test_numbers_of_64_bits_and_a_constant_mask():
    """aux beyond int32 on both sides of a comparison; a table's index beyond it; then no pair at all."""
    tensors, table = inputs(1, 1, 1, 33, 70, 64, device="cpu"), torch.tensor([2**40, 5, 2**33], dtype=torch.int64)

    def mod(b, h, i, j, x):
        return (j + x < table[j % 3] + 2**31 + i) & (table[2**35 + j] > j * x)

    for x in (2**31, 2**31 + 3):
        want, want_lse = flash_fwd(*tensors, mask_mod=mod, aux=(x,), return_lse=True)
        with interpreted() as asked:
            o, lse = flash_fwd(*tensors, mask_mod=mod, aux=(x,), return_lse=True)
        torch.testing.assert_close(o, want, atol=0.01, rtol=0.01)
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-4)
        assert len(asked) == 1
    with interpreted():
        o, lse = flash_fwd(*tensors, mask_mod=lambda *_: False, return_lse=True)
    assert not o.any() and (lse == -torch.inf).all()


def test_a_constant_of_a_class_that_changes():
    """The next call asks for another kernel; a tensor of a module stays an argument."""
    tensors, configs = inputs(1, 1, 1, 20, 20, 64, device="cpu"), []
    for n, factor in ((3, 1.0), (9, 1.0), (9, -1.0)):
        layer, mask = values.Layer(n), values.readers(n)["class"]
        layer.slopes *= factor
        want = flash_fwd(*tensors, mask_mod=mask, score_mod=layer.bias)
        with interpreted() as asked:
            o = flash_fwd(*tensors, mask_mod=mask, score_mod=layer.bias)
        torch.testing.assert_close(o, want, atol=0.01, rtol=0.01)
        configs += asked
    assert configs[0] != configs[1] == configs[2]


def test_mask_mods():
    with interpreted():
        held_to_the_bound(*inputs(2, 4, 2, 65, 130, 64, device="cpu"), mask_mod=mask_mods("cpu")["padded"])


def test_block_masks():
    def documents(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx // 100 == kv_idx // 100)

    blocks = create_block_mask(documents, 1, 2, 300, 300, device="cpu", BLOCK_SIZE=128)
    with interpreted() as asked:
        held_to_the_bound(*inputs(1, 2, 2, 300, 300, 64, device="cpu"), block_mask=blocks, dense=documents)
    assert asked[0].sparse


@pytest.mark.parametrize(("head_dim", "seqlen_q", "seqlen_k"), [(64, 300, 330), (128, 400, 520)])
def test_alibi_begins_at_the_diagonal(head_dim, seqlen_q, seqlen_k):
    """Down to the first block, and on from the last, which ends within; of both of a cluster."""
    slopes = torch.tensor([0.3, -0.05])
    with interpreted() as asked:
        check(*inputs(1, 2, 1, seqlen_q, seqlen_k, head_dim, device="cpu"), alibi_slopes=slopes, softcap=5.0)
    assert asked[0].diagonal_first and asked[0].cluster == (2 if head_dim == 128 else 1)


@pytest.mark.parametrize(
    ("size", "whole"), sample(3, [(64, 128, 128), (128, 192, 64), (256, 64, 64)], [False, True]), ids=str
)
def test_block_sparse(size, whole):
    """Of each head its own, some of them empty; causal applies too. size: head_dim, and the blocks'."""
    head_dim, m, n = size
    q, k, v = inputs(1, 2, 1, 300, 430, head_dim, device="cpu")
    which = torch.randint(0, 3 if whole else 2, (1, 2, -(-300 // m), -(-430 // n)))  # 0: in no list
    which[0, 0, 1] = 0
    lists = BlockLists(*as_lists(which == 1), *(as_lists(which == 2) if whole else ()), block_size=(m, n))
    dense = lambda b, h, q_idx, kv_idx: which[b, h, q_idx // m, kv_idx // n] > 0  # noqa: E731
    with interpreted() as asked:
        held_to_the_bound(q, k, v, causal=True, block_mask=lists, dense=dense)
    assert asked[0].sparse.has_full == whole


@beyond_lists
def test_no_list_reads_beyond_a_tensor(counts, indices, seen, monkeypatch):
    monkeypatch.setattr(block_mask, "_contents", lambda lists: None)  # as on a GPU
    with interpreted() as asked:
        never_beyond(counts, indices, seen, "cpu")
    assert asked[0].sparse


def test_no_list_of_whole_blocks_reads_beyond_a_tensor(monkeypatch):
    """And what is counted in both is counted once over each list's places."""
    monkeypatch.setattr(block_mask, "_contents", lambda lists: None)
    q, k, v = inputs(1, 2, 2, 64, 190, 64, device="cpu")
    for cut, whole, seen in ((9, -3, 190), (-7, 2**30, 128), (-1, -1, 0)):
        lists = of([cut], [0, 1, 2])._replace(
            full_kv_num_blocks=of([whole], [0])[0], full_kv_indices=of([1], [0, 1, 7])[1]
        )
        with interpreted():
            o = flash_fwd(q, k, v, block_mask=lists)
        torch.testing.assert_close(o, flash_fwd(q, k[:, :, :seen], v[:, :, :seen]), atol=0.02, rtol=0.02)


MASKS = {"full": {}, "causal": dict(causal=True), "window": dict(window=(40, 10))}
DIMS = [(192, 128), (64, 256), (40, 72), (512, 512), (64, 320)]


@pytest.mark.parametrize(("dims", "mask"), sample(3, DIMS, MASKS), ids=str)
def test_head_dims(dims, mask):
    """v's own, and those of which two warpgroups share the rows."""
    head_dim, head_dim_v = dims
    for seqlen_q, seqlen_k in ((1, 1), (70, 130)):
        with interpreted() as asked:
            check(*inputs(1, 2, 1, seqlen_q, seqlen_k, head_dim, device="cpu", head_dim_v=head_dim_v), **MASKS[mask])
        assert (asked[0].head_dim_splits > 1) == (head_dim_v > 256)


BESIDE = {
    "alone": {},
    "causal": dict(causal=True),
    "window": dict(window=(40, 10)),
    "all": dict(causal=True, softcap=5.0, alibi_slopes=torch.tensor([0.3, 0.01]), sinks=torch.tensor([1.0, -2.0])),
    "constant time": dict(constant_time=True),
}
EACH = pytest.mark.parametrize("beside", sample(2, BESIDE))


@EACH
def test_dropout(beside):
    how = BESIDE[beside]
    for head_dim, (seqlen_q, seqlen_k) in ((64, (1, 1)), (64, (113, 203)), (128, (130, 65))):
        rng_state = torch.tensor([2**40 + 7, 12], dtype=torch.int64)
        with interpreted() as asked:
            q, k, v = inputs(1, 2, 2, seqlen_q, seqlen_k, head_dim, device="cpu")
            check_dropout(q, k, v, 0.3, rng_state=rng_state, **how)
        assert asked[0].dropout


@EACH
def test_maxima(beside):
    how = BESIDE[beside]
    for head_dim, (seqlen_q, seqlen_k) in ((64, (1, 1)), (64, (113, 203)), (128, (130, 65))):
        with interpreted() as asked:
            check_maxima(*inputs(1, 2, 1, seqlen_q, seqlen_k, head_dim, device="cpu"), **how)
        assert asked[0].row_max


SCALED = pytest.mark.parametrize("kind", ["d64 full, speculative softmax", "d128 full, long, cluster, Q in registers"])


@SCALED
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales(kind, scale):
    run(KERNELS[kind], 70, 65, scale=scale)


@pytest.mark.parametrize("num_sms", [1, 2])
def test_many_tiles_for_each_cta(num_sms):
    """Rings, tile counters and phases go round."""
    for seed, kind in enumerate(["d64 causal, dynamic", "d128 causal, dynamic, cluster"]):
        config = KERNELS[kind]
        q, k, v = inputs(2, 2, 1, 260, 70, config.head_dim, device="cpu")
        with interpreted(config, num_sms=max(num_sms, config.cluster), seed=seed):
            check(q, k, v, causal=True)


def test_without_lse_and_with_strides():
    config = KERNELS["d64 full, speculative softmax"]
    q, k, v = inputs(2, 3, 1, 70, 260, config.head_dim, device="cpu")
    with interpreted(config):
        check(q[:, :, 3:], k.expand(2, 3, 260, 64)[:, :, ::2], v.expand(2, 3, 260, 64)[:, :, 130:], lse=False)


def line_of(text: str, what: str, number: int = 0) -> int:
    """The number-th line that begins with these words."""
    return [n for n, line in enumerate(text.splitlines()) if line.strip().startswith(what)][number]


@pytest.fixture(scope="module")
def plain():
    config = FwdConfig(64)
    return config, get(config), inputs(1, 2, 1, 113, 203, 64, device="cpu")


def caught(plain, changed, seeds=8) -> str:
    """What is said of a kernel that was changed; "" where no order of the warps shows it."""
    config, _, tensors = plain
    for seed in range(seeds):
        try:
            with interpreted(config, changed, seed=seed):
                check(*tensors)
        except AssertionError as e:
            return f"{type(e).__name__}: {e}"
    return ""


def test_a_missing_wait_for_a_load_is_found(plain):
    ptx = plain[1].ptx
    first_of_mma = line_of(ptx, "wgmma.fence")
    waits = [n for n in range(first_of_mma) if ptx.splitlines()[n].strip().startswith("mbarrier.try_wait")]
    assert caught(plain, plain[1].changed(waits[-1], "setp.eq.b32 P1, 0, 0;"))


def test_a_wrong_phase_is_found(plain):
    line = line_of(plain[1].ptx, "mbarrier.try_wait")
    words = plain[1].ptx.splitlines()[line].split(",")
    words[2] = " 0"  # the producer's first wait, for places that are empty from the start
    assert "Deadlock" in caught(plain, plain[1].changed(line, ",".join(words)))


def test_a_deadlock_says_who_waits_where(plain):
    changed = plain[1].changed(line_of(plain[1].ptx, "mbarrier.arrive.expect_tx"), "")
    with interpreted(plain[0], changed), pytest.raises(Deadlock, match=r"CTA 0, warp 4, at .*parity 0; 0 phases ended"):
        check(*plain[2])


def test_a_missing_wait_for_a_product_is_found(plain):
    config, kernel, tensors = plain
    with interpreted(config, kernel.changed(line_of(kernel.ptx, "wgmma.wait_group"), "")):
        assert flash_fwd(*tensors).isnan().any()


def test_a_missing_fence_before_a_tma_store_is_found(plain):
    changed = plain[1].changed(line_of(plain[1].ptx, "fence.proxy.async", -1), "")
    assert "without fence.proxy.async" in caught(plain, changed)


def test_no_access_beyond_a_tensor(plain):
    _, kernel, (q, k, v) = plain
    o, lse = torch.empty_like(q), torch.empty(2 * 113 - 1)
    with pytest.raises(Fault, match=r"global memory: st\.global.* in no tensor of the launch"):
        kernel(q, k, v, o, lse.data_ptr(), 0, 0.125, 3)


def test_the_host_code_checks_its_arguments(plain):
    _, kernel, (q, k, v) = plain
    with pytest.raises(RuntimeError, match="expected to match"):
        kernel(q, k, k[:, :, 1:], torch.empty_like(q), 0, 0, 0.125, 3)
    with pytest.raises(RuntimeError, match="float16"):
        kernel(q, k, v.half(), torch.empty_like(q), 0, 0, 0.125, 3)


def test_the_order_of_the_warps_does_not_matter():
    """To the last bit."""
    config = KERNELS["d64 causal, dynamic"]
    q, k, v = inputs(1, 2, 1, 130, 203, 64, device="cpu")
    found = []
    for seed in range(3):
        with interpreted(config, seed=seed):
            found.append(flash_fwd(q, k, v, causal=True, return_lse=True))
    want, want_lse = attention(q, k, v, causal=True)
    close_lse(found[0][1], want_lse)
    assert want.shape == found[0][0].shape
    for o, lse in found[1:]:
        assert torch.equal(o, found[0][0]) and torch.equal(lse, found[0][1])
