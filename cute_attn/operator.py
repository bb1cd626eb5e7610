"""How an operator of torch.ops.cute_attn is made: its schema, kernel, fake kernel and gradients.

As torch.library.custom_op makes it, but for what that and register_fake do at every import: they look through all
modules for the sources, 30 ms or more.
"""

import threading
from collections.abc import Callable
from functools import wraps

import torch

LIBRARY = torch.library.Library("cute_attn", "FRAGMENT")
TAGS = torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_thread = threading.local()


def inside() -> bool:
    """Whether this thread runs an operator's kernel: what it calls is seen by no tracer, as the operator was."""
    return getattr(_thread, "depth", 0) > 0


def operator(fake: Callable, schema: str | None = None) -> Callable[[Callable], Callable]:
    """Registers the decorated kernel, of a name that ends in _op, and gives it back as it is; its schema is that of its
    annotations, or as it is written.
    """

    def register(kernel):
        name = kernel.__name__.removesuffix("_op")
        LIBRARY.define(name + (schema or torch.library.infer_schema(kernel, mutates_args=())), tags=TAGS)
        LIBRARY.impl(name, torch._disable_dynamo(_counted(kernel)), "CompositeExplicitAutograd")
        LIBRARY.impl(name, fake, "Meta")  # which fake tensors ask too
        return kernel

    return register


def alias(name: str, schema: str, call: Callable) -> None:
    """Registers an operator that is nothing but a call of others, for tracers too."""
    LIBRARY.define(name + schema, tags=TAGS)
    LIBRARY.impl(name, call, "CompositeImplicitAutograd")


def gradients(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    torch.library.register_autograd(f"cute_attn::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _counted(kernel):
    @wraps(kernel)
    def counted(*args, **kwargs):
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            return kernel(*args, **kwargs)
        finally:
            _thread.depth -= 1

    return counted
