"""Which kernels a tune tries, and what is known of them before any is timed."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from ... import compile
from ...kernels.config import REGISTERS, FwdConfig
from ...tuned import MASKS, SCHEDULERS, Key, Row
from .. import inspect

LAYOUT = "bshd"  # of the timed tensors; both layouts have the same machine code
TILE_M, TILE_N = (128, 192, 256), range(48, 257, 16)
STAGES, Q_STAGES = (2, 3, 4), (1, 2)
PATHS = (  # of Q to the MMAs, and of S to P
    dict(q_in_regs=False, speculative=False),
    dict(q_in_regs=True, speculative=False),
    dict(q_in_regs=False, speculative=True),
)
SPARE_REGISTERS = 24  # ptxas spilled wherever 24 or fewer of a thread's registers were left, nowhere with 28 (CUDA 13)


class Verdict(NamedTuple):
    """problems: why the kernel is not timed, in words; None: nvdisasm is missing, and nobody has looked."""

    problems: tuple[str, ...] | None

    @property
    def usable(self) -> bool:
        return not self.problems


def candidates(key: Key, incumbents: Iterable[FwdConfig], wide: bool = False) -> list[FwdConfig]:
    """The incumbents of a class, then what may beat them; as rows have them, so type and layout are the defaults.

    One step each way: every tile, every depth of the rings, and every combination of the other choices, with an
    incumbent's rest. A next tune starts from what this one finds. `wide` is the whole product.
    """
    head_dim, causal, _ = key
    incumbents = list(dict.fromkeys(incumbents))
    tiles = [dict(tile_m=m, tile_n=n) for m, n in product(TILE_M, TILE_N)]
    rings = [dict(stages=stages, q_stages=q_stages) for stages, q_stages in product(STAGES, Q_STAGES)]
    choices = [
        dict(**path, pingpong=pingpong, **grid)
        for path, pingpong, grid in product(PATHS, (True, False), _grids(causal))
    ]
    base = FwdConfig(head_dim, mask=MASKS[causal], tile_n=48)
    found = [_config(base, a | b | c) for a, b, c in product(tiles, rings, choices)] if wide else []
    for one in incumbents:
        found += [_config(one, fields) for fields in [*tiles, *rings, *choices]]
    return list(dict.fromkeys([*incumbents, *(c for c in found if c is not None and registers_left(c) >= 0)]))


def _grids(causal: bool) -> list[dict[str, Any]]:
    """How CTAs come by their tiles."""
    static, dynamic = (dict(scheduler=SCHEDULERS[name], cluster=1) for name in ("static", "drawn"))
    return [static, dynamic, (dynamic if causal else static) | dict(cluster=2)]


def _config(base: FwdConfig, fields: dict[str, Any]) -> FwdConfig | None:
    try:
        return replace(base, **fields)
    except AssertionError:
        return None


def registers_left(config: FwdConfig) -> int:
    """Of an MMA warpgroup's thread, beside O, a block's scores and P, Q where it stays, and what all else takes.

    A model that saves compiling what spills; where it lets a kernel pass, ptxas has the last word.
    """
    return (REGISTERS[config.warpgroups] or (255, 255))[1] - config.registers_held - SPARE_REGISTERS


def of_type(config: FwdConfig, dtype: str) -> FwdConfig:
    """The kernel that is timed for a row's."""
    return replace(config, dtype=dtype, layout=LAYOUT)


def incumbents(rows: Iterable[Row]) -> list[FwdConfig]:
    """The kernels of a class but those for few tiles, which are not on trial."""
    return list(dict.fromkeys(row.config for row in rows if not row.max_row_blocks))


def judge(config: FwdConfig, store: bool) -> Verdict:
    """In a process of its own: compile, look at the machine code, and `store` the kernel for `compile.get`."""
    try:
        problems = _problems(config)
        if store and not problems:
            compile.store(config)
    except Exception as error:  # the compiler may fail in any way, and the other candidates are still tried
        return Verdict((f"does not compile ({type(error).__name__}: {str(error)[:200]})",))
    return Verdict(problems)


def _problems(config: FwdConfig) -> tuple[str, ...] | None:
    try:
        return tuple(inspect.report(config).problems())
    except FileNotFoundError:  # nvdisasm
        return None


def judge_all(
    configs: Sequence[FwdConfig], store: bool, step: Callable[[], Any] = lambda: None, workers: int | None = None
) -> dict[FwdConfig, Verdict]:
    """A verdict on each; in parallel processes, since the DSL compiles in one thread of a process only."""
    workers = workers or min(len(configs), len(os.sched_getaffinity(0)))
    found: dict[FwdConfig, Verdict] = {}
    with _pool(workers) as pool:
        futures = {pool.submit(judge, config, store): config for config in configs}
        try:
            for future in as_completed(futures):
                verdict = _result(future)
                if verdict is not None:
                    found[futures[future]] = verdict
                    step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for config in configs:
        if config not in found:  # the pool broke: whoever breaks a pool of its own was it
            with _pool(1) as pool:
                found[config] = _result(pool.submit(judge, config, store)) or Verdict(("the compiler's process died",))
            step()
    return {config: found[config] for config in configs}


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(workers, 1), mp_context=multiprocessing.get_context("spawn"))


def _result(future: Future) -> Verdict | None:
    """None where a process of the pool died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None
