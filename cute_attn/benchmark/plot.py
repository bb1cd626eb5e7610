"""The plot of a run: TFLOPS over the sequence length, a panel per head dim and mask; bars for a few single shapes."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .cells import EAGER
from .contenders import OURS
from .report import title

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
INK, FAINT = "#222222", "#999999"


def draw(path: Path, records: Sequence[Record], conditions: dict[str, Any]) -> None:
    """Writes a PNG; records without a time are left out."""
    timed = [record for record in records if record["tflops"] is not None]
    panels: dict[tuple, list[Record]] = {}
    for record in timed:
        panels.setdefault(_panel(record), []).append(record)
    over_seqlen = any(len({record["seqlen_q"] for record in panel}) > 1 for panel in panels.values())
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}):
        figure = _lines(panels) if over_seqlen else _bars(timed)
        cublas = conditions.get("cublas_tflops")
        for axes in figure.axes:
            _finish(axes, cublas)
        _words(figure, timed, conditions, bars=not over_seqlen)
        _save(figure, path)


LADDER = ("#FBDCC4", "#F6BC93", "#EE975F", "#E37A33", STYLE[OURS][0])  # from the first stage to the planned kernel
PEER_WORDS = {
    "math": "torch's unfused attention",
    "cudnn": "NVIDIA's, through torch",
    "flash": "FlashAttention-2, through torch",
    "efficient": "xFormers' kernel, through torch",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
}


def draw_ladder(path: Path, records: Sequence[Record], conditions: dict[str, Any]) -> None:
    """A bar per stage, then one per peer; a panel per cell. Writes a PNG."""
    cells: dict[str, list[Record]] = {}
    for record in records:
        if record["tflops"] is not None and record["mode"] == EAGER:
            cells.setdefault(title(record), []).append(record)
    heights = [1.1 + 0.52 * len(cell) for cell in cells.values()]
    with plt.rc_context({"font.size": 10, "text.color": INK}):
        figure = plt.figure(figsize=(9.6, sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(cells), 1, height_ratios=heights, squeeze=False)
        for axes, (name, cell) in zip(grid[:, 0], cells.items(), strict=True):
            _rungs(axes, cell, conditions.get("cublas_tflops"))
            axes.set_title(name, fontsize=10.5, loc="left", x=0, pad=10)
        date = str(conditions.get("date") or "")[:10]
        figure.suptitle(f"The ladder: attention forward, {conditions.get('gpu')}, {date}", fontsize=13, weight="bold")
        _save(figure, path)


def _rungs(axes: Axes, cell: Sequence[Record], cublas: float | None) -> None:
    """Stages from top to bottom, a gap, peers by speed; each bar with its TFLOPS and gain."""
    stages = [record for record in cell if record["stage"]]
    peers = sorted((record for record in cell if not record["stage"]), key=lambda record: record["tflops"])
    places = [*range(len(stages)), *(len(stages) + 0.45 + i for i in range(len(peers)))]
    most = max(cublas or 0, *(record["tflops"] for record in cell))
    for y, record in zip(places, [*stages, *peers], strict=True):
        _rung(axes, y, record)
    if cublas:
        axes.axvline(cublas, color=FAINT, linestyle=":", linewidth=1.4, zorder=1)
        axes.text(cublas, -0.62, f"cuBLAS bf16 8192³: {cublas:.0f}", color=FAINT, fontsize=8.5, ha="center")
    axes.set_ylim(max(places) + 0.6, -0.6)
    axes.set_xlim(0, 1.14 * most)
    axes.set_yticks([])
    axes.set_xlabel("TFLOPS", color=FAINT, fontsize=9)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8.5, length=0)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _rung(axes: Axes, y: float, record: Record) -> None:
    """A bar, who it is on the left, what it reaches on the right."""
    contender, stage, tflops = record["contender"], record["stage"], record["tflops"]
    colour = LADDER[stage - 1] if stage else _colour(contender)
    axes.barh(y, tflops, 0.74, color=colour, alpha=1.0 if stage else 0.8, zorder=2)
    left = axes.get_yaxis_transform()
    name, words = (f"{stage}. {contender}", record["adds"]) if stage else (contender, PEER_WORDS.get(contender, ""))
    weight = "bold" if stage else "normal"
    axes.text(-0.015, y - 0.04, name, ha="right", va="bottom", weight=weight, transform=left)
    axes.text(-0.015, y + 0.05, words, ha="right", va="top", color="#777777", fontsize=8, transform=left)
    bare = dict(facecolor="white", edgecolor="none", pad=1)  # no line behind the words
    how: dict[str, Any] = dict(va="center", bbox=bare, zorder=3)
    text = axes.annotate(f"{tflops:.0f}", (tflops, y), (6, 0), textcoords="offset points", weight="bold", **how)
    if record["gain"]:
        axes.annotate(f"  {record['gain']:.2f}x", (1, 0.5), xycoords=text, color="#777777", fontsize=9, **how)


def _save(figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=160, format="png", bbox_inches="tight", facecolor="white")
    plt.close(figure)
    path.write_bytes(png.getvalue())


def _panel(record: Record) -> tuple:
    """(column, row)"""
    return (record["head_dim"], record["heads"], record["heads_kv"]), record["causal"]


def _lines(panels: dict[tuple, list[Record]]):
    columns, rows = sorted({column for column, _ in panels}), sorted({row for _, row in panels})
    size = (max(4.2 * len(columns), 6.5), 3.4 * len(rows))
    figure, grid = plt.subplots(len(rows), len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for i, causal in enumerate(rows):
        for j, column in enumerate(columns):
            axes, records = grid[i][j], panels.get((column, causal), [])
            _panel_lines(axes, records)
            head_dim, heads, heads_kv = column
            kv = "" if heads == heads_kv else f", K/V heads {heads_kv}"
            axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'} ({heads} heads{kv})", fontsize=10.5)
            axes.set_xlabel("sequence length" if i == len(rows) - 1 else "")
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


def _bars(records: Sequence[Record]):
    cells = list(dict.fromkeys(_cell(record) for record in records))
    keys = _keys(records)
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 + 0.75 * len(cells) * len(keys)), 4.6), layout="constrained")
    width = 0.84 / max(len(keys), 1)
    for i, (contender, mode) in enumerate(keys[::-1]):
        own = {_cell(r): r["tflops"] for r in records if (r["contender"], r["mode"]) == (contender, mode)}
        x = [cells.index(cell) + (i - (len(keys) - 1) / 2) * width for cell in own]
        colour = _colour(contender)
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
    """(contender, mode) in the order to draw: eager over graph, ours on top. Legend and bars have it reversed."""
    keys = dict.fromkeys((record["contender"], record["mode"]) for record in reversed(records))
    return sorted(keys, key=lambda key: (key[1] == EAGER, key[0] == OURS))


def _colour(contender: str) -> str:
    return STYLE.get(contender, (INK, "."))[0]


def _line_style(contender: str, mode: str) -> dict[str, Any]:
    colour, marker = STYLE.get(contender, (INK, "."))
    ours = contender == OURS
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
        axes.axhline(cublas, color=FAINT, linestyle=":", linewidth=1.4, zorder=1)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * (cublas or 0)))


def _words(figure, records: Sequence[Record], conditions: dict[str, Any], bars: bool) -> None:
    """Title above, legend below."""
    cublas = conditions.get("cublas_tflops")
    dtypes = ", ".join(sorted({record["dtype"] for record in records}))
    date = str(conditions.get("date") or "")[:10]
    figure.suptitle(f"Attention forward, {conditions.get('gpu')}, {dtypes}, {date}", fontsize=13, fontweight="bold")
    handles = []
    for contender, mode in _keys(records)[::-1]:
        style = _line_style(contender, mode)
        if bars:
            style |= {"linestyle": "", "marker": "s", "markersize": 9, "markeredgecolor": style["color"]}
        handles.append(Line2D([], [], label=contender if mode == EAGER else f"{contender}, {mode}", **style))
    if cublas:
        label = f"cuBLAS bf16 8192³, settled: {cublas:.0f}"
        handles.append(Line2D([], [], color=FAINT, linestyle=":", linewidth=1.4, label=label))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=_legend_columns(figure, len(handles)), frameon=False
    )


def _legend_columns(figure, handles: int) -> int:
    """As many as fit at about 1.8 inches each, the rows about equally long."""
    most = max(int(figure.get_figwidth() / 1.8), 2)
    return math.ceil(handles / math.ceil(handles / most))
