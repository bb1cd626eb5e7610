"""PTX -> Python: an instruction becomes one function of a warp, once for all warps."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import alu, copies, memory, sync, tensor_core, tma
from .parse import Instruction, Program
from .slots import LANES, Plan, Slots

OPS = alu.OPS | memory.OPS | sync.OPS | tensor_core.OPS | tma.OPS | copies.OPS
ENDS = ("bra", "ret", "exit")
ORDERS = "weak relaxed acquire release acq_rel volatile cta cluster gpu sys"
SPACES = f"global shared shared::cta shared::cluster param {ORDERS}"
NUMBERS = "u16 s16 b16 u32 s32 b32 f32 u64 s64 b64 f64 pred"
COMPARE = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor"
BULK = "async bulk tensor 1d 2d 3d 4d 5d tile mbarrier::complete_tx::bytes multicast::cluster L2::cache_hint bulk_group"
WORDS = {  # what an opcode may have behind its first word; whatever else it has would change what it does
    "": NUMBERS,
    **dict.fromkeys(("add", "sub", "fma"), f"rn {NUMBERS}"),
    **dict.fromkeys(("mul", "mad"), f"lo hi wide rn {NUMBERS}"),
    **dict.fromkeys(("min", "max"), f"relu NaN {NUMBERS}"),
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"), "approx rn ftz f32"),
    **dict.fromkeys(("ld", "st"), f"{SPACES} {NUMBERS} u8 s8 b8 nc v2 v4"),
    **dict.fromkeys(("atom", "red"), f"{SPACES} {NUMBERS} add inc dec exch min max and or cas"),
    **dict.fromkeys(("bar", "barrier"), "sync arrive warp cluster wait relaxed aligned release acquire cta"),
    **dict.fromkeys(("fence", "membar", "prefetch", "nanosleep"), None),
    **dict.fromkeys(("cvta", "mapa"), f"to {SPACES} u32 u64"),
    "bfind": "u32 s32",
    "bra": "uni",
    "cp": f"{BULK} commit_group wait_group read {SPACES} shared::cluster ca cg L2::128B mbarrier arrive noinc b64",
    "cvt": f"rn rni rzi rmi rpi sat bf16 f16 bf16x2 f16x2 u8 s8 {NUMBERS}",
    "div": f"rn full approx {NUMBERS}",
    "elect": "sync",
    "griddepcontrol": "wait launch_dependents",
    "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16",
    "mbarrier": f"init try_wait test_wait parity arrive expect_tx inval {SPACES} b64",
    "mma": None,
    "redux": "sync add min max and or u32 s32 b32",
    "setmaxnreg": "inc dec sync aligned u32",
    "setp": f"{COMPARE} {NUMBERS}",
    "shf": "l r wrap clamp b32",
    "shfl": "sync idx bfly up down b32",
    "st_async": f"async mbarrier::complete_tx::bytes {SPACES} {NUMBERS}",
    "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16",
    "vote": "sync any all uni ballot pred b32",
    "wgmma": None,
}


class Jump(NamedTuple):
    """Where active lanes go on: all, or those for which `when` holds. None: they end."""

    target: int | None
    when: Callable | None


class Kernel:
    """A translated program."""

    def __init__(self, program: Program):
        self.program = program
        self.slots = Slots(self.program)
        self.steps = [self._translate(x) for x in self.program.code]
        self.plan = Plan(self.slots)
        self.ends = self._block_ends()
        self.ran: set[int] = set()  # where blocks of instructions began that some warp has run
        self.waits_for_stream = any(x.opcode.startswith("griddepcontrol") for x in self.program.code)

    def never_ran(self) -> list[str]:
        """The instructions that no launch so far has come to."""
        reached = {n for first in self.ran for n in range(first, self.ends[first] + 1)}
        return [x.text for n, x in enumerate(self.program.code) if n not in reached]

    def _translate(self, i: Instruction) -> Callable | Jump:
        words = i.words
        if words[0] in ENDS:
            target = self.program.labels[i.operands[0].name] if words[0] == "bra" else None
            return Jump(target, alu.predicate(i.guard, self.slots) if i.guard else None)
        name = "st_async" if words[:2] == ["st", "async"] else words[0]
        make, known = OPS.get(name), WORDS.get(name, WORDS[""])
        if make is None or not (known is None or set(words[1:]) <= set(known.split())):
            raise NotImplementedError(f"PTX: {i.text}")
        step = make(i, self.slots)
        return guarded(step, alu.predicate(i.guard, self.slots)) if i.guard else step

    def _block_ends(self) -> list[int]:
        """For each instruction, the next one that is a jump or has a label: diverged lanes may meet there."""
        labelled, ends = set(self.program.labels.values()), [len(self.steps)] * (len(self.steps) + 1)
        for n in range(len(self.steps) - 1, -1, -1):
            stops = isinstance(self.steps[n], Jump)
            ends[n] = n if stops else n + 1 if n + 1 in labelled else ends[n + 1]
        return ends


def guarded(step: Callable, when: Callable) -> Callable:
    """For those active lanes for which a predicate holds."""

    def run(w):
        before, lanes = w.where, w.lanes() & when(w)
        if not np.count_nonzero(lanes):
            return None
        w.where = full(lanes)
        found = step(w)
        w.where = before
        return found

    return run


def full(lanes: np.ndarray):
    """True where all lanes are active, which NumPy takes faster."""
    return True if np.count_nonzero(lanes) == LANES else lanes
