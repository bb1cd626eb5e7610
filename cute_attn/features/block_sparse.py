"""Block-sparse attention: indices say which blocks of keys each block of queries needs."""

from functools import partial

import torch

from .. import block_mask as block_masks
from ..arrays import memory
from .feature import Feature


class BlockSparseFeature(Feature):
    """The value is `BlockLists`; fitted to a problem, `Sparsity`."""

    name, keywords, part = "sparse", ("block_mask",), "block_indices"

    def key(self, value):
        return value.blocks

    def fitted(self, value, problem, device):
        if not isinstance(value, block_masks.BlockLists):
            return value
        for name, x in zip(value._fields[:4], value[:4], strict=True):
            if isinstance(x, torch.Tensor):
                memory(f"block_mask: {name}", x)
        sizes = problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k
        return block_masks.fit(value, *sizes, device)

    def arguments(self, value):
        return value.arguments

    def reference(self, value, how):
        """Of partial blocks the mask_mod says which pairs attend; of full ones all do."""
        how["mask_mod"] = partial(value.visible, how.get("mask_mod"))
