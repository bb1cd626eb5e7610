"""Whatever goes together, drawn by chance: flash_fwd against float64, on a GPU, and interpreted without one."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cute_attn import BlockLists, flash_fwd
from cute_attn.block_mask import as_lists
from cute_attn.reference import attention
from cute_attn.tools.benchmark.edges import lse_atol
from tests.interpreter import interpreted
from tests.support.attention import bound, close_lse, inputs
from tests.support.requirements import interpreter

pytestmark = pytest.mark.usefixtures("one_thread")
DIM = st.sampled_from([8, 40, 64, 96, 128, 192, 256, 320])
SIDE = st.none() | st.integers(0, 200)
ALIKE = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case(NamedTuple):
    sizes: tuple  # batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim
    head_dim_v: int
    dtype: torch.dtype
    layout: str
    scale: float | None
    mask: dict
    softcap: float | None
    alibi: str
    sinks: bool
    score_mod: bool
    mask_mod: bool
    lists: bool
    dropout_p: float
    constant_time: bool
    seed: int


@st.composite
def cases(draw, longest=1100) -> Case:
    head_dim, heads = draw(DIM), draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    lengths = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    masks = st.sampled_from([{}, dict(causal=True)]) | st.builds(dict, window=st.tuples(SIDE, SIDE))
    return Case(
        (draw(st.integers(1, 2)), *heads, *lengths, head_dim),
        draw(st.just(head_dim) | DIM),
        draw(st.sampled_from([torch.bfloat16, torch.float16])),
        draw(st.sampled_from(["bhsd", "bshd"])),
        draw(st.none() | st.sampled_from([-0.2, 0.0, 0.5])),
        draw(masks),
        draw(st.none() | st.floats(0.5, 30)),
        draw(st.sampled_from(["", "", "of heads", "of sequences"])),
        *(draw(st.booleans()) for _ in range(3)),
        draw(st.sampled_from([False, False, True])),
        draw(st.sampled_from([0.0, 0.0, 0.3])),
        draw(st.sampled_from([False, False, True])),
        draw(st.integers(0, 99)),
    )


def arguments(case: Case, device) -> tuple[dict, dict]:
    """flash_fwd's and the reference's: lists of blocks are a mask_mod to it."""
    batch, heads, _, seqlen_q, seqlen_k, _ = case.sizes
    per_head = torch.linspace(-0.2, 0.4, batch * heads, device=device).view(batch, heads)
    table = torch.randn(seqlen_k, device=device)
    seen = lambda b, h, q_idx, kv_idx: (kv_idx + h) % 5 != b  # noqa: E731
    how = dict(scale=case.scale, softcap=case.softcap, **case.mask)
    how |= dict(alibi_slopes=per_head if case.alibi == "of sequences" else per_head[0]) if case.alibi else {}
    how |= dict(sinks=per_head[0].clone()) if case.sinks else {}
    how |= dict(score_mod=lambda s, b, h, q_idx, kv_idx: s * 0.9 + table[kv_idx] * (h + 1)) if case.score_mod else {}
    if case.dropout_p:
        how |= dict(dropout_p=case.dropout_p, rng_state=torch.tensor([case.seed, 7], device=device))
    ours, theirs = how | (dict(mask_mod=seen) if case.mask_mod else {}), dict(how)
    if case.mask_mod:
        theirs["mask_mod"] = seen
    if case.lists:
        which = torch.randint(0, 3, (1, heads, -(-seqlen_q // 64), -(-seqlen_k // 128)), device=device)
        ours["block_mask"] = BlockLists(*as_lists(which == 1), *as_lists(which == 2), block_size=(64, 128))

        def listed(b, h, q_idx, kv_idx):  # what the mask may cut, and what it leaves whole
            kind = which[0, h, q_idx // 64, kv_idx // 128]
            return (kind == 2) | ((kind == 1) & (seen(b, h, q_idx, kv_idx) if case.mask_mod else kind == 1))

        theirs["mask_mod"] = listed
    return ours, theirs


def right(case: Case, device):
    torch.manual_seed(case.seed)
    q, k, v = inputs(*case.sizes, case.dtype, device, case.layout, case.head_dim_v)
    ours, theirs = arguments(case, device)
    asked = dict(layout=case.layout, constant_time=case.constant_time, return_lse=True, return_row_max=True)
    if case.constant_time and case.lists:
        with pytest.raises(ValueError, match="constant_time: given with block_mask"):
            flash_fwd(q, k, v, **asked, **ours)
        return
    out = q.new_full((*q.shape[:3], case.head_dim_v), torch.nan)
    o, lse, row_max = flash_fwd(q, k, v, out=out, **asked, **ours)
    again = flash_fwd(q, k, v, layout=case.layout, constant_time=case.constant_time, **ours)  # without the maxima
    if case.layout == "bshd":
        q, k, v, o, again = (x.transpose(1, 2) for x in (q, k, v, o, again))
    want, want_lse, want_max = attention(q, k, v, **theirs, return_row_max=True)
    eye = torch.eye(k.shape[2], device=device).expand(*k.shape[:2], -1, -1)
    weights, _ = attention(q, k, eye, **theirs)
    alike = weights.to(v.dtype) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for found in (o, again):
        bound(found, want, alike)
    atol = lse_atol(q, k, case.scale)
    close_lse(lse, want_lse, atol)
    close_lse(row_max, want_max, atol)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(12))  # so that several workers share them: each example compiles its kernels
@settings(max_examples=5, **ALIKE)
@given(case=cases())
def test_together(part, case):
    right(case, "cuda")


@settings(max_examples=40, **ALIKE)
@given(case=cases(longest=150))
def test_together_on_the_cpu(case):
    right(case, "cpu")


@interpreter
@pytest.mark.parametrize("examples", [2, pytest.param(30, marks=pytest.mark.nightly)])
def test_together_interpreted(examples):
    settings(max_examples=examples, derandomize=True, **ALIKE)(given(case=cases(longest=150))(interpret))()


def interpret(case):
    with interpreted(seed=case.seed) if not (case.constant_time and case.lists) else nullcontext():
        right(case, "cpu")
