"""Several GPUs, without one: tensors that say where they are, GPUs that note their launches, and the real host code.

test_two_gpus.py has what only two real ones can show.
"""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cute_attn import backward, compile, device, flash_fwd, flash_fwd_varlen, operands, plan
from cute_attn import call as calls
from cute_attn.features.dropout import Dropout, DropoutFeature
from cute_attn.integrations import dlpack
from tests.interpreter import device as ptx_device
from tests.interpreter import host
from tests.support.attention import inputs
from tests.support.away import Away
from tests.support.mixes import MIXES, lengths, look_alikes, mixes, qkv, varlen_inputs
from tests.support.requirements import interpreter

pytestmark = pytest.mark.usefixtures("one_thread")


class On(torch.Tensor):
    """A CPU tensor that says it is on the GPU of index `gpu`, as do those that are made of it."""

    gpu: int

    @property
    def device(self):
        return torch.device("cuda", self.gpu)

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return self.gpu


class On0(On):
    gpu = 0


class On1(On):
    gpu = 1


def put(x, gpu):
    return x.as_subclass((On0, On1)[gpu])


class Gpu:
    """In place of device.Device."""

    def __init__(self, index, name, num_sms):
        self.index, self.name, self.num_sms = index, name, num_sms
        self.guarded = device.Device.guarded.__get__(self)

    def counters(self, each):
        return 1000 + self.index if each else 0


class Two:
    """Two GPUs: which is current, and each launch: (where, which is current, the kernel's config, its arguments)."""

    def __init__(self):
        self.gpus = Gpu(0, "NVIDIA H200", 132), Gpu(1, "NVIDIA H100 PCIe", 114)
        self.current, self.launches, self.failing = 0, [], False

    @contextmanager
    def guard(self, index):
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def kernel(self, config):
        def launch(*arguments):
            where = {x.get_device() for x in arguments if isinstance(x, torch.Tensor)}
            if self.failing or len(where) > 1:
                raise ValueError("Mismatched Tensor device_id")  # as the compiled call says, before it launches
            self.launches.append((where.pop(), self.current, config, arguments))

        return launch


@pytest.fixture
def two(monkeypatch):
    found = Two()
    monkeypatch.setattr(device, "get", lambda index: found.gpus[index])
    monkeypatch.setattr(device, "current", lambda: found.current)
    monkeypatch.setattr(torch.cuda, "device", found.guard)
    monkeypatch.setattr(compile, "get", found.kernel)
    monkeypatch.setattr(calls, "known", {})
    return found


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_is_on_the_tensors_own_gpu(two, current):
    """With its SMs and its counter, as current one; what was current before is current again, after an error too."""
    two.current = current
    many_tiles = torch.zeros(2048, 64, dtype=torch.bfloat16).expand(16, 16, 2048, 64)
    for gpu in (0, 1, 0, 1):
        two.launches.clear()
        assert flash_fwd(*(put(many_tiles, gpu) for _ in range(3)), causal=True).get_device() == gpu
        assert flash_fwd_varlen(*varlen_inputs(put, gpu)).get_device() == gpu
        (dense, of_sequences), sms = two.launches, two.gpus[gpu].num_sms
        assert dense[:2] == of_sequences[:2] == (gpu, gpu) and two.current == current
        assert dense[3][4:] == (0, 1000 + gpu, 0.125, sms)
        assert of_sequences[3][4:8] == (0, 1000 + gpu, 0.125, sms)
    two.failing = True
    for call in (lambda: flash_fwd(*qkv(put, 1)), lambda: flash_fwd_varlen(*varlen_inputs(put, 1))):
        with pytest.raises(ValueError, match="Mismatched"):
            call()
        assert two.current == current


def test_each_gpu_has_its_table(two, monkeypatch):
    """Two of other names may run other kernels for the same call, which is looked up by where it is."""
    asked = []
    monkeypatch.setattr(operands, "plan", lambda problem, gpu: asked.append(gpu) or plan.plan(problem, gpu))
    monkeypatch.setattr(operands, "plan_varlen", lambda *kind: asked.append(kind[4]) or plan.varlen(*kind))
    for gpu in (0, 1, 0, 1):
        flash_fwd(*qkv(put, gpu))
        flash_fwd_varlen(*varlen_inputs(put, gpu))
    assert asked == [gpu.name for gpu in two.gpus for _ in range(2)]


@pytest.mark.parametrize("known", [False, True], ids=["first", "known"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_named(two, mix, known):
    """Before a launch; of a call, too, whose look-alike on one GPU has come before."""
    call, words = mixes(put)[mix]
    if known:
        look_alikes(put)
        two.launches.clear()
    with pytest.raises(ValueError, match=words):
        call()
    assert not two.launches and two.current == 0


def test_no_keys_hide_no_mix(two):
    """The kernel gets others in place of a k and a v without rows."""
    for _ in range(2):
        flash_fwd_varlen(*varlen_inputs(put, 1, keys=0)[:4], lengths(put, 1, 0, 0, 0))
    q, k, v, cu_q, _ = varlen_inputs(put, 1, keys=0)
    with pytest.raises(ValueError, match="k: on cuda:0, but q is on cuda:1"):
        flash_fwd_varlen(q, put(k, 0), v, cu_q, lengths(put, 1, 0, 0, 0))


@pytest.mark.parametrize("of", ["cuda:0", "cpu"])
def test_a_generator_is_of_the_tensors_gpu(of):
    """torch asks for the type alone, and in a graph its kernel would read the seed on the other GPU."""
    other = SimpleNamespace(device=torch.device(of))
    with pytest.raises(ValueError, match=rf"generator: it is for {of}, .* use torch.Generator\('cuda:1'\)"):
        DropoutFeature().fitted(Dropout(0.5, other, None), None, torch.device("cuda:1"))
    for own in ("cuda:1", "cuda"):
        drawn = Dropout(0.5, SimpleNamespace(device=torch.device(own)), None)
        DropoutFeature().fitted(drawn, None, torch.device("cuda:1"))


@pytest.mark.parametrize("name", ["grad", "k", "v", "o", "lse", "cu_seqlens_q", "cu_seqlens_k"])
def test_a_backward_names_a_mix(name):
    """torch's FlashAttention does not ask; by the operators anything can come."""
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    lse, cu = torch.zeros(2, 9), torch.tensor([0, 9], dtype=torch.int32)
    given = dict(grad=q, q=q, k=k, v=v, o=q, lse=lse, cu_seqlens_q=cu, cu_seqlens_k=cu)
    given[name] = given[name].to("meta")
    words = f"{name}: on meta, but q is on cpu; move one"
    with pytest.raises(ValueError, match=words):
        backward.flash_bwd_varlen_op(*given.values(), 9, 9, False, None, None, None)
    if not name.startswith("cu_seqlens"):
        tensors = [x if x.dim() < 3 else x.transpose(0, 1)[None] for x in list(given.values())[:6]]
        for op in (backward.flash_bwd_op, backward.cudnn_bwd_op):
            with pytest.raises(ValueError, match=words):
                op(*tensors, False, None, "bhsd")


def test_streams_of_two_gpus_share_no_counter(monkeypatch):
    """The default streams of all GPUs have one handle, 0; a counter is in the memory of its own GPU."""
    current, handles = [0], {0: 0, 1: 0}

    @contextmanager
    def guard(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", handles.get, raising=False)
    slabs = {}

    def slab(self):
        start = 1_000_000 * (1 + self.index)
        slabs[self.index] = range(start, start + 4 * device.COUNTERS[1], 4)
        return list(slabs[self.index])

    monkeypatch.setattr(device.Counters, "_slab", slab)
    monkeypatch.setattr(device, "_devices", {})
    of = [device.get(index).counters(1) for index in (0, 1)]
    assert [x in slabs[index] for index, x in enumerate(of)] == [True, True] and current == [0]
    assert [device.get(index).counters(1) for index in (0, 1)] == of
    handles[1] = 77
    assert device.get(1).counters(1) in set(slabs[1]) - set(of) and device.get(0).counters(1) == of[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    captured = [device.get(1).counters(1) for _ in range(3)]
    assert len({*captured, *of}) == 5 and set(captured) < set(slabs[1]) and device.get(0).counters(1) == of[0]


H200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)


def test_dlpack_goes_to_the_arrays_gpu():
    """torch exports from no other one, and CuPy takes the stream of the current one."""
    array = SimpleNamespace(__dlpack_device__=lambda: (dlpack.CUDA, 1))
    assert isinstance(dlpack._on_its_gpu(array), torch.cuda.device) and dlpack._on_its_gpu(array).idx == 1
    assert not isinstance(dlpack._on_its_gpu(torch.zeros(1)), torch.cuda.device)


def test_away_from_home_another_gpu_is_current(monkeypatch):
    """`--device`: within a call, whatever comes of it; CPU tensors, and all else, are not meddled with."""
    current, seen = [1], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    there = Away(1)

    @there.called_elsewhere
    def call(q, *, fails=False, leaves=None):
        seen.append(current[0])
        current[0] = current[0] if leaves is None else leaves
        if fails:
            raise ValueError("as asked")

    on_0, on_1 = (put(torch.zeros(1), gpu) for gpu in (0, 1))
    call(on_1)
    call(q=on_0)
    call(torch.zeros(1))
    call(None)
    with pytest.raises(ValueError, match="as asked"):
        call(on_1, fails=True)
    with pytest.raises(AssertionError, match="call has left cuda:1 current, and cuda:0 was"):
        call(on_1, leaves=1)
    assert seen == [0, 1, 1, 1, 0, 0] and current == [1]
    there.counted(lambda gpu, kernel: None)(SimpleNamespace(index=1), None)
    assert there.launches == {"cuda:1": 1}


class Noted(host.Host):
    """The compiled host code between two GPUs, of which the first is current."""

    def _functions(self):
        i = ctypes.c_int
        self.current, self.calls, self.fails = 0, [], 0
        return super()._functions() | {
            "_cudaGetDevice": ctypes.CFUNCTYPE(i, ctypes.POINTER(i))(self._get_device),
            "_cudaSetDevice": ctypes.CFUNCTYPE(i, i)(self._set_device),
            "TVMFFIEnvGetStream": ctypes.CFUNCTYPE(ctypes.c_void_p, i, i)(self._stream),
        }

    def _get_device(self, index):
        index[0] = self.current
        return 0

    def _set_device(self, index):
        self.current = index
        return 0

    def _stream(self, kind, index):
        self.calls.append((kind, index))
        return 0x5000 + index

    def _launch(self, config, function, parameters):
        self.calls.append((self.current, config.contents.stream))
        return self.fails or super()._launch(config, function, parameters)


@interpreter
def test_the_compiled_call_launches_on_the_tensors_gpu(monkeypatch):
    """On that GPU's stream, and goes back to the current one, after a failed launch too; a mix launches nothing."""
    where = {}
    monkeypatch.setattr(host, "_dl", lambda x, kept: _with_index(one_dl(x, kept), where.get(x.data_ptr(), 1)))
    known = ptx_device.get(plan.config(64, "bf16", "bhsd", False))
    call = Noted(known.image, known.symbol, known.host._bytes)
    q, k, v = inputs(1, 2, 2, 40, 50, 64, device="cpu")
    arguments = q, k, v, torch.empty_like(q), 0, 0, 0.125, 132
    for call.current in (0, 1):
        before = call.current
        assert len(call(*arguments)) == 1
        call.fails = 1
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            call(*arguments)
        assert call.calls == [(host.CUDA, 1), (1, 0x5001)] * 2 and call.current == before
        call.fails = 0
        for x in (q, k, v, arguments[3]):
            where.update({x.data_ptr(): 0})
            with pytest.raises(RuntimeError, match="device"):
                call(*arguments)
            where.clear()
        assert len(call.calls) == 4 and call.current == before
        call.calls.clear()


one_dl = host._dl


def _with_index(dl, index):
    dl.index = index
    return dl
