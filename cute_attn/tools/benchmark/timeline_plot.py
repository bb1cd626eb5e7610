"""The picture of a timeline: a lane for the producer, two for each warpgroup; time in cycles of the SM."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from . import plot
from .timeline import PRODUCER, Span

# Okabe and Ito's colours, as in plot.py; the tensor cores' work above, the other units' below.
COLOURS = {"QK": "#0072B2", "PV": "#56B4E9", "softmax": "#D55E00", "step": "#E5E5E5", "store": "#009E73"}
WORDS = {
    "softmax": "softmax, P to 16 bits",
    "step": "waits for K and its turn",
    "PV": "PV until waited for",
    "store": "epilogue: O to memory",
}
LOADS = {"load q": "#222222", "load k": COLOURS["QK"], "load v": COLOURS["PV"]}
UPPER = ("QK", "PV")
LETTER = 0.12  # inches from one to the next
LOAD = "load"  # the gid of a load's mark and letter
MANY, FEW = 12, 8  # of a tile with more than MANY blocks the first FEW are drawn


def draw(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes a PNG."""
    plot.save(figure_of(spans, title), path)


def figure_of(spans: Sequence[Span], title: str) -> Figure:
    """What `draw` writes: from the producer's first load on, by a clock that starts there."""
    spans = from_first_load(spans)
    warpgroups, end = max(span.role for span in spans), window(spans)
    shown = [span for span in spans if span.start < end]
    with plt.rc_context(plot.FONTS):
        legend = [Patch(color=colour, label=WORDS.get(what, what)) for what, colour in COLOURS.items()]
        page = plot.Page(plot.WIDTH, title, legend, [])
        figure, grid = page.panels([0.3 + 0.66 * (1 + warpgroups)], 1, left=1.05, above=0.0, below=0.42)
        axes = grid[0, 0]
        _finish(axes, warpgroups, end)
        _loads(axes, [span for span in shown if span.role == PRODUCER])
        for span in shown:
            if span.role != PRODUCER:
                _span(axes, span)
    return figure


def from_first_load(spans: Sequence[Span]) -> list[Span]:
    """The same by a clock that starts at the first load, without what ended before it; as they are where none is."""
    first = min((span.start for span in spans if span.role == PRODUCER), default=0)
    return [s._replace(start=max(s.start - first, 0), end=s.end - first) for s in spans if s.end >= first]


def window(spans: Sequence[Span]) -> int:
    """Until the first tile is stored, or a few blocks of it where there are many."""
    stored = [next((s.end for s in spans if (s.role, s.what) == (role, "store")), None) for role in _warpgroups(spans)]
    blocks = [s for s in spans if (s.role, s.what) == (1, "QK")]
    whole = max((end for end in stored if end is not None), default=max(span.end for span in spans))
    first_tile = [s for s in blocks if s.start < whole]
    return whole if len(first_tile) <= MANY else first_tile[FEW].start


def _warpgroups(spans: Sequence[Span]) -> Sequence[int]:
    return sorted({span.role for span in spans} - {PRODUCER})


def _loads(axes: Axes, loads: Sequence[Span]) -> None:
    """A mark where each is issued, and its letter above, moved aside where marks are closer than letters are wide."""
    inches = axes.get_position().width * plot.WIDTH
    letters = spread([span.start for span in loads], LETTER * axes.get_xlim()[1] / inches)
    for span, x in zip(loads, letters, strict=True):
        line = [span.start, span.start, x], [0.3, -0.26, -0.42]
        axes.plot(*line, color=LOADS[span.what], linewidth=1.2, clip_on=False, gid=LOAD)
        axes.text(x, -0.45, span.what[-1].upper(), ha="center", va="bottom", fontsize=8, gid=LOAD)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as keeps neighbours a gap apart: each run of close ones about its mean."""
    runs: list[list[float]] = []  # of places less a gap for each one before
    for i, place in enumerate(places):
        runs.append([place - i * gap])
        while len(runs) > 1 and fmean(runs[-2]) >= fmean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    level = [fmean(run) for run in runs for _ in run]
    return [x + i * gap for i, x in enumerate(level)]


def _span(axes: Axes, span: Span) -> None:
    middle = span.role - 0.2 if span.what in UPPER else span.role + 0.2
    height = 0.18 if span.what == "PV" else 0.36  # PV lies beside the next QK
    width, colour = max(span.end - span.start, 1), COLOURS[span.what]
    axes.barh(middle, width, height, left=span.start, color=colour, edgecolor="white", linewidth=0.4)


def _finish(axes: Axes, warpgroups: int, end: int) -> None:
    axes.set_ylim(warpgroups + 0.5, -0.8)
    axes.set_xlim(0, end)
    names = ["producer:\nissues loads", *(f"warpgroup {i}\nMMA, rest" for i in range(1, warpgroups + 1))]
    axes.set_yticks(range(1 + warpgroups), names, fontsize=9)
    axes.set_xlabel("cycles of the SM since the first load", color=plot.DIM, fontsize=9)
    axes.tick_params(axis="x", colors=plot.DIM, labelsize=8.5, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def title_of(facts: dict[str, Any]) -> str:
    return f"One CTA of {facts['kernel']}, {facts['gpu']}"
