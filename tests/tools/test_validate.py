"""`python -m cute_attn.validate`: on a fake GPU every gate can pass and can fail, by name; without one, what runs."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import cute_attn
from cute_attn import plan
from cute_attn.plan import Problem
from cute_attn.tools import inspect, validate
from cute_attn.tools.benchmark import cells, gates, implementations, machine, progress
from tests.support.bench import FakeMonitor, FakeTimer
from tests.support.requirements import why_no_hopper

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["compiles", "machine code", "edge shapes", "difference to SDPA", "std of the time", "over cuDNN"]
CELL = "1,1,2048,16 full"
RIGHT = cute_attn.flash_fwd


class Cudnn(implementations.Sdpa):
    """torch's own attention in cuDNN's place."""

    def __init__(self):
        super().__init__("cudnn", "MATH")

    def absent(self):
        return None


class Jitter(FakeTimer):
    """Every other sample takes so much longer."""

    def __init__(self, share):
        super().__init__(lambda function: 100.0)
        self.share = share

    def sample(self, function, samples, runs):
        return [100.0 * (1 + self.share * (i % 2)) for i in range(2 * samples)]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """validate.main runs as on a GPU: outputs are real, times and kernels are not; cuDNN takes 20 % longer."""

    def us(function):
        return 120.0 if "Sdpa" in function.__qualname__ else 100.0

    fake = SimpleNamespace(timer=FakeTimer(us), gates={CELL: 1.2, "1,1,4096,16 full": 9.0}, json=tmp_path / "x.json")
    healthy = SimpleNamespace(problems=lambda: [])

    def setup():
        return cells.Setup(torch.device("cpu"), fake.timer, lambda: nullcontext(FakeMonitor()))

    def main():
        recorded = {"gpu": "NVIDIA H200", "dtype": "bf16", "layout": "bshd", "gates": fake.gates}
        (tmp_path / "gates.json").write_text(json.dumps(recorded))
        return validate.main(["--gates", str(tmp_path / "gates.json"), "--json", str(fake.json)])

    fake.main = main
    monkeypatch.setattr(machine, "no_hopper", lambda: None)
    monkeypatch.setattr(validate, "gpu_setup", setup)
    monkeypatch.setattr(validate, "HEADLINE", Problem(1, 2, 2, 64, 64, 16, "fp16"))
    monkeypatch.setattr(validate, "EDGE_HEAD_DIMS", (16,))
    monkeypatch.setattr(inspect, "build", lambda config: inspect.Build("code", "", ""))
    monkeypatch.setattr(inspect, "report", lambda config: healthy)
    monkeypatch.setitem(implementations.BASELINES, "cudnn", Cudnn())
    return fake


def statuses(fake):
    """Gate -> status, of the JSON; and its row in full."""
    rows = json.loads(fake.json.read_text())["gates"]
    assert [row["gate"] for row in rows] == NAMES
    return {row["gate"]: row["status"] for row in rows}, {row["gate"]: row for row in rows}


def test_all_gates_pass(lab, capsys):
    assert lab.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["passed"] * 6
    assert [next(name for name in NAMES if f" {name} " in line) for line in lines[:-1]] == NAMES
    assert lines[-1] == "validate: passed"
    content = json.loads(lab.json.read_text())
    assert content["passed"] and content["complete"] and content["conditions"]["kernels_sha256"]
    _, row = statuses(lab)
    assert "18 of 18 right" in row["edge shapes"]["measured"]
    assert f"1 of 1 cells; least 1.000 of its gate ({CELL}: 1.200, gate 1.200)" == row["over cuDNN"]["measured"]


def test_into_a_pipe_a_line_now_and_then(lab, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert lab.main() == 0
    err = capsys.readouterr().err
    for line in ("kernels: 10 of 10 after", "edge shapes: 18 of 18 after", "cells over cuDNN: 1 of 1 after"):
        assert line in err


def wrong_where(wrong):
    """flash_fwd with an output that `wrong` spoils; gives o, or o and lse."""

    def flash_fwd(q, k, v, **how):
        result = RIGHT(q, k, v, **how)
        wrong(*(result if isinstance(result, tuple) else (result, None)))
        return result

    return flash_fwd


def no_compile(config):
    raise RuntimeError("no such instruction")


def largest_off(o, lse):
    o[0, 0, 0, 0] += 0.1


def nan(o, lse):
    o[0, 0, 0, 0] = torch.nan


def lse_off(o, lse):
    if lse is not None:
        lse += 1e-3


FAILURES = [
    ("compiles", lambda lab, m: m.setattr(inspect, "build", no_compile), "kernels compile; flash_fwd_sm90_"),
    (
        "machine code",
        lambda lab, m: m.setattr(inspect, "report", lambda c: SimpleNamespace(problems=lambda: ["spills: 8 bytes"])),
        "0 of 10 kernels are healthy; flash_fwd_sm90_",
    ),
    ("edge shapes", lambda lab, m: m.setattr(cute_attn, "flash_fwd", wrong_where(lse_off)), "lse wrong at 128x128 d16"),
    ("std of the time", lambda lab, m: setattr(lab, "timer", Jitter(0.05)), "2.44% of 0.5 us"),
    ("over cuDNN", lambda lab, m: lab.gates.update({CELL: 1.3}), "least 0.923 of its gate"),
]


@pytest.mark.parametrize(("gate", "spoil", "says"), FAILURES, ids=[one[0] for one in FAILURES])
def test_a_gate_that_fails_is_named_and_the_others_run(lab, monkeypatch, capsys, gate, spoil, says):
    spoil(lab, monkeypatch)
    assert lab.main() == 1
    out = capsys.readouterr().out
    found, rows = statuses(lab)
    assert found[gate] == "failed" and "not run" not in found.values()
    assert says in rows[gate]["measured"]
    assert f"{rows[gate]['measured']} (asked: {rows[gate]['asked']})" in out
    also = {"over cuDNN"} if gate == "std of the time" else set()  # cuDNN is as fast on that clock
    assert {name for name, status in found.items() if status == "failed"} == {gate} | also
    assert out.splitlines()[-1].startswith("validate: failed: ")


@pytest.mark.parametrize("wrong", [largest_off, nan])
def test_a_wrong_output_fails_the_gates_that_look_at_it(lab, monkeypatch, wrong):
    monkeypatch.setattr(cute_attn, "flash_fwd", wrong_where(wrong))
    assert lab.main() == 1
    found, rows = statuses(lab)
    assert found["edge shapes"] == found["difference to SDPA"] == "failed"
    assert rows["edge shapes"]["measured"].startswith("0 of 18 right")


def test_the_difference_to_sdpa_is_held_to_its_own_bound(lab, monkeypatch):
    for bound, status in ((1e-2, "passed"), (1e-7, "failed")):
        monkeypatch.setattr(validate, "DIFFERENCE", bound)
        lab.main()
        assert statuses(lab)[0]["difference to SDPA"] == status


@pytest.mark.parametrize(("over", "status"), [(1.2 / 0.951, "passed"), (1.2 / 0.949, "failed")])
def test_five_percent_under_a_gate(lab, over, status):
    lab.gates[CELL] = over
    assert lab.main() == (status == "failed")
    assert statuses(lab)[0]["over cuDNN"] == status


def test_a_missing_peer_fails_where_there_is_a_gpu(lab, monkeypatch):
    monkeypatch.setattr(Cudnn, "absent", lambda self: "built without cuDNN")
    assert lab.main() == 1
    assert f"{CELL}: no ratio; cudnn: built without cuDNN" in statuses(lab)[1]["over cuDNN"]["measured"]


def test_a_lost_gpu_leaves_the_rest_unrun(lab, monkeypatch):
    def lost(*args, **how):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(cute_attn, "flash_fwd", lost)
    assert lab.main() == 1
    found, rows = statuses(lab)
    assert list(found.values()) == ["passed", "passed", "failed", "not run", "not run", "not run"]
    assert rows["over cuDNN"]["measured"] == "the CUDA context is lost"


def test_without_a_gpu_the_first_gates_run_for_real(tmp_path, monkeypatch, capsys):
    """One kernel is compiled; the rest is named, and is no failure."""
    one = plan.plan(validate.HEADLINE)
    monkeypatch.setattr(machine, "no_hopper", lambda: "no CUDA device is available")
    monkeypatch.setattr(validate.Lab, "kernels", [one])
    path = tmp_path / "x.json"
    assert validate.main(["--json", str(path)]) == 0
    out, content = capsys.readouterr().out, json.loads(path.read_text())
    assert content["passed"] and not content["complete"]
    assert [row["status"] for row in content["gates"]] == ["passed"] * 2 + ["not run"] * 4
    assert content["gates"][1]["details"] == {f"{one.name} bhsd": []}
    assert out.count("no CUDA device is available") == 4
    assert out.splitlines()[-1] == f"validate: passed as far as it ran; not run: {', '.join(NAMES[2:])}"


def test_what_is_checked_by_default():
    lab = validate.Lab(gates.read(gates.GATES), None)
    masks = {(problem.head_dim, problem.causal) for problem in lab.cells.values()}
    assert masks == {(d, causal) for d in (64, 128, 256) for causal in (False, True)}
    assert Problem(16, 16, 16, 2048, 2048, 64, "fp16", "bhsd", False) == validate.HEADLINE
    assert {plan.plan(problem) for problem in (*lab.edges, *lab.cells.values(), validate.HEADLINE)} == set(lab.kernels)
    assert {problem.causal for problem in lab.edges} == {False, True}
    assert any(config.split > 1 for config in lab.kernels) and any(config.speculative for config in lab.kernels)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "no gates, gpu, dtype, layout, gates missing"),
        ("[]", "no gates"),
        ("not json", "does not serve"),
        ('{"gpu": "", "dtype": "bf16", "layout": "bshd", "gates": {"1,2,3": 1}}', "'1,2,3' is no cell"),
        ('{"gpu": "", "dtype": "bf16", "layout": "bshd", "gates": {"1,2,3,64 full": 1}}', "no cell of S 2048"),
    ],
)
def test_gates_that_do_not_serve_exit_with_2(tmp_path, capsys, content, says):
    (tmp_path / "gates.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        validate.main(["--gates", str(tmp_path / "gates.json")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "argument --gates" in error and says in error


def test_without_rich_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; import cute_attn.tools.validate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'python -m cute_attn.validate: rich is missing; pip install "cute_attn[bench]"\n'


@pytest.mark.gpu
def test_on_the_gpu_every_gate_runs(tmp_path):
    """Whether the times hold their gates is for a quiet machine to say; that outputs are right is not."""
    assert not why_no_hopper()
    path = tmp_path / "x.json"
    validate.main(["--json", str(path)])
    rows = {row["gate"]: row for row in json.loads(path.read_text())["gates"]}
    assert [rows[name]["status"] for name in NAMES[:4]] == ["passed"] * 4
    assert "not run" not in {row["status"] for row in rows.values()}
    assert all(cell["ratio"] for cell in rows["over cuDNN"]["details"])
