"""Where each CTA's part of all key blocks begins, found once for all layers: a kernel that lists it, and who reads it.

Without the list each CTA of `SharedCached` adds up the blocks of all sequences, in every layer. The list has four int32
of each row of CTAs: how many blocks there are in all, how many rows have a run of them, the first of the 32 sequences
among which the row's run begins, and the blocks before these.
"""

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .config import FwdConfig
from .grid_split import List, Place, Run, SharedCached, begin_of
from .kv_cache import Strides
from .layout import in_registers
from .state import Problem, wait_for_stream
from .varlen_scheduler import LANES, running_sum

NUMBERS = 4  # of a row of CTAs


class Entry(NamedTuple):
    total: Int32  # blocks
    rows: Int32  # of CTAs that have a run
    group: Int32  # the first of the 32 sequences among which the run begins
    before: Int32  # blocks before these


@dataclass(frozen=True)
class DecodePlanConfig:
    """Of the forward kernel that reads the list."""

    forward: FwdConfig

    def __post_init__(self):
        assert self.forward.planned, "nothing reads the list"

    @property
    def name(self) -> str:
        return f"decode_plan_of_{self.forward.name}"

    def arguments(self) -> tuple:
        """Of `DecodePlanSm90.__call__`."""
        entries = make_fake_tensor(Int32, (cute.sym_int(), NUMBERS), (NUMBERS, 1), assumed_align=16)
        extras = self.forward.signature()._replace(plan=(), split=())
        return entries, Int32(1), Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True), *chain(*extras)


class DecodePlanSm90:
    """A warp for each row of CTAs looks for its run as a CTA of the forward would."""

    def __init__(self, config: DecodePlanConfig):
        self.name, self.config = config.name, config.forward
        self.sequences = SharedCached(config.forward)

    @cute.jit
    def __call__(
        self,
        entries: cute.Tensor,  # (rows of CTAs, 4) int32
        heads: Int32,  # of a row: packs of those that share a K/V head
        packs: Int32,  # of a K/V head
        stream: cuda.CUstream,
        *extras,  # as of the forward, but the list and the workspace
    ):
        args, nowhere = self.config.divide(extras), Strides(Int32(0), Int32(0))
        counts = Int32(0), heads, packs
        grid = self.sequences.grid_of(counts, Int32(1), Int32(1), nowhere, nowhere, args.sequences)
        sizes = Int32(0), Int32(0), packs
        problem = Problem(grid, *sizes, Float32(1.0), Float32(1.0), args._replace(sequences=()))
        self.kernel.set_name_prefix(self.name, keep_mangled_name=False)
        self.kernel(problem, entries).launch(
            grid=(entries.shape[0], 1, 1), block=(LANES, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, problem: Problem, entries: cute.Tensor):
        wait_for_stream()
        row = cute.arch.block_idx()[0]
        place = Place(row, cute.arch.grid_dim()[0], Int32(0), Int32(0))
        run = self.sequences.first(problem, place)
        found = cute.make_rmem_tensor(NUMBERS, Int32)
        for i, x in enumerate(Entry(run.total, run.rows, run.group, run.own_end - run.own.blocks)):
            found[i] = x
        if cute.arch.lane_idx() == 0:
            cute.autovec_copy(found, entries[row, None])


class Planned(SharedCached):
    """Reads the list, and of the lengths those that it needs. The list must be of the very same lengths."""

    def first(self, problem: Problem, place: Place) -> Run:
        return self._run_of(place.row, problem)

    def _list(self, problem: Problem, place: Place) -> List:
        """`merged` asks for it, of no more than 32 sequences."""
        entry, own = self._entry(Int32(0), problem), self._lane(Int32(0), problem)
        own_end = running_sum(own.blocks)
        end = cute.arch.shuffle_sync(own_end, LANES - 1)
        return List(own, own_end, end, Int32(0), entry.total, entry.rows)

    def _run(self, row: Int32, blocks: List, problem: Problem) -> Run:
        return self._run_of(row, problem)

    def _run_of(self, row: Int32, problem: Problem) -> Run:
        total, rows, group, before = self._entry(row, problem)
        own = self._lane(group, problem)
        own_end = before + running_sum(own.blocks)
        end = cute.arch.shuffle_sync(own_end, LANES - 1)
        block, stop = (begin_of(cutlass.min(row + i, rows), total, rows) for i in range(2))
        return Run(block, stop, total, rows, group, end, own, own_end)

    def _entry(self, row: Int32, problem: Problem) -> Entry:
        address = problem.args.plan[0] + Int64(row) * (4 * NUMBERS)
        found = in_registers(
            cute.make_tensor(cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=16), NUMBERS)
        )
        return Entry(*(found[i] for i in range(NUMBERS)))
