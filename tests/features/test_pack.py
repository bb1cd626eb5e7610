"""PackGQA: the query heads of a K/V head as rows of one tile; right at any ratio, chosen where queries are few."""

import dataclasses
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cute_attn import call, compile, device, flash_fwd, operands, plan, reference, warmup
from cute_attn.kernels import blocks as blocks_room
from cute_attn.kernels.config import PACKS, SMEM_BYTES, FwdConfig, SparseBlocks
from cute_attn.kernels.mask import Causal, Full, PackGqaMask, Window, block_range, is_partial
from cute_attn.kernels.parts import parts_of
from cute_attn.kernels.tile_scheduler import OneTile, Tile
from cute_attn.plan import HEAD_DIMS, FeatureKey, Problem, pack_gqa
from cute_attn.tools import audit, inspect
from tests.support.attention import DTYPES, bound, check, inputs, sdpa
from tests.support.masks import sees
from tests.support.nightly import sample

RATIOS = (2, 3, 4, 5, 7, 8, 16, 32, 64)
QUERIES = (1, 2, 3, 5, 16, 33, 64, 100)
KEYS = (1, 7, 128, 1023, 5000)
ODD = (2, 3, 5, 7, 8, 33, 64, 65, 71, 128)
SIDES = st.one_of(st.integers(0, 400), st.just(1 << 30))
MASKS = pytest.mark.parametrize("mask", [Full(), Causal(), Window()], ids=lambda mask: mask.name)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


# Rows on plain integers


@MASKS
@given(
    seqlen_q=st.integers(1, 100),
    seqlen_k=st.integers(1, 300),
    window=st.tuples(SIDES, SIDES),
    m_block=st.integers(0, 4),
    pack=st.sampled_from(PACKS),
    tile_n=st.sampled_from([16, 80, 128]),
)
def test_blocks_of_packed_rows(mask, seqlen_q, seqlen_k, window, m_block, pack, tile_n):
    rows, packed = 64, PackGqaMask(mask, pack)
    problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k, args=SimpleNamespace(mask=window))
    queries = {row // pack for row in range(m_block * rows, (m_block + 1) * rows)}
    for row in range(m_block * rows, (m_block + 1) * rows):
        seen = range(packed.first(row, problem), packed.limit(row, problem))
        assert all((key in seen) == sees(mask, row // pack, key, problem) for key in range(seqlen_k))
    blocks = [range(n * tile_n, (n + 1) * tile_n) for n in range(-(-seqlen_k // tile_n))]
    needed = [n for n, keys in enumerate(blocks) if any(sees(mask, i, j, problem) for i in queries for j in keys)]
    whole = [n for n, keys in enumerate(blocks) if all(sees(mask, i, j, problem) for i in queries for j in keys)]
    found = block_range(packed, m_block * rows, rows, tile_n, problem)
    assert 0 <= found.first < found.end and set(needed) <= set(range(found.first, found.end))
    assert list(range(found.full_first, found.full_end)) == [n for n in whole if n < found.end - 1]
    for n in range(found.first, found.end):
        assert is_partial(packed, m_block * rows, rows, n, tile_n, problem) or n in whole


def room(pack, **fields):
    """The kernel's parts, and a function: what they find of a row of a tile with so many heads to a K/V head."""
    parts = parts_of(FwdConfig(64, tile_m=64, scheduler=OneTile, pack=pack, **fields))

    def whose(row, head, ratio):
        gmem = SimpleNamespace(q=SimpleNamespace(tensor=SimpleNamespace(shape=((ratio, None), 64, None, None))))
        return parts.rows.owner(row, Tile(0, head, 0, True), gmem)

    return parts, whose


@pytest.mark.parametrize("pack", PACKS[1:])
@pytest.mark.parametrize("ratio", [1, *ODD])
def test_every_row_of_every_head_is_one_tile_s(ratio, pack):
    """Whatever the pack; nobody's rows name a head that there is; and TMA's boxes hold the same rows."""
    parts, whose = room(pack)
    heads_kv, seqlen_q, packs = 2, 9, -(-ratio // pack)
    rows = range(-(-seqlen_q * pack // 64) * 64)
    found = [whose(row, head, ratio) for head in range(heads_kv * packs) for row in rows]
    assert all(0 <= head < heads_kv * ratio for _, head in found)
    mine = [(query, head) for query, head in found if query < seqlen_q]
    assert sorted(mine) == [(i, h) for i in range(seqlen_q) for h in range(heads_kv * ratio)]
    assert parts.rows.box == (pack, 64 // pack)
    for row, head in product(rows, range(heads_kv * packs)):
        block, at = divmod(row, 64)
        query, of_pack = block * (64 // pack) + at // pack, head % packs * pack + at % pack  # by the box's two columns
        assert parts.rows.query(row) == query
        if of_pack < ratio:
            assert whose(row, head, ratio) == (query, head // packs * ratio + of_pack)
        else:
            assert whose(row, head, ratio)[0] > 1 << 30


@pytest.mark.parametrize("split", [2, 8])
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=lambda mask: mask.name)
def test_split_keys_of_packed_rows(monkeypatch, mask, split):
    """Every block of keys is one CTA's."""
    parts, _ = room(8, mask=mask, split=split, tile_n=64)
    for seqlen_q, seqlen_k in ((1, 1), (5, 700), (20, 8192), (30, 17)):
        problem = SimpleNamespace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        for m_block in range(-(-seqlen_q * 8 // 64)):
            loaded = []
            for rank in range(split):
                monkeypatch.setattr(blocks_room, "rank", lambda rank=rank: rank)
                loaded += range(*parts.blocks.range(Tile(m_block, 0, 0, True), problem))
            last = min(m_block * 8 + 7, seqlen_q - 1 if mask.causal else 1 << 30)
            limit = min(last + 1 + seqlen_k - seqlen_q, seqlen_k) if mask.causal else seqlen_k
            needed = range(max(-(-limit // 64), 1))
            assert set(needed) <= set(loaded) and len(set(needed) & set(loaded)) == len(
                [n for n in loaded if n in needed]
            )


# The plan


def test_pack_of_every_ratio():
    assert [pack_gqa.pack_of(n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 1000)] == [
        *(1, 2, 4, 4, 8, 8, 8, 16, 16, 32, 64, 64, 64, 64)
    ]
    for ratio in range(1, 65):
        pack = pack_gqa.pack_of(ratio)
        assert pack in PACKS and ratio <= pack < 2 * ratio
        assert plan.plan(Problem(4, 3 * ratio, 3, 1, 4096, 128)).pack == pack


@given(
    batch=st.integers(1, 64),
    heads_kv=st.integers(1, 16),
    ratio=st.integers(1, 80),
    seqlen_q=st.one_of(st.integers(0, 70), st.integers(71, 5000)),
    seqlen_k=st.integers(0, 40_000),
    head_dim=st.sampled_from(HEAD_DIMS),
    causal=st.booleans(),
    constant_time=st.booleans(),
    window=st.booleans(),
)
def test_what_is_packed(batch, heads_kv, ratio, seqlen_q, seqlen_k, head_dim, causal, constant_time, window):
    how = dict(causal=causal, constant_time=constant_time, features=FeatureKey(window=window))
    problem = Problem(batch, heads_kv * ratio, heads_kv, seqlen_q, seqlen_k, head_dim, **how)
    found = plan.plan(problem)
    assert found.smem_bytes <= SMEM_BYTES
    if ratio == 1 or problem.empty:
        assert found.pack == 1
    elif seqlen_q <= 8:
        assert found.pack == pack_gqa.pack_of(ratio), "eight times the rows of 64-row tiles at least"
    if found.pack > 1:
        rows = pack_gqa.rows_of(problem)
        alone = plan.plan(problem._replace(heads_kv=problem.heads))
        assert pack_gqa.rows_of_tiles(found, rows) <= 0.75 * pack_gqa.rows_of_tiles(alone, problem)
        assert found.tile_m == 64 or rows.seqlen_q > 64, "no warpgroup without rows"
        assert found.split == 1 or rows.row_blocks * found.split <= pack_gqa.SMS
    else:
        assert found == plan.plan(problem._replace(heads_kv=problem.heads))


def test_long_queries_are_not_packed():
    for head_dim, causal in product(HEAD_DIMS, (False, True)):
        for seqlen in (2048, 4096, 16_384):
            assert plan.plan(Problem(4, 32, 8, seqlen, seqlen, head_dim, causal=causal)).pack == 1


def test_few_tiles_split_their_keys():
    """A batch of 1: the fewer tiles are made up for, as far as shared memory has room beside the blocks of keys."""
    splits = {32: (8, 8), 64: (8, 8), 96: (4, 4), 128: (4, 4), 160: (2, 4), 192: (2, 2), 224: (2, 1), 256: (2, 2)}
    for head_dim, causal in product(splits, (False, True)):
        found = plan.plan(Problem(1, 32, 8, 1, 8192, head_dim, causal=causal))
        assert (found.pack, found.split, found.tile_m) == (4, splits[head_dim][causal], 64)
    capped = plan.plan(Problem(1, 32, 8, 1, 8192, 128, features=FeatureKey(softcap=True, sinks=True)))
    assert (capped.pack, capped.split) == (4, 4) and capped.sinks and capped.score.name == "softcap"


def test_many_tiles_of_few_rows_share_an_sm():
    for head_dim in (32, 64, 96, 128):
        found = plan.plan(Problem(64, 32, 8, 4, 8192, head_dim))
        assert found.pack == 4 and found.tile_m == 64 and 2 * found.smem_bytes <= SMEM_BYTES


@pytest.mark.parametrize(
    "key", [FeatureKey(alibi=True), FeatureKey(sparse=SparseBlocks(128, 128, True))], ids=["alibi", "sparse"]
)
def test_what_asks_for_a_tile_s_head_is_not_packed(key):
    assert plan.plan(Problem(4, 32, 8, 1, 4096, 128, features=key)).pack == 1


def test_a_users_table_may_have_other_tiles():
    """One block of any kernel, and its splits, fit in shared memory."""
    for head_dim, tile_m, tile_n, stages in product(
        HEAD_DIMS, (64, 128, 192, 256), (32, 64, 96, 128, 160), (1, 2, 3, 4)
    ):
        try:
            config = FwdConfig(head_dim, tile_m=tile_m, tile_n=tile_n, stages=stages)
        except AssertionError:
            continue
        block = pack_gqa.one_block(config)
        assert all(pack_gqa.packed(x, 5).pack == 8 for x in (block, *pack_gqa.splits(block)))


def test_warmup(monkeypatch):
    compiled = []
    monkeypatch.setattr(compile, "get", compiled.append)
    how = dict(dtype="bf16", layout="bhsd")
    plain = warmup(64, **how)
    packed = warmup(64, ratio=(1, 6), **how)
    assert {c.pack for c in plain} == {1} and {c.pack for c in packed} == {1, 8}
    assert packed[: len(plain)] == plain
    reached = {
        plan.plan(Problem(b, 12, 2, q, k, 64, causal=causal))
        for b, q, k, causal in product((1, 3, 9, 64), (1, 8, 20, 64, 300, 2000), (100, 600, 9000), (False, True))
    }
    assert reached <= set(packed)
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match=r"ratio: .* came; the number of query heads to a K/V head is needed"):
            warmup(64, ratio=wrong)


# The machine code


def shown(batch, heads, seqlen_q, head_dim, **how):
    """The kernel of a problem with 8 K/V heads and 4096 keys."""
    return plan.plan(Problem(batch, heads, 8, seqlen_q, 4096, head_dim, **how))


SHOWN = {
    "d64 split": shown(1, 32, 1, 64),
    "d64 one block, causal": shown(16, 64, 4, 64, causal=True),
    "d64 many": shown(64, 64, 1, 64),
    "d64 256 rows": shown(32, 32, 64, 64),
    "d64 256 rows, causal": shown(32, 32, 64, 64, causal=True),
    "d128 split, causal": shown(1, 64, 1, 128, causal=True),
    "d128 many": shown(64, 32, 1, 128),
    "d128 rows in clusters": shown(32, 32, 64, 128),
    "d128 window, sinks": shown(16, 64, 1, 128, features=FeatureKey(window=True, sinks=True)),
    "d256 split, from registers": shown(1, 32, 1, 256),
    "d96 constant time": shown(16, 32, 1, 96, constant_time=True),
}


@pytest.mark.machine_code
@pytest.mark.parametrize("case", sample(5, SHOWN))
def test_healthy(case):
    config = SHOWN[case]
    report = inspect.report(config)
    assert config.pack > 1 and report.problems() == []
    loop, alone = report.steady_loop, inspect.report(dataclasses.replace(config, pack=1)).steady_loop
    assert (loop.wgmma, loop.mufu, loop.warpgroup_ops) == (alone.wgmma, alone.mufu, alone.warpgroup_ops)
    assert loop.instructions <= alone.instructions + 2, "rows are told apart outside of the loop"
    assert "UTMALDG.5D" in inspect.sass(config)


def test_no_branch_of_a_constant_time_loop_depends_on_data():
    kinds = {branch.depends for branch in audit.audit(SHOWN["d96 constant time"])}
    assert kinds == {audit.BARRIER, audit.TRIP_COUNT}


@pytest.mark.machine_code
def test_layout_leaves_the_machine_code_alone():
    config = SHOWN["d64 split"]
    assert inspect.sass(dataclasses.replace(config, layout="bshd")) == inspect.sass(config)


# On the GPU


@pytest.fixture
def packs(monkeypatch):
    """The packs of the kernels that calls have been planned to run."""
    found = []

    def noted(problem, gpu=None):
        config = plan.plan(problem, gpu)
        found.append(config.pack)
        return config

    monkeypatch.setattr(operands, "plan", noted)
    call.known.clear()
    yield found
    call.known.clear()


@pytest.mark.gpu
@CAUSAL
@pytest.mark.parametrize("ratio", RATIOS)
def test_right(ratio, causal, packs):
    for seqlen_q, seqlen_k in product(QUERIES, KEYS):
        check(*inputs(2, 2 * ratio, 2, seqlen_q, seqlen_k, 64), causal=causal)
    assert set(packs) - {1} == {pack_gqa.pack_of(ratio)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@CAUSAL
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_head_dims(head_dim, causal, dtype, packs):
    for ratio, (seqlen_q, seqlen_k) in product((4, 7), ((1, 1), (1, 5000), (3, 1023), (5, 7), (16, 128), (33, 1023))):
        check(*inputs(3, 2 * ratio, 2, seqlen_q, seqlen_k, head_dim, dtype), causal=causal)
    assert set(packs) == {4, 8}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_layouts_batches_and_scales(head_dim, layout, packs):
    """Few tiles to many: keys split, one block to a CTA, and whole tiles."""
    for batch, (seqlen_q, seqlen_k), scale in product((1, 20, 90), ((1, 1200), (4, 513), (64, 130)), (None, -0.3, 0.0)):
        how = dict(causal=seqlen_q != 4, scale=scale, layout=layout)
        check(*inputs(batch, 10, 2, seqlen_q, seqlen_k, head_dim, layout=layout), **how)
    assert set(packs) >= {8}


@pytest.mark.gpu
@CAUSAL
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_any_ratio_whatever_the_pack(head_dim, causal, planned_by):
    """Every kernel that packs; also where a K/V head has more heads than a pack, or just one, and queries are many."""
    some = plan.kernel_class(plan.plan(Problem(1, 1, 1, 1, 1, head_dim, causal=causal)))
    for pack in (2, 8):
        every = plan.prebuilt(device.name(), pack)
        for config in (c for c in every if c.pack == pack and plan.kernel_class(c) == some):
            planned_by(config)
            for ratio, (seqlen_q, seqlen_k) in product((1, 3, 9), ((1, 1), (40, 700), (203, 113), (300, 1025))):
                check(*inputs(2, 2 * ratio, 2, seqlen_q, seqlen_k, head_dim), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_heads_than_rows_of_a_block(head_dim, packs):
    for ratio, seqlen_q in product((65, 71, 128), (1, 5, 64)):
        check(*inputs(2, ratio, 1, seqlen_q, 777, head_dim), causal=True)
    assert 64 in packs  # at 64 queries 65 heads fill two blocks badly, and are not packed


@pytest.mark.gpu
@pytest.mark.parametrize("constant_time", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_windows(head_dim, constant_time, packs):
    windows = ((0, 0), (17, 5), (100, 0), (300, 100), (None, 7), (5, None))
    for window, (seqlen_q, seqlen_k) in product(windows, ((1, 5000), (3, 1023), (33, 128), (64, 7), (5, 1))):
        check(*inputs(2, 10, 2, seqlen_q, seqlen_k, head_dim), window=window, constant_time=constant_time)
    assert 8 in packs


@pytest.mark.gpu
@CAUSAL
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_constant_time(head_dim, causal, packs):
    for seqlen_q, seqlen_k in product((1, 5, 64), KEYS):
        check(*inputs(2, 14, 2, seqlen_q, seqlen_k, head_dim), causal=causal, constant_time=True)
    assert 8 in packs


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_softcaps_and_sinks(head_dim, packs):
    """A sink of each head, in one tile; keys split too."""
    for (batch, ratio), (seqlen_q, seqlen_k) in product(((1, 8), (9, 3)), ((1, 4096), (3, 1023), (64, 128), (9, 5))):
        q, k, v = inputs(batch, 2 * ratio, 2, seqlen_q, seqlen_k, head_dim)
        sinks = torch.linspace(-3, 6, 2 * ratio, device="cuda")
        for how in (dict(softcap=3.0), dict(sinks=sinks), dict(softcap=3.0, sinks=sinks, window=(100, 0))):
            check(q, k, v, **how)
    assert set(packs) >= {8, 4}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("ratio", [3, 5, 64])
def test_neighbours_are_neither_read_nor_written(ratio, head_dim):
    """q and out are some heads, some queries and some columns of tensors full of NaN."""
    for seqlen_q in (1, 3, 33):
        q, k, v = inputs(2, 2 * ratio, 2, seqlen_q, 300, head_dim)
        many_q, out = (
            torch.full((2, 2 * ratio + 70, seqlen_q + 40, head_dim + 64), torch.nan).cuda() for _ in range(2)
        )
        many_q, out = many_q.to(q.dtype), out.to(q.dtype)
        part = slice(None), slice(3, 3 + 2 * ratio), slice(7, 7 + seqlen_q), slice(8, 8 + head_dim)
        many_q[part] = q
        check(many_q[part], k, v, causal=True, out=out[part])
        out[part] = torch.nan
        assert out.isnan().all()
        _, lse = flash_fwd(many_q[part], k, v, return_lse=True)
        assert lse.shape == (2, 2 * ratio, seqlen_q) and lse.isfinite().all()


@pytest.mark.gpu
def test_strides(packs):
    """A fused qkv projection, and a query that all heads share."""
    qkv = torch.randn(3, 5, 12 + 2 + 2, 64, device="cuda").bfloat16()
    q, k, v = qkv[:, :, :12], qkv[:, :, 12:14], qkv[:, :, 14:]
    check(q, k, v, causal=True, layout="bshd")
    one, k, v = inputs(2, 1, 2, 4, 700, 128)
    check(one.expand(2, 12, 4, 128), k, v)
    check(torch.randn(1, 12, 1, 64, device="cuda").bfloat16(), *inputs(1, 1, 1, 1, 700, 64)[1:])
    assert set(packs) == {8, 16}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_that_see_nothing(head_dim, packs):
    for seqlen_q, seqlen_k in ((33, 7), (64, 1), (100, 64)):
        q, k, v = inputs(2, 14, 2, seqlen_q, seqlen_k, head_dim)
        o, lse = check(q, k, v, causal=True)
        blind = seqlen_q - seqlen_k
        assert (o[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -torch.inf).all()
        v.fill_(torch.nan)
        assert (flash_fwd(q, k, v, causal=True)[:, :, :blind] == 0).all()
    assert 8 in packs


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_maxima_that_grow_or_shrink_along_the_keys(head_dim, packs):
    """The rows of a tile are of several heads, whose scores differ by much."""
    for batch, step, flip in product((1, 70), (0.7, 17.0, 144.0), (False, True)):
        q, k, v = inputs(batch, 12, 2, 3, 2048, head_dim)
        steps = torch.arange(2048, device="cuda") // 128 * (step / 1.4427)
        q[..., 0] = torch.linspace(-1, 1, 12, device="cuda")[None, :, None].bfloat16()
        k[..., 0] = (steps.flip(0) if flip else steps).bfloat16()
        o, lse = flash_fwd(q, k, v, scale=1.0, return_lse=True)
        want, want_lse = reference.attention(q, k, v, scale=1.0)
        bound(o, want, sdpa(q, k, v, False, 1.0))
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)
    assert set(packs) == {8}


@pytest.mark.gpu
def test_gradients(packs):
    for layout, seqlen_q in product(("bhsd", "bshd"), (1, 5, 64)):
        qkv = [x.requires_grad_() for x in inputs(2, 12, 2, seqlen_q, 300, 64, layout=layout)]
        o = flash_fwd(*qkv, causal=True, layout=layout)
        grad = torch.randn_like(o)
        ours = torch.autograd.grad(o, qkv, grad)
        with torch.no_grad():
            wants = reference.gradients(grad, *qkv, causal=True, layout=layout)
        for dx, want in zip(ours, wants, strict=True):
            torch.testing.assert_close(dx.double(), want, atol=0.05, rtol=0.02)
    assert 8 in packs


@pytest.mark.gpu
def test_compiled_and_in_a_graph(packs):
    """In turn with a call without PackGQA, by the same tile counter."""
    q, k, v = inputs(2, 12, 2, 5, 900, 64)
    want = flash_fwd(q, k, v, causal=True, return_lse=True)
    step = torch.compile(lambda *x: flash_fwd(*x, causal=True, return_lse=True), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, step(q, k, v), want))
    stream, graph, others = torch.cuda.Stream(), torch.cuda.CUDAGraph(), inputs(2, 12, 2, 900, 900, 64)
    flash_fwd(*others, causal=True)
    with torch.cuda.graph(graph, stream=stream):
        first = flash_fwd(q, k, v, causal=True, return_lse=True)
        flash_fwd(*others, causal=True)
        second = flash_fwd(q, k, v, causal=True, return_lse=True)
    for _ in range(3):
        q.normal_()
        graph.replay()
        torch.cuda.synchronize()
        want = flash_fwd(q, k, v, causal=True, return_lse=True)
        assert all(map(torch.equal, (*first, *second), (*want, *want)))
    assert 8 in packs and 1 in packs


@pytest.mark.gpu
def test_run_to_run_bitwise_equal():
    for batch, head_dim in product((1, 40), (64, 128, 256)):
        q, k, v = inputs(batch, 14, 2, 3, 3000, head_dim)
        first = flash_fwd(q, k, v, return_lse=True)
        for _ in range(10):
            assert all(map(torch.equal, first, flash_fwd(q, k, v, return_lse=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_that_runs_packs_and_is_faster(head_dim, planned_by):
    """Eight heads to a K/V head, decoding: their keys come once, not eight times."""
    q, k, v = inputs(16, 64, 8, 1, 8192, head_dim)
    problem = Problem(16, 64, 8, 1, 8192, head_dim)
    chosen, alone = plan.plan(problem, device.name()), plan.plan(problem._replace(heads_kv=64), device.name())

    def microseconds(config):
        planned_by(config)
        flash_fwd(q, k, v)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                flash_fwd(q, k, v)
            torch.cuda.synchronize()
        ours = [event for event in profile.key_averages() if event.key.startswith("flash_fwd_sm90")]
        assert [event.key.startswith(config.name) for event in ours] == [True]
        return ours[0].device_time_total / 10

    assert chosen.pack == 8 and alone.pack == 1
    assert microseconds(chosen) < 0.6 * microseconds(alone)
