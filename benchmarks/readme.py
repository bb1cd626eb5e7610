"""Writes the numbers of README.md and docs/how_it_works.md between their markers, from benchmarks/results/*.json.

python benchmarks/readme.py
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/readme.py writes from here -->", "<!-- to here -->"
SHAPES = ("shapes_full", "shapes_causal", "gqa_full", "gqa_causal")  # records of the shapes outside of the sweep
BASELINES = {"flash": "FlashAttention-2 (torch's)", "fa4": "FlashAttention-4", "torch varlen": "torch's varlen_attn"}
SCORES = {"softcap": "softcap", "alibi_slopes": "ALiBi", "sinks": "sinks", "all": "all three"}
BESIDE = "peers_h200_bf16"  # the baselines beside each other
BEGIN_ABLATION = "<!-- benchmarks/readme.py writes the ladder from here -->"


def rows(sweep: dict) -> list[str]:
    """TFLOPS of ours and of cuDNN, a row per head dim and mask, a column per length."""
    cell = {(r["contender"], r["head_dim"], r["causal"], r["seqlen_q"]): r for r in sweep["records"]}
    lengths = sorted({r["seqlen_q"] for r in sweep["records"]})
    lines = ["| ours / cuDNN | " + " | ".join(f"{s}" for s in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            pair = [
                " / ".join(f"{cell[name, head_dim, causal, s]['tflops']:.0f}" for name in ("cute_attn", "cudnn"))
                for s in lengths
            ]
            lines.append(f"| d{head_dim} {'causal' if causal else 'full'} | " + " | ".join(pair) + " |")
    return lines


def text(sweep: dict) -> str:
    c = sweep["conditions"]
    ours = ours_of(sweep)
    over_cudnn = [r["ratios"]["cudnn"] for r in ours]
    return "\n".join(
        [
            f"TFLOPS, bf16, 16k tokens, hidden size 2048, steady state, on one {c['gpu']} ({c['date'][:10]}, driver "
            f"{c['driver']}, CUDA {c['cuda']},",
            f"torch {c['torch']}, nvidia-cutlass-dsl {c['cutlass_dsl']}, cuDNN {c['cudnn']}; "
            f"steady cuBLAS bf16 8192^3: {c['cublas_tflops']:.0f}).",
            "",
            *rows(sweep),
            "",
            f"Over the 36 cells ours is {geometric_mean(over_cudnn):.3f} times as fast as cuDNN in geometric mean "
            f"(least {min(over_cudnn):.3f}).",
            *over_best(ours),
            *beside("fa4", "FlashAttention-4", ours),
            *fp16(),
            "",
            "![TFLOPS over sequence length](benchmarks/results/sweep_bf16.png)",
            *shapes(),
            *features(),
            *serving(),
            *steps(),
        ]
    )


def over_best(ours: list[dict]) -> list[str]:
    """Ours over the best baseline of its record, cell by cell, through cuDNN; nothing without that record."""
    cells = {(c["shape"], c["causal"]): c for c in record(BESIDE)["cells"] if not c.get("graph")}
    both = [(r, cells[key]) for r in ours if (key := (r["shape"], r["causal"])) in cells]
    if not both:
        return []
    ratios = [r["ratios"]["cudnn"] / c["best_over_cudnn"] for r, c in both]
    over_fa3 = [c["us"]["fa3"] / c["cute_attn"] for _, c in both if "cute_attn" in c]
    lines = [
        f"It is {geometric_mean(ratios):.3f} times as fast as the best of cuDNN, FlashAttention-3 and FlashAttention-4 "
        f"(least {min(ratios):.3f}), the",
        f"last two by their ratio to cuDNN in `benchmarks/results/{BESIDE}.json` of {record(BESIDE)['date']}.",
    ]
    times = f"{geometric_mean(over_fa3):.3f} times as fast as FlashAttention-3 (least {min(over_fa3):.3f})"
    return [*lines, f"bf16, {len(over_fa3)} cells, beside it in the run of that file: {times}."] if over_fa3 else lines


def ours_of(record: dict) -> list[dict]:
    return [r for r in record["records"] if r["contender"] == "cute_attn"]


def ours_in(name: str) -> list[dict]:
    return ours_of(record(name))


def beside(peer: str, name: str, ours: list[dict], dtype: str = "bf16") -> list[str]:
    """How much faster than a baseline of the same run; nothing where it did not run."""
    ratios = [r["ratios"][peer] for r in ours if peer in r["ratios"]]
    if not ratios:
        return []
    over = f"{geometric_mean(ratios):.3f} times as fast as {name} (least {min(ratios):.3f})"
    return [f"{dtype}, {len(ratios)} cells, beside it in the same run: {over}."]


def fp16() -> list[str]:
    """The same sweep in the other type, where it was measured."""
    ours = ours_in("sweep_fp16")
    return [*beside("cudnn", "cuDNN", ours, "fp16"), *beside("fa4", "FlashAttention-4", ours, "fp16")]


def shapes() -> list[str]:
    """Other shapes: a row each, in graph replays where those were timed."""
    records = [r for name in SHAPES for r in ours_in(name)]
    replayed = {(r["shape"], r["causal"]) for r in records if r["mode"] == "graph"}
    lines = [
        "",
        "Other shapes, bf16, B,H,S,D (then K/V heads), in CUDA-graph replays where it says so:",
        "",
        "| shape | mask | | us | TFLOPS | us per head | over cuDNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if r["mode"] == "eager" and (r["shape"], r["causal"]) in replayed:
            continue
        us, tflops, per_head = r["p50_us"], r["tflops"], r["us_per_head"]
        numbers = f"{us:.{0 if us > 1000 else 2}f} | {tflops:.0f} | {per_head:.2f} | {r['ratios']['cudnn']:.2f}"
        mask = "causal" if r["causal"] else "full"
        lines.append(f"| {r['shape']} | {mask} | {'graph' if r['mode'] == 'graph' else ''} | {numbers} |")
    return lines if records else []


def features() -> list[str]:
    """Windows, varlen, block sparsity, scores and user functions: the range of what was measured, by head dim."""
    table: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, head_dim, value in (*windows(), *packed(), *scores(), *functions(), *lists()):
        table[name][head_dim].append(value)
    head_dims = (64, 128, 256)
    lines = [f"| {name} | " + " | ".join(span(row.get(d, ())) for d in head_dims) + " |" for name, row in table.items()]
    heading = [
        "",
        "Features: the range over sequence lengths and masks (`window.json`, `varlen.json`, `modifiers.json`,",
        "`lists.json`):",
        "",
        "| bf16 | d64 | d128 | d256 |",
        "|---|---|---|---|",
    ]
    return [*heading, *lines, *stuck()] if lines else []


def serving() -> list[str]:
    """Attention over K/V caches, for each case, heads, head dim and number of new tokens; ratios as geometric means."""
    kinds: dict[str, list[dict]] = defaultdict(list)
    for r in ours_in("serving"):
        if r["p50_us"]:
            tokens = f"{r['seqlen_q']} token{'s' * (r['seqlen_q'] > 1)}"
            kinds[f"{r['case']}, {r['heads']}/{r['heads_kv']}, d{r['head_dim']}, {tokens}"].append(r)
    if not kinds:
        return []
    c = record("serving")["conditions"]
    dates = " and ".join(run["date"][:10] for run in c.get("runs", [c]))
    heading = [
        "",
        f"K/V caches (`serving.json`: bf16, {c['gpu']}, {dates}, torch {c['torch']}, nvidia-cutlass-dsl",
        f"{c['cutlass_dsl']}), in CUDA-graph replays with K and V from memory:",
        "",
        "| heads of q/k, head dim, new tokens | cells | TB/s | TFLOPS | times as fast as the best other | least |",
        "|---|---|---|---|---|---|",
    ]
    return [*heading, *(serving_row(kind, found) for kind, found in kinds.items())]


def steps() -> list[str]:
    """Of a decode step what surrounds attention."""
    times: dict[tuple, dict[str, float]] = defaultdict(dict)
    for r in record("append")["records"]:
        if r["mode"] == "graph" and r["p50_us"]:
            times[r["case"], r["batch"], r["seqlen_q"], r["seqlen_k"]][r["contender"]] = r["p50_us"]
    if not times:
        return []
    lines = [
        "",
        f"New tokens (`append.json`, {record('append')['conditions']['date'][:10]}; 64 heads on 8, d128, pages of 64):",
        "",
        "| in a call of `flash_fwd_kvcache`, or of `append_kv` | us | beside |",
        "|---|---|---|",
    ]
    for (case, batch, queries, keys), us in times.items():
        ours = us["cute_attn"]
        if case == "decode":
            what, more = f"{batch} sequences, 8k keys: a token appended", "rotated too"
            appended, rotated = (us[f"cute_attn_append{x}"] for x in ("", "_rotary"))
            theirs = f"FlashAttention-3 {us['fa3']:.1f}, appended {us['fa3_append']:.1f}" if "fa3_append" in us else ""
            lines.append(f"| {what}; {more} | {ours:.1f}, {appended:.1f}; {rotated:.1f} | {theirs} |")
        elif case == "tree":
            words = f"{batch} sequences, 8k keys: a tree of {queries} drafts"
            lines.append(f"| {words} | {ours:.1f} | a causal call {us['causal']:.1f} |")
        else:
            lines.append(f"| `append_kv` of {keys} tokens | {ours:.1f} | a copy {us['copy']:.1f} |")
    return lines


def serving_row(kind: str, found: list[dict]) -> str:
    others = [[x for name, x in r["ratios"].items() if name != "flash_fwd"] for r in found]
    over = [min(ratios) for ratios in others if ratios]
    tb_per_s = span([r["gb_per_s"] / 1000 for r in found])
    tflops = " to ".join(dict.fromkeys(f"{f(r['tflops'] for r in found):.0f}" for f in (min, max)))
    mean, least = (f"{f(over):.3f}" if over else "" for f in (geometric_mean, min))
    return f"| {kind} | {len(found)} | {tb_per_s} | {tflops} | {mean} | {least} |"


def stuck() -> list[str]:
    """Times of baselines that are no measure of ours."""
    slow = [e for e in recorded("modifiers") if e["contender"] == "flex" and (e["us"] or 0) > 1e4]
    words = [f"FlexAttention's own kernel of {e['shape']}, {e['case']}, takes {e['us'] / 1e3:.0f} ms." for e in slow]
    return ["", *words] if words else []


def span(values: Sequence[float]) -> str:
    least, most = (f"{f(values):.2f}" for f in (min, max)) if values else ("", "")
    return least if least == most else f"{least} to {most}"


def record(name: str) -> dict:
    """A file of results; nothing in it where it is not there yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"records": [], "entries": [], "cells": []}


def recorded(name: str) -> list[dict]:
    """What a script timed; in files of schema 2 the records, by the names that schema 1 has for their fields."""
    content = record(name)
    return [entry_of(r) for r in content["records"]] if content.get("schema") == 2 else content["entries"]


def entry_of(r: dict) -> dict:
    """A case that ours alone runs has its name in place of ours."""
    alone = r["contender"] == "cute_attn" and r["case"] in ("plain", *SCORES, "equal lengths")
    x, ours = r["x_baseline"], r["ratios"].get("cute_attn")
    times = dict(us=r["p50_us"], times_dense=x, over_plain=x and 1 / x, times_ours=ours and 1 / ours)
    return r | r["features"] | times | dict(contender=r["case"] if alone else r["contender"])


def head_dim_of(entry: dict) -> int:
    return int(entry["shape"].split(",")[3])


def windows() -> Iterator[tuple[str, int, float]]:
    for e in recorded("window"):
        if e["contender"] in BASELINES and e["us"]:
            name = f"causal windows of 256 and 1024 keys, 8k and 32k: times as fast as {BASELINES[e['contender']]}"
            yield name, head_dim_of(e), e["times_ours"]


def packed() -> Iterator[tuple[str, int, float]]:
    found = recorded("varlen")
    what = "varlen, 64 sequences of 64 to 8192"
    tflops = {(e["head_dim"], e["causal"], e["contender"]): e["tflops"] for e in found if e.get("tflops")}
    for (head_dim, causal, implementation), own in tflops.items():
        if implementation == "cute_attn":
            even = tflops[head_dim, causal, "equal lengths"]
            yield f"{what}: TFLOPS over those of equal lengths", head_dim, own / even
    ours = {(e["head_dim"], e["causal"]): e["us"] for e in found if e["contender"] == "cute_attn"}
    for e in found:
        if e["contender"] in BASELINES and e["us"]:
            name = f"{what}: times as fast as {BASELINES[e['contender']]}"
            yield name, e["head_dim"], e["us"] / ours[e["head_dim"], e["causal"]]


def scores() -> Iterator[tuple[str, int, float]]:
    for e in recorded("modifiers"):
        if e["contender"] in SCORES:
            yield f"{SCORES[e['contender']]}, 2k and 8k: time over the plain kernel's", head_dim_of(e), e["over_plain"]


def functions() -> Iterator[tuple[str, int, float]]:
    for e in recorded("modifiers"):
        if e["contender"] == "flex" and e["us"]:
            case = {"document": "document mask"}.get(e["case"], e["case"])
            yield f"{case}, 4k: times as fast as compiled FlexAttention", head_dim_of(e), e["times_ours"]


def lists() -> Iterator[tuple[str, int, float]]:
    for e in recorded("lists"):
        if "block_size" in e:
            size = "x".join(map(str, e["block_size"]))
            yield f"lists of {size} blocks, {e['density']:.1%}, 4k: times as fast as dense", 128, e["times_dense"]


def rungs(records: list[dict]) -> list[str]:
    """A row per stage, then one per baseline, of one cell."""
    lines = ["| | what it adds | us | TFLOPS | gain | over cuDNN | rel. error |", "|---|---|---|---|---|---|---|"]
    for r in records:
        name = f"{r['stage']}. {r['contender']}" if r["stage"] else r["contender"]
        gain = f"{r['gain']:.2f}x" if r["gain"] else ""
        over = 1.0 if r["contender"] == "cudnn" else r["ratios"].get("cudnn")
        numbers = f"{r['p50_us']:.1f} | {r['tflops']:.0f} | {gain} | {f'{over:.2f}' if over else ''}"
        lines.append(f"| {name} | {r['adds'] or ''} | {numbers} | {r['relative_error']:.1e} |")
    return lines


def ablation_text(ablation: dict) -> str:
    """A table per cell, eager calls only; then the plot."""
    c, cells = ablation["conditions"], {}
    for r in ablation["records"]:
        if r["p50_us"] is not None and r["mode"] == "eager":
            cells.setdefault((r["shape"], "causal" if r["causal"] else "full", r["dtype"]), []).append(r)
    lines = [
        f"On one {c['gpu']} ({c['date'][:10]}, torch {c['torch']}, cuDNN {c['cudnn']}; steady cuBLAS bf16 8192^3: "
        f"{c['cublas_tflops']:.0f}).",
        "",
    ]
    for (shape, mask, dtype), records in cells.items():
        lines += [f"B,H,S,D = {shape}, {mask}, {dtype}:", "", *rungs(records), ""]
    return "\n".join([*lines, "![TFLOPS of each stage](benchmarks/results/ladder.png)"])


def filled(readme: str, begin: str, content: str) -> str:
    """The readme with its part from `begin` on written anew."""
    before, found, rest = readme.partition(begin)
    if not found:
        raise ValueError(f"no line {begin}")
    return "\n".join([before + begin, content, END]) + rest.partition(END)[2]


def main() -> None:
    readme, ablation, how = ROOT / "README.md", RESULTS / "ladder.json", ROOT / "docs" / "how_it_works.md"
    words = filled(readme.read_text(), BEGIN, text(json.loads((RESULTS / "sweep_bf16.json").read_text())))
    if ablation.exists():
        content = ablation_text(json.loads(ablation.read_text()))
        words = filled(words, BEGIN_ABLATION, content)
        how.write_text(filled(how.read_text(), BEGIN_ABLATION, content.replace("](", "](../")))
    readme.write_text(words)


if __name__ == "__main__":
    main()
