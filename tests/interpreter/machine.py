"""CTAs, clusters and warps, and what runs next.

Warps and the transfers on their way have priorities by chance: the highest goes on, a warp for some while, and may then
get another one (PCT: Burckhardt et al., ASPLOS 2010). So some transfers arrive at once, and others when all warps wait.
"""

import operator
import random
from collections import defaultdict

import numpy as np

from .host import Launch
from .memory import OFFSET, RANK_SHIFT, Fault, Global, Shared
from .slots import LANES, File
from .sync import ClusterBarrier, Mbarrier, Named
from .tensor_core import Wgmmas
from .tma import BulkGroups, Transfer
from .translate import Jump, Kernel, full

TURNS = (1, 3, 20, 1 << 30)  # how many blocks of instructions a warp gets, one of these by chance
CHANGE = 0.2  # how often a warp's priority changes after that
BLOCKS_MAX = 20_000_000  # of a launch: more is a loop without an end
ALL = np.ones(LANES, bool)
ALL.flags.writeable = False
PRIORITY = operator.attrgetter("priority")


class Deadlock(Fault):
    """No warp can go on, and nothing is on its way."""


class Warp:
    """32 lanes. Where they have diverged, those behind go first; they meet where a label is."""

    def __init__(self, cta, index: int):
        self.machine, self.cta, self.index = cta.cluster.machine, cta, index
        self.number = 1 + cta.index * (cta.threads // LANES) + index
        self.file = File(self.machine.kernel.plan, self._special())
        self.rows = self.file.rows
        self.paths: dict[int, np.ndarray | bool] = {0: True}  # instruction -> lanes; True: all
        self.where: np.ndarray | bool = True
        self.waits_for, self.cluster_target, self.why = None, 0, None
        self.waits: list = []  # of each path, since the last time that none could go on
        self.wgmmas, self.bulk_groups = Wgmmas(self), BulkGroups()
        self.copies: list[Transfer] = []  # cp.async's, on their way
        self.priority = self.machine.random.random()

    @property
    def ended(self) -> bool:
        return not self.paths

    def lanes(self) -> np.ndarray:
        return ALL if self.where is True else self.where

    def put(self, row: int, values):
        if self.where is True:
            self.rows[row][...] = values
        else:
            np.copyto(self.rows[row], values, where=self.where, casting="unsafe")

    def clock(self) -> int:
        return self.machine.blocks

    def advance(self) -> bool:
        """One block of instructions; False where no lane can go on."""
        self.waits = []
        for at in sorted(self.paths):
            end = self._run(at)
            if end != at or self.why is None:
                return True
            self.waits.append(self.why)
        return False

    def may_go_on(self) -> bool:
        return any(wait.over() for wait in self.waits)

    def _run(self, at: int) -> int:
        """Of the lanes there, up to a jump, a label, or where they wait; where that is."""
        kernel, self.where, self.why = self.machine.kernel, self.paths.pop(at), None
        end = kernel.ends[at]
        kernel.ran.add(at)
        for n in range(at, end):
            why = kernel.steps[n](self)
            if why:
                self.why = why
                self._join(n, self.where)
                return n
        self._leave(end)
        return end

    def _leave(self, end: int):
        jump = self.machine.kernel.steps[end]
        if not isinstance(jump, Jump):
            self._join(end, self.where)
            return
        if jump.when is None:
            self._join(jump.target, self.where)
        else:
            lanes = self.lanes()
            taken = lanes & jump.when(self)
            for at, some in ((jump.target, taken), (end + 1, lanes ^ taken)):
                if np.count_nonzero(some):
                    self._join(at, some)
        if self.ended:
            self.cta.warp_ends()

    def _join(self, at: int | None, lanes):
        if at is None:
            return
        there = self.paths.get(at)
        if lanes is not True and there is not None:
            lanes = lanes | there
        self.paths[at] = lanes if lanes is True else full(lanes)

    def _special(self) -> dict:
        cta, lane = self.cta, np.arange(LANES)
        launch, size = self.machine.launch, self.machine.launch.cluster
        values = {
            **{"tid.x": 32 * self.index + lane, "ntid.x": launch.block, "laneid": lane, "warpid": self.index},
            **{"ctaid.x": cta.index, "nctaid.x": launch.grid, "cluster_ctarank": cta.rank, "cluster_nctarank": size},
            **{"cluster_ctaid.x": cta.rank, "cluster_nctaid.x": size, "clusterid.x": cta.index // size},
            **{"nclusterid.x": launch.grid // size, "lanemask_lt": (1 << lane) - 1, "smid": cta.index},
        }
        ones = {f"{name}.{axis}": 1 for name in ("ntid", "nctaid", "cluster_nctaid", "nclusterid") for axis in "yz"}
        zeros = {f"{name}.{axis}": 0 for name in ("tid", "ctaid", "cluster_ctaid", "clusterid") for axis in "yz"}
        return values | ones | zeros


class Cta:
    def __init__(self, cluster, rank: int):
        self.cluster, self.rank, self.index = cluster, rank, cluster.index * cluster.machine.launch.cluster + rank
        self.threads = cluster.machine.launch.block
        self.shared = Shared(cluster.machine.launch.smem_bytes)
        self.barriers: dict[int, Mbarrier] = {}
        self.named: dict[int, Named] = defaultdict(Named)
        self.waited = not cluster.machine.kernel.waits_for_stream
        self.warps = [Warp(self, i) for i in range(self.threads // LANES)]

    @property
    def ended(self) -> bool:
        return all(w.ended for w in self.warps)

    def own_offset(self, address: int, why: str) -> int:
        cta, offset = self.peer(address, why)
        if cta is not self:
            raise Fault(f"shared memory: {why} is of this CTA, its address {address:#x} of another")
        return offset

    def peer(self, address: int, why: str) -> tuple["Cta", int]:
        """Whose shared memory an address is in, and where there."""
        rank = address >> RANK_SHIFT
        if rank == 0 or rank == self.rank + 1:
            return self, address & OFFSET
        if rank > len(self.cluster.ctas):
            raise Fault(f"shared memory: {why} has the address {address:#x}, of no CTA of the cluster")
        cta = self.cluster.ctas[rank - 1]
        cta.check_alive(why)
        return cta, address & OFFSET

    def places(self, addresses: np.ndarray, why: str):
        """(CTA, offsets, which addresses) for every CTA whose shared memory is meant."""
        addresses = addresses.astype(np.int64)
        ranks = addresses >> RANK_SHIFT
        for rank in np.unique(ranks):
            here = ranks == rank
            yield self.peer(int(addresses[here][0]), why)[0], addresses[here] & OFFSET, here

    def barrier(self, address: int, why: str) -> Mbarrier:
        cta, offset = self.peer(address, why)
        if offset not in cta.barriers:
            raise Fault(f"mbarrier: {why} at {address:#x}, where none has been initialised")
        return cta.barriers[offset]

    def check_alive(self, why: str):
        if self.ended:
            raise Fault(f"shared memory: {why} reaches CTA {self.index}, which has ended")

    def reads_global(self, addresses: np.ndarray, size: int, why: str):
        """What no launch of the same call has written may be read before the wait: those before it have waited."""
        if self.waited or not self.cluster.machine.prerequisite or self._written(addresses, size, why):
            self.touches_global(why)

    def _written(self, addresses: np.ndarray, size: int, why: str) -> bool:
        return self.cluster.machine.memory.written(addresses, size, why)

    def touches_global(self, why: str):
        if not self.waited:
            raise Fault(f"global memory: {why} before griddepcontrol.wait")

    def warp_ends(self):
        machine = self.cluster.machine
        self.cluster.barrier.settle(self.cluster.warps())
        machine.something_happened()
        if self.ended and (left := [t.name for t in machine.flying if t.cta is self]):
            raise Fault(f"CTA {self.index} ends before {left[0]} is done with its shared memory")


class Cluster:
    def __init__(self, machine, index: int):
        self.machine, self.index, self.barrier = machine, index, ClusterBarrier()
        self.ctas: list[Cta] = []
        for rank in range(machine.launch.cluster):
            self.ctas.append(Cta(self, rank))

    def warps(self) -> list[Warp]:
        return [w for cta in self.ctas for w in cta.warps]


class Machine:
    """One launch. `room`: how many CTAs are there at once. `seed` decides every chance.

    prerequisite, dependents: whether the same call has launched another one before, and launches one behind this.
    """

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        memory: Global,
        room: int = 1 << 30,
        seed: int = 0,
        prerequisite: bool = False,
        dependents: bool = False,
    ):
        self.kernel, self.launch, self.memory = kernel, launch, memory
        self.prerequisite, self.dependents, self.waited = prerequisite, dependents, False
        self.room, self.random, self.blocks = max(room // launch.cluster, 1), random.Random(seed), 0
        self.parameters = self._packed(launch.parameters)
        self.flying: list[Transfer] = []
        self._waiting = [*range(launch.grid // launch.cluster)][::-1]
        self._ready: list[Warp] = []
        self._blocked: list[Warp] = []
        self._news = False

    def run(self):
        with np.errstate(all="ignore"):
            while self._waiting or self._ready or self._blocked or self.flying:
                if self._waiting:
                    self._refill()
                self._one_turn()
        if self.prerequisite and not self.waited:
            raise Fault("griddepcontrol.wait: no thread has waited, so this launch may end before that before it")

    def chance(self) -> bool:
        return self.random.random() < 0.5

    def fly(self, transfer: Transfer):
        transfer.priority = self.random.random()
        self.flying.append(transfer)

    def something_happened(self):
        """Before the next turn, those that wait are looked at."""
        self._news = True

    def _wake(self):
        """Those whose wait is over."""
        self._news = False
        awake = [w for w in self._blocked if w.may_go_on()]
        self._ready += awake
        self._blocked = [w for w in self._blocked if w not in awake] if awake else self._blocked

    def _packed(self, values: tuple[bytes, ...]) -> bytes:
        """As the kernel's parameters lie in memory."""
        places = list(self.kernel.program.parameters.values())
        found = bytearray(places[-1].offset + places[-1].size)
        for place, value in zip(places, values, strict=True):
            found[place.offset : place.offset + place.size] = value
        return bytes(found)

    def _refill(self):
        """Clusters begin as others end."""
        clusters = {w.cta.cluster.index for w in (*self._ready, *self._blocked)}
        while self._waiting and len(clusters) < self.room:
            index = self._waiting.pop()
            clusters.add(index)
            self._ready += Cluster(self, index).warps()

    def _one_turn(self):
        if self._news:
            self._wake()
        first = max((*self._ready, *self.flying), key=PRIORITY, default=None)
        if first is None:
            raise Deadlock("\n".join(["deadlock; these wait:", *map(_where, self._blocked)]))
        if isinstance(first, Transfer):
            self.flying.remove(first)
            first.go()
            self.something_happened()
            return
        self._run(first)
        if self.random.random() < CHANGE:
            first.priority = self.random.random()

    def _run(self, warp: Warp):
        for _ in range(self.random.choice(TURNS)):
            self.blocks += 1
            if self.blocks > BLOCKS_MAX:
                raise Deadlock(f"{BLOCKS_MAX} blocks of instructions, and no end")
            if not warp.advance():
                self._ready.remove(warp)
                self._blocked.append(warp)
                return
            if warp.ended:
                self._ready.remove(warp)
                return


def _where(w: Warp) -> str:
    return f"CTA {w.cta.index}, warp {w.index}, at {sorted(w.paths)}: {w.why.told()}"
