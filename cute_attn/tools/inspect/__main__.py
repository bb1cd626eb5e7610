"""`python -m cute_attn.inspect`: what the kernel of a shape is made of. Compiles for sm_90a; needs no GPU.

    python -m cute_attn.inspect --shape 16,16,2048,64 --causal
    python -m cute_attn.inspect --shape 16,16,2048,128 --sass | less
    python -m cute_attn.inspect --shape 16,16,512,128 --timeline timeline.png    # on a Hopper GPU

Needs `pip install "cute_attn[bench]"`.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from itertools import pairwise

try:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError:
    raise SystemExit('python -m cute_attn.inspect: rich is missing; pip install "cute_attn[bench]"') from None

from ...checks import DTYPES, LAYOUTS
from ...kernels.config import FwdConfig
from ...plan import Step, changes, explain, plan
from ...problem import Problem
from .. import audit, inspect
from ..bench import WIDTH, asked, head_dim, out_file, png, positive, sizes
from ..benchmark import machine, static
from ..benchmark.report import print_facts, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """0 for a healthy kernel, 1 for problems or a branch that nothing explains, 2 for bad arguments."""
    args, problem = parse(argv)
    if args.timeline is not None:
        return timeline(args, problem)
    config = plan(problem)
    try:
        if args.sass or args.ptx:
            return write((inspect.sass if args.sass else inspect.ptx)(config))
        console = Console(width=None if sys.stdout.isatty() else max(WIDTH, Console().width), highlight=False)
        print_plan(console, explain(problem))
        return show(console, config)
    except FileNotFoundError as error:  # nvdisasm; it says how to get it
        print(error, file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m cute_attn.inspect", description="Inspect the kernel of a shape.")
    add = p.add_argument
    add("--shape", type=sizes, required=True, metavar="B,H,S,D", help="such as 16,16,2048,64")
    add("--kv-heads", type=positive, metavar="N", help="heads of k and v; default H")
    add("--seqlen-k", type=positive, metavar="N", help="rows of k and v; default S")
    add("--head-dim-v", type=head_dim, metavar="N", help="of v and o; default D")
    add("--causal", action="store_true", help="with the causal mask")
    add("--dtype", choices=tuple(DTYPES.values()), default="bf16", help="default bf16")
    add("--layout", choices=LAYOUTS, default="bshd", help="order of the inputs in memory; default bshd")
    add("--constant-time", action="store_true", help="the kernel in which no branch depends on a score")
    code = p.add_mutually_exclusive_group()
    code.add_argument("--sass", action="store_true", help="the machine code instead, as nvdisasm writes it")
    code.add_argument("--ptx", action="store_true", help="the PTX instead")
    code.add_argument("--timeline", type=png, metavar="F.png", help="on a GPU: when one CTA's warpgroups do what")
    add("--json", type=out_file, metavar="FILE", help="the timeline's spans, in cycles")
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Problem]:
    """The arguments and the problem that they name; exits with 2 on bad ones, naming the argument."""
    p = parser()
    args = p.parse_args(argv)
    if args.json is not None and args.timeline is None:
        p.error("argument --json: it takes what --timeline draws; give both")
    if args.timeline is not None and importlib.util.find_spec("matplotlib") is None:
        p.error('argument --timeline: matplotlib is missing; pip install "cute_attn[bench]"')
    return args, asked(p, args, args.shape, args.causal)._replace(constant_time=args.constant_time)


def timeline(args: argparse.Namespace, problem: Problem) -> int:
    """Runs the kernel that notes its times, and draws them; 1 without a Hopper GPU."""
    reason = machine.no_hopper()
    if reason is not None:
        print(f"--timeline: a kernel must run for it, and {reason}", file=sys.stderr)
        return 1
    from ..benchmark import timeline, timeline_plot

    spans = timeline.spans(timeline.record(problem))
    facts = machine.conditions(machine.Nvml())
    facts |= dict(kernel=timeline.timeline_config(problem, facts["gpu"]).name, problem=problem._asdict())
    timeline_plot.draw(args.timeline, spans, timeline_plot.title_of(facts))
    if args.json is not None:
        write_json(args.json, dict(facts, spans=[span._asdict() for span in spans]))
    return 0


def write(text: str) -> int:
    """To stdout as it is; a reader may leave early, as `head` does."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
    return 0


def show(console: Console, config: FwdConfig) -> int:
    """The report and the audit of a kernel; 1 if either finds fault."""
    kernel, branches = static.describe(config), audit.audit(config)
    static.print_kernel(console, kernel)
    print_facts(console, {"config": kernel["config"]})
    print_audit(console, branches)
    unknown = any(branch.depends == audit.UNKNOWN for branch in branches)
    return 1 if kernel["problems"] or unknown else 0


def print_plan(console: Console, steps: Sequence[Step]) -> None:
    """The rules and exceptions that led to the kernel, and the fields that each of them changed."""
    console.print(Text("\nplan", style="bold"))
    table = Table("rule", "change", "why", box=box.SIMPLE)
    table.add_row(steps[0].name, steps[0].config.name.removeprefix("flash_fwd_sm90_"), steps[0].why)
    for before, step in pairwise(steps):
        changed = changes(before.config, step.config)
        table.add_row(
            step.name, Text(", ".join(f"{name} {_word(new)}" for name, (_, new) in changed.items())), step.why
        )
    console.print(table)


def _word(value) -> str:
    """A field's value; a scheduler, which is a class, by its name."""
    return str(getattr(value, "name", value) if isinstance(value, type) else value)


def print_audit(console: Console, branches: Sequence[audit.Branch]) -> None:
    first = audit.BARRIER, audit.THREAD, audit.SOFTCAP, audit.SLOW_STEP
    kinds = *first, audit.TRIP_COUNT, audit.LAZY_RESCALE, audit.OVERFLOW_CHECK, audit.UNKNOWN
    counts = ", ".join(f"{sum(branch.depends == kind for branch in branches)} {kind}" for kind in kinds)
    console.print(Text("\ncontrol flow of the steady loop, its polling included", style="bold"))
    print_facts(console, {"branches": counts})
    table = Table("address", "depends on", "branch", "last writer of its predicate", box=box.SIMPLE)
    for branch in branches:
        style = "bold red" if branch.depends == audit.UNKNOWN else ""
        writers = "\n".join(branch.writers) or "none"
        table.add_row(f"{branch.address:#x}", Text(branch.depends, style=style), Text(branch.text), Text(writers))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
