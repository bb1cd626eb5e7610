"""TMA: boxes of a tensor, between global and shared memory, as its descriptor says."""

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .memory import Fault, address
from .parse import Instruction, Vector
from .slots import PARAMETER_BASE, Slots
from .tensor_core import swizzled
from .waits import Wait

ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 10: 2}  # of a descriptor's type
PIECES = {0: 1, 1: 32, 2: 64, 3: 128}  # of a descriptor's swizzle: bytes


class Descriptor(NamedTuple):
    """What the 128 bytes say. The format is undocumented: read off those that the DSL's host code makes.

    Sizes, strides and box are of the dimensions from the contiguous one on.
    """

    address: int
    element: int  # bytes
    piece: int  # bytes that the swizzle keeps within
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, any multiple of 16 modulo 2^64
    box: tuple[int, ...]


@lru_cache(maxsize=256)
def decode(raw: bytes) -> Descriptor:
    w = struct.unpack("<16Q", raw)
    rank, element = (w[1] >> 4 & 7) + 1, ELEMENT_BYTES[w[1] >> 7 & 15]
    low = [w[1] >> 32, w[2] & 0xFFFFFFFF, w[2] >> 32, w[3] & 0xFFFFFFFF]
    strides = [(x | (w[3] >> 32 + 4 * i & 15) << 32) * 16 for i, x in enumerate(low)]
    sizes = [w[4] & 0xFFFFFFFF, w[4] >> 32, w[5] & 0xFFFFFFFF, w[5] >> 32, w[6] & 0xFFFFFFFF]
    box = [w[6] >> 56, *(w[7] >> 8 * i & 0xFF for i in range(4))]
    if w[6] >> 32 & 0xFFFFFF or w[1] & 0xF != 2:
        raise NotImplementedError("a TMA descriptor with element strides")
    found = [tuple(x + 1 for x in y[:rank]) for y in (sizes, box)]
    return Descriptor(w[0], element, PIECES[w[1] >> 13 & 3], found[0], (element, *strides[: rank - 1]), found[1])


class Box(NamedTuple):
    """A box's rows that lie in the tensor, each contiguous."""

    inside: np.ndarray  # of the box's rows, which
    addresses: np.ndarray  # of those
    width: int  # bytes of a row that lie in the tensor
    row_bytes: int  # of a row of the box


@lru_cache(maxsize=64)
def rows(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Of a box's rows, where each is along every dimension but the contiguous one."""
    return [x.ravel(order="F") for x in np.meshgrid(*map(np.arange, sizes), indexing="ij")]


def box(d: Descriptor, start: tuple[int, ...]) -> Box:
    """Where the box at these coordinates lies in global memory."""
    grid = rows(d.box[1:])
    at = [g + c for g, c in zip(grid, start[1:], strict=True)]
    inside = np.ones(len(grid[0]), bool)
    addresses = np.full(len(grid[0]), (d.address + start[0] * d.element) % (1 << 64), np.uint64)
    for x, size, stride in zip(at, d.sizes[1:], d.strides[1:], strict=True):
        inside &= (x >= 0) & (x < size)
        addresses += x.astype(np.uint64) * np.uint64(stride % (1 << 64))
    if start[0] < 0:
        raise NotImplementedError("a TMA box that begins before the tensor's rows")
    width = max(min(d.box[0], d.sizes[0] - start[0]), 0) * d.element
    return Box(inside & (width > 0), addresses[inside & (width > 0)], width, d.box[0] * d.element)


@lru_cache(maxsize=256)
def places(piece: int, at: int, rows: int, row_bytes: int) -> np.ndarray:
    """(rows, row_bytes / 2): where in shared memory the box's halves lie."""
    if at % 128:
        raise Fault(f"TMA: shared address {at:#x} is not aligned to 128 bytes")
    if piece > 1 and row_bytes > piece:
        raise Fault(f"TMA: rows of {row_bytes} bytes are wider than the swizzle's {piece}")
    halves = at + np.arange(rows)[:, None] * row_bytes + np.arange(0, row_bytes, 2)
    return swizzled(halves, max(piece, 16))


def load(machine, d: Descriptor, start: tuple[int, ...], cta, at: int):
    """A box into a CTA's shared memory; zeros for what lies beyond the tensor."""
    b = box(d, start)
    values = np.zeros((len(b.inside), b.row_bytes), np.uint8)
    if len(b.addresses):
        memory, offsets = _place(machine, b, "a TMA load")
        values[b.inside, : b.width] = memory[offsets]
    cta.shared.store(places(d.piece, at, len(b.inside), b.row_bytes), values.view(np.uint16), "a TMA load")


def store(machine, d: Descriptor, start: tuple[int, ...], cta, at: int):
    """The part of a box that lies in the tensor."""
    b = box(d, start)
    values = cta.shared.load(places(d.piece, at, len(b.inside), b.row_bytes), np.dtype("u2"), "a TMA store", proxy=True)
    values = np.ascontiguousarray(values).view(np.uint8)[b.inside, : b.width]
    if len(b.addresses):
        memory, offsets = _place(machine, b, "a TMA store")
        machine.memory.put(memory, offsets, values)


def _place(machine, b: Box, why: str) -> tuple[np.ndarray, np.ndarray]:
    """The memory of the tensor that a box is of, and (rows, bytes): where there."""
    a = machine.memory.find(int(b.addresses.min()), int(b.addresses.max()) + b.width - 1, why)
    return a.bytes, (b.addresses - np.uint64(a.start)).astype(np.int64)[:, None] + np.arange(b.width)


class Transfer:
    """On its way: to one CTA, or from one."""

    def __init__(self, go, cta, name: str):
        self.go, self.cta, self.name, self.priority = go, cta, name, 0.0


def cp(i: Instruction, s: Slots):
    """cp.async.bulk.*: tensor loads and stores, commit_group, wait_group[.read]."""
    if i.words[:3] != ["cp", "async", "bulk"]:
        raise NotImplementedError(i.text)
    if i.words[3] == "commit_group":
        return lambda w: w.bulk_groups.commit(w)
    if i.words[3] == "wait_group":
        return lambda w: w.bulk_groups.wait(w, i.operands[0].bits, i.text)
    if i.words[3] != "tensor":
        raise NotImplementedError(i.text)
    return _store(i, s) if i.words[5] == "global" else _load(i, s)


def _tensor(operand, s: Slots):
    """What gives descriptor and coordinates of a lane."""
    at, coordinates = address(operand, s), [s.of(x, "s32") for x in operand.coordinates]

    def of(w, lane: int):
        offset = int(at(w)[lane]) - PARAMETER_BASE
        if not 0 <= offset < len(w.machine.parameters):
            raise Fault("TMA: the descriptor is no parameter of the launch")
        d = decode(w.machine.parameters[offset : offset + 128])
        if len(coordinates) != len(d.sizes):
            raise Fault(f"TMA: {len(coordinates)} coordinates for a tensor of {len(d.sizes)} dimensions")
        return d, tuple(int(w.rows[x][lane]) for x in coordinates)

    return of


def _load(i: Instruction, s: Slots):
    """Into this CTA; .multicast::cluster: to the same place in each CTA of the mask, and its mbarrier there."""
    to, tensor, barrier, *rest = i.operands
    at, of, bar_at = address(to, s), _tensor(tensor, s), address(barrier, s)
    mask = s.of(rest[0], "u16") if "multicast::cluster" in i.words else None

    def step(w):
        w.cta.touches_global(i.text)
        for lane in np.flatnonzero(w.lanes()):
            d, start = of(w, lane)
            ranks = int(w.rows[mask][lane]) if mask is not None else 1 << w.cta.rank
            for rank, cta in enumerate(w.cta.cluster.ctas):
                if ranks >> rank & 1:
                    to_and_bar = (w.cta.own_offset(int(x(w)[lane]), i.text) for x in (at, bar_at))
                    w.machine.fly(Transfer(_arrival(w.machine, d, start, cta, *to_and_bar), cta, i.text))
            if ranks >> len(w.cta.cluster.ctas):
                raise Fault(f"{i.text}: mask {ranks:#x} names a CTA that is not in the cluster")

    return step


def _arrival(machine, d: Descriptor, start, cta, at: int, bar_at: int):
    def go():
        cta.check_alive("a TMA load")
        load(machine, d, start, cta, at)
        cta.barrier(bar_at, "a TMA load").complete(int(np.prod(d.box)) * d.element)

    return go


def _store(i: Instruction, s: Slots):
    of, at = _tensor(i.operands[0], s), address(i.operands[1], s)

    def step(w):
        w.cta.touches_global(i.text)
        for lane in np.flatnonzero(w.lanes()):
            d, start = of(w, lane)
            place, cta = w.cta.own_offset(int(at(w)[lane]), i.text), w.cta
            transfer = Transfer(lambda a=(d, start, cta, place): store(w.machine, *a), cta, i.text)
            w.machine.fly(transfer)
            w.bulk_groups.open[lane].append(transfer)

    return step


class BulkGroups:
    """A warp's stores: each lane has groups of its own."""

    def __init__(self):
        self.open: list[list] = [[] for _ in range(32)]
        self.groups: list[list[list]] = [[] for _ in range(32)]

    def commit(self, w):
        for lane in np.flatnonzero(w.lanes()):
            self.groups[lane].append(self.open[lane])
            self.open[lane] = []

    def wait(self, w, pending: int, why: str):
        groups = (self.groups[lane] for lane in np.flatnonzero(w.lanes()))
        stores, flying = [t for g in groups for group in g[: len(g) - pending] for t in group], w.machine.flying
        wait = Wait(lambda: all(t not in flying for t in stores), lambda: f"{why} waits for a store")
        return None if wait.over() else wait


def st_async(i: Instruction, s: Slots):
    """st.async.shared::cluster.mbarrier::complete_tx::bytes: into another CTA, whose mbarrier then has the bytes."""
    kind = i.words[-1]
    if "shared::cluster" not in i.words or isinstance(i.operands[1], Vector):
        raise NotImplementedError(i.text)
    at, value, bar_at = address(i.operands[0], s), s.of(i.operands[1], kind), address(i.operands[2], s)

    def step(w):
        for lane in np.flatnonzero(w.lanes()):
            to, bar, values = int(at(w)[lane]), int(bar_at(w)[lane]), w.rows[value][lane : lane + 1].copy()
            w.machine.fly(Transfer(_delivery(w.cta, to, bar, values, i.text), w.cta.peer(to, i.text)[0], i.text))

    return step


def _delivery(cta, to: int, bar: int, values: np.ndarray, why: str):
    def go():
        peer, offset = cta.peer(to, why)
        peer.shared.store(np.array([offset]), values, why)
        cta.barrier(bar, why).complete(values.nbytes)

    return go


OPS = {"cp": cp, "st_async": st_async}
