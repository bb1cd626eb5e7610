"""What a call may ask for. Everything wrong raises here, before any launch: the argument, what came, what may come."""

import math
import numbers
from typing import Any, NamedTuple

import torch

from .arrays import dense, flags, memory
from .kernels.config import HEAD_DIM_MAX
from .problem import PLAIN, FeatureKey, Problem
from .scalars import integer

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TORCH_DTYPES = {word: dtype for dtype, word in DTYPES.items()}
LAYOUTS = ("bhsd", "bshd")
ALIGNMENT = 8  # elements of 2 bytes: TMA moves multiples of 16 bytes from multiples of 16
GRADIENTS_HEAD_DIM_MAX = 256  # of torch's backward kernels
SIZE_MAX = 1 << 30  # rows of a sequence, and tiles of a launch: indices are int32
GRID_MAX = 65_535  # blocks of a CUDA grid in y and z
SCALE_MAX = 2.3e38  # times log2(e) it is still a float32


class Spec(NamedTuple):
    """What a check needs of a tensor, hashable."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: torch.layout = torch.strided

    @classmethod
    def of(cls, x: torch.Tensor) -> "Spec":
        return cls(x.shape, x.stride(), x.dtype, x.device, x.layout)

    @property
    def dims(self) -> list[tuple[int, int]]:
        """(size, stride) of each dimension that has more than one element."""
        return [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n > 1]

    @property
    def nbytes(self) -> int:
        """From the first element to past the last."""
        return extent(self.dims) * self.dtype.itemsize if self.shape.numel() else 0


def words(causal, layout, constant_time=False, window=False) -> None:
    flags(causal=causal, constant_time=constant_time, window=window)
    if layout not in LAYOUTS:
        raise ValueError(f'layout: {layout!r} is not known; use "bhsd" (torch SDPA) or "bshd" (FlashAttention)')


def problem(
    q: Spec, k: Spec, v: Spec, causal: bool, layout: str, constant_time: bool = False, features: Any = PLAIN
) -> Problem:
    """The problem that q, k, v state together."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        _one_tensor(name, x, layout)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {x.dtype} does not match q's {q.dtype}; convert one with .to(dtype)")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move one with .to(device)")
    h, s = layout.index("h"), layout.index("s")
    batch, heads, heads_kv, d = q.shape[0], q.shape[h], k.shape[h], q.shape[3]
    if v.shape[:3] != k.shape[:3]:
        want = _words(layout, "Hk", "Sk", "Dv")
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit k's {tuple(k.shape)}; v is {want} with k's B, Hk, Sk")
    if k.shape[0] != batch or k.shape[3] != d:
        want = _words(layout, "Hk", "Sk")
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; k is {want} with q's B and D")
    if heads and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(f"k: {heads_kv} heads do not divide q's {heads}; use Hk with H % Hk == 0 (MHA, GQA, MQA)")
    tiles = -(-q.shape[s] // 64) * heads * batch
    if tiles >= SIZE_MAX:
        raise ValueError(f"q: {tiles} tiles of 64 rows in one call; split the batch to stay below {SIZE_MAX}")
    if constant_time and features.sparse:
        raise ValueError("constant_time: given with block_mask, whose kernel branches on scores; omit one of them")
    sizes = batch, heads, heads_kv, q.shape[s], k.shape[s], d
    return Problem(*sizes, DTYPES[q.dtype], layout, causal, constant_time, features, other_head_dim(q, v))


def other_head_dim(q: Spec | torch.Tensor, v: Spec | torch.Tensor) -> int:
    """v's, where it is not q's; else 0."""
    return 0 if v.shape[-1] == q.shape[-1] else v.shape[-1]


def ratio(given) -> int:
    heads = integer(given)
    if heads is None or heads < 1:
        raise ValueError(f"ratio: {given!r} came; the number of query heads to a K/V head is needed, 1 or more")
    return heads


def warmup_page(given) -> int:
    size = integer(given)
    if size is None or size < 0:
        raise ValueError(f"page_size: {given!r} came; the number of keys of a page is needed, or 0 for a dense cache")
    return size


def no_constant_time(problems) -> None:
    """Over a cache there is none."""
    if any(problem.constant_time for problem in problems):
        raise ValueError(
            "constant_time: flash_fwd_kvcache has no kernels for it; leave it out where page_size is given"
        )


def warmup_problem(head_dim, dtype, layout, causal, constant_time, window, head_dim_v=None) -> Problem:
    """A small problem that the kernel for these serves."""
    words(causal, layout, constant_time, window)
    dtype, dims = TORCH_DTYPES.get(dtype, dtype), (head_dim, head_dim if head_dim_v is None else head_dim_v)
    x, v = (Spec(torch.Size((1, 1, 1, d)), (d, d, d, 1), dtype, torch.device("cpu")) for d in dims)
    return problem(x, x, v, causal and not window, layout, constant_time, FeatureKey(window=window))


def _words(layout: str, h: str, s: str, d: str = "D") -> str:
    return f"(B, {h}, {s}, {d})" if layout == "bhsd" else f"(B, {s}, {h}, {d})"


def _one_tensor(name: str, x: Spec, layout: str) -> None:
    h, s = ("H", "Sq") if name in ("q", "out") else ("Hk", "Sk")
    dense(name, x.storage)
    if len(x.shape) != 4:
        want = _words(layout, h, s)
        raise ValueError(f"{name}: {len(x.shape)} dimensions, shape {tuple(x.shape)}; 4 are needed: {want}")
    element(name, x)
    if x.shape[layout.index("s")] > SIZE_MAX:
        raise ValueError(f"{name}: {x.shape[layout.index('s')]} rows in a sequence; at most {SIZE_MAX} are supported")
    placed(name, x)


def element(name: str, x: Spec) -> None:
    """Of a type and a head dim that kernels have."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: {x.dtype} is not supported; use torch.bfloat16 or torch.float16")
    d = x.shape[-1]
    if d % ALIGNMENT or not 0 < d <= HEAD_DIM_MAX:
        raise ValueError(f"{name}: head_dim {d} is not supported; use a multiple of 8 up to {HEAD_DIM_MAX}")


def placed(name: str, x: Spec) -> None:
    """On the CPU with any strides, or on a GPU with those that a kernel takes."""
    if known_device(name, x):
        strides(name, x)


def known_device(name: str, x: Spec) -> bool:
    """Whether it is a GPU; False: the CPU."""
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: device {x.device} is not supported; use a CUDA device (sm_90), or the CPU")
    return x.device.type == "cuda"


def varlen(q: Spec, k: Spec, v: Spec, batch: int) -> None:
    """q, k, v are of so many varlen sequences, and fit together."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        _one_varlen(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {x.dtype} does not match q's {q.dtype}; convert one with .to(dtype)")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move one with .to(device)")
    if v.shape[:2] != k.shape[:2]:
        what = f"shape {tuple(v.shape)} does not fit k's {tuple(k.shape)}"
        raise ValueError(f"v: {what}; v is (total_k, Hk, Dv) with k's total_k, Hk")
    (total_q, heads, d), (_, heads_kv, d_k) = q.shape, k.shape
    if d_k != d:
        what = f"shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}"
        raise ValueError(f"k: {what}; k is (total_k, Hk, D) with q's D")
    if heads and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(f"k: {heads_kv} heads do not divide q's {heads}; use Hk with H % Hk == 0 (MHA, GQA, MQA)")
    packed_tiles(total_q, batch, heads)


def packed_tiles(total_q: int, batch: int, heads: int) -> None:
    """No more than a launch numbers, whatever the sequences' lengths."""
    tiles = (total_q // 64 + batch) * heads
    if tiles >= SIZE_MAX:
        raise ValueError(f"q: up to {tiles} tiles of 64 rows in one call; split it to stay below {SIZE_MAX}")


def _one_varlen(name: str, x: Spec) -> None:
    dense(name, x.storage)
    if len(x.shape) != 3:
        want = "(total_q, H, D)" if name in ("q", "out") else "(total_k, Hk, D)"
        raise ValueError(f"{name}: {len(x.shape)} dimensions, shape {tuple(x.shape)}; 3 are needed: {want}")
    element(name, x)
    if x.shape[0] > SIZE_MAX:
        raise ValueError(f"{name}: {x.shape[0]} rows; at most {SIZE_MAX} are supported")
    placed(name, x)


def lengths(name: str, x: Spec, count: int | None, q: Spec) -> None:
    """int32 beside q, one behind the other; `count` of them, or at least one where that is None."""
    want = "(B + 1,)" if name.startswith("cu_seqlens") else "(B,)"
    dense(name, x.storage)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: {x.dtype} came, torch.int32 is needed; convert it with .to(torch.int32)")
    if len(x.shape) != 1 or (x.shape[0] < 1 if count is None else x.shape[0] != count):
        wanted = want if count is None else f"({count},)"
        raise ValueError(f"{name}: shape {tuple(x.shape)} came, {wanted} is needed: {want} for B sequences")
    if x.shape[0] > 1 and x.stride[0] != 1:
        raise ValueError(f"{name}: stride {x.stride[0]} came, 1 is needed; use {name}.contiguous()")
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move it with .to(device)")


def max_seqlen(name: str, given) -> Any:
    value = integer(given)
    if value is None and given is not None:
        raise TypeError(f"{name}: an int or None is needed, {given!r} came; for a tensor pass its .item()")
    if value is not None and value < 0:
        raise ValueError(f"{name}: {value} is below 0; use the longest sequence's length, or None")
    return value


def varlen_gradients(max_seqlen_q, max_seqlen_k, seqused_q, seqused_k) -> None:
    """What the backward cannot do without, and what it does not take."""
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is None:
            what = "None came with inputs that require grad, and the backward needs the longest sequence's length"
            raise ValueError(f"{name}: {what}; pass it, or call under torch.no_grad()")
    for name, value in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if value is not None:
            what = "given with inputs that require grad, and the backward takes cu_seqlens only"
            raise ValueError(f"{name}: {what}; pack the used rows, or call under torch.no_grad()")


def strides(name: str, x: Spec) -> None:
    """The last dimension contiguous, the others at multiples of 16 bytes; sizes of 1 may have any stride."""
    alignment = 16 // x.dtype.itemsize
    hint = f"use {name}.contiguous(), or pad the rows of its storage to a multiple of {alignment} elements"
    if x.stride[-1] != 1:
        what = f"stride {x.stride[-1]} in the last dimension, strides {x.stride}"
        raise ValueError(f"{name}: {what}; 1 is needed: {hint}")
    for i in reversed(range(len(x.shape) - 1)):
        if x.shape[i] > 1 and x.stride[i] % alignment:
            what = f"stride {x.stride[i]} in dimension {i}, strides {x.stride}"
            raise ValueError(f"{name}: {what}; a multiple of {alignment} elements (16 bytes) is needed: {hint}")


def odd(stride: tuple[int, ...]) -> bool:
    """Whether TMA would refuse these strides, if only for a size of 1."""
    return any(s % ALIGNMENT for s in stride[:-1]) or stride[-1] != 1


def addresses(**named: torch.Tensor) -> None:
    """Each tensor's data starts at a multiple of 16 bytes."""
    for name, x in named.items():
        aligned(name, x)


def aligned(name: str, x: torch.Tensor) -> None:
    past = x.data_ptr() % 16
    if past:
        what = f"its data starts {past} bytes past a multiple of 16, storage offset {x.storage_offset()}"
        raise ValueError(f"{name}: {what}; slice at a multiple of {16 // x.itemsize} elements, or use {name}.clone()")


def trained_head_dims(q: torch.Tensor, v: torch.Tensor) -> None:
    """What torch's backward kernels take."""
    d, d_v = q.shape[-1], v.shape[-1]
    if d_v != d or d > GRADIENTS_HEAD_DIM_MAX:
        raise ValueError(
            f"v: head_dim {d_v} beside q's {d} came with inputs that require grad, and the backward takes equal ones "
            f"up to {GRADIENTS_HEAD_DIM_MAX}; call under torch.no_grad(), or use "
            "torch.nn.functional.scaled_dot_product_attention where gradients are needed"
        )


def grid(q: torch.Tensor, layout: str) -> None:
    """The backward's own limit: CUDA's grids have at most 65,535 blocks in y and z."""
    for what, i in (("batches", 0), ("heads", layout.index("h"))):
        if q.is_cuda and q.shape[i] > GRID_MAX:
            raise ValueError(
                f"q: {q.shape[i]} {what}; with gradients at most {GRID_MAX} are supported: split them over several "
                "calls, or call under torch.no_grad()"
            )


def scale(value) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"scale: a real number is needed, {type(value).__name__} came; for a tensor pass scale.item()")
    number = float(value)
    if not abs(number) <= SCALE_MAX:  # also NaN
        raise ValueError(f"scale: {number} is not finite in float32; use one between {-SCALE_MAX} and {SCALE_MAX}")
    return number


def out(o: Spec, q: Spec, v: Spec, layout: str) -> None:
    """`out` is like q, with v's head dim, and addresses no element twice."""
    if layout == "thd":
        _one_varlen("out", o)
    else:
        _one_tensor("out", o, layout)
    want = (*q.shape[:-1], v.shape[-1])
    if tuple(o.shape) != want:
        whose = "q's with v's head_dim," if other_head_dim(q, v) else "q's"
        raise ValueError(f"out: shape {tuple(o.shape)} is not {whose} {want}")
    if o.dtype != q.dtype:
        raise TypeError(f"out: {o.dtype} came, q's {q.dtype} is needed")
    if o.device != q.device:
        raise ValueError(f"out: on {o.device}, but q is on {q.device}")
    distinct("out", o)


def distinct(name: str, x: Spec) -> None:
    """It addresses no element twice."""
    dims = sorted(x.dims, key=lambda dim: dim[1])
    if any(stride < extent(dims[:i]) for i, (_, stride) in enumerate(dims)):
        what = f"strides {x.stride} address elements of shape {tuple(x.shape)} more than once"
        raise ValueError(f"{name}: {what}; use a dense {name}")


def out_memory(
    o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, nbytes, names=("q", "k", "v")
) -> None:
    """`out` shares no element with q, k or v; nbytes: from the first to past the last element of q, k, v and out."""
    memory("out", o)
    if o.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: requires grad; pass out.detach(), or call under torch.no_grad()")
    q_start, k_start, v_start, start = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr()
    q_bytes, k_bytes, v_bytes, o_bytes = nbytes
    end = start + o_bytes
    for i, (x, first, size) in enumerate(((q, q_start, q_bytes), (k, k_start, k_bytes), (v, v_start, v_bytes))):
        if start < first + size and first < end and overlap(o, x):
            raise ValueError(f"out: shares memory with {names[i]}; pass an out of its own, or omit it")


def extent(dims: list[tuple[int, int]]) -> int:
    """Elements from the first to the last that these (size, stride) pairs reach."""
    return 1 + sum((size - 1) * stride for size, stride in dims)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors whose ranges of addresses meet may share an element; slices of a packed qkv do not.

    Exact where the outer strides of both have a common divisor that the inner extents fit in, else cautious. Counted
    in bytes: their types may differ.
    """
    gap = b.data_ptr() - a.data_ptr()
    dims = [[(n, s * x.itemsize) for n, s in Spec.of(x).dims] + [(x.itemsize, 1)] for x in (a, b)]
    for stride in {s for _, s in dims[0] + dims[1] if s > 1}:
        period = math.gcd(*(s for _, s in dims[0] + dims[1] if s >= stride))
        inner = [extent([(n, s) for n, s in x if s < stride]) for x in dims]
        if gap % period >= inner[0] and gap % period + inner[1] <= period:
            return False  # in every period a's elements come first, then b's
    return True
