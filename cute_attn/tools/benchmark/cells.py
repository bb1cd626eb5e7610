"""The dense benchmark's rows: one problem, all implementations, and the FlashAttention papers' grid."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ... import reference
from ...problem import Problem
from . import frame
from .frame import Row, Setup
from .implementations import BASELINES, Implementation, Inputs, make_inputs
from .workload import Spec

CHECKED_HEADS = 8
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)  # of the FlashAttention papers' grid


class Truth:
    """float32 attention of up to 8 (batch, head) pairs, spread over all: what every output is held against.

    how: arguments of `reference.attention`, of all heads.
    """

    def __init__(self, x: Inputs, **how: Any):
        p = x.problem
        ratio, total = p.heads // p.heads_kv, p.batch * p.heads
        count = min(CHECKED_HEADS, total)
        flat = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
        self.pairs = [divmod(i, p.heads) for i in flat]
        self._o = []
        for b, h in self.pairs:
            one = (t[None, None] for t in (x.q[b, h], x.k[b, h // ratio], x.v[b, h // ratio]))
            own = dict(causal=p.causal, dtype=torch.float32) | of_head(how, b, h)
            self._o.append(reference.attention(*one, **own)[0][0, 0])

    def errors(self, o: torch.Tensor) -> tuple[float, float]:
        """Of o (B, H, Sq, D): the largest, and their norm over the truth's (Frobenius); inf where o is not finite."""
        if not torch.isfinite(o).all():
            return torch.inf, torch.inf
        top, square, norm = 0.0, 0.0, 0.0
        for (b, h), true in zip(self.pairs, self._o, strict=True):
            wrong = (o[b, h].float() - true).double()
            top = max(top, wrong.abs().max().item())
            square += wrong.square().sum().item()
            norm += true.double().square().sum().item()
        return top, (square / norm) ** 0.5 if norm else square**0.5


def of_head(how: Mapping[str, Any], b: int, h: int) -> dict[str, Any]:
    """The arguments of one head alone, whose place is (0, 0)."""
    own = dict(how)
    own |= {name: how[name][..., h : h + 1] for name in ("alibi_slopes", "sinks") if name in how}
    if "score_mod" in how:
        own["score_mod"] = lambda score, _b, _h, q, kv: how["score_mod"](score, b, h, q, kv)
    if "mask_mod" in how:
        own["mask_mod"] = lambda _b, _h, q, kv: how["mask_mod"](b, h, q, kv)
    return own


def row(
    problem: Problem, implementations: Sequence[Implementation], absent: Mapping[str, str], on: torch.device
) -> Row:
    """One problem by all of these; `absent` says why some are not on this machine."""
    inputs = make_inputs(problem, on)
    names = [one.name for one in implementations]
    reasons = {one.name: absent.get(one.name) or one.refuses(problem) for one in implementations}
    baseline = "cudnn" if "cudnn" in names else next((name for name in names if name in BASELINES), "")
    return Row(
        Spec(problem),
        {one.name: partial(one.prepare, inputs) for one in implementations},
        Truth(inputs),
        baseline=baseline,
        absent={name: reason for name, reason in reasons.items() if reason},
    )


def measure(
    problem: Problem, implementations: Sequence[Implementation], absent: Mapping[str, str], setup: Setup
) -> list[dict[str, Any]]:
    """A record per implementation and mode of one problem."""
    return frame.measure(lambda on: [row(problem, implementations, absent, on)], setup)


def sweep(hidden: int = 2048, tokens: int = 16384) -> list[tuple[tuple[int, int, int, int], bool]]:
    """The FlashAttention papers' grid, 36 of ((B, H, S, D), causal): 16k tokens, hidden size 2048."""
    return [
        ((tokens // seqlen, hidden // head_dim, seqlen, head_dim), causal)
        for head_dim in (64, 128, 256)
        for seqlen in SEQLENS
        for causal in (False, True)
    ]
