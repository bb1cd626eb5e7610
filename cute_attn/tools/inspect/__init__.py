"""What a compiled kernel is made of: registers, spills, its main loop's instructions, and the bounds that follow.

Needs no GPU: ptxas's log and nvdisasm's text tell it all. `report(config).problems()` is empty for a healthy kernel.
"""

import contextlib
import importlib.metadata
import io
import re
import shutil
import subprocess
import tempfile
from collections import deque
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ... import compile
from ...kernels.config import FwdConfig
from ...kernels.ping_pong import WARPGROUP
from ...kernels.registry import KernelConfig

LOOP_WARPGROUP_OPS = 4  # at most: QK and PV are issued in one go each, an arrive and a wait for either
ELEMENT_BYTES = 2  # of bf16 and fp16
SMEM_BYTES_PER_CLK = 128
HIDDEN_PER_EXP = 3.5  # a model: beside a warp's EX2, 8 cycles of MUFU, issue FFMA, EX2, FADD, half a conversion

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LABEL = re.compile(r"(\.?[\w.$]+):\s*$")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<when>@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;")
_TARGET = re.compile(r"(?P<condition>.*?)`\((?P<label>[^)]+)\)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = r"Compiling entry function '{}_cutlass.*?Used (\d+) registers"
_ADVICE = re.compile(r"\((C\d{4})\) (.*?)(?= ptxas |$)")


class Build(NamedTuple):
    """What the tools say about one compiled config."""

    sass: str  # of nvdisasm
    ptx: str
    log: str  # of ptxas -v, on one line


class Instruction(NamedTuple):
    opcode: str
    operands: str
    target: int | None  # the index it may jump to
    falls_through: bool  # to the next one


@dataclass(frozen=True)
class LoopReport:
    """One time round a loop by its shortest way: no barrier is polled twice, O is not rescaled."""

    instructions: int = 0
    length: int = 0  # all instructions from its first to its last, the rescale of O too
    wgmma: int = 0  # HGMMA
    warpgroup_ops: int = 0  # WARPGROUP.*: the arrives and waits around WGMMAs
    mufu: int = 0  # MUFU.*: the exponentials of a thread
    maxima: int = 0  # FMNMX: a search for the rows' maxima takes about one for each of a thread's scores
    selects: int = 0  # FSEL, SEL: a mask takes one for each of a thread's scores
    barriers: int = 0  # BAR.*, SYNCS.*: named barriers, mbarriers
    branches: int = 0

    @staticmethod
    def of(way: list[Instruction], length: int) -> "LoopReport":
        kinds = [x.opcode.split(".")[0] for x in way]
        return LoopReport(
            instructions=len(way),
            length=length,
            wgmma=kinds.count("HGMMA"),
            warpgroup_ops=kinds.count("WARPGROUP"),
            mufu=kinds.count("MUFU"),
            maxima=kinds.count("FMNMX"),
            selects=kinds.count("FSEL") + kinds.count("SEL"),
            barriers=kinds.count("BAR") + kinds.count("SYNCS"),
            branches=kinds.count("BRA"),
        )


@dataclass(frozen=True)
class StaticReport:
    """A compiled config, counted. Registers are per thread, wgmma to warpgroup_ops are instructions of the kernel."""

    name: str
    tile_m: int
    tile_n: int
    stages: int
    warpgroups: int  # those that multiply
    threads: int
    registers_at_launch: int
    registers_producer: int  # after setmaxnreg
    registers_consumer: int
    registers_asked: tuple[int, int] | None  # (producer, consumer) by the config; None: as launched
    smem_bytes: int
    stages_o: bool  # O goes through shared memory, hence by TMA
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    stack_bytes: int
    wgmma: int
    tma_loads: int
    tma_stores: int
    warpgroup_ops: int
    loops: tuple[LoopReport, ...]  # the innermost ones that multiply, in the order of the code
    advice: tuple[str, ...]  # what ptxas warns of, such as C7510, C7512, C7514: WGMMAs serialised

    @property
    def steady_loop(self) -> LoopReport:
        """The main loop over blocks that no mask cuts: the shortest one that multiplies."""
        return min(self.loops, key=lambda loop: loop.instructions, default=LoopReport())

    @property
    def serialised(self) -> bool:
        """Whether ptxas waits for each WGMMA before the next."""
        said = any("serialized" in text for text in self.advice)
        return said or any(loop.warpgroup_ops > LOOP_WARPGROUP_OPS for loop in self.loops)

    def problems(self) -> list[str]:
        """Everything unhealthy, in words; nothing for a healthy kernel."""
        got, pool = (self.registers_producer, self.registers_consumer), self.registers_at_launch * self.threads
        consumers = WARPGROUP * self.warpgroups
        taken = (self.threads - consumers) * got[0] + consumers * got[1]
        asked, stores, loads = self.registers_asked, self.spill_stores, self.spill_loads
        most = max((loop.warpgroup_ops for loop in self.loops), default=0)
        checks = {
            f"spills: {stores} bytes stored, {loads} loaded": stores or loads,
            f"stack: {self.stack_bytes} bytes": self.stack_bytes,
            f"serialised WGMMA: {most} WARPGROUP ops in a loop, {LOOP_WARPGROUP_OPS} are enough": self.serialised,
            "no WGMMA": not self.wgmma,
            "no loop with WGMMA": not self.loops,
            "no TMA load": not self.tma_loads,
            "no TMA store": self.stages_o and not self.tma_stores,
            f"setmaxnreg: {got} registers, the config asks for {asked}": asked not in (None, got),
            f"setmaxnreg: {got} registers never fit in {pool}": taken > pool,
        }
        return [text for text, bad in checks.items() if bad] + [f"ptxas: {text}" for text in self.advice]


@dataclass(frozen=True)
class Bounds:
    """Cycles of one SM per K/V tile and CTA, of each unit, if nothing else held it up."""

    mma: float  # tensor cores
    mufu: float  # exponentials, 16 lanes a cycle
    issue: float  # one instruction a cycle and scheduler; each warpgroup has a warp on every scheduler
    smem: float  # 128 bytes a cycle: K and V read by each warpgroup, Q too unless in registers, K and V written
    turn: float  # one warpgroup's MMAs, then its softmax; shorter where PV runs beside the next block's softmax

    @property
    def binding(self) -> str:
        """The unit that takes longest."""
        units = {unit: cycles for unit, cycles in asdict(self).items() if unit != "turn"}
        return max(units, key=lambda unit: units[unit])

    @property
    def no_overlap(self) -> float:
        """Use of the tensor cores, 0 to 1, if MMAs and softmax took turns."""
        return self.mma / (self.mma + max(self.mufu, self.issue))

    @property
    def ping_pong(self) -> float:
        """Use of the tensor cores, 0 to 1, if each warpgroup's softmax runs beside the others' MMAs only."""
        return self.mma / max(self.mma, self.mufu, self.issue, self.smem, self.turn)


def report(config: FwdConfig) -> StaticReport:
    """Compile `config` and count; about 2 s, then kept."""
    return read(config, build(config))


def sass(config: FwdConfig) -> str:
    """The machine code, as nvdisasm writes it."""
    return build(config).sass


def ptx(config: FwdConfig) -> str:
    return build(config).ptx


def bounds(config: FwdConfig, report: StaticReport) -> Bounds:
    """The roofline of the steady loop.

    Per SM and cycle: 4096 dense FLOP (H100 white paper), 16 exponentials, 128 bytes of shared memory, 4 instructions
    (CUDA C++ Programming Guide, compute capability 9.0).
    """
    w, n, d, d_v = config.warpgroups, config.tile_n, config.head_dim, config.columns_v
    instructions = report.steady_loop.instructions
    q_reads = 0 if config.q_in_regs else 64 * w * d
    mma, mufu = w * n * (d + d_v) / 32, 4.0 * w * n
    exposed = mufu / w + instructions - HIDDEN_PER_EXP * n / 2  # a thread has n / 2 scores
    return Bounds(
        mma=mma,
        mufu=mufu,
        issue=float(w * instructions),
        smem=ELEMENT_BYTES * (w * n * (d + d_v) + q_reads + n * (d + config.d_v)) / SMEM_BYTES_PER_CLK,
        turn=mma / w + exposed,
    )


@lru_cache(maxsize=128)
def build(config: KernelConfig) -> Build:
    """Compile for inspection; the machine code is the same as `compile.get` runs."""
    nvdisasm = _tool("nvdisasm")
    with tempfile.TemporaryDirectory() as directory:
        with compile.lock, contextlib.redirect_stderr(io.StringIO()) as log:
            compile.compile(config, options=f"--keep-cubin --keep-ptx --dump-dir {directory} remarks{{ptx}}")
        (cubin,), (ptx,) = (list(Path(directory).glob(f"*.{kind}")) for kind in ("cubin", "ptx"))
        done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvdisasm: failed on {config.name}: {done.stderr.strip()}")
        return Build(done.stdout, ptx.read_text(), one_line(log.getvalue()))


def one_line(log: str) -> str:
    """A log without colours and line breaks, which depend on the terminal."""
    return " ".join(_ANSI.sub("", log).split())


def spill_stores(log: str) -> int:
    """Bytes, by ptxas's log, of all kernels of a config."""
    return _frames(log)[1]


def _frames(log: str) -> list[int]:
    """Bytes of stack, stored and loaded."""
    found = _FRAME.findall(one_line(log))
    if not found:
        raise RuntimeError(f"ptxas: no spills in its log: {log!r}")
    return [sum(map(int, numbers)) for numbers in zip(*found, strict=True)]


def read(config: FwdConfig, build: Build) -> StaticReport:
    """Judge what the tools said: of the forward kernel, and what all kernels of the config spill."""
    used = re.search(_USED.format(re.escape(config.name)), build.log)
    if not used:
        raise RuntimeError(f"ptxas: no registers and spills of {config.name} in its log: {build.log!r}")
    stack, stores, loads = _frames(build.log)
    code = parse(_section(build.sass, config.name))
    kinds = [x.opcode.split(".")[0] for x in code]
    at_launch = int(used[1])
    return StaticReport(
        name=config.name,
        tile_m=config.tile_m,
        tile_n=config.tile_n,
        stages=config.stages,
        warpgroups=config.warpgroups,
        threads=config.threads,
        registers_at_launch=at_launch,
        registers_producer=_setmaxnreg(code, "USETMAXREG.DEALLOC", at_launch),
        registers_consumer=_setmaxnreg(code, "USETMAXREG.TRY_ALLOC", at_launch),
        registers_asked=config.registers,
        stages_o=config.stages_o,
        smem_bytes=config.smem_bytes,
        stack_bytes=stack,
        spill_stores=stores,
        spill_loads=loads,
        wgmma=kinds.count("HGMMA"),
        tma_loads=kinds.count("UTMALDG"),
        tma_stores=kinds.count("UTMASTG"),
        warpgroup_ops=kinds.count("WARPGROUP"),
        loops=loops(code),
        advice=tuple(dict.fromkeys(f"{number} {text}" for number, text in _ADVICE.findall(build.log))),
    )


def _section(sass: str, name: str) -> str:
    """Of nvdisasm's text the kernel of that name."""
    begin = sass.index(f"\n.text.{name}_cutlass")
    end = sass.find("\n.text.", begin + 1)
    return sass[begin : len(sass) if end < 0 else end]


def _setmaxnreg(code: list[Instruction], opcode: str, otherwise: int) -> int:
    counts = [int(x.operands.split(",")[-1], 16) for x in code if x.opcode.startswith(opcode)]
    return counts[0] if counts else otherwise


def parse(sass: str) -> list[Instruction]:
    """nvdisasm's text as instructions; jumps are by index."""
    matches: list[re.Match] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := _LINE.match(line):
            matches.append(match)
        elif label := _LABEL.match(line):
            labels[label[1]] = len(matches)
    return [_instruction(match, labels) for match in matches]


def _instruction(match: re.Match, labels: dict[str, int]) -> Instruction:
    when, opcode, operands = match["when"], match["opcode"], match["operands"]
    kind = opcode.split(".")[0]
    if kind in ("BRA", "JMP") and (to := _TARGET.match(operands)):
        return Instruction(opcode, operands, labels.get(to["label"]), bool(when or to["condition"].strip()))
    return Instruction(opcode, operands, None, bool(when) or kind not in ("EXIT", "RET", "KILL"))


def loops(code: list[Instruction]) -> tuple[LoopReport, ...]:
    """The innermost loops with WGMMAs.

    A jump back closes a loop if no way from the entry to it avoids its target. ptxas puts the polling of barriers
    behind the kernel's end; the jumps back from there close none.
    """
    found = [
        (x.target, i)
        for i, x in enumerate(code)
        if x.target is not None
        and x.target <= i
        and any(y.opcode.startswith("HGMMA") for y in code[x.target : i + 1])
        and i not in _ways(code, 0, without=x.target)
    ]
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return tuple(LoopReport.of(_shortest(code, first, last), last - first + 1) for first, last in inner)


def _ways(code: list[Instruction], start: int, without: int = -1) -> dict[int, int]:
    """Every instruction reached from `start` other than through `without`, and the one before it on a shortest way."""
    before, queue = {start: -1}, deque([start])
    while queue:
        i = queue.popleft()
        if i == without:
            continue
        for following in (i + 1 if code[i].falls_through else None, code[i].target):
            if following is not None and following < len(code) and following not in before:
                before[following] = i
                queue.append(following)
    return before


def _shortest(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    before, way, i = _ways(code, first), [], last
    while i != -1:
        way.append(code[i])
        i = before[i]
    return way[::-1]


def _tool(name: str) -> str:
    """The path of nvdisasm: from NVIDIA's wheel, else from PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    wheel = [str(file.locate()) for file in files if file.stem == name and file.parent.name == "bin"]
    found = next((path for path in wheel if Path(path).is_file()), None) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f'{name}: not found, neither its wheel nor on PATH; pip install "cute_attn[bench]"')
    return found
