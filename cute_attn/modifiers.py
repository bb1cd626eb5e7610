"""What a call asks for beside plain attention: its window, what changes its scores or their sums, their maxima."""

from functools import partial
from typing import NamedTuple

from torch import Tensor

from .block_mask import BlockLists, Sparsity
from .mods import Mod
from .plan import Kinds


class Modifiers(NamedTuple):
    """By the arguments' names, as `flash_fwd` has checked them. Without any, `NONE`."""

    window: tuple[int, int] | None = None  # left and right, both bounded
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # (H,) or (B, H), float32
    sinks: Tensor | None = None  # (H,), float32
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_mask: BlockLists | Sparsity | None = None  # Sparsity: fitted to a problem
    row_max: bool | Tensor = False  # True: each row's maximum is asked for; a tensor: where it goes

    @property
    def kinds(self) -> Kinds:
        score, mask = (None if mod is None else mod.kernel for mod in (self.score_mod, self.mask_mod))
        window, softcap, alibi, sinks = (x is not None for x in self[:4])
        sparse = None if self.block_mask is None else self.block_mask.blocks
        return Kinds(window, softcap, alibi, sinks, score, mask, sparse, self.row_max is not False)

    def arguments(self) -> tuple:
        """What the compiled call takes behind the stream: `FwdConfig.signature`."""
        slopes, sinks, score, mask = self.alibi_slopes, self.sinks, self.score_mod, self.mask_mod
        return (
            *(self.window or ()),
            *(() if mask is None else mask.arguments),
            *(() if self.softcap is None else (self.softcap,)),
            *(() if slopes is None else (slopes.data_ptr(), slopes.stride(0) if slopes.dim() == 2 else 0)),
            *(() if score is None else score.arguments),
            *(() if sinks is None else (sinks.data_ptr(),)),
            *(() if self.row_max is False else (self.row_max,)),
            *(self.block_mask.arguments if isinstance(self.block_mask, Sparsity) else ()),
        )

    def for_reference(self) -> dict:
        """As `reference.attention` takes them: a block mask is part of mask_mod."""
        named = self.by_name()
        lists = named.pop("block_mask")
        if isinstance(lists, Sparsity):
            named["mask_mod"] = partial(lists.visible, self.mask_mod)
        return named

    def by_name(self) -> dict:
        """As `flash_fwd` takes them, but for outputs: mods as functions, which hold their aux."""
        mods = dict(score_mod=self.score_mod, mask_mod=self.mask_mod)
        named = self._asdict() | {name: None if mod is None else mod.function for name, mod in mods.items()}
        del named["row_max"]
        return named

    def flat(self) -> tuple:
        """As the torch operators take them."""
        left, right = self.window or (None, None)
        return left, right, self.softcap, self.alibi_slopes, self.sinks


NONE, UNMODIFIED = Modifiers(), Kinds()
