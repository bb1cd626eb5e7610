"""Which kernel a config is of: what `cute_attn.compile` compiles, caches and names, and `cute_attn.inspect` reads."""

from collections.abc import Callable
from typing import Any, Protocol

from .append_sm90 import AppendConfig, AppendSm90
from .config import FwdConfig
from .decode_plan import DecodePlanConfig, DecodePlanSm90
from .flash_fwd_sm90 import FlashFwdSm90
from .merge_sm90 import MergeConfig, MergeSm90


class KernelConfig(Protocol):
    """A frozen, hashable dataclass: every compile-time choice of one kernel, and so its compile key."""

    @property
    def name(self) -> str:
        """The kernel's, in profilers and file names; configs of one name differ in what the host alone sees."""

    def arguments(self) -> tuple:
        """One value of each argument of the kernel's `__call__`, the stream among them, for its type."""


KERNELS: dict[type, Callable[[Any], Callable]] = {
    FwdConfig: FlashFwdSm90,
    MergeConfig: MergeSm90,
    DecodePlanConfig: DecodePlanSm90,
    AppendConfig: AppendSm90,
}


def kernel_of(config: KernelConfig) -> Callable:
    """What is compiled: called with such arguments, it launches."""
    return KERNELS[type(config)](config)
