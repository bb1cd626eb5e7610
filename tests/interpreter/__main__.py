"""Interprets prebuilt kernels, at tiny sizes.

python -m tests.interpreter d64_full 'cluster2.*redo' --shape 1x1 130x65
"""

import argparse
import re
import time

import torch

from cute_attn.plan import prebuilt, prebuilt_varlen

from .cases import run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.interpreter", description=__doc__)
    parser.add_argument("names", nargs="*", default=[""], help="regular expressions: a kernel's name has one of them")
    parser.add_argument("--shape", nargs="+", default=["1x1", "113x203"], help="queries x keys")
    parser.add_argument("--ratio", type=int, default=8, help="query heads to a K/V head, of kernels that pack them")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the warps")
    parser.add_argument("--sms", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="fp16 and bshd too")
    return parser.parse_args()


def main():
    """A line for each kernel; 1 if any is wrong."""
    asked, wrong = arguments(), 0
    torch.set_num_threads(1)
    for config in (*prebuilt(ratio=asked.ratio), *prebuilt_varlen()):
        plain = config.dtype == "bf16" and config.layout != "bshd"
        if (asked.all or plain) and any(re.search(name, config.name) for name in asked.names):
            found = outcome(config, asked)
            wrong += not found.startswith("right")
            print(f"{config.name} {config.layout}: {found}", flush=True)
    raise SystemExit(wrong > 0)


def outcome(config, asked) -> str:
    start = time.perf_counter()
    shapes = [tuple(map(int, shape.split("x"))) for shape in asked.shape]
    try:
        for n, (seqlen_q, seqlen_k) in enumerate(shapes * asked.seeds):
            scale = 40.0 if n % 2 else None  # scores that exceed the rows' running maxima, and so run the rarer code
            run(config, seqlen_q, seqlen_k, seed=n, num_sms=asked.sms, scale=scale)
    except (AssertionError, NotImplementedError) as e:
        return f"{type(e).__name__} at {seqlen_q} x {seqlen_k}, seed {n}: {e}"
    return f"right, {time.perf_counter() - start:.1f} s"


if __name__ == "__main__":
    main()
