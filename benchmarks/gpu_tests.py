"""Runs the whole test suite on a Hopper GPU and records it: benchmarks/results/gpu_tests.json.

python benchmarks/gpu_tests.py [--out FILE] [pytest arguments]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests.json")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={junit}", *rest]
        status = subprocess.run(command, cwd=ROOT).returncode
        record = {**where(), "command": "pytest " + " ".join(rest), **outcomes(junit)}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
