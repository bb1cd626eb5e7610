"""New keys and values into a cache: `append_kv` by slots, and `flash_fwd_kvcache`'s k and v behind each sequence's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import append_checks as asked
from . import call, checks, compile, device, notices, reference
from . import kvcache_checks as of_cache
from .checks import Spec
from .kernels.append_sm90 import AppendConfig
from .kvcache_operands import Cached
from .request import seen_by_tracer

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
    if seen_by_tracer(new.named()):
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

    def named(self, where: str) -> dict[str, Tensor]:
        """Those that are given, by their arguments' names."""
        pairs = ("rotary_cos", self.cos), ("rotary_sin", self.sin), (where, self.where)
        return {name: x for name, x in pairs if x is not None}

    def key(self) -> tuple:
        return self.interleaved, type(self.interleaved)

    def config(self) -> dict[str, Any]:
        """As AppendConfig has it."""
        if self.cos is None:
            return {}
        return dict(rotary=self.word, table=checks.DTYPES.get(self.cos.dtype, "fp32"))


class Prepared(NamedTuple):
    """What the shapes, strides, types and devices of a call say."""

    gpu: Any  # device.Device, or None: the CPU
    kernel: Any  # a Callable; None: the CPU, or nothing to do

    def launch(self, *arguments) -> None:
        device.launcher(self.gpu, self.kernel)(*arguments)


class Slots(NamedTuple):
    """`append_kv`'s."""

    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    slots: Any
    rotary: Rotary

    def named(self) -> dict[str, Any]:
        tensors = dict(zip(("k", "v", "k_cache", "v_cache", "slot_mapping"), self, strict=False))
        return tensors | self.rotary.named("rotary_positions")

    def key(self) -> tuple:
        return append_kv, *self.rotary.key(), *_seen(self.named())

    def by_operator(self) -> None:
        torch.ops.cute_attn.append_kv(*self[:5], *self.rotary)

    def run(self) -> None:
        found = call.looked_up(self.key, self.made)
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
        return _made(self.named(), gpu, None if nothing else self.rotary.config())


class Behind(NamedTuple):
    """`flash_fwd_kvcache`'s new tokens, behind the rows that each sequence has; q is rotated beside them."""

    into: Cached  # the attention that follows, as it is asked for
    k: Any
    v: Any
    cu_seqlens_k_new: Any
    rotary: Rotary
    spread: bool  # a sequence's queries follow each other; or all are at the first one's place

    @property
    def by_tensor(self) -> bool:
        """Whether cache_seqlens is one, or one number for every sequence."""
        return isinstance(self.into.cache_seqlens, (Tensor, torch.fx.Proxy))

    def named(self) -> dict[str, Any]:
        into = self.into
        tensors = dict(q=into.q, k=self.k, v=self.v, k_cache=into.k, v_cache=into.v, page_table=into.page_table)
        tensors |= dict(cache_seqlens=into.cache_seqlens if self.by_tensor else None)
        tensors |= dict(cache_batch_idx=into.cache_batch_idx, cu_seqlens_q=into.cu_seqlens_q)
        tensors |= dict(cu_seqlens_k_new=self.cu_seqlens_k_new)
        return {name: x for name, x in tensors.items() if x is not None} | self.rotary.named("rotary_seqlens")

    def key(self) -> tuple:
        return Behind, self.by_tensor, *self.rotary.key(), *_seen(self.named())

    def by_operator(self) -> tuple[Tensor, Tensor]:
        into, length = self.into, self.into.cache_seqlens
        lengths = (length, None) if self.by_tensor else (None, of_cache.length(length))
        where = into.page_table, into.cache_batch_idx, into.cu_seqlens_q, self.cu_seqlens_k_new
        new = into.q, self.k, self.v, into.k, into.v
        q, seqlens = torch.ops.cute_attn.append_behind(*new, *lengths, *where, *self.rotary, self.spread)
        return (into.q if self.rotary.cos is None else q), seqlens

    def run(self) -> tuple[Tensor, Tensor]:
        """q, rotated where that is asked for, and how many rows each sequence has now."""
        found = call.looked_up(self.key, self.made)
        asked.memory(self.named())
        self._check_room()
        q = self.into.q
        seqlens = q.new_empty(self.into.batch, dtype=torch.int32)
        if found.gpu is None:
            notices.once(f"flash_fwd_kvcache: {notices.CPU}")
            return self._on_cpu(seqlens), seqlens
        turned = q if self.rotary.cos is None else torch.empty_like(q)
        if found.kernel is not None:
            both = () if self.rotary.cos is None else (q, turned)
            queries = (self._outer(x, self.into.cu_seqlens_q) for x in both)
            new = (self._outer(x, self.cu_seqlens_k_new) for x in (self.k, self.v))
            caches = self.into.k, self.into.v
            found.launch(*new, *caches, *queries, *self.rotary.tensors, *self._numbers(seqlens))
        return turned, seqlens

    def _outer(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(B, S, H, D), or of packed sequences (1, total, H, D)."""
        return x if cu_seqlens is None else x[None]

    def _numbers(self, seqlens: Tensor) -> tuple:
        """As of kernels.append_sm90.Sequences."""
        into, length = self.into, self.into.cache_seqlens
        new = self.k.shape[0 if self.cu_seqlens_k_new is not None else 1]
        lengths = (length.data_ptr(), 0) if self.by_tensor else (0, int(length))
        pages, stride = into.cache_batch_idx, 0
        if into.page_table is not None:
            pages, stride = into.page_table, into.page_table.stride(0)
        before = into.batch, _address(self.cu_seqlens_k_new), new, *lengths, _address(self.rotary.where)
        queries = _address(into.cu_seqlens_q), into.q.shape[0 if into.packed else 1], int(self.spread)
        return *before, into.capacity, _address(pages), stride, seqlens.data_ptr(), *queries

    def _on_cpu(self, seqlens: Tensor) -> Tensor:
        into, length = self.into, self.into.cache_seqlens
        if not into.batch:
            return into.q
        k, v, q = (x.flatten(0, -3) for x in (self.k, self.v, into.q))
        lengths = length if self.by_tensor else torch.full((into.batch,), int(length))
        of_k = reference.members(len(k), self.cu_seqlens_k_new, self.k.shape[1])
        of_q = reference.members(len(q), into.cu_seqlens_q, into.q.shape[1])
        where = dict(page_table=into.page_table, cache_batch_idx=into.cache_batch_idx)
        slots = reference.next_slots(of_k, lengths, into.capacity, into.k.shape[1], **where)
        angles = (lengths if self.rotary.where is None else self.rotary.where).tolist()
        turned = self.rotary.of(k, torch.tensor([angles[b] + i for b, i in of_k]))
        reference.append(turned, v, into.k, into.v, slots)
        new = torch.tensor([sum(b == n for b, _ in of_k) for n in range(into.batch)])
        seqlens.copy_((lengths.clamp(min=0) + new).clamp(max=into.capacity))
        places = torch.tensor([angles[b] + i * self.spread for b, i in of_q])
        inside = torch.tensor([b >= 0 for b, _ in of_q])
        return torch.where(inside[:, None, None], self.rotary.of(q, places), q).view_as(into.q)

    def _check_room(self) -> None:
        """As far as the host knows."""
        if not self.by_tensor and self.cu_seqlens_k_new is None:
            asked.room(int(self.into.cache_seqlens), self.k.shape[1], self.into.capacity)

    def made(self) -> Prepared:
        """The attention's request has checked q, the caches and what says where they lie."""
        into, specs = self.into, asked.behind(self.named(), self.into.batch)
        asked.rotary(self.rotary.interleaved, specs, "rotary_seqlens", into.batch)
        self._check_room()
        how = dict(where="batch" if into.page_table is None else "pages", queries=self.rotary.cos is not None)
        return _made(self.named(), _gpu(specs["k"]), self.rotary.config() | how if into.batch else None)


def _seen(named: dict[str, Any]) -> list[tuple]:
    return [(n, x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for n, x in named.items()]


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
