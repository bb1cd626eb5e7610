"""What a tune has found so far: a table of tuned kernels, and everything that was measured on the way, in one file.

Beside a table's `rows` it has `tuned`, the classes that are finished and how each was timed, and `measured`, an entry
per candidate of theirs, losers and excluded ones too: TFLOPS and spread by S, in the screening and in the last rounds.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import tuned
from ...kernels.config import FwdConfig
from ...tuned import Key, Row
from ..benchmark.report import write_json
from ..benchmark.timing import METHOD
from ..benchmark.workload import Spec
from .choose import MARGIN, Rows, serving
from .trial import HIDDEN, SCREEN, Outcome, problem

Entry = dict[str, Any]
Outcomes = dict[int, Outcome]  # by S
VERSIONS = ("driver", "cuda", "torch", "cutlass_dsl", "cute_attn", "python")


def method() -> dict[str, Any]:
    """How a tune times and chooses, for people."""
    kept = {name: METHOD[name] for name in ("order", "settle_ms", "timed_ms", "sample", "inputs")}
    screening = f"{SCREEN.rounds} round, {SCREEN.warmup_ms:g} ms settling, {SCREEN.timed_ms:g} ms timed"
    return kept | {
        "tflops": "S -> median of the rounds; heads x head_dim about " + str(HIDDEN),
        "spread": "(max - min) / median of the rounds' medians",
        "screening": f"every candidate: {screening}; then the rounds for the best few",
        "choice": "geometric mean over S; a challenger must win by more than the larger of "
        f"{MARGIN:.0%} and the distance of the quartiles of the rounds",
        "rows": "of classes that `tuned` does not name, and those with `max_row_blocks`: as they were before",
    }


@dataclass
class Results:
    """The file's content; `write` makes it appear whole or not at all."""

    path: Path
    head: dict[str, Any]  # gpu, date, versions, kernels_sha256
    rows: Rows
    done: list[Entry] = field(default_factory=list)  # `tuned` in the file
    measured: list[Entry] = field(default_factory=list)

    @staticmethod
    def fresh(path: Path, conditions: dict[str, Any]) -> "Results":
        """Starts from the rows by which this GPU is planned now."""
        versions = {name: conditions[name] for name in VERSIONS}
        head = {name: conditions[name] for name in ("gpu", "date")}
        head |= dict(versions=versions, kernels_sha256=conditions["kernels_sha256"])
        return Results(path, head, complete(tuned.table(conditions["gpu"])))

    @staticmethod
    def resumed(path: Path, conditions: dict[str, Any]) -> "Results":
        """Goes on from a file; ValueError where it is damaged, or of another GPU or of other kernels."""
        content = json.loads(path.read_text())
        table = tuned.parse(content)
        for name in ("gpu", "kernels_sha256"):
            if content.get(name) != conditions[name]:
                raise ValueError(f"its {name} is {content.get(name)!r}, here it is {conditions[name]!r}")
        for name in ("tuned", "measured"):
            if not isinstance(content.get(name), list):
                raise ValueError(f"it has no list `{name}`")
        head = {name: content.get(name) for name in ("gpu", "date", "versions", "kernels_sha256")}
        return Results(path, head, complete(table), content["tuned"], content["measured"])

    def write(self) -> None:
        lists = dict(rows=[row.entry() for row in self.rows], tuned=self.done, measured=self.measured)
        write_json(self.path, self.head | dict(method=method()) | lists)

    def finished(self, key: Key) -> bool:
        return any(key_of(entry) == key for entry in self.done)

    def class_rows(self, key: Key) -> Rows:
        return tuned.by_class(self.rows)[key]

    def failed(self, key: Key) -> dict[FwdConfig, str]:
        """Candidates of an unfinished class that took the GPU with them."""
        mine = [entry for entry in self.measured if key_of(entry) == key and entry["reason"]]
        return {tuned.config_of(e["head_dim"], e["causal"], e["fields"]): e["reason"] for e in mine}

    def add_failure(self, key: Key, config: FwdConfig, reason: str) -> None:
        self.measured.append(words_of(key) | dict(fields=tuned.in_words(config), reason=reason))

    def add_class(self, key: Key, rows: Rows, how: Entry, entries: Iterable[Entry]) -> None:
        """Its rows in place of those that it had."""
        self.rows = with_rows(self.rows, key, rows)
        self.done = [*(e for e in self.done if key_of(e) != key), words_of(key) | how]
        self.measured = [*(e for e in self.measured if key_of(e) != key), *entries]


def words_of(key: Key) -> Entry:
    return dict(zip(("head_dim", "causal", "dtype"), key, strict=True))


def key_of(entry: Entry) -> Key:
    return entry["head_dim"], entry["causal"], entry["dtype"]


def complete(table: tuned.Table) -> Rows:
    """The table's rows, and the package's for whatever head dim and mask it lacks."""
    own = {(row.config.head_dim, row.config.mask.causal) for row in table.rows}
    rest = [r for r in tuned.prebuilt().rows if (r.config.head_dim, r.config.mask.causal) not in own]
    return ordered([*table.rows, *rest])


def ordered(rows: Iterable[Row]) -> Rows:
    """By class; in one, the rows for a single type come first, or they would never be asked."""
    return tuple(sorted(rows, key=lambda r: (r.config.head_dim, r.config.mask.causal, r.dtype is None)))


def with_rows(rows: Rows, key: Key, new: Rows) -> Rows:
    """The new ones instead of those of the class; rows for both types go only where the new ones are for both too."""
    gone = {row.dtype for row in new} | ({key[2]} if any(row.dtype is None for row in new) else set())

    def stays(row: Row) -> bool:
        return (row.config.head_dim, row.config.mask.causal) != key[:2] or row.dtype not in gone

    return ordered([*new, *(row for row in rows if stays(row))])


def typed(old: Rows, new: Rows, dtype: str, both: Callable[[Rows], bool]) -> Rows:
    """The new rows with the type that they are for.

    What is found for bf16 is for fp16 too, where `both` says that its kernels are healthy there; what is found for fp16
    is for fp16 only. Rows that were there keep theirs.
    """
    if new == old:
        return new
    only = None if dtype == "bf16" and both(new) else dtype
    return tuple(row._replace(dtype=only) for row in new)


def with_tflops(key: Key, rows: Rows, final: Outcomes, tokens: int) -> Rows:
    """Each row with what its kernel reached at the lengths that it serves; a row for both types keeps bf16's."""
    told = []
    for row in rows:
        served = {length: outcome for length, outcome in sorted(final.items()) if serving(rows, length) is row}
        is_of_type = row.dtype is not None or key[2] == "bf16"
        told.append(row._replace(tflops=_tflops(key, served, row.config, tokens) or row.tflops) if is_of_type else row)
    return tuple(told)


def entries(key: Key, verdicts: dict[FwdConfig, str | None], screened: Outcomes, final: Outcomes, tokens: int):
    """An entry per candidate; verdicts: why it is excluded."""
    for config, reason in verdicts.items():
        errors = [outcome.errors[config] for outcome in screened.values() if config in outcome.errors]
        spread = {str(s): round(x.stats[config].spread, 4) for s, x in final.items() if config in x.stats}
        yield words_of(key) | dict(
            fields=tuned.in_words(config),
            reason=reason,
            relative_error=_finite(max(errors, default=None)),
            screened=_tflops(key, screened, config, tokens),
            tflops=_tflops(key, final, config, tokens),
            spread=spread,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


def _tflops(key: Key, outcomes: Outcomes, config: FwdConfig, tokens: int) -> dict[str, float]:
    times = {s: outcome.stats[config].p50_us for s, outcome in outcomes.items() if config in outcome.stats}
    flops = {s: Spec(problem(key, s, tokens)).workload().flops for s in times}
    return {str(s): float(f"{flops[s] / us / 1e6:.4g}") for s, us in times.items()}
