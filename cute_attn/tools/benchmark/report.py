"""What was measured, for people and for programs: tables, JSON, CSV and the summary over cells."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .implementations import OURS
from .timing import EAGER, GRAPH, geomean
from .workload import FIELDS

Record = dict[str, Any]


class Column(NamedTuple):
    header: str
    cell: Callable[[Record], str]
    justify: Literal["left", "right"] = "right"


def us(value: float | None) -> str:
    """Four or five figures."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 100 else 1 if value < 10_000 else 0}f}"


def _number(key: str, form: str) -> Callable[[Record], str]:
    return lambda record: "-" if record[key] is None else format(record[key], form)


def _us(key: str) -> Callable[[Record], str]:
    return lambda record: us(record[key])


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def _error(key: str) -> Callable[[Record], str]:
    return lambda record: error(record[key])


def name(record: Record) -> str:
    case = f"{record['case']}: " if record.get("case") else ""
    return case + record["contender"] + ("" if record["mode"] == EAGER else f" {record['mode']}")


COLUMNS = (
    Column("", name, "left"),
    Column("us", _us("p50_us")),
    Column("spread", _number("spread", ".1%")),
    Column("TFLOPS", _number("tflops", ".1f")),
    Column("GB/s", _number("gb_per_s", ".0f")),
    Column("of\nroofline", _number("of_roofline", ".1%")),
    Column("bound", lambda record: record["bound"] or "-"),
    Column("x\nbaseline", _number("x_baseline", ".3f")),
    Column("of\ncuBLAS", _number("of_cublas", ".1%")),
    Column("W", _number("watts", ".0f")),
    Column("SM\nMHz", _number("sm_mhz", ".0f")),
    Column("max\nerror", _error("max_error")),
    Column("rel.\nerror", _error("relative_error")),
    Column("host\nus", _us("host_us")),
)


def title(record: Record) -> str:
    r = record
    heads = f"H {r['heads']}" + (f" (K/V {r['heads_kv']})" if r["heads_kv"] != r["heads"] else "")
    seqlen = f"S {r['seqlen_q']}" + (f" (K/V {r['seqlen_k']})" if r["seqlen_k"] != r["seqlen_q"] else "")
    mask = "causal" if r["causal"] else "full"
    dims = f"D {r['head_dim']}" + (f" (V {r['head_dim_v']})" if r.get("head_dim_v") else "")
    features = "".join(f", {key}" + ("" if x is True else f" {x}") for key, x in r.get("features", {}).items())
    return f"B {r['batch']}, {heads}, {seqlen}, {dims}, {mask}, {r['dtype']}{features}: {r['flops'] / 1e9:.4g} GFLOP"


def print_cell(
    console: Console,
    records: Sequence[Record],
    absent: Container[str] = (),
    columns: Sequence[Column] = COLUMNS,
    bold: str = OURS,
) -> None:
    """A row per implementation, in as many tables as the width takes; then why some, not the absent, have none."""
    timed = [record for record in records if record["p50_us"] is not None]
    console.print(Text(f"\n{title(records[0])}", style="bold"))
    if timed:
        columns = [c for c in columns if c.header != "host\nus" or any(r["host_us"] is not None for r in timed)]
        for table in fitting(console, columns, timed, bold):
            console.print(table)
    for record in records:
        if record["reason"] and record["contender"] not in absent:
            console.print(Text(f"  {name(record)}: {record['reason']}"), soft_wrap=True)
    baselines = ", ".join(dict.fromkeys(r["baseline"] for r in timed if r["x_baseline"] is not None))
    if baselines:
        console.print(Text(f"  x baseline: the time of {baselines} over a row's own", style="dim"))
    heads = records[0]["batch"] * records[0]["heads"]
    checked = max((record["checked_heads"] or 0 for record in records), default=0)
    if checked:
        console.print(
            Text(f"  errors: against float32 attention, {checked} of {heads} (batch, head) pairs", style="dim")
        )


def fitting(console: Console, columns: Sequence[Column], records: Sequence[Record], bold: str = OURS) -> list[Table]:
    """One table, with narrow gaps if need be; else two or more, so that no number is ever cut."""
    for gap in (1, 0):
        table = _table(columns, records, gap, bold)
        wanted = console.measure(table, options=console.options.update(width=1000)).maximum
        if wanted <= console.width or len(columns) < 4:
            return [table]
    half = (len(columns) + 1) // 2
    rest = [columns[0], *columns[half:]]
    return [*fitting(console, columns[:half], records, bold), *fitting(console, rest, records, bold)]


def _table(columns: Sequence[Column], records: Sequence[Record], gap: int, bold: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for column in columns:
        words = column.header and column.justify == "left"  # they may be folded, numbers and names not
        table.add_column(column.header, justify=column.justify, no_wrap=not words)
    for record in records:
        style = "bold" if record["contender"] == bold else None
        table.add_row(*(column.cell(record) for column in columns), style=style)
    return table


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """`name  value` lines."""
    width = max(12, *(len(key) for key in facts))
    for key, value in facts.items():
        console.print(Text(f"{key:{width}}  ", style="dim") + Text(str(value), style="not dim"), soft_wrap=True)


def conditions_in_words(facts: dict[str, Any]) -> dict[str, str]:
    """The conditions of a run, as `machine.conditions` and the command line have them, for people."""
    f = {key: "unknown" if value is None else value for key, value in facts.items()}
    sm, memory = (f"{f[f'{x}_mhz_now']} MHz now, {f[f'{x}_mhz_max']} max" for x in ("sm", "mem"))
    return {
        "GPU": f"{f['gpu']}, {f['sms']} SMs" if facts["gpu"] else "none",
        "clocks": f"SM {sm}; memory {memory}" if facts["sm_mhz_now"] is not None else "unknown",
        "power limit": f"{f['power_limit_watts']} W" if facts["power_limit_watts"] else "unknown",
        "sensors": f["sensors"],
        "software": f"driver {f['driver']}, CUDA {f['cuda']}, cuDNN {f['cudnn']}, torch {f['torch']}, "
        f"nvidia-cutlass-dsl {f['cutlass_dsl']}, cute_attn {f['cute_attn']}, Python {f['python']}",
        "kernels": f"sha256 {f['kernels_sha256']}",
        "date": f["date"],
        "problem": (f"{f['dtype']}, {f['layout']} in memory, " if "layout" in facts else "")
        + ("; ".join(facts["shapes"]) if len(facts["shapes"]) <= 4 else f"{len(facts['shapes'])} cells"),
        "FLOP": f["flop"],
    }


def rate(facts: dict[str, Any]) -> str:
    """The cuBLAS rate of a run, and the power and clock it was reached at."""
    sensors = (facts["cublas_watts"], "W"), (facts["cublas_sm_mhz"], "MHz")
    return "bf16 8192^3, warmed up: " + ", ".join(
        [f"{facts['cublas_tflops']:.1f} TFLOPS", *(f"{x:.0f} {unit}" for x, unit in sensors if x)]
    )


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Over all cells: geometric means of each baseline's time over ours, and of ours over the best of --baselines."""
    ours = [record for record in records if record["contender"] == OURS and record["p50_us"] is not None]
    out: dict[str, Any] = {}
    for mode in (EAGER, GRAPH):
        ratios: dict[str, list[float]] = {}
        for record in ours:
            if record["mode"] == mode:
                for baseline, ratio in record["ratios"].items():
                    ratios.setdefault(baseline, []).append(ratio)
        over = {p: {"geomean": geomean(x), "min": min(x), "cells": len(x)} for p, x in ratios.items()}
        if over:
            out[mode] = {"ours_over": over}
    reached = [record["over_best_peer"] for record in ours if record["over_best_peer"] is not None]
    if reached:
        out["ours_over_best_peer"] = {"geomean": geomean(reached), "min": min(reached), "cells": len(reached)}
    return out


def with_best(records: list[Record], best_over_cudnn: dict[tuple, float]) -> list[Record]:
    """Sets ours' `over_best_peer`, (cuDNN's time / ours) / (cuDNN's / the best baseline's): 1 where it is as fast."""
    for record in records:
        best = best_over_cudnn.get((record["shape"], record["causal"], record["mode"] == GRAPH))
        cudnn = record["ratios"].get("cudnn")
        if record["contender"] == OURS and best and cudnn:
            record["over_best_peer"] = cudnn / best
    return records


def baselines_file(path: Path, dtype: str) -> Record:
    """Its content; ValueError where its cells are of another dtype."""
    baselines = json.loads(path.read_text())
    if baselines.get("dtype", dtype) != dtype:
        raise ValueError(f"its numbers are for {baselines['dtype']}, this run is {dtype}")
    return baselines


def best_over_cudnn(baselines: Record) -> dict[tuple, float]:
    """(shape, causal, graph) -> how many times as fast as cuDNN the best baseline was."""
    return {_baselines_cell(cell): float(cell["best_over_cudnn"]) for cell in baselines["cells"]}


def over_cudnn(baselines: Record, name: str) -> dict[tuple, float]:
    """The same of one baseline, in the cells where it was timed."""
    timed = [cell for cell in baselines["cells"] if {"cudnn", name} <= cell.get("us", {}).keys()]
    return {_baselines_cell(cell): cell["us"]["cudnn"] / cell["us"][name] for cell in timed}


def _baselines_cell(cell: Record) -> tuple:
    return cell["shape"], cell["causal"], cell.get("graph", False)


BY_RATIO = "by its ratio to cuDNN"  # the mode of a record that was not timed in its run


def by_ratio(records: Sequence[Record], baselines: Record, name: str) -> list[Record]:
    """What a run without a baseline says of it: its own cuDNN's TFLOPS times the ratio to cuDNN in a baselines file.

    None where the run has the baseline, and none of another dtype than the file's.
    """
    if any(record["contender"] == name and record["tflops"] for record in records):
        return []
    ratios, found = over_cudnn(baselines, name), []
    for record in records:
        ratio = ratios.get((record["shape"], record["causal"], False))
        cudnn = record["contender"] == "cudnn" and record["mode"] == EAGER and record["tflops"]
        if cudnn and ratio and baselines.get("dtype") == record["dtype"]:
            problem = {key: record[key] for key in ("shape", *FIELDS, "flops") if key in record}
            found.append(problem | dict(contender=name, mode=BY_RATIO, tflops=record["tflops"] * ratio))
    return found


def print_summary(console: Console, records: Sequence[Record], with_baselines: bool) -> None:
    """A row per cell, ours against each baseline; then the means."""
    ours = [record for record in records if record["contender"] == OURS and record["p50_us"] is not None]
    if not ours:
        return
    baselines = list(dict.fromkeys(baseline for record in ours for baseline in record["ratios"]))
    columns = [
        Column("", _cell, "left"),
        Column("TFLOPS", _number("tflops", ".1f")),
        Column("of\ncuBLAS", _number("of_cublas", ".1%")),
        *(Column(f"over\n{baseline}", _ratio_to(baseline)) for baseline in baselines),
    ]
    if with_baselines:
        columns.append(Column("over\nbest baseline", lambda r: ratio(r["over_best_peer"])))
    console.print(Text("\ncute_attn in each cell: how many times as fast as the others", style="bold"))
    for table in fitting(console, columns, ours):
        console.print(table)
    found = summary(records)
    for line in summary_lines(found):
        console.print(Text(line), soft_wrap=True)
    if with_baselines and "ours_over_best_peer" not in found:
        console.print(Text("ours over the best baseline of --baselines: no cell of this run is in that file"))


def _cell(record: Record) -> str:
    mask, mode = "causal" if record["causal"] else "full", "" if record["mode"] == EAGER else " graph"
    return f"{record['shape']} {mask}{mode}"


def summary_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for mode in (EAGER, GRAPH):
        for baseline, x in found.get(mode, {}).get("ours_over", {}).items():
            what = f"ours over {baseline}" + ("" if mode == EAGER else f", {mode}")
            lines.append(f"{what}: geometric mean {x['geomean']:.3f}, least {x['min']:.3f}, {x['cells']} cells")
    if "ours_over_best_peer" in found:
        x = found["ours_over_best_peer"]
        lines.append(
            f"ours over the best baseline of --baselines, through cuDNN: geometric mean {x['geomean']:.3f}, "
            f"least {x['min']:.3f}, {x['cells']} cells"
        )
    return lines


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ratio_to(baseline: str) -> Callable[[Record], str]:
    return lambda record: ratio(record["ratios"].get(baseline))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A line for each item of a list of records, of which a file may have thousands; their numbers to 7 digits."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ")
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            text = "[\n  " + ",\n  ".join(json.dumps(rounded(item), allow_nan=False) for item in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    _write(path, "{\n" + ",\n".join(parts) + "\n}\n")


def rounded(value: Any) -> Any:
    """As `write_json` writes the numbers of a record."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def write_csv(path: Path, conditions: dict[str, Any], records: Sequence[Record]) -> None:
    """A line per record; each ratio in a column of its own, the rounds joined by spaces."""
    baselines = list(dict.fromkeys(baseline for record in records for baseline in record["ratios"]))
    kept = {key: conditions.get(key) for key in ("gpu", "date", "kernels_sha256")}
    lines = []
    for record in records:
        flat = {key: value for key, value in record.items() if key not in ("features", "ratios", "rounds_us")}
        rounds = " ".join(f"{x:.3f}" for x in record["rounds_us"] or ())
        ratios = {f"over_{baseline}": record["ratios"].get(baseline) for baseline in baselines}
        lines.append({**flat, "rounds_us": rounds, **ratios, **kept})
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
