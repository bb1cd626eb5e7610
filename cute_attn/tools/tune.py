"""`python -m cute_attn.tune`: times many kernels on this GPU, and writes the table by which calls are planned.

    python -m cute_attn.tune                                    # everything, for this user's calls on this GPU
    python -m cute_attn.tune --head-dim 64 --causal --budget 120 --resume d64.json

For each class (head dim, mask, type) it compiles the candidates in parallel, drops those whose machine code is not
healthy (spills, serialised WGMMAs), checks each one's output, times all for a short while and the best few for longer,
and keeps what is there unless something is clearly faster (`tuning/choose.py`). The file is whole after each class;
with `--resume` the same command goes on where it was. `--list` needs no GPU: it shows the candidates and what is wrong
with their machine code, for about a second each. Needs `pip install "cute_attn[bench]"`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.text import Text
except ImportError:
    raise SystemExit('python -m cute_attn.tune: rich is missing; pip install "cute_attn[bench]"') from None

from .. import tuned
from ..kernels.config import DTYPES, FwdConfig
from ..plan import HEAD_DIMS
from ..tuned import Key
from .bench import NOT_TIMED, WIDTH, out_file, positive
from .benchmark import machine
from .benchmark.cells import SEQLENS
from .benchmark.progress import Progress, steps
from .benchmark.timing import ROUNDS
from .tuning import results, tables
from .tuning.candidates import Verdict, candidates, incumbents, judge_all, of_type
from .tuning.choose import Rows, choose
from .tuning.results import Outcomes, Results
from .tuning.trial import SCREEN, Effort, Lab, Stuck, finalists, gpu_lab, problem

BEST = 3  # of the screening over all lengths; the best at each length and what is there come along
STUCK, INTERRUPTED = 3, 130
WITHOUT = "--list shows what a tune would time, without one"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when done or out of budget, 1 where a class has no kernel that works, 2 for bad arguments or no Hopper GPU.

    3: run it again; 130: interrupted.
    """
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else max(WIDTH, Console().width), highlight=False)
    reason = machine.no_hopper()
    if args.list:
        return list_candidates(args, console, reason)
    if reason is not None:
        print(f"python -m cute_attn.tune: a Hopper GPU is needed, and {reason}; {WITHOUT}", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # the reference's products in float32, not TF32
    found = open_results(args, machine.conditions(machine.Nvml()), console)
    if found is None:
        return 2
    return Tune(args, found, gpu_lab(), console).run()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m cute_attn.tune", description="Find this GPU's fastest kernels.")
    add = p.add_argument
    dims, lengths = ",".join(map(str, HEAD_DIMS)), ",".join(map(str, SEQLENS))
    add("--head-dim", type=_head_dims, default=HEAD_DIMS, metavar="D,...", help=f"of {dims}; default all")
    mask = p.add_mutually_exclusive_group()
    mask.add_argument("--causal", action="store_true", help="the causal mask only")
    mask.add_argument("--full", action="store_true", help="no mask only")
    add("--dtype", choices=DTYPES, default="bf16", help="default bf16, whose choice also serves fp16")
    add("--seqlens", type=_numbers, default=SEQLENS, metavar="S,...", help=f"default {lengths}")
    add("--tokens", type=positive, default=16384, metavar="N", help="batch x S of a timed problem; default 16384")
    add("--rounds", type=positive, default=ROUNDS, metavar="N", help=f"for the best few; default {ROUNDS}")
    add("--budget", type=positive, metavar="SECONDS", help="starts no class that would not be done by then")
    add("--wide", action="store_true", help="every tile with every choice: 4 to 35 times the candidates")
    add("--out", type=out_file, metavar="FILE", help="default: the table that calls on this GPU are planned by")
    add("--resume", type=out_file, metavar="FILE", help="goes on from this file, and into it; starts it if need be")
    add("--list", action="store_true", help="only the candidates, and what is wrong with their machine code")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    if args.out is not None and args.resume is not None:
        p.error("argument --out: --resume goes on in its own file; give one of the two")
    masks = [causal for causal in (False, True) if not (args.full if causal else args.causal)]
    args.keys = [(d, causal, args.dtype) for d, causal in product(args.head_dim, masks)]
    return args


def _numbers(word: str) -> tuple[int, ...]:
    return tuple(sorted({positive(number.strip()) for number in word.split(",")}))


def _head_dims(word: str) -> tuple[int, ...]:
    numbers = _numbers(word)
    unknown = [str(d) for d in numbers if d not in HEAD_DIMS]
    if unknown:
        known = ", ".join(map(str, HEAD_DIMS))
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no kernel has this head dim; use {known}")
    return numbers


def open_results(args: argparse.Namespace, conditions: dict[str, Any], console: Console) -> Results | None:
    """What to go on from, its file named to the reader; None where --resume's does not serve."""
    path = args.resume or args.out or tuned.file_in_use(conditions["gpu"])
    found = Results.fresh(path, conditions)
    if args.resume is not None and path.exists():
        try:
            found = Results.resumed(path, conditions)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            print(f"--resume: {path} does not serve: {type(error).__name__}: {error}", file=sys.stderr)
            return None
    path.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{conditions['gpu']}: {len(args.keys)} classes, into {path}", soft_wrap=True)
    if path != tuned.file_in_use(conditions["gpu"]):
        console.print(f"CUTE_ATTN_TUNED={path} plans calls by it", soft_wrap=True)
    return found


def list_candidates(args: argparse.Namespace, console: Console, reason: str | None) -> int:
    """Each class's candidates, and the verdicts on their machine code; `reason`: why a tune would time none of them."""
    unseen = False
    for key in args.keys:
        verdicts = _listed(key, candidates(key, incumbents(tuned.table().classes[key]), args.wide))
        tables.print_candidates(console, key, verdicts)
        unseen |= any(verdict.problems is None for verdict in verdicts.values())
    if unseen:
        console.print(tables.UNSEEN, soft_wrap=True)
    if reason is not None:
        console.print(f"\n{NOT_TIMED} ({reason}; the list above is what a tune would time.)", soft_wrap=True)
    return 0


def _listed(key: Key, configs: Sequence[FwdConfig]) -> dict[FwdConfig, Verdict]:
    with steps(tables.class_word(key), len(configs)) as step:
        return _judged(key, configs, False, step)


def _judged(
    key: Key, configs: Sequence[FwdConfig], store: bool, step: Callable[[], Any] = lambda: None
) -> dict[FwdConfig, Verdict]:
    """Verdicts on candidates as rows have them."""
    real = {of_type(config, key[2]): config for config in configs}
    return {real[config]: verdict for config, verdict in judge_all(list(real), store, step).items()}


class Spent(Exception):
    """The budget's seconds are over."""


@dataclass
class Tune:
    """A timed run: class after class, each written as soon as it is finished."""

    args: argparse.Namespace
    found: Results
    lab: Lab
    console: Console
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self.start, self.longest = self.clock(), 0.0
        self.code = 0

    def run(self) -> int:
        todo = [key for key in self.args.keys if not self.found.finished(key)]
        before = len(self.args.keys) - len(todo)
        done = 0
        try:
            for done, key in enumerate(todo):
                began = self.clock()
                self._check_budget(self.longest)
                self._class(key, f"class {before + done + 1} of {len(self.args.keys)}, {tables.class_word(key)}")
                self.longest = max(self.longest, self.clock() - began)
            done = len(todo)
        except Spent:
            self.console.print(f"--budget: {self.args.budget} s are over")
        except KeyboardInterrupt:
            self.code = INTERRUPTED
        except Stuck as stuck:
            self._stuck(todo[done], stuck)
        words = f"{before + done} of {len(self.args.keys)} classes are finished"
        if done < len(todo):
            words += f"; go on with --resume {self.found.path}" if self.found.path.exists() else "; nothing is written"
        self.console.print(f"\n{words}", soft_wrap=True)
        return self.code

    def _class(self, key: Key, words: str) -> None:
        began, rows = self.clock(), self.found.class_rows(key)
        configs = candidates(key, incumbents(rows), self.args.wide)
        with self._progress(words, len(configs)):
            verdicts = _judged(key, configs, True, self.lab.step)
        reasons = {c: "; ".join(verdict.problems or ()) or None for c, verdict in verdicts.items()}
        reasons |= self.found.failed(key)
        screened = self._measure(key, f"{words}: screening", reasons, SCREEN, check=True)
        best = finalists(screened, incumbents(rows), BEST)
        effort = Effort(self.args.rounds)
        late: dict[FwdConfig, str | None] = dict.fromkeys(best)
        final = self._measure(key, f"{words}: the best {len(best)}", late, effort, check=False)
        reasons |= {config: reason for config, reason in late.items() if reason}
        best = [config for config in best if not late[config]]
        if not best:
            self.code = 1
            self.console.print(f"{tables.class_word(key)}: no candidate works; its rows are left as they were")
        else:
            rows = self._chosen(key, rows, final, [c for c, reason in reasons.items() if reason is None])
        how = dict(seqlens=list(self.args.seqlens), tokens=self.args.tokens, rounds=self.args.rounds)
        how |= dict(candidates=len(configs), seconds=round(self.clock() - began, 1))
        entries = results.entries(key, reasons, screened, final, self.args.tokens)
        self.found.add_class(key, results.with_tflops(key, rows, final, self.args.tokens), how, entries)
        self.found.write()
        tables.print_class(self.console, key, self.found, [verdict.problems is None for verdict in verdicts.values()])

    def _chosen(self, key: Key, rows: Rows, final: Outcomes, healthy: list[FwdConfig]) -> Rows:
        """The rows after the last rounds, with the types that they are for."""
        timed = [c for c in healthy if all(c in one.stats for one in final.values())]
        times = {c: {s: one.stats[c].rounds_us for s, one in final.items()} for c in timed}
        new = choose(times, rows, list(final), healthy)
        return results.typed(rows, new, key[2], self._healthy_in_fp16)

    def _healthy_in_fp16(self, rows: Rows) -> bool:
        key = rows[0].config.head_dim, rows[0].config.mask.causal, "fp16"
        return all(verdict.usable for verdict in _judged(key, incumbents(rows), True).values())

    def _measure(
        self, key: Key, words: str, reasons: dict[FwdConfig, str | None], effort: Effort, check: bool
    ) -> Outcomes:
        """Every length, with the candidates that no reason excludes; what fails at one length is out from there on."""
        outcomes: Outcomes = {}
        usable = [config for config, reason in reasons.items() if reason is None]
        with self._progress(words, len(self.args.seqlens) * len(usable) * effort.rounds):
            for length in self.args.seqlens if usable else ():
                self._check_budget()
                usable = [config for config in usable if reasons[config] is None]
                outcomes[length] = self.lab.measure(problem(key, length, self.args.tokens), usable, effort, check)
                reasons |= outcomes[length].reasons
        return outcomes

    def _check_budget(self, needed: float = 0.0) -> None:
        if self.args.budget is not None and self.clock() - self.start + needed > self.args.budget:
            raise Spent

    def _progress(self, words: str, total: int):
        """On stderr; the lab's steps advance it."""
        progress = Progress()
        task = progress.add_task(words, total=total)
        self.lab = replace(self.lab, step=lambda: progress.advance(task))
        return progress if total else nullcontext()

    def _stuck(self, key: Key, stuck: Stuck) -> None:
        """Only a new process gets a new CUDA context: this one says so, and leaves the candidate out next time."""
        self.code = STUCK
        self.found.add_failure(key, stuck.config, stuck.reason)
        self.found.write()
        text = f"{tables.config_word(stuck.config)}: {stuck.reason}; it is left out when this command is run again"
        self.console.print(Text(text), soft_wrap=True)


def door() -> None:
    """The process's end, too."""
    code = main()
    if code == STUCK:  # an ordinary exit would wait for a kernel that does not end
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    door()
