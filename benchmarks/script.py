"""What the scripts have in common that time groups of rows on a GPU and write one record."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cute_attn.tools.bench import WIDTH, out_file, positive
from cute_attn.tools.benchmark.frame import Groups, Run
from cute_attn.tools.benchmark.implementations import Implementation
from cute_attn.tools.benchmark.machine import no_hopper

RESULTS = Path(__file__).parent / "results"


def main(
    name: str,
    description: str | None,
    groups: Groups,
    argv: Sequence[str] | None = None,
    *,
    make: type[Run] = Run,
    before: Callable[[], Any] = lambda: None,
    baselines: Sequence[Implementation] = (),
    **facts: Any,
) -> int:
    """Runs benchmarks/`name`.py: 0 when all went well, 1 where ours failed or was wrong, 2 without a Hopper GPU.

    Args:
        groups: name -> rows that are timed beside each other.
        make: the run; one of its own where more may fail.
        before: runs before anything is timed.
        baselines: packages whose versions are conditions.
        facts: conditions beside the machine's.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"benchmarks/{name}.py", description=description, formatter_class=formatter)
    parser.add_argument("--out", type=out_file, default=RESULTS / f"{name}.json")
    parser.add_argument("--only", action="append", metavar="WORD", help="groups whose name has this word; repeatable")
    parser.add_argument("--rounds", type=positive, default=make.rounds, metavar="N", help=f"default {make.rounds}")
    arguments = parser.parse_args(argv)
    chosen = {name: rows for name, rows in groups.items() if any(word in name for word in arguments.only or [""])}
    if not chosen:
        parser.error(f"argument --only: no group's name has it; there are {'; '.join(groups)}")
    if reason := no_hopper():
        print(f"benchmarks/{name}.py: a Hopper GPU is needed, and {reason}", file=sys.stderr)
        return 2
    before()
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    run = make(chosen, {"shapes": list(chosen), **facts}, console, arguments.out)
    run.baselines, run.absent, run.rounds = baselines, absent(baselines), arguments.rounds
    return run.run()


def absent(implementations: Iterable[Implementation]) -> dict[str, str]:
    """Why some are not on this machine."""
    return {one.name: reason for one in implementations if (reason := one.absent())}
