"""PTX -> Python: an instruction becomes one function of a warp, once for all warps."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import alu, memory, sync, tensor_core, tma
from .parse import Instruction, Program
from .slots import Slots

OPS = alu.OPS | memory.OPS | sync.OPS | tensor_core.OPS | tma.OPS
ENDS = ("bra", "ret", "exit")


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
        self.ends = self._block_ends()
        self.waits_for_stream = any(x.opcode == "griddepcontrol.wait" for x in self.program.code)

    def _translate(self, i: Instruction) -> Callable | Jump:
        words = i.words
        if words[0] in ENDS:
            target = self.program.labels[i.operands[0].name] if words[0] == "bra" else None
            return Jump(target, alu.predicate(i.guard, self.slots) if i.guard else None)
        make = OPS.get("st_async" if words[:2] == ["st", "async"] else words[0])
        if make is None:
            raise NotImplementedError(f"PTX: {i.text}")
        step = make(i, self.slots)
        return guarded(step, alu.predicate(i.guard, self.slots)) if i.guard else step

    def _block_ends(self) -> list[int]:
        """For each instruction, the first one behind it that is a jump or has a label: diverged lanes may meet there."""
        labelled, ends = set(self.program.labels.values()), [len(self.steps)] * (len(self.steps) + 1)
        for n in range(len(self.steps) - 1, -1, -1):
            stops = isinstance(self.steps[n], Jump)
            ends[n] = n if stops else n + 1 if n + 1 in labelled else ends[n + 1]
        return ends


def guarded(step: Callable, when: Callable) -> Callable:
    """For those active lanes for which a predicate holds."""

    def run(w):
        before = w.where
        w.where = w.lanes() & when(w)
        found = step(w) if w.where.any() else None
        w.where = before
        return found

    return run


def full(lanes: np.ndarray):
    """True where all lanes are active, which NumPy takes faster."""
    return True if lanes.all() else lanes
