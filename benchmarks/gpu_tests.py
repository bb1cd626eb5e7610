"""Runs the whole test suite on a Hopper GPU and records it: benchmarks/results/gpu_tests.json.

python benchmarks/gpu_tests.py [--out FILE] [--add FILE] [pytest arguments]

Where the suite takes longer than a machine may be held for one command, it may run in parts: --add names the record of
those before, of other tests and the same kernels, GPU and versions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from cute_attn.benchmark.machine import Nvml, conditions

ROOT = Path(__file__).parent.parent


def where() -> dict:
    """GPU, date, versions and the kernels' hash."""
    c = conditions(Nvml())
    versions = {name: c[name] for name in ("driver", "cuda", "torch", "cutlass_dsl", "cute_attn", "python")}
    return dict(date=c["date"], gpu=c["gpu"], versions=versions, kernels_sha256=c["kernels_sha256"])


def outcomes(junit: Path) -> dict:
    """Counts, and the reason of every skip and failure, from pytest's JUnit report."""
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    total, failed = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skips, failures = {}, []
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if skip is not None:
            skips[name] = skip.get("message")
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(name)
    return dict(passed=total - failed - len(skips), failed=failed, skipped=len(skips), skips=skips, failures=failures)


def hold_alike(record: dict, before: dict) -> None:
    """Raises ValueError where two are not of the same kernels, GPU and versions; the message names what differs."""
    for name in ("kernels_sha256", "gpu", "versions"):
        if record[name] != before[name]:
            raise ValueError(f"--add: {name} is {before[name]} there, and {record[name]} here")


def together(record: dict, before: dict) -> dict:
    """The sums of two parts; `date` is the later one's.

    Raises:
        ValueError: see `hold_alike`.
    """
    hold_alike(record, before)
    counts = {name: record[name] + before[name] for name in ("passed", "failed", "skipped")}
    command = f"{before['command']}; {record['command']}"
    failures = [*before["failures"], *record["failures"]]
    return {
        **record,
        **counts,
        "command": command,
        "skips": {**before["skips"], **record["skips"]},
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests.json")
    parser.add_argument("--add", type=Path, help="the record of a part that ran before")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={junit}", *rest]
        status = subprocess.run(command, cwd=ROOT).returncode
        record = {**where(), "command": "pytest " + " ".join(rest), **outcomes(junit)}
    if arguments.add:
        record = together(record, json.loads(arguments.add.read_text()))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
