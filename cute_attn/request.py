"""All that one call asks for, and the path of it: check -> plan -> compile -> allocate -> launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled as _function_modes
from torch._C import _is_tracing as _jit_traces
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import arrays, by_operator, call, checks, compile, features, notices, reference, strides
from .call import UNKEYED
from .features import NONE
from .integrations import dlpack
from .operands import Dense, Operands, Ragged, gpu_of
from .problem import PLAIN


class Outputs(NamedTuple):
    """What a call returns beside o, in this order."""

    lse: bool = False
    row_max: bool = False
    max_logit: bool = False
    rng_state: bool = False

    def checked(self) -> "Outputs":
        lse, row_max, max_logit, rng_state = self
        if not type(lse) is type(row_max) is type(max_logit) is type(rng_state) is bool:
            arrays.flags(**{f"return_{name}": value for name, value in self._asdict().items()})
        return self

    def of(self, o, lse, row_max, rng_state, packed=False) -> Any:
        """o, or a tuple of it and what else was asked for; row_max is (H, total_q) of packed sequences."""
        found = [o, lse] if self.lse else [o]
        if self.row_max or self.max_logit:
            found += reference.maxima(row_max, self.row_max, self.max_logit, packed)
        if self.rng_state:
            found.append(o.new_zeros(2, dtype=torch.int64) if rng_state is None else rng_state)
        return tuple(found) if len(found) > 1 else o


class Request(NamedTuple):
    operands: Any  # Operands
    causal: bool
    scale: float | None
    constant_time: bool
    features: Any  # Features
    outputs: Outputs

    def run(self) -> Any:
        """What flash_fwd returns.

        Raises:
            TypeError, ValueError: before any launch; the message says how to mend it.
        """
        q, k, v = self.operands[:3]
        if is_compiling() or (
            (_dispatch_modes() or _function_modes() or forward_ad._current_level >= 0) and traced(self)
        ):
            return self.by_operator()
        if not type(q) is type(k) is type(v) is Tensor:
            if isinstance(q, torch.fx.Proxy):
                return self.by_operator()
            if isinstance(self.operands, Dense) and not isinstance(q, Tensor) and hasattr(q, "__dlpack__"):
                return self.by_dlpack()
            if arrays.stands_in(**self.named()):
                return self.by_operator()
        self.operands.check()
        found = self.prepared()
        if found is None:
            return self.by_operator()
        if arrays.learns(q, k, v):
            for name, x in self.named().items():
                arrays.tensor(name, x)
            return self.by_operator()
        scale, asked = self.checked(found)
        asked = features.started(asked, q)
        rng_state = None if asked.dropout is None else asked.dropout.rng_state
        if found.gpu is None:
            o, lse, row_max = self._on_cpu(scale, asked)
        else:
            o, lse, row_max = self._on_gpu(found, scale, asked)
        return self.outputs.of(o, lse, row_max, rng_state, isinstance(self.operands, Ragged))

    def checked(self, found: call.Call) -> tuple[float, Any]:
        """The scale, and the features held against the problem; and out has memory of its own."""
        q, k, v, out = self.operands[:4]
        scale = found.scale if self.scale is None else checks.scale(self.scale)
        asked = features.fitted(self.features, found.problem, q.device)
        if out is not None:
            checks.out_memory(out, q, k, v, found.nbytes, self.operands.names)
        return scale, asked

    def named(self) -> dict[str, Any]:
        """q, k and v by their names."""
        return dict(zip(self.operands.names[:3], self.operands[:3], strict=True))

    def run_again(self, found: call.Call) -> tuple:
        """o and lse of a call without features, on tensors like those that `found` was prepared for."""
        q, k, v, out = self.operands[:4]
        if out is not None:
            checks.out_memory(out, q, k, v, found.nbytes, self.operands.names)
        scale = found.scale if self.scale is None else checks.scale(self.scale)
        return self._on_gpu(found, scale, NONE)[:2]

    def prepared(self) -> call.Call | None:
        """Checked, planned and compiled; a look-up where the like has come before. None under torch.jit.trace, whose
        sizes are tensors, which no key has.
        """
        try:
            key = self.operands.key(), self.causal, self.constant_time, features.key(self.features)
            found = call.known.get(key)
        except UNKEYED:
            return self.made()
        if found is None:
            if _jit_traces() and traced(self):
                return None
            found = self.made()
            if found.kernel is not None and 0 not in self.operands.k.shape:  # without keys it gets others' memory
                call.keep(key, found)
        return found

    def made(self) -> call.Call:
        problem, gpu, config, specs = self.planned()
        kernel = None if gpu is None or self.operands.nothing(problem) else compile.get(config)
        like = strides.unlike(self.operands.q, problem.d_v)
        counters = 0 if kernel is None else config.counters
        workspace = 0 if kernel is None else config.workspace_bytes(gpu.num_sms, problem.heads, problem.heads_kv)
        how = counters, self.operands.plain(), tuple(x.nbytes for x in specs), like, workspace
        return call.Call(problem, problem.head_dim**-0.5, gpu, kernel, *how)

    def planned(self) -> tuple:
        """Checked: the problem, its GPU (None: the CPU), the kernel's config, and what was seen of q, k, v and o."""
        specs = self.operands.specs()
        problem = self.operands.problem(specs, self.causal, self.constant_time, features.key(self.features))
        gpu = gpu_of(specs[0])
        return problem, gpu, self.operands.config(problem, None if gpu is None else gpu.name), specs

    def _on_gpu(self, found: call.Call, scale: float, asked: Any) -> tuple:
        """o, lse and row_max."""
        q, k, v, o = self.operands[:4]
        o = found.output(q) if o is None else o
        lse = q.new_empty(self.operands.rows(), dtype=torch.float32) if self.outputs.lse else None
        row_max = None
        if asked.row_max is not None:
            row_max = q.new_empty(self.operands.rows(), dtype=torch.float32)
            if found.kernel is None or isinstance(self.operands, Ragged):  # whose rows need not all be in a sequence
                row_max.fill_(-torch.inf)
            asked = asked._replace(row_max=row_max)
        if found.kernel is not None:
            try:
                tensors = (q, k, v, o) if found.plain else self.operands.for_tma(o)
                arguments = *features.arguments(asked), *self.operands.arguments(o)
                found.launch(tensors, lse, scale, arguments)
            except Exception:
                self.refused(o)
                raise
        elif isinstance(self.operands, Dense):
            o.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
                for feature, value in features.present(asked):
                    feature.without_keys(value, lse)
        return o, lse, row_max

    def refused(self, o: Tensor) -> None:
        """Raises what the compiled call's own check, before the launch, has refused without a way to mend it."""
        self.made()
        checks.addresses(**self.named(), out=o)

    def _on_cpu(self, scale: float, asked: Any) -> tuple:
        """o, lse and row_max, in float32 and rounded once."""
        notices.once(f"{self.operands.function}: {notices.CPU}")
        how = dict(causal=self.causal, scale=scale, dtype=torch.float32) | features.reference(asked)
        with torch.autocast("cpu", enabled=False):
            return self.operands.compute(self.operands.out, how)

    def by_operator(self) -> Any:
        o, lse, row_max, rng_state = by_operator.attention(self)
        return self.outputs.of(o, lse, row_max, rng_state, isinstance(self.operands, Ragged))

    def by_dlpack(self) -> Any:
        """By tensors of the arrays' memory; what comes back are arrays again."""
        q, k, v, out, layout = self.operands

        def on_tensors(q, k, v, *, out, **given):
            how = self.outputs, self.causal, self.scale, self.constant_time
            return request(Dense(q, k, v, out, layout), *how, given).run()

        return dlpack.shared_by(on_tensors, q, k, v, out=out, **features.by_name(self.features))


def request(operands: Operands, outputs: Outputs, causal, scale, constant_time, given: dict[str, Any]) -> Request:
    """Of a public function's keywords: `given` are the features', return_row_max among them.

    Raises:
        TypeError, ValueError: as far as they can be checked without q, k and v.
    """
    outputs.checked()
    if not type(causal) is type(constant_time) is bool:
        arrays.flags(causal=causal, constant_time=constant_time)
    causal, found = features.collect(causal, given)
    return Request(operands.all_causal() if causal else operands, causal, scale, constant_time, found, outputs)


def seen_before(q, k, v, key: Callable, arguments: tuple, causal: bool, constant_time: bool) -> call.Call | None:
    """What was prepared for an eager call like this, without features and gradients; None sends it the whole way.

    `key(*arguments)` is the operands'.
    """
    if is_compiling() or _dispatch_modes() or _function_modes() or forward_ad._current_level >= 0:
        return None
    if not type(q) is type(k) is type(v) is Tensor:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):  # arrays.learns, uncalled
        return None
    try:
        return call.known.get((key(*arguments), causal, constant_time, PLAIN))
    except UNKEYED:
        return None


def traced(request: Request) -> bool:
    """Whether something records what is done with tensors (a mode of dispatch, jit.trace): it gets the operator then.

    A mode of functions alone, such as torch.device's, records nothing; but that of make_fx's pre_dispatch does.
    """
    tensors = dict(zip(request.operands.names, request.operands.tensors, strict=True))
    tensors |= {name: x for name, x in features.by_name(request.features).items() if isinstance(x, Tensor)}
    return recorded(**tensors)


def seen_by_tracer(named: dict[str, Any]) -> bool:
    """Whether something records what a function other than attention does with tensors: it gets the operator then."""
    if is_compiling():
        return True
    watched = _dispatch_modes() or _function_modes() or _jit_traces() or forward_ad._current_level >= 0
    if watched and recorded(**named):
        return True
    kinds = {type(x) for x in named.values()}
    return kinds != {Tensor} and (torch.fx.Proxy in kinds or arrays.stands_in(**named))


def recorded(**tensors) -> bool:
    """`traced`, of the tensors of any function."""
    from . import operator

    arrays.no_tangents(**tensors)
    if operator.inside():
        return False
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included("PreDispatch")
    if not (before_dispatch or _jit_traces() or _dispatch_modes()):
        return False
    for name, x in tensors.items():
        if isinstance(x, Tensor) and not torch._C._functorch.is_functionaltensor(x):
            arrays.untransformed(name, x)
    return True
