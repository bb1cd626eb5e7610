"""What can be said without a Hopper GPU: each kernel compiled for sm_90a, counted, and the bounds that follow."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from ...kernels.config import FwdConfig
from ...plan import plan
from ...problem import Problem
from .. import inspect
from .report import print_facts


def configs(problems: Sequence[Problem]) -> list[FwdConfig]:
    """The kernels that these problems would run, each once."""
    return list(dict.fromkeys(plan(problem) for problem in problems))


def describe(config: FwdConfig) -> dict[str, Any]:
    """The static report of a kernel and its roofline, as the JSON has them; compiles for about 2 s."""
    found = inspect.report(config)
    bounds = inspect.bounds(config, found)
    return {
        **asdict(found),
        "config": repr(config),
        "steady_loop": asdict(found.steady_loop),
        "serialised": found.serialised,
        "problems": found.problems(),
        "bounds": {
            **asdict(bounds),
            "binding": bounds.binding,
            "no_overlap": bounds.no_overlap,
            "ping_pong": bounds.ping_pong,
        },
    }


def print_kernel(console: Console, kernel: dict[str, Any]) -> None:
    k, loop, bound = kernel, kernel["steady_loop"], kernel["bounds"]
    console.print(Text(f"\n{k['name']}", style="bold"))
    units = ", ".join(f"{unit} {bound[unit]:.0f}" for unit in ("mma", "mufu", "issue", "smem"))
    print_facts(
        console,
        {
            "tile": f"{k['tile_m']} x {k['tile_n']}, {k['stages']} stages, {k['smem_bytes']} bytes of shared memory",
            "threads": f"{k['threads']}, {k['warpgroups']} MMA warpgroups and a producer",
            "registers": f"{k['registers_at_launch']} at launch, {k['registers_producer']} producer, "
            f"{k['registers_consumer']} consumer",
            "spills": f"{k['spill_stores']} bytes stored, {k['spill_loads']} loaded, {k['stack_bytes']} of stack",
            "instructions": f"{k['wgmma']} WGMMA, {k['tma_loads']} TMA loads, {k['tma_stores']} TMA stores, "
            f"{k['warpgroup_ops']} WARPGROUP",
            "steady loop": f"{loop['instructions']} instructions: {loop['wgmma']} WGMMA, "
            f"{loop['warpgroup_ops']} WARPGROUP, {loop['mufu']} MUFU, {loop['barriers']} barriers, "
            f"{loop['branches']} branches",
            "bounds": f"cycles per K/V tile: {units}; {bound['binding']} binds",
            "tensor cores": f"at most {bound['ping_pong']:.0%} in use, {bound['no_overlap']:.0%} without overlap",
            "problems": "; ".join(k["problems"]) or "none",
        },
    )
