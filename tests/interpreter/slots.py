"""Where a warp's values live: an operand is the number of a row of 32 lanes, seen as the type that it is used as."""

from typing import NamedTuple

import numpy as np

from .parse import SINK, Immediate, Program, Register, Special, Symbol

LANES = 32
TYPES = {
    **{"pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "u2"},
    **{"bf16": "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4"},
    **{"b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8"},
}
BANKS = {1: "?", 16: "u2", 32: "u4", 64: "u8"}
SHARED_BASE = 1024  # of a CTA's dynamic shared memory: its address 0 is nobody's
PARAMETER_BASE = 1 << 60  # generic addresses from here on are the launch's parameters
CONSTANT, SPECIAL = "constant", "special"


class Row(NamedTuple):
    """A row, or what it is filled with."""

    bank: int | str  # bits; or CONSTANT, SPECIAL
    of: object  # which register; what the constant's bits are; which special register
    dtype: str
    part: int = 0  # of a wider register: which one of the narrower values, from the lowest


class Slots:
    """Gives out rows' numbers, one for each register and type, while a program is translated."""

    def __init__(self, program: Program):
        self.program = program
        self.rows: dict[Row, int] = {}
        self.registers: dict[Register, int] = {}  # which row of their bank
        self.sizes = dict.fromkeys(BANKS, 0)

    def of(self, operand, kind: str, part: int = 0) -> int:
        """An operand's row, read or written as a PTX type."""
        row = self._row(operand, TYPES[kind], part)
        return self.rows.setdefault(row, len(self.rows))

    def whole(self, operand, kind: str) -> str:
        """The type that fills a register which gets a value of a narrower one."""
        bits = self.program.bits(operand) if isinstance(operand, Register) else 0
        narrow = kind[0] in "usb" and kind[1:].isdigit() and int(kind[1:]) < bits
        return f"{'s' if kind[0] == 's' else 'u'}{bits}" if narrow else kind

    def bank_row(self, register: Register) -> int:
        """Where in its bank a register is."""
        bits = self.program.bits(register)
        if register not in self.registers:
            self.registers[register] = self.sizes[bits]
            self.sizes[bits] += 1
        return self.registers[register]

    def _row(self, operand, dtype: str, part: int) -> Row:
        if operand == SINK:
            operand = Register(f"_{dtype}")
            self.program.registers[operand.name] = 1 if dtype == "?" else 8 * max(np.dtype(dtype).itemsize, 2)
        if isinstance(operand, Register):
            return Row(self.program.bits(operand), self.bank_row(operand), dtype, part)
        if isinstance(operand, Special):
            return Row(SPECIAL, operand.name, dtype)
        return Row(CONSTANT, self._constant(operand, np.dtype(dtype)), dtype)

    def _constant(self, operand, dtype: np.dtype) -> int:
        """The bits of an immediate, or of a symbol's address."""
        if isinstance(operand, Symbol):
            if operand.name in self.program.parameters:
                return PARAMETER_BASE + self.program.parameters[operand.name].offset
            assert "shmem" in operand.name, operand
            return SHARED_BASE
        assert isinstance(operand, Immediate), operand
        if dtype.kind == "f" and not operand.floating:
            return int(np.array(operand.bits, dtype).view(f"u{dtype.itemsize}"))
        return operand.bits % (1 << 8 * dtype.itemsize)


class Plan:
    """What the files of a program's warps have alike: constants, and which view of which bank a row is."""

    def __init__(self, slots: Slots):
        self.sizes = dict(slots.sizes)
        self.constants = [_constant_row(row) if row.bank == CONSTANT else None for row in slots.rows]
        self.special = [(n, row.of, np.dtype(row.dtype)) for n, row in enumerate(slots.rows) if row.bank == SPECIAL]
        self.views: dict[tuple, list[tuple[int, int]]] = {}  # (bank, type, part) -> (row, which register)
        for n, row in enumerate(slots.rows):
            if row.bank in BANKS:
                self.views.setdefault((row.bank, np.dtype(row.dtype), row.part), []).append((n, row.of))


def _constant_row(row: Row) -> np.ndarray:
    dtype = np.dtype(row.dtype)
    if dtype.kind == "b":
        found = np.full(LANES, bool(row.of))
    else:
        found = np.full(LANES, row.of, f"u{dtype.itemsize}").view(dtype)
    found.flags.writeable = False
    return found


class File:
    """A warp's registers, poisoned: NaN, or -1. special: a value, or one for each lane, of every special register."""

    def __init__(self, plan: Plan, special: dict):
        self.banks = {bits: np.empty((n, LANES), BANKS[bits]) for bits, n in plan.sizes.items()}
        for bits, bank in self.banks.items():
            bank[...] = True if bits == 1 else np.iinfo(bank.dtype).max
        self.rows = list(plan.constants)
        for n, name, dtype in plan.special:
            self.rows[n] = np.broadcast_to(special[name], LANES).astype(dtype)
        for (bits, dtype, part), places in plan.views.items():
            views = [*self.banks[bits].view(dtype)[:, part :: self.banks[bits].itemsize // dtype.itemsize]]
            for n, register in places:
                self.rows[n] = views[register]
