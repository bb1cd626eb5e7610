"""What was measured on, and what the GPU's own sensors say meanwhile. Reads only: no clock or limit is ever set."""

import datetime
import hashlib
import platform
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import cutlass
import torch

import cute_attn

from ...compile import KERNELS
from .implementations import cudnn_version
from .timing import Call, CudaTimer, Stats, compare
from .workload import BYTES_FORMULA, FLOP_FORMULA

CUBLAS_SIZE = 8192
CUBLAS_WARMUP_MS = 400.0  # the first load of a run: the GPU may come from idle clocks


def no_hopper() -> str | None:
    """Why nothing can be timed here; None on a Hopper GPU."""
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}, not sm_90"
    return None


def kernel_hash() -> str:
    """SHA-256 of the device code, as `cat kernels/*.py | sha256sum` prints it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.py")))).hexdigest()


def conditions(nvml: "Nvml") -> dict[str, Any]:
    """Everything beside the problem that a time depends on; None where it cannot be read."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "sms": gpu.multi_processor_count if gpu else None,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **nvml.conditions(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cutlass_dsl": cutlass.__version__,
        "cudnn": cudnn_version(),
        "cute_attn": cute_attn.__version__,
        "kernels_sha256": kernel_hash(),
        "python": platform.python_version(),
        "flop": FLOP_FORMULA,
        "bytes": BYTES_FORMULA,
    }


class Nvml:
    """The sensors of torch's current GPU; a reading is None where the driver, or nvidia-ml-py, gives none."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self._pynvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = self._find(pynvml)
            self._pynvml = pynvml
        except ImportError:
            self.missing = 'not read: nvidia-ml-py is missing; pip install "cute_attn[bench]"'
        except Exception as error:  # no driver, no GPU, or a sandbox that hides it: times do not need it
            self.missing = f"not read: {type(error).__name__}: {error}"

    @staticmethod
    def _find(pynvml):
        """torch's GPU, whatever CUDA_VISIBLE_DEVICES hides; where uuids are hidden too, the only one."""
        if pynvml.nvmlDeviceGetCount() == 1:
            return pynvml.nvmlDeviceGetHandleByIndex(0)
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> tuple[float | None, float | None]:
        """(watts, SM MHz) now."""
        return self.watts(), self._ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM")

    def watts(self) -> float | None:
        """Of this moment where the driver tells; else its mean over the last second."""
        fields = self._ask("nvmlDeviceGetFieldValues", ["NVML_FI_DEV_POWER_INSTANT"])
        if fields and fields[0].nvmlReturn == 0:
            return fields[0].value.uiVal / 1000
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def conditions(self) -> dict[str, Any]:
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        clocks = {
            f"{what}_mhz_{when}": self._ask(f"nvmlDeviceGet{query}", f"NVML_CLOCK_{what.upper()}")
            for what in ("sm", "mem")
            for when, query in (("now", "ClockInfo"), ("max", "MaxClockInfo"))
        }
        return {
            **clocks,
            "power_limit_watts": None if limit is None else limit / 1000,
            "driver": self._ask("nvmlSystemGetDriverVersion", of_device=False),
            "sensors": self.missing or "NVML: power and SM clock every 5 ms of the timed parts",
        }

    def _ask(self, query: str, *constants, of_device: bool = True):
        """One NVML query, its constants by name; None where this driver or GPU does not answer it."""
        if self._pynvml is None:
            return None
        value = {name: getattr(self._pynvml, name, None) for name in _flat(constants)}
        if None in value.values():
            return None
        args = [[value[name] for name in x] if isinstance(x, list) else value[x] for x in constants]
        try:
            return getattr(self._pynvml, query)(*([self._handle] if of_device else []), *args)
        except self._pynvml.NVMLError:
            return None


def _flat(names):
    return [name for x in names for name in (x if isinstance(x, list) else [x])]


class Monitor:
    """Reads (watts, SM MHz) every few ms in a thread of its own, and keeps them for whoever is watched then."""

    def __init__(self, read: Callable[[], tuple[float | None, float | None]], interval: float = 0.005):
        self._read, self._interval = read, interval
        self._watched: str | None = None
        self._readings: dict[str, list[tuple[float | None, float | None]]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    @contextmanager
    def watch(self, name):
        self._watched = name
        try:
            yield
        finally:
            self._watched = None

    def mean(self, name):
        watts, mhz = ([x for x in column if x is not None] for column in _columns(self._readings[name]))
        return fmean(watts) if watts else None, fmean(mhz) if mhz else None

    def _loop(self):
        while not self._stop.wait(self._interval):
            name = self._watched
            if name is not None:
                reading = self._read()
                if self._watched == name:  # a reading that ends after the timed part is of another load
                    self._readings[name].append(reading)


def _columns(readings):
    return zip(*readings, strict=True) if readings else ([], [])


def cublas(nvml: Nvml) -> Stats:
    """This machine's steady rate: a bf16 8192 x 8192 x 8192 product of random normal matrices, warmed up."""
    a, b, c = (torch.randn(CUBLAS_SIZE, CUBLAS_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    timer = CudaTimer()
    with Monitor(nvml.read) as monitor:
        call = Call(lambda: torch.mm(a, b, out=c))
        return compare({"cublas": call}, warmup_ms=CUBLAS_WARMUP_MS, timer=timer, monitor=monitor)["cublas"]


def cublas_tflops(stats: Stats) -> float:
    return 2 * CUBLAS_SIZE**3 / stats.p50_us / 1e6
