"""The package as a whole: what importing does, what it offers, and that its numbers are recorded."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cute_attn
from tests.support.away import LAUNCHES

ROOT = Path(__file__).parents[2]


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=True
    ).stdout


def test_importing_compiles_nothing_and_needs_no_gpu(tmp_path):
    code = (
        "import cutlass.cute as cute; cute.compile = None\n"
        "import torch, cute_attn, sys\n"
        "print(torch.cuda.is_initialized(), 'rich' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert run(code, CUDA_VISIBLE_DEVICES="", CUTE_ATTN_CACHE_DIR=str(tmp_path)).split() == ["False"] * 3
    assert list(tmp_path.iterdir()) == []


def test_public_names():
    functions = {"append_kv", "decode_plan", "explain", "flash_fwd", "flash_fwd_kvcache", "flash_fwd_varlen"}
    functions |= {"merge_states", "spans", "warmup"}
    assert set(cute_attn.__all__) == {"__version__", "BlockLists", "DecodePlan", *functions}
    assert re.fullmatch(r"\d+\.\d+\.\d+", cute_attn.__version__)


def test_kernels_import_under_the_package_only():
    inside = ROOT / "cute_attn" / "kernels"  # a link; in an unpacked sdist a copy
    assert inside.is_symlink() or not (ROOT / ".git").exists()
    for source in (ROOT / "kernels").glob("*.py"):
        assert (inside / source.name).read_bytes() == source.read_bytes()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for source in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (torch|cute_attn)", source.read_text(), re.MULTILINE), source


def test_gpu_record_names_what_it_tested():
    record = json.loads((ROOT / "benchmarks" / "results" / "gpu_tests.json").read_text())
    assert {"date", "gpu", "versions", "passed", "failed", "skipped", "kernels_sha256"} <= set(record)
    assert record["failed"] == 0
    assert record["passed"] > 100
    sources = b"".join(p.read_bytes() for p in sorted((ROOT / "kernels").glob("*.py")))
    if record["kernels_sha256"] != hashlib.sha256(sources).hexdigest():
        pytest.skip("kernels/ has changed since the recorded GPU run")


def test_the_record_of_two_gpus_is_of_launches_on_the_second():
    path = ROOT / "benchmarks" / "results" / "gpu_tests_two.json"
    if not path.exists():
        pytest.skip("no run on two GPUs is recorded")
    record = json.loads(path.read_text())
    assert record["failed"] == 0 and all(record["parts"][name]["ended"] for name in ("both", "second"))
    assert record["parts"]["both"]["passed"] > 50 and record["parts"]["second"]["passed"] > 1000
    assert record["parts"]["second"][f"{LAUNCHES}, cuda:1"] > 1000


def test_type_checkers_see_what_flash_fwd_returns(tmp_path):
    source = tmp_path / "use.py"
    source.write_text(
        "import torch\n"
        "from cute_attn import flash_fwd\n"
        "x = torch.zeros(1, 1, 1, 64)\n"
        "reveal_type(flash_fwd(x, x, x, causal=True, layout='bshd'))\n"
        "reveal_type(flash_fwd(x, x, x, return_lse=True, scale=0.5))\n"
        "flash_fwd(x, x, x, causal='no')\n"
    )
    command = [sys.executable, "-m", "mypy", str(source)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert re.findall(r'Revealed type is "(.*)"', said) == [
        "torch._tensor.Tensor",
        "tuple[torch._tensor.Tensor, torch._tensor.Tensor]",
    ]
    assert re.search(r"use.py:6: error", said)
