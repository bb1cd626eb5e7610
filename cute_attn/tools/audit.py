"""What decides each conditional branch of a kernel's main loop, read from the machine code. Needs no GPU.

For a prebuilt kernel: barriers, the trip count, the thread's index in some clusters, and one vote. Lazy rescaling votes
on the exponents, and skips the rescaling of O; the speculative softmax votes on the row sums of P (its overflow check),
and skips the recomputation of the block. Lazy rescaling has a second vote where the running max changes: whether it
still serves, or the next steps are slow ones, which compute their maxima. A split kernel has one branch for both. A
softcap may have a vote of its own: on the scores, where a polynomial serves for its tanh.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from ..kernels.config import FwdConfig
from ..kernels.softmax import LARGEST_RUNNING_MAX, LARGEST_SUM, LEAST_RUNNING_MAX
from .inspect import _LINE, Instruction, LoopReport, _shortest, loops, parse, sass

BARRIER, TRIP_COUNT, THREAD, UNKNOWN = "barrier", "trip count", "thread index", "unknown"
LAZY_RESCALE, OVERFLOW_CHECK, SLOW_STEP = "data: lazy rescale", "data: overflow check", "data: slow step"
SOFTCAP = "data: softcap"
_RESCALES = {LAZY_RESCALE, SLOW_STEP}  # what a split kernel's one branch reads

_ADDRESS = re.compile(r"\s*/\*([0-9a-f]+)\*/")
_PREDICATE = re.compile(r"\bU?P\d\b")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_LEAVES = ("BRX", "BRXU", "JMX", "JMXU", "CALL", "EXIT", "RET", "KILL")  # ways on that `parse` does not follow
_FIXED = re.compile(  # integers of integers: what they give depends on nothing but their operands
    r"(?!.*(\.64|\.WIDE|IMAD\.HI))"  # these read pairs of registers
    r"(IABS|IADD3|IMAD|IMNMX|LEA|LDC|LOP3|MOV|R2UR|S2R|S2UR|SHF|UIADD3|UIMAD|ULDC|ULEA|ULOP3|UMOV|USHF|VIADD|VIADDMNMX"
    r"|VIMNMX)(\..*)?"
)
_CHANGES = re.compile(r"\bSR_CLOCK|\bSR_GLOBALTIMER|\bSR_PM")  # special registers that differ from lap to lap
_SIGNS = re.compile(r"(GT\S* .*, -0x1|GE\S* .*, RZ), (PT|P\d)$")  # a compare of integers that asks for a sign
_LARGE = (  # some float of several is 2 or more: their bits are joined, and of these is asked the exponent's highest
    re.compile(r"LOP3\.LUT P\d, RZ, (R)(\d+), 0x1, RZ, 0xc0, !PT"),
    re.compile(r"SHF\.R\.U32\.HI R\d+, RZ, 0x1e, (R)(\d+)"),
    re.compile(r"LOP3\.LUT R\d+, .*, 0xf[ce], !PT"),
)
_COPIED = re.compile(  # as it is, or denied; VOTEU copies what is the same in a warp
    r"(?:PLOP3\.LUT P\d, PT, PT, PT|UPLOP3\.LUT UP\d, UPT, UPT, UPT|VOTEU\.ANY UP\d), (U?P\d)(?:, 0x[48]0, 0x0)?"
)
_HELD = re.compile(  # put into a register, or asked of one
    r"(?:U?SEL U?R\d+, U?RZ, 0x1, !?|ISETP\.(?:EQ|NE)\.U32\.AND P\d, PT, (?:RZ, )?)(U?[PR]\d+)(?:(?:, RZ)?, PT)?"
)
_FALSE = re.compile(r"U?PLOP3\.LUT U?P\d, (?:U?PT, ){4}0x(?:8|40), 0x0|IMAD\.MOV\.U32 R\d+, RZ, RZ, RZ")
_EITHER = re.compile(r"PLOP3\.LUT P\d, PT, (P\d), (P\d), PT, 0x(?:a8|2), 0x0")  # of two predicates; or neither
_OF_MAXIMUM = re.compile(r"FSETP\.(\w+)\.(AND|OR) P\d, PT, R\d+(?:\.reuse)?, (\S+), (!?P[T\d])")
_OUT_OF_BOUNDS = {("LTU", LEAST_RUNNING_MAX), ("GTU", LARGEST_RUNNING_MAX)}  # NaN is, too
_IN_BOUNDS = {("GE", LEAST_RUNNING_MAX), ("LE", LARGEST_RUNNING_MAX)}


class Branch(NamedTuple):
    """A conditional branch of the main loop, and what decides it."""

    address: int  # of the instruction in the machine code
    text: str
    depends: str  # BARRIER, TRIP_COUNT, THREAD, LAZY_RESCALE, OVERFLOW_CHECK, SLOW_STEP, SOFTCAP or UNKNOWN
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
    and it was written in the same loop; for slow steps the vote before the loop must agree, too. A trip count compares
    a counter, which each lap steps by a constant, with what is the same in each lap, be it computed anew: nothing that
    a WGMMA or a load from memory gave.
    """

    def __init__(self, code: list[Instruction], matches: list[re.Match], first: int, last: int):
        self.code, self.matches, self.first, self.last = code, matches, first, last
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
        kinds = {self.stands_for(i, predicate, i) for predicate in read}
        kinds = {LAZY_RESCALE} if kinds == _RESCALES else kinds
        leaves = self.code[i].target is None
        depends = kinds.pop() if len(kinds) == 1 and not leaves else UNKNOWN
        return Branch(address, self.text(i), depends, tuple(self.text(j) for j in sorted(writers)))

    def text(self, i: int) -> str:
        if i < 0:
            return "before the loop"
        return " ".join(f"{self.matches[i]['when'] or ''}{self.unguarded(i)}".split())

    def unguarded(self, i: int) -> str:
        return " ".join(f"{self.code[i].opcode} {self.code[i].operands}".split()) if i >= 0 else ""

    def writers(self, start: int, predicate: str) -> set[int]:
        """What may have written `predicate` last before `start`; -1 if that was outside of the loop."""
        return self._last(start, lambda i: self._writes(i, predicate))

    def _last(self, start: int, writes: Callable[[int], bool], everywhere: bool = False) -> set[int]:
        """Going back from `start` along all ways: where each first meets one that `writes`; -1: outside of the loop.

        `everywhere`: before the loop too, where no guard is asked; -1: the kernel's start.
        """
        found, seen, queue = set(), set(), list(self.before[start])
        while queue:
            i = queue.pop()
            if i in seen:
                continue
            seen.add(i)
            if i < 0 or (i not in self.body and not everywhere):
                found.add(-1)
                continue
            written = writes(i)
            if written:
                found.add(i)
            if not written or (self.guards[i] and i in self.body):  # guarded: the one before may stay
                queue += self.before[i] or [-1]
        return found

    def _writes(self, i: int, predicate: str) -> bool:
        """Predicates are written as the first two operands, or behind a register: a carry, the outcome of a vote.

        A call may write any.
        """
        kind, operands = self.code[i].opcode.split(".")[0], self._operands(i)
        if kind in ("R2P", "CALL"):
            return True
        if kind in ("BRA", "JMP", *_LEAVES):
            return False
        vote = kind in ("VOTE", "VOTEU")
        if re.fullmatch(r"U?P[T\d]", operands[0]):
            return predicate in operands[: 1 if vote else 2]
        return predicate in operands[1 : 2 if vote else 3]

    def _operands(self, i: int) -> list[str]:
        return [operand.strip() for operand in self.code[i].operands.split(",")]

    def stands_for(self, i: int, predicate: str, branch: int, after: frozenset[int] = frozenset()) -> str:
        """What `predicate` stands for, which `i` reads for `branch`; `after`: the instructions that led here."""
        if self._says_slow(i, predicate):
            return SLOW_STEP
        reasons = {self.reason(j, branch, after) for j in self.writers(i, predicate)}
        return reasons.pop() if len(reasons) == 1 else UNKNOWN

    def reason(self, i: int, branch: int, after: frozenset[int]) -> str:
        """What a predicate stands for that instruction `i` wrote and `branch` reads."""
        x = self.code[i]
        kind = x.opcode.split(".")[0]
        if i < 0 or i in after:
            return UNKNOWN
        if x.opcode.startswith("SYNCS.PHASECHK"):
            return BARRIER
        if kind == "VOTE" and self._votes_on_signs(i):
            return LAZY_RESCALE
        if kind == "VOTE" and self._tests_sums(i):
            return OVERFLOW_CHECK
        if kind == "VOTE" and self._tests_magnitude(i):
            return SOFTCAP
        if kind in ("ISETP", "UISETP"):
            return self._compares(i, branch)
        if copied := _COPIED.fullmatch(self.unguarded(i)):
            return self.stands_for(i, copied[1], branch, after | {i})
        if either := _EITHER.fullmatch(self.unguarded(i)):
            kinds = {self.stands_for(i, predicate, branch, after | {i}) for predicate in either.groups()}
            return LAZY_RESCALE if kinds == _RESCALES else UNKNOWN
        return UNKNOWN

    def _votes_on_signs(self, i: int) -> bool:
        texts = [self.text(j) for j in self.writers(i, self._operands(i)[-1])]
        return bool(texts) and all(
            text.startswith("ISETP.") and _SIGNS.search(text) and text.endswith(" PT") for text in texts
        )

    def _tests_sums(self, i: int, after: frozenset[int] = frozenset()) -> bool:
        """Whether the predicate that `i` reads last says that a sum of P is too large."""
        writers = self.writers(i, self._operands(i)[-1])
        return bool(writers) and all(self._is_sum_test(j, after) for j in writers)

    def _is_sum_test(self, i: int, after: frozenset[int]) -> bool:
        """Of one sum, and of those tested before it; `after`: the tests that led here, no answer a lap ago.

        With a softcap a test for signs may join them: whether its polynomial serves.
        """
        if i < 0 or i in after:
            return False
        *_, largest, before = self._operands(i)
        tested = before == "PT" or self._tests_sums(i, after | {i})
        if self.code[i].opcode.startswith("ISETP"):
            return before != "PT" and _SIGNS.search(self.text(i)) is not None and tested
        return self.code[i].opcode.startswith("FSETP.GTU") and _number(largest) in LARGEST_SUM.values() and tested

    def _says_slow(self, i: int, predicate: str) -> bool:
        """Whether `predicate`, which `i` reads, is a vote on running maxima: of a lap, or before the loop.

        A step that finds none out of bounds may say so by a constant. A vote before the loop may have a guard, as where
        the loop may have no lap; what it leaves as it was is not followed.
        """
        votes = {j for j in self._origins(i, predicate) if not _FALSE.fullmatch(self.unguarded(j))}
        return bool(votes) and all(self._votes_on_maxima(j) for j in votes)

    def _origins(self, i: int, predicate: str) -> set[int]:
        """What may have written `predicate`, which `i` reads, last: before the loop too, and behind all copies."""
        found: set[int] = set()
        seen: set[int] = set()
        queue = [(i, predicate)]
        while queue:
            new = self._writers_anywhere(*queue.pop()) - seen
            seen |= new
            for j in new:
                text = self.unguarded(j)
                if copied := _COPIED.fullmatch(text) or _HELD.fullmatch(text):
                    queue.append((j, copied[1]))
                else:
                    found.add(j)
        return found

    def _writers_anywhere(self, start: int, name: str) -> set[int]:
        """Of a predicate or a register; -1 if none has written it."""
        register = _REGISTER.fullmatch(name)
        if register is None:
            return self._last(start, lambda i: self._writes(i, name), everywhere=True)
        kind, number = register.groups()
        return self._last(start, lambda i: self._covers(i, kind, int(number)), everywhere=True)

    def _votes_on_maxima(self, i: int) -> bool:
        return i >= 0 and self.code[i].opcode == "VOTE.ANY" and self._tests_maxima(i, self._operands(i)[-1], True)

    def _tests_maxima(self, i: int, operand: str, out: bool, after: frozenset[int] = frozenset()) -> bool:
        """Whether the predicate that `i` reads says that a running max is out of bounds; without `out`, none."""
        out = out != operand.startswith("!")
        writers = self._writers_anywhere(i, operand.lstrip("!"))
        return bool(writers) and all(self._is_maximum_test(j, out, after) for j in writers)

    def _is_maximum_test(self, i: int, out: bool, after: frozenset[int]) -> bool:
        """Of one running max, and of those tested before it; `after`: the tests that led here, no answer a lap ago."""
        test = _OF_MAXIMUM.fullmatch(self.unguarded(i))
        if test is None or i in after:
            return False
        compare, join, bound, before = test.groups()
        if (compare, _number(bound)) not in (_OUT_OF_BOUNDS if out else _IN_BOUNDS):
            return False
        alone = (join, before) == ("AND", "PT")
        return alone or (join == ("OR" if out else "AND") and self._tests_maxima(i, before, out, after | {i}))

    def _tests_magnitude(self, i: int) -> bool:
        """Whether the predicate that `i` reads says that one of several floats is 2 or more."""
        writers, (*tests, joined) = self.writers(i, self._operands(i)[-1]), _LARGE
        for pattern in tests:
            found = self._only(writers, pattern)
            if found is None:
                return False
            (last,) = writers
            writers = self._sources(last, found[1], found[2])
        return self._only(writers, joined) is not None

    def _only(self, writers: set[int], pattern: re.Pattern) -> re.Match | None:
        return pattern.fullmatch(self.text(*writers)) if len(writers) == 1 else None

    def _compares(self, i: int, branch: int) -> str:
        """What an integer compare stands for: nothing known where a predicate has a say in it."""
        *sides, before = self._operands(i)[2:]
        if self.guards[i] or before not in ("PT", "UPT"):
            return UNKNOWN
        read = [register for side in sides for register in _REGISTER.findall(side)]
        if all(self._same(i, kind, number, outside=False) for kind, number in read):
            return THREAD
        kinds = [self._kind(i, kind, number) for kind, number in read]
        counts = kinds.count("counter") == 1 and kinds.count("changes") == 0
        return TRIP_COUNT if counts and branch == self.last else UNKNOWN

    def _kind(self, i: int, kind: str, number: str) -> str:
        """What the register is that instruction `i` reads: "counter", "fixed" or "changes"."""
        if self._same(i, kind, number):
            return "fixed"
        name = kind + number
        step = re.compile(rf"{name}, (PT, )?{name}(\.reuse)?, -?0x[0-9a-f]+(, U?RZ)?")
        writers = [j for j in self.body if self._covers(j, kind, int(number))]
        adds = [self.code[j].opcode.split(".")[0] in ("IADD3", "UIADD3", "VIADD") for j in writers]
        steps = all(adds) and all(step.fullmatch(self.code[j].operands) and self._once(j) for j in writers)
        return "counter" if steps else "changes"

    def _once(self, i: int) -> bool:
        """Whether each lap runs `i`, whatever way it takes."""
        if i == self.first or self.guards[i]:
            return not self.guards[i]
        before_end, before_it = (self._last(start, lambda j: j in (i, self.first)) for start in (self.last, i))
        return before_end == {i} and i not in before_it

    def _same(self, i: int, kind: str, number: str, outside: bool = True, after: frozenset[int] = frozenset()) -> bool:
        """Whether the register that `i` reads has one value in all laps: left alone, or computed anew from such.

        `outside`: what was there before the loop is allowed; else only constants and the thread's index.
        `after`: the instructions that led here; what depends on its own value of the lap before is not the same.
        """
        writers = self._sources(i, kind, number)
        if len(writers) != 1:  # which one it was is decided by another branch
            return False
        (j,) = writers
        if j < 0:
            return outside
        _, _, read = self.code[j].operands.partition(",")
        fixed = _FIXED.fullmatch(self.code[j].opcode) and not _CHANGES.search(read) and not _PREDICATE.search(read)
        if not fixed or self.guards[j] or j in after:
            return False
        return all(
            self._same(j, kind, number, outside=outside, after=after | {j}) for kind, number in _REGISTER.findall(read)
        )

    def _sources(self, i: int, kind: str, number: str) -> set[int]:
        """What may have written last the register that `i` reads; -1 if that was outside of the loop."""
        return self._last(i, lambda j: self._covers(j, kind, int(number)))

    def _covers(self, i: int, kind: str, number: int) -> bool:
        """Whether an instruction writes a register: its first operand, behind a predicate too, and what follows it.

        A call may write any.
        """
        opcode, (written, *rest) = self.code[i].opcode, self._operands(i)
        if opcode.startswith("CALL"):
            return True
        if _PREDICATE.fullmatch(written) or written == "PT":  # SHFL, ATOM: whether all went well
            written = (rest or [""])[0]
        first = _REGISTER.fullmatch(written)
        return first is not None and first[1] == kind and int(first[2]) <= number < int(first[2]) + _count(opcode)


def _count(opcode: str) -> int:
    """How many registers an instruction writes."""
    if shape := re.match(r"HGMMA\.64x(\d+)x", opcode):
        return int(shape[1]) // 2
    if matrices := re.match(r"LDSM.*\.([24])(\.|$)", opcode):
        return int(matrices[1])
    pair = ".64" in opcode or "WIDE" in opcode or (opcode.startswith("CS2R") and ".32" not in opcode)
    return 4 if ".128" in opcode or opcode.startswith("HMMA") else 2 if pair else 1


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
