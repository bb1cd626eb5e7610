"""What a call asks for beside plain attention: its window, and what changes its scores or their sums."""

from typing import NamedTuple

from torch import Tensor

from .plan import Kinds


class Modifiers(NamedTuple):
    """By the arguments' names, as `flash_fwd` has checked them. Without any, `NONE`."""

    window: tuple[int, int] | None = None  # left and right, both bounded
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # (H,) or (B, H), float32
    sinks: Tensor | None = None  # (H,), float32

    @property
    def kinds(self) -> Kinds:
        return Kinds(*(x is not None for x in self))

    def arguments(self) -> tuple:
        """What the compiled call takes behind the stream: `FwdConfig.signature`."""
        slopes, sinks = self.alibi_slopes, self.sinks
        return (
            *(self.window or ()),
            *(() if self.softcap is None else (self.softcap,)),
            *(() if slopes is None else (slopes.data_ptr(), slopes.stride(0) if slopes.dim() == 2 else 0)),
            *(() if sinks is None else (sinks.data_ptr(),)),
        )

    def flat(self) -> tuple:
        """As the torch operators take them."""
        left, right = self.window or (None, None)
        return left, right, self.softcap, self.alibi_slopes, self.sinks


NONE, UNMODIFIED = Modifiers(), Kinds()
