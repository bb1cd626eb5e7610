"""cp.async: by threads, 16 bytes or fewer each to shared memory, and mbarriers that wait for it; or in bulk, by TMA."""

import numpy as np

from . import tma
from .memory import COPIED, Fault, address
from .parse import Instruction
from .slots import Slots
from .sync import barriers
from .tma import Transfer


def cp(i: Instruction, s: Slots):
    if i.words[2] in ("ca", "cg"):
        return _copy(i, s)
    return _arrive(i, s) if i.words[2:4] == ["mbarrier", "arrive"] else tma.cp(i, s)


def _copy(i: Instruction, s: Slots):
    """cp.async.ca|cg.shared.global [to], [from], size, how many of these bytes to read: behind them are zeros."""
    to, source, size, *read = i.operands
    to_at, from_at, n = address(to, s), address(source, s), size.bits
    count = s.of(read[0], "u32") if read else None

    def step(w):
        lanes = np.flatnonzero(w.lanes())
        offsets = np.array([w.cta.own_offset(int(x), i.text) for x in to_at(w)[lanes]], np.int64)
        counts = w.rows[count][lanes].astype(np.int64) if read else np.full(len(lanes), n)
        if (offsets % n).any() or (counts > n).any():
            raise Fault(f"{i.text}: offsets {offsets}, {counts} bytes")
        w.cta.reads_global(from_at(w)[lanes[counts > 0]], 1, i.text)
        transfer = Transfer(None, w.cta, i.text)
        transfer.go = _arrival(w, transfer, offsets, from_at(w)[lanes], counts, n, i.text)
        w.copies.append(transfer)
        w.machine.fly(transfer)

    return step


def _arrival(w, transfer: Transfer, offsets, addresses, counts, n: int, why: str):
    def go():
        values, span = np.zeros((len(offsets), n), np.uint8), np.arange(n)
        for read in np.unique(counts[counts > 0]):
            here = counts == read
            found = w.machine.memory.load(addresses[here], np.dtype((np.void, int(read))), why)
            values[here, :read] = found.view(np.uint8).reshape(-1, int(read))
        w.cta.shared.store((offsets[:, None] + span).ravel(), values.ravel(), why, COPIED)
        w.copies.remove(transfer)

    return go


def _arrive(i: Instruction, s: Slots):
    """cp.async.mbarrier.arrive.noinc: a thread's arrival, as soon as its copies are there."""
    if "noinc" not in i.words:
        raise NotImplementedError(i.text)
    at = address(i.operands[0], s)

    def step(w):
        every = [barrier for _, barrier in barriers(w, at(w), i.text)]
        before = list(w.copies)
        transfer = Transfer(None, w.cta, i.text)

        def go():
            if any(x in w.copies for x in before):
                w.machine.fly(transfer)
                return
            for barrier in every:
                barrier.arrive(1, i.text)

        transfer.go = go
        w.machine.fly(transfer)

    return step


OPS = {"cp": cp}
