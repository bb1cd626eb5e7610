"""benchmarks/integrations.py with tiny models, on the CPU and by a made-up clock."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cute_attn import api
from cute_attn.plan import Problem

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
    found = script.prefill(config, 40, CPU, Clock(), {"math": torch.nn.attention.SDPBackend.MATH})
    assert [one["contender"] for one in found] == ["cute_attn", "math"]
    assert all(one["tokens_per_s"] == pytest.approx(40_000) for one in found)
    assert found[0]["logits_off"] < 0.02 and found[1]["logits_off"] == 0
    assert len(ours) == len(theirs) > 0, "each ran its own attention"


def test_forward_and_backward(script):
    problem = Problem(1, 2, 2, 30, 30, 16, "bf16", "bshd", True)
    found = script.trained(problem, CPU, Clock(), {"math": torch.nn.attention.SDPBackend.MATH})
    assert [(one["contender"], one["us"]) for one in found] == [("cute_attn", 1000), ("math", 1000)]


def test_operator(script):
    found = script.operator(CPU, Clock())
    assert set(found) == {"flash_fwd", "operator"} and all(us > 0 for us in found.values())
