"""Problem -> FwdConfig: the table's kernel, then the rules that apply, one after the other."""

from functools import lru_cache

from .. import tuned
from ..kernels.config import FwdConfig
from ..problem import PLAIN, FeatureKey, Problem
from . import candidates, features, kv_cache, pack_gqa
from .rule import Rule, Step, follow

RULES: tuple[Rule, ...] = (*candidates.RULES, *features.RULES, *pack_gqa.RULES, *kv_cache.RULES)


@lru_cache(maxsize=4096)
def plan(problem: Problem, gpu: str | None = None) -> FwdConfig:
    """The kernel for a problem, by the table of the GPU of that name; without a name, or a table, by the H200's.

    A head dim that has no kernel of its own runs on the next larger one, and so does each of a pair. Where few queries
    leave most of a tile empty, the heads that share a K/V head are packed into it. The layout "thd" asks for varlen,
    with the largest number of a sequence's queries as `seqlen_q`, 0 where it is unknown.
    """
    return _steps(problem, gpu)[-1].config


def varlen(
    head_dim: int,
    dtype: str,
    causal: bool,
    key: FeatureKey = PLAIN,
    gpu: str | None = None,
    head_dim_v: int = 0,
    ratio: int = 1,
    max_seqlen_q: int | None = None,
) -> FwdConfig:
    """The kernel for varlen: the tiles of the one that serves wherever no other row does, and no clusters.

    Where no sequence has more than a few queries, the heads that share a K/V head are packed into a tile.
    """
    problem = candidates.unsized(head_dim, dtype, "thd", causal, key, head_dim_v)
    return plan(problem._replace(heads=ratio, seqlen_q=max_seqlen_q or 0), gpu)


def kvcache(
    head_dim: int,
    dtype: str,
    causal: bool,
    key: FeatureKey = PLAIN,
    gpu: str | None = None,
    head_dim_v: int = 0,
    ratio: int = 1,
    max_seqlen_q: int | None = None,
    page_size: int | None = None,
    batch: int = 1,
    heads_kv: int = 1,
    room: int = 1,
) -> FwdConfig:
    """The kernel over a K/V cache: varlen's, or, where no sequence has more than a few queries, one whose CTAs share
    all keys, of which a sequence has room for so many.
    """
    problem = candidates.unsized(head_dim, dtype, "thd", causal, key, head_dim_v)
    problem = problem._replace(batch=batch, heads=ratio * heads_kv, heads_kv=heads_kv, seqlen_k=max(room, 1))
    return plan(problem._replace(seqlen_q=max_seqlen_q or 0, page=page_size or 0), gpu)


def explain(problem: Problem, gpu: str | None = None) -> tuple[Step, ...]:
    """What led to `plan(problem, gpu)`, in order: the row of the table, then each rule and exception that applied."""
    return tuple(_steps(problem, gpu))


def _steps(problem: Problem, gpu: str | None) -> list[Step]:
    steps = _without_cache(problem, gpu)
    return steps if problem.page is None else follow(kv_cache.RULES, problem, steps)


def _without_cache(problem: Problem, gpu: str | None) -> list[Step]:
    alone = _without_pack_gqa(problem, gpu)
    base = alone[-1].config
    if problem.ratio < 2 or problem.empty or not base.packable:
        return alone
    rows = pack_gqa.rows_of(problem)
    steps = _without_pack_gqa(rows, gpu)
    if pack_gqa.few_rows(rows, steps[-1].config):
        steps = follow(pack_gqa.FEW_ROWS, rows, _of_row(rows, candidates.rows(rows, gpu)[-1]))
    if not pack_gqa.should_pack(steps[-1].config, rows, base, problem):
        return alone
    return follow([pack_gqa.PACK], problem, steps)


def _without_pack_gqa(problem: Problem, gpu: str | None) -> list[Step]:
    """For as many heads, and rows of each, as the problem has."""
    rows = candidates.rows(problem, gpu)
    if problem.layout == "thd" or problem.features != PLAIN:  # what is tuned by lengths is the plain kernel
        return _of_row(problem, rows[-1])
    row = next(row for row in rows if row.serves(problem.seqlen_q, problem.seqlen_k, problem.row_blocks))
    by_length = not problem.constant_time or row.config.split > 1
    return _of_row(problem, row if by_length else rows[-1])


def _of_row(problem: Problem, row: tuned.Row) -> list[Step]:
    return follow(features.RULES, problem, candidates.started(problem, row))
