"""What changes scores, in packed sequences: each sequence as if it were alone, under its own number."""

from itertools import product

import pytest
import torch

from cute_attn import compile, flash_fwd_varlen, mods, plan, reference
from cute_attn.flash_attn_interface import flash_attn_varlen_func
from cute_attn.plan import HEAD_DIMS, Kinds
from cute_attn.tools import inspect
from tests.features.test_mods import by_hand, mask_mods, score_mods
from tests.features.test_varlen import MARK, marked, one_sequence, packed
from tests.support.attention import bound, close_lse, sdpa
from tests.support.nightly import sample

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SEQUENCES = [(1, 1), (0, 0), (65, 63), (0, 17), (33, 0), (70, 130)]
HEADS, BATCH = 4, len(SEQUENCES)
pytestmark = pytest.mark.usefixtures("one_thread")


def cases(device) -> dict[str, dict]:
    per_head = torch.linspace(-0.3, 0.5, HEADS, device=device)
    per_sequence = torch.linspace(-0.2, 0.6, BATCH * HEADS, device=device).view(BATCH, HEADS)
    return {
        "softcap": dict(softcap=2.0),
        "softcap, causal": dict(softcap=2.0, causal=True),
        "alibi": dict(alibi_slopes=per_head),
        "alibi of each sequence, causal": dict(alibi_slopes=per_sequence, causal=True),
        "sinks, window": dict(sinks=per_head, window=(30, 5)),
        "all": dict(softcap=2.0, alibi_slopes=per_sequence, sinks=per_head, causal=True),
    }


def functions(device) -> dict[str, dict]:
    every = torch.linspace(0.5, 1.5, BATCH, device=device)

    def of_sequence(score, b, h, q_idx, kv_idx):
        return score * every[b] + (h + 1) * 0.01 * (q_idx - kv_idx)

    def odd_sequences(b, h, q_idx, kv_idx):
        return (b % 2 == 0) | (kv_idx % 3 != 0)

    return {
        "score_mod": dict(score_mod=of_sequence),
        "by table, causal": dict(score_mod=score_mods(device)["by_table"], causal=True),
        "mask_mod": dict(mask_mod=odd_sequences),
        "documents, causal": dict(mask_mod=mask_mods(device)["documents"], causal=True),
        "both, window": dict(score_mod=of_sequence, mask_mod=odd_sequences, window=(30, 5)),
    }


def alone(n, alibi_slopes=None, score_mod=None, mask_mod=None, **how) -> dict:
    """The n-th sequence's own arguments: as the 0-th of a batch of one."""
    if alibi_slopes is not None:
        how["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[n : n + 1]
    if score_mod is not None:
        how["score_mod"] = lambda s, b, *places: score_mod(s, torch.full_like(b, n), *places)
    if mask_mod is not None:
        how["mask_mod"] = lambda b, *places: mask_mod(torch.full_like(b, n), *places)
    return how


def check(q, k, v, lengths, **how):
    """Against float64, sequence by sequence; rows of none stay as they were. Maxima beside."""
    out = marked(q)
    o, lse, row_max = flash_fwd_varlen(q, k, v, **lengths, **how, return_lse=True, return_row_max=True, out=out)
    again = flash_fwd_varlen(q, k, v, **lengths, **how, out=marked(q))
    untouched = torch.ones(len(q), dtype=torch.bool, device=q.device)
    queries = reference.parts(lengths["cu_seqlens_q"], lengths.get("seqused_q"), len(q))
    keys = reference.parts(lengths["cu_seqlens_k"], lengths.get("seqused_k"), len(k))
    for n, (a, b) in enumerate(zip(queries, keys, strict=True)):
        untouched[a] = False
        if a.stop == a.start:
            continue
        one, own = one_sequence(q, k, v, a, b), alone(n, **how)
        theirs = by_hand if "score_mod" in how or "mask_mod" in how else sdpa
        want, want_lse, want_max = reference.attention(*one, **own, return_row_max=True)
        allowed = theirs(*one, **dict(causal=False) | own) if b.stop > b.start else want
        for found in (o, again):
            bound(found[None, a].transpose(1, 2), want, allowed)
        close_lse(lse[None, :, a], want_lse)
        close_lse(row_max[None, :, a], want_max)
    for found in (o, again):
        assert (found[untouched].view(torch.int16) == MARK).all(), "a row of no sequence was written"


@DEVICES
@pytest.mark.parametrize("name", {**cases("cpu"), **functions("cpu")})
def test_each_sequence_is_its_own(name, device):
    for head_dim, slack in ((64, 0), (128, 2)):
        tensors = packed(SEQUENCES, HEADS, 2, head_dim, where=device, slack=slack)
        check(*tensors, **{**cases(device), **functions(device)}[name])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim):
    sizes = [(300, 700), (1, 1025), (1023, 1024), (129, 127)]
    tensors = packed(sizes, HEADS, 2, head_dim - 8)
    heads = torch.linspace(-0.3, 0.5, HEADS, device="cuda")
    for mask in (dict(), dict(causal=True), dict(window=(200, 40))):
        check(*tensors, softcap=2.0, alibi_slopes=heads, sinks=heads, **mask)
        check(*tensors, score_mod=score_mods("cuda")["sloped"], mask_mod=mask_mods("cuda")["prefix"], **mask)


def test_the_interface_of_flash_attention_has_softcaps():
    q, k, v, lengths = packed(SEQUENCES, HEADS, 2, 64, where="cpu", margin=0)
    found = flash_attn_varlen_func(q, k, v, *lengths.values(), 70, 130, softcap=2.0, causal=True)
    assert torch.equal(found, flash_fwd_varlen(q, k, v, **lengths, softcap=2.0, causal=True))


@pytest.mark.gpu
def test_new_values_compile_nothing(monkeypatch):
    tensors = packed(SEQUENCES, HEADS, 2, 64)
    for scale in (1.0, -2.0):
        heads = torch.linspace(-0.3, 0.5, HEADS, device="cuda") * scale
        check(*tensors, softcap=3.0 + scale, alibi_slopes=heads, sinks=heads)
        monkeypatch.setattr(compile, "compile", None)


WRONG = {
    "softcap": (dict(softcap=-1.0), ValueError, "softcap: -1.0 came"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes: shape \(3,\) came; \(4,\) or \(6, 4\) is"),
    "sinks": (dict(sinks=torch.ones(4).double()), TypeError, "sinks: torch.float64 came"),
    "score_mod": (dict(score_mod=3), TypeError, "score_mod: 3 came; a function of"),
    "aux": (dict(score_mod=lambda s, *_: s, aux=3), TypeError, "aux: builtins.int came; a tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    how, error, words = WRONG[name]
    q, k, v, lengths = packed(SEQUENCES, HEADS, 2, 64, where="cpu")
    with pytest.raises(error, match=words):
        flash_fwd_varlen(q, k, v, **lengths, **how)


def test_neither_gradients_nor_graphs():
    q, k, v, lengths = packed(SEQUENCES, HEADS, 2, 64, where="cpu")
    heads = torch.ones(HEADS)
    with pytest.raises(
        ValueError, match="softcap, sinks: asked for of packed sequences, with inputs that require grad"
    ):
        flash_fwd_varlen(q.clone().requires_grad_(), k, v, **lengths, softcap=2.0, sinks=heads)
    compiled = torch.compile(flash_fwd_varlen, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="alibi_slopes: asked for of packed sequences"):
        compiled(q, k, v, **lengths, alibi_slopes=heads)


@pytest.mark.machine_code
@pytest.mark.parametrize(
    ("head_dim", "causal", "masked"), sample(5, [64, 96, 128, 192, 256], [False, True], [False, True])
)
def test_healthy(head_dim, causal, masked):
    mod = mods.prepare("mask_mod", mask_mods("cpu")["documents"], ()).kernel
    kinds = Kinds(mask_mod=mod, row_max=True) if masked else Kinds(softcap=True, alibi=True, sinks=True)
    config = plan.varlen(head_dim, "bf16", causal, kinds)
    assert config.packed and config.sinks == kinds.sinks and inspect.report(config).problems() == []


def test_plain_calls_have_the_kernels_that_they_had():
    for d, causal, window in product(HEAD_DIMS, (False, True), (False, True)):
        config = plan.varlen(d, "bf16", causal, Kinds(window=window))
        assert not (config.score.name or config.sinks or config.row_max) and config.mask.windowed == window
