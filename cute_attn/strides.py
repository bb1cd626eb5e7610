"""Strides of the tensors that are made beside given ones, the same for a real call and for a traced one."""

from collections.abc import Sequence

from torch import Tensor


def dense(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Without gaps, in the order in memory that `strides` has, as torch.empty_like orders them; a size of 1 as `plain`.

    As there, a dimension of stride 0 stays at its place among the others.
    """
    order = list(range(len(shape)))  # outermost first
    for i in reversed(range(len(shape) - 1)):
        at = i
        for j in range(i + 1, len(shape)):
            a, b = order[at], order[j]
            if strides[a] == 0 or strides[b] == 0 or (strides[a] == strides[b] and shape[a] >= shape[b]):
                continue
            if strides[a] > strides[b]:
                break
            order[at], order[j], at = b, a, j
    found, stride = [0] * len(shape), 1
    for d in reversed(order):
        found[d], stride = stride, stride * shape[d]
    return plain(shape, found)


def plain(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """With a size of 1 as it is in a contiguous tensor: its stride reaches over the dimension behind it."""
    found = list(strides)
    for d in reversed(range(len(found))):
        if isinstance(shape[d], int) and shape[d] == 1:
            found[d] = shape[d + 1] * found[d + 1] if d + 1 < len(found) else 1
    return tuple(found)


def of_output(q: Tensor, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides) of what is like q with so many columns."""
    shape, strides = (*q.shape[:-1], columns), q.stride()
    return shape, dense(shape, strides if q.shape[-1] == columns else (*strides[:-1], 0))


def unlike(q: Tensor, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Those of `of_output`; None where they are q's own, as torch.empty_like makes them."""
    found = of_output(q, columns)
    return None if found == (q.shape, q.stride()) else found
