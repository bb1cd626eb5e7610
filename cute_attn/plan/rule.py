"""What a rule of the plan is, and how rules are followed."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from ..kernels.config import FwdConfig
from ..problem import Problem
from . import exceptions


class Rule(NamedTuple):
    """One choice: for which problems and kernels it is made, and what the kernel becomes."""

    name: str
    why: str
    when: Callable[[Problem, FwdConfig], object]
    change: Callable[[Problem, FwdConfig], FwdConfig]


class Step(NamedTuple):
    """A rule or an exception that applied, and the kernel since then."""

    name: str
    why: str
    config: FwdConfig


def follow(rules: Iterable[Rule], problem: Problem, steps: list[Step]) -> list[Step]:
    """The steps, and behind them those of the rules that apply.

    The exceptions are looked through after each rule: what the next one decides may depend on them.
    """
    steps = list(steps)
    for rule in rules:
        config = steps[-1].config
        changed = rule.change(problem, config) if rule.when(problem, config) else config
        if changed != config:
            steps.append(Step(rule.name, rule.why, changed))
            steps += [Step(x.title, x.reason, found) for x, found in exceptions.applied(changed)]
    return steps


def changes(before: FwdConfig, after: FwdConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two kernels differ, with both values."""
    pairs = {field.name: (getattr(before, field.name), getattr(after, field.name)) for field in fields(FwdConfig)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
