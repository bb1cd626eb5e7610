"""What a call asks for beside plain attention: its window, what changes its scores, their sums or their weights."""

from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockLists, Sparsity
from .kernels.state import Arguments
from .mods import Mod
from .problem import UNMODIFIED as UNMODIFIED
from .problem import Kinds, Problem
from .reference import LEVELS, levels_kept

SEEDS = (1 << 63) - 1


class Dropout(NamedTuple):
    p: float
    generator: torch.Generator | None
    rng_state: Tensor | None  # (2,) int64, seed and offset; None: to be drawn

    @property
    def arguments(self) -> tuple:
        kept = levels_kept(self.p)
        return self.rng_state.data_ptr(), kept, LEVELS / kept if kept else 0.0  # type: ignore[union-attr]


class Modifiers(NamedTuple):
    """By the arguments' names, as `flash_fwd` has checked them. Without any, `NONE`."""

    window: tuple[int, int] | None = None  # left and right, both bounded
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # (H,) or (B, H), float32
    sinks: Tensor | None = None  # (H,), float32
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_mask: BlockLists | Sparsity | None = None  # Sparsity: fitted to a problem
    dropout: Dropout | None = None
    row_max: bool | Tensor = False  # True: each row's maximum is asked for; a tensor: where it goes

    @property
    def kinds(self) -> Kinds:
        score, mask = (None if mod is None else mod.kernel for mod in (self.score_mod, self.mask_mod))
        window, softcap, alibi, sinks = (x is not None for x in self[:4])
        sparse = None if self.block_mask is None else self.block_mask.blocks
        return Kinds(
            *(window, softcap, alibi, sinks, score, mask, sparse), self.row_max is not False, self.dropout is not None
        )

    def started(self, q: Tensor, problem: Problem) -> "Modifiers":
        """With what a call makes: where the rows' maxima go, and dropout's random state."""
        if not self.row_max:
            return self.drawn(q)
        row_max = q.new_empty(problem.lse_shape, dtype=torch.float32)
        return self.drawn(q)._replace(row_max=row_max.fill_(-torch.inf) if problem.empty else row_max)

    def drawn(self, q: Tensor) -> "Modifiers":
        """With dropout's random state, drawn on q's device: nothing is read back, and a CUDA graph draws anew."""
        if self.dropout is None or self.dropout.rng_state is not None:
            return self
        state = torch.randint(SEEDS, (2,), dtype=torch.int64, device=q.device, generator=self.dropout.generator)
        return self._replace(dropout=self.dropout._replace(rng_state=state))

    @property
    def rng_state(self) -> Tensor | None:
        return None if self.dropout is None else self.dropout.rng_state

    @property
    def mods(self) -> dict[str, Mod | None]:
        return dict(score_mod=self.score_mod, mask_mod=self.mask_mod)

    def arguments(self) -> tuple:
        """What the compiled call takes behind the stream, in the order of `FwdConfig.signature`."""
        slopes, score, mask = self.alibi_slopes, self.score_mod, self.mask_mod
        by_part = Arguments(
            mask=(*(self.window or ()), *(() if mask is None else mask.arguments)),
            score=(
                *(() if self.softcap is None else (self.softcap,)),
                *(() if slopes is None else (slopes.data_ptr(), slopes.stride(0) if slopes.dim() == 2 else 0)),
                *(() if score is None else score.arguments),
            ),
            sinks=() if self.sinks is None else (self.sinks.data_ptr(),),
            dropout=() if self.dropout is None else self.dropout.arguments,
            row_max=() if self.row_max is False else (self.row_max,),
            lists=self.block_mask.arguments if isinstance(self.block_mask, Sparsity) else (),
        )
        return (*chain(*by_part),)

    def for_reference(self) -> dict:
        """As `reference.attention` takes them: functions with their aux, and a block mask is part of mask_mod."""
        named = self.by_name()
        lists, _, _ = named.pop("block_mask"), named.pop("generator", None), named.pop("aux", None)
        named |= {name: None if mod is None else mod.function for name, mod in self.mods.items()}
        if isinstance(lists, Sparsity):
            named["mask_mod"] = partial(lists.visible, self.mask_mod)
        return named

    def by_name(self) -> dict:
        """As `flash_fwd` takes them, but for outputs."""
        named = self._asdict() | {name: None if mod is None else mod.given for name, mod in self.mods.items()}
        given = [mod.aux for mod in self.mods.values() if mod is not None]
        named |= {"aux": given[0]} if given else {}  # both have the same
        del named["row_max"]
        dropout = named.pop("dropout")
        return named | ({} if dropout is None else dict(zip(("dropout_p", *dropout._fields[1:]), dropout, strict=True)))

    def flat(self) -> tuple:
        """As the torch operators take them."""
        left, right = self.window or (None, None)
        p = 0.0 if self.dropout is None else self.dropout.p
        return left, right, self.softcap, self.alibi_slopes, self.sinks, p, self.rng_state


NONE = Modifiers()
