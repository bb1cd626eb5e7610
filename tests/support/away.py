"""`pytest -m gpu --device cuda:1`: all GPU tests on that GPU, while another is the current one in every call of ours.

A test runs with that GPU as the current one, so whatever it makes is there: tensors, streams, events, graphs. While
flash_fwd or flash_fwd_varlen is at work on tensors of a GPU another one is current, and must still be so at the end,
after an error too. A test's report has as a property how many kernels were launched so, and where. Processes that tests
start are on the first GPU, as ever.
"""

import functools
from collections import Counter

import pytest
import torch

import cute_attn
from cute_attn import api, device, varlen
from cute_attn.explanation import explain

LAUNCHES = "launches while another GPU is current"
FUNCTIONS = {"flash_fwd": (cute_attn, api), "flash_fwd_varlen": (cute_attn, varlen)}


def add_option(parser):
    parser.addoption("--device", help="run the GPU tests on this one, as cuda:1, while another is current in each call")


def configure(config):
    name = config.getoption("--device")
    if name is None:
        return
    count = torch.cuda.device_count()
    index = torch.device(name).index
    if torch.device(name).type != "cuda" or index is None or not index < count >= 2:
        raise pytest.UsageError(f"--device {name}: one of two or more GPUs is needed, as cuda:1; torch sees {count}")
    away = Away(index)
    away.put_in_place()
    config.pluginmanager.register(away, "away")


class Away:
    def __init__(self, index: int):
        self.index = index
        self.launches: Counter[str] = Counter()

    def put_in_place(self):
        """Before the test files take the functions by name."""
        for name, rooms in FUNCTIONS.items():
            function = self.called_elsewhere(getattr(cute_attn, name))
            for room in rooms:
                setattr(room, name, function)
        explain.__kwdefaults__["function"] = api.flash_fwd
        device.Device.guarded = self.counted(device.Device.guarded)

    def called_elsewhere(self, function):
        """`function`, at work while a GPU that q is not on is current."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            q = args[0] if args else kwargs.get("q")
            if torch.compiler.is_compiling() or not isinstance(q, torch.Tensor) or not q.is_cuda:
                return function(*args, **kwargs)
            before, other = torch.cuda.current_device(), 0 if q.get_device() else 1
            torch.cuda.set_device(other)
            try:
                return function(*args, **kwargs)
            finally:
                after = torch.cuda.current_device()
                torch.cuda.set_device(before)
                assert after == other, f"{function.__name__} has left cuda:{after} current, and cuda:{other} was"

        return call

    def counted(self, guarded):
        def launched(gpu, kernel):
            self.launches[f"cuda:{gpu.index}"] += 1
            return guarded(gpu, kernel)

        return launched

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if "gpu" in item.keywords:
            torch.cuda.set_device(self.index)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.launches.clear()
        try:
            return (yield)
        finally:
            item.user_properties += [(f"{LAUNCHES}, {where}", n) for where, n in self.launches.items()]
