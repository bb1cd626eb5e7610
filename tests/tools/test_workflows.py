"""The GitHub workflows: valid by GitHub's schema, by actionlint, and true to this repository.

The schema comes with check-jsonschema. actionlint sees more (expressions, shell): here a fork of it whose wheels bring
the program, where there is one for the machine; ci.yml runs actionlint itself.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def load(path):
    from ruamel.yaml import YAML  # here: the GPU tests collect this file on machines without the tools of CI

    return YAML(typ="safe").load(path)


def broken(path):
    """What GitHub's schema says against a workflow; empty where nothing."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def strange(path):
    """What is not as this repository has it: scripts that are not here, loose permissions, unpinned actions."""
    workflow = load(path)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    first_words = [step["run"].split()[0] for step in steps if "run" in step]
    scripts = [word for word in first_words if "/" in word]
    found = [f"{word} is no script here" for word in scripts if not os.access(ROOT / word, os.X_OK)]
    found += [f"{s['uses']} has no major version" for s in steps if not re.search(r"@v\d+$", s.get("uses", "@v1"))]
    if workflow.get("permissions") != {"contents": "read"}:
        found.append("permissions are more than to read the contents")
    found += [f"job {name} has no time limit" for name, job in workflow["jobs"].items() if "timeout-minutes" not in job]
    if "concurrency" not in workflow:
        found.append("no concurrency group")
    return found


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "h100.yml", "nightly.yml"]


@workflows
def test_workflow(path):
    assert broken(path) == ""
    assert strange(path) == []


def linted(path):
    """What actionlint says against a workflow; empty where nothing."""
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not installed; ci.yml runs it")
    done = subprocess.run([actionlint, str(path)], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


@workflows
def test_actionlint(path):
    assert linted(path) == ""


def test_actionlint_sees_expressions(tmp_path):
    (tmp_path / "h100.yml").write_text(WORKFLOWS[1].read_text().replace("inputs.runner", "inputs.runnr"))
    assert 'property "runnr" is not defined' in linted(tmp_path / "h100.yml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("runs-on:", "runs_on:"),
        ("  push:", "  pushed:"),
        ("timeout-minutes: 40", "timeout-minutes: soon"),
        ("contents: read", "contents: everything"),
        ("- run: .ci/run", "- runs: .ci/run"),
    ],
)
def test_a_broken_workflow_is_caught(tmp_path, old, new):
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert old in text
    (tmp_path / "ci.yml").write_text(text.replace(old, new, 1))
    assert broken(tmp_path / "ci.yml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (".ci/run", ".ci/ran", [".ci/ran is no script here"]),
        ("contents: read", "contents: write", ["permissions are more than to read the contents"]),
        ("actions/checkout@v6", "actions/checkout@main", ["actions/checkout@main has no major version"]),
    ],
)
def test_a_strange_workflow_is_caught(tmp_path, old, new, says):
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (tmp_path / "ci.yml").write_text(re.sub(rf"(?<=[ ]){re.escape(old)}\b", new, text, count=1))
    assert strange(tmp_path / "ci.yml") == says


def test_h100_is_one_script_on_a_runner_of_choice_and_keeps_what_it_wrote():
    workflow = load(WORKFLOWS[1])
    (job,) = workflow["jobs"].values()
    assert workflow["on"]["workflow_dispatch"]["inputs"]["runner"]["type"] == "string"
    assert job["runs-on"] == "${{ inputs.runner || vars.HOPPER_RUNNER || 'h100' }}"
    assert [step["run"] for step in job["steps"] if "run" in step] == ['benchmarks/gpu_ci "$RUNNER_TEMP/hopper"']
    upload = job["steps"][-1]
    assert (upload["if"], upload["with"]["path"]) == ("always()", "${{ runner.temp }}/hopper")
    script = (ROOT / "benchmarks" / "gpu_ci").read_text()
    steps = [
        "benchmarks/gpu_tests.py",
        "-m cute_attn.validate",
        "-m cute_attn.bench --sweep --vs cudnn",
        "benchmarks/gate.py",
    ]
    found = [script.index(f"python3 {step}") for step in steps]
    assert found == sorted(found)
    for name in ("GITHUB_STEP_SUMMARY", '--json "$out/sweep.json"', '--plot "$out/sweep.png"'):
        assert name in script


def test_ci_runs_on_every_python_that_is_supported():
    matrix = load(WORKFLOWS[0])["jobs"]["test"]["strategy"]["matrix"]
    pythons, project = matrix["python"], (ROOT / "pyproject.toml").read_text()
    assert pythons == re.findall(r"Python :: (3\.\d+)", project)
    assert f'requires-python = ">={pythons[0]},<3.{int(pythons[-1][2:]) + 1}"' in project
    (whole,) = matrix["include"]
    assert matrix["tests"] == ["not nightly and not machine_code"] and whole["tests"] == "not nightly"
    assert whole["python"] in pythons


def test_what_the_samples_leave_out_runs_at_night():
    """What tests/run passes over by default is what the other workflow asks for."""
    assert '"-m", "not nightly"]' in (ROOT / "pyproject.toml").read_text()
    runs = [step.get("run") for step in load(WORKFLOWS[2])["jobs"]["nightly"]["steps"]]
    assert runs[-1] == "tests/run -m nightly"
