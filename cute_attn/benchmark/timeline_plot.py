"""The picture of a timeline: a lane for the producer, two for each warpgroup; time in cycles of the SM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .plot import FAINT, INK
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
MANY, FEW = 12, 8  # of a tile with more than MANY blocks the first FEW are drawn


def draw(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes a PNG."""
    warpgroups = max(span.role for span in spans)
    end = window(spans)
    shown = [span for span in spans if span.start < end]
    with plt.rc_context({"font.size": 10, "text.color": INK}):
        figure = plt.figure(figsize=(11.5, 1.5 + 0.72 * (1 + warpgroups)), layout="constrained")
        axes = figure.subplots()
        _loads(axes, [span for span in shown if span.role == PRODUCER], end)
        for span in shown:
            if span.role != PRODUCER:
                _span(axes, span)
        _finish(axes, warpgroups, end)
        figure.suptitle(title, fontsize=12, weight="bold")
        legend = [Patch(color=colour, label=WORDS.get(what, what)) for what, colour in COLOURS.items()]
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def window(spans: Sequence[Span]) -> int:
    """Until the first tile is stored, or a few blocks of it where there are many."""
    stored = [next((s.end for s in spans if (s.role, s.what) == (role, "store")), None) for role in _warpgroups(spans)]
    blocks = [s for s in spans if (s.role, s.what) == (1, "QK")]
    whole = max((end for end in stored if end is not None), default=max(span.end for span in spans))
    first_tile = [s for s in blocks if s.start < whole]
    return whole if len(first_tile) <= MANY else first_tile[FEW].start


def _warpgroups(spans: Sequence[Span]) -> Sequence[int]:
    return sorted({span.role for span in spans} - {PRODUCER})


def _loads(axes: Axes, loads: Sequence[Span], end: int) -> None:
    """A mark where each is issued, with its letter where there is room."""
    last = -end
    for span in loads:
        axes.plot([span.start, span.start], [-0.3, 0.3], color=LOADS[span.what], linewidth=1.4)
        if span.start - last > 0.012 * end:
            last = span.start
            axes.text(span.start, -0.34, span.what[-1].upper(), ha="center", va="bottom", fontsize=7)


def _span(axes: Axes, span: Span) -> None:
    middle = span.role - 0.2 if span.what in UPPER else span.role + 0.2
    height = 0.18 if span.what == "PV" else 0.36  # PV lies beside the next QK
    width, colour = max(span.end - span.start, 1), COLOURS[span.what]
    axes.barh(middle, width, height, left=span.start, color=colour, edgecolor="white", linewidth=0.4)


def _finish(axes: Axes, warpgroups: int, end: int) -> None:
    axes.set_ylim(warpgroups + 0.55, -0.75)
    axes.set_xlim(-0.01 * end, end)
    names = ["producer:\nTMA loads", *(f"warpgroup {i}\nMMA, rest" for i in range(1, warpgroups + 1))]
    axes.set_yticks(range(1 + warpgroups), names, fontsize=9)
    axes.set_xlabel("cycles of the SM", color=FAINT, fontsize=9)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8.5, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def title_of(facts: dict[str, Any]) -> str:
    return f"One CTA of {facts['kernel']}, {facts['gpu']}"
