"""The plan's exceptions: the file is well formed, calls reach each entry, and kernels spill without it, not with it."""

import dataclasses
import json

import pytest

from cute_attn.kernels.config import FwdConfig
from cute_attn.plan import exceptions
from cute_attn.plan.exceptions import BOUNDS, FEATURES, Entry, fact, holds
from tests.host import exceptions as measured
from tests.host.exceptions import FILE, cases, spilled, version
from tests.support.nightly import sample

ENTRIES = exceptions.entries()
FIELDS = {field.name for field in dataclasses.fields(FwdConfig)}
COUNTS = {"cutlass_dsl": str, "ptxas": str, "kernels": int, "spilled": int, "spilled_bytes": int}
SPILL = [x.name for x in ENTRIES if any(y.items() >= version().items() and y["spilled_bytes"] for y in x.measured)]


def test_the_file():
    """Each entry says what it is for, what it changes and what was measured; the command writes the same text."""
    assert FILE.read_text() == measured.written(json.loads(FILE.read_text()))
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.name and entry.why and entry.pattern and entry.change and entry.measured, entry.name
        assert set(entry.change) <= FIELDS
        for name, wanted in entry.pattern.items():
            assert type(fact(FwdConfig(64), name)) in (bool, int), name
            assert type(wanted) in (bool, int) or (type(wanted) is list and wanted) or holds(1 << 20, wanted), name
        assert any(name in entry.pattern for name in entry.change), "a kernel that was changed needs no second change"
        for counts in entry.measured:
            assert {name: type(counts[name]) for name in COUNTS} == COUNTS
            assert 0 <= counts["spilled"] <= counts["kernels"] and counts["kernels"] > 0
            assert bool(counts["spilled"]) == bool(counts["spilled_bytes"]) == ("worst" in counts)


def test_calls_reach_each_entry():
    for entry in ENTRIES:
        found = cases()[entry.name]
        assert found, entry.name
        for case in found:
            assert entry.matches(case.without) and not entry.matches(case.kernel)


@pytest.mark.machine_code
@pytest.mark.parametrize("name", sample(2, SPILL) if len(SPILL) > 2 else [])
def test_kernels_spill_without_it_and_not_with_it(name):
    (entry,) = (x for x in ENTRIES if x.name == name)
    (counts,) = (x for x in entry.measured if x.items() >= version().items())
    worst = [case for case in cases()[name] if case.without.name == counts["worst"]]
    assert counts["spilled_bytes"] in [spilled(case.without) for case in worst[:4]], (
        "python -m tests.host.exceptions --update"
    )
    assert [spilled(case.kernel) for case in worst[:4]] == [0] * len(worst[:4])


def test_patterns():
    """Values, lists of values, bounds; of fields, of properties and of features."""
    config = FwdConfig(64, tile_m=192, pack=8)
    every = dict(head_dim=64, warpgroups=[3, 4], registers_held=">=128", tile_n="<256", pack=">1", causal=False)
    assert Entry("", every, {}, "").matches(config)
    for name, other in dict(head_dim=96, warpgroups=[4], registers_held=">128", tile_n="<=96", causal=True).items():
        assert not Entry("", every | {name: other}, {}, "").matches(config)
    assert all(holds(5, f"{sign}5") == ("=" in sign) for sign in BOUNDS)
    assert all(fact(config, name) is False for name in FEATURES)


def test_why_names_what_was_measured():
    counts = dict(cutlass_dsl="4", ptxas="12.9", kernels=2, spilled=1, spilled_bytes=8, worst="k")
    said = Entry("n", {}, {}, "few registers", (counts, counts | dict(ptxas="13.4", spilled_bytes=0)))
    assert said.reason == "few registers; without it kernels spill up to 8 bytes by ptxas 12.9"
    assert said._replace(measured=()).reason == "few registers" and said.title == "exception: n"
