"""When one CTA's producer and warpgroups do what: clock samples of a kernel that notes them, as spans."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from ... import compile, device
from ...kernels.config import FwdConfig
from ...kernels.trace import EVENTS, HEAD, SAMPLES
from ...operands import o_like
from ...plan import config, kernel_dims, plan
from ...problem import Problem
from .implementations import make_inputs

PRODUCER = 0
ENDS = {  # the softmax: with P's conversion, until the next step, or the last PV
    "step": ("QK",),
    "QK": ("softmax",),
    "PV": ("PV done",),
    "softmax": ("step", "PV"),
    "store": ("store done",),
}


class Sample(NamedTuple):
    event: str  # of EVENTS
    clock: int  # the SM's cycles since the first sample of the CTA


class Span(NamedTuple):
    """role: PRODUCER, or the warpgroup's number from 1 on; what: an event that has an end; start, end: cycles."""

    role: int
    what: str
    start: int
    end: int


def timeline_config(problem: Problem, gpu: str | None = None) -> FwdConfig:
    """The planned kernel with its clock samples; where the plan splits the keys, its class's kernel for more tiles."""
    p, planned = problem, plan(problem, gpu)
    if planned.split > 1:
        head_dim, head_dim_v = kernel_dims(p.head_dim, p.head_dim_v)
        planned = config(head_dim, p.dtype, p.layout, p.causal, gpu, head_dim_v)
    return replace(planned, timeline=True)


def record(problem: Problem) -> list[list[Sample]]:
    """Runs the kernel on this GPU, twice, and returns the second run's samples of each role."""
    gpu = device.get(torch.cuda.current_device())
    chosen, inputs = timeline_config(problem, gpu.name), make_inputs(problem, torch.device("cuda", gpu.index))
    q, k, v = inputs.bshd() if problem.layout == "bshd" else inputs[:3]
    o, kernel = o_like(q, v), compile.get(chosen)
    for _ in range(2):
        notes = torch.zeros(HEAD + 2 * SAMPLES * (1 + chosen.warpgroups), dtype=torch.int32, device=q.device)
        kernel(q, k, v, o, 0, notes.data_ptr(), problem.head_dim**-0.5, gpu.num_sms)
        torch.cuda.synchronize()
    return samples(notes.tolist())


def samples(notes: list[int]) -> list[list[Sample]]:
    """What each role wrote down, by a clock that starts at the first sample of all; the clock has 32 bits."""
    roles = [notes[i : i + 2 * SAMPLES] for i in range(HEAD, len(notes), 2 * SAMPLES)]
    pairs = [[(e, t) for e, t in zip(role[::2], role[1::2], strict=True) if e] for role in roles]
    first = min((role[0][1] for role in pairs if role), key=lambda t: _since(t, pairs[PRODUCER][0][1]))
    return [[Sample(EVENTS[e - 1], _since(t, first)) for e, t in role] for role in pairs]


def _since(t: int, start: int) -> int:
    """Cycles from start to t, negative where t came first."""
    return (t - start + (1 << 31)) % (1 << 32) - (1 << 31)


def spans(roles: list[list[Sample]]) -> list[Span]:
    """From each event to the one that ends it; "step" ends when QK is issued: that is the wait for K and the turn."""
    return [span for role, noted in enumerate(roles) for span in _role_spans(role, noted)]


def _role_spans(role: int, noted: list[Sample]) -> Iterable[Span]:
    for i, (event, clock) in enumerate(noted):
        if role == PRODUCER:
            yield Span(role, event, clock, clock)
        end = next((later.clock for later in noted[i + 1 :] if later.event in ENDS.get(event, ())), None)
        if end is not None:
            yield Span(role, event, clock, end)
