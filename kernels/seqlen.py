"""Varlen: sequences one behind the other in (total, heads, d); where each begins and how long it is.

TMA sees such a tensor as `ragged`: beyond the end of a sequence loads give zeros and stores write nothing, though other
sequences' rows lie there; one descriptor serves them all.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

ROWS_MAX = 1 << 30  # of a varlen tensor
REACH = 0x7FFF0000  # a size that no coordinate comes to
WRAP = 1 << 34  # 2^30 times so many elements of 2^k bytes, k >= 0, is 0 modulo 2^64


class SeqlenInfo(NamedTuple):
    """A sequence's rows of a varlen tensor."""

    start: Int32
    length: Int32


class Seqlens(NamedTuple):
    """Of the queries, or of the keys."""

    cu_seqlens: Int64  # address of (batch + 1,) int32: where each sequence begins, and where the last one ends
    seqused: Int64  # address of (batch,) int32: how many rows of each are used; 0: all up to the next sequence
    total: Int32  # rows of the tensor: whatever is written at those addresses, none beyond is touched

    def of(self, b: Int32) -> SeqlenInfo:
        """A sequence's rows."""
        return seqlen_info(self, b)


@cute.jit
def seqlen_info(p: Seqlens, b: Int32) -> SeqlenInfo:
    """The rows of sequence b."""
    ends = cute.make_tensor(int32_at(p.cu_seqlens) + b, 2)
    start = cutlass.min(cutlass.max(ends[0], 0), p.total)
    length = ends[1] - ends[0]
    if p.seqused != 0:
        length = cute.make_tensor(int32_at(p.seqused) + b, 1)[0]
    return SeqlenInfo(start, cutlass.max(cutlass.min(length, p.total - start), 0))


def int32_at(address: Int64):
    return cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)


def ragged(t: cute.Tensor) -> cute.Tensor:
    """(total, d, h) -> (2^30, d, h, y, z): at (2^30 - length + r, c, h, start + length, 2^30) is (start + r, c, h).

    Its address is 2^30 * 2^34 elements too high, which is 0 modulo 2^64; and from r = length on the first coordinate is
    out of bounds. This is Triton's construction (triton.tools.ragged_tma).
    """
    (_, d, heads), (row, _, head) = t.shape, t.stride
    shape = (Int32(ROWS_MAX), d, heads, Int32(REACH), Int32(REACH))
    back = cute.assume(Int64(WRAP) - row, divby=8)
    return cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(row, 1, head, row, back)))


def ragged_heads(t: cute.Tensor) -> cute.Tensor:
    """(total, d, h) -> ((h, 2^30), d, y, z), otherwise as `ragged`."""
    r = ragged(t)
    (rows, d, heads, *far), (row, column, head, *back) = r.shape, r.stride
    layout = cute.make_layout(((heads, rows), d, *far), stride=((head, row), column, *back))
    return cute.make_tensor(t.iterator, layout)


def heads_of(t: cute.Tensor, head, p: SeqlenInfo) -> cute.Tensor:
    """The rows of one sequence of the heads from `head` on: ((h, s), d), of `ragged_heads`'s coordinates."""
    g = t[None, None, p.start + p.length, ROWS_MAX]
    return cute.domain_offset(((head, ROWS_MAX - p.length), 0), g)


def rows_of(t: cute.Tensor, head, p: SeqlenInfo) -> cute.Tensor:
    """A head's rows of one sequence: (s, d), of `ragged`'s coordinates."""
    g = t[None, None, head, p.start + p.length, ROWS_MAX]
    return cute.domain_offset((ROWS_MAX - p.length, 0), g)
