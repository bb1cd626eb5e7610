"""What decides each conditional branch of a kernel's main loop, read from the machine code. Needs no GPU.

For a shipped kernel: barriers, the trip count, and one vote: on the exponents, where it skips rescaling O, or on sums
of P, where it skips redoing the step.
"""

import re
from typing import NamedTuple

from .inspect import _LINE, Instruction, LoopReport, _shortest, loops, parse, sass
from .kernels.config import FwdConfig
from .kernels.softmax import LARGEST_SUM

BARRIER, TRIP_COUNT, UNKNOWN = "barrier", "trip count", "unknown"
LAZY_RESCALE, REDO = "data: lazy rescale", "data: redo"

_ADDRESS = re.compile(r"\s*/\*([0-9a-f]+)\*/")
_PREDICATE = re.compile(r"\bU?P\d\b")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_LEAVES = ("BRX", "BRXU", "JMX", "JMXU", "CALL", "EXIT", "RET", "KILL")  # ways on that `parse` does not follow
_SIGNS = re.compile(r"(GT\S* .*, -0x1|GE\S* .*, RZ), PT$")  # a compare of integers that asks for a sign


class Branch(NamedTuple):
    """A conditional branch of the main loop, and what decides it."""

    address: int  # of the instruction in the machine code
    text: str
    depends: str  # BARRIER, TRIP_COUNT, LAZY_RESCALE, REDO or UNKNOWN
    writers: tuple[str, ...]  # of its predicate: the instructions that may have written it last


def audit(config: FwdConfig) -> tuple[Branch, ...]:
    """What decides each conditional branch of the steady loop, the polling of its barriers included."""
    return control_flow(sass(config))


def control_flow(text: str) -> tuple[Branch, ...]:
    """The audit of nvdisasm's text; empty if no loop multiplies."""
    matches = [match for line in text.splitlines() if (match := _LINE.match(line))]
    code = parse(text)
    span = _steady(code)
    return _Flow(code, matches, *span).branches() if span else ()


def _steady(code: list[Instruction]) -> tuple[int, int] | None:
    """The first and the last instruction of the loop that `StaticReport.steady_loop` counts."""
    steady = min(loops(code), key=lambda loop: loop.instructions, default=LoopReport())
    for i, x in enumerate(code):
        if x.target is not None and i - x.target + 1 == steady.length:
            if LoopReport.of(_shortest(code, x.target, i), steady.length) == steady:
                return x.target, i
    return None


class _Flow:
    """A loop's instructions and the ways between them.

    A predicate is followed back along all ways. A kind is given only if all that may have written the predicate agree
    and it was written in the same loop.
    """

    def __init__(self, code: list[Instruction], matches: list[re.Match], first: int, last: int):
        self.code, self.matches, self.last = code, matches, last
        self.guards = [(match["when"] or "").strip().lstrip("@!") for match in matches]
        self.before: list[list[int]] = [[] for _ in code]
        for i, x in enumerate(code):
            for following in (i + 1 if x.falls_through else None, x.target):
                if following is not None and following < len(code):
                    self.before[following].append(i)
        self.body, queue = {first, last}, [last]
        while queue:
            new = [i for i in self.before[queue.pop()] if i not in self.body]
            self.body.update(new)
            queue += new

    def branches(self) -> tuple[Branch, ...]:
        return tuple(self.branch(i) for i in sorted(self.body) if self.conditional(i))

    def conditional(self, i: int) -> bool:
        x = self.code[i]
        kind = x.opcode.split(".")[0]
        return kind in _LEAVES or (kind in ("BRA", "JMP") and (x.falls_through or x.target is None))

    def branch(self, i: int) -> Branch:
        address = int(_ADDRESS.match(self.matches[i][0])[1], 16)  # type: ignore[index]  # `_LINE` has matched it
        read = {self.guards[i], *_PREDICATE.findall(self.code[i].operands.split("`")[0])} - {"", "PT", "UPT"}
        writers = {j for predicate in read for j in self.writers(i, predicate)}
        reasons = {self.reason(j, i) for j in writers}
        leaves = self.code[i].target is None
        depends = reasons.pop() if len(reasons) == 1 and not leaves else UNKNOWN
        return Branch(address, self.text(i), depends, tuple(self.text(j) for j in sorted(writers)))

    def text(self, i: int) -> str:
        if i < 0:
            return "before the loop"
        x = self.matches[i]
        return " ".join(f"{x['when'] or ''}{x['opcode']} {x['operands']}".split())

    def writers(self, start: int, predicate: str) -> set[int]:
        """What may have written `predicate` last before `start`; -1 if that was outside of the loop."""
        found, seen, queue = set(), set(), list(self.before[start])
        while queue:
            i = queue.pop()
            if i in seen:
                continue
            seen.add(i)
            if i not in self.body:
                found.add(-1)
                continue
            writes = self._writes(i, predicate)
            if writes:
                found.add(i)
            if not writes or self.guards[i]:  # guarded: the one before may stay
                queue += self.before[i]
        return found

    def _writes(self, i: int, predicate: str) -> bool:
        """Predicates are written as the first two operands, or behind a register: a carry, the outcome of a vote."""
        kind, operands = self.code[i].opcode.split(".")[0], self._operands(i)
        if kind in ("BRA", "JMP", *_LEAVES):
            return False
        if kind == "R2P":
            return True
        vote = kind in ("VOTE", "VOTEU")
        if re.fullmatch(r"U?P[T\d]", operands[0]):
            return predicate in operands[: 1 if vote else 2]
        return predicate in operands[1 : 2 if vote else 3]

    def _operands(self, i: int) -> list[str]:
        return [operand.strip() for operand in self.code[i].operands.split(",")]

    def reason(self, i: int, branch: int) -> str:
        """What a predicate stands for that instruction `i` wrote and `branch` reads."""
        x = self.code[i]
        kind = x.opcode.split(".")[0]
        if i < 0:
            return UNKNOWN
        if x.opcode.startswith("SYNCS.PHASECHK"):
            return BARRIER
        if kind == "VOTE" and self._votes_on_signs(i):
            return LAZY_RESCALE
        if kind == "VOTE" and self._tests_sums(i):
            return REDO
        if kind in ("ISETP", "UISETP") and branch == self.last and self._counts(i):
            return TRIP_COUNT
        copied = re.fullmatch(r"P\d, PT, PT, PT, (UP\d), 0x80, 0x0", x.operands) if kind == "PLOP3" else None
        reasons = {self.reason(j, branch) for j in self.writers(i, copied[1])} if copied else set()
        return reasons.pop() if len(reasons) == 1 else UNKNOWN

    def _votes_on_signs(self, i: int) -> bool:
        texts = [self.text(j) for j in self.writers(i, self._operands(i)[-1])]
        return bool(texts) and all(text.startswith("ISETP.") and _SIGNS.search(text) for text in texts)

    def _tests_sums(self, i: int, after: frozenset[int] = frozenset()) -> bool:
        """Whether the predicate that `i` reads last says that a sum of P is too large."""
        writers = self.writers(i, self._operands(i)[-1])
        return bool(writers) and all(self._is_sum_test(j, after) for j in writers)

    def _is_sum_test(self, i: int, after: frozenset[int]) -> bool:
        """Of one sum, and of those tested before it; `after`: the tests that led here, no answer a lap ago."""
        if i < 0 or i in after or not self.code[i].opcode.startswith("FSETP.GTU"):
            return False
        *_, largest, before = self._operands(i)
        return _number(largest) in LARGEST_SUM.values() and (before == "PT" or self._tests_sums(i, after | {i}))

    def _counts(self, i: int) -> bool:
        """Whether a compare is between a counter, which the loop steps by a constant, and what the loop leaves."""
        steps = [self._steps(*register) for register in _REGISTER.findall(self.code[i].operands)]
        return steps.count("counter") == 1 and steps.count("changes") == 0

    def _steps(self, kind: str, number: str) -> str:
        name = kind + number
        writers = [i for i in self.body if self._covers(i, kind, int(number))]
        if not writers:
            return "constant"
        step = re.compile(rf"{name}, (PT, )?{name}(\.reuse)?, -?0x[0-9a-f]+(, U?RZ)?")
        adds = [self.code[i].opcode.split(".")[0] in ("IADD3", "UIADD3", "VIADD") for i in writers]
        return "counter" if all(adds) and all(step.fullmatch(self.code[i].operands) for i in writers) else "changes"

    def _covers(self, i: int, kind: str, number: int) -> bool:
        """Whether an instruction writes a register; the wide ones write several from their first operand on."""
        opcode, first = self.code[i].opcode, _REGISTER.fullmatch(self._operands(i)[0])
        shape = re.match(r"HGMMA\.64x(\d+)x", opcode)
        wide = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
        count = int(shape[1]) // 2 if shape else wide
        return first is not None and first[1] == kind and int(first[2]) <= number < int(first[2]) + count


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
