"""What a feature is: one variation of attention, from `flash_fwd`'s keywords to a kernel's run-time arguments."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..problem import Problem


class Feature:
    """One object of a class like this is all that the host knows of a feature; `features.FEATURES` lists them.

    `value` is what `given` made of a call's keywords. None says that a call has no such feature, and no other method
    is then called, but for `operator_arguments`.
    """

    name: str  # its field in Features and FeatureKey
    keywords: tuple[str, ...]  # of flash_fwd
    defaults: dict[str, Any] = {}  # noqa: RUF012  of these, where it is not None; a class's own, never changed
    part: str = ""  # the field of kernels.state.Arguments that takes its run-time arguments
    schema: tuple[str, ...] = ()  # its arguments of torch.ops.cute_attn.attention; without any it passes no operator
    later = False  # its arguments of the operator stand behind all others: programs of before go on
    differentiable = False

    def given(self, asked: dict[str, Any]) -> Any:
        """The value, or None, of a call's keywords, each checked by itself; those that it changes for others it writes
        into `asked`.

        Raises:
            TypeError, ValueError: they are not as `flash_fwd` says.
        """
        return asked.get(self.keywords[0])

    def key(self, value: Any) -> Hashable:
        """What chooses the kernel, whatever the numbers and tensors. A Mask of `kernels.mask` is taken as it is by
        `cute_attn.plan`; anything else needs a rule there.
        """
        return True

    def fitted(self, value: Any, problem: Problem, device: torch.device) -> Any:
        """The value, held against q, k and v: TypeError or ValueError where it does not fit them."""
        return value

    def started(self, value: Any, q: Any) -> Any:
        """The value, with what each call makes anew on q's device before it is launched or traced."""
        return value

    def without_keys(self, value: Any, lse: torch.Tensor) -> None:
        """Writes what it adds to lse (B, H, Sq), which is -inf, of a call that has no keys."""

    def arguments(self, value: Any) -> tuple:
        """What the compiled kernel takes for it, in the order of the part's signature."""
        return ()

    def reference(self, value: Any, how: dict[str, Any]) -> None:
        """Writes into `how` what `reference.attention` takes for it."""
        how.update(self.by_name(value))

    def by_name(self, value: Any) -> dict[str, Any]:
        """As `flash_fwd` takes it."""
        return {self.keywords[0]: value}

    def operator_arguments(self, value: Any) -> tuple:
        """As the torch operator takes it, in the order of `schema`."""
        return (value,)

    def of_operator(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`flash_fwd`'s keywords from the operator's arguments."""
        return {self.keywords[0]: arguments[self.keywords[0]]}

    def untraceable(self, value: Any) -> str | None:
        """The keyword that cannot pass the torch operator, if one cannot."""
        return None if self.schema else self.keywords[0]

    def no_gradient(self, value: Any) -> str:
        """Why a call with inputs that require grad raises, where the feature is not differentiable."""
        return (
            f"{self.keywords[0]}: given with inputs that require grad, and its backward is not supported; call under "
            "torch.no_grad(), or use torch.nn.attention.flex_attention where gradients are needed"
        )


def both(first: Callable | None, second: Callable) -> Callable:
    """A mask_mod that holds where both do."""
    if first is None:
        return second
    return lambda b, h, q_idx, kv_idx: first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)
