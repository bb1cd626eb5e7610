"""benchmarks/integrations.py with tiny models, on the CPU and by a made-up clock."""

import importlib
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cute_attn import api
from cute_attn.plan import Problem
from cute_attn.tools.benchmark import frame, timing

transformers = pytest.importorskip("transformers", reason='transformers is missing: pip install "cute_attn[test]"')
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Every run takes 1,000 us."""

    def run(self, function, runs):
        function()

    def sample(self, function, samples, runs):
        function()
        return [1000.0] * samples


def setup():
    return frame.Setup(CPU, Clock(), lambda: nullcontext(timing.NoMonitor()), rounds=1)


def counting(calls, function):
    def counted(*args, **how):
        calls.append(args)
        return function(*args, **how)

    return counted


@pytest.fixture(scope="module")
def script():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("integrations")
    finally:
        sys.path.remove(folder)


def test_prefill(script, monkeypatch):
    ours, theirs = [], []
    monkeypatch.setattr(api, "flash_fwd", counting(ours, api.flash_fwd))
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting(theirs, F.scaled_dot_product_attention))
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    backends = {"math": torch.nn.attention.SDPBackend.MATH}
    found = frame.measure(lambda on: script.prefill(40, on, config, backends), setup())
    assert [one["contender"] for one in found] == ["cute_attn", "math"]
    assert all(one["p50_us"] == 1000 and one["reason"] is None for one in found)
    assert found[0]["relative_error"] < 0.02 and found[1]["relative_error"] == 0
    layers, layer = 2, 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    pairs = 2 * 40 * 41 // 2
    assert found[0]["flops"] == layers * (2 * 40 * layer + 4 * 16 * pairs)
    assert ours and len(theirs) == len(ours) + layers, "each ran its own attention; the truth is the first backend's"


def test_forward_and_backward(script):
    problem = Problem(1, 2, 2, 30, 30, 16, "bf16", "bshd", True)
    backends = {"math": torch.nn.attention.SDPBackend.MATH}
    found = frame.measure(lambda on: script.trained(problem, on, backends), setup())
    assert [(one["contender"], one["p50_us"]) for one in found] == [("cute_attn", 1000), ("math", 1000)]
    assert found[0]["flops"] == 14 * 16 * 2 * 30 * 31 / 2


def test_operator(script):
    found = frame.measure(partial(script.operator, Problem(1, 1, 1, 8, 8, 16)), setup())
    assert [one["contender"] for one in found] == ["cute_attn", "operator"] and all(r["host_us"] > 0 for r in found)
