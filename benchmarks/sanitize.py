"""Runs compute-sanitizer's memcheck, initcheck and racecheck over a small case of every prebuilt kernel; records it.

python benchmarks/sanitize.py [--caches] [--out FILE] [--logs FOLDER] [--tools racecheck ...] [--add RECORD]

Each kernel gets a case with more tiles than an H200 has SMs, so that CTAs reuse their buffers (those for few tiles
aside), and partial tiles and blocks, GQA, rows without keys, an LSE, and a scale of either sign. So do those for varlen
sequences and over K/V caches, and of those for lists of blocks and functions of the user one of each head dim. Beside
the caches' run those that append to them, list their parts and merge states. The runs of RECORD, of other tools and the
same kernels, GPU and versions, are kept beside these. --caches: no others, and sanitizer_caches.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from caches import over_keys, page_table
from gpu_tests import hold_alike, where

from cute_attn import (
    BlockLists,
    append_kv,
    decode_plan,
    flash_fwd,
    flash_fwd_kvcache,
    flash_fwd_varlen,
    merge_states,
)
from cute_attn.block_mask import as_lists
from cute_attn.kernels.config import DTYPES, FwdConfig
from cute_attn.kernels.mask import Drafts
from cute_attn.mods import prepare
from cute_attn.operands import o_like
from cute_attn.plan import (
    HEAD_DIMS,
    PREBUILT_FEATURES,
    FeatureKey,
    Problem,
    kvcache,
    plan,
    prebuilt,
    prebuilt_varlen,
    varlen,
)
from cute_attn.tools.benchmark.implementations import make_inputs

ROOT = Path(__file__).parent.parent
TOOLS = ("racecheck", "memcheck", "initcheck")
SECONDS = 150  # for one process
PARTS = 4  # processes that share the kernels of a case
DEVICE = torch.device("cuda")
OTHER_HEAD_DIMS = ((192, 128), (64, 256), (96, 64), (320, 320), (512, 512), (64, 512), (512, 64))  # q's and v's
CASES = (*((d, d) for d in HEAD_DIMS), *OTHER_HEAD_DIMS)
MASKS, WINDOW = ("full", "causal", "window"), (150, 40)
# Heads of k, query heads to each, new tokens, rows of a page. With many heads of k a tile's last CTA merges its parts.
CACHES = *product((1,), (3, 70), (1, 5, 200), (0, 1, 16)), *product((8, 27), (3,), (1, 5), (0, 1, 16))
CACHE_LENGTHS = 5000, 0, 64, 1, 333
VARLEN_STARTS = (0, 0, 700, 1400, 3000), (0, 300, 300, 500, 2000)  # of queries, of keys
# Sq, Sk, heads: the first leaves warpgroups without rows and rows without keys; from the fifth on tiles are few.
SIZES = (
    *((1400, 333, 12), (1500, 200, 12), (3000, 100, 12), (700, 333, 12)),
    *((64, 3100, 2), (64, 1100, 6), (64, 600, 12), (300, 200, 3)),
)


def problems(head_dim: int, head_dim_v: int = 0) -> list[Problem]:
    """A small problem for each kernel of a head dim, or of a pair, and for those that pack the heads of GQA."""
    other = 0 if head_dim_v in (0, head_dim) else head_dim_v - 8
    found: dict[FwdConfig, Problem] = {}
    for (s_q, s_k, h), dtype, mask, constant_time, ratio in product(SIZES, DTYPES, MASKS, (False, True), (3, 1)):
        how = dict(causal=mask == "causal", features=FeatureKey(window=mask == "window"), constant_time=constant_time)
        problem = Problem(2, h, max(h // ratio, 1), s_q, s_k, head_dim - 8, dtype, **how, head_dim_v=other)
        found.setdefault(plan(problem), problem)
    for (s_q, s_k, h), causal in product(SIZES[:1], (False, True)):
        for key in PREBUILT_FEATURES[causal]:
            problem = Problem(2, h, h, s_q, s_k, head_dim - 8, causal=causal, features=key, head_dim_v=other)
            found.setdefault(plan(problem), problem)
    return list(found.values())


def run_cases(head_dim: int, head_dim_v: int, part: int, caches: bool = False) -> None:
    """What one sanitized process runs: of pairs of head dims dense calls only."""
    runs: list[Callable[[], FwdConfig]] = []
    equal = head_dim == head_dim_v <= HEAD_DIMS[-1]
    if not caches:
        runs += [partial(run_problem, p) for p in problems(head_dim, head_dim_v)]
    if equal and not caches:
        runs += [partial(run_varlen, head_dim, dtype, mask) for dtype, mask in product(DTYPES, MASKS)]
        runs += [partial(run_lists, head_dim)]
    if equal:
        runs += [partial(run_cache, head_dim, *which) for which in CACHES]
        runs += [partial(run_step, head_dim, page_size) for page_size in (0, 1, 16)]
    print("kernels:", *sorted({run().name for run in runs[part::PARTS]}))


def run_problem(p: Problem) -> FwdConfig:
    """initcheck takes minutes over copies from the host, so inputs are made on the GPU; and it does not see what TMA
    stores, so `out` is filled before: with NaN, of which none may be left.
    """
    q, k, v, _ = make_inputs(p, DEVICE)
    k *= torch.linspace(30, 0, p.seqlen_k, device=DEVICE, dtype=k.dtype)[:, None]  # so that offsets are raised too
    per_head = torch.linspace(-0.5, 0.5, p.heads, device=DEVICE)
    scale, out = -0.1 if p.dtype == "fp16" else None, o_like(q, v).fill_(torch.nan)
    how: dict[str, Any] = dict(causal=p.causal, constant_time=p.constant_time)
    asked = dict(window=WINDOW, softcap=30.0, alibi_slopes=per_head, sinks=per_head)
    given = dict(
        window=p.features.window, softcap=p.features.softcap, alibi_slopes=p.features.alibi, sinks=p.features.sinks
    )
    how |= {name: value for name, value in asked.items() if given[name]}
    whole(*flash_fwd(q, k, v, scale=scale, return_lse=True, out=out, **how))
    return plan(p)


def run_varlen(head_dim: int, dtype: str, mask: str) -> FwdConfig:
    """Varlen sequences, one without queries, one without keys, one whose queries outnumber its keys."""
    q, k, v, _ = make_inputs(Problem(1, 12, 4, 3000, 2000, head_dim - 8, dtype), DEVICE)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (total, H, D)
    starts = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in VARLEN_STARTS]
    causal, window = mask == "causal", WINDOW if mask == "window" else None
    out = torch.full_like(q, torch.nan)
    whole(*flash_fwd_varlen(q, k, v, *starts, causal=causal, window=window, return_lse=True, out=out))
    return varlen(head_dim, dtype, causal, FeatureKey(window=window is not None))


def run_lists(head_dim: int) -> FwdConfig:
    """Block lists, some of them empty, with a mask_mod and a score_mod that read tensors."""
    p = Problem(2, 12, 4, 1400, 700, head_dim - 8, causal=True)
    q, k, v, _ = make_inputs(p, DEVICE)
    bias, documents = torch.randn(12, 1400, device=DEVICE), torch.arange(1400, device=DEVICE) // 90
    chosen = torch.rand(2, 1, 11, 6, device=DEVICE) < 0.4
    counts, order = as_lists(chosen)
    lists = BlockLists(counts, order, (6 - counts) // 2, order.flip(-1).contiguous())
    how: dict[str, Any] = dict(causal=True, block_mask=lists, return_lse=True, out=torch.full_like(q, torch.nan))
    mods: dict[str, Any] = dict(
        score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx],
        mask_mod=lambda b, h, q_idx, kv_idx: documents[q_idx] != documents[kv_idx],
    )
    whole(*flash_fwd(q, k, v, **how, **mods))
    own = {name: prepare(name, function, ()).kernel for name, function in mods.items()}
    return plan(p._replace(features=FeatureKey(sparse=lists.blocks, **own)))


def run_cache(head_dim: int, heads_kv: int, ratio: int, tokens: int, page_size: int) -> FwdConfig:
    """Sequences that CTAs share and whole ones, one without keys; NaN in every row behind a length."""
    batch, d, heads = len(CACHE_LENGTHS), head_dim - 8, heads_kv * ratio
    spec = over_keys(batch, (heads, heads_kv), tokens, CACHE_LENGTHS, d, page_size)
    shape = (sum(spec.pages), page_size) if page_size else (batch, max(CACHE_LENGTHS) + 3)
    table = page_table(spec).to(DEVICE) if page_size else torch.arange(batch, device=DEVICE)[:, None]
    k, v = (torch.full((*shape, heads_kv, d), torch.nan, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for n, pages in zip(CACHE_LENGTHS, table, strict=True):
        rows = (pages[:, None] * shape[1] + torch.arange(shape[1], device=DEVICE)).flatten()[:n]
        for x in (k, v):
            x.flatten(0, 1)[rows] = torch.randn(n, heads_kv, d, dtype=x.dtype, device=DEVICE)
    q = torch.randn(batch, tokens, heads, d, dtype=torch.bfloat16, device=DEVICE)
    lengths = torch.tensor(CACHE_LENGTHS, dtype=torch.int32, device=DEVICE)
    where = dict(cache_seqlens=lengths, page_table=table if page_size else None)
    whole(*flash_fwd_kvcache(q, k, v, **where, causal=True, return_lse=True, out=torch.full_like(q, torch.nan)))
    where["cache_seqlens"] = decode_plan(q, k, v, **where, causal=True)
    whole(*flash_fwd_kvcache(q, k, v, **where, return_lse=True, out=torch.full_like(q, torch.nan)))
    return cache_kernel(head_dim, heads_kv, ratio, tokens, page_size)


def run_step(head_dim: int, page_size: int) -> FwdConfig:
    """Drafts that are rotated and appended, by the call and by slots, and two states that are merged."""
    batch, tokens, heads_kv, rows = 3, 9, 4, 400
    q = torch.randn(batch, tokens, 3 * heads_kv, head_dim, dtype=torch.bfloat16, device=DEVICE)
    k, v = (torch.randn(batch, tokens, heads_kv, head_dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    pages = rows // page_size if page_size else 1
    shape = (batch * pages, page_size or rows, heads_kv, head_dim)
    k_cache, v_cache = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    table = torch.randperm(batch * pages, device=DEVICE).int().view(batch, pages) if page_size else None
    lengths = torch.tensor([0, 130, rows - 4], dtype=torch.int32, device=DEVICE)  # the last has no room for all
    angles = torch.randn(rows, 8, device=DEVICE)
    turn = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    bits = torch.full((batch, tokens, 1), -1, dtype=torch.int32, device=DEVICE)
    how = dict(cache_seqlens=lengths, page_table=table, k=k, v=v, draft_mask=bits, return_lse=True, **turn)
    o, lse = flash_fwd_kvcache(q, k_cache, v_cache, **how, out=torch.full_like(q, torch.nan))
    places = torch.arange(batch * tokens, dtype=torch.int32, device=DEVICE)
    append_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, places.long() - 1, **turn, rotary_positions=places)
    whole(*merge_states([o, o], [lse, lse], layout="bshd", out=torch.full_like(o, torch.nan)))
    key, sizes = FeatureKey(drafts=Drafts()), dict(ratio=3, max_seqlen_q=tokens, batch=batch, heads_kv=heads_kv)
    return kvcache(head_dim, "bf16", False, key, page_size=page_size or None, room=rows, **sizes)


def cache_kernel(head_dim: int, heads_kv: int, ratio: int, tokens: int, page_size: int) -> FwdConfig:
    sizes = dict(ratio=ratio, max_seqlen_q=tokens, batch=len(CACHE_LENGTHS), heads_kv=heads_kv)
    return kvcache(head_dim, "bf16", True, page_size=page_size or None, **sizes)


def whole(o: torch.Tensor, lse: torch.Tensor) -> None:
    assert not o.isnan().any()
    assert not lse.isnan().any()


def case(dims: tuple[int, int], part: int, caches: bool) -> list[str]:
    words = ["--caches"] if caches else []
    return [sys.executable, str(Path(__file__)), *words, "--case", *map(str, (*dims, part))]


def sanitize(tool: str, dims: tuple[int, int], part: int, logs: Path, caches: bool = False) -> dict:
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # libraries that probe the driver are not on trial
    command += case(dims, part, caches)
    log = logs / f"{tool}_d{dims[0]}v{dims[1]}_{part}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, timeout=SECONDS)
            ended = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {SECONDS} s"
    said = log.read_text()
    kernels = re.search(r"^kernels: (.*)$", said, re.MULTILINE)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    return dict(
        tool=tool,
        head_dim=dims[0],
        head_dim_v=dims[1],
        summary=summary[1] if summary else f"no summary, {ended}",
        clean=bool(kernels and summary and re.match(r"0 (errors|hazards)", summary[1])),
        kernels=kernels[1].split() if kernels else [],
    )


def kept(add: Path | None, here: dict, tools: list[str]) -> list[dict]:
    """The runs of a record whose tools are not run again."""
    if add is None:
        return []
    before = json.loads(add.read_text())
    try:
        hold_alike(here, before)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return [run for run in before["runs"] if run["tool"] not in tools]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--caches", action="store_true", help="what runs over K/V caches alone")
    parser.add_argument("--out", type=Path, help="default: sanitizer.json, sanitizer_caches.json in benchmarks/results")
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--add", type=Path, metavar="RECORD")
    text = "run this part of the cases of these head dims, q's and v's, unsanitized, in this process"
    parser.add_argument("--case", type=int, nargs=3, metavar=("D", "DV", "PART"), help=text)
    arguments = parser.parse_args()
    caches = arguments.caches
    if arguments.case:
        run_cases(*arguments.case, caches)
        return 0
    out = arguments.out or ROOT / "benchmarks" / "results" / f"sanitizer{'_caches' if caches else ''}.json"
    here = where()
    runs = kept(arguments.add, here, arguments.tools)
    parts = list(product([(d, d) for d in HEAD_DIMS] if caches else CASES, range(PARTS)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) - 2) as pool:
        for done in pool.map(lambda part: subprocess.run(case(*part, caches), cwd=ROOT), parts):  # into the disk cache
            done.check_returncode()
        sanitized = ((tool, *part, arguments.logs, caches) for tool, part in product(arguments.tools, parts))
        for run in pool.map(lambda run: sanitize(*run), sanitized):
            print(run["tool"], run["head_dim"], run["head_dim_v"], run["summary"], flush=True)
            runs.append(run)
            record = {**here, "runs": runs, "not_clean": not_clean(runs, caches)}
            out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if record["not_clean"] else 0


def not_clean(runs: list[dict], caches: bool = False) -> list[list[str]]:
    """Tools and prebuilt kernels of which no run was clean."""
    seen = {(run["tool"], name) for run in runs if run["clean"] for name in run["kernels"]}
    return sorted([tool, name] for tool, name in product(TOOLS, kernels(caches)) if (tool, name) not in seen)


@lru_cache
def kernels(caches: bool = False) -> list[str]:
    """The names of all that must be clean."""
    over_caches = [cache_kernel(d, *which).name for d, which in product(HEAD_DIMS, CACHES)]
    if caches:
        return over_caches
    pairs = [plan(p) for dims in OTHER_HEAD_DIMS for p in problems(*dims)]
    return [*(config.name for config in (*prebuilt(), *prebuilt_varlen(), *pairs)), *over_caches]


if __name__ == "__main__":
    sys.exit(main())
