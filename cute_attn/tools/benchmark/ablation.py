"""The ablation: one problem by our own kernels, each with one thing more than the one before, up to the planned one."""

from collections.abc import Callable, Container, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ... import compile, device
from ...kernels.config import FwdConfig
from ...kernels.tile_scheduler import DynamicLongest, OneTile, StaticTiles
from ...plan import plan
from ...problem import Problem
from . import report, static
from .implementations import DEFAULT_BASELINES, CuteAttn, Inputs, Prepared
from .progress import each
from .report import Column, Record
from .timing import EAGER, Call
from .workload import FIELDS, Spec

NAMES = ("one tile per CTA", "multi-stage ring", "persistent", "GEMM/softmax overlap", "tuned plan")
TUNED = NAMES[-1]
BASELINES = ("math", *DEFAULT_BASELINES)


def configs(problem: Problem) -> tuple[FwdConfig, ...]:
    """The kernel of each stage."""
    tuned = plan(problem, device.name())
    kind = tuned.head_dim, tuned.dtype, tuned.layout, tuned.mask
    tile_m, tile_n = 128, 128 if tuned.head_dim <= 128 else 64  # two stages of it fit
    if tuned.head_dim_splits > 1:  # two warpgroups share the rows, with fewer keys at a time
        tile_m, tile_n = tuned.tile_m, tuned.tile_n
    one_tile = FwdConfig(*kind, tile_m, tile_n, stages=1, scheduler=OneTile, pingpong=False, overlap=False)
    ring = replace(one_tile, stages=2)
    persistent = replace(ring, scheduler=DynamicLongest if problem.causal else StaticTiles)
    overlap = replace(persistent, overlap=True, pingpong=True)
    return one_tile, ring, persistent, overlap, tuned


class Stage(CuteAttn):
    """An implementation: the kernel of one stage, from 1 on."""

    def __init__(self, number: int):
        self.number, self.name = number, NAMES[number - 1]

    def config(self, problem: Problem) -> FwdConfig:
        return configs(problem)[self.number - 1]

    def adds(self, problem: Problem) -> str:
        """To the stage before, in a few words."""
        own = self.config(problem)
        if self.number == 1:
            return f"{own.tile_m}x{own.tile_n} tiles; QK, softmax, PV in turn"
        return difference(STAGES[self.number - 2].config(problem), own)

    def prepare(self, inputs):
        return launch(self.config(inputs.problem), inputs)


STAGES = [Stage(i + 1) for i in range(len(NAMES))]


def launch(config: FwdConfig, inputs: Inputs) -> Prepared:
    """The compiled call, as `flash_fwd` makes it."""
    kernel, gpu, bshd = compile.get(config), device.get(inputs.q.device.index), config.layout == "bshd"
    q, k, v = inputs.bshd() if bshd else inputs[:3]
    scale = inputs.problem.head_dim**-0.5

    def run():
        o = torch.empty_like(q)
        kernel(q, k, v, o, 0, gpu.counters(config.counters), scale, gpu.num_sms)
        return o

    return Prepared(Call(run), lambda o: o.transpose(1, 2) if bshd else o)


SCHEDULES = {
    OneTile.name: "a CTA per tile",
    StaticTiles.name: "a CTA per SM, tiles in turn",
    DynamicLongest.name: "a CTA per SM takes tiles by a counter, longest first",
}
# What a choice means, where a stage makes it.
WORDS: dict[str, Callable[[Any], str]] = {
    "stages": lambda n: f"K/V ring of {n} stages" if n > 1 else "one K/V stage",
    "scheduler": lambda scheduler: SCHEDULES.get(scheduler.name, f"tiles {scheduler.name}"),
    "overlap": lambda yes: "PV beside the next softmax" if yes else "PV by itself",
    "pingpong": lambda yes: "ping-pong" if yes else "no ping-pong",
    "q_in_regs": lambda yes: "Q in registers" if yes else "Q in shared memory",
    "cluster": lambda n: f"clusters of {n} share K/V" if n > 1 else "no clusters",
    "q_stages": lambda n: "next Q loaded ahead" if n > 1 else "one Q tile",
    "speculative": lambda yes: "speculative softmax" if yes else "lazy rescaling",
    "split": lambda n: f"keys split over {n} CTAs" if n > 1 else "keys not split",
}


def changed(before: FwdConfig, config: FwdConfig) -> dict[str, Any]:
    """The fields in which a kernel is another than the one before."""
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in own.items() if value != getattr(before, name)}


def difference(before: FwdConfig, config: FwdConfig) -> str:
    """The same in words."""
    choices = changed(before, config)
    tile = [f"{config.tile_m}x{config.tile_n} tiles"] if choices.keys() & {"tile_m", "tile_n"} else []
    rest = [
        WORDS[name](value) if name in WORDS else f"{name} {value}"
        for name, value in choices.items()
        if name not in ("tile_m", "tile_n")
    ]
    return ", ".join(tile + rest) or "the same kernel"


def with_stages(records: list[Record]) -> list[Record]:
    """Adds to a cell's records which stage each is of, and its gain: the time of the stage before over its own."""
    stages = {stage.name: stage for stage in STAGES}
    for record in records:
        record |= dict(stage=None, adds=None, config=None, gain=None)
        stage = stages.get(record["contender"])
        if stage is not None:
            problem = Problem(**{name: record[name] for name in FIELDS})
            config = stage.config(problem)
            before = NAMES[stage.number - 2] if stage.number > 1 else None
            record |= dict(stage=stage.number, adds=stage.adds(problem), kernel=config.name, config=repr(config))
            record["gain"] = record["ratios"].get(before)
    return records


def name(record: Record) -> str:
    """A stage by its number too."""
    return (f"{record['stage']}. " if record["stage"] else "") + report.name(record)


COLUMNS = (
    Column("", name, "left"),
    Column("what it adds", lambda r: r["adds"] or "", "left"),
    Column("p50\nus", lambda r: report.us(r["p50_us"])),
    Column("TFLOPS", lambda r: f"{r['tflops']:.1f}"),
    Column("gain", lambda r: f"{r['gain']:.2f}x" if r["gain"] else "-"),
    Column("x\nbaseline", lambda r: report.ratio(r["x_baseline"])),
    Column("max\nerror", lambda r: report.error(r["max_error"])),
    Column("rel.\nerror", lambda r: report.error(r["relative_error"])),
)


def print_cell(console: Console, records: Sequence[Record], absent: Container[str] = ()) -> None:
    """A row per stage and baseline; then why some have none."""
    report.print_cell(console, records, absent, COLUMNS, bold=TUNED)


def describe(problem: Problem) -> list[Record]:
    """The static report of each stage's kernel; compiles them, for about 3 s each."""
    return [
        static.describe(stage.config(problem))
        | dict(stage=stage.number, contender=stage.name, mode=EAGER, adds=stage.adds(problem))
        for stage in each(STAGES, "stages")
    ]


STATIC_COLUMNS = (
    *COLUMNS[:2],
    Column("instructions\na step", lambda k: str(k["steady_loop"]["instructions"])),
    Column("WGMMA\na step", lambda k: str(k["steady_loop"]["wgmma"])),
    Column("registers\nproducer", lambda k: str(k["registers_producer"])),
    Column("registers\nconsumer", lambda k: str(k["registers_consumer"])),
    Column("shared\nbytes", lambda k: str(k["smem_bytes"])),
    Column("spilled\nbytes", lambda k: str(k["spill_stores"] + k["spill_loads"])),
    Column("problems", lambda k: str(len(k["problems"]) or "none")),
)


def print_static(console: Console, problem: Problem, kernels: Sequence[Record]) -> None:
    """A row per stage; then what is wrong with some."""
    console.print(Text(f"\n{report.title(Spec(problem).facts())}", style="bold"))
    for table in report.fitting(console, STATIC_COLUMNS, kernels, bold=TUNED):
        console.print(table)
    for kernel in kernels:
        for text in kernel["problems"]:
            console.print(Text(f"  {name(kernel)}: {text}"), soft_wrap=True)
