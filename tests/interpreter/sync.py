"""What warps wait for: mbarriers, the barriers of a CTA and of a cluster."""

from dataclasses import dataclass, field

import numpy as np

from .memory import Fault, address
from .parse import SINK, Instruction, Register
from .slots import Slots
from .waits import Wait, for_lanes


@dataclass
class Mbarrier:
    """A phase ends when all arrivals and all bytes that were announced have come."""

    expected: int
    pending: int = 0
    bytes: int = 0
    phases: int = 0  # that have ended

    def __post_init__(self):
        self.pending = self.expected

    def arrive(self, count: int, why: str):
        if count > self.pending:
            raise Fault(f"mbarrier: {why} arrives where {self.pending} of {self.expected} arrivals are missing")
        self.pending -= count
        self._end()

    def announce(self, size: int):
        self.bytes += size
        self._end()

    def complete(self, size: int):
        self.bytes -= size
        self._end()

    def _end(self):
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.expected
            self.phases += 1

    def has_ended(self, parity: int) -> bool:
        return self.phases % 2 != parity & 1


@dataclass
class Named:
    """A CTA's barrier: the number of threads is what each that comes says."""

    threads: int = 0
    arrived: int = 0
    times: int = 0

    def arrive(self, threads: int, why: str):
        if self.arrived and threads != self.threads:
            raise Fault(f"barrier: {why} is for {threads} threads, those before it for {self.threads}")
        self.threads = threads
        self.arrived += 32
        if self.arrived == threads:
            self.arrived = 0
            self.times += 1


@dataclass
class ClusterBarrier:
    """All warps of a cluster that have not ended."""

    arrived: set = field(default_factory=set)
    times: int = 0

    def settle(self, warps):
        if self.arrived and all(w in self.arrived for w in warps if not w.ended):
            self.arrived.clear()
            self.times += 1


def barriers(w, addresses: np.ndarray, why: str):
    """The mbarriers of a warp's active lanes, one after the other."""
    for lane in np.flatnonzero(w.lanes()):
        yield lane, w.cta.barrier(int(addresses[lane]), why)


def mbarrier(i: Instruction, s: Slots):
    words = i.words
    if words[1] == "init":
        return _init(i, s)
    if words[1] in ("try_wait", "test_wait") and "parity" in words:
        return _wait(i, s, blocks=words[1] == "try_wait")
    if words[1] == "arrive" and ("expect_tx" in words or len(i.operands) < 4) and "noComplete" not in words:
        return _arrive(i, s)
    if words[1] == "expect_tx":
        return _expect(i, s)
    if words[1] == "inval":
        return lambda w: None
    raise NotImplementedError(i.text)


def _init(i: Instruction, s: Slots):
    at, count = address(i.operands[0], s), s.of(i.operands[1], "u32")

    def step(w):
        addresses = at(w)
        for lane in np.flatnonzero(w.lanes()):
            w.cta.barriers[w.cta.own_offset(int(addresses[lane]), i.text)] = Mbarrier(int(w.rows[count][lane]))

    return step


def _arrive(i: Instruction, s: Slots):
    expects = "expect_tx" in i.words
    to, where, *rest = i.operands
    at, count = address(where, s), s.of(rest[0], "u32") if rest else None

    def step(w):
        addresses = at(w)
        for lane, barrier in barriers(w, addresses, i.text):
            n = int(w.rows[count][lane]) if rest else 1
            if expects:
                barrier.announce(n)
            barrier.arrive(1 if expects else n, i.text)
        w.machine.something_happened()

    assert to == SINK or isinstance(to, Register)
    return step


def _expect(i: Instruction, s: Slots):
    at, size = address(i.operands[0], s), s.of(i.operands[1], "u32")

    def step(w):
        for lane, barrier in barriers(w, at(w), i.text):
            barrier.announce(int(w.rows[size][lane]))

    return step


def _wait(i: Instruction, s: Slots, blocks: bool):
    """try_wait comes back when the phase has ended: hardware may, and the kernels then only ask again."""
    p, at, parity = s.of(i.operands[0], "pred"), address(i.operands[1], s), s.of(i.operands[2], "u32")

    def step(w):
        lanes, ended = w.lanes(), np.zeros(32, bool)
        asked = [*zip(at(w)[lanes].tolist(), w.rows[parity][lanes].tolist(), strict=True)]
        found = {one: (w.cta.barrier(one[0], i.text), one[1]) for one in set(asked)}
        ended[lanes] = [found[one][0].has_ended(one[1]) for one in asked]
        if blocks and not ended[lanes].all():
            each = found.values()
            return Wait(
                lambda: all(barrier.has_ended(odd) for barrier, odd in each), lambda: _told(i.text, asked[0], found)
            )
        w.put(p, ended)
        return None

    return step


def _told(why: str, one: tuple[int, int], found: dict) -> str:
    (address, parity), (b, _) = one, found[one]
    missing = f"{b.pending} of {b.expected} arrivals and {b.bytes} bytes missing"
    return f"{why} waits: mbarrier {address:#x}, parity {parity}; {b.phases} phases ended, {missing}"


def bar(i: Instruction, s: Slots):
    mode = next(word for word in i.words if word in ("sync", "arrive", "warp"))
    if mode == "warp":
        return lambda w: None if w.where is True else for_lanes("bar.warp.sync")
    number = s.of(i.operands[0], "u32")
    count = s.of(i.operands[1], "u32") if len(i.operands) > 1 else None

    def step(w):
        if w.where is not True:
            return for_lanes(i.text)
        barrier = w.cta.named[int(w.rows[number][0])]
        threads = int(w.rows[count][0]) if count is not None else w.cta.threads
        if mode == "arrive" or w.waits_for is None:
            w.waits_for = None if mode == "arrive" else barrier.times + 1
            barrier.arrive(threads, i.text)
            w.machine.something_happened()
        if mode == "sync" and barrier.times < w.waits_for:
            target, told = w.waits_for, f"{i.text} waits: barrier {int(w.rows[number][0])}"
            return Wait(
                lambda: barrier.times >= target, lambda: f"{told}, {barrier.arrived} of {threads} threads there"
            )
        w.waits_for = None
        return None

    return step


def barrier(i: Instruction, s: Slots):
    if i.words[1] != "cluster":
        return bar(i, s)
    if i.words[2] == "arrive":
        return _cluster_arrive
    return _cluster_wait


def _cluster_arrive(w):
    if w.where is not True:
        return for_lanes("barrier.cluster.arrive")
    cluster = w.cta.cluster
    if w in cluster.barrier.arrived:
        raise Fault("barrier.cluster.arrive: twice without a wait between")
    w.cluster_target = cluster.barrier.times + 1
    cluster.barrier.arrived.add(w)
    cluster.barrier.settle(cluster.warps())
    w.machine.something_happened()
    return None


def _cluster_wait(w):
    if w.where is not True:
        return for_lanes("barrier.cluster.wait")
    there, target = w.cta.cluster.barrier, w.cluster_target
    if there.times >= target:
        return None
    return Wait(lambda: there.times >= target, lambda: f"barrier.cluster.wait: {len(there.arrived)} warps are there")


def griddepcontrol(i: Instruction, s: Slots):
    """Launches follow each other here; but nothing of global memory may be touched before this wait.

    Of a call's launches the later ones may read what the earlier ones have not written, since these have waited before
    they let them begin.
    """

    def step(w):
        if i.words[1] == "wait":
            w.cta.waited = w.machine.waited = True
        elif w.machine.dependents and not w.cta.waited:
            raise Fault("griddepcontrol.launch_dependents before griddepcontrol.wait")

    return step


def setmaxnreg(i: Instruction, s: Slots):
    count = i.operands[0].bits
    if not (24 <= count <= 256 and count % 8 == 0):
        raise Fault(f"{i.text}: a multiple of 8 from 24 to 256 is needed")
    return lambda w: None if w.where is True else for_lanes(i.text)


def fence(i: Instruction, s: Slots):
    """Warps see each other's stores at once here; what counts is the fence between stores and the async proxy."""
    if not i.opcode.startswith("fence.proxy.async"):
        return lambda w: None

    def step(w):
        for cta in w.cta.cluster.ctas:
            cta.shared.fence(w.number)

    return step


def _nothing(i: Instruction, s: Slots):
    return lambda w: None


OPS = {
    "mbarrier": mbarrier,
    "bar": bar,
    "barrier": barrier,
    "griddepcontrol": griddepcontrol,
    "setmaxnreg": setmaxnreg,
    "fence": fence,
    "membar": _nothing,
    "prefetch": _nothing,
    "nanosleep": _nothing,
}
