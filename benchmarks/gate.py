"""Holds a sweep's ratios to cuDNN against the recorded ones, benchmarks/gates.json. Exit status 1 where a cell fails.

python benchmarks/gate.py SWEEP.json [--gates FILE] [--markdown FILE]    compare; the table goes to stdout too
python benchmarks/gate.py SWEEP.json --update [--gates FILE]             the sweep's ratios become the gates

SWEEP.json comes from `python -m cute_attn.bench --sweep --json SWEEP.json`. A cell fails when it is missing, or when
its ratio (cuDNN's time over ours, medians of one run) is more than 5 % under its gate. Where the files do not serve,
the exit status is 2.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import geometric_mean

from cute_attn.tools.benchmark.gates import BASELINE, PROBLEM, Cell, compare, ratios

ROOT = Path(__file__).parent.parent
GATES = ROOT / "benchmarks" / "gates.json"
MACHINE = ("gpu", "driver", "cuda", "torch", "cudnn", "cutlass_dsl")


def gates(sweep: dict, source: str) -> dict:
    """What gates.json holds: the sweep's ratios, and where they come from. Half a sweep raises ValueError."""
    if not sweep.get("complete"):
        raise ValueError("gates come from a complete sweep, and this one is not")
    conditions = sweep["conditions"]
    facts = {key: conditions[key] for key in ("date", "kernels_sha256", *MACHINE, *PROBLEM)}
    return {"source": source, **facts, "ratio": f"{BASELINE}'s time / ours, p50", "gates": ratios(sweep["records"])}


def cells_of(recorded: dict, sweep: dict) -> list[Cell]:
    """A row per gate, in the gates' order. A sweep of another problem raises ValueError."""
    for key in PROBLEM:
        if sweep["conditions"][key] != recorded[key]:
            raise ValueError(f"{key}: the sweep's is {sweep['conditions'][key]}, the gates' is {recorded[key]}")
    return compare(recorded["gates"], sweep["records"])


def markdown(recorded: dict, sweep: dict, cells: list[Cell]) -> str:
    """The verdict, both runs' conditions, and a table of the cells, failed ones first."""
    failed = [cell for cell in cells if not cell.passed]
    timed = [cell for cell in cells if cell.ratio is not None]
    over = [cell.ratio / cell.gate for cell in timed if cell.ratio]
    lines = [f"### {len(cells) - len(failed)} of {len(cells)} cells hold their gate", ""]
    if over:
        mean = geometric_mean([cell.ratio for cell in timed if cell.ratio])
        lines += [f"{mean:.3f} times as fast as cuDNN (geometric mean), {geometric_mean(over):.3f} of the gates.", ""]
    lines += ["| | " + " | ".join((*MACHINE, "kernels", "date")) + " |", "|---" * (len(MACHINE) + 3) + "|"]
    for name, facts in (("this run", sweep["conditions"]), ("gates", recorded)):
        words = [str(facts[key]) for key in MACHINE] + [facts["kernels_sha256"][:12], facts["date"][:10]]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    lines += ["", "| cell | ours / cuDNN | gate | of gate | |", "|---|---:|---:|---:|---|"]
    for cell in [*failed, *(cell for cell in cells if cell.passed)]:
        now, of_gate = ("-", "-") if cell.ratio is None else (f"{cell.ratio:.3f}", f"{cell.ratio / cell.gate:.3f}")
        lines.append(f"| {cell.name} | {now} | {cell.gate:.3f} | {of_gate} | {cell.verdict} |")
    return "\n".join(lines) + "\n"


def update(sweep: dict, path: Path, gates_file: Path) -> None:
    source = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    gates_file.write_text(json.dumps(gates(sweep, source), indent=1) + "\n")


def check(sweep: dict, recorded: dict, summary: Path | None) -> int:
    """Prints the table, and on stderr the cells that fail; 1 where there are any."""
    cells = cells_of(recorded, sweep)
    table = markdown(recorded, sweep, cells)
    print(table)
    if summary is not None:
        with summary.open("a") as file:
            file.write(table)
    failed = [cell for cell in cells if not cell.passed]
    for cell in failed:
        ratio = "no ratio" if cell.ratio is None else f"{cell.ratio:.3f}"
        print(f"{cell.name}: {cell.verdict} ({ratio}, gate {cell.gate:.3f})", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks/gate.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--gates", type=Path, default=GATES, metavar="FILE", help="default benchmarks/gates.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table to this file")
    parser.add_argument("--update", action="store_true", help="write the gates from the sweep")
    arguments = parser.parse_args(argv)
    try:
        sweep = json.loads(arguments.sweep.read_text())
        if arguments.update:
            update(sweep, arguments.sweep.resolve(), arguments.gates)
            return 0
        return check(sweep, json.loads(arguments.gates.read_text()), arguments.markdown)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
