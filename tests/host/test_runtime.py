"""How flash_fwd behaves as a guest on the GPU: streams, threads, devices, graphs, memory, gradients."""

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from cute_attn import call, device, flash_fwd
from tests.support.attention import check, inputs

pytestmark = pytest.mark.gpu


def cases():
    """Shapes of the dynamic scheduler, several tiles for each CTA."""
    return [inputs(4, 16, 4, 1024, 1024, d) for d in (64, 128)]


def test_current_stream_orders_the_call():
    """The inputs are made on a side stream behind slow work: a launch on any other stream would read too early."""
    stream = torch.cuda.Stream()
    q, k, v = inputs(2, 8, 8, 512, 512, 64)
    want = flash_fwd(q, k, v, causal=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.full_like(q, torch.nan)
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        o = flash_fwd(late, k, v, causal=True)
        late.fill_(torch.nan)
    stream.synchronize()
    assert torch.equal(o, want)


def test_streams_at_once():
    """Small grids on many streams run side by side; sharing a counter would lose or repeat tiles."""
    qkv = [inputs(1, 3, 3, 64 * n, 64 * n, 64) for n in range(3, 19)]
    wants = [flash_fwd(*x, causal=True) for x in qkv]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in qkv]
    for _ in range(20):
        outs = [torch.full_like(x[0], torch.nan) for x in qkv]
        torch.cuda.synchronize()
        for x, out, stream in zip(qkv, outs, streams, strict=True):
            with torch.cuda.stream(stream):
                flash_fwd(*x, causal=True, out=out)
        torch.cuda.synchronize()
        assert all(torch.equal(o, w) for o, w in zip(outs, wants, strict=True))


def test_threads_at_once(cache):
    """First calls from many threads: one compiles, all are right."""
    problems = [(inputs(2, 4, 4, 300, 300, d), causal) for d in (64, 128) for causal in (False, True)] * 3
    failures = []

    def work(x, causal):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    check(*x, causal=causal)
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=problem) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("causal", [False, True])
def test_graph_replays_with_new_data(causal):
    for q, k, v in cases():
        out = torch.empty_like(q)
        flash_fwd(q, k, v, causal=causal, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flash_fwd(q, k, v, causal=causal, out=out)
            o = flash_fwd(q, out, out) if k.shape == q.shape else flash_fwd(q, k, v, causal=causal)
        for _ in range(3):
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
            out.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, flash_fwd(q, k, v, causal=causal))
            assert not o.isnan().any()


def test_graphs_and_eager_calls_at_once():
    """Graphs captured on one stream, replayed on several beside eager calls: each launch has a counter of its own."""
    q, k, v = inputs(1, 5, 5, 1000, 1000, 64)
    want = flash_fwd(q, k, v, causal=True)
    graphs, outs = [], []
    for _ in range(6):
        graph = torch.cuda.CUDAGraph()
        out = torch.empty_like(q)
        with torch.cuda.graph(graph):
            flash_fwd(q, k, v, causal=True, out=out)
        graphs.append(graph)
        outs.append(out)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = flash_fwd(q, k, v, causal=True)
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in [*outs, eager])


@pytest.mark.parametrize("each", device.COUNTERS)
def test_counters_are_distinct_and_zero_after_use(each):
    gpu = device.Device(torch.cuda.current_device())
    streams = [torch.cuda.Stream() for _ in range(8)]
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found += [gpu.counters(each) for _ in range(2)]
    assert found[::2] == found[1::2]
    graph, captured = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        captured = [gpu.counters(each) for _ in range(device.COUNTERS[each])]
    addresses = sorted(found[::2] + captured)
    assert all(b - a >= 4 * each for a, b in itertools.pairwise(addresses))
    for x in cases():
        flash_fwd(*x, causal=True)
    torch.cuda.synchronize()
    mine = device.get(torch.cuda.current_device())
    mine.counters(each)  # the launches' own
    memory = mine._counters[each].memory
    assert memory and not any(counters.any() for counters in memory)


def test_every_device():
    """On the tensors' own device and its current stream, whichever device is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        for causal in (False, True):
            q, k, v = (x.to(f"cuda:{index}") for x in inputs(2, 4, 4, 300, 300, 64))
            o, _ = check(q, k, v, causal=causal)
            assert o.device.index == index
            assert torch.cuda.current_device() == current


def test_a_call_allocates_o_and_lse_only():
    q, k, v = inputs(2, 16, 4, 2048, 2048, 128)
    for causal in (False, True):
        flash_fwd(q, k, v, causal=causal)  # the stream's counter
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, lse = flash_fwd(q, k, v, causal=causal, return_lse=True)
        assert torch.cuda.max_memory_allocated() - before == o.nbytes + lse.nbytes
        del lse
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_fwd(q, k, v, causal=causal, out=o)
        assert torch.cuda.max_memory_allocated() == before


def test_gradient_state():
    q, k, v = inputs(1, 2, 2, 64, 64, 64)
    q.requires_grad_()
    with torch.no_grad():
        o = flash_fwd(q, k, v)
    assert not o.requires_grad
    with torch.inference_mode():
        assert torch.equal(flash_fwd(q, k, v), o)
    assert torch.is_grad_enabled()
    assert flash_fwd(q, k, v).requires_grad


def test_misaligned_start_raises():
    q, k, v = inputs(1, 2, 2, 64, 64, 64)
    shifted = torch.empty(q.numel() + 8, dtype=q.dtype, device="cuda")[1 : q.numel() + 1].view(q.shape)
    for args, name in (((shifted, k, v), "q"), ((q, shifted, v), "k"), ((q, k, shifted), "v")):
        with pytest.raises(ValueError, match=f"{name}: its data starts 2 bytes past a multiple of 16"):
            flash_fwd(*args)
    with pytest.raises(ValueError, match="out: its data starts"):
        flash_fwd(q, k, v, out=shifted)


def test_first_call_is_quick(tmp_path):
    """Cold at most 3 s, from the disk cache in a new process at most 0.5 s, after the imports and the inputs."""
    code = (
        "import time, torch, cute_attn\n"
        "q = torch.randn(1, 2, 300, 128, device='cuda').bfloat16(); torch.cuda.synchronize()\n"
        "t = time.perf_counter(); cute_attn.flash_fwd(q, q, q, causal=True); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - t)"
    )
    environment = {**os.environ, "CUTE_ATTN_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    seconds = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        seconds.append(float(done.stdout))
    print("first call, cold and from the disk cache:", seconds)
    assert seconds[0] <= 3.0
    assert seconds[1] <= 0.5


def test_other_gpus_are_refused_by_name(monkeypatch):
    class Ampere:
        name, major, minor, multi_processor_count = "NVIDIA A100", 8, 0, 108

    call.known.clear()
    monkeypatch.setattr(device, "_devices", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Ampere)
    with pytest.raises(ValueError, match=r"NVIDIA A100 \(sm_80\); the kernels are for Hopper"):
        flash_fwd(*inputs(1, 2, 2, 64, 64, 64))
