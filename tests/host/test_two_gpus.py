"""Two GPUs: every way in on one while the other is current, mixes, both at once, graphs, streams, contexts.

    python -m pytest tests/host/test_two_gpus.py

test_devices.py has what can be shown without them, and `pytest -m gpu --device cuda:1` runs all other GPU tests on the
second while the first is current. `benchmarks/gpu_tests.py --two` runs both and records them.
"""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from cute_attn import BlockLists, api, backward, device, flash_fwd, flash_fwd_varlen, plan
from cute_attn import call as calls
from cute_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from cute_attn.integrations import sdpa
from cute_attn.integrations import transformers as cute
from cute_attn.plan import Problem
from tests.support.attention import check, inputs
from tests.support.mixes import MIXES, look_alikes, mixes

COUNT = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs two GPUs: torch sees {COUNT}"),
    pytest.mark.usefixtures("first_stays_current"),
]


@pytest.fixture
def first_stays_current():
    """The current device, and the current stream of each, are nobody's to change."""
    torch.cuda.set_device(0)
    streams = [torch.cuda.current_stream(gpu) for gpu in (0, 1)]
    yield
    assert torch.cuda.current_device() == 0
    assert [torch.cuda.current_stream(gpu) for gpu in (0, 1)] == streams


def put(x, gpu):
    return x.to(f"cuda:{gpu}")


def given(gpu, *shape, **how):
    """The same random q, k, v for every GPU."""
    torch.manual_seed(0)
    return [put(x, gpu) for x in inputs(*(shape or (2, 4, 2, 300, 300, 64)), device="cpu", **how)]


def random(gpu, *shape):
    return put(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), gpu)


def ints(gpu, *values):
    return put(torch.tensor(values, dtype=torch.int32), gpu)


def dense(*shape, features=lambda gpu: {}, **how):
    return lambda gpu: flash_fwd(*given(gpu, *shape), return_lse=True, **how, **features(gpu))


def scores(gpu):
    table = random(gpu, 600) / 8
    return dict(score_mod=lambda s, b, h, q_idx, kv_idx: s + table[kv_idx])


def masks(gpu):
    documents = ints(gpu, *(i // 70 for i in range(300)))
    return dict(mask_mod=lambda b, h, q_idx, kv_idx, of: of[q_idx] == of[kv_idx], aux=(documents,))


def lists(gpu):
    indices = put(torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3).contiguous(), gpu)
    return dict(block_mask=BlockLists(ints(gpu, 1, 3, 2).view(1, 1, 3), indices))


def thinned(gpu):
    return dict(dropout_p=0.3, rng_state=put(torch.tensor([7, 9]), gpu))


def into_out(gpu):
    q, k, v = given(gpu)
    whole = torch.full((2, 6, 300, 64), torch.nan, dtype=q.dtype, device=q.device)
    o = flash_fwd(q, k, v, causal=True, out=whole[:, 1:5])
    assert whole[:, [0, 5]].isnan().all()
    return o


def of_sequences(gpu, function=flash_fwd_varlen, *lengths, **how):
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in given(gpu))
    return function(q, k, v, ints(gpu, 0, 80, 80, 600), ints(gpu, 0, 200, 220, 600), *lengths, causal=True, **how)


def gradients(gpu, *shape, **how):
    qkv = [x.requires_grad_() for x in given(gpu, *shape)]
    o = flash_fwd(*qkv, **how)
    return (o, *torch.autograd.grad(o, qkv, random(gpu, *o.shape).to(o.dtype)))


def gradients_of_sequences(gpu):
    qkv = [x.transpose(1, 2).flatten(0, 1).requires_grad_() for x in given(gpu)]
    ends = ints(gpu, 0, 80, 80, 600)
    o = flash_fwd_varlen(*qkv, ends, ends, max_seqlen_q=520, max_seqlen_k=520, causal=True)
    return (o, *torch.autograd.grad(o, qkv, random(gpu, *o.shape).to(o.dtype)))


def by_operator(gpu):
    return torch.ops.cute_attn.attention(*given(gpu), True, None, True, "bhsd")


def by_sdpa(gpu):
    q, k, v = (x.requires_grad_() for x in given(gpu, 2, 4, 4, 300, 300, 64))
    with sdpa.use():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (o, *torch.autograd.grad(o, (q, k, v), random(gpu, *o.shape).to(o.dtype)))


def by_transformers(gpu):
    return cute.attention(SimpleNamespace(is_causal=True), *given(gpu), None)[0]


def by_flash_attn(gpu):
    q, k, v = (x.transpose(1, 2) for x in given(gpu))
    return flash_attn_func(q, k, v, causal=True, window_size=(100, 0), return_attn_probs=True)


def compiled(gpu, **how):
    """Several calls, since with CUDA graphs the first two only warm up."""
    torch._dynamo.reset()
    function = torch.compile(lambda q, k, v: flash_fwd(q * 2, k, v, causal=True) + 1, fullgraph=True, **how)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        o = function(*given(gpu)).clone()
    return o


class Array:
    """Of a library of this file, which speaks DLPack and shares its memory as torch's tensors do."""

    def __init__(self, x):
        self.x = x
        self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__


def from_dlpack(x):
    return Array(torch.from_dlpack(x))


def by_dlpack(gpu):
    o, lse = flash_fwd(*map(Array, given(gpu)), sinks=Array(random(gpu, 4)), causal=True, return_lse=True)
    assert type(o) is type(lse) is Array
    return o.x, lse.x


SPLIT, PACKED = (1, 8, 8, 512, 4096, 64), (2, 12, 2, 1, 700, 64)
EXACT = {  # the forward's sums have a fixed order
    "full": dense(),
    "causal": dense(causal=True),
    "few tiles, d128": dense(1, 3, 3, 200, 300, 128, features=lambda gpu: dict(scale=0.2)),
    "many tiles": dense(4, 16, 4, 1024, 1024, 64, causal=True),
    "two head dims": lambda gpu: flash_fwd(*given(gpu, 2, 4, 2, 200, 300, 192, head_dim_v=128)),
    "bshd": lambda gpu: flash_fwd(*given(gpu, layout="bshd"), layout="bshd", causal=True),
    "constant time": dense(constant_time=True),
    "window": dense(window=(100, 20)),
    "keys split over a cluster": dense(*SPLIT),
    "PackGQA": dense(*PACKED, causal=True),
    "dropout": dense(features=thinned),
    "softcap, alibi_slopes, sinks": dense(
        features=lambda gpu: dict(softcap=20.0, alibi_slopes=random(gpu, 2, 4), sinks=random(gpu, 4))
    ),
    "score_mod": dense(features=scores),
    "mask_mod, aux": dense(features=masks),
    "block lists": dense(features=lists),
    "maxima": dense(causal=True, return_row_max=True, return_max_logit=True),
    "out": into_out,
    "no keys": dense(2, 4, 2, 30, 0, 64, features=lambda gpu: dict(sinks=random(gpu, 4))),
    "varlen": lambda gpu: of_sequences(gpu, return_lse=True),
    "varlen, scores": lambda gpu: of_sequences(gpu, sinks=random(gpu, 4), return_max_logit=True, **scores(gpu)),
    "varlen, seqused": lambda gpu: of_sequences(
        gpu, out=torch.zeros(600, 4, 64, dtype=torch.bfloat16, device=f"cuda:{gpu}"), seqused_k=ints(gpu, 150, 20, 300)
    ),
    "the operator": by_operator,
    "DLPack": by_dlpack,
    "transformers": by_transformers,
    "FlashAttention's function": by_flash_attn,
    "FlashAttention's varlen function": lambda gpu: of_sequences(gpu, flash_attn_varlen_func, 520, 380),
    "torch.compile": compiled,
    "torch.compile, CUDA graphs": lambda gpu: compiled(gpu, mode="reduce-overhead"),
}
CLOSE = {  # torch's backward adds in any order
    "cuDNN's backward": lambda gpu: gradients(gpu, causal=True),
    "FlashAttention-2's backward": lambda gpu: gradients(gpu, 2, 4, 2, 200, 300, 64, window=(150, 30)),
    "varlen' backward": gradients_of_sequences,
    "F.scaled_dot_product_attention": by_sdpa,
}

# torch's compiler, and the choice of backends that `sdpa.use` reads, may use the current GPU for themselves.
AT_THE_CURRENT = "torch.compile", "torch.compile, CUDA graphs", "F.scaled_dot_product_attention"


def test_the_shapes_are_what_they_are_called():
    name = torch.cuda.get_device_name(1)
    assert plan.plan(Problem(*SPLIT), name).split > 1
    assert plan.plan(Problem(*PACKED, causal=True), name).pack > 1


@pytest.mark.parametrize("way", [*EXACT, *CLOSE])
def test_every_way_in_on_the_second(way):
    """The same as on the first, where the results are too, and nothing is allocated on the first."""
    function, bounds = (EXACT[way], dict(rtol=0, atol=0)) if way in EXACT else (CLOSE[way], dict(rtol=0.02, atol=0.01))
    want = function(0)
    torch.cuda.synchronize(0)
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    found = function(1)
    assert torch.cuda.current_device() == 0
    if way not in AT_THE_CURRENT:
        assert torch.cuda.max_memory_allocated(0) == before
    found, want = (x if isinstance(x, tuple) else (x,) for x in (found, want))
    for x, y in zip(found, want, strict=True):
        assert x.device == torch.device("cuda", 1) and y.device == torch.device("cuda", 0)
        torch.testing.assert_close(x.cpu(), y.cpu(), equal_nan=False, **bounds)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_right_on_each(head_dim, causal):
    for gpu in (1, 0, 1):
        o, lse = check(*given(gpu, 2, 4, 2, 300, 400, head_dim), causal=causal)
        assert o.get_device() == lse.get_device() == gpu and torch.cuda.current_device() == 0


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator"])
def test_dropout_is_drawn_on_the_second(own):
    """From its own state: the first GPU's generator does not move."""
    q, k, v = given(1)
    generator = torch.Generator("cuda:1").manual_seed(3) if own else None
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state(0)
    o, used = flash_fwd(q, k, v, dropout_p=0.3, generator=generator, return_rng_state=True)
    assert used.device == q.device and torch.equal(torch.cuda.get_rng_state(0), before)
    assert torch.equal(flash_fwd(q, k, v, dropout_p=0.3, rng_state=used), o)
    again = flash_fwd(q, k, v, dropout_p=0.3, generator=generator)
    assert not torch.equal(again, o)


def test_a_generator_of_the_other_is_refused():
    with pytest.raises(ValueError, match="generator: it is for cuda:0, but q is on cuda:1"):
        flash_fwd(*given(1), dropout_p=0.3, generator=torch.Generator("cuda:0"))


@pytest.mark.parametrize("known", [False, True], ids=["first", "known"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_named(mix, known, monkeypatch):
    monkeypatch.setattr(calls, "known", {})
    call, words = mixes(put)[mix]
    if known:
        look_alikes(put)
    with pytest.raises(ValueError, match=words):
        call()
    assert torch.cuda.current_device() == 0
    for gpu in (0, 1):
        torch.cuda.synchronize(gpu)  # nothing was launched that could fail


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_mix_is_named_under_torch_compile(backend):
    (q, _, v), (_, k, _) = given(1), given(0)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"k: on cuda:0, but q is on cuda:1|different devices|same device"):
        torch.compile(lambda q, k, v: flash_fwd(q, k, v), backend=backend)(q, k, v)


def test_a_mix_is_refused_by_sdpa_and_in_the_backward():
    """Where flash_fwd refuses, torch's own operator gets it, and refuses too."""
    (q, k, v), other = given(1, 2, 4, 4, 300, 300, 64), given(0, 2, 4, 4, 300, 300, 64)
    with sdpa.use(), pytest.raises(RuntimeError, match="same device"):
        F.scaled_dot_product_attention(q, other[1], v)
    o, lse, _ = torch.ops.cute_attn.attention(q, k, v, True, None, True, "bhsd")
    for gradients in (backward.flash_bwd_op, backward.cudnn_bwd_op):
        with pytest.raises(ValueError, match="grad: on cuda:0, but q is on cuda:1"):
            gradients(other[0], q, k, v, o, lse, True, None, "bhsd")
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="cuda"):
        flash_fwd(q, k, v).backward(other[0])


def test_streams_of_either():
    """A call waits for its own GPU's current stream, and for none of the other's."""
    q, k, v = given(1)
    want = flash_fwd(q, k, v, causal=True)
    torch.cuda.synchronize(1)
    with torch.cuda.stream(torch.cuda.Stream(0)):
        torch.cuda._sleep(2_000_000_000)
        busy = torch.cuda.Event()
        busy.record()
        o = flash_fwd(q, k, v, causal=True)
        torch.cuda.current_stream(1).synchronize()
        assert torch.equal(o.cpu(), want.cpu()) and not busy.query()
    late, stream, ends = torch.empty_like(q), torch.cuda.Stream(1), ints(1, 0, 300)
    with current_stream(stream):
        with torch.cuda.device(1):
            torch.cuda._sleep(200_000_000)
        late.copy_(q)
        o = flash_fwd(late, k, v, causal=True)
        packed = flash_fwd_varlen(*(x[0].transpose(0, 1) for x in (late, k, v)), ends, ends, causal=True)
        late.fill_(torch.nan)
    stream.synchronize()
    assert torch.equal(o, want)
    torch.testing.assert_close(packed.transpose(0, 1), want[0], rtol=0.01, atol=0.01)


@contextmanager
def current_stream(stream):
    """Of its own GPU, while the first GPU stays current."""
    before = torch.cuda.current_stream(stream.device)
    torch.cuda.set_stream(stream)
    torch.cuda.set_device(0)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
        torch.cuda.set_device(0)


@pytest.mark.parametrize("own", [False, True], ids=["the first current in both", "each its own"])
def test_two_threads_at_once(own, cache):
    """First calls and many more, of kernels with a dynamic scheduler, with split keys and with neither."""
    problems = [((4, 16, 4, 1024, 1024, 64), True), (SPLIT, False), ((1, 3, 3, 200, 300, 64), False)]
    every = [[given(gpu, *shape) for shape, _ in problems] for gpu in (0, 1)]
    found, failures, start = [[], []], [], threading.Barrier(2, timeout=100)

    def work(gpu):
        try:
            if own:
                torch.cuda.set_device(gpu)
            start.wait()
            for _ in range(30):
                outs = [flash_fwd(*x, causal=causal) for x, (_, causal) in zip(every[gpu], problems, strict=True)]
                found[gpu].append([o.float().sum() for o in outs])
            found[gpu].append(outs)
            torch.cuda.synchronize(gpu)
            assert torch.cuda.current_device() == (gpu if own else 0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for first, second in zip(*found, strict=True):
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(first, second, strict=True))
    for gpu in (0, 1):
        for o, x, (_, causal) in zip(found[gpu][-1], every[gpu], problems, strict=True):
            assert torch.equal(o, flash_fwd(*x, causal=causal))
            check(*x, causal=causal)


def test_a_graph_on_each():
    """Captured while the first is current, replayed at once; the second follows its own data."""
    graphs, every = [], []
    for gpu in (0, 1):
        q, k, v = given(gpu, 4, 16, 4, 1024, 1024, 64)
        flash_fwd(q, k, v, causal=True)
        torch.cuda.synchronize(gpu)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(gpu)
        with torch.cuda.graph(graph, stream=stream):
            torch.cuda.set_device(0)
            o, lse = flash_fwd(q, k, v, causal=True, return_lse=True)
            again = flash_fwd(o, k, v)
            torch.cuda.set_device(gpu)
        graphs.append(graph)
        every.append((q, k, v, o, lse, again))
    for _ in range(10):
        for q, k, v, *outs in every:
            for x in (q, k, v):
                x.normal_()
            for x in outs:
                x.fill_(torch.nan)
        for graph in graphs:
            graph.replay()
        for gpu, (q, k, v, o, lse, again) in enumerate(every):
            torch.cuda.synchronize(gpu)
            want = flash_fwd(q, k, v, causal=True, return_lse=True)
            assert all(map(torch.equal, (o, lse, again), (*want, flash_fwd(want[0], k, v))))
    assert torch.cuda.current_device() == 0


def memory_of(gpu):
    return device.get(gpu)._counters[1].memory


def test_counters_are_of_each_gpu(monkeypatch):
    monkeypatch.setattr(device, "_devices", {})
    monkeypatch.setattr(calls, "known", {})
    many = 4, 16, 4, 1024, 1024, 64
    for gpu in (1, 0):
        flash_fwd(*given(gpu, *many), causal=True)
        assert memory_of(gpu) and all(x.get_device() == gpu for x in memory_of(gpu))
    tile_counters = [device.get(gpu).counters(1) for gpu in (0, 1)]
    with current_stream(torch.cuda.Stream(1)):
        tile_counters.append(device.get(1).counters(1))
    assert len(set(tile_counters)) == 3 and torch.cuda.current_device() == 0
    for gpu in (0, 1):
        torch.cuda.synchronize(gpu)
        assert not any(counters.any() for counters in memory_of(gpu))


def llama(gpus):
    """A random Llama of two layers, each on its GPU, as `device_map` would have it."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=64, vocab_size=199, max_position_embeddings=512, pad_token_id=0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=cute.register(), dtype=torch.bfloat16
    )
    parts = [(model.model.embed_tokens, gpus[0]), (model.model.rotary_emb, gpus[0]), (model.model.norm, gpus[1])]
    for part, gpu in (*parts, *zip(model.model.layers, gpus, strict=True), (model.lm_head, gpus[1])):
        part.to(f"cuda:{gpu}").register_forward_pre_hook(_moving_to(gpu), with_kwargs=True)
    return model.eval()


def _moving_to(gpu):
    return lambda module, args, kwargs: tree_map_only(torch.Tensor, lambda x: put(x, gpu), (args, kwargs))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_model_over_both(padding, monkeypatch):
    """Of which the mask goes from the one to the other: the same as on the first alone, all by flash_fwd."""
    where, flash = [], api.flash_fwd
    monkeypatch.setattr(
        api, "flash_fwd", lambda q, *rest, **how: where.append(q.get_device()) or flash(q, *rest, **how)
    )
    torch.manual_seed(1)
    tokens, real = torch.randint(1, 199, (2, 150)), torch.ones(2, 150, dtype=torch.long)
    if padding != "none":
        real[0, slice(40) if padding == "left" else slice(110, None)] = 0
    with torch.no_grad():
        logits = [
            llama(gpus)(tokens.to(f"cuda:{gpus[0]}"), attention_mask=real.to(f"cuda:{gpus[0]}"), use_cache=False).logits
            for gpus in ((0, 0), (0, 1), (1, 1))
        ]
    assert where == [0, 0, 0, 1, 1, 1]
    for x in logits[1:]:
        torch.testing.assert_close(x.cpu()[real > 0], logits[0].cpu()[real > 0], rtol=0.02, atol=0.02)


def test_sensors_are_of_the_current_gpu():
    from cute_attn.tools.benchmark.machine import Nvml

    nvml = []
    for gpu in (0, 1):
        with torch.cuda.device(gpu):
            nvml.append(Nvml())
    if nvml[0].missing:
        pytest.skip(nvml[0].missing)
    found = [one._pynvml.nvmlDeviceGetUUID(one._handle) for one in nvml]
    assert found == [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in (0, 1)]


def test_the_benchmark_is_of_the_current_gpu():
    from cute_attn.tools.benchmark import cells, frame, implementations

    p = Problem(2, 4, 4, 300, 300, 64)
    with torch.cuda.device(1):
        setup = frame.gpu_setup(rounds=1)
        (row,) = cells.measure(p, [implementations.CuteAttn()], {}, setup)
    assert setup.device == torch.device("cuda", 1) and row["reason"] is None and row["p50_us"] > 0


def in_processes(*codes, folder):
    """What each prints, all running at once on one cold cache."""
    environment = {**os.environ, "CUTE_ATTN_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    running = [subprocess.Popen([sys.executable, "-c", code], **how) for code in codes]
    answers = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, answers, strict=True):
        assert process.returncode == 0, errors
    return [out.split() for out, _ in answers]


CALLS = """
import torch, cute_attn
from cuda.bindings import driver, runtime

def calls(gpu):
    torch.manual_seed(0)
    outs = []
    for sizes in ((2, 300, 64), (64, 1024, 64), (1, 200, 128)):
        q = torch.randn(1, *sizes).bfloat16().to(f"cuda:{gpu}")
        outs += [cute_attn.flash_fwd(q, q, q, causal=causal) for causal in (False, True)]
    ends = torch.tensor([0, 100, 1024], dtype=torch.int32, device=q.device)
    q = torch.randn(1024, 4, 64).bfloat16().to(q.device)
    outs.append(cute_attn.flash_fwd_varlen(q, q, q, ends, ends))
    torch.cuda.synchronize(gpu)
    return [float(x.double().abs().sum()) for x in outs]

def has_context(gpu):
    error, flags, active = driver.cuDevicePrimaryCtxGetState(gpu)
    assert not int(error), error
    return active
"""


def test_two_processes_at_once(tmp_path):
    """One compiles, the other finds; each on its GPU while the first is current."""
    first, second = in_processes(*(CALLS + f"print(*calls({gpu}))" for gpu in (0, 1)), folder=tmp_path)
    assert len(first) == 7 and first == second


def test_no_context_on_the_other_gpu(tmp_path):
    """A process that uses the second alone takes no memory of the first, which is current."""
    code = (
        CALLS
        + "x = torch.zeros(9).to('cuda:1'); print(has_context(0)); calls(1); print(has_context(0), has_context(1))"
    )
    ((before, after, own),) = in_processes(code, folder=tmp_path)
    if before != "0":
        pytest.skip("torch itself has made a context on the first")
    assert (after, own) == ("0", "1")


def test_no_access_between_peers_is_needed(tmp_path):
    """Nobody has asked for it when both have been used, and for torch to copy between them nobody has to."""
    code = CALLS + (
        "assert calls(0) == calls(1)\n"
        "for gpu in (0, 1):\n"
        "    torch.cuda.set_device(gpu)\n"
        "    print(runtime.cudaDeviceDisablePeerAccess(1 - gpu)[0].name)\n"
    )
    assert in_processes(code, folder=tmp_path) == [["cudaErrorPeerAccessNotEnabled"] * 2]
