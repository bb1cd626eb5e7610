"""GPU tests run where there is a Hopper GPU, and say why they did not run elsewhere; nightly ones by -m nightly."""

import gc
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.interpreter.memory import freeze
from tests.support import away, built
from tests.support.requirements import why_no_hopper

pytest_addoption = away.add_option


def pytest_configure(config):
    """Compiled kernels are shared by the workers and kept for the next run, where pytest keeps anything."""
    if hasattr(config, "cache"):
        folder = config.cache.mkdir("kernels")
        built.keep_in(folder)
        if not hasattr(config, "workerinput"):
            built.forget_old(folder)
    away.configure(config)
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # each core has a worker of its own


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What is imported stays: Python need not search it for garbage, time and again."""
    gc.disable()
    yield
    freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    reason = why_no_hopper()
    for item in items:
        if reason and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty disk cache, and none in memory."""
    from cute_attn import call, compile

    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUTE_ATTN_CACHE", raising=False)
    monkeypatch.setattr(compile, "_compiled", {})
    call.known.clear()
    yield tmp_path
    call.known.clear()


@pytest.fixture
def planned_by(monkeypatch):
    """A function: from then on, calls run this kernel."""
    from cute_attn import call, operands

    def set_plan(config):
        call.known.clear()
        monkeypatch.setattr(operands, "plan", lambda problem, gpu=None: config)

    yield set_plan
    call.known.clear()


@pytest.fixture(scope="module")
def one_thread():
    """The tensors are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def readme():
    """benchmarks/readme.py as a module."""
    path = Path(__file__).parent.parent / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("benchmarks_readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
