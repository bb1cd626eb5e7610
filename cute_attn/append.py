"""New keys and values into a cache: `append_kv` by slots, and `flash_fwd_kvcache`'s k and v behind each sequence's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled as _function_modes
from torch._C import _is_tracing as _jit_traces
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import append_checks as asked
from . import arrays, call, checks, compile, device, notices, reference
from .checks import Spec
from .kernels.append_sm90 import AppendConfig
from .request import UNKEYED, recorded

INSTEAD = "k_cache.view(-1, Hk, D)[slot_mapping] = k"


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotary_positions: Tensor | None = None,
) -> None:
    """New tokens' keys and values into their slots of a cache, in place, by one kernel at memory speed.

    vLLM's reshape_and_cache_flash, SGLang's set_kv_buffer: for engines that write the cache in a step of its own.

    Args:
        k, v: (T, Hk, D) and (T, Hk, Dv), bf16 or fp16, on a Hopper GPU or the CPU; D and Dv multiples of 8. Any strides
            with a contiguous last dimension and the others at multiples of 8 elements.
        k_cache, v_cache: (pages, page_size, Hk, D) and (pages, page_size, Hk, Dv) of that type, of any page_size, in
            strides as k's. Nothing but the tokens' rows changes.
        slot_mapping: (T,) int64 on k's device: token t goes to row slot % page_size of page slot // page_size. A token
            whose slot is none of the cache's, such as -1, is passed over. No two tokens have the same slot.
        k_scale, v_scale: of FP8 caches, which are not supported yet: anything but None raises.
        rotary_cos, rotary_sin: (places, R / 2), float32 or k's type, R a multiple of 16 up to D: k's first R columns
            are rotated (RoPE, arXiv:2104.09864), computed in float32 and rounded once. Both, or neither.
        rotary_interleaved: columns 2i and 2i + 1 are a pair; False: columns i and i + R / 2, as in GPT-NeoX and Llama.
        rotary_positions: with rotary_cos, (T,) int32: by which row of cos and sin each token is rotated. Positions end
            with the table: what lies beyond is rotated as the last one.

    Slots and positions are read by the kernel, never by the host: they may change between replays of a CUDA graph.

    No gradients: inputs that require grad raise.

    Raises:
        NotImplementedError: k_scale, v_scale.
        TypeError, ValueError: before any launch, for whatever is not as above; the message says how to mend it.
    """
    asked.no_scales(k_scale=k_scale, v_scale=v_scale)
    rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, rotary_positions)
    new = Slots(k, v, k_cache, v_cache, slot_mapping, rotary)
    if traced(new.named()):
        new.by_operator()
    else:
        new.run()


class Rotary(NamedTuple):
    """What rotates: all None where nothing does."""

    cos: Any
    sin: Any
    interleaved: bool
    where: Any  # a token's row of the table, or each sequence's first

    @property
    def word(self) -> str:
        """As AppendConfig has it."""
        return "" if self.cos is None else "interleaved" if self.interleaved else "halves"

    @property
    def tensors(self) -> tuple:
        return () if self.cos is None else (self.cos, self.sin)

    def of(self, x: Tensor, places: Tensor) -> Tensor:
        """x (T, H, D), by torch."""
        return x if self.cos is None else reference.rotated(x, self.cos, self.sin, places, self.interleaved)

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """As AppendConfig has it."""
        if self.cos is None:
            return {}
        return dict(rotary=self.word, table=checks.DTYPES.get(self.cos.dtype, "fp32"))


class Prepared(NamedTuple):
    """What the shapes, strides, types and devices of a call say."""

    gpu: Any  # device.Device, or None: the CPU
    kernel: Any  # a Callable; None: the CPU, or nothing to do

    def launch(self, *arguments) -> None:
        kernel = self.kernel if device.current() == self.gpu.index else self.gpu.guarded(self.kernel)
        kernel(*arguments)


class Slots(NamedTuple):
    """`append_kv`'s."""

    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    slots: Any
    rotary: Rotary

    def named(self) -> dict[str, Any]:
        return _named(
            zip(("k", "v", "k_cache", "v_cache", "slot_mapping"), self, strict=False), self.rotary, "positions"
        )

    def key(self) -> tuple:
        return append_kv, self.rotary.interleaved, type(self.rotary.interleaved)

    def by_operator(self) -> None:
        r = self.rotary
        torch.ops.cute_attn.append_kv(*self[:5], r.cos, r.sin, r.interleaved, r.where)

    def run(self) -> None:
        found = prepared(self)
        asked.memory(self.named())
        if found.gpu is None:
            self._on_cpu()
        elif found.kernel is not None:
            where = self.slots.data_ptr(), _address(self.rotary.where)
            found.launch(self.k[None], self.v[None], self.k_cache, self.v_cache, *self.rotary.tensors, *where)

    def _on_cpu(self) -> None:
        notices.once(f"append_kv: {notices.CPU}")
        k = self.rotary.of(self.k, self.rotary.where)
        reference.append(k, self.v, self.k_cache, self.v_cache, self.slots)

    def made(self) -> Prepared:
        specs = asked.slots(self.named())
        asked.rotary(self.rotary.interleaved, specs, "rotary_positions", specs["k"].shape[0])
        gpu = _gpu(specs["k"])
        nothing = 0 in (*specs["k"].shape, *specs["k_cache"].shape)
        return _made(self.named(), gpu, None if nothing else self.rotary.config(self.k.dtype))


class Behind(NamedTuple):
    """`flash_fwd_kvcache`'s new tokens, behind the rows that each sequence has; q is rotated beside them."""

    q: Any
    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    cache_seqlens: Any  # a tensor, or one number for every sequence
    page_table: Any
    cache_batch_idx: Any
    cu_seqlens_q: Any
    cu_seqlens_k_new: Any
    rotary: Rotary
    spread: bool  # a sequence's queries follow each other; or all are at the first one's place

    def named(self) -> dict[str, Any]:
        pairs = ((name, x) for name, x in zip(self._fields, self, strict=True) if name not in ("rotary", "spread"))
        return _named(
            ((name, x) for name, x in pairs if x is not None and not isinstance(x, int)), self.rotary, "seqlens"
        )

    def key(self) -> tuple:
        return Behind, self.rotary.interleaved, type(self.rotary.interleaved), type(self.cache_seqlens)

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def capacity(self) -> int:
        pages, page_size = self.k_cache.shape[:2]
        return 0 if pages == 0 else page_size * (1 if self.page_table is None else self.page_table.shape[1])

    def by_operator(self) -> tuple[Tensor, Tensor]:
        r, by_tensor = self.rotary, isinstance(self.cache_seqlens, (Tensor, torch.fx.Proxy))
        lengths = (self.cache_seqlens, None) if by_tensor else (None, self.cache_seqlens)
        how = r.cos, r.sin, r.interleaved, r.where, self.spread
        q, seqlens = torch.ops.cute_attn.append_behind(*self[:5], *lengths, *self[6:10], *how)
        return (self.q if r.cos is None else q), seqlens

    def run(self, found: Prepared) -> tuple[Tensor, Tensor]:
        """q, rotated where that is asked for, and how many rows each sequence has now."""
        asked.memory(self.named())
        asked.room(self.cache_seqlens, self.k, self.cu_seqlens_k_new, self.capacity)
        seqlens = self.q.new_empty(self.batch, dtype=torch.int32)
        if found.gpu is None:
            notices.once(f"flash_fwd_kvcache: {notices.CPU}")
            return self._on_cpu(seqlens), seqlens
        q = self.q if self.rotary.cos is None else torch.empty_like(self.q)
        if found.kernel is not None:
            both = () if self.rotary.cos is None else (self.q, q)
            queries = (self._outer(x, self.cu_seqlens_q) for x in both)
            new = (self._outer(x, self.cu_seqlens_k_new) for x in (self.k, self.v))
            found.launch(*new, self.k_cache, self.v_cache, *queries, *self.rotary.tensors, *self._numbers(seqlens))
        return q, seqlens

    def _outer(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(B, S, H, D), or of packed sequences (1, total, H, D)."""
        return x if cu_seqlens is None else x[None]

    def _numbers(self, seqlens: Tensor) -> tuple:
        """As of kernels.append_sm90.Sequences."""
        new = self.k.shape[0 if self.cu_seqlens_k_new is not None else 1]
        lengths = (0, self.cache_seqlens) if isinstance(self.cache_seqlens, int) else (self.cache_seqlens.data_ptr(), 0)
        pages, stride = self.cache_batch_idx, 0
        if self.page_table is not None:
            pages, stride = self.page_table, self.page_table.stride(0)
        before = self.batch, _address(self.cu_seqlens_k_new), new, *lengths, _address(self.rotary.where)
        queries = _address(self.cu_seqlens_q), self.q.shape[0 if self.cu_seqlens_q is not None else 1], int(self.spread)
        return *before, self.capacity, _address(pages), stride, seqlens.data_ptr(), *queries

    def _on_cpu(self, seqlens: Tensor) -> Tensor:
        if not self.batch:
            return self.q
        k, v, q = (x.flatten(0, -3) for x in (self.k, self.v, self.q))
        every = self.cache_seqlens
        lengths = torch.full((self.batch,), every) if isinstance(every, int) else every
        of_k = reference.members(len(k), self.cu_seqlens_k_new, self.k.shape[1])
        of_q = reference.members(len(q), self.cu_seqlens_q, self.q.shape[1])
        where = dict(page_table=self.page_table, cache_batch_idx=self.cache_batch_idx)
        slots = reference.next_slots(of_k, lengths, self.capacity, self.k_cache.shape[1], **where)
        angles = (lengths if self.rotary.where is None else self.rotary.where).tolist()
        turned = self.rotary.of(k, torch.tensor([angles[b] + i for b, i in of_k]))
        reference.append(turned, v, self.k_cache, self.v_cache, slots)
        new = torch.tensor([sum(b == n for b, _ in of_k) for n in range(self.batch)])
        seqlens.copy_((lengths.clamp(min=0) + new).clamp(max=self.capacity))
        places = torch.tensor([angles[b] + i * self.spread for b, i in of_q])
        inside = torch.tensor([b >= 0 for b, _ in of_q])
        return torch.where(inside[:, None, None], self.rotary.of(q, places), q).view_as(self.q)

    def made(self) -> Prepared:
        """The attention's request has checked q, the caches and what says where they lie."""
        specs = asked.behind(self.named(), self.batch)
        asked.room(self.cache_seqlens, self.k, self.cu_seqlens_k_new, self.capacity)
        asked.rotary(self.rotary.interleaved, specs, "rotary_seqlens", self.batch)
        how = dict(where="batch" if self.page_table is None else "pages", queries=self.rotary.cos is not None)
        return _made(self.named(), _gpu(specs["k"]), self.rotary.config(self.k.dtype) | how if self.batch else None)


def _named(pairs: Any, rotary: Rotary, where: str) -> dict[str, Any]:
    """The tensors of a call, by its arguments' names."""
    named = dict(rotary_cos=rotary.cos, rotary_sin=rotary.sin) | {f"rotary_{where}": rotary.where}
    return dict(pairs) | {name: x for name, x in named.items() if x is not None}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _gpu(k: Spec) -> device.Device | None:
    return None if k.device.type == "cpu" else device.get(k.device.index, "k", INSTEAD)


def _made(named: dict[str, Any], gpu: device.Device | None, how: dict[str, Any] | None) -> Prepared:
    """how: an AppendConfig's; None: there is nothing to do."""
    if gpu is None or how is None:
        return Prepared(gpu, None)
    asked.aligned(named)
    return Prepared(gpu, compile.get(AppendConfig(checks.DTYPES[named["k"].dtype], **how)))


def prepared(new: Slots | Behind) -> Prepared:
    """Checked and compiled; a look-up where the like has come before."""
    try:
        seen = ((n, x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for n, x in new.named().items())
        whole = *new.key(), *seen
        found = call.known.get(whole)
    except UNKEYED:
        return new.made()
    if found is None:
        found = new.made()
        if found.kernel is not None:
            call.keep(whole, found)
    return found


def traced(named: dict[str, Any]) -> bool:
    """Whether something records what is done with tensors: it gets the operator then."""
    if is_compiling():
        return True
    watched = _dispatch_modes() or _function_modes() or _jit_traces() or forward_ad._current_level >= 0
    if watched and recorded(**named):
        return True
    kinds = {type(x) for x in named.values()}
    return kinds != {Tensor} and (torch.fx.Proxy in kinds or arrays.stands_in(**named))
