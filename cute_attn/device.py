"""What the host keeps per GPU: its size, and the counters of launches that may run at once."""

import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cutlass
import torch

from . import tuned
from .kernels.config import PART_COUNTERS

COUNTERS = {1: 4096, PART_COUNTERS: 256}  # a launch's: launches of a slab
SDPA = "torch.nn.functional.scaled_dot_product_attention"
# torch.cuda.current_device without its check whether CUDA runs; a torch for CPUs has none.
current: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)


class Counters:
    """Of a GPU: int32 counters, each 0 between launches (a launch leaves 0 behind); a launch gets `each` of them.

    Two launches that may run at once never share any: launches of one stream follow each other, so a stream has its
    own; a captured launch may be replayed beside anything, so each has its own, for good.
    """

    def __init__(self, index: int, each: int, launches: int):
        self.index, self.each, self.launches = index, each, launches  # of a slab
        self._lock = threading.Lock()
        self._of_stream: dict[int, int] = {}  # stream -> address
        self._unused: list[int] = []
        self.memory: list[torch.Tensor] = []  # of all counters; a graph does not say when it dies

    def get(self) -> int:
        """The address of the first one for a launch on this device's current stream."""
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.get()
        if torch.cuda.is_current_stream_capturing():
            return self._captured()
        stream = torch._C._cuda_getCurrentRawStream(self.index)  # current_stream().cuda_stream takes 1.2 us, not 0.1
        counters = self._of_stream.get(stream)
        return self._new(stream) if counters is None else counters

    def _new(self, stream: int) -> int:
        with self._lock:
            if not self._unused:
                with ThreadPoolExecutor(1) as thread:  # the caller's allocations may be a CUDA graph's, and end with it
                    self._unused = thread.submit(self._slab).result()
            return self._of_stream.setdefault(stream, self._unused.pop())

    def _slab(self) -> list[int]:
        counters = self._zeros(self.launches)
        torch.cuda.current_stream(self.index).synchronize()  # once: other streams may use it next
        return counters

    def _captured(self) -> int:
        with self._lock:
            # Without a slab, or with a used-up one, the graph itself zeroes counters before each replay.
            return self._unused.pop() if self._unused else self._zeros(1)[0]

    def _zeros(self, launches: int) -> list[int]:
        memory = torch.zeros(launches, self.each, dtype=torch.int32, device=self.index)
        self.memory.append(memory)
        return [memory.data_ptr() + 4 * self.each * i for i in range(launches)]


class Device:
    """A Hopper GPU and its launches' counters: one, of tiles that CTAs draw, or one for each tile that they share."""

    def __init__(self, index: int, argument: str = "q", instead: str = SDPA):
        properties = torch.cuda.get_device_properties(index)
        if (properties.major, properties.minor) != (9, 0):
            raise ValueError(
                f"{argument}: on cuda:{index}, {properties.name} (sm_{properties.major}{properties.minor}); the "
                f"kernels are for Hopper (sm_90: H100, H200, GH200); use {instead} there"
            )
        self.index, self.name = index, properties.name
        self.num_sms = properties.multi_processor_count
        self._counters = {each: Counters(index, each, launches) for each, launches in COUNTERS.items()}

    def counters(self, each: int) -> int:
        """The address of so many, as `FwdConfig.counters` says, for a launch on the current stream; 0: of none."""
        return self._counters[each].get() if each else 0

    def guarded(self, kernel: Callable) -> Callable:
        """The kernel for a call while another device is current.

        The compiled call would go to this one and back by cudaSetDevice, which on the way back makes a context, of
        hundreds of MB, on a device that the process may never use; torch goes back only to one that has a context.
        """

        def launch(*arguments):
            with torch.cuda.device(self.index):
                return kernel(*arguments)

        return launch


def launcher(gpu: Device, kernel: Callable) -> Callable:
    """The kernel on this GPU, for a call whichever device is current."""
    return kernel if current() == gpu.index else gpu.guarded(kernel)


_devices: dict[int, Device] = {}
_lock = threading.Lock()


def get(index: int, argument: str = "q", instead: str = SDPA) -> Device:
    """The device with this index. The first warns by `other_cuda`.

    Raises:
        ValueError: it is no Hopper GPU; the message says which argument is there, and what to use instead.
    """
    found = _devices.get(index)
    if found is None:
        with _lock:
            found = _devices.get(index) or Device(index, argument, instead)
            if not _devices and (text := other_cuda()):
                warnings.warn(text, stacklevel=2)
            _devices[index] = found
    return found


def other_cuda() -> str | None:
    """What there is to say where torch is built for a later major version of CUDA than the DSL compiles with.

    The DSL brings its own compiler, ptxas, and takes the latest of those installed that the driver supports.
    """
    torchs, ours = torch.version.cuda, cutlass.CUDA_VERSION
    if torchs is None or int(torchs.split(".")[0]) <= ours.major:
        return None
    return (
        f"torch is built for CUDA {torchs}, but nvidia-cutlass-dsl has libraries for CUDA {ours.major} only: kernels "
        f"compiled by CUDA {ours.major}.{ours.minor}'s ptxas run, but are not the machine code that was tested and "
        'timed; pip install "cute_attn[cu13]"'
    )


def name() -> str | None:
    """Of torch's current GPU, to plan by; None where there is none, and unasked where the user has no tables."""
    if not os.path.isdir(tuned.user_folder()) or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()
