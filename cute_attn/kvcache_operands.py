"""q and out of a call, and the caches that its keys and values lie in."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arrays, checks, plan, reference
from . import kvcache_checks as asked
from .checks import Spec
from .kernels.config import FwdConfig
from .kernels.mask import CausalOfEach, WindowOfEach
from .operands import o_like, specs_of, with_strides
from .problem import Problem

PLAIN_TYPES = {Tensor, int, type(None)}
PLACES = "cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q"


class Kind(NamedTuple):
    """Of calls that one list of their CTAs' parts serves: what decides it beside lengths and windows."""

    batch: int
    queries: int  # of a sequence, or of all packed ones
    packed: bool
    heads: int
    heads_kv: int
    room: int  # for keys, of a sequence
    head_dim: int
    head_dim_v: int
    dtype: str
    features: Any  # FeatureKey
    device: torch.device
    config: FwdConfig | None  # None: the CPU

    @property
    def text(self) -> str:
        queries = f"{self.queries} queries {'in all' if self.packed else 'each'}"
        kernel = f", {self.config.name}" if self.config else f", D {self.head_dim}"
        heads = f"{self.heads} heads on {self.heads_kv}"
        return f"{self.batch} sequences of {queries}, {heads}, room for {self.room} keys, {self.device}{kernel}"


class Cached(NamedTuple):
    """q (B, Sq, H, D), or (total_q, H, D) of packed sequences, and caches (B_cache, S, Hk, D) or of pages."""

    q: Any
    k: Any
    v: Any
    out: Any
    cache_seqlens: Any  # a tensor, or one number for every sequence
    page_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    cu_seqlens_q: Any
    max_seqlen_q: Any
    causal_each: Any  # whether each sequence is causal, in place of one answer for all; or None
    plan: Any = None  # DecodePlan

    @property
    def names(self) -> tuple[str, str, str, str]:
        return "q", "k_cache", "v_cache", "out"

    @property
    def function(self) -> str:
        return "flash_fwd_kvcache"

    @property
    def layout(self) -> str:
        return "thd"

    @property
    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.out

    @property
    def places(self) -> dict[str, Any]:
        """What says where the sequences lie, by name, as far as it is given."""
        named = dict(zip(PLACES, self[4:9], strict=True), causal=self.causal_each)
        return {name: x for name, x in named.items() if x is not None or name == "cache_seqlens"}

    @property
    def lengths(self) -> dict[str, Any]:
        """The (B,) and (B + 1,) tensors among these."""
        return {name: x for name, x in self.places.items() if name != "page_table" and isinstance(x, Tensor)}

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1 if self.packed else self.q.shape[0]

    @property
    def empty(self) -> bool:
        """The caches have no memory."""
        return 0 in self.k.shape[:2]

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        k, table = self.k.shape, self.page_table
        return 0 if self.empty else k[1] if table is None else table.shape[1] * k[1]

    def all_causal(self) -> "Cached":
        """As by a window that ends at the diagonal."""
        return self._replace(causal_each=None)

    def key(self) -> Hashable:
        q, k, v, out, lengths, *places, max_q, each, made = self
        return (
            *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()),
            None if out is None else (out.shape, out.stride()),
            *(q.dtype, q.get_device(), max_q, type(max_q)),
            _kind(lengths) if isinstance(lengths, Tensor) else (type(lengths), 0 <= lengths <= self.capacity),
            *map(_kind, places),
            _kind(each),
            None if made is None else made.key,
        )

    def check(self) -> None:
        if {*map(type, self[4:9]), type(self.causal_each)} <= PLAIN_TYPES:
            return
        for name, x in self.places.items():
            if isinstance(x, Tensor):
                arrays.real(name, x)

    def specs(self) -> tuple[Spec, Spec, Spec, Spec]:
        for name, x in zip(self.names, self.tensors[:3], strict=False):
            arrays.tensor(name, x)
        for name, x in self.places.items():
            if name == "cache_seqlens" and not isinstance(x, Tensor):
                asked.length(x)
            else:
                arrays.tensor(name, x)
        asked.hint(self.max_seqlen_q, self.packed)
        return specs_of(self)

    def problem(self, specs: tuple, causal: bool, constant_time: bool, features: Any) -> Problem:
        q, k, v, o = specs
        asked.queries(q, self.packed)
        asked.caches(k, v, q, self.page_table is not None)
        self._check_places(q, k)
        asked.tiles(q, self.batch, self.packed)
        if self.out is not None:
            checks.out(o, q, v, "thd" if self.packed else "bshd")
        if q.device.type == "cuda" and not self.packed:
            asked.rows("q", q)
            asked.rows("out", o)
        asked.plain(constant_time, features)
        seqlen_q = q.shape[0 if self.packed else 1]
        sizes = self.batch, q.shape[-2], k.shape[2], seqlen_q, self.capacity, q.shape[-1]
        kind = checks.DTYPES[q.dtype], self.layout, causal, constant_time, features
        return Problem(*sizes, *kind, checks.other_head_dim(q, v), packed="q" if self.packed else "")

    def _check_places(self, q: Spec, k: Spec) -> None:
        """Where the keys of each sequence lie, and how many they are as far as the host knows."""
        if self.packed:
            checks.lengths("cu_seqlens_q", Spec.of(self.cu_seqlens_q), None, q)
        batch = self.batch
        for name, x in self.lengths.items():
            checks.lengths(name, Spec.of(x), batch + (name == "cu_seqlens_q"), q)
        if self.page_table is not None:
            asked.page_table(Spec.of(self.page_table), batch, q)
        asked.which_rows(k, batch, self.capacity, *self[5:8])
        if not isinstance(self.cache_seqlens, Tensor):
            asked.fits(asked.length(self.cache_seqlens), self.capacity)

    def config(self, problem: Problem, gpu: str | None) -> FwdConfig | None:
        found = None if gpu is None else self._config(problem, gpu)
        if self.plan is not None:
            asked.planned(self.plan.kind, self.kind(problem, found))
            found = found if self.plan.entries is None or found is None else replace(found, planned=True)
        return found

    def kind(self, problem: Problem, config: FwdConfig | None) -> Kind:
        p, device = problem, self.q.device
        kind = p.head_dim, p.d_v, p.dtype, p.features
        config = config if config is not None and config.shares and not self.nothing(problem) else None
        return Kind(p.batch, p.seqlen_q, self.packed, p.heads, p.heads_kv, p.seqlen_k, *kind, device, config)

    def _config(self, problem: Problem, gpu: str) -> FwdConfig:
        p, page_size = problem, None if self.page_table is None else max(self.k.shape[1], 1)
        longest, key = self.max_seqlen_q if self.packed else p.seqlen_q, p.features
        if self.causal_each is not None:
            asked.no_other_mask(key)
            key = key.joined(causal_of_each=WindowOfEach() if key.window else CausalOfEach())
        kind = p.head_dim, p.dtype, p.causal, key, gpu, p.head_dim_v
        return plan.kvcache(*kind, p.ratio, longest, page_size, p.batch, p.heads_kv, p.seqlen_k)

    def rows(self) -> tuple[int, ...]:
        *outer, heads, _ = self.q.shape
        return (heads, *outer) if self.packed else (outer[0], heads, outer[1])

    def nothing(self, problem: Problem) -> bool:
        return 0 in (problem.batch, problem.seqlen_q, problem.heads)

    def plain(self) -> bool:
        if not self.packed or self.empty or 1 in self.k.shape[:2]:
            return False
        return not any(checks.odd(x.stride()) for x in self.tensors if x is not None)

    def for_tma(self, o: Tensor) -> list[Tensor]:
        """q and o as rows, whichever sequence's they are. k and v without memory are others, never read."""
        q, o = (with_strides(x, (8, 8, 1)) if self.packed else _in_rows(x) for x in (self.q, o))
        k, v = (x[None, :1, : self.k.shape[2]] for x in (q, o)) if self.empty else (self.k, self.v)
        return [q, _in_pages(k), _in_pages(v), o]

    def arguments(self, o: Tensor) -> tuple:
        lengths, capacity = self.cache_seqlens, self.capacity
        where = (lengths.data_ptr(), capacity) if isinstance(lengths, Tensor) else (0, int(lengths))
        causal = () if self.causal_each is None else (self.causal_each.data_ptr(),)
        made = () if self.plan is None or self.plan.entries is None else (self.plan.entries.data_ptr(),)
        return *self._of_queries(o), self.batch, *where, capacity, *self._units(), *self._of_keys(), *causal, *made

    def _of_queries(self, o: Tensor) -> tuple[int, int, int, int]:
        """cu_seqlens_q, seqlen_q, and the steps of q and o."""
        if self.packed:
            return self.cu_seqlens_q.data_ptr(), self.q.shape[0], 0, 0
        q, rows = self.q, asked.as_rows
        return 0, q.shape[1], rows(q.shape, q.stride()).step, rows(o.shape, o.stride()).step

    def _of_keys(self) -> tuple[int, int]:
        """page_table and its rows' stride; or cache_batch_idx and cache_leftpad."""
        if self.page_table is not None:
            return self.page_table.data_ptr(), self.page_table.stride(0) if self.batch > 1 else 0
        index, leftpad = self.cache_batch_idx, self.cache_leftpad
        return 0 if index is None else index.data_ptr(), 0 if leftpad is None else leftpad.data_ptr()

    def _units(self) -> tuple[int, int]:
        k, v, pages = self.k, self.v, asked.as_pages
        if self.empty:
            return k.shape[3], v.shape[3]  # of what for_tma takes in their place
        return pages(k.shape, k.stride()).unit, pages(v.shape, v.stride()).unit

    def compute(self, o: Tensor | None, how: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of no sequence are not written. No caller asks for row_max: it has no elements."""
        q, k, v = (x.detach() for x in (self.q, self.k, self.v))
        o = o_like(self.q, self.v) if o is None else o
        lse = self.q.new_empty(self.rows(), dtype=torch.float32)
        for where, found, found_lse in reference.kvcache(q, k, v, **how | self.places):
            o[where] = found.to(o.dtype)
            lse[(slice(None), where) if self.packed else where] = found_lse
        return o, lse, lse.new_empty(0)

    def operator_arguments(self) -> tuple:
        hint = checks.max_seqlen("max_seqlen_q", self.max_seqlen_q)
        return "thd" if self.packed else "bshd", self.cu_seqlens_q, None, None, None, hint, None

    def operator_keywords(self) -> dict[str, Any]:
        if self.plan is not None:
            asked.no_plan_in_a_trace()
        by_tensor = isinstance(self.cache_seqlens, (Tensor, torch.fx.Proxy))
        name, value = "cache_seqlens", self.cache_seqlens
        if not by_tensor:
            name, value = "cache_length", asked.length(value)
        return {name: value} | dict(zip(PLACES[1:4], self[5:8], strict=True), causal_each=self.causal_each)

    def differentiable(self) -> None:
        raise ValueError(
            "q, k_cache, v_cache: one of them requires grad, and attention over a cache has no backward; call under "
            "torch.no_grad() or pass .detach(), or train with flash_fwd_varlen"
        )

    def lacks_gradient(self) -> None:
        """As all of them do."""


def of_each(causal: Any) -> tuple[Any, Tensor | None]:
    """What is asked of every sequence alike, and what of each: one of them, whichever came."""
    return (False, causal) if isinstance(causal, Tensor) else (causal, None)


def _kind(x: Any) -> Hashable:
    """Of a tensor of int32, all but its address and values."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.get_device())


def _in_rows(x: Tensor) -> Tensor:
    """(B, S, H, D) as (rows, H, D)."""
    rows = asked.as_rows(x.shape, x.stride())
    return x.as_strided(rows.shape, rows.strides)


def _in_pages(x: Tensor) -> Tensor:
    strides = asked.as_pages(x.shape, x.stride()).strides
    return x if x.stride() == strides else x.as_strided(x.shape, strides)
