"""flash_fwd(..., constant_time=True): right, and the same instructions for all inputs."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cute_attn import flash_fwd, operands, plan
from cute_attn.tools import audit, inspect
from tests.support.attention import DTYPES, EDGES, check, inputs
from tests.support.nightly import HEAD_DIM_OF_EACH_CLASS, where

CONSTANT = [c for c in plan.prebuilt() if c.constant_time]
LOOKED_AT = [c for c in CONSTANT if c.layout == "bhsd" and c.dtype == "bf16"]
HEAD_DIMS = (40, 64, 96, 128, 192, 256)
# What a role does until a barrier, or the registers that another gives up, are there; every other instruction counts.
POLLING = ("SYNCS.PHASECHK", "NANOSLEEP", "USETMAXREG.TRY_ALLOC")
BESIDE_POLLING = (*POLLING, "BRA", "IMAD", "MOV", "NOP", "PLOP3")
SCRIPT = """
import sys, torch
from cute_attn import flash_fwd
head_dim, causal, constant_time, seqlen = map(eval, sys.argv[1:])
random = [torch.randn(2, 4, seqlen, head_dim, device="cuda").bfloat16() for _ in range(3)]
kinds = [
    [torch.zeros_like(x) for x in random],
    random,
    [x.sort(dim=2).values for x in random],
    [torch.where(x > 0, 1e4, -1e4).bfloat16() for x in random],
    [torch.ones_like(x) for x in random],
]
call = lambda x: flash_fwd(*x, causal=causal, constant_time=constant_time)
call(random)
torch.cuda.synchronize()
torch.cuda.profiler.start()
for kind in kinds:
    call(kind)
    torch.cuda.synchronize()
torch.cuda.profiler.stop()
"""


def test_one_of_each_class_is_prebuilt():
    usual = {plan.kernel_class(c) for c in plan.prebuilt() if not (c.constant_time or c.score.name or c.sinks)}
    assert {plan.kernel_class(c) for c in CONSTANT} == {one._replace(constant_time=True) for one in usual}
    assert not any(c.speculative for c in CONSTANT) and any(c.split > 1 for c in CONSTANT)


@pytest.mark.machine_code
@pytest.mark.parametrize("config", where(lambda c: c.head_dim in HEAD_DIM_OF_EACH_CLASS, LOOKED_AT), ids=str)
def test_no_branch_of_the_loop_depends_on_data(config):
    kinds = {branch.depends for branch in audit.audit(config)}
    assert kinds == {audit.BARRIER, audit.TRIP_COUNT}
    assert inspect.report(config).steady_loop.maxima >= config.tile_n // 2, "a maximum over each row, in each step"


def test_the_plan_keeps_tiles_and_schedule():
    problem = plan.Problem(16, 32, 32, 1024, 1024, 64, constant_time=True)
    chosen, usual = plan.plan(problem), plan.plan(problem._replace(constant_time=False))
    assert chosen.constant_time and not usual.constant_time
    assert (chosen.tile_m, chosen.tile_n, chosen.scheduler) == (usual.tile_m, usual.tile_n, usual.scheduler)


def test_on_the_cpu_it_changes_nothing():
    q, k, v = inputs(1, 2, 2, 33, 47, 64, device="cpu")
    assert torch.equal(flash_fwd(q, k, v, constant_time=True), flash_fwd(q, k, v))


def test_every_way_in_passes_it_on(monkeypatch):
    """Eager, differentiated, compiled, by the operators, and from NumPy."""
    asked = []
    monkeypatch.setattr(
        operands, "plan", lambda problem, gpu=None: asked.append(problem.constant_time) or plan.plan(problem)
    )
    q, k, v = inputs(1, 2, 2, 33, 47, 64, torch.float16, device="cpu")
    out, op = torch.empty_like(q), torch.ops.cute_attn
    flash_fwd(q, k, v, constant_time=True)
    flash_fwd(q.detach().requires_grad_(), k, v, constant_time=True).sum().backward()
    torch.compile(lambda q: flash_fwd(q, k, v, constant_time=True), backend="eager", fullgraph=True)(q)
    torch.compile(lambda q: flash_fwd(q, k, v, constant_time=True, out=out), backend="eager", fullgraph=True)(q)
    op.flash_fwd(q.detach().requires_grad_(), k, v, False, None, "bhsd", True, True)[0].sum().backward()
    op.flash_fwd(q.detach().requires_grad_(), k, v, False, None, "bhsd", True)[0].sum().backward()
    assert asked.pop() is False, "the operator's default"
    flash_fwd(*(x.numpy() for x in (q, k, v)), constant_time=True)
    assert len(asked) >= 6 and all(asked)


def test_only_a_bool():
    q, k, v = inputs(1, 1, 1, 8, 8, 64, device="cpu")
    with pytest.raises(TypeError, match=r"constant_time: a bool is needed, 1 came"):
        flash_fwd(q, k, v, constant_time=1)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_right(head_dim, causal):
    for dtype in DTYPES:
        for seqlen_q, seqlen_k in [*EDGES, (2000, 2000)]:
            q, k, v = inputs(2, 6, 2, seqlen_q, seqlen_k, head_dim, dtype)
            check(q, k, v, causal=causal, constant_time=True)


@pytest.mark.gpu
def test_right_where_every_block_has_a_new_maximum():
    q, k, v = inputs(1, 2, 2, 300, 1100, 64)
    k = k * torch.linspace(0.1, 40, 1100, device="cuda")[:, None].bfloat16()
    check(q, k, v, constant_time=True)
    check(-q.abs(), k.abs(), v, constant_time=True, scale=-1.0)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("ncu") is None, reason="needs Nsight Compute (ncu)")
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [700, 512], ids=["", "keys split"])
def test_the_same_instructions_for_all_inputs(tmp_path, head_dim, mask, seqlen):
    """Zeros, random, sorted, extreme and all-equal ones: each instruction of the kernel runs equally often."""
    problem = plan.Problem(2, 4, 4, seqlen, seqlen, head_dim, causal=mask == "causal", constant_time=True)
    assert (plan.plan(problem).split > 1) == (seqlen == 512)
    assert unequal(executed(tmp_path, head_dim, mask == "causal", True, seqlen)) == []


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("ncu") is None, reason="needs Nsight Compute (ncu)")
def test_the_usual_kernel_differs(tmp_path):
    """So the counts tell: sorted keys raise its running maxima."""
    assert unequal(executed(tmp_path, 64, False, False, 700))


def executed(tmp_path: Path, *args) -> list[list[tuple[str, int]]]:
    """Of each launch: its instructions, and how often warps executed them."""
    script, report = tmp_path / "script.py", tmp_path / "report.ncu-rep"
    script.write_text(SCRIPT)
    how = ["--profile-from-start", "off", "--section", "SourceCounters", "--clock-control", "none", "-f"]
    command = ["ncu", *how, "-k", "regex:flash_fwd", "-o", str(report), sys.executable, str(script), *map(str, args)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(["", *sys.path]).lstrip(os.pathsep))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = subprocess.run(
        ["ncu", "-i", str(report), "--page", "source", "--csv"], capture_output=True, text=True, check=True
    ).stdout
    return parse(text)


def parse(text: str) -> list[list[tuple[str, int]]]:
    launches: list[list[tuple[str, int]]] = []
    columns: list[str] = []
    for row in csv.reader(text.splitlines()):
        if row and row[0] == "Kernel Name":
            launches.append([])
        elif row and row[0] == "Address":
            columns = row
        elif row and launches and columns:
            named = dict(zip(columns, row, strict=False))
            launches[-1].append((named["Source"].strip(), int(named["Instructions Executed"])))
    return launches


def unequal(launches) -> list[str]:
    """The instructions that did not run equally often, but for stretches that poll."""
    assert len(launches) == 5 and len({len(launch) for launch in launches}) == 1 and len(launches[0]) > 500
    stretch: list[str] = []
    found: list[str] = []
    for line in [*zip(*launches, strict=True), None]:
        if line is not None and len({count for _, count in line}) > 1:
            stretch.append(line[0][0])
        elif stretch:
            found += [] if polls(stretch) else stretch
            stretch = []
    return found


def polls(stretch: list[str]) -> bool:
    words = [next(word for word in text.split() if not word.startswith("@")) for text in stretch]
    return all(word.startswith(BESIDE_POLLING) for word in words) and any(word.startswith(POLLING) for word in words)


TEXT = '"Kernel Name","k",\n"Address","Source","Instructions Executed"\n' + "".join(
    f'"0x{i:x}","{text}","{{{i}}}"\n'
    for i, text in enumerate(
        ["FADD R1, R1, R2"] * 501 + ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R2", "@!P0 BRA 0x1"]
    )
)


def counted(*counts):
    return parse("".join(TEXT.format(*[8] * 500, add, poll, poll) for add, poll in counts))


def test_counts_are_told_apart():
    assert unequal(counted((8, 1), (8, 2), (8, 3), (8, 1), (8, 1))) == []
    assert unequal(counted((8, 1), (8, 1), (9, 1), (8, 1), (8, 1))) == ["FADD R1, R1, R2"]
    assert unequal(counted((8, 1), (8, 1), (9, 2), (8, 1), (8, 1))), "an addition beside a poll is no poll"
