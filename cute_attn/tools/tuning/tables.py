"""A tune's candidates and times, for people."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...kernels.config import FwdConfig
from ...tuned import Key, Row, config_of
from ..benchmark.timing import geomean
from .candidates import Verdict
from .results import Entry, Results, key_of

UNSEEN = 'machine code: not looked at, nvdisasm is missing (pip install "cute_attn[bench]")'


def class_word(key: Key) -> str:
    head_dim, causal, dtype = key
    return f"d{head_dim} {'causal' if causal else 'full'} {dtype}"


def config_word(config: FwdConfig) -> str:
    """Everything that a row may choose."""
    words = f"{config.tile_m}x{config.tile_n}", f"{config.stages} stages", config.scheduler.name
    extras = {"cluster of 2": config.cluster == 2, f"split over {config.split}": config.split > 1}
    extras |= {"2 Q tiles": config.q_stages == 2, "Q in registers": config.q_in_regs}
    extras |= {"no ping-pong": not config.pingpong, "speculative softmax": config.speculative}
    return ", ".join([*words, *(word for word, on in extras.items() if on)])


def row_word(row: Row) -> str:
    bounds: dict[str, int | str | None] = {"S <= ": row.max_seqlen_q, "free rows >= ": row.min_free_rows}
    bounds |= {"row blocks <= ": row.max_row_blocks, "keys >= ": row.min_seqlen_k, "": row.dtype}
    return "; ".join([config_word(row.config), *(f"{word}{bound}" for word, bound in bounds.items() if bound)])


def print_candidates(console: Console, key: Key, verdicts: dict[FwdConfig, Verdict]) -> None:
    usable = sum(verdict.usable for verdict in verdicts.values())
    console.print(Text(f"\n{class_word(key)}: {len(verdicts)} candidates, {usable} to be timed", style="bold"))
    table = _table("kernel", "machine code")
    for config, verdict in verdicts.items():
        said = "not looked at" if verdict.problems is None else "; ".join(verdict.problems) or "healthy"
        table.add_row(config_word(config), said, style=None if verdict.usable else "dim")
    console.print(table)


def print_class(console: Console, key: Key, found: Results, unseen: Sequence[bool]) -> None:
    """Whoever came into the last rounds, the fastest first; then the excluded, and what was chosen."""
    entries = [entry for entry in found.measured if key_of(entry) == key]
    timed = sorted((e for e in entries if e["tflops"]), key=lambda e: -geomean(e["tflops"].values()))
    console.print(Text(f"\n{class_word(key)}: TFLOPS of {len(entries)} candidates' best", style="bold"))
    if timed:
        lengths = list(timed[0]["tflops"])
        table = _table("kernel", *lengths, "geomean", "spread")
        for entry in timed:
            table.add_row(*_cells(entry, lengths))
        console.print(table)
    for entry in entries:
        if entry["reason"]:
            console.print(Text(f"  out: {_kernel(entry)}: {entry['reason']}", style="dim"), soft_wrap=True)
    if any(unseen):
        console.print(Text(f"  {UNSEEN}"), soft_wrap=True)
    for row in found.class_rows(key):
        console.print(Text(f"  chosen: {row_word(row)}"), soft_wrap=True)


def _cells(entry: Entry, lengths: Sequence[str]) -> list[str]:
    each = [f"{entry['tflops'][length]:.1f}" for length in lengths]
    return [_kernel(entry), *each, f"{geomean(entry['tflops'].values()):.1f}", f"{max(entry['spread'].values()):.1%}"]


def _kernel(entry: Entry) -> str:
    return config_word(config_of(entry["head_dim"], entry["causal"], entry["fields"]))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        left = column in ("kernel", "machine code")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "machine code")
    return table
