"""What scripts have in common that time something on a GPU and write one record."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cute_attn.tools.bench import out_file
from cute_attn.tools.benchmark.machine import no_hopper

RESULTS = Path(__file__).parent / "results"


def record_of(name: str, description: str | None, argv: Sequence[str] | None) -> Path:
    """The file for the record of benchmarks/`name`.py, which takes `--out` alone.

    Raises:
        SystemExit: with 2, where arguments are bad or there is no Hopper GPU.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=out_file, default=RESULTS / f"{name}.json")
    arguments = parser.parse_args(argv)
    if reason := no_hopper():
        print(f"benchmarks/{name}.py: a Hopper GPU is needed, and {reason}", file=sys.stderr)
        raise SystemExit(2)
    return arguments.out
