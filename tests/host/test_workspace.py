"""A launch's own device memory: whose, and for how long. By stand-ins for the GPU's streams."""

from contextlib import contextmanager
from threading import current_thread
from types import SimpleNamespace

import pytest
import torch

from cute_attn import workspace


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs, whose current streams the test sets; what is allocated: device, stream, bytes, and by which thread."""
    state = SimpleNamespace(device=0, streams={0: 0, 1: 0}, capturing=False, allocated=[], entered=[])

    @contextmanager
    def within(name, index, value):
        before = state.__dict__[name] if index is None else state.__dict__[name][index]
        state.entered.append(value)
        _set(name, index, value)
        yield
        _set(name, index, before)

    def _set(name, index, value):
        if index is None:
            setattr(state, name, value)
        else:
            getattr(state, name)[index] = value

    def empty(nbytes, dtype, device):
        assert dtype == torch.uint8
        state.allocated.append((device.index, state.streams[device.index], nbytes, current_thread().name))
        return SimpleNamespace(nbytes=nbytes)

    monkeypatch.setattr(workspace, "_kept", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "device", lambda index: within("device", None, index))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: (index, state.streams[index]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("streams", *stream))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state.streams[index], raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    return state


def test_a_stream_keeps_one_of_each_size(gpu):
    first = workspace.get(0, 1 << 20)
    assert first.nbytes == 1 << 20 and workspace.get(0, (1 << 19) + 1) is first
    larger = workspace.get(0, (1 << 20) + 1)
    assert larger.nbytes == 1 << 21 and workspace.get(0, 1 << 20) is first
    gpu.streams[0] = 77
    assert workspace.get(0, 1 << 20) is not first
    gpu.streams[0] = 0
    assert workspace.get(0, 1 << 20) is first
    assert [x[:3] for x in gpu.allocated] == [(0, 0, 1 << 20), (0, 0, 1 << 21), (0, 77, 1 << 20)]


def test_it_is_the_streams_own_memory_and_no_pools(gpu):
    """Made on the stream that uses it, in a thread in which the caller's memory pool does not count."""
    gpu.streams[0] = 5
    workspace.get(0, 100)
    ((_, stream, nbytes, thread),) = gpu.allocated
    assert (stream, nbytes) == (5, workspace.SMALLEST) and thread != current_thread().name


def test_another_device_has_its_own(gpu):
    gpu.streams[1] = 3
    first, other = workspace.get(0, 100), workspace.get(1, 100)
    assert other is not first and workspace.get(1, 100) is other and gpu.device == 0
    assert [x[:2] for x in gpu.allocated] == [(0, 0), (1, 3)] and gpu.entered.count(1) == 2


def test_each_captured_launch_has_its_own(gpu):
    """Of the capture's memory: allocated by this thread, as large as asked for, and not kept."""
    eager = workspace.get(0, 100_000)
    gpu.capturing = True
    first, second = workspace.get(0, 100_000), workspace.get(0, 100_000)
    assert first is not second and eager not in (first, second)
    assert [x[2:] for x in gpu.allocated[1:]] == [(100_000, current_thread().name)] * 2
    gpu.capturing = False
    assert workspace.get(0, 100_000) is eager and len(workspace._kept) == 1


def test_size_classes():
    sizes = [1, workspace.SMALLEST, workspace.SMALLEST + 1, 1 << 20, (1 << 20) + 1]
    assert [workspace.size_class(n) for n in sizes] == [1 << 16, 1 << 16, 1 << 17, 1 << 20, 1 << 21]


@pytest.mark.gpu
def test_on_a_gpu():
    """Real streams, a real capture, in which nothing waits."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    kept = []
    for stream in streams:
        with torch.cuda.stream(stream):
            kept.append(workspace.get(0, 1 << 20))
            assert workspace.get(0, 1 << 20) is kept[-1] and kept[-1].is_cuda
    assert kept[0].data_ptr() != kept[1].data_ptr()
    graph, addresses = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(2):
            memory = workspace.get(0, 1 << 20)
            memory.fill_(1)
            addresses.append(memory.data_ptr())
            del memory
    graph.replay()
    torch.cuda.synchronize()
    assert not set(addresses) & {x.data_ptr() for x in kept}
