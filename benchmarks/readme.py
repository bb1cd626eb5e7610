"""Writes README's numbers between its markers, from the JSON under benchmarks/results/.

python benchmarks/readme.py
"""

import json
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/readme.py writes from here -->", "<!-- to here -->"


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
    ours = [r for r in sweep["records"] if r["contender"] == "cute_attn"]
    over_cudnn = [r["ratios"]["cudnn"] for r in ours]
    over_best = [r["over_best_peer"] for r in ours]
    return "\n".join(
        [
            BEGIN,
            f"TFLOPS, bf16, 16k tokens, hidden size 2048, steady state, on one {c['gpu']} ({c['date'][:10]}, driver "
            f"{c['driver']}, CUDA {c['cuda']},",
            f"torch {c['torch']}, nvidia-cutlass-dsl {c['cutlass_dsl']}, cuDNN {c['cudnn']}; "
            f"steady cuBLAS bf16 8192^3: {c['cublas_tflops']:.0f}).",
            "",
            *rows(sweep),
            "",
            f"Over the 36 cells ours is {geometric_mean(over_cudnn):.3f} times as fast as cuDNN in geometric mean "
            f"(least {min(over_cudnn):.3f}), and",
            f"{geometric_mean(over_best):.3f} times as fast as the best of cuDNN, FlashAttention-3 and "
            f"FlashAttention-4 (least {min(over_best):.3f}), the",
            "last two by their ratio to cuDNN in `benchmarks/results/peers_h200_bf16.json`.",
            "",
            "![TFLOPS over sequence length](benchmarks/results/sweep_bf16.png)",
            END,
        ]
    )


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + text(json.loads((RESULTS / "sweep_bf16.json").read_text())) + rest.split(END)[1])


if __name__ == "__main__":
    main()
