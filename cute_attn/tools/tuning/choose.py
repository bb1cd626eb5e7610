"""Which rows a class's times speak for.

Rows are compared by the geometric mean, over lengths, of the times of the kernels that they name: in each round, and
the median of the rounds counts. What is there stays unless a challenger is faster by more than `MARGIN` and by more
than either's spread. First one kernel for all lengths challenges the rows that are there. Then the lengths are cut in
two at each place, and on each side the best kernel for it challenges what has won so far; the best cut is kept, if any.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import NamedTuple

from ...kernels.config import FwdConfig
from ...kernels.state import ROWS
from ...tuned import SCHEDULERS, Row
from ..benchmark.timing import geomean, percentile

MARGIN = 0.01

Times = Mapping[FwdConfig, Mapping[int, Sequence[float]]]  # config -> S -> us, the median of each round
Rows = tuple[Row, ...]


class Score(NamedTuple):
    """us: the rounds' median; spread: between their quartiles, over it, since one slow round in five is common."""

    us: float
    spread: float


def score(times: Times, rows: Rows, lengths: Iterable[int]) -> Score:
    each = [times[serving(rows, length).config][length] for length in lengths]
    rounds = sorted(geomean(one) for one in zip(*each, strict=True))
    middle = percentile(rounds, 50)
    return Score(middle, (percentile(rounds, 75) - percentile(rounds, 25)) / middle)


def serving(rows: Rows, length: int) -> Row:
    """Of as many queries as keys, and of tiles enough: no row for few."""
    return next(row for row in rows if row.serves(length, length))


def gain(times: Times, challenger: Rows, rows: Rows, lengths: Sequence[int]) -> float:
    """How much faster, 0.02 for 2 %, the challenger is; 0 where that is within the margin or the spread."""
    new, old = score(times, challenger, lengths), score(times, rows, lengths)
    faster = old.us / new.us - 1
    return faster if faster > max(MARGIN, new.spread, old.spread) else 0.0


def choose(times: Times, rows: Rows, lengths: Sequence[int], healthy: Collection[FwdConfig] = ()) -> Rows:
    """The rows of a class after these times, which every config in `times` has at every length.

    rows: those that are there, of which the ones for few tiles are not on trial, and stay, in front; healthy: kernels
    that a row may name beside the timed ones.
    """
    known, lengths = {*times, *healthy}, sorted(lengths)
    there, few = rows, tuple(row for row in rows if row.max_row_blocks)
    on_trial = rows = tuple(row for row in rows if not row.max_row_blocks)
    overall = rows_of(best(times, lengths), lengths, known)
    if any(serving(rows, length).config not in times for length in lengths):
        rows = overall  # a kernel that is there failed
    elif gain(times, overall, rows, lengths):
        rows = overall
    cuts = [part for i in range(1, len(lengths)) if (part := _cut(times, rows, lengths, i, known)) != rows]
    rows = min(cuts, key=lambda cut: score(times, cut, lengths).us, default=rows)
    return there if rows == on_trial else few + rows


def best(times: Times, lengths: Sequence[int]) -> FwdConfig:
    return min(times, key=lambda config: score(times, (Row(config),), lengths).us)


def _cut(times: Times, rows: Rows, lengths: Sequence[int], i: int, known: Collection[FwdConfig]) -> Rows:
    """The rows with the best kernel for the first i lengths, or for the others, or for either, where that wins."""
    short, long = lengths[:i], lengths[i:]
    middle = isqrt(short[-1] * long[0])  # nothing between the two was timed
    new = [rows_of(best(times, side), side, known) for side in (short, long)]
    won = [bool(gain(times, one, rows, side)) for one, side in zip(new, (short, long), strict=True)]
    if not any(won):
        return rows
    left, right = (one if wins else rows for one, wins in zip(new, won, strict=True))
    return capped(left, middle) + right


def capped(rows: Rows, max_seqlen_q: int) -> Rows:
    """The same for at most so many queries."""
    return tuple(row._replace(max_seqlen_q=min(row.max_seqlen_q or max_seqlen_q, max_seqlen_q)) for row in rows)


def rows_of(config: FwdConfig, lengths: Iterable[int], known: Collection[FwdConfig]) -> Rows:
    """A kernel for every length; a dynamic one only for lengths that leave tiles half empty, where all timed ones do.

    A dynamic scheduler costs 1 to 3 % of a full kernel whose tiles are all alike (NOTEBOOK.md, H200): those keep the
    static one.
    """
    row = Row(config, min_free_rows=ROWS)
    if config.scheduler.dynamic and not config.mask.causal and all(row.uneven(length) for length in lengths):
        static = replace(config, scheduler=SCHEDULERS["static"])
        if static in known:
            return row, Row(static)
    return (Row(config),)
