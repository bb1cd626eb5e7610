"""Runs the GPU tests on a Hopper GPU and records them: benchmarks/results/gpu_tests.json.

python benchmarks/gpu_tests.py [--two] [--limit SECONDS] [--log FOLDER] [--out FILE] [pytest arguments]

First all tests side by side, then those that want a quiet GPU, one by one. What has ended is in FOLDER, also where the
limit ends the run; the same command again goes on from there, on another machine of that kind too.

--two is for two GPUs, and gpu_tests_two.json: the tests that need both, then all others on cuda:1 while cuda:0 is
current in each call.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import outcomes as log
import torch

from cute_attn.tools.benchmark.machine import Nvml, conditions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENDED = 0, 1, 5  # pytest's exit statuses: all passed, some failed, none was left
NEED_TWO = ["tests/host/test_two_gpus.py", "tests/host/test_runtime.py::test_every_device"]
WANT_QUIET = [
    "tests/host/test_runtime.py::test_first_call_is_quick",
    "tests/features/test_window.py::test_work_scales_with_the_window",
    "tests/tools/test_bench.py::test_a_small_real_run",
    "tests/tools/test_bench.py::test_compare_on_the_gpu_orders_work_by_its_size",
    "tests/tools/test_tune.py::test_a_small_tune",
    "tests/tools/test_validate.py::test_on_the_gpu_every_gate_runs",
]
ONE = {  # GPU: pytest's arguments, by part
    "together": ["tests", "-m", "gpu", *(f"--deselect={test}" for test in WANT_QUIET)],
    "alone": [*WANT_QUIET, "-m", "gpu"],
}
SECOND = ["-m", "gpu", "--device", "cuda:1"]
TWO = {
    "both": NEED_TWO,
    "second": ["tests", *SECOND, *(f"--deselect={test}" for test in (*NEED_TWO, *WANT_QUIET))],
    "alone": [*WANT_QUIET, *SECOND],
}


def where() -> dict:
    """GPU, date, versions and the kernels' hash."""
    c = conditions(Nvml())
    versions = {name: c[name] for name in ("driver", "cuda", "torch", "cutlass_dsl", "cute_attn", "python")}
    return dict(date=c["date"], gpu=c["gpu"], versions=versions, kernels_sha256=c["kernels_sha256"])


def hold_alike(record: dict, before: dict) -> None:
    """Raises ValueError where two are not of the same kernels, GPU and versions; the message names what differs."""
    for name in ("kernels_sha256", "gpu", "versions"):
        if record[name] != before[name]:
            raise ValueError(f"{name} is {before[name]} there, and {record[name]} here")


def counts(outcomes: dict[str, dict]) -> dict:
    """Of a log: how many passed, failed and were skipped, and why; launches while another GPU was current."""
    found = Counter(line["outcome"] for line in outcomes.values())
    launches: Counter[str] = Counter()
    for line in outcomes.values():
        launches.update({name: n for name, n in line["properties"].items() if name.startswith("launches")})
    return dict(
        **{name: found[name] for name in ("passed", "failed", "skipped")},
        skips={test: line["why"] for test, line in outcomes.items() if line["outcome"] == "skipped"},
        failures=[test for test, line in outcomes.items() if line["outcome"] == "failed"],
        **launches,
    )


def run(arguments: list[str], seconds: float) -> bool:
    """Runs pytest for so many seconds at most; whether it came to its end."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "outcomes", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        return process.wait(timeout=max(seconds, 0)) in ENDED
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()


def in_parts(every: dict[str, list[str]], folder: Path, limit: float, rest: list[str]) -> dict:
    """The record of every part, as far as they have come in this run and those before.

    Raises:
        ValueError: those before were of other kernels, versions or GPUs.
    """
    end, here = time.monotonic() + limit, where()
    folder.mkdir(parents=True, exist_ok=True)
    of_before = folder / "where.json"
    if of_before.exists():
        hold_alike(here, json.loads(of_before.read_text()))
    of_before.write_text(json.dumps(here))
    parts = {}
    for name, chosen in every.items():
        path, ended = folder / f"{name}.jsonl", folder / f"{name}.ended"
        how = [*chosen, *rest, *(["-n", "0"] if "-n" in rest and name == "alone" else [])]
        if not ended.exists() and _run_rest(path, how, end - time.monotonic()):
            ended.touch()
        parts[name] = dict(command="pytest " + " ".join(how), ended=ended.exists(), **counts(log.read(path)))
    sums = {name: sum(part[name] for part in parts.values()) for name in ("passed", "failed", "skipped")}
    return {**here, **sums, "ended": all(part["ended"] for part in parts.values()), "parts": parts}


def _run_rest(path: Path, arguments: list[str], seconds: float) -> bool:
    """What `path` has no outcome of."""
    with tempfile.TemporaryDirectory() as directory:
        known = Path(directory) / "known.jsonl"  # which stays as it is, for workers that start late
        known.write_text(path.read_text() if path.exists() else "")
        return run([*arguments, f"--outcomes={path}", f"--but={known}"], seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: gpu_tests.json, gpu_tests_two.json in benchmarks/results")
    parser.add_argument("--two", action="store_true", help="on two GPUs")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which to end")
    parser.add_argument("--log", type=Path, help="a folder of outcomes; default: none is kept")
    arguments, rest = parser.parse_known_args()
    if arguments.two and torch.cuda.device_count() < 2:
        parser.error(f"--two: two GPUs are needed, torch sees {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as directory:
        folder = arguments.log or Path(directory)
        try:
            record = in_parts(TWO if arguments.two else ONE, folder, arguments.limit, rest)
        except ValueError as error:
            sys.exit(f"{folder} is of another state, remove it ({error})")
    out = arguments.out or RESULTS / ("gpu_tests_two.json" if arguments.two else "gpu_tests.json")
    out.write_text(json.dumps(record, indent=1) + "\n")
    for name, part in record["parts"].items():
        left = "" if part["ended"] else "; not at its end"
        print(f"{name}: {part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped{left}")
    return 0 if record["ended"] and not record["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
