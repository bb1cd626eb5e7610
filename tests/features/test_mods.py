"""score_mod, mask_mod and block_mask: FlexAttention's functions and lists, in the kernel and on the CPU."""

import gc
import operator
import weakref
from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from cute_attn import BlockLists, compile, flash_fwd, mods, plan, reference
from cute_attn.block_mask import as_lists
from cute_attn.kernels import user_mod
from cute_attn.kernels.config import SparseBlocks
from cute_attn.plan import FeatureKey, Problem
from cute_attn.tools import inspect
from tests.support.attention import EDGES, bound, inputs
from tests.support.mods import (
    FACTOR,
    LENGTH,
    beyond,
    beyond_lists,
    by_hand,
    held_to_the_bound,
    mask_mods,
    never_beyond,
    of,
    pairs_of,
    score_mods,
)
from tests.support.nightly import sample

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
pytestmark = pytest.mark.usefixtures("one_thread")


@DEVICES
@pytest.mark.parametrize("name", score_mods("cpu"))
def test_score_mods(name, device):
    for (seqlen_q, seqlen_k), causal in product([(33, 47), (130, 70)], (False, True)):
        mod = score_mods(device)[name]
        held_to_the_bound(*inputs(2, 4, 2, seqlen_q, seqlen_k, 64, device=device), score_mod=mod, causal=causal)


@DEVICES
@pytest.mark.parametrize("name", mask_mods("cpu"))
def test_mask_mods(name, device):
    for (seqlen_q, seqlen_k), how in product([(33, 47), (130, 70)], [{}, dict(causal=True), dict(window=(20, 9))]):
        mod = mask_mods(device)[name]
        held_to_the_bound(*inputs(2, 4, 2, seqlen_q, seqlen_k, 64, device=device), mask_mod=mod, **how)


@DEVICES
def test_tensors_that_end_with_the_sequences(device):
    for seqlen_q, seqlen_k in (130, 200), (64, 64), (1, 65):
        how = pairs_of(seqlen_q, seqlen_k, device)
        for causal in (False, True):
            held_to_the_bound(*inputs(2, 4, 2, seqlen_q, seqlen_k, 64, device=device), causal=causal, **how)


@pytest.mark.gpu
def test_an_index_beyond_the_end_is_the_last():
    q, k, v = inputs(1, 2, 2, 300, 300, 64)
    ours, inside = beyond("cuda")
    assert torch.equal(flash_fwd(q, k, v, score_mod=ours), flash_fwd(q, k, v, score_mod=inside))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 160, 192, 224, 256])
def test_every_head_dim_at_the_edges(head_dim):
    score, mask = score_mods("cuda")["by_table"], mask_mods("cuda")["prefix"]
    for (seqlen_q, seqlen_k), causal in product(EDGES, (False, True)):
        held_to_the_bound(*inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim), score_mod=score, mask_mod=mask, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("name", mask_mods("cpu"))
def test_long(name):
    """Many blocks, rows and whole tiles without keys among them."""
    q, k, v = inputs(2, 4, 2, 1000, 1100, 128, torch.float16)
    for how in ({}, dict(causal=True), dict(window=(200, 50))):
        held_to_the_bound(q, k, v, mask_mod=mask_mods("cuda")[name], score_mod=score_mods("cuda")["sloped"], **how)


@DEVICES
@pytest.mark.parametrize("size", [128, 64, (256, 128), (192, 192)])
@pytest.mark.parametrize("name", mask_mods("cpu"))
def test_block_masks(name, size, device):
    """torch's own BlockMask; rows of blocks without any, lengths that end within a block."""
    for seqlen_q, seqlen_k, head_dim in [(300, 500, 64)] if device == "cpu" else [(300, 500, 128), (1000, 1100, 64)]:
        mod = mask_mods(device)[name]
        block_mask = create_block_mask(mod, 2, 4, seqlen_q, seqlen_k, device=device, BLOCK_SIZE=size)
        qkv = inputs(2, 4, 2, seqlen_q, seqlen_k, head_dim, device=device)
        for how in ({}, dict(causal=True), dict(window=(150, 70)), dict(score_mod=score_mods(device)["sloped"])):
            held_to_the_bound(*qkv, block_mask=block_mask, dense=mod, **how)


def lists(dense, full=None, block_size=(128, 128)):
    """BlockLists from (B, H, blocks, blocks) bool."""
    return BlockLists(*as_lists(dense), *(as_lists(full) if full is not None else ()), block_size=block_size)


@DEVICES
@pytest.mark.parametrize("size", [(128, 128), (192, 64)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_lists_of_ones_own(head_dim, size, device):
    """Shared by batches or heads; lists of full blocks or none; a mask_mod on the others alone."""
    q, k, v = inputs(2, 4, 2, 700, 600, head_dim, device=device)
    mod, (m, n) = mask_mods(device)["of_heads"], size
    for batch, heads in ((2, 4), (1, 4), (2, 1), (1, 1)):
        kinds = torch.randint(0, 4, (batch, heads, -(-700 // m), -(-600 // n)), device=device)
        kinds[:, :, 2] = 0  # 0, 1: none; 2: partial; 3: full

        def seen(b, h, q_idx, kv_idx, kinds=kinds, batch=batch, heads=heads):
            kind = kinds[b % batch, h % heads, q_idx // m, kv_idx // n]
            return (kind == 3) | ((kind == 2) & mod(b, h, q_idx, kv_idx))

        def listed(b, h, q_idx, kv_idx, kinds=kinds, batch=batch, heads=heads):
            return kinds[b % batch, h % heads, q_idx // m, kv_idx // n] >= 2

        held_to_the_bound(q, k, v, block_mask=lists(kinds == 2, kinds == 3, size), mask_mod=mod, dense=seen)
        held_to_the_bound(q, k, v, block_mask=lists(kinds >= 2, block_size=size), dense=listed)


def test_tiles_of_sparse_blocks():
    """As many rows as the sparse blocks, where the registers allow it: narrower ones would read K and V more often."""
    found = {}
    for head_dim, rows, dropout in product((64, 128, 256), (64, 128, 192, 384), (False, True)):
        key = FeatureKey(sparse=SparseBlocks(rows, 128, False), dropout=dropout)
        found[head_dim, rows, dropout] = plan.plan(Problem(1, 8, 8, 4096, 4096, head_dim, features=key)).tile_m
    of_192 = {key: tile_m for key, tile_m in found.items() if key[1] == 192}
    assert of_192.pop((128, 192, False)) == 192 and set(of_192.values()) == {64}
    assert all(tile_m == min(rows, 128) for (_, rows, _), tile_m in found.items() if rows != 192)


CONTENTS = {
    "more than there are": (of([4], [0, 1, 2]), "kv_num_blocks: 4 came; 0 to 3 are possible"),
    "fewer than none": (of([-1], [0, 1, 2]), "kv_num_blocks: -1 came"),
    "a block too far": (of([2], [0, 3, 0]), "kv_indices: 3 came; 0 to 2 are possible"),
    "a block before": (of([2], [0, -1, 0]), "kv_indices: -1 came"),
    "twice": (of([3], [0, 2, 0]), "block 0 of keys is named more than once for block 0 of queries, sequence 0, head 0"),
    "in both": (
        of([1], [2, 0, 0])._replace(full_kv_num_blocks=of([2], [0])[0], full_kv_indices=of([2], [1, 2, 0])[1]),
        "block 2 of keys is named more than once",
    ),
    "of the full": (
        of([1], [2, 0, 0])._replace(full_kv_num_blocks=of([9], [0])[0], full_kv_indices=of([2], [1, 2, 0])[1]),
        "full_kv_num_blocks: 9 came",
    ),
}
contents = pytest.mark.parametrize(("wrong", "words"), CONTENTS.values(), ids=CONTENTS)


@contents
def test_what_lists_contain_is_looked_at_on_the_cpu(wrong, words):
    with pytest.raises(ValueError, match=f"block_mask: {words}"):
        flash_fwd(*inputs(1, 2, 1, 64, 190, 64, device="cpu"), block_mask=wrong)


def test_behind_the_counts_lists_may_contain_anything():
    """As those of create_block_mask do."""
    q, k, v = inputs(1, 2, 1, 64, 190, 64, device="cpu")
    o = flash_fwd(q, k, v, block_mask=of([1], [2, 99, -5]))
    torch.testing.assert_close(o, flash_fwd(q, k[:, :, 128:], v[:, :, 128:]), atol=0.01, rtol=0.01)


@pytest.mark.gpu
@beyond_lists
def test_no_list_reads_beyond_a_tensor(counts, indices, seen):
    never_beyond(counts, indices, seen, "cuda")


@pytest.mark.gpu
@contents
def test_what_lists_contain_is_looked_at_where_asked(wrong, words):
    wrong = BlockLists(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in wrong))
    with pytest.raises(ValueError, match=f"block_mask: {words}"):
        flash_fwd(*inputs(1, 2, 1, 64, 190, 64), block_mask=wrong._replace(check=True))
    flash_fwd(*inputs(1, 2, 1, 64, 190, 64), block_mask=wrong)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_contents_cannot_be_looked_at_in_a_capture():
    q, k, v = inputs(1, 2, 1, 64, 190, 64)
    good = BlockLists(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in of([2], [0, 1, 2])))
    flash_fwd(q, k, v, block_mask=good._replace(check=True))
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(ValueError, match="check=True, and nothing can be read"),
    ):
        flash_fwd(q, k, v, block_mask=good._replace(check=True))


@pytest.mark.gpu
def test_what_no_list_names_is_not_read():
    q, k, v = inputs(1, 2, 2, 512, 512, 64)
    dense = torch.eye(4, dtype=torch.bool, device="cuda").expand(1, 1, 4, 4)
    k[:, :, 128:256], v[:, :, 128:256] = torch.nan, torch.nan
    o = flash_fwd(q, k, v, block_mask=lists(dense))
    assert o[:, :, 128:256].isnan().all()
    assert not o[:, :, :128].isnan().any() and not o[:, :, 256:].isnan().any()


@DEVICES
def test_aux(device):
    """Tensors and numbers at run time: new ones compile nothing."""

    def shifted(score, b, h, q_idx, kv_idx, bias, shift, factor):
        return score * factor + bias[kv_idx + shift]

    def near(b, h, q_idx, kv_idx, bias, shift, factor):
        return (q_idx - kv_idx).abs() < 10 * shift

    q, k, v = inputs(2, 4, 2, 60, 60, 64, device=device)
    for shift, factor in ((2, 0.5), (5, 1.5)):
        aux = torch.randn(100, device=device), shift, factor
        o = flash_fwd(q, k, v, score_mod=shifted, mask_mod=near, aux=aux)
        how = dict(score_mod=lambda *x, aux=aux: shifted(*x, *aux), mask_mod=lambda *x, aux=aux: near(*x, *aux))
        bound(o, reference.attention(q, k, v, **how)[0], by_hand(q, k, v, **how))


@pytest.mark.gpu
def test_nothing_is_compiled_twice(monkeypatch):
    """The same function, made anew, with other tensors of other sizes."""
    q, k, v = inputs(2, 4, 2, 60, 60, 64)
    flash_fwd(q, k, v, score_mod=score_mods("cuda")["by_table"], mask_mod=mask_mods("cuda")["documents"])
    monkeypatch.setattr(compile, "compile", None)
    held_to_the_bound(q, k, v, score_mod=score_mods("cuda")["by_table"], mask_mod=mask_mods("cuda")["documents"])


def key(function, *aux):
    return mods.prepare("score_mod", function, aux).kernel


def scaled(factor, table=None, other=lambda x: x):
    def mod(score, b, h, q_idx, kv_idx, *aux):
        return other(score) * factor if table is None else score + table[(kv_idx,) * table.dim()]

    return mod


def test_the_key():
    """Code, captured numbers and functions, types of tensors: not their values, nor which object it is."""
    assert key(scaled(2)) == key(scaled(2)) != key(scaled(3))
    assert key(scaled(2)) != key(scaled(2, other=lambda x: x + 1))
    assert key(scaled(2, torch.ones(3))) == key(scaled(2, torch.zeros(5)))
    assert key(scaled(2, torch.ones(3))) != key(scaled(2, torch.ones(3, 3)))
    assert key(scaled(2, torch.ones(3))) != key(scaled(2, torch.ones(3).half()))
    assert key(scaled(2), 1) != key(scaled(2), 1.0) != key(scaled(2))
    assert key(scaled(2), 1) == key(scaled(2), 7)
    assert key(lambda s, *_: s * FACTOR) != key(lambda s, *_: s * LENGTH)


def test_a_kernel_keeps_no_tensor_alive():
    table = torch.ones(3)
    alive, kernel = weakref.ref(table), key(scaled(2, table))
    del table
    gc.collect()
    assert alive() is None
    functions = dict(add=lambda a, b: a + b)
    assert user_mod.worked_out(kernel, [1.0, 0, 0, 0, 0], [{(0,): 0.5}], functions) == 1.5


def recursive(score, b, h, q_idx, kv_idx, depth=2):
    return recursive(score * 0.5, b, h, q_idx, kv_idx, depth - 1) if depth else score + q_idx


def test_what_calls_itself():
    assert key(recursive) == key(recursive)
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device="cpu")
    held_to_the_bound(q, k, v, score_mod=recursive)


def kernel(head_dim=64, causal=False, **features):
    return plan.with_features(plan.config(head_dim, "bf16", "bhsd", causal), FeatureKey(**features))


def test_differences_of_places_are_places():
    """What a block's scores share is worked out once; a float of it is a float of that, and a sum."""
    query, key = user_mod.Place(100, 3), user_mod.Place(640, 17)
    for found, shared, own in (
        (key - query, 540, 14),
        (key + query, 740, 20),
        (query - 7, 100 - 7, 3),
        (5 + key, 645, 17),
    ):
        assert (found.shared, found.own, found.x) == (shared, own, shared + own)
    assert user_mod.FUNCTIONS["sub"](key, query).own == 14
    for other in (key * 2, -key, key - True, key // 3, key + 2**30):
        assert type(other) is user_mod.Value


@pytest.mark.parametrize("op", [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne])
def test_places_are_compared_by_what_they_share(op):
    """Against what is a score's own: its compiler sees one number."""
    query, shared = user_mod.Place(100, 8), []
    for key, other in ((user_mod.Place(95, own), 95 + own) for own in (12, 13, 14)):
        found = op(query, key)
        assert type(found) is user_mod.Value and found.x == op(108, other)
        assert op(key, 108).x == op(other, 108) and op(108, key).x == op(108, other)
        shared.append(query.shared - key.shared)
    assert set(shared) == {5}


def test_a_place_times_a_number_is_multiplied_once_for_a_block(monkeypatch):
    """(kv_idx - q_idx) * 0.01: what is shared and what is the score's own, each times 0.01."""
    monkeypatch.setattr(user_mod, "Float32", float)
    query, key = user_mod.Place(100, 8), user_mod.Place(640, 17)
    assert ((key - query) * 0.25).x == (0.25 * (key - query)).x == 0.25 * (540 + 9)


def test_a_stride_of_1_is_known_to_the_compiler():

    def mod(score, b, h, q_idx, kv_idx, table):
        return score + table[kv_idx]

    table = torch.zeros(64)
    packed, strided = (mods.prepare("score_mod", mod, (x,)).kernel for x in (table, table[::2]))
    assert packed.arrays == (("float32", 1, True),) and strided.arrays == (("float32", 1, False),)
    assert packed.key != strided.key


@pytest.mark.machine_code
@pytest.mark.parametrize("name", score_mods("cpu"))
def test_score_mods_compile(name):
    assert not inspect.report(kernel(score_mod=key(score_mods("cpu")[name]))).problems()


KERNELS_OF_A_MASK = {
    "lists": dict(sparse=SparseBlocks(128, 128, True)),
    "causal": dict(causal=True),
    "causal, window": dict(causal=True, window=True),
    "d96": dict(head_dim=96),
    "d128 causal": dict(head_dim=128, causal=True),
}


@pytest.mark.machine_code
@pytest.mark.parametrize(("name", "how"), sample(6, mask_mods("cpu"), KERNELS_OF_A_MASK))
def test_mask_mods_compile(name, how):
    mod = mods.prepare("mask_mod", mask_mods("cpu")[name], ()).kernel
    assert not inspect.report(kernel(mask_mod=mod, **KERNELS_OF_A_MASK[how])).problems()


WRONG = {
    "no function": (dict(score_mod=3), TypeError, r"score_mod: 3 came; a function of \(score, b, h, q_idx, kv_idx"),
    "captured": (dict(score_mod=scaled(object())), TypeError, "score_mod: builtins.object came where a number is need"),
    "float64": (dict(score_mod=scaled(1, torch.ones(3).double())), TypeError, "captures a tensor of torch.float64"),
    "empty": (dict(score_mod=scaled(1, torch.ones(0))), ValueError, r"captures a tensor of shape \(0,\)"),
    "elsewhere": (
        dict(score_mod=scaled(1, torch.ones(9, device="meta"))),
        ValueError,
        "captures a tensor on meta, but",
    ),
    "learning": (dict(score_mod=scaled(1, torch.ones(9).requires_grad_())), ValueError, "requires grad, which gets no"),
    "aux": (dict(score_mod=scaled(1), aux=("x",)), TypeError, "aux: str at 0; tensors and numbers"),
    "aux alone": (dict(score_mod=scaled(1), aux=3), TypeError, "aux: builtins.int came; a tuple"),
    "lists": (dict(block_mask=torch.ones(3)), TypeError, "block_mask: Tensor came; a BlockMask of torch"),
    "sizes": (dict(block_mask=BlockLists(None, None, block_size=(100, 64))), ValueError, "multiples of 64"),
    "half": (dict(block_mask=BlockLists(None, None, torch.ones(1))), ValueError, "come together, or neither"),
    "nothing": (dict(block_mask=BlockLists(None, None)), TypeError, "kv_num_blocks: NoneType came; an int32 tensor is"),
    "counts alone": (
        dict(block_mask=BlockLists(torch.ones(1, 1, 1, dtype=torch.int32), None)),
        TypeError,
        "block_mask: kv_indices: NoneType came; an int32 tensor is needed",
    ),
    "a side": (
        dict(block_mask=BlockLists(*[torch.ones(1, 1, 1, dtype=torch.int32)] * 2, block_size=128)),
        ValueError,
        r"block_mask: block_size 128 came; a pair \(queries, keys\) is needed, multiples of 64, as \(128, 128\)",
    ),
    "check": (dict(block_mask=BlockLists(*[torch.ones(1)] * 2, check=1)), TypeError, "check: a bool is needed, 1 came"),
    "types": (dict(block_mask=BlockLists(torch.ones(1, 1, 1), None)), TypeError, "kv_num_blocks: torch.float32 came"),
    "shapes": (
        dict(block_mask=lists(torch.ones(1, 3, 1, 1, dtype=torch.bool))),
        ValueError,
        r"kv_num_blocks: shape \(1, 3, 1\) came; \(2 or 1, 4 or 1, 1\) is needed",
    ),
    "constant time": (
        dict(block_mask=lists(torch.ones(1, 1, 1, 1, dtype=torch.bool)), constant_time=True),
        ValueError,
        "constant_time: given with block_mask",
    ),
    "two masks": (
        dict(block_mask=create_block_mask(mask_mods("cpu")["prefix"], 1, 1, 8, 8, device="cpu"), mask_mod=scaled(1)),
        ValueError,
        "mask_mod: given beside a block_mask with a mask_mod of its own",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    how, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        flash_fwd(*inputs(2, 4, 2, 8, 8, 16, device="cpu"), **how)


def test_neither_gradients_nor_graphs():
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device="cpu")
    with pytest.raises(ValueError, match="score_mod: given with inputs that require grad"):
        flash_fwd(q.clone().requires_grad_(), k, v, score_mod=scaled(2))
    with pytest.raises(Exception, match="cannot pass the operator that torch"):
        torch.compile(lambda q: flash_fwd(q, k, v, score_mod=scaled(2)), backend="eager", fullgraph=True)(q)


@pytest.mark.parametrize(
    ("mod", "words"),
    [
        (lambda s, b, h, i, j: s if i > j else s * 2, "use torch.where for `if`"),
        (lambda s, b, h, i, j: torch.erfinv(s), "torch.erfinv is not known to a kernel"),
        (lambda s, b, h, i, j: s.cumsum(0), "cumsum is not known to a kernel"),
    ],
)
def test_what_a_kernel_does_not_know(mod, words):
    with pytest.raises(Exception, match=words):
        compile.compile(kernel(score_mod=key(mod)))
