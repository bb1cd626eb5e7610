"""Appending: `append_kv`, and `flash_fwd_kvcache` with new keys, values and rotary embeddings."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cute_attn import append_kv, flash_fwd_kvcache
from cute_attn.kernels.append_sm90 import ROTARY, WHERE, AppendConfig
from cute_attn.tools import inspect
from tests.interpreter import interpreted
from tests.support.append import PLACES, beside, check, close, room, rotary, turned
from tests.support.kvcache import STORAGE, right, stored
from tests.support.nightly import sample
from tests.support.requirements import interpreter
from tests.support.varlen import int32

LENGTHS = [40, 0, 17, 63]
KINDS = {
    "pages": lambda where: (room(LENGTHS, [3] * 4, 16, seqlen_q=3, where=where), dict(causal=True)),
    "rows that threads copy": lambda where: (room(LENGTHS, [2] * 4, 5, seqlen_q=2, where=where), dict(window=(20, 0))),
    "packed": lambda where: (
        room(LENGTHS, [3, 1, 0, 7], 16, packed=[2, 0, 5, 1], d=64, d_v=32, where=where),
        dict(causal=True, max_seqlen_q=5),
    ),
    "no room for all": lambda where: (
        beside([40, 3, 17, 46], [4] * 4, 48, index=True, seqlen_q=2, where=where),
        dict(causal=True),
    ),
    "one query": lambda where: (room(LENGTHS, [1] * 4, 64, d=128, heads=8, where=where), dict(softcap=3.0)),
}
TURNS = {
    "as they are": lambda where: {},
    "neighbours": lambda where: rotary(32, where),
    "halves": lambda where: rotary(64, where, interleaved=False),
    "of 16 bits": lambda where: rotary(16, where, interleaved=False, dtype=torch.bfloat16),
    "by their own places": lambda where: rotary(48, where) | dict(rotary_seqlens=int32([3, 400, 0, PLACES - 2], where)),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu(kind, turn):
    new, asked = KINDS[kind]("cpu")
    check(new, **asked, **TURNS[turn]("cpu"))


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("kind", "turn"), sample(2, KINDS, TURNS))
def test_interpreted(kind, turn):
    new, asked = KINDS[kind]("cpu")
    with interpreted(num_sms=9) as configs:
        check(new, **asked, **TURNS[turn]("cpu"))
    assert {type(config).__name__ for config in configs} == {"AppendConfig", "FwdConfig"}


def test_one_length_for_all():
    """Of the same numbers."""
    found = []
    for length in (int32([20, 20], "cpu"), 20):
        torch.manual_seed(1)
        new = beside([20, 20], [2, 2], 24, seqlen_q=2)
        new.case.how.update(cache_seqlens=length)
        found.append(flash_fwd_kvcache(**new.case.call, **new.given, causal=True, **rotary(16, "cpu")))
    assert torch.equal(*found)


# append_kv
def tokens(slots, page_size, d=64, d_v=64, where="cpu", storage="separate", dtype=torch.bfloat16):
    k, v = (torch.randn(len(slots), 2, n, device=where).to(dtype) for n in (d, d_v))
    pages = max(max(slots) // page_size + 1, 3)
    caches = stored(STORAGE[storage], (pages, page_size, 2, d, d_v), dtype, where)
    return k, v, *caches, torch.tensor(slots, device=where)


def written(k, v, k_cache, v_cache, slots, positions=None, **turn):
    """Each row in its slot, and NaN everywhere else, as before."""
    append_kv(k, v, k_cache, v_cache, slots, **turn, **({} if positions is None else dict(rotary_positions=positions)))
    total = k_cache.shape[0] * k_cache.shape[1]
    for new, cache in ((k, k_cache), (v, v_cache)):
        for t, slot in enumerate(slots.tolist()):
            if 0 <= slot < total:
                row = cache[slot // cache.shape[1], slot % cache.shape[1]]
                rotates = positions is not None and new is k
                close(row, turned(new[t : t + 1], int(positions[t]), **turn)[0] if rotates else new[t])
                assert rotates or torch.equal(row, new[t])
                row.fill_(torch.nan)
        assert cache.isnan().all(), "a row was written that has no slot"


SLOTS = [7, -1, 33, 0, 1, 500, 12, -(2**40)]
EACH_STORAGE = pytest.mark.parametrize("storage", STORAGE)


@EACH_STORAGE
def test_slots_on_the_cpu(storage):
    k, v, *rest, slots = tokens([s for s in SLOTS if s < 100], 16, storage=storage)
    written(k, v, *rest, slots)
    written(k, v, *rest, slots, torch.arange(len(k), dtype=torch.int32) * 90, **rotary(64, "cpu"))


@interpreter
@pytest.mark.machine_code
@pytest.mark.parametrize(("storage", "turn"), sample(2, STORAGE, [None, "neighbours", "halves"]))
def test_slots_interpreted(storage, turn):
    k, v, *rest, slots = tokens([s for s in SLOTS if s < 100], 5, d=96, d_v=32, storage=storage)
    how = {} if turn is None else dict(positions=torch.arange(len(k), dtype=torch.int32) * 90) | TURNS[turn]("cpu")
    with interpreted() as configs:
        written(k, v, *rest, slots, **how)
    assert [config.where for config in configs] == ["slots"]


def test_of_a_packed_projection():
    """k and v as they lie beside q."""
    qkv = torch.randn(6, 8, 64).bfloat16()
    _, k, v = qkv.split([4, 2, 2], dim=1)
    _, _, *caches, slots = tokens([1, 5, 2, 9, 11, -1], 4)
    written(k, v, *caches, slots)


@interpreter
def test_nothing_to_write():
    k, v, *caches, _ = tokens([3], 16)
    with interpreted() as configs:
        append_kv(k[:0], v[:0], *caches, torch.zeros(0, dtype=torch.int64))
    assert not configs


# What is wrong
K, V, K_CACHE, V_CACHE, AT = tokens([3, 1, 20], 16)
TABLE = torch.ones(9, 16)
TURN = dict(rotary_cos=TABLE, rotary_sin=TABLE, rotary_positions=int32([0, 1, 2], "cpu"))
WRONG = {
    "type": (dict(k=K.half()), TypeError, "v: torch.bfloat16 does not match k's torch.float16"),
    "float32": (dict(k=K.float()), TypeError, "k: torch.float32 came; bf16 or fp16 is needed"),
    "dimensions": (dict(k=K[None]), ValueError, r"k: 4 dimensions, .*\(T, Hk, D\) is needed"),
    "fewer tokens": (dict(v=V[:2]), ValueError, "v: shape .* does not fit k's"),
    "heads": (
        dict(k=K[:, :1], v=V[:, :1]),
        ValueError,
        r"k_cache: \(2, 64\) heads and columns came, and k has \(1, 64\)",
    ),
    "columns": (dict(v=V[..., :32]), ValueError, r"v_cache: \(2, 64\) heads and columns came, and v has \(2, 32\)"),
    "head dim": (dict(k=K[..., :12], k_cache=K_CACHE[..., :12]), ValueError, "k: head_dim 12 came; a multiple of 8"),
    "pages": (dict(v_cache=V_CACHE[:1]), ValueError, "v_cache: shape .* does not fit k_cache's"),
    "cache dimensions": (dict(k_cache=K_CACHE[0]), ValueError, r"k_cache: 3 dimensions, .*\(pages, page_size, Hk, D\)"),
    "strides": (
        dict(k=K.transpose(0, 2).contiguous().transpose(0, 2)),
        ValueError,
        "k: stride .* in the last dimension",
    ),
    "slots' type": (dict(slot_mapping=AT.int()), TypeError, "slot_mapping: torch.int32 came, torch.int64 is needed"),
    "slots": (dict(slot_mapping=AT[:2]), ValueError, r"slot_mapping: shape \(2,\) came, \(3,\) is needed"),
    "no tensor": (dict(slot_mapping=[1, 2, 3]), TypeError, "slot_mapping: a torch.Tensor is needed"),
    "scale": (dict(k_scale=1.0), NotImplementedError, "k_scale: FP8 caches are not supported yet"),
    "v's scale": (dict(v_scale=torch.ones(1)), NotImplementedError, "v_scale: FP8 caches are not supported yet"),
    "gradients": (dict(k=K.clone().requires_grad_()), ValueError, "k: requires grad, and what is written"),
    "one of both": (dict(rotary_cos=TABLE), ValueError, "rotary_cos: given without rotary_sin; pass both"),
    "no places": (TURN | dict(rotary_positions=None), ValueError, "rotary_positions: None came with rotary_cos"),
    "places alone": (dict(rotary_positions=TURN["rotary_positions"]), ValueError, "rotary_positions: given without"),
    "places' type": (TURN | dict(rotary_positions=AT), TypeError, "rotary_positions: torch.int64 came"),
    "table": (
        TURN | dict(rotary_sin=TABLE[:3]),
        ValueError,
        "rotary_sin: .* of shape .* they have the same",
    ),
    "table's type": (
        TURN | dict(rotary_cos=TABLE.half()),
        TypeError,
        "rotary_cos: torch.float16 came; torch.float32 or",
    ),
    "angles": (
        TURN | dict(rotary_cos=TABLE[:, :4].clone(), rotary_sin=TABLE[:, :4].clone()),
        ValueError,
        "rotary_cos: 4 angles, for R = 8 of 64 columns; R is a multiple of 16 up to k's D",
    ),
    "more angles": (
        TURN | dict(rotary_cos=torch.ones(9, 40), rotary_sin=torch.ones(9, 40)),
        ValueError,
        "rotary_cos: 40 angles, for R = 80 of 64 columns",
    ),
    "a flag": (TURN | dict(rotary_interleaved=1), TypeError, "rotary_interleaved: a bool is needed, 1 came"),
    "of the cache": (dict(k=K_CACHE[0, :3]), ValueError, "k: shares memory with k_cache, which is written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    changes, error, words = WRONG[case]
    call = dict(k=K, v=V, k_cache=K_CACHE, v_cache=V_CACHE, slot_mapping=AT) | changes
    with pytest.raises(error, match=words):
        append_kv(**call)
    assert K_CACHE.isnan().all()


NEW, _ = KINDS["pages"]("cpu")
WRONG_IN_A_CALL = {
    "k alone": (dict(v=None), "v: None came with k; pass k and v, the new tokens, or omit k"),
    "rotary alone": (dict(k=None, v=None, rotary_cos=TABLE, rotary_sin=TABLE), "k: None came with rotary_cos"),
    "fewer sequences": (dict(k=NEW.given["k"][:2], v=NEW.given["v"][:2]), "k: 2 sequences came with q's 4"),
    "packed": (
        dict(cu_seqlens_k_new=int32([0, 1], "cpu")),
        r"k: 4 dimensions.*\(total, Hk, D\), with cu_seqlens",
    ),
    "out": (dict(out=NEW.case.q), "out: shares memory with q"),
    "out's shape": (dict(out=NEW.case.q[:2]), "out: shape"),
    "softcap": (dict(softcap=-1.0), "softcap"),
    "scale": (dict(scale=1e39), "scale"),
    "places": (TURN | dict(rotary_positions=None), "rotary_seqlens: shape"),
    "lengths": (dict(cache_seqlens=1 << 20), "cache_seqlens"),
    "an int with no room": (
        dict(cache_seqlens=78, page_table=NEW.case.how["page_table"][:, :5]),
        "78 rows and 3 new ones",
    ),
}


@pytest.mark.parametrize("case", WRONG_IN_A_CALL)
def test_nothing_is_written_where_a_call_is_wrong(case):
    changes, words = WRONG_IN_A_CALL[case]
    changes = {name: x for name, x in changes.items() if name != "rotary_positions"}
    if case == "places":
        changes["rotary_seqlens"] = int32([1], "cpu")
    before = NEW.case.k_cache.clone()
    with pytest.raises(ValueError, match=words):
        flash_fwd_kvcache(**NEW.case.call | NEW.given | changes)
    assert torch.equal(before.view(torch.int16), NEW.case.k_cache.view(torch.int16))


def test_what_a_call_like_one_before_is_asked_anew():
    """Whether there is room by a number, whether something learns, whether memory is shared."""
    new = beside([20, 20], [2, 2], 24, seqlen_q=2)
    call = new.case.call | new.given
    with interpreted(kernel=lambda *_: None):
        flash_fwd_kvcache(**call | dict(cache_seqlens=np.int64(22)))
        for changes, words in (
            (dict(cache_seqlens=23), "cache_seqlens: 23 rows and 2 new ones came, and 24"),
            (dict(k=new.given["k"].clone().requires_grad_()), "k: requires grad"),
            (dict(k=new.case.k_cache[:, 3:5]), "k: shares memory with k_cache"),
            (dict(rotary_interleaved=1), "rotary_interleaved: a bool is needed"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                flash_fwd_kvcache(**call | dict(cache_seqlens=20) | changes)


@pytest.mark.parametrize("packed", [True, False])
def test_no_sequences(packed):
    q = torch.zeros(*((0,) if packed else (0, 1)), 2, 64).bfloat16()
    cu = dict(cu_seqlens_q=int32([0], "cpu"), cu_seqlens_k_new=int32([0], "cpu")) if packed else {}
    how = dict(cache_seqlens=int32([], "cpu"), cache_batch_idx=int32([], "cpu"), **cu)
    cache = torch.zeros(2, 8, 2, 64).bfloat16()
    new = torch.zeros(*((5,) if packed else (0, 1)), 2, 64).bfloat16()
    o = flash_fwd_kvcache(q, cache, cache.clone(), **how, k=new, v=new, **rotary(16, "cpu"))
    assert o.shape == q.shape and (cache == 0).all()


# Traced
@pytest.mark.parametrize("kind", ["pages", "packed", "no room for all"])
def test_traced(kind):
    """torch.compile, and make_fx: the cache is written by what is recorded too."""
    new, asked = KINDS[kind]("cpu")
    turn = rotary(32, "cpu")
    names = [name for name, x in new.given.items() if isinstance(x, torch.Tensor)]

    def function(k_cache, v_cache, *given):
        call = new.case.call | dict(zip(names, given, strict=True)) | dict(k_cache=k_cache, v_cache=v_cache)
        return flash_fwd_kvcache(**call, **asked, **turn)

    def run(f):
        caches = new.case.k_cache.clone(), new.case.v_cache.clone()
        o = f(*caches, *(new.given[name] for name in names))
        return [x.nan_to_num(7.0) for x in (o if "cu_seqlens_q" not in new.case.how else o[2:9], *caches)]

    want = run(function)
    traced = make_fx(function)(new.case.k_cache.clone(), new.case.v_cache.clone(), *(new.given[n] for n in names))
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), traced):
        for x, y in zip(run(f), want, strict=True):
            torch.testing.assert_close(x, y)


def test_append_kv_compiled():
    def function(k, v, k_cache, v_cache, slots):
        append_kv(k * 2, v, k_cache, v_cache, slots)
        return k_cache[0].nan_to_num(0).sum()

    k, v, *caches, slots = tokens([3, -1, 20], 16)
    want = [x.clone() for x in caches]
    total = function(k, v, *want, slots)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(k, v, *caches, slots), total)
    for x, y in zip(caches, want, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("turn", [True, False])
def test_opcheck(turn):
    k, v, *caches, slots = tokens([3, -1, 20], 16)
    caches = [x.nan_to_num() for x in caches]
    how = (TABLE, TABLE, True, int32([0, 1, 2], "cpu")) if turn else (None, None, True, None)
    torch.library.opcheck(torch.ops.cute_attn.append_kv, (k, v, *caches, slots, *how))


def test_no_vmap():
    with pytest.raises(TypeError, match=r"k: a tensor inside a transform of .* came"):
        torch.vmap(lambda k: append_kv(k, V, K_CACHE, V_CACHE, AT))(K[None])


# The kernel
CONFIGS = [
    *(AppendConfig(where=where) for where in WHERE),
    *(AppendConfig(where=where, rotary=rotary, table="fp32") for where in WHERE for rotary in ROTARY[1:]),
    *(AppendConfig(where=where, rotary="halves", table="bf16", queries=True) for where in WHERE[1:]),
]


@pytest.mark.machine_code
@pytest.mark.parametrize("config", sample(4, CONFIGS), ids=lambda config: config.name)
def test_machine_code(config):
    """16 bytes at a time, and no registers in memory."""
    build = inspect.build(config)
    assert inspect.spill_stores(build.log) == 0 and "0 bytes stack frame" in build.log
    kinds = [x.opcode for x in inspect.parse(build.sass)]
    assert kinds.count("LDG.E.128") >= 2 + config.queries and kinds.count("STG.E.128") == 2 + config.queries
    first = next(i for i, kind in enumerate(kinds) if kind.startswith("LDG"))
    assert kinds.index("ACQBULK") < first, "before global memory is touched"


# On the GPU
@pytest.mark.gpu
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", KINDS)
def test_right(kind, turn):
    new, asked = KINDS[kind]("cuda")
    check(new, **asked, **TURNS[turn]("cuda"))


@pytest.mark.gpu
@EACH_STORAGE
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_slots(storage, page_size):
    for d, d_v, dtype in ((128, 128, torch.bfloat16), (40, 72, torch.float16), (576, 512, torch.bfloat16)):
        k, v, *rest = tokens([*torch.randperm(300)[:200].tolist(), -1], page_size, d, d_v, "cuda", storage, dtype)
        written(k, v, *rest)
        positions = torch.randint(0, PLACES, (len(k),), device="cuda", dtype=torch.int32)
        written(k, v, *rest, positions, **rotary(32, "cuda"))


@pytest.mark.gpu
def test_a_graph_appends_where_the_lengths_say():
    """Decoding by replays: the lengths grow between them."""
    new = room([5, 0, 30], [40] * 3, 16, heads=8, where="cuda")
    case, turn = new.case, rotary(32, "cuda")
    k, v, lengths = new.given["k"][:, :1].clone(), new.given["v"][:, :1].clone(), case.how["cache_seqlens"]
    run = lambda: flash_fwd_kvcache(**case.call, k=k, v=v, causal=True, **turn)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run()
    keys, values = list(case.keys), list(case.values)
    for step in range(40):
        k.copy_(new.given["k"][:, step : step + 1])
        v.copy_(new.given["v"][:, step : step + 1])
        graph.replay()
        q = torch.stack([turned(x, int(n), **turn) for x, n in zip(case.q, lengths, strict=True)])
        for b, n in enumerate(lengths.tolist()):
            keys[b], values[b] = torch.cat((keys[b], turned(k[b], n, **turn))), torch.cat((values[b], v[b]))
        right(case._replace(q=q, keys=keys, values=values), o, None, causal=True)  # roundings of q may be others
        lengths += 1
