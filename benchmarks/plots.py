"""Draws the pictures of benchmarks/results from their records, without a GPU.

python benchmarks/plots.py
"""

import json
from pathlib import Path
from typing import Any

from cute_attn.tools.benchmark import plot, timeline_plot
from cute_attn.tools.benchmark.timeline import Span

RESULTS = Path(__file__).parent / "results"


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    baselines, ablation, timeline = (record(name) for name in ("peers_h200_bf16", "ladder", "timeline"))
    for name in ("sweep_bf16", "sweep_fp16"):
        sweep = record(name)
        plot.draw(RESULTS / f"{name}.png", sweep["records"], sweep["conditions"], baselines)
    plot.draw_ablation(RESULTS / "ladder.png", ablation["records"], ablation["conditions"])
    spans = [Span(**span) for span in timeline["spans"]]
    timeline_plot.draw(RESULTS / "timeline.png", spans, timeline_plot.title_of(timeline))


if __name__ == "__main__":
    main()
