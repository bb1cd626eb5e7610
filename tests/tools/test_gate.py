"""The gate: what passes, what fails and is named, the table; and benchmarks/gpu_ci with its long steps played."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.requirements import why_no_hopper

ROOT = Path(__file__).parents[2]
GATE = ROOT / "benchmarks" / "gate.py"
SWEEP = json.loads((ROOT / "benchmarks" / "results" / "sweep_bf16.json").read_text())
GATES = json.loads((ROOT / "benchmarks" / "gates.json").read_text())
CELL = "8,16,2048,128 causal"


@pytest.fixture(scope="module")
def script():
    """benchmarks/gate.py as a module."""
    spec = importlib.util.spec_from_file_location("gate", GATE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def own_gates(script):
    """Gates of the recorded sweep itself, whatever gates.json holds by now."""
    return script.gates(SWEEP, "sweep_bf16.json")


@pytest.fixture
def gate(script, monkeypatch, capsys):
    """A function: run in a folder, with these contents of its files."""

    def run(folder, sweep, gates, *arguments):
        for name, content in (("sweep.json", sweep), ("gates.json", gates)):
            (folder / name).write_text(json.dumps(content))
        monkeypatch.chdir(folder)
        try:
            status = script.main(["sweep.json", "--gates", "gates.json", *arguments])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    return run


def doctored(change):
    """The recorded sweep, with `change` done to ours' record of one cell."""
    sweep = copy.deepcopy(SWEEP)
    for record in sweep["records"]:
        mask = "causal" if record["causal"] else "full"
        if record["contender"] == "cute_attn" and f"{record['shape']} {mask}" == CELL:
            change(record)
    return sweep


def slower(percent):
    def change(record):
        record["ratios"]["cudnn"] *= 1 - percent / 100

    return doctored(change)


def test_gates_name_their_source_and_the_recorded_sweep_holds_them(tmp_path, gate):
    assert GATES["source"] == "benchmarks/results/sweep_bf16.json"
    assert len(GATES["gates"]) == 36
    assert len(GATES["kernels_sha256"]) == 64
    assert GATES["date"][:3] == "202"
    done = gate(tmp_path, SWEEP, GATES)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("percent", "status"), [(4.5, 0), (5.5, 1), (-20, 0)])
def test_five_percent_under_a_gate_fails(tmp_path, own_gates, gate, percent, status):
    done = gate(tmp_path, slower(percent), own_gates)
    assert done.returncode == status
    assert done.stderr.count("\n") == status
    assert not status or done.stderr.startswith(f"{CELL}: more than 5% under its gate (1.")


def test_cells_that_are_missing_or_wrong_fail_by_name(tmp_path, own_gates, gate):
    missing = {**SWEEP, "records": [r for r in SWEEP["records"] if r["head_dim"] != 256]}
    done = gate(tmp_path, missing, own_gates)
    assert done.returncode == 1
    assert done.stderr.count("missing (no ratio, gate") == 12
    assert "1,8,16384,256 causal: missing" in done.stderr
    for change in (lambda r: r.update(reason="wrong"), lambda r: r.update(ratios={})):
        done = gate(tmp_path, doctored(change), own_gates)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{CELL}: missing")
    assert gate(tmp_path, {**SWEEP, "timed": False, "records": []}, own_gates).returncode == 1


def test_another_problem_is_refused(tmp_path, own_gates, gate):
    fp16 = {**SWEEP, "conditions": {**SWEEP["conditions"], "dtype": "fp16"}}
    done = gate(tmp_path, fp16, own_gates)
    assert done.returncode == 2
    assert "dtype: the sweep's is fp16, the gates' is bf16" in done.stderr
    (tmp_path / "sweep.json").unlink()
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    lone = subprocess.run([sys.executable, str(GATE), "sweep.json"], **how)
    assert lone.returncode == 2
    assert "Traceback" not in lone.stderr


def test_the_table(tmp_path, own_gates, gate):
    (tmp_path / "summary.md").write_text("before\n")
    done = gate(tmp_path, slower(10), own_gates, "--markdown", "summary.md")
    text = (tmp_path / "summary.md").read_text()
    assert text == "before\n" + done.stdout.removesuffix("\n")
    assert "### 35 of 36 cells hold their gate" in text
    assert "| this run | NVIDIA H200 |" in text
    assert "| gates | NVIDIA H200 |" in text
    table = text[text.index("| cell |") :].splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 36
    name, ratio, of, share, verdict = (word.strip() for word in table[2].strip("|").split("|"))
    assert (name, share, verdict) == (CELL, "0.900", "more than 5% under its gate")
    assert float(of) == pytest.approx(own_gates["gates"][CELL], abs=1e-3)
    assert float(ratio) == pytest.approx(0.9 * own_gates["gates"][CELL], abs=1e-3)
    assert all(line.endswith("| ok |") for line in table[3:])


def test_update_writes_gates_from_a_sweep(tmp_path, own_gates, gate):
    sweep = slower(10)
    assert gate(tmp_path, sweep, own_gates, "--update").returncode == 0
    updated = json.loads((tmp_path / "gates.json").read_text())
    assert updated["gates"][CELL] == pytest.approx(0.9 * own_gates["gates"][CELL], abs=1e-4)
    assert updated["kernels_sha256"] == SWEEP["conditions"]["kernels_sha256"]
    assert gate(tmp_path, sweep, updated).returncode == 0
    assert gate(tmp_path, {**SWEEP, "complete": False}, own_gates, "--update").returncode == 2


PLAYED = """#!/usr/bin/env bash
# python3 on a machine with a Hopper GPU: the tests, validate and the sweep are played, the rest is run.
case "$*" in
  -\\ *) exit 0 ;;
  *no_hopper*) exit 0 ;;
  benchmarks/gpu_tests.py*) echo '{{"passed": 7, "failed": {failed}, "skipped": 1}}' > "$3"; exit {failed} ;;
  *cute_attn.validate*) echo "validate: played"; touch "$4"; exit {invalid} ;;
  *cute_attn.bench*) cp "{sweep}" "$7"; touch "$9" ;;
  *) exec "{python}" "$@" ;;
esac
"""


def gpu_ci(folder, sweep, failed=0, invalid=0):
    """benchmarks/gpu_ci where tests, validate and sweep end so; its exit status, last line and step summary."""
    (folder / "played.json").write_text(json.dumps(sweep))
    played = folder / "bin" / "python3"
    played.parent.mkdir()
    played.write_text(
        PLAYED.format(failed=failed, invalid=invalid, sweep=folder / "played.json", python=sys.executable)
    )
    played.chmod(0o755)
    summary = folder / "step_summary.md"
    env = {**os.environ, "PATH": f"{played.parent}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}
    command = [str(ROOT / "benchmarks" / "gpu_ci"), "out"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert {path.name for path in (folder / "out").iterdir()} == {
        "gpu_tests.json",
        "validate.json",
        "sweep.json",
        "sweep.png",
        "summary.md",
    }
    assert summary.read_text() == (folder / "out" / "summary.md").read_text()
    return done.returncode, done.stdout.splitlines()[-1], summary.read_text()


def test_gpu_ci_passes(tmp_path):
    status, verdict, summary = gpu_ci(tmp_path, SWEEP)
    assert (status, verdict) == (0, "gpu_ci: passed")
    assert summary.startswith("```\nvalidate: played\n```\n\n### 36 of 36 cells hold their gate")
    assert "GPU tests: 7 passed, 0 failed, 1 skipped. **gpu_ci: passed**" in summary


def test_gpu_ci_names_what_failed(tmp_path):
    status, verdict, summary = gpu_ci(tmp_path, slower(50), failed=1, invalid=1)
    assert (status, verdict) == (1, "gpu_ci: failed: GPU tests, validate, gate")
    assert f"| {CELL} |" in summary
    assert "**gpu_ci: failed: GPU tests, validate, gate**" in summary


def test_gpu_ci_refuses_without_a_gpu(tmp_path):
    if not why_no_hopper():
        pytest.skip("there is a Hopper GPU")
    done = subprocess.run([str(ROOT / "benchmarks" / "gpu_ci"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "a Hopper GPU is needed" in done.stderr
    assert list(tmp_path.iterdir()) == []
