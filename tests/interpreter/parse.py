"""PTX text -> Program: its instructions in order, labels as indices into them, registers by their width."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    name: str  # tid.x


class Immediate(NamedTuple):
    bits: int
    floating: int = 0  # how many bits of a float these are; 0: a whole number


class Symbol(NamedTuple):
    name: str


class Not(NamedTuple):
    of: Register


class Vector(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    first: object
    second: object


class Address(NamedTuple):
    base: object
    offset: int
    coordinates: tuple = ()


SINK = Symbol("_")


class Instruction(NamedTuple):
    opcode: str
    operands: tuple
    guard: Register | Not | None
    text: str

    @property
    def words(self) -> list[str]:
        return self.opcode.split(".")


class Parameter(NamedTuple):
    offset: int
    size: int


@dataclass
class Program:
    name: str = ""
    threads: int = 0
    parameters: dict[str, Parameter] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # prefix or name -> bits, 1 for a predicate
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def bits(self, register: Register) -> int:
        return self.registers.get(register.name) or self.registers[register.name.rstrip("0123456789")]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*)\}\s*$", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w?(\d+)\s+(\w+)(?:\[(\d+)\])?")
_THREADS = re.compile(r"\.reqntid\s+(\d+)")
_LABEL = re.compile(r"\s*([\w$.]+):(?!:)")
_STATEMENT = re.compile(r"\s*((?:[^;{}]|\{[^{}]*\})*);")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)$")


def parse(text: str) -> dict[str, Program]:
    """A module's kernels by their names."""
    _, *entries = _COMMENT.sub("", text).split(".visible ")
    return {program.name: program for program in map(_kernel, entries)}


def _kernel(text: str) -> Program:
    name, parameters, head, body = _ENTRY.match(text.strip()).groups()
    program = Program(name, int(_THREADS.search(head)[1]), _parameters(parameters))
    _Body(program).read(body)
    return program


def _parameters(text: str) -> dict[str, Parameter]:
    found, at = {}, 0
    for align, bits, name, count in _PARAMETER.findall(text):
        size = int(bits) // 8 * int(count or 1)
        step = int(align or size)
        at = -(-at // step) * step
        found[name] = Parameter(at, size)
        at += size
    return found


class _Body:
    """Reads statements; each pair of braces is a scope, with registers and labels of its own."""

    def __init__(self, program: Program):
        self.program, self.scopes, self.count = program, [{}], 0
        self.jumps: list[tuple[int, list[dict]]] = []

    def read(self, text: str):
        text, at = text.strip(), 0
        while at < len(text):
            at = self._one(text, at)
        for i, scopes in self.jumps:
            self._resolve(i, scopes)

    def _one(self, text: str, at: int) -> int:
        while text[at].isspace():
            at += 1
        if text[at] == "{":
            self.scopes.append({})
            return at + 1
        if text[at] == "}":
            self.scopes.pop()
            return at + 1
        if label := _LABEL.match(text, at):
            self.program.labels[self._own(label[1])] = len(self.program.code)
            return label.end()
        statement = _STATEMENT.match(text, at)
        if statement is None:
            raise SyntaxError(f"PTX: no statement at {text[at : at + 80]!r}")
        self._statement(" ".join(statement[1].split()))
        return statement.end()

    def _own(self, name: str) -> str:
        """A name declared in the innermost scope; unique in the program."""
        if len(self.scopes) > 1:
            self.count += 1
            self.scopes[-1][name] = f"{name}#{self.count}#"
        return self.scopes[-1].get(name, name)

    def _known(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _statement(self, text: str):
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            bits = 1 if kind == ".pred" else int(kind[2:])
            for name in names.split(","):
                self.program.registers[self._own(name.split("<")[0].strip())] = bits
            return
        if text.startswith(".pragma"):
            return
        if text.startswith("."):
            raise NotImplementedError(f"PTX: {text}")
        guard, rest = None, text
        if text.startswith("@"):
            word, rest = text.split(None, 1)
            guard = self._operand(word[1:])
        opcode, _, operands = rest.partition(" ")
        if opcode.startswith("bra"):
            self.jumps.append((len(self.program.code), list(self.scopes)))
        parts = tuple(self._operand(x) for x in _split(operands))
        self.program.code.append(Instruction(opcode, parts, guard, text))

    def _resolve(self, i: int, scopes: list[dict]):
        """A label may come after the jump to it, in any scope around it."""
        jump = self.program.code[i]
        name = jump.operands[0].name
        found = next((scope[name] for scope in reversed(scopes) if name in scope), name)
        self.program.code[i] = jump._replace(operands=(Symbol(found),))

    def _operand(self, text: str):
        if text[0] == "{":
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1])
        if text[0] == "!":
            return Not(self._operand(text[1:]))
        if "|" in text:
            return Pair(*(self._operand(x.strip()) for x in text.split("|")))
        if number := _FLOAT.match(text):
            return Immediate(int(number[2], 16), 32 if number[1] in "fF" else 64)
        if _NUMBER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        name = self._known(text)
        if name in self.program.registers or name.rstrip("0123456789") in self.program.registers:
            return Register(name)
        return Special(text[1:]) if text[0] == "%" else Symbol(text)

    def _address(self, text: str) -> Address:
        first, *rest = _split(text)
        base, _, offset = first.partition("+")
        coordinates = self._operand(rest[0]).items if rest else ()
        return Address(self._operand(base.strip()), int(offset or 0), coordinates)


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [x for x in parts if x]
