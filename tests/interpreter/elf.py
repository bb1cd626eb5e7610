"""Loads a relocatable x86-64 object into this process, its undefined symbols bound to Python functions.

The DSL's host code comes as one. Its calls of the CUDA runtime are meant to end here, so no linker's search may decide.
"""

import ctypes
import mmap
import struct
from typing import NamedTuple

X86_64 = 62  # EM_X86_64
ANY_ACCESS = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
LOADED, NO_BITS = 2, 8  # SHF_ALLOC, SHT_NOBITS
SYMBOLS, RELOCATIONS = 2, 4  # SHT_SYMTAB, SHT_RELA
ABSOLUTE, PC_32, PLT_32, PC_64, GOT_OFFSET, GOT_PC, GOT_ENTRY = 1, 2, 4, 24, 25, 29, 27  # R_X86_64_*


class Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class Object:
    """`functions`: what undefined symbols are, as ctypes callbacks; they live as long as this."""

    def __init__(self, image: bytes, functions: dict):
        self._image, self._functions = image, functions
        if struct.unpack_from("<18xH", image) != (X86_64,):
            raise NotImplementedError("host code for another machine than x86-64")
        self._sections = self._read_sections()
        self._places, size = self._layout()
        self._symbols = self._read_symbols()
        self._memory = mmap.mmap(-1, size + 8 * len(self._symbols), prot=ANY_ACCESS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._got = size
        self._fill()
        for section in self._sections:
            if section.kind == RELOCATIONS and section.info in self._places:
                self._relocate(section)

    def address(self, name: str) -> int:
        """Of a symbol that the object defines."""
        return next(self._value(i) for i, (x, _, section) in enumerate(self._symbols) if x == name and section)

    def _read_sections(self) -> list[Section]:
        start, size, count = struct.unpack_from("<40xQ10xHH", self._image)
        return [Section(*struct.unpack_from("<IIQQQQIIQQ", self._image, start + size * i)) for i in range(count)]

    def _layout(self) -> tuple[dict[int, int], int]:
        """Where each section that is loaded comes to lie, and the size of all, a multiple of 64."""
        places, at = {}, 0
        for i, section in enumerate(self._sections):
            if section.flags & LOADED:
                at = -(-at // max(section.align, 1)) * max(section.align, 1)
                places[i], at = at, at + section.size
        return places, -(-at // 64) * 64

    def _read_symbols(self) -> list[tuple[str, int, int]]:
        """(name, value, section); section 0: undefined."""
        table = next(s for s in self._sections if s.kind == SYMBOLS)
        names = self._sections[table.link].offset
        found = []
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self._image, at)
            end = self._image.index(b"\0", names + name)
            found.append((self._image[names + name : end].decode(), value, section))
        return found

    def _value(self, i: int) -> int:
        name, value, section = self._symbols[i]
        if section:
            return self._base + self._places[section] + value
        return self._base + self._got if name == "_GLOBAL_OFFSET_TABLE_" else self._extern(name)

    def _extern(self, name: str) -> int:
        if name not in self._functions:
            raise NotImplementedError(f"the host code calls {name}, which has no stand-in")
        return ctypes.cast(self._functions[name], ctypes.c_void_p).value or 0

    def _fill(self):
        for i, at in self._places.items():
            section = self._sections[i]
            if section.kind != NO_BITS:
                self._memory[at : at + section.size] = self._image[section.offset : section.offset + section.size]
        for i, (name, _, section) in enumerate(self._symbols):
            if section in self._places or (name and not section and name in self._functions):
                struct.pack_into("<Q", self._memory, self._got + 8 * i, self._value(i))

    def _relocate(self, section: Section):
        for at in range(section.offset, section.offset + section.size, 24):
            offset, info, addend = struct.unpack_from("<QQq", self._image, at)
            symbol, kind = info >> 32, info & 0xFFFFFFFF
            place = self._places[section.info] + offset
            got = self._base + self._got
            if kind == GOT_ENTRY:
                self._value(symbol)  # raises where it has no stand-in
                value = 8 * symbol + addend
            elif kind == GOT_PC:
                value = got - self._base - place + addend
            else:
                value = self._value(symbol) + addend
                value -= {ABSOLUTE: 0, GOT_OFFSET: got}.get(kind, self._base + place)
            if kind in (PC_32, PLT_32):
                struct.pack_into("<i", self._memory, place, value)
            elif kind in (ABSOLUTE, PC_64, GOT_OFFSET, GOT_PC, GOT_ENTRY):
                struct.pack_into("<Q", self._memory, place, value % (1 << 64))
            else:
                raise NotImplementedError(f"relocation of kind {kind}")
