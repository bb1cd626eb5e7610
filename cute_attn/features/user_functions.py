"""FlexAttention's score_mod and mask_mod (arXiv:2412.05496), and aux, which both take behind the places."""

from typing import Any

import torch

from .. import block_mask as block_masks
from ..arrays import type_word
from ..mod_types import PLACE_MAX
from ..mods import Mod, prepare
from ..problem import Problem
from .feature import Feature, both


class _UserFunction(Feature):
    defaults = dict(aux=())  # noqa: RUF012  as in Feature

    def key(self, value):
        return value.kernel

    def fitted(self, value, problem, device):
        _places(self.name, problem)
        _captured(self.name, value, device)
        return value

    def arguments(self, value):
        return value.arguments

    def by_name(self, value):
        return {self.name: value.given, "aux": value.aux}


class ScoreModFeature(_UserFunction):
    """The value is a Mod. It checks all that is said of functions together, and takes a BlockMask apart."""

    name, part = "score_mod", "score"
    keywords = "score_mod", "mask_mod", "aux", "block_mask"

    def given(self, asked):
        aux = asked.get("aux", ())
        if not isinstance(aux, (tuple, list)):
            raise TypeError(f"aux: {type_word(aux)} came; a tuple of tensors and numbers is needed")
        given = [asked.get(name) for name in ("score_mod", "mask_mod", "block_mask")]
        if torch.compiler.is_compiling() and any(x is not None for x in given):
            raise TypeError(
                "score_mod, mask_mod, block_mask: they cannot pass the operator that torch.compile sees; call "
                "flash_fwd from a function under torch.compiler.disable"
            )
        asked["block_mask"], asked["mask_mod"] = block_masks.prepare(given[2], given[1])
        if len(aux) and given[0] is None and asked["mask_mod"] is None:
            raise ValueError(f"aux: {len(aux)} came without a score_mod or a mask_mod, which alone take them; omit it")
        return None if given[0] is None else prepare("score_mod", given[0], tuple(aux))

    def reference(self, value, how):
        how["score_mod"] = value.function


class MaskModFeature(_UserFunction):
    """The value is a Mod. A BlockMask's own function is already in its place."""

    name, part = "mask_mod", "mask"
    keywords = "mask_mod", "aux", "block_mask"

    def given(self, asked):
        function = asked.get("mask_mod")
        return None if function is None else prepare("mask_mod", function, tuple(asked.get("aux", ())))

    def reference(self, value, how):
        how["mask_mod"] = both(how.get("mask_mod"), value.function)


def _places(name: str, problem: Problem) -> None:
    """Those that a function sees are int32, and so are their sums."""
    most = max(problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k)
    if most > PLACE_MAX:
        raise ValueError(f"{name}: given with {most} places in a dimension; up to {PLACE_MAX} are taken")


def _captured(name: str, mod: Mod, device: Any) -> None:
    """What a function captures, and its aux, is where q is, and learns nothing."""
    for x in mod.arguments:  # in memory of their own, as `mods.prepare` has seen
        if isinstance(x, torch.Tensor) and x.device != device:
            raise ValueError(
                f"{name}: it captures a tensor on {x.device}, but q is on {device}; move it with .to(device)"
            )
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: it captures a tensor that requires grad, which gets no gradient; use .detach()")
