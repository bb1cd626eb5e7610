"""What came as a tensor: its class, its memory, and who watches over it."""

import torch
from torch.autograd import forward_ad


def type_word(x) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def tensor(name: str, x) -> None:
    if not isinstance(x, torch.Tensor):
        source = f"{name}.copy()" if backwards(x) else name  # torch ends the process over views that run backwards
        hint = f"; torch.from_dlpack({source}) shares its memory" if hasattr(x, "__dlpack__") else ""
        raise TypeError(f"{name}: a torch.Tensor is needed, {type_word(x)} came{hint}")
    untransformed(name, x)
    _flat(name, x)
    dense(name, x.layout)
    memory(name, x)


def untransformed(name: str, x: torch.Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        hint = "differentiate with torch.autograd, and put what vmap would map over into the batch"
        raise TypeError(f"{name}: a tensor inside a transform of torch.func came, and cute_attn has no rule; {hint}")


def backwards(x) -> bool:
    """Whether an array that is not torch's has a negative stride."""
    strides = getattr(x, "strides", None)
    return isinstance(strides, tuple) and any(stride < 0 for stride in strides)


def _flat(name: str, x: torch.Tensor) -> None:
    if not x.is_nested:
        return
    hint = f"make it jagged, torch.nested.nested_tensor({name}.unbind(), layout=torch.jagged), and pass its parts"
    if x.layout == torch.jagged:
        bshd = name if getattr(x, "_ragged_idx", 1) == 1 else f"{name}.transpose(1, 2)"
        hint = f"pass {bshd}.values(), (total, H, D), and {name}.offsets().to(torch.int32) as its cu_seqlens"
    raise TypeError(f"{name}: a nested tensor came, whose sequences flash_fwd_varlen takes; {hint}")


def memory(name: str, x: torch.Tensor) -> None:
    """x has memory of its own: nothing else can a kernel read."""
    if type(x) is not torch.Tensor and wraps(x):
        _flat(name, x)
        hints = dict(to_local="to_local(), sharded along the batch or the heads", wait="wait()")
        hint = next((f"{name}.{call}" for has, call in hints.items() if hasattr(x, has)), "the tensor that it wraps")
        raise TypeError(f"{name}: a {type_word(x)} came, which has no memory of its own; pass {hint}")


def wraps(x: torch.Tensor) -> bool:
    """Whether x is of a class that has other tensors in place of memory, as DTensor has."""
    kind = type(x)
    if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or _of_a_tracer(x):
        return False
    return x.is_nested or x.data_ptr() == 0 < x.numel()


def real(name: str, x: torch.Tensor) -> None:
    """x is no stand-in of a tracer beside others that are none: its address would be 0."""
    memory(name, x)
    if type(x) is not torch.Tensor and _of_a_tracer(x):
        raise TypeError(f"{name}: a {type_word(x)} came beside tensors with memory; pass all as fake ones, or none")


def _of_a_tracer(x) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, (FakeTensor, FunctionalTensor))


def stands_in(**named: torch.Tensor) -> bool:
    """Whether a tensor is a stand-in of torch's tracers, for which the operator says what comes back.

    Raises:
        TypeError: one is of another class without memory.
    """
    if any(map(_of_a_tracer, named.values())):
        return True
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            memory(name, x)
    return False


def no_tangents(**named) -> None:
    """No tensor is a dual of torch.autograd.forward_ad, whose tangent would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, x in named.items():
        if not isinstance(x, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
            continue
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: a dual tensor of forward-mode differentiation came, and cute_attn has no such derivative; "
                "use torch.nn.functional.scaled_dot_product_attention under "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or backward-mode"
            )


def dense(name: str, storage: torch.layout) -> None:
    if storage != torch.strided:
        raise TypeError(f"{name}: a dense tensor is needed, {storage} came; use {name}.to_dense()")


def flags(**named) -> None:
    for name, value in named.items():
        if type(value) is not bool:
            raise TypeError(f"{name}: a bool is needed, {value!r} came")


def learns(*tensors: torch.Tensor) -> bool:
    """Whether a backward may follow a call."""
    return torch.is_grad_enabled() and True in [x.requires_grad for x in tensors]


def together(q: torch.Tensor, **named: torch.Tensor) -> None:
    """Everything is where q is: torch's FlashAttention backward does not ask."""
    for name, x in named.items():
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move one with .to(device)")
