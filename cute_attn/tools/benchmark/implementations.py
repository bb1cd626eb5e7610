"""Who is compared. An implementation says whether it can be here, what it refuses, and what of it is timed."""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import cute_attn

from ...checks import TORCH_DTYPES
from ...problem import Problem
from .timing import Call

OURS = "cute_attn"


class Inputs(NamedTuple):
    """q (B, H, Sq, D), k and v (B, Hk, Sk, D): views of memory in the problem's layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    problem: Problem

    def bshd(self):
        return tuple(x.transpose(1, 2) for x in (self.q, self.k, self.v))


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Random normal; the same for a problem in every run on one kind of device."""
    p, random = problem, torch.Generator(device).manual_seed(seed)

    def normal(heads, seqlen, d=p.head_dim):
        shape = (p.batch, seqlen, heads, d) if p.layout == "bshd" else (p.batch, heads, seqlen, d)
        x = torch.randn(shape, generator=random, dtype=TORCH_DTYPES[p.dtype], device=device)
        return x.transpose(1, 2) if p.layout == "bshd" else x

    q, k, v = normal(p.heads, p.seqlen_q), normal(p.heads_kv, p.seqlen_k), normal(p.heads_kv, p.seqlen_k, p.d_v)
    return Inputs(q, k, v, problem)


class Prepared(NamedTuple):
    call: Call  # what is timed
    bhsd: Callable[[Any], torch.Tensor]  # what a run returned -> o (B, H, Sq, D)
    into: Callable[[torch.Tensor], Any] | None = None  # a run that writes into o (B, H, Sq, D), where there is one


class Implementation(Protocol):
    name: str

    def absent(self) -> str | None:
        """Why it cannot run on this machine at all; None where it can."""

    def refuses(self, problem: Problem) -> str | None:
        """Why this problem is not for it; None where it may be."""

    def prepare(self, inputs: Inputs) -> Prepared:
        """Its call on these inputs, without a copy in the timed part."""

    def version(self) -> str | None: ...


class CuteAttn:
    name = OURS

    def absent(self):
        return None

    def refuses(self, problem):
        return None

    def version(self):
        return cute_attn.__version__

    def prepare(self, inputs):
        layout, causal = inputs.problem.layout, inputs.problem.causal
        q, k, v = inputs.bshd() if layout == "bshd" else inputs[:3]

        def bhsd(o):
            return o.transpose(1, 2) if layout == "bshd" else o

        return Prepared(
            Call(lambda: cute_attn.flash_fwd(q, k, v, causal=causal, layout=layout)),
            bhsd,
            lambda o: cute_attn.flash_fwd(q, k, v, causal=causal, layout=layout, out=bhsd(o)),
        )


class Sdpa:
    """torch's scaled_dot_product_attention with one backend allowed; the choice is made once, outside the calls."""

    def __init__(self, name: str, backend: str):
        self.name, self._backend = name, backend

    def absent(self):
        if not hasattr(SDPBackend, self._backend):
            return f"not in torch {torch.__version__} (no SDPBackend.{self._backend})"
        if self.name == "cudnn" and not torch.backends.cudnn.is_available():
            return f"not in torch {torch.__version__} (built without cuDNN)"
        return None

    def refuses(self, problem):
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "not comparable (torch aligns is_causal to the first key, cute_attn to the last)"
        return None

    def version(self):
        if self.name == "cudnn":
            return f"torch {torch.__version__}, cuDNN {cudnn_version()}"
        return f"torch {torch.__version__}"

    def prepare(self, inputs):
        q, k, v, problem = inputs
        how = dict(is_causal=problem.causal, enable_gqa=problem.heads != problem.heads_kv)
        backend = getattr(SDPBackend, self._backend)
        call = Call(
            lambda: scaled_dot_product_attention(q, k, v, **how),
            context=lambda: sdpa_kernel(backend),
        )
        return Prepared(call, lambda o: o)


class Package:
    """One that may be installed: the first of these modules that imports and has `needed`."""

    needed = "__name__"

    def __init__(self, name: str, *modules: str):
        self.name, self._modules = name, modules
        self._module: Any = None

    def absent(self):
        broken = None
        for name in self._modules:
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not (name + ".").startswith(error.name + "."):
                    broken = broken or f"does not import ({name}: {error})"
                continue
            except Exception as error:  # a library of another CUDA or torch fails here in many ways
                broken = broken or f"does not import ({name}: {type(error).__name__}: {first_line(error)})"
                continue
            if hasattr(module, self.needed):
                self._module = module
                return None
        return broken or f"not installed (no module {' or '.join(self._modules)})"

    def function(self, name):
        """Another function of its module; NotImplementedError where it has none."""
        if not hasattr(self._module, name):
            raise NotImplementedError(f"no {name} in {self.version()}")
        return getattr(self._module, name)

    def version(self):
        package = self._module.__name__.partition(".")[0]
        version = getattr(self._module, "__version__", None) or getattr(
            importlib.import_module(package), "__version__", None
        )
        return _distribution(package) or str(version or self._module.__name__)


class FlashAttention(Package):
    """A `flash_attn_func(q, k, v, causal=...)` on (B, S, H, D) that returns o or (o, lse, ...)."""

    needed = "flash_attn_func"

    def refuses(self, problem):
        return None

    def prepare(self, inputs):
        q, k, v = inputs.bshd()
        function, causal = self._module.flash_attn_func, inputs.problem.causal
        return from_bshd(lambda: function(q, k, v, causal=causal))()


def _distribution(package: str) -> str | None:
    """Name and version of what was installed with a package in it, where it says."""
    names = importlib.metadata.packages_distributions().get(package)
    return f"{names[0]} {importlib.metadata.version(names[0])}" if names else None


def first_of(returned):
    """o, of what returns o or (o, lse, ...)."""
    return returned[0] if isinstance(returned, (tuple, list)) else returned


def plain(run: Callable[[], Any]) -> Callable[[], Prepared]:
    """A row's implementation: a call that returns o as the row's truth has it, or (o, ...)."""
    return lambda: Prepared(Call(run), first_of)


def from_bshd(run: Callable[[], Any]) -> Callable[[], Prepared]:
    """The same of a call whose o is (B, S, H, D)."""
    return lambda: Prepared(Call(run), lambda returned: first_of(returned).transpose(1, 2))


BASELINES: dict[str, Implementation] = {
    baseline.name: baseline
    for baseline in (
        Sdpa("cudnn", "CUDNN_ATTENTION"),
        Sdpa("flash", "FLASH_ATTENTION"),
        Sdpa("efficient", "EFFICIENT_ATTENTION"),
        Sdpa("math", "MATH"),
        FlashAttention("fa3", "flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        FlashAttention("fa4", "flash_attn.cute", "flash_attn.cute.interface"),
    )
}
DEFAULT_BASELINES = ("cudnn", "flash", "fa3", "fa4")


def cudnn_version() -> str | None:
    """Of the library that torch runs; its number is 10000 major + 100 minor + patch."""
    number = torch.backends.cudnn.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else None


def first_run(prepared: Prepared) -> Any:
    """Run once; where torch has no kernel for it, raise NotImplementedError with the reasons it only warns about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with prepared.call.context():
                return prepared.call.run()
        except RuntimeError as error:
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            lines = dict.fromkeys(first_line(warning.message) for warning in caught)
            reasons = [line for line in lines if not line.endswith("because:") and "runtime disabled" not in line]
            raise NotImplementedError("; ".join(reasons) or first_line(error)) from error


def first_line(error: object, width: int = 160) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(" (Triggered internally")[0]
    return line if len(line) <= width else line[: width - 3] + "..."
