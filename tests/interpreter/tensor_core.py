"""WGMMA, mma.sync, ldmatrix and stmatrix. Each warp computes its own 16 rows of a WGMMA's 64.

A WGMMA's accumulators are poisoned until the wait for its group. It reads shared memory somewhere between its issue and
that wait, at either end by chance: what is written or freed too early shows as a wrong result.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .alu import FROM_HALF
from .memory import Fault, address
from .parse import Instruction, Vector
from .slots import LANES, Slots
from .waits import for_lanes

ROW_BYTES = {1: 128, 2: 64, 3: 32, 0: 16}  # of a swizzle mode: what lies in one piece along the contiguous mode
LANE = np.arange(LANES)


class Layout(NamedTuple):
    """Of an operand in shared memory, by its descriptor and the instruction."""

    rows: int  # m or n
    transposed: bool  # the contiguous mode is m or n, not k
    leading: int  # bytes
    stride: int  # bytes
    swizzle: int


@lru_cache(maxsize=256)
def offsets(layout: Layout) -> np.ndarray:
    """(rows, 16): bytes from the descriptor's address, before the swizzle (PTX ISA, canonical layouts)."""
    row, k = np.arange(layout.rows)[:, None], np.arange(16)[None, :]
    piece = ROW_BYTES[layout.swizzle]
    if not layout.transposed:
        far = k // 8 * (layout.leading if piece == 16 else 16)
        return row // 8 * layout.stride + row % 8 * piece + far + k % 8 * 2
    across = piece // 2
    leading, stride = (layout.stride, layout.leading) if piece == 16 else (layout.leading, layout.stride)
    return row // across * leading + row % across * 2 + k // 8 * stride + k % 8 * piece


def swizzled(at: np.ndarray, piece: int) -> np.ndarray:
    """Bits 4 and up, as many as a piece has 16 bytes, by those from 7 on."""
    return at ^ (at >> 3 & (piece - 1) & ~15)


def read(w, descriptor: int, rows: int, transposed: bool, kind: str, part=slice(None)) -> np.ndarray:
    """(rows, 16) float32 of the operand that a matrix descriptor says; of these rows, a part."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a matrix descriptor with a base offset")
    at = places(start, Layout(rows, transposed, leading, stride, descriptor >> 62 & 3))[part]
    return FROM_HALF[kind](w.cta.shared.load(at, np.dtype("u2"), f"wgmma of descriptor {descriptor:#x}", proxy=True))


@lru_cache(maxsize=1024)
def places(start: int, layout: Layout) -> np.ndarray:
    """(rows, 16): where in shared memory the elements lie."""
    return swizzled(start + offsets(layout), ROW_BYTES[layout.swizzle])


@lru_cache
def accumulator_places(n: int) -> np.ndarray:
    """(n / 2, 32): where in (16, n) a register of a lane is."""
    i = np.arange(n // 2)[:, None]
    return (LANE // 4 + i // 2 % 2 * 8) * n + i // 4 * 8 + LANE % 4 * 2 + i % 2


def fragment(words: np.ndarray, kind: str) -> np.ndarray:
    """(registers, 32) of pairs -> (16, 16) or, of two registers for B, (16, 8) of float32, k second or first."""
    found = np.empty((16, 4 * len(words)), np.uint16)
    found.ravel()[fragment_places(len(words))] = words.view(np.uint16).reshape(len(words), LANES, 2)
    return FROM_HALF[kind](found)


@lru_cache
def fragment_places(count: int) -> np.ndarray:
    """(registers, 32, 2): where in (16, 16) or (16, 8) the halves of a lane's registers are."""
    j, lane, h = np.ogrid[:count, :LANES, :2]
    if count == 4:
        return (lane // 4 + j % 2 * 8) * 16 + lane % 4 * 2 + h + j // 2 * 8
    return (lane % 4 * 2 + h + j * 8) * 8 + lane // 4


class Accumulator:
    """In flight: a warp's (16, n), and the registers that it comes back to."""

    def __init__(self, bank: np.ndarray, rows: np.ndarray):
        self.places = accumulator_places(2 * len(rows))
        self.bank, self.rows, self.group = bank, rows, 0
        self.values = np.empty((16, 2 * len(rows)), np.float32)
        self.values.ravel()[self.places] = bank[rows].view(np.float32)
        bank[rows] = 0xFFFFFFFF

    def come_back(self):
        self.bank[self.rows] = self.values.ravel()[self.places].view(np.uint32)


class Wgmmas:
    """A warp's, in flight."""

    def __init__(self, w):
        self.w, self.group, self.committed = w, 0, 0
        self.flying: dict[bytes, Accumulator] = {}
        self.waiting: list[tuple[int, object]] = []  # (group, what to do)
        self.late = False

    def accumulator(self, bank: np.ndarray, rows: np.ndarray) -> Accumulator:
        if not any(group == self.group for group, _ in self.waiting):
            self.late = self.w.machine.chance()
        found = self.flying.get(rows.tobytes()) or Accumulator(bank, rows)
        self.flying[rows.tobytes()] = found
        found.group = self.group
        return found

    def issue(self, multiply):
        self.waiting.append((self.group, multiply))
        if not self.late:
            self._do(self.group)

    def commit(self):
        self.group += 1

    def wait(self, pending: int):
        """For all but the last groups."""
        last = self.group - pending - 1
        self._do(last)
        for key, a in list(self.flying.items()):
            if a.group <= last:
                self.flying.pop(key).come_back()

    def _do(self, last: int):
        ready = [x for x in self.waiting if x[0] <= last]
        self.waiting = [x for x in self.waiting if x[0] > last]
        for _, multiply in ready:
            multiply()


def wgmma(i: Instruction, s: Slots):
    if i.words[1] == "fence":
        return _aligned(lambda w: None, i)
    if i.words[1] == "commit_group":
        return _aligned(lambda w: w.wgmmas.commit(), i)
    if i.words[1] == "wait_group":
        return _aligned(lambda w: w.wgmmas.wait(i.operands[0].bits), i)
    return _aligned(_multiply(i, s), i)


def _aligned(step, i: Instruction):
    return lambda w: step(w) if w.where is True else for_lanes(i.text[:60])


def _multiply(i: Instruction, s: Slots):
    """d (+)= a b: wgmma.mma_async.sync.aligned.mMnNkK.f32.KIND.KIND."""
    shape, result, kind = i.words[4:7]
    n = int(shape.split("n")[1].split("k")[0])
    to, a, b, add, sign_a, sign_b, *transposed = i.operands
    if not shape.endswith("k16") or result != "f32" or (sign_a.bits, sign_b.bits) != (1, 1):
        raise NotImplementedError(i.text)
    rows = np.array([s.bank_row(x) for x in to.items])
    add, b = s.of(add, "pred"), s.of(b, "b64")
    source = _registers(a, s, kind) if isinstance(a, Vector) else _matrix(a, s, kind, bool(transposed[0].bits))
    across = bool(transposed[-1].bits)

    def step(w):
        accumulator = w.wgmmas.accumulator(w.file.banks[32], rows)
        adds, descriptor, left = bool(w.rows[add][0]), _uniform(w.rows[b], i.text), source(w)

        def multiply():
            product = left() @ read(w, descriptor, n, across, kind).T
            accumulator.values[...] = accumulator.values + product if adds else product

        w.wgmmas.issue(multiply)

    return step


def _registers(a: Vector, s: Slots, kind: str):
    rows = np.array([s.bank_row(x) for x in a.items])

    def source(w):
        words = w.file.banks[32][rows]
        return lambda: fragment(words, kind)

    return source


def _matrix(a, s: Slots, kind: str, transposed: bool):
    """This warp's 16 rows of the 64."""
    row = s.of(a, "b64")

    def source(w):
        descriptor, first = _uniform(w.rows[row], "wgmma"), 16 * (w.index % 4)
        return lambda: read(w, descriptor, 64, transposed, kind, slice(first, first + 16))

    return source


def _uniform(values: np.ndarray, why: str) -> int:
    if (values != values[0]).any():
        raise Fault(f"{why}: lanes differ where a warp needs one value")
    return int(values[0])


def mma(i: Instruction, s: Slots):
    """mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32."""
    if i.words[3:7] != ["m16n8k16", "row", "col", "f32"]:
        raise NotImplementedError(i.text)
    d, a, b, c = (np.array([s.of(x, kind) for x in o.items]) for o, kind in zip(i.operands, _MMA_KINDS, strict=True))
    kind, places = i.words[7], accumulator_places(8)

    def step(w):
        product = fragment(_stack(w, a), kind) @ fragment(_stack(w, b), kind)
        found = product.ravel()[places] + np.stack([w.rows[x] for x in c])
        for row, values in zip(d, found, strict=True):
            w.rows[row][...] = values

    return _aligned(step, i)


_MMA_KINDS = ("f32", "b32", "b32", "f32")


def _stack(w, rows) -> np.ndarray:
    return np.stack([w.rows[x] for x in rows])


def ldmatrix(i: Instruction, s: Slots):
    """8x8 matrices of 16 bits; eight lanes have the addresses of one's rows."""
    rows, at = [s.of(x, "b32") for x in i.operands[0].items], address(i.operands[1], s)
    transposed = "trans" in i.words

    def step(w):
        addresses = at(w).astype(np.int64)
        for n, row in enumerate(rows):
            matrix = w.cta.shared.load(_matrix_places(addresses, n), np.dtype("u2"), i.text)
            matrix = matrix.T if transposed else matrix
            w.rows[row][...] = np.ascontiguousarray(matrix).view(np.uint32).ravel()

    return _aligned(step, i)


def stmatrix(i: Instruction, s: Slots):
    at, rows = address(i.operands[0], s), [s.of(x, "b32") for x in i.operands[1].items]
    transposed = "trans" in i.words

    def step(w):
        addresses = at(w).astype(np.int64)
        for n, row in enumerate(rows):
            matrix = w.rows[row].view(np.uint16).reshape(8, 8)
            matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
            w.cta.shared.store(_matrix_places(addresses, n), matrix, i.text, w.number)

    return _aligned(step, i)


def _matrix_places(addresses: np.ndarray, n: int) -> np.ndarray:
    first = addresses[8 * n : 8 * n + 8]
    if (first % 16).any():
        raise Fault(f"a matrix's row at {first[0]:#x} is not aligned to 16 bytes")
    return first[:, None] + 2 * np.arange(8)


OPS = {"wgmma": wgmma, "mma": mma, "ldmatrix": ldmatrix, "stmatrix": stmatrix}
