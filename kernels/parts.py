"""The parts of a kernel, as its config asks for them."""

from typing import NamedTuple

from .block_sparse import BlockSparse
from .blocks import DiagonalFirst, Range, SplitRange
from .cluster_split import ClusterSplit, NoSplit
from .config import FwdConfig
from .decode_plan import Planned
from .dropout import Dropout, DropoutScale
from .fixup import Fixup
from .gemms import Gemms
from .grid_split import GridSplit, SharedCached, SharedRange
from .kv import Contiguous
from .kv_cache import Cached, Paged
from .kv_gather import Gathered
from .outputs import Output, RowMax, Sinks
from .pack_gqa import OneHead, PackGQA
from .sequences import Dense, Varlen
from .softmax_steps import ConstantTime, Lazy, LazyWithScores, Speculative
from .split_head_dim import SplitHeadDim, WholeHeadDim
from .trace import NoTrace, Timeline
from .weights import Weights


class Parts(NamedTuple):
    rows: OneHead  # whose queries a tile's rows are
    head_dim: WholeHeadDim  # which columns of V and O a warpgroup owns
    sequences: Dense  # where a sequence's rows lie in q, k, v and o
    kv: Contiguous  # how K and V come to shared memory
    blocks: Range  # which blocks of keys a tile multiplies, in which order
    gemms: Gemms
    softmax: Lazy  # how a step makes P of S
    weights: Weights  # what becomes of P
    split: NoSplit  # who has the rest of a tile's keys
    outputs: tuple[Output, ...]  # beside O and lse
    trace: NoTrace  # who writes down when


def parts_of(c: FwdConfig) -> Parts:
    """Each part reads what it needs of the config."""
    head_dim = (SplitHeadDim if c.head_dim_splits > 1 else WholeHeadDim)(c)
    sequences = _sequences(c)(c)
    blocks, trace = _blocks(c)(c), (Timeline if c.timeline else NoTrace)(c)
    gemms = Gemms(c, head_dim, trace)
    rows = (PackGQA if c.pack > 1 else OneHead)(c, sequences)
    return Parts(
        rows=rows,
        head_dim=head_dim,
        sequences=sequences,
        kv=_kv(c)(c, sequences, trace),
        blocks=blocks,
        gemms=gemms,
        softmax=_softmax(c)(c, blocks, gemms),
        weights=(Dropout if c.dropout else Weights)(c),
        split=_split(c, rows, head_dim),
        outputs=tuple(output(c) for output in _outputs(c)),
        trace=trace,
    )


def _sequences(c: FwdConfig) -> type[Dense]:
    if c.cache:
        return (Planned if c.planned else SharedCached) if c.shares else Cached
    return Varlen if c.varlen else Dense


def _kv(c: FwdConfig) -> type[Contiguous]:
    if c.cache:
        return Gathered if c.cache.gathers else Paged
    return Contiguous


def _split(c: FwdConfig, rows: OneHead, head_dim: WholeHeadDim) -> NoSplit:
    if c.shares:
        return (Fixup if c.fixup else GridSplit)(c, rows, head_dim)
    return (ClusterSplit if c.split > 1 else NoSplit)(c)


def _blocks(c: FwdConfig) -> type[Range]:
    if c.shares:
        return SharedRange
    if c.sparse:
        return BlockSparse
    if c.split > 1:
        return SplitRange
    return DiagonalFirst if c.diagonal_first else Range


def _softmax(c: FwdConfig) -> type[Lazy]:
    if c.constant_time:
        return ConstantTime
    if c.split > 1 or c.shares:
        return LazyWithScores
    return Speculative if c.speculative else Lazy


def _outputs(c: FwdConfig) -> list[type[Output]]:
    """In the order in which they finish a row."""
    wanted = {RowMax: c.row_max, DropoutScale: c.dropout, Sinks: c.sinks}
    return [output for output, asked in wanted.items() if asked]
