"""A call that is checked, planned and compiled: what is the same for every call of its kind, and how it is launched."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from . import device, workspace
from .problem import Problem


class Call(NamedTuple):
    """What the shapes, strides, types and devices of a call's arguments say, whatever their addresses and values."""

    problem: Problem
    scale: float  # the default
    gpu: Any  # device.Device, or None: the CPU
    kernel: Any  # a Callable; None: the CPU, or nothing to compute
    counters: int  # that the kernel's CTAs count by
    plain: bool  # TMA takes q, k, v and o as they are
    nbytes: tuple[int, ...]  # that q, k, v and o reach over
    like: tuple[tuple[int, ...], tuple[int, ...]] | None  # o's shape and strides; None: torch.empty_like's of q
    workspace: int = 0  # bytes that a launch has to itself, whose address is the kernel's last argument

    def output(self, q):
        """o, empty."""
        return torch.empty_like(q) if self.like is None else q.new_empty_strided(*self.like)

    def launch(self, tensors, lse, scale: float, arguments: tuple) -> None:
        """q, k, v and o as TMA takes them, and the kernel's arguments behind the stream."""
        gpu: device.Device = self.gpu
        kernel = device.launcher(gpu, self.kernel)
        address = 0 if lse is None else lse.data_ptr()
        counters = gpu.counters(self.counters)
        if not self.workspace:
            kernel(*tensors, address, counters, scale, gpu.num_sms, *arguments)
            return
        memory = workspace.get(gpu.index, self.workspace)  # until the launch: the stream keeps the order after it
        kernel(*tensors, address, counters, scale, gpu.num_sms, *arguments, memory.data_ptr())


known: dict[Hashable, Any] = {}  # Calls, and what `merge` and `append` prepare
UNKEYED = AttributeError, IndexError, RuntimeError, TypeError, ValueError  # of a key: no tensors, or tracers'
KNOWN_MAX = 4096  # looked up; with one more all are forgotten


def looked_up(key: Callable[[], Hashable], made: Callable[[], Any]) -> Any:
    """What was prepared for the like before, or is now; kept if it has a kernel."""
    try:
        whole = key()
        found = known.get(whole)
    except UNKEYED:
        return made()
    if found is None:
        found = made()
        if found.kernel is not None:
            keep(whole, found)
    return found


def keep(key: Hashable, call: Any) -> None:
    if len(known) >= KNOWN_MAX:
        known.clear()
    known[key] = call
