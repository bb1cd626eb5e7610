"""The recorded ratios to cuDNN, gates.json, and whether a run holds them.

A ratio is cuDNN's time over ours, medians of one run. A cell fails when it is missing, or more than 5 % under its gate.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ...problem import Problem
from .implementations import OURS
from .timing import EAGER

GATES = Path(__file__).parents[2] / "gates.json"  # in the repository a link to benchmarks/gates.json
TOLERANCE = 0.05  # of the gate
BASELINE = "cudnn"
PROBLEM = ("dtype", "layout")  # what all cells of a sweep share


class Cell(NamedTuple):
    """A cell's gate and what a run has for it."""

    name: str  # B,H,S,D and the mask
    gate: float
    ratio: float | None  # None: the run has none

    @property
    def passed(self) -> bool:
        return self.ratio is not None and self.ratio >= self.gate * (1 - TOLERANCE)

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "missing"
        return "ok" if self.passed else f"more than {TOLERANCE:.0%} under its gate"


def ratios(records: list[dict]) -> dict[str, float]:
    """Cell -> how many times as fast as cuDNN ours is; without the cells that were not timed, or came out wrong."""
    ours = [r for r in records if (r["contender"], r["mode"], r["reason"]) == (OURS, EAGER, None)]
    timed = [r for r in ours if BASELINE in r["ratios"]]
    return {f"{r['shape']} {'causal' if r['causal'] else 'full'}": round(r["ratios"][BASELINE], 4) for r in timed}


def compare(recorded: dict[str, float], records: list[dict]) -> list[Cell]:
    """A row per recorded cell, in its order."""
    found = ratios(records)
    return [Cell(name, gate, found.get(name)) for name, gate in recorded.items()]


def read(path: Path) -> dict[str, Any]:
    """gates.json; ValueError where it is something else."""
    content = json.loads(path.read_text())
    missing = [key for key in ("gpu", *PROBLEM, "gates") if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"no gates, {', '.join(missing)} missing; benchmarks/gate.py --update writes such a file")
    for name in content["gates"]:
        problem(name, content)
    return content


def problem(name: str, recorded: dict[str, Any]) -> Problem:
    """The problem of a cell, such as "8,32,2048,64 causal"."""
    found = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+) (full|causal)", name)
    if found is None:
        raise ValueError(f"{name!r} is no cell; use B,H,S,D and full or causal")
    batch, heads, seqlen, head_dim = map(int, found.groups()[:4])
    how = recorded["dtype"], recorded["layout"], found[5] == "causal"
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, *how)
