"""torch's own F.scaled_dot_product_attention, computed by flash_fwd: `with sdpa.use():`, or by torch's registry

    torch.nn.attention.activate_flash_attention_impl(sdpa.register())  # torch 2.11 or later
    torch.nn.attention.restore_flash_attention_impl()  # and back

While either holds, torch's flash attention on CUDA is our forward, and torch asks for flash attention first. What
flash_fwd does not take (dropout, other head dims or GPUs) is computed by torch's own flash attention, and what is not
for flash attention at all (a mask, float32) goes to torch's other backends as before. The backward is torch's. Compile
a model while it holds: torch.compile keeps the backend that it saw.

`is_causal` means two things in torch: F.scaled_dot_product_attention aligns it to the first key, but asks flash
attention only where Sq == Sk; the operator beneath, which torch.nn.attention.bias.causal_lower_right calls, aligns it
to the last, as we do.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend

from .. import api, arrays, checks, notices, strides

NAME = "cute_attn"
FLASH = SDPBackend.FLASH_ATTENTION.value
OPERATOR = "_scaled_dot_product_flash_attention"


def register() -> str:
    """Make "cute_attn" known to torch's registry of flash attention implementations; nothing changes yet.

    Returns:
        the name, for `torch.nn.attention.activate_flash_attention_impl(register())`.

    Raises:
        RuntimeError: this torch has no such registry.
    """
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        raise RuntimeError(f"torch {torch.__version__} has no registry of flash attention; use `with sdpa.use():`")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Active)
    return NAME


@contextmanager
def use() -> Iterator[None]:
    """F.scaled_dot_product_attention is ours in the `with` block, in every thread, on any torch."""
    active = Active()
    try:
        yield
    finally:
        active.remove()


class Active:
    """Our kernel in the place of torch's, from when it is made until `remove()`."""

    def __init__(self, dispatch_key: str = "CUDA"):
        self._order = _priorities()
        self._library = torch.library.Library("aten", "IMPL", dispatch_key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            self._library.impl(OPERATOR, attention)
            self._library.impl(f"{OPERATOR}_backward", backward)
        torch._C._set_sdp_priority_order([FLASH, *(backend for backend in self._order if backend != FLASH)])

    def remove(self) -> None:
        self._library._destroy()
        torch._C._set_sdp_priority_order(self._order)


def _priorities() -> list[int]:
    """Of torch's backends; where torch sets its own first on the first call, as on Hopper, after such a call."""
    if torch.cuda.is_available():
        x = torch.empty(1, 1, 1, 8, dtype=torch.bfloat16, device="cuda")
        torch._fused_sdp_choice(x, x, x)
    return torch._C._get_sdp_priority_order()


def attention(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention."""
    why = obstacle(query, key, value, dropout_p, return_debug_mask, scale)
    if why is None:
        try:
            return ours(query, key, value, is_causal, scale)
        except (TypeError, ValueError) as error:  # flash_fwd does not take it, and has launched nothing
            why = str(error)
    notices.once(f"scaled_dot_product_attention: computed by torch's flash attention, not by cute_attn: {why}")
    return torchs(query, key, value, dropout_p, is_causal, return_debug_mask, scale)


def elsewhere(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> str | None:
    """Why torch does not ask flash attention at all, so that a call never comes here; None where it does."""
    if not query.is_cuda:
        return f"query: on {query.device}; torch asks flash attention for CUDA tensors only"
    if attn_mask is not None:
        return "attn_mask: flash attention takes none; use is_causal, torch.nn.attention.bias, or flash_fwd's arguments"
    if query.dtype not in checks.DTYPES:
        return f"query: {query.dtype}; flash attention takes torch.bfloat16 and torch.float16"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp(False), or torch.nn.attention.sdpa_kernel, excludes it"
    asked = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.backends.cuda.can_use_flash_attention(asked, debug=True):
            return None
    lines = [str(x.message).partition(" (Triggered")[0] for x in said]
    return " ".join(lines) or "torch finds it unfit for flash attention"


def obstacle(query, key, value, dropout_p=0.0, return_debug_mask=False, scale=None) -> str | None:
    """Why a call stays torch's before flash_fwd is asked; None where it is."""
    if dropout_p != 0 or return_debug_mask:  # its backward draws the mask again by its Philox state, not by ours
        return f"dropout_p {dropout_p}: dropout is torch's, whose backward draws its own mask again"
    if not query.shape[3] == value.shape[3] <= checks.GRADIENTS_HEAD_DIM_MAX:  # as torch's own forward does
        what = f"head_dim {query.shape[3]} of query, {value.shape[3]} of value"
        return f"{what}; torch's flash attention takes one for both, up to {checks.GRADIENTS_HEAD_DIM_MAX}"
    if scale is not None and scale <= 0 and arrays.learns(query, key, value):
        return f"scale {scale}: torch's backward takes a positive one only"
    return None


def ours(query, key, value, is_causal, scale):
    """What the operator returns: o, lse, no cumulative lengths, Sq, Sk, no random state and no debug mask."""
    with torch.no_grad():
        o, lse = api.flash_fwd(query, key, value, causal=is_causal, scale=scale, return_lse=True)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if seqlen_k == 0 or (is_causal and seqlen_q > seqlen_k):
        lse.masked_fill_(lse == -torch.inf, torch.inf)  # as FlashAttention-2 marks a row without keys
    random = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
    return o, lse, None, None, seqlen_q, seqlen_k, *random, query.new_empty(0)


def torchs(query, key, value, dropout_p, is_causal, return_debug_mask, scale):
    """The same by torch's own kernel, as its C++ does it."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    how = (None, None, q.shape[1], k.shape[1], dropout_p, is_causal, return_debug_mask)
    o, lse, *random, debug_mask = torch.ops.aten._flash_attention_forward(q, k, v, *how, scale=scale)
    o = as_told(o.transpose(1, 2), query)
    return o, lse, None, None, q.shape[1], k.shape[1], *random, debug_mask


def backward(grad_out, query, key, value, out, logsumexp, *how, scale=None):
    """aten::_scaled_dot_product_flash_attention_backward: torch's kernel, as its C++ calls it."""
    bshd = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    found = torch.ops.aten._flash_attention_backward(*bshd, logsumexp, *how, scale=scale)
    dq, dk, dv = (as_told(dx.transpose(1, 2), x) for dx, x in zip(found, (query, key, value), strict=True))
    return dq, dk, dv


def as_told(x, like):
    """x with the strides that torch's fake kernels tell torch.compile, of `like`; a copy if it was expanded alone.

    torch's own kernels order an expanded dimension otherwise, and a compiled function asserts.
    """
    order = strides.dense(like.shape, like.stride())
    if strides.plain(x.shape, x.stride()) == order:
        return x
    return x.new_empty_strided(x.shape, order).copy_(x)
