"""Stand-ins for a benchmark's clock and sensors, and the output that it should see."""

from contextlib import contextmanager, nullcontext

import torch

from cute_attn.reference import attention
from cute_attn.tools.benchmark.frame import Setup

CONDITIONS = {"gpu": "NVIDIA H200", "date": "2026-11-20T10:00:00+00:00", "cublas_tflops": 674.0, "kernels_sha256": "0f"}


class FakeTimer:
    """A clock on which a run takes as long as `us` says; runs nothing, and keeps what was asked of it."""

    def __init__(self, us):
        self.us, self.log = us, []

    def run(self, function, runs):
        self.log.append(("run", function, runs))

    def sample(self, function, samples, runs):
        self.log.append(("sample", function, samples * runs))
        return [self.us(function)] * samples


class FakeMonitor:
    def __init__(self):
        self.watched = []

    @contextmanager
    def watch(self, name):
        self.watched.append(name)
        yield

    def mean(self, name):
        return 500.0, 1500.0


def right_output(inputs):
    return attention(*inputs[:3], causal=inputs.problem.causal)[0].to(inputs.q.dtype)


def fake_setup(**options):
    """On the CPU: outputs are real, times are not. torch SDPA takes 20 % longer than flash_fwd."""

    def us(function):
        return 120.0 if "Sdpa" in function.__qualname__ else 100.0

    monitor = lambda: nullcontext(FakeMonitor())  # noqa: E731
    return Setup(torch.device("cpu"), FakeTimer(us), monitor, gpu="NVIDIA H200", **options)


class EightHeads:
    """A truth of so many."""

    pairs = range(8)
