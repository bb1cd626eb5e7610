"""The plot of a run: TFLOPS over the sequence length, a panel per head dim and mask; bars for a few single shapes."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import report
from .implementations import OURS
from .timing import EAGER

Record = dict[str, Any]
# Okabe and Ito's colours, which colour-blind readers tell apart too; each also has a marker of its own.
STYLE = {
    OURS: ("#D55E00", "o"),
    "cudnn": ("#009E73", "s"),
    "flash": ("#CC79A7", "v"),
    "fa3": ("#0072B2", "^"),
    "fa4": ("#56B4E9", "D"),
    "efficient": ("#E69F00", "P"),
    "math": ("#666666", "X"),
}
NAMES = {
    "cudnn": "cuDNN",
    "flash": "FlashAttention-2 (torch's)",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "efficient": "torch's efficient",
    "math": "torch's unfused",
}
INK, DIM, FAINT = "#222222", "#666666", "#999999"
WIDTH, DPI = 8.3, 160  # inches: README shows an inch as 100 of its pixels, so that 8 points are 11
FONTS: Any = {"font.size": 10, "axes.labelsize": 9, "text.color": INK}
CUBLAS_LINE: dict[str, Any] = {"color": FAINT, "linestyle": ":", "linewidth": 1.4}


def draw(path: Path, records: Sequence[Record], conditions: dict[str, Any], baselines: Record | None = None) -> None:
    """Writes a PNG; records without a time are left out.

    baselines: the content of a baselines file, for a FlashAttention-3 that the run lacks.
    """
    save(figure_of(records, conditions, baselines), path)


def figure_of(records: Sequence[Record], conditions: dict[str, Any], baselines: Record | None = None) -> Figure:
    """What `draw` writes: a panel per head dim and mask, or bars; the legend above, notes below."""
    timed = [record for record in records if record["tflops"] is not None]
    scaled = report.by_ratio(timed, baselines, "fa3") if baselines is not None else []
    shown = [*timed, *scaled]
    panels: dict[tuple, list[Record]] = {}
    for record in shown:
        panels.setdefault(_panel(record), []).append(record)
    over_seqlen = any(len({record["seqlen_q"] for record in panel}) > 1 for panel in panels.values())
    cublas = conditions.get("cublas_tflops")
    notes = [*_power(shown, conditions), *(_source(baselines, "fa3") if baselines is not None and scaled else [])]
    with plt.rc_context(FONTS | {"axes.spines.top": False, "axes.spines.right": False}):
        handles = [*_handles(shown, bars=not over_seqlen), *_cublas_handle(cublas)]
        dtypes = ", ".join(sorted({record["dtype"] for record in shown}))
        title = f"Attention forward, {conditions.get('gpu')}, {dtypes}, {_date(conditions)}"
        figure = _lines(panels, title, handles, notes) if over_seqlen else _bars(shown, title, handles, notes)
        for axes in figure.axes:
            _finish(axes, cublas)
    return figure


ABLATION = ("#FBDCC4", "#F6BC93", "#EE975F", "#E37A33", STYLE[OURS][0])  # from the first stage to the planned kernel
BASELINE_WORDS = {
    "math": "torch's unfused attention",
    "cudnn": "NVIDIA's, through torch",
    "flash": "FlashAttention-2, through torch",
    "efficient": "xFormers' kernel, through torch",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
}
CAPTIONS = 3.0  # inches left of the bars
CAPTION_CHARACTERS = 50  # a line of what a stage adds


def draw_ablation(path: Path, records: Sequence[Record], conditions: dict[str, Any]) -> None:
    """A bar per stage, then one per baseline; a panel per cell. Writes a PNG."""
    save(ablation_figure(records, conditions), path)


def ablation_figure(records: Sequence[Record], conditions: dict[str, Any]) -> Figure:
    """What `draw_ablation` writes."""
    cells: dict[str, list[Record]] = {}
    for record in records:
        if record["tflops"] is not None and record["mode"] == EAGER:
            cells.setdefault(report.title(record), []).append(record)
    shown, cublas = [record for cell in cells.values() for record in cell], conditions.get("cublas_tflops")
    lines = max(len(_caption(record)[1]) for record in shown)
    pitch = (NAME_POINTS + LINE_POINTS * lines + 4) / 72
    heights = [pitch * (max(_places(cell)) + 1.0) for cell in cells.values()]
    with plt.rc_context(FONTS):
        title = f"The ladder: attention forward, {conditions.get('gpu')}, {_date(conditions)}"
        notes = ["Beside TFLOPS: the time of the stage before over the stage's own.", *_power(shown, conditions)]
        page = Page(WIDTH, title, _cublas_handle(cublas), notes)
        figure, grid = page.panels(heights, 1, left=CAPTIONS, above=0.3, below=0.45)
        for axes, (name, cell) in zip(grid[:, 0], cells.items(), strict=True):
            _rungs(axes, cell, cublas)
            axes.annotate(name, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=10)
    return figure


def _places(cell: Sequence[Record]) -> list[float]:
    """Of its bars, from the top: the stages, a gap, the baselines."""
    stages = sum(1 for record in cell if record["stage"])
    return [*range(stages), *(stages + 0.45 * bool(stages) + i for i in range(len(cell) - stages))]


def _rungs(axes: Axes, cell: Sequence[Record], cublas: float | None) -> None:
    """Stages from top to bottom, a gap, baselines by speed; each bar with its TFLOPS and gain."""
    stages = [record for record in cell if record["stage"]]
    baselines = sorted((record for record in cell if not record["stage"]), key=lambda record: record["tflops"])
    places = _places(cell)
    most = max(cublas or 0, *(record["tflops"] for record in cell))
    axes.set_ylim(max(places) + 0.5, -0.5)
    axes.set_xlim(0, 1.08 * most)
    for y, record in zip(places, [*stages, *baselines], strict=True):
        _rung(axes, y, record)
    if cublas:
        axes.axvline(cublas, **CUBLAS_LINE, zorder=1)
    axes.set_yticks([])
    axes.set_xlabel("TFLOPS", color=DIM, fontsize=9)
    axes.tick_params(axis="x", colors=DIM, labelsize=8.5, length=0)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


NAME_POINTS, LINE_POINTS = 13.0, 10.5  # heights of a caption's lines


def _caption(record: Record) -> tuple[str, list[str]]:
    """Who a bar is, and what it adds, in lines."""
    name, stage = record["contender"], record["stage"]
    words = record["adds"] if stage else BASELINE_WORDS.get(name, "")
    return f"{stage}. {name}" if stage else name, textwrap.wrap(words, CAPTION_CHARACTERS)


def _rung(axes: Axes, y: float, record: Record) -> None:
    """A bar, who it is on the left, what it reaches in it, or beside it where it is short."""
    implementation, stage, tflops = record["contender"], record["stage"], record["tflops"]
    colour = ABLATION[stage - 1] if stage else _colour(implementation)
    axes.barh(y, tflops, 0.74, color=colour, zorder=2)
    name, words = _caption(record)
    top = (NAME_POINTS + LINE_POINTS * len(words)) / 2
    how: dict[str, Any] = dict(xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right", va="top")
    axes.annotate(name, (0, y), (-8, top), weight="bold" if stage else "normal", **how)
    axes.annotate("\n".join(words), (0, y), (-8, top - NAME_POINTS), color=DIM, fontsize=8, linespacing=1.15, **how)
    inside = tflops > 0.25 * axes.get_xlim()[1]
    ink = _ink_on(colour) if inside else INK
    at: dict[str, Any] = dict(va="center", textcoords="offset points", color=ink, zorder=3)
    at |= dict(xytext=(-6, 0), ha="right") if inside else dict(xytext=(6, 0), ha="left")
    number = axes.annotate(f"{tflops:.0f}", (tflops, y), weight="bold", **at)
    if record["gain"]:
        side = (0, 0.5) if inside else (1, 0.5)
        axes.annotate(f"{record['gain']:.2f}x", side, xycoords=number, fontsize=9, **at)


def _ink_on(colour: str) -> str:
    """White on dark colours."""
    red, green, blue = (c**2.2 for c in to_rgb(colour))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


class Page:
    """A figure of fixed width: the title on top, the legend below it, panels, then notes. Sizes are in inches."""

    LINE, LEGEND_ROW = 0.155, 0.22
    RIGHT = 0.28  # of the panels: half of a tick's label

    def __init__(self, width: float, title: str, handles: Sequence[Artist], notes: Sequence[str]):
        self.width, self.title, self.handles = width, title, handles
        self.notes = [line for note in notes for line in textwrap.wrap(note, int((width - 0.2) / 0.058))]
        self.columns = _legend_columns(width, [str(handle.get_label()) for handle in handles])
        rows = math.ceil(len(handles) / self.columns) if handles else 0
        self.head = 0.38 + self.LEGEND_ROW * rows
        self.foot = self.LINE * len(self.notes) + 0.1

    def panels(
        self, heights: Sequence[float], columns: int, *, left: float, above: float, below: float, between: float = 0.0
    ) -> tuple[Figure, Any]:
        """The figure and its axes, a row for each of heights with room above it and below; shares y along a row."""
        height = self.head + sum(heights) + len(heights) * (above + below) + self.foot
        figure = Figure(figsize=(self.width, height))
        FigureCanvasAgg(figure)
        width = (self.width - left - self.RIGHT - between * (columns - 1)) / columns
        grid = np.empty((len(heights), columns), object)
        top = height - self.head
        for i, own in enumerate(heights):
            bottom = top - above - own
            for j in range(columns):
                x = left + j * (width + between)
                box = (x / self.width, bottom / height, width / self.width, own / height)
                grid[i, j] = figure.add_axes(box, sharey=grid[0, 0] if columns > 1 else None)
            top = bottom - below
        self._words(figure, height)
        return figure, grid

    def _words(self, figure: Figure, height: float) -> None:
        size = min(12.0, self.width * 72 / (0.74 * len(self.title)))  # bold letters are 0.7 of it wide
        figure.suptitle(self.title, y=1 - 0.08 / height, va="top", fontsize=size, weight="bold")
        if self.handles:
            place: dict[str, Any] = dict(loc="upper center", bbox_to_anchor=(0.5, 1 - 0.36 / height), borderaxespad=0)
            look: dict[str, Any] = dict(frameon=False, fontsize=9, columnspacing=1.4, handletextpad=0.5, borderpad=0)
            figure.legend(handles=list(self.handles), ncols=self.columns, **place, **look)
        for i, line in enumerate(reversed(self.notes)):
            figure.text(0.1 / self.width, (0.08 + self.LINE * i) / height, line, fontsize=8, color=DIM, va="bottom")


def _legend_columns(width: float, labels: Sequence[str]) -> int:
    """As many as fit, by the longest label of each; the legend goes down a column, then on to the next."""
    for columns in range(len(labels), 1, -1):
        longest = [max(map(len, part)) for part in np.array_split(np.array(labels, object), columns)]
        if sum(0.55 + 0.0715 * n for n in longest) < width - 0.1:
            return columns
    return 1


def save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png", facecolor="white")
    path.write_bytes(png.getvalue())


def _date(conditions: dict[str, Any]) -> str:
    return str(conditions.get("date") or "")[:10]


def _power(records: Sequence[Record], conditions: dict[str, Any]) -> list[str]:
    """Why ours may stand above cuBLAS's line: where it does, and the sensors say that cuBLAS is at the power limit."""
    cublas, watts, mhz, limit = (
        conditions.get(key) for key in ("cublas_tflops", "cublas_watts", "cublas_sm_mhz", "power_limit_watts")
    )
    ours = [r for r in records if r["mode"] == EAGER and (r["contender"] == OURS or r.get("stage"))]
    best = max(ours, key=lambda record: record["tflops"], default=None)
    if not (cublas and watts and mhz and limit and best) or best["tflops"] <= cublas or watts < 0.95 * limit:
        return []
    words = (
        f"Why ours may stand above cuBLAS's line: power ({limit:.0f} W), not the tensor cores, limits a steady 8192³ "
        f"product: the clock falls until the power fits, so less energy per FLOP is more TFLOPS. cuBLAS: "
        f"{watts:.0f} W at {mhz:.0f} MHz"
    )
    if best["watts"] and best["sm_mhz"]:
        words += f"; ours at {best['shape']}: {best['watts']:.0f} W at {best['sm_mhz']:.0f} MHz"
    return [words + "."]


def _source(baselines: Record, name: str) -> list[str]:
    """Where a line comes from that this run did not measure."""
    what, gpu = (
        str(text or "?").split(" (")[0] for text in (baselines.get("peers", {}).get(name), baselines.get("gpu"))
    )
    date = _date(baselines)
    return [
        f"{NAMES[name]} ({what}) is not of this run: its line is this run's cuDNN times their ratio in a run of {date} "
        f"on one {gpu}."
    ]


def _panel(record: Record) -> tuple:
    """(column, row)"""
    return (record["head_dim"], record["heads"], record["heads_kv"]), record["causal"]


def _lines(panels: dict[tuple, list[Record]], title: str, handles: Sequence[Artist], notes: Sequence[str]) -> Figure:
    columns, rows = sorted({column for column, _ in panels}), sorted({row for _, row in panels})
    page = Page(max(WIDTH, 0.6 + 2.5 * len(columns)), title, handles, notes)
    figure, grid = page.panels([1.85] * len(rows), len(columns), left=0.6, above=0.26, below=0.42, between=0.14)
    for i, causal in enumerate(rows):
        for j, column in enumerate(columns):
            axes, records = grid[i][j], panels.get((column, causal), [])
            _panel_lines(axes, records)
            head_dim, heads, heads_kv = column
            kv = "" if heads == heads_kv else f", K/V {heads_kv}"
            axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'} ({heads} heads{kv})", fontsize=9)
            axes.tick_params(labelsize=8, labelleft=j == 0)
            axes.set_xlabel("sequence length" if i == len(rows) - 1 else "", labelpad=2)
            axes.set_ylabel("TFLOPS" if j == 0 else "")
    return figure


def _panel_lines(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_xscale("log", base=2)
    seqlens = sorted({record["seqlen_q"] for record in records})
    axes.set_xticks(seqlens, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in seqlens])
    axes.minorticks_off()
    for key in _keys(records):
        line = sorted((r["seqlen_q"], r["tflops"]) for r in records if (r["contender"], r["mode"]) == key)
        axes.plot(*zip(*line, strict=True), **_line_style(*key))


def _bars(records: Sequence[Record], title: str, handles: Sequence[Artist], notes: Sequence[str]) -> Figure:
    cells = list(dict.fromkeys(_cell(record) for record in records))
    keys = _keys(records)
    page = Page(max(WIDTH, 1.5 + 0.75 * len(cells) * len(keys)), title, handles, notes)
    figure, grid = page.panels([3.2], 1, left=0.6, above=0.1, below=0.6)
    axes, width = grid[0, 0], 0.84 / max(len(keys), 1)
    for i, (implementation, mode) in enumerate(keys[::-1]):
        own = {_cell(r): r["tflops"] for r in records if (r["contender"], r["mode"]) == (implementation, mode)}
        x = [cells.index(cell) + (i - (len(keys) - 1) / 2) * width for cell in own]
        colour = _colour(implementation)
        hatch = None if mode == EAGER else "///"
        bars = axes.bar(x, list(own.values()), width * 0.9, color=colour, hatch=hatch, edgecolor="white", zorder=2)
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
    axes.set_xticks(range(len(cells)), cells)
    axes.set_ylabel("TFLOPS")
    axes.tick_params(axis="x", length=0)
    return figure


def _cell(record: Record) -> str:
    r = record
    kv = "" if r["heads"] == r["heads_kv"] else f", K/V {r['heads_kv']}"
    keys = "" if r["seqlen_q"] == r["seqlen_k"] else f", K/V {r['seqlen_k']}"
    mask = "causal" if r["causal"] else "full"
    return f"B {r['batch']}, H {r['heads']}{kv}\nS {r['seqlen_q']}{keys}, D {r['head_dim']}\n{mask}"


def _keys(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(implementation, mode) in the order to draw: eager over graph, ours on top. Legend and bars have it reversed."""
    keys = dict.fromkeys((record["contender"], record["mode"]) for record in reversed(records))
    return sorted(keys, key=lambda key: (key[1] == EAGER, key[0] == OURS))


def _colour(implementation: str) -> str:
    return STYLE.get(implementation, (INK, "."))[0]


def _line_style(implementation: str, mode: str) -> dict[str, Any]:
    colour, marker = STYLE.get(implementation, (INK, "."))
    ours = implementation == OURS
    return {
        "color": colour,
        "marker": marker,
        "linestyle": "-" if mode == EAGER else "--",
        "markerfacecolor": colour if mode == EAGER else "white",
        "linewidth": 2.6 if ours else 1.6,
        "markersize": 6.5 if ours else 5,
        "zorder": 3 if ours else 2,
    }


def _finish(axes: Axes, cublas: float | None) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    if cublas:
        axes.axhline(cublas, **CUBLAS_LINE, zorder=1)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * (cublas or 0)))


def _handles(records: Sequence[Record], bars: bool) -> list[Artist]:
    """A sample of each line, or bar, with its name."""
    handles: list[Artist] = []
    for implementation, mode in _keys(records)[::-1]:
        style = _line_style(implementation, mode)
        if bars:
            style |= {"linestyle": "", "marker": "s", "markersize": 9, "markeredgecolor": style["color"]}
        name = NAMES.get(implementation, implementation)
        handles.append(Line2D([], [], label=name if mode == EAGER else f"{name}, {mode}", **style))
    return handles


def _cublas_handle(cublas: float | None) -> list[Artist]:
    return [Line2D([], [], label=f"cuBLAS bf16 8192³, settled: {cublas:.0f}", **CUBLAS_LINE)] if cublas else []
