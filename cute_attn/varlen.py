"""Packed sequences of any lengths, which only the device knows: check -> plan -> compile -> allocate -> launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled as _function_modes
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import api, checks, compile, device, notices, reference, strides
from .checks import Spec
from .integrations import by_operator
from .modifiers import NONE, UNMODIFIED, Modifiers
from .plan import varlen as plan_varlen
from .problem import Problem


def flash_fwd_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux: Sequence[Tensor | int | float] = (),
    return_row_max: bool = False,
    return_max_logit: bool = False,
) -> Any:
    """`flash_fwd` for B sequences of any lengths, packed one behind the other (FlashAttention's varlen), in one launch.

    Args:
        q: (total_q, H, D) bf16 or fp16; D, devices and strides as `flash_fwd` takes them.
        k, v: (total_k, Hk, D) with Hk dividing H, v of D columns or others.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device. Sequence b begins at row cu_seqlens[b] and ends before
            cu_seqlens[b + 1]; it may be empty, and its Sq and Sk may differ. No row of q is in two sequences.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length. Gradients need them. A small max_seqlen_q
            has the heads that share a K/V head packed into a tile (PackGQA); longer sequences are right all the same.
        seqused_q, seqused_k: (B,) int32 on q's device, the length of each sequence in place of the distance to the next
            one's beginning.
        causal, scale, window: as of `flash_fwd`; aligned to the last key of each sequence.
        softcap, alibi_slopes, sinks, score_mod, mask_mod, aux: as of `flash_fwd`, with places counted within a
            sequence; b, and the first dimension of alibi_slopes (B, H), say which. Eager calls without gradients only.
        return_lse: also return the natural log of each row's sum of exp(scale q k^T), float32 (H, total_q).
        out: written in place and returned as o; like q, with v's columns, sharing no memory with q, k, v.
        return_row_max, return_max_logit: as of `flash_fwd`, float32 (H, total_q), -inf in the rows of no sequence too,
            and (H,). Eager calls without gradients only.

    Returns:
        o (total_q, H, Dv), or a tuple of o[, lse][, row_max][, max_logit]. A row that sees no key gives o = 0,
        lse = -inf. Rows of q that are in no sequence, and those beyond seqused_q, are not written, as FlashAttention-3
        leaves them: they hold what `out` did, and without `out` anything.

    Lengths are read by the kernel, never by the host. So they may be the work of what runs before on the stream, and
    may change between replays of a CUDA graph, in which only the tensors' sizes are fixed; and they are not checked.
    Sequences that reach beyond q, k or v end with them.

    Differentiable once in q, k and v, where D == Dv <= 256; lse is not. The backward is torch's FlashAttention-2, and
    takes max_seqlen_q and max_seqlen_k at their word: rows beyond them get wrong gradients. No seqused, and no `out`.

    Raises:
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    modifiers, asked = NONE, (return_lse, return_row_max, return_max_logit, False)
    if type(return_row_max) is not bool or type(return_max_logit) is not bool:
        checks.flags(return_row_max=return_row_max, return_max_logit=return_max_logit)
    row_max = return_row_max or return_max_logit
    if (
        row_max
        or type(aux) is not tuple
        or aux
        or not window is softcap is alibi_slopes is sinks is score_mod is mask_mod is None
    ):
        causal, window = checks.window(window, causal)
        mods = checks.mods(score_mod, mask_mod, aux, None)
        modifiers = Modifiers(window, checks.softcap(softcap), alibi_slopes, sinks, *mods, row_max=row_max)
    lengths, hints = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), (max_seqlen_q, max_seqlen_k)
    if is_compiling() or (
        (_dispatch_modes() or _function_modes() or forward_ad._current_level >= 0)
        and api.traced(q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, out=out)
    ):
        return _by_operator(modifiers, q, k, v, lengths, hints, causal, scale, window, return_lse, out)
    if type(q) is not Tensor and isinstance(q, torch.fx.Proxy):
        return _by_operator(modifiers, q, k, v, lengths, hints, causal, scale, window, return_lse, out)
    if type(causal) is not bool or type(return_lse) is not bool:
        checks.flags(causal=causal, return_lse=return_lse)
    if not type(q) is type(k) is type(v) is type(cu_seqlens_q) is type(cu_seqlens_k) is Tensor:
        if checks.stands_in(q, k, v):
            return _by_operator(modifiers, q, k, v, lengths, hints, causal, scale, window, return_lse, out)
        _have_memory(lengths)
    elif not seqused_q is seqused_k is None:
        _have_memory(lengths)
    call = _call(q, k, v, lengths, hints, out, causal, UNMODIFIED if modifiers is NONE else modifiers.kinds)
    if call is None:
        return _by_operator(modifiers, q, k, v, lengths, hints, causal, scale, window, return_lse, out)
    scale = call.scale if scale is None else checks.scale(scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):  # checks.learns, uncalled
        return _by_operator(modifiers, q, k, v, lengths, hints, causal, scale, window, return_lse, out)
    if out is not None:
        checks.out_memory(out, q, k, v, call.nbytes)
    o = (torch.empty_like(q) if call.like is None else q.new_empty_strided(*call.like)) if out is None else out
    of_rows = q.shape[1], q.shape[0]
    lse = q.new_empty(of_rows, dtype=torch.float32) if return_lse else None
    if modifiers is not NONE:
        sizes = cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], q.shape[0], k.shape[0], q.shape[2]
        modifiers = checks.fitted(modifiers, Problem(*sizes), q.device)
        if row_max:
            modifiers = modifiers._replace(row_max=q.new_full(of_rows, -torch.inf, dtype=torch.float32))
    if call.gpu is None:
        _on_cpu(q, k, v, lengths, o, lse, causal, scale, modifiers)
    elif call.kernel is not None:
        _launch(call, (q, k, v, o), lengths, lse, scale, () if modifiers is NONE else modifiers.arguments())
    return api.results(o, lse, modifiers.row_max, None, asked)


LENGTHS = "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"
HINTS = "max_seqlen_q", "max_seqlen_k"


def _have_memory(lengths):
    for name, x in zip(LENGTHS, lengths, strict=True):
        if isinstance(x, Tensor):
            checks.memory(name, x)


def _by_operator(modifiers, q, k, v, lengths, hints, *arguments):
    operator_takes(modifiers)
    return by_operator.varlen(q, k, v, lengths, tuple(map(checks.max_seqlen, HINTS, hints)), *arguments)


def operator_takes(modifiers):
    """A window; ValueError for anything else, which it and its backward have not."""
    given = [name for name, x in modifiers._asdict().items() if name != "window" and x is not None and x is not False]
    if given:
        names = ", ".join(given).replace("row_max", "return_row_max, return_max_logit")
        what = "asked for of packed sequences, with inputs that require grad or under torch.compile"
        way_out = "call under torch.no_grad(), from a function under torch.compiler.disable"
        raise ValueError(f"{names}: {what}; {way_out}")


class Call(NamedTuple):
    """What all but addresses and values say of a call."""

    scale: float  # the default
    gpu: device.Device | None  # None: the CPU
    kernel: Callable | None  # None: the CPU, or nothing to write
    plain: bool  # no size of 1 has a stride that TMA would refuse, and there are keys
    nbytes: tuple[int, ...]  # that q, k, v and o reach over
    like: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # o's shape and strides; None: torch.empty_like's of q


_calls: dict[tuple, Call] = {}
CALLS = 4096  # looked up; with one more all are forgotten


def _call(q, k, v, lengths, hints, out, causal, kinds) -> Call | None:
    """Checked, planned and compiled; a look-up where the like has come before. None under torch.jit.trace.

    As in `api._call` the key leaves out what the compiled call itself holds against q, k and v.
    """
    cu_q, cu_k, used_q, used_k = lengths
    try:
        key = (
            *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), None if out is None else out.stride()),
            *(q.dtype, q.get_device(), causal, kinds, hints, *map(type, hints)),
            *(cu_q.shape, cu_q.stride(), cu_q.dtype, cu_q.get_device()),
            *(cu_k.shape, cu_k.stride(), cu_k.dtype, cu_k.get_device()),
            None if used_q is None else (used_q.shape, used_q.stride(), used_q.dtype, used_q.get_device()),
            None if used_k is None else (used_k.shape, used_k.stride(), used_k.dtype, used_k.get_device()),
        )
        call = _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, one without strides, or a hint that has no hash
        return _prepared(q, k, v, lengths, hints, out, causal, kinds)
    if call is None:
        if api._jit_traces() and api.traced(q=q, k=k, v=v, out=out):
            return None
        call = _prepared(q, k, v, lengths, hints, out, causal, kinds)
        if call.kernel is not None and k.shape[0]:  # without keys the compiled call sees others in place of k and v
            if len(_calls) >= CALLS:
                _calls.clear()
            _calls[key] = call
    return call


def _prepared(q, k, v, lengths, hints, out, *how) -> Call:
    batch, gpu, config, specs = planned(q, k, v, lengths, hints, out, *how)
    total_q, heads, head_dim = q.shape
    kernel = None if gpu is None or 0 in (batch, total_q, heads) else compile.get(config)
    plain = not any(checks.odd(x.stride) for x in specs) and k.shape[0] > 0
    nbytes, like = tuple(x.nbytes for x in specs), strides.unlike(q, v.shape[-1])
    return Call(head_dim**-0.5, gpu, kernel, plain, nbytes, like)


def planned(q, k, v, lengths, hints, out, causal, kinds):
    """As `api.planned`, with the number of sequences in the place of the problem."""
    for name, x in (*zip("qkv", (q, k, v), strict=True), *zip(LENGTHS, lengths, strict=True), ("out", out)):
        if x is not None or name in ("q", "k", "v", *LENGTHS[:2]):
            checks.tensor(name, x)
    for name, value in zip(HINTS, hints, strict=True):
        checks.max_seqlen(name, value)
    q, k, v, o = (Spec.of(x) for x in (q, k, v, q if out is None else out))
    checks.lengths(LENGTHS[0], Spec.of(lengths[0]), None, q)
    batch = len(lengths[0]) - 1
    for name, x, count in zip(LENGTHS, lengths, (None, batch + 1, batch, batch), strict=True):
        if x is not None:
            checks.lengths(name, Spec.of(x), count, q)
    checks.packed(q, k, v, batch)
    if out is not None:
        checks.out(o, q, v, "thd")
    gpu = None if q.device.type == "cpu" else device.get(q.device.index)
    kind = q.shape[2], checks.DTYPES[q.dtype], causal, kinds
    ratio = q.shape[1] // k.shape[1] if k.shape[1] else 1
    name = None if gpu is None else gpu.name
    config = plan_varlen(*kind, name, checks.other_head_dim(q, v), ratio, hints[0])
    return batch, gpu, config, (q, k, v, o)


def _launch(call: Call, tensors, lengths, lse, scale, extras):
    cu_q, cu_k, used_q, used_k = lengths
    if not call.plain:
        tensors = _for_tma(*tensors)
    gpu, kernel = cast(device.Device, call.gpu), cast(Callable, call.kernel)
    sequences = (
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        0 if used_q is None else used_q.data_ptr(),
        0 if used_k is None else used_k.data_ptr(),
        cu_q.shape[0] - 1,
    )
    address = 0 if lse is None else lse.data_ptr()
    if device.current() != gpu.index:
        kernel = gpu.guarded(kernel)
    try:
        kernel(*tensors, address, gpu.ticket(), scale, gpu.num_sms, *extras, *sequences)
    except Exception:  # where the call's own check has refused them, before the launch, ours says how to mend it
        _prepared_again(tensors, lengths)
        raise


def _prepared_again(tensors, lengths):
    q, k, v, o = tensors
    _prepared(q, k, v, lengths, (None, None), o, False, UNMODIFIED)
    checks.addresses(q, k, v, o)


def _for_tma(q, k, v, o):
    """Views whose sizes of 1 have strides that TMA takes; without keys, k and v of which no sequence has a row."""
    if k.shape[0] == 0:
        k, v = q[:1, : k.shape[1]], o[:1, : k.shape[1]]
    return [
        x.as_strided(x.shape, [s if n > 1 else d for n, s, d in zip(x.shape, x.stride(), (8, 8, 1), strict=True)])
        for x in (q, k, v, o)
    ]


def _on_cpu(q, k, v, lengths, o, lse, causal, scale, modifiers):
    cu_q, cu_k, used_q, used_k = lengths
    q, k, v = q.detach(), k.detach(), v.detach()
    notices.once(f"flash_fwd_varlen: {notices.CPU}")
    how = dict(causal=causal, scale=scale, dtype=torch.float32, **modifiers.for_reference())
    row_max = None if modifiers.row_max is False else modifiers.row_max
    with torch.autocast("cpu", enabled=False):
        used = dict(seqused_q=used_q, seqused_k=used_k, return_row_max=True)
        for rows, part, *found in reference.varlen(q, k, v, cu_q, cu_k, **used, **how):
            o[rows] = part.to(o.dtype)
            for whole, of_rows in zip((lse, row_max), found, strict=True):
                if whole is not None:
                    whole[:, rows] = of_rows
