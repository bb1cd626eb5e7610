"""Global memory, of which a launch may touch the tensors that it got and nothing else; and a CTA's shared memory."""

import bisect
import ctypes
import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .parse import Address, Instruction, Symbol, Vector
from .slots import PARAMETER_BASE, SHARED_BASE, TYPES, Slots

POISON = 0xFF  # bytes: NaN in any float type, -1 in any integer
RANK_SHIFT = 24  # of a shared address: 1 + which CTA of the cluster, 0: the own one
COPIED = 1 << 30  # in place of a warp's number: by cp.async, and for whoever fences it then
MANY = 100_000  # objects: a search of so many takes as long as a small launch
_frozen: list[weakref.ref] = []
OFFSET = (1 << RANK_SHIFT) - 1


class Fault(AssertionError):
    """What a GPU would report, or do wrong without a word."""


class Allocation(NamedTuple):
    start: int
    end: int
    bytes: np.ndarray


class Global:
    """The storages of live CPU tensors that contain an address which the launch got. track: what has been written."""

    def __init__(self, addresses: Iterable[int], track: bool = False):
        wanted = sorted(a for a in addresses if a)
        found = {}
        for start, size in map(_storage, _tensors()):
            at = bisect.bisect_left(wanted, start)
            if at < len(wanted) and wanted[at] < start + size:
                found[start] = max(size, found.get(start, 0))
        self.allocations = [_allocation(start, found[start]) for start in sorted(found)]
        self._starts = [a.start for a in self.allocations]
        self._written = {id(a.bytes): np.zeros(len(a.bytes), bool) for a in self.allocations} if track else None

    def find(self, first: int, last: int, why: str) -> Allocation:
        """The one that bytes from first to last lie in."""
        i = bisect.bisect_right(self._starts, first) - 1
        if i < 0 or last >= self.allocations[i].end:
            raise Fault(f"global memory: {why} touches {first:#x} to {last:#x}, in no tensor of the launch")
        return self.allocations[i]

    def bytes_at(self, addresses: np.ndarray, size: int, why: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(memory, offsets of its items, which addresses) for every allocation touched; items of `size` bytes."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"global memory: {why} at {addresses[0]:#x} is not aligned to {size} bytes")
        left, parts = np.ones(len(addresses), bool), []
        while left.any():
            first = int(addresses[left].min())
            a = self.find(first, first + size - 1, why)
            here = left & (addresses < np.uint64(a.end))
            self.find(first, int(addresses[here].max()) + size - 1, why)
            parts.append((a.bytes, (addresses[here] - np.uint64(a.start)).astype(np.int64), here))
            left &= ~here
        return parts

    def load(self, addresses: np.ndarray, dtype: np.dtype, why: str) -> np.ndarray:
        found, span = np.empty((len(addresses), dtype.itemsize), np.uint8), np.arange(dtype.itemsize)
        for memory, offsets, here in self.bytes_at(addresses, dtype.itemsize, why):
            found[here] = memory[offsets[:, None] + span]
        return found.view(dtype)[:, 0]

    def store(self, addresses: np.ndarray, values: np.ndarray, why: str):
        raw, span = values.view(np.uint8).reshape(len(values), -1), np.arange(values.itemsize)
        for memory, offsets, here in self.bytes_at(addresses, values.itemsize, why):
            self.put(memory, offsets[:, None] + span, raw[here])

    def put(self, memory: np.ndarray, places: np.ndarray, values: np.ndarray):
        """Into an allocation's."""
        memory[places] = values
        if self._written is not None:
            self._written[id(memory)][places] = True

    def written(self, addresses: np.ndarray, size: int, why: str) -> bool:
        """Whether some of these items have been, by this launch or one before it of the same call."""
        parts, span = self.bytes_at(addresses, size, why), np.arange(size)
        return any(self._written[id(memory)][offsets[:, None] + span].any() for memory, offsets, _ in parts)


def freeze():
    """No later search looks at what there is now, nor does Python's own for garbage; its tensors stay known."""
    gc.collect()
    _frozen[:] = map(weakref.ref, _known())
    gc.freeze()


def _tensors() -> Iterator[torch.Tensor]:
    if len(gc.get_objects()) > MANY:
        freeze()
    return _known()


def _known() -> Iterator[torch.Tensor]:
    yield from (x for known in _frozen if (x := known()) is not None)
    yield from _searched()


def _searched() -> Iterator[torch.Tensor]:
    """isinstance would ask each object for its __class__, at ten times the time."""
    types = set(_subclasses(torch.Tensor))
    return (x for x in gc.get_objects() if type(x) in types)


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from _subclasses(below)


def _storage(x: torch.Tensor) -> tuple[int, int]:
    """Address and bytes; no bytes where it has none in this machine's memory."""
    try:
        return (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) if x.device.type == "cpu" else (0, 0)
    except (RuntimeError, NotImplementedError):  # sparse ones, and those that torch traces with
        return 0, 0


def _allocation(start: int, size: int) -> Allocation:
    return Allocation(start, start + size, np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8))


class Shared:
    """A CTA's, poisoned. What a warp stores is for TMA and WGMMA, the async proxy, after its fence.proxy.async only."""

    def __init__(self, size: int):
        self.bytes = np.full(SHARED_BASE + -(-size // 16) * 16, POISON, np.uint8)
        self._storing: set[int] = set()  # the warps that have stored since their last fence
        self._unfenced = np.zeros(len(self.bytes) // 16, np.int32)  # of 16 bytes: the warp that stored there; 0: none
        self._views = {dtype: self.bytes.view(dtype) for dtype in ("u1", "u2", "u4", "u8")}

    def load(self, offsets: np.ndarray, dtype: np.dtype, why: str, proxy: bool = False) -> np.ndarray:
        items = self._items(offsets, dtype.itemsize, why)
        if proxy and self._storing and (found := self._unfenced[offsets // 16]).any():
            raise Fault(f"shared memory: {why} reads what warp {found.max() - 1} has stored, without fence.proxy.async")
        return self._views[f"u{dtype.itemsize}"][items].view(dtype)

    def store(self, offsets: np.ndarray, values: np.ndarray, why: str, warp: int = 0):
        """warp: 1 + the number of the one that stores; 0: the async proxy."""
        view = self._views[f"u{values.itemsize}"]
        view[self._items(offsets, values.itemsize, why)] = values.view(view.dtype)
        self._unfenced[offsets // 16] = warp
        if warp:
            self._storing.add(warp)

    def fence(self, warp: int):
        for whose in (warp, COPIED):
            if whose in self._storing:
                self._storing.remove(whose)
                self._unfenced[self._unfenced == whose] = 0

    def _items(self, offsets: np.ndarray, size: int, why: str) -> np.ndarray:
        if np.count_nonzero(offsets & (size - 1)):
            raise Fault(f"shared memory: {why} at {offsets[0]:#x} is not aligned to {size} bytes")
        if offsets.min() < SHARED_BASE or offsets.max() + size > len(self.bytes):
            raise Fault(f"shared memory: {why} touches {offsets.min():#x} to {offsets.max():#x}, beyond its end")
        return offsets // size


def address(operand: Address, s: Slots):
    """What gives a warp's lanes of an address, of 32 or 64 bits as its register has."""
    base = operand.base
    if isinstance(base, Symbol):
        row, bits = s.of(base, "u64"), 64
    else:
        bits = s.program.bits(base)
        row = s.of(base, f"u{bits}")
    offset = np.uint64(operand.offset % (1 << 64)) if bits == 64 else np.uint32(operand.offset % (1 << 32))
    return lambda w: w.rows[row] + offset


def _values(operand) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _space(i: Instruction) -> str:
    """global, shared, param, local; "" for a generic address."""
    spaces = [word.split("::")[0] for word in i.words if word.split("::")[0] in ("global", "shared", "param", "local")]
    return spaces[0] if spaces else ""


def ld(i: Instruction, s: Slots):
    kind, at = i.words[-1], address(i.operands[1], s)
    dtype = np.dtype(TYPES[kind])
    rows = [s.of(x, s.whole(x, kind)) for x in _values(i.operands[0])]
    load, size = {"param": _load_parameter, "shared": _load_shared, "global": _load_global}[_space(i)], dtype.itemsize

    def step(w):
        lanes, addresses = w.lanes(), at(w)
        for n, row in enumerate(rows):
            w.rows[row][lanes] = load(w, addresses[lanes] + addresses.dtype.type(size * n), dtype, i.text)

    return step


def st(i: Instruction, s: Slots):
    kind, at = i.words[-1], address(i.operands[0], s)
    dtype = np.dtype(TYPES[kind])
    rows = [s.of(x, kind) for x in _values(i.operands[1])]
    store = {"shared": _store_shared, "global": _store_global}[_space(i)]

    def step(w):
        lanes, addresses = w.lanes(), at(w)
        for n, row in enumerate(rows):
            values = np.ascontiguousarray(w.rows[row][lanes])
            store(w, addresses[lanes] + addresses.dtype.type(dtype.itemsize * n), values, i.text)

    return step


def _load_parameter(w, addresses, dtype, why):
    at = int(addresses[0]) - PARAMETER_BASE
    return np.frombuffer(w.machine.parameters[at : at + dtype.itemsize], dtype)


def _load_global(w, addresses, dtype, why):
    w.cta.reads_global(addresses, dtype.itemsize, why)
    return w.machine.memory.load(addresses, dtype, why)


def _store_global(w, addresses, values, why):
    w.cta.touches_global(why)
    w.machine.memory.store(addresses, values, why)


def _load_shared(w, addresses, dtype, why):
    found = np.empty(len(addresses), dtype)
    for cta, offsets, here in w.cta.places(addresses, why):
        found[here] = cta.shared.load(offsets, dtype, why)
    return found


def _store_shared(w, addresses, values, why):
    for cta, offsets, here in w.cta.places(addresses, why):
        cta.shared.store(offsets, values[here], why, w.number)


def atom(i: Instruction, s: Slots):
    """Lane after lane: an unsigned counter in global memory."""
    words, kind = i.words, i.words[-1]
    d, at = s.of(i.operands[0], kind), address(i.operands[1], s)
    operands = [s.of(x, kind) for x in i.operands[2:]]
    combine = {
        "add": lambda old, x: old + x,
        "inc": lambda old, x: 0 if old >= x else old + 1,
        "dec": lambda old, x: x if old == 0 or old > x else old - 1,
        "exch": lambda old, x: x,
        "min": min,
        "max": max,
        "and": lambda old, x: old & x,
        "or": lambda old, x: old | x,
        "cas": lambda old, x, y: y if old == x else old,
    }[words[-2]]
    if _space(i) != "global":
        raise NotImplementedError(i.text)

    def step(w):
        addresses, dtype = at(w), np.dtype(TYPES[kind])
        for lane in np.flatnonzero(w.lanes()):
            here = addresses[lane : lane + 1]
            old = _load_global(w, here, dtype, i.text)
            new = combine(int(old[0]), *(int(w.rows[x][lane]) for x in operands))
            _store_global(w, here, np.array([new % (1 << 8 * dtype.itemsize)]).astype(dtype), i.text)
            w.rows[d][lane] = old[0]

    return step


def cvta(i: Instruction, s: Slots):
    """Generic addresses are those of their space here: no two spaces share one."""
    d, a = s.of(i.operands[0], i.words[-1]), s.of(i.operands[1], i.words[-1])
    return lambda w: w.put(d, w.rows[a])


def mapa(i: Instruction, s: Slots):
    """An address of this CTA's shared memory, in that of another CTA of its cluster."""
    kind = i.words[-1]
    d, a, rank = s.of(i.operands[0], kind), s.of(i.operands[1], kind), s.of(i.operands[2], "u32")
    return lambda w: w.put(d, (w.rows[a] & OFFSET) | ((w.rows[rank] + 1) << RANK_SHIFT))


OPS = {"ld": ld, "st": st, "atom": atom, "cvta": cvta, "mapa": mapa}
