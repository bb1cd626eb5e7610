"""The kernels that a problem starts from: the tuned table's rows for its head dims, or one beyond the table."""

from dataclasses import replace

from .. import tuned
from ..kernels.config import LAYOUTS, SMEM_BYTES, FwdConfig
from ..kernels.mask import Causal, Full
from ..kernels.tile_scheduler import DynamicLongest, StaticTiles
from ..problem import PLAIN, FeatureKey, Problem
from .rule import Rule, Step, follow

HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)  # of the tables' kernels; D runs on the next one up
EQUAL_HEAD_DIMS = tuple((d, 0) for d in HEAD_DIMS)
EVERY_HEAD_DIM = (*HEAD_DIMS, 320, 384, 448, 512)  # and those of kernels that are in no table

TABLE = "the tuned table", "this row was the fastest of its class of problems (tuned.json)"
LARGE = "large head dims", "no table has them: few rows and narrow blocks, so that Q, K, V and O fit in shared memory"


def kernel_dims(head_dim: int, head_dim_v: int = 0) -> tuple[int, int]:
    """The (head_dim, head_dim_v) of a kernel for these."""
    d, d_v = (next(n for n in EVERY_HEAD_DIM if x <= n) for x in (head_dim, head_dim_v or head_dim))
    return d, 0 if d == d_v else d_v


def _dims(problem: Problem) -> tuple[int, int]:
    return kernel_dims(problem.head_dim, problem.head_dim_v)


def _of_pair(problem: Problem, config: FwdConfig) -> FwdConfig:
    head_dim, head_dim_v = _dims(problem)
    return replace(config, head_dim=head_dim, head_dim_v=head_dim_v)


def _layout(problem: Problem) -> str:
    """Varlen begins as other layouts do: its own comes with its scheduler."""
    return problem.layout if problem.layout in LAYOUTS else LAYOUTS[0]


RULES = (
    Rule(
        "a pair of head dims",
        "the wider one's tiles have room for both",
        lambda problem, config: (config.head_dim, config.head_dim_v) != _dims(problem),
        _of_pair,
    ),
    Rule(
        "element type and layout",
        "as the tensors have them; a class of the table is both layouts'",
        lambda problem, config: (config.dtype, config.layout) != (problem.dtype, problem.layout),
        lambda problem, config: replace(config, dtype=problem.dtype, layout=_layout(problem)),
    ),
)


def ends_differ(problem: Problem) -> bool:
    """Whether tiles of one sequence have different blocks of keys."""
    return bool(problem.causal or problem.features.window or problem.features.chunks)


def rows(problem: Problem, gpu: str | None) -> tuple[tuned.Row, ...]:
    """Of the table, in the order of asking, the last one for any lengths; of a pair those of the wider head dim."""
    head_dim, head_dim_v = _dims(problem)
    causal, widest = ends_differ(problem), max(head_dim, head_dim_v)
    if widest > HEAD_DIMS[-1]:
        return (tuned.Row(large(head_dim, head_dim_v, causal)),)
    return tuned.table(gpu).classes[widest, causal, problem.dtype]


def started(problem: Problem, row: tuned.Row) -> list[Step]:
    """A row's kernel, for the problem's head dims, element type and layout."""
    beyond = row.config.widest > HEAD_DIMS[-1]
    return follow(RULES, problem, [Step(*(LARGE if beyond else TABLE), row.config)])


def configs(
    head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None = None, head_dim_v: int = 0
) -> list[FwdConfig]:
    """The kernels of these head dims and a mask, in the order of asking."""
    problem = unsized(head_dim, dtype, layout, causal, head_dim_v=head_dim_v)
    return [started(problem, row)[-1].config for row in rows(problem, gpu)]


def config(
    head_dim: int, dtype: str, layout: str, causal: bool, gpu: str | None = None, head_dim_v: int = 0
) -> FwdConfig:
    """The kernel of these head dims and a mask that serves wherever no other row of the table does."""
    return configs(head_dim, dtype, layout, causal, gpu, head_dim_v)[-1]


def unsized(
    head_dim: int, dtype: str, layout: str, causal: bool, key: FeatureKey = PLAIN, head_dim_v: int = 0
) -> Problem:
    """A problem where its lengths choose nothing."""
    return Problem(1, 1, 1, 1, 1, head_dim, dtype, layout, causal, features=key, head_dim_v=head_dim_v)


def large(head_dim: int, head_dim_v: int, causal: bool) -> FwdConfig:
    """Head dims beyond the tables': 64 rows where two warpgroups share O's columns, and blocks of 64 keys or of 32."""
    d_v = head_dim_v or head_dim
    tile_m = 64 if d_v > 256 else 128
    room = SMEM_BYTES - 1024 - 2 * head_dim * tile_m
    tile_n = 64 if room >= 64 * 4 * (head_dim + d_v) else 32  # of two stages
    mask, scheduler = (Causal(), DynamicLongest) if causal else (Full(), StaticTiles)
    return FwdConfig(head_dim, mask=mask, tile_m=tile_m, tile_n=tile_n, scheduler=scheduler, head_dim_v=head_dim_v)
