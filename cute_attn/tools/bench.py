"""`python -m cute_attn.bench`: conditions, then a row per implementation. Without a Hopper GPU, the static report.

    python -m cute_attn.bench --shape 16,16,2048,64 --causal --vs cudnn,fa3 --json out.json
    python -m cute_attn.bench --sweep --csv sweep.csv --plot sweep.png
    python -m cute_attn.bench --ablation --json ablation.json --plot ablation.png

Times follow `benchmark/timing.py`'s method. Needs `pip install "cute_attn[bench]"`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import ALIGNMENT, DTYPES, HEAD_DIM_MAX, LAYOUTS
from ..problem import Problem

try:
    from rich.console import Console
except ImportError:
    raise SystemExit('python -m cute_attn.bench: rich is missing; pip install "cute_attn[bench]"') from None

from .benchmark import ablation, frame, machine, report, static
from .benchmark.cells import row, sweep
from .benchmark.implementations import BASELINES, DEFAULT_BASELINES, CuteAttn, Implementation
from .benchmark.timing import ROUNDS
from .benchmark.workload import cell_word

DEFAULT_SHAPE = (16, 16, 2048, 64)
WIDTH = 160  # of tables in a file or pipe
NOT_TIMED = "No Hopper GPU here: nothing was timed."


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all went well, 1 where cute_attn failed or was wrong, 2 for bad arguments, 130 when interrupted."""
    args, problems = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else max(WIDTH, Console().width), highlight=False)
    reason = machine.no_hopper()
    if reason is not None:
        return without_gpu(args, problems, console, reason)
    return (AblationRun if args.ablation else Run)(args, problems, console).run()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m cute_attn.bench", description="Time cute_attn's forward beside others.")
    add = p.add_argument
    add("--shape", type=sizes, action="append", metavar="B,H,S,D", help="may be repeated; default 16,16,2048,64")
    add("--kv-heads", type=positive, metavar="N", help="heads of k and v; default H")
    add("--seqlen-k", type=positive, metavar="N", help="rows of k and v; default S")
    add("--head-dim-v", type=head_dim, metavar="N", help="of v and o; default D")
    add("--causal", action="store_true", help="with the causal mask; --sweep without it runs full and causal")
    add("--dtype", choices=tuple(DTYPES.values()), default="bf16", help="default bf16")
    add("--layout", choices=LAYOUTS, default="bshd", help="order of the inputs in memory; default bshd")
    add("--vs", type=_names, metavar="NAME,...", help=f"of {', '.join(BASELINES)}; '' for none")
    add("--sweep", action="store_true", help="36 cells: 16k tokens, hidden 2048, D 64 to 256, S 512 to 16k")
    add(
        "--ablation",
        "--ladder",
        action="store_true",
        help="our own stages, each with one thing more than the one before",
    )
    add("--graph", action="store_true", help="also CUDA-graph replays, and the host time of an eager call")
    add("--rounds", type=positive, default=ROUNDS, metavar="N", help=f"default {ROUNDS}")
    add("--json", type=out_file, metavar="FILE", help="everything; complete after each cell")
    add("--csv", type=out_file, metavar="FILE", help="a line per implementation and cell")
    add("--plot", type=png, metavar="FILE.png", help="TFLOPS over S, or bars for a few shapes")
    add(
        "--baselines",
        "--peers",
        type=Path,
        metavar="FILE",
        help="JSON of cells with best_over_cudnn: also ours over that best, and fa3 in --plot",
    )
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Problem]]:
    """The arguments and the problems that they name; exits with 2 on bad ones, naming the argument."""
    p = parser()
    args = p.parse_args(argv)
    if args.ablation and (args.sweep or args.baselines):
        other, hint = ("--sweep", "name shapes by --shape") if args.sweep else ("--baselines", "name them by --vs")
        p.error(f"argument --ablation: not allowed with {other}; {hint}")
    if args.ablation and args.head_dim_v:
        p.error("argument --head-dim-v: not allowed with --ablation, whose stages have one head dim")
    if args.vs is None:
        args.vs = ablation.BASELINES if args.ablation else DEFAULT_BASELINES
    shapes = args.shape or ([] if args.sweep else [DEFAULT_SHAPE])
    cells = [(shape, args.causal) for shape in shapes]
    if args.sweep:
        cells += [cell for cell in sweep() if cell[1] or not args.causal]
    problems = [asked(p, args, shape, causal) for shape, causal in dict.fromkeys(cells)]
    args.best_over_cudnn, args.baselines_record = {}, None
    if args.baselines is not None:
        if "cudnn" not in args.vs:
            p.error("argument --baselines: goes through this run's cudnn; put cudnn in --vs")
        try:
            args.baselines_record = report.baselines_file(args.baselines, args.dtype)
            args.best_over_cudnn = report.best_over_cudnn(args.baselines_record)
            report.over_cudnn(args.baselines_record, "fa3")  # the plot's, asked before anything is timed
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            p.error(f"argument --baselines: {args.baselines} does not serve: {type(error).__name__}: {error}")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        p.error('argument --plot: matplotlib is missing; pip install "cute_attn[bench]"')
    return args, problems


def asked(p: argparse.ArgumentParser, args: argparse.Namespace, shape: Sequence[int], causal: bool) -> Problem:
    """One shape with the other arguments; exits with 2 where they do not fit together."""
    batch, heads, seqlen, d = shape
    d_v = args.head_dim_v or d
    heads_kv = args.kv_heads or heads
    if heads % heads_kv:
        word = ",".join(map(str, shape))
        p.error(f"argument --kv-heads: {heads_kv} does not divide the {heads} heads of shape {word}")
    sizes = batch, heads, heads_kv, seqlen, args.seqlen_k or seqlen, d
    return Problem(*sizes, args.dtype, args.layout, causal, head_dim_v=0 if d_v == d else d_v)


def sizes(word: str) -> tuple[int, ...]:
    try:
        found = tuple(int(size) for size in word.split(","))
    except ValueError:
        found = ()
    if len(found) != 4 or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not four positive integers B,H,S,D, such as 16,16,2048,64")
    supported(word, found[3])
    return found


def head_dim(word: str) -> int:
    return supported(word, positive(word))


def supported(word: str, head_dim: int) -> int:
    if head_dim % ALIGNMENT or head_dim > HEAD_DIM_MAX:
        raise argparse.ArgumentTypeError(
            f"{word!r}: head_dim {head_dim} is not supported; use a multiple of {ALIGNMENT} up to {HEAD_DIM_MAX}"
        )
    return head_dim


def positive(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def _names(word: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in word.split(",") if name.strip()))
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; use {', '.join(BASELINES)}")
    return names


def out_file(word: str) -> Path:
    path = Path(word)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{word!r} cannot be written: a file in a folder that is there is needed")
    return path


def png(word: str) -> Path:
    if not word.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{word!r} is not the name of a .png file")
    return out_file(word)


def run_facts(args: argparse.Namespace, problems: list[Problem]) -> dict[str, Any]:
    """The conditions that the arguments set."""
    return {"dtype": args.dtype, "layout": args.layout, "shapes": [cell_word(problem) for problem in problems]}


def without_gpu(args: argparse.Namespace, problems: list[Problem], console: Console, reason: str) -> int:
    facts = machine.conditions(machine.Nvml()) | run_facts(args, problems)
    report.print_facts(console, report.conditions_in_words(facts))
    try:
        kernels = (_stages if args.ablation else _kernels)(problems, console)
    except FileNotFoundError as error:  # nvdisasm; it says how to get it
        print(error, file=sys.stderr)
        return 1
    console.print(f"\n{NOT_TIMED} ({reason}; the reports above are of the compiled code.)")
    if args.json is not None:
        content = {"timed": False, "reason": reason, "conditions": facts, "kernels": kernels, "records": []}
        report.write_json(args.json, content)
    for name in ("csv", "plot"):
        if getattr(args, name) is not None:
            print(f"--{name}: not written, there are no times", file=sys.stderr)
    return 0


def _kernels(problems: list[Problem], console: Console) -> list[dict[str, Any]]:
    """The static report of each planned kernel, printed as soon as it is compiled."""
    kernels = []
    for config in static.configs(problems):
        kernels.append(static.describe(config))
        static.print_kernel(console, kernels[-1])
    return kernels


def _stages(problems: list[Problem], console: Console) -> list[dict[str, Any]]:
    """The same of each problem's stages."""
    kernels = []
    for problem in problems:
        stages = ablation.describe(problem)
        ablation.print_static(console, problem, stages)
        kernels += stages
    return kernels


class Run(frame.Run):
    """The dense benchmark: a group per problem, with a summary, CSV and plot."""

    def __init__(self, args: argparse.Namespace, problems: list[Problem], console: Console):
        groups = {cell_word(problem): partial(self._rows, problem) for problem in problems}
        super().__init__(groups, run_facts(args, problems), console, args.json)
        self.args, self.rounds, self.graph = args, args.rounds, args.graph
        ours, self.baselines = self._ours(), [BASELINES[name] for name in args.vs]
        self.ours = {one.name for one in ours}
        self.implementations = [*ours, *self.baselines]
        reasons = {one.name: one.absent() for one in self.implementations}
        self.absent = {name: reason for name, reason in reasons.items() if reason}
        self.steps = self.rounds * (len(self.implementations) - len(self.absent)) * (2 if self.graph else 1)

    def _ours(self) -> Sequence[Implementation]:
        return [CuteAttn()]

    def _rows(self, problem: Problem, on: torch.device) -> list[frame.Row]:
        return [row(problem, self.implementations, self.absent, on)]

    def keep(self, records: list[frame.Record]) -> None:
        super().keep(report.with_best(records, self.args.best_over_cudnn))

    def finish(self, complete: bool) -> None:
        """The summary and the plot of whatever is finished."""
        super().finish(complete)
        if self.cells_done() > 1 or self.args.best_over_cudnn:
            report.print_summary(self.console, self.records, with_baselines=bool(self.args.best_over_cudnn))
        if self.args.plot is not None and any(record["tflops"] for record in self.records):
            self._draw(self.args.plot)

    def _draw(self, path: Path) -> None:
        from .benchmark import plot

        plot.draw(path, self.records, self.facts, self.args.baselines_record)

    def content(self, complete: bool) -> dict[str, Any]:
        return super().content(complete) | {"summary": report.summary(self.records)}

    def write(self, complete: bool) -> None:
        super().write(complete)
        if self.args.csv is not None:
            report.write_csv(self.args.csv, self.facts, self.records)


class AblationRun(Run):
    """The same with our own stages in place of `flash_fwd`."""

    def _ours(self):
        return ablation.STAGES

    def keep(self, records):
        self.records += ablation.with_stages(records)
        ablation.print_cell(self.console, records, self.absent)

    def _draw(self, path):
        from .benchmark import plot

        plot.draw_ablation(path, self.records, self.facts)


if __name__ == "__main__":
    raise SystemExit(main())
