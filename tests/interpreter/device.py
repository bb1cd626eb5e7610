"""Makes CPU tensors a GPU's: `flash_fwd` then takes its whole real path, and what it launches is interpreted."""

import contextlib
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from cute_attn import call, checks, compile, device, operands, plan, workspace
from cute_attn.kernels.config import FwdConfig
from cute_attn.kernels.registry import KernelConfig
from tests.support import built

from .host import Host
from .machine import Machine
from .memory import POISON, Global
from .parse import parse
from .translate import Kernel

NUM_SMS = 3
CUDA = torch.device("cuda", 0)


class Compiled:
    """A function that the DSL has compiled, called as the real one, on CPU tensors."""

    def __init__(self, ptx: str, image: bytes, symbol: str = compile.SYMBOL):
        self.ptx, self.image, self.symbol = ptx, image, symbol
        programs = parse(ptx)
        self.kernels = {name: Kernel(program) for name, program in programs.items()}
        self.host = Host(image, symbol, {name: [p.size for p in x.parameters.values()] for name, x in programs.items()})
        self.seed, self.room = 0, NUM_SMS

    def __call__(self, *arguments):
        launches = self.host(*arguments)
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments if not isinstance(x, float)]
        memory = Global(addresses, track=len(launches) > 1)
        for i, launch in enumerate(launches):
            depends = dict(prerequisite=i > 0, dependents=i + 1 < len(launches))
            Machine(self.kernels[launch.kernel], launch, memory, self.room, self.seed, **depends).run()

    def changed(self, line: int, text: str) -> "Compiled":
        """With another text in place of a line of the PTX."""
        lines = self.ptx.splitlines()
        return Compiled("\n".join([*lines[:line], text, *lines[line + 1 :]]), self.image, self.symbol)


def compiled(build: Callable, symbol: str = compile.SYMBOL) -> Compiled:
    """Of what `cute.compile` returns; build takes the options that keep the PTX."""
    return Compiled(*_ptx_and_object(build, symbol), symbol)


def _ptx_and_object(build: Callable, symbol: str) -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        function = build(f"--keep-ptx --dump-dir {folder} --ptxas-options -O1")  # nobody runs the machine code
        function.export_to_c(f"{folder}/host.o", symbol)
        (ptx,) = Path(folder).glob("*.ptx")
        return ptx.read_text(), Path(folder, "host.o").read_bytes()


@lru_cache(maxsize=256)
def get(config: KernelConfig) -> Compiled:
    """In place of `compile.get`."""

    def make() -> tuple[str, bytes]:
        with compile.lock:
            return _ptx_and_object(lambda options: compile.compile(config, options), compile.SYMBOL)

    ptx, image = built.get("ptx", config, make)
    return Compiled(ptx.decode(), image)


def counting(counters: dict[int, torch.Tensor]) -> Callable[[int], int]:
    """`Device.counters` of those."""

    def address(each: int) -> int:
        return counters.setdefault(each, torch.zeros(each, dtype=torch.int32)).data_ptr() if each else 0

    return address


@contextlib.contextmanager
def interpreted(
    config: FwdConfig | None = None, kernel: Compiled | None = None, *, num_sms: int = NUM_SMS, seed: int = 0
):
    """Inside, CPU tensors are a GPU's of so many SMs; gives the list of configs that the calls have asked for.

    config: what to run, whatever the plan says; kernel: in place of what it is compiled to. seed: of every chance.
    """
    asked: list[KernelConfig] = []
    counters: dict[int, torch.Tensor] = {}
    gpu = SimpleNamespace(index=0, name="NVIDIA H200", num_sms=num_sms, counters=counting(counters))

    def found(wanted: KernelConfig) -> Compiled:
        asked.append(wanted)
        one = kernel or get(wanted)
        one.seed, one.room = seed, num_sms
        return one

    of = checks.Spec.of.__func__
    with contextlib.ExitStack() as stack:
        for where, name, what in (
            (checks.Spec, "of", classmethod(lambda cls, x: of(cls, x)._replace(device=CUDA))),
            (device, "get", lambda index, *_: gpu),
            (device, "current", lambda: gpu.index),
            (compile, "get", found),
            (call, "known", {}),
            (workspace, "get", lambda index, nbytes: torch.full((nbytes,), POISON, dtype=torch.uint8)),
        ):
            stack.enter_context(mock.patch.object(where, name, what))
        for where, name in ((operands, "plan"), (operands, "plan_varlen"), (plan, "kvcache")) if config else ():
            stack.enter_context(mock.patch.object(where, name, return_value=config))
        yield asked
    assert not any(x.any() for x in counters.values()), "a launch left its counters behind"
