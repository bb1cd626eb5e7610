"""What one version of the compiler does to single kernels: `exceptions.json`, written by tests/host/exceptions.py.

An entry has a `name`; a `pattern`, facts of a kernel that must hold; a `change`, the fields that it then gets; `why`;
and what was `measured` by each version: of how many kernels without the change how many spill, and how many bytes the
worst of them stores. A fact is a field or property of `FwdConfig`, or one of FEATURES. Its pattern is the value, a list
of values of which it is one, or a bound such as ">64".
"""

import importlib.resources
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

from ..kernels.config import FwdConfig
from ..kernels.mask import Causal, UserMask

FEATURES: dict[str, Callable[[FwdConfig], bool]] = dict(
    causal=lambda c: isinstance(c.mask.base if isinstance(c.mask, UserMask) else c.mask, Causal),
    window=lambda c: c.mask.windowed,
    mask_mod=lambda c: c.mask.everywhere,
    score=lambda c: bool(c.score.name),
    softcap=lambda c: "softcap" in c.score.name,
    alibi=lambda c: "alibi" in c.score.name,
    score_mod=lambda c: "score_mod" in c.score.name,
    sparse=lambda c: c.sparse is not None,
    wider_v=lambda c: c.d_v > c.head_dim,
)
BOUNDS: dict[str, Callable[[Any, int], bool]] = {">=": ge, "<=": le, ">": gt, "<": lt}  # the longer ones first


class Entry(NamedTuple):
    """One exception."""

    name: str
    pattern: dict[str, Any]
    change: dict[str, Any]
    why: str
    measured: tuple[dict[str, Any], ...] = ()

    @property
    def title(self) -> str:
        return f"exception: {self.name}"

    @property
    def reason(self) -> str:
        """Why, and what was measured of it."""
        found = [f"{x['spilled_bytes']} bytes by ptxas {x['ptxas']}" for x in self.measured if x["spilled_bytes"]]
        return self.why + (f"; without it kernels spill up to {', '.join(found)}" if found else "")

    def matches(self, config: FwdConfig) -> bool:
        return all(holds(fact(config, name), wanted) for name, wanted in self.pattern.items())


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Of the file, in its order; read once."""
    content = json.loads((importlib.resources.files(__package__) / "exceptions.json").read_text())
    return tuple(Entry(**(entry | dict(measured=tuple(entry["measured"])))) for entry in content)


def fact(config: FwdConfig, name: str) -> Any:
    """A kernel's feature, field or property of that name."""
    return FEATURES[name](config) if name in FEATURES else getattr(config, name)


def holds(value: Any, wanted: Any) -> bool:
    """Whether a fact is as a pattern has it."""
    if isinstance(wanted, list):
        return value in wanted
    if isinstance(wanted, str):
        sign = next(sign for sign in BOUNDS if wanted.startswith(sign))
        return BOUNDS[sign](value, int(wanted.removeprefix(sign)))
    return value == wanted


def applied(config: FwdConfig) -> Iterator[tuple[Entry, FwdConfig]]:
    """The exceptions that a kernel needs, in the file's order, each with the kernel since then."""
    for entry in entries():
        if entry.matches(config):
            config = replace(config, **entry.change)
            yield entry, config


def with_exceptions(config: FwdConfig) -> FwdConfig:
    """A kernel with the exceptions that it needs."""
    found = [config, *(changed for _, changed in applied(config))]
    return found[-1]
