"""Times packed sequences of drawn lengths beside equal ones of the same work, and beside others' varlen.

python benchmarks/varlen.py [--out FILE]

64 sequences, lengths drawn from 64 to 8192 with a fixed seed, 16 heads, bf16, full and causal. TFLOPS are of the sum
over the sequences. Exit status 1 where an output is wrong; 2 without a Hopper GPU.
"""

import inspect
import math
import random
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from gpu_tests import where
from script import record_of

from cute_attn import flash_fwd, flash_fwd_varlen
from cute_attn.tools.benchmark.implementations import OURS
from cute_attn.tools.benchmark.report import write_json
from cute_attn.tools.benchmark.timing import METHOD, CudaTimer, Timer, compare

BATCH, SHORTEST, LONGEST, HEADS, HEAD_DIMS, SEED = 64, 64, 8192, 16, (64, 128), 0
ERROR_MAX = 1e-2  # of ours beside the first peer's, relative
WANTED = 0.85  # of the TFLOPS of equal lengths


class Packing(NamedTuple):
    """Sequences of these lengths, packed: q, k and v are (total, H, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    def flops(self, causal: bool) -> float:
        """4 H S S D of each sequence, halved for causal."""
        _, heads, head_dim = self.q.shape
        return 4.0 * heads * head_dim * sum(n * n for n in self.lengths) / (2 if causal else 1)


def drawn(seed: int = SEED) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(SHORTEST, LONGEST) for _ in range(BATCH))


def equal(lengths: Sequence[int]) -> tuple[int, ...]:
    """As many sequences of one length, of the same work but for rounding."""
    return (round(math.sqrt(sum(n * n for n in lengths) / len(lengths))),) * len(lengths)


def pack(lengths: tuple[int, ...], head_dim: int, device: torch.device) -> Packing:
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (sum(lengths), HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device) for _ in range(3))
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    return Packing(q, k, v, lengths, cu_seqlens)


def ours(p: Packing, causal: bool) -> torch.Tensor:
    return flash_fwd_varlen(p.q, p.k, p.v, p.cu_seqlens, p.cu_seqlens, causal=causal)


def dense(p: Packing, causal: bool) -> torch.Tensor:
    """flash_fwd, for equal lengths."""
    q, k, v = (x.unflatten(0, (len(p.lengths), -1)) for x in p[:3])
    return flash_fwd(q, k, v, causal=causal, layout="bshd")


def flash(p: Packing, causal: bool) -> torch.Tensor:
    """torch's FlashAttention-2."""
    how = (p.cu_seqlens, p.cu_seqlens, max(p.lengths), max(p.lengths), 0.0, causal, False)
    return torch.ops.aten._flash_attention_forward(p.q, p.k, p.v, *how)[0]


def torch_varlen() -> Callable | None:
    """torch.nn.attention.varlen, of whatever version; None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    old = "is_causal" in inspect.signature(varlen_attn).parameters

    def call(p: Packing, causal: bool) -> torch.Tensor:
        how = dict(is_causal=causal) if old else dict(window_size=(-1, 0 if causal else -1))
        return varlen_attn(p.q, p.k, p.v, p.cu_seqlens, p.cu_seqlens, max(p.lengths), max(p.lengths), **how)

    return call


def fa(module: str) -> Callable | None:
    """FlashAttention-2's, -3's or -4's own package, where it is installed."""
    try:
        call = __import__(module, fromlist=["flash_attn_varlen_func"]).flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
    known = inspect.signature(call).parameters

    def run(p: Packing, causal: bool) -> torch.Tensor:
        lengths = {f"cu_seqlens_{x}": p.cu_seqlens for x in "qk"}
        hints = {name: max(p.lengths) for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
        found = call(p.q, p.k, p.v, **lengths, **hints, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return run


def peers() -> dict[str, Callable]:
    found = {
        "flash": flash,
        "torch varlen": torch_varlen(),
        "fa2": fa("flash_attn"),
        "fa3": fa("flash_attn_interface"),
        "fa4": fa("flash_attn.cute"),
    }
    return {name: call for name, call in found.items() if call is not None}


def entries(head_dim: int, causal: bool, others: dict[str, Callable], device: torch.device, timer: Timer):
    """Times of ours, of equal lengths and of each peer; a peer that does not take it has none, and says why."""
    mixed = pack(drawn(), head_dim, device)
    even = pack(equal(mixed.lengths), head_dim, device)
    calls = {OURS: (ours, mixed), "equal lengths": (ours, even), "equal, dense": (dense, even)}
    calls |= {name: (call, mixed) for name, call in others.items()}
    outputs, failed = {}, {}
    for name, (call, packing) in calls.items():
        try:
            outputs[name] = call(packing, causal)
        except Exception as error:  # a peer may refuse in any way
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    stats = compare({name: lambda x=calls[name]: x[0](x[1], causal) for name in outputs}, timer=timer)
    tflops = {name: calls[name][1].flops(causal) / s.p50_us / 1e6 for name, s in stats.items()}
    first = next((outputs[name].float() for name in others if name in outputs), outputs[OURS].float())
    error = ((outputs[OURS].float() - first).norm() / first.norm()).item()
    shape: dict[str, Any] = dict(sequences=BATCH, heads=HEADS, head_dim=head_dim, causal=causal)
    return [
        *(shape | dict(contender=n, us=s.p50_us, spread=s.spread, tflops=tflops[n]) for n, s in stats.items()),
        *(shape | dict(contender=name, us=None, reason=reason) for name, reason in failed.items()),
        shape | dict(contender="of equal lengths", ratio=tflops[OURS] / tflops["equal lengths"], wanted=WANTED),
        shape | dict(contender="error", relative_error=error),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    out = record_of("varlen", __doc__, argv)
    others, found = peers(), []
    for head_dim, causal in product(HEAD_DIMS, (False, True)):
        for entry in entries(head_dim, causal, others, torch.device("cuda"), CudaTimer()):
            print(entry, flush=True)
            found.append(entry)
        write_json(out, {**where(), "method": METHOD, "lengths": drawn(), "entries": found})
    return 1 if any(entry.get("relative_error", 0.0) > ERROR_MAX for entry in found) else 0


if __name__ == "__main__":
    sys.exit(main())
