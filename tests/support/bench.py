"""Stand-ins for a benchmark's clock and sensors, and the output that it should see."""

from contextlib import contextmanager

from cute_attn.reference import attention

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
