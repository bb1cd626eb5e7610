"""Which blocks of keys each block of queries needs: FlexAttention's BlockMask, or lists of one's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.config import SparseBlocks
from .scalars import integer
from .streams import is_captured

GRAIN = 64  # of sparse blocks: a warpgroup's rows, and the narrowest block of keys


class BlockLists(NamedTuple):
    """Lists of blocks of keys, int32, by FlexAttention's names (arXiv:2412.05496).

    Blocks are of block_size (queries, keys), multiples of 64. B and H may be 1, for every sequence and head. A block
    that is in neither list costs nothing, and none of its pairs attend.
    """

    kv_num_blocks: Tensor  # (B, H, blocks of queries): how many blocks of keys mask_mod must be asked about
    kv_indices: Tensor  # (B, H, blocks of queries, blocks of keys): which, in its first kv_num_blocks places
    full_kv_num_blocks: Tensor | None = None  # those of which every pair attends (causal and window apply too)
    full_kv_indices: Tensor | None = None
    block_size: tuple[int, int] = (128, 128)
    check: bool = False  # hold what the lists contain against their sizes on a GPU too, which waits for it

    @property
    def blocks(self) -> SparseBlocks:
        return SparseBlocks(*self.block_size, self.full_kv_num_blocks is not None)


class Sparsity(NamedTuple):
    """A call's lists, as the kernel takes them: of every sequence and head, by strides of 0 where they are shared."""

    blocks: SparseBlocks
    arguments: tuple[Tensor, ...]  # counts and indices, and those of the full blocks

    def visible(self, mask: Callable | None, b, h, q, kv) -> Tensor:
        """As a mask_mod of FlexAttention's, for tensors of places that broadcast."""
        counts, indices = self.arguments[::2], self.arguments[1::2]
        dense = [_dense(n, index, b, h) for n, index in zip(counts, indices, strict=True)]
        m, n = q // self.blocks.block_m, kv // self.blocks.block_n
        seen = dense[0][m, n]
        seen = seen if mask is None else seen & mask(b, h, q, kv)
        return seen | dense[1][m, n] if len(dense) > 1 else seen


def _dense(counts: Tensor, indices: Tensor, b, h) -> Tensor:
    """(blocks of queries, blocks of keys) bool, of one sequence and head."""
    counts, indices = counts[b, h], indices[b, h]
    listed = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    found = torch.zeros(len(counts), indices.shape[1] + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(1, torch.where(listed, indices.long(), indices.shape[1]), True)[:, :-1]


def as_lists(needed: Tensor) -> tuple[Tensor, Tensor]:
    """(..., blocks of queries, blocks of keys) bool as one list of each row: counts and indices, as BlockLists has."""
    indices = needed.byte().argsort(dim=-1, descending=True, stable=True)
    return needed.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def prepare(block_mask, mask_mod) -> tuple[BlockLists | None, Any]:
    """(lists, mask_mod): a BlockMask has its own mask_mod.

    Raises:
        TypeError, ValueError: it is neither BlockMask nor BlockLists, or has another mask_mod beside it, or blocks that
            no kernel takes.
    """
    if block_mask is None:
        return None, mask_mod
    if isinstance(block_mask, BlockLists):
        return _checked(block_mask), mask_mod
    names = BlockLists._fields[:4]
    if not all(hasattr(block_mask, name) for name in (*names, "BLOCK_SIZE", "mask_mod")):
        raise TypeError(
            f"block_mask: {type(block_mask).__name__} came; a BlockMask of torch.nn.attention.flex_attention or "
            "cute_attn.BlockLists is needed"
        )
    own = None if getattr(block_mask.mask_mod, "__name__", "") == "noop_mask" else block_mask.mask_mod
    if own is not None and mask_mod is not None and own is not mask_mod:
        raise ValueError("mask_mod: given beside a block_mask with a mask_mod of its own; pass one, or and_masks(...)")
    given = {name: getattr(block_mask, name) for name in names}
    lists = BlockLists(**given, block_size=tuple(block_mask.BLOCK_SIZE))
    return _checked(lists), own or mask_mod


def _checked(lists: BlockLists) -> BlockLists:
    size = tuple(map(integer, lists.block_size)) if isinstance(lists.block_size, (tuple, list)) else ()
    if len(size) != 2 or any(n is None or n <= 0 or n % GRAIN for n in size):
        what = f"block_size {lists.block_size!r} came"
        raise ValueError(f"block_mask: {what}; a pair (queries, keys) is needed, multiples of {GRAIN}, as (128, 128)")
    if type(lists.check) is not bool:
        raise TypeError(f"block_mask: check: a bool is needed, {lists.check!r} came")
    if (lists.full_kv_num_blocks is None) != (lists.full_kv_indices is None):
        raise ValueError("block_mask: full_kv_num_blocks and full_kv_indices come together, or neither")
    return lists._replace(block_size=size)


def fit(lists: BlockLists, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> Sparsity:
    """The lists for one problem.

    Raises:
        TypeError, ValueError: they are not for it, or, where that is looked at, contain what they cannot; the message
            says how they should be.
    """
    m, n = lists.block_size
    rows, columns = -(-seqlen_q // m), -(-seqlen_k // n)
    found = []
    for name, x in zip(lists._fields[:4], lists[:4], strict=True):
        if x is None and name.startswith("full"):
            continue
        what = f"block_mask: {name}"
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{what}: {came} came; an int32 tensor is needed")
        want = (rows,) if name.endswith("num_blocks") else (rows, columns)
        shared = x.dim() == 2 + len(want) and x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
        if not shared or x.shape[2:] != want:
            shape = f"({batch} or 1, {heads} or 1, {', '.join(map(str, want))})"
            raise ValueError(f"{what}: shape {tuple(x.shape)} came; {shape} is needed for blocks of {(m, n)}")
        if x.device != device:
            raise ValueError(f"{what}: on {x.device}, but q is on {device}; move it with .to(device)")
        found.append(x.expand(batch, heads, *want))
    if lists.check or device.type == "cpu":
        _contents(lists)
    return Sparsity(lists.blocks, tuple(found))


def _contents(lists: BlockLists) -> None:
    """The lists count and name blocks that there are, each once. Read on the host."""
    if is_captured(lists.kv_indices):
        raise ValueError("block_mask: check=True, and nothing can be read while a CUDA graph is captured; pass False")
    columns, named = lists.kv_indices.shape[-1], []
    places = torch.arange(columns, device=lists.kv_indices.device)
    pairs: Any = [lists[:2]] if lists.full_kv_num_blocks is None else [lists[:2], lists[2:4]]
    for (counts, indices), prefix in zip(pairs, ("", "full_"), strict=False):
        listed = places < counts[..., None]
        _within(f"{prefix}kv_num_blocks", counts, columns)
        _within(f"{prefix}kv_indices", indices[listed], columns - 1)
        times = indices.new_zeros(*indices.shape[:-1], columns + 1)
        times.scatter_add_(-1, indices.long().where(listed, columns), torch.ones_like(indices))
        named.append(times[..., :-1])
    twice = (named[0] + named[-1] > 1 if named[1:] else named[0] > 1).nonzero()
    if len(twice):
        b, h, m, n = twice[0].tolist()
        what = f"block {n} of keys is named more than once for block {m} of queries, sequence {b}, head {h}"
        raise ValueError(f"block_mask: {what}; name it once, in one of the lists")


def _within(name: str, x: Tensor, most: int) -> None:
    outside = x[(x < 0) | (x > most)]
    if len(outside):
        raise ValueError(f"block_mask: {name}: {outside[0]} came; 0 to {most} are possible for a list of its size")
