"""Machine code is as fingerprints.json has it: a sample every time, each combination of features at night."""

import json

import pytest

from cute_attn.kernels.config import FwdConfig
from tests.kernels import fingerprints
from tests.kernels.fingerprints import GOLDEN, chosen, different, fingerprint, known
from tests.support.nightly import sample

NAMES = json.loads(GOLDEN.read_text())["kernels"]
pytestmark = pytest.mark.machine_code


@pytest.mark.parametrize("name", sample(4, NAMES))
def test_as_it_was(name):
    try:
        golden = known()
    except ValueError as other:
        pytest.skip(str(other))
    assert different({name: fingerprint(chosen()[name])}, golden) == [], "on purpose? fingerprints.py --update"


def test_the_file_has_each_combination():
    assert set(NAMES) == set(chosen())
    combinations = {fingerprints.combination(c) for c in chosen().values() if isinstance(c, FwdConfig)}
    assert len(combinations) > 250


def test_it_tells_what_differs():
    said = different({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0"})
    assert said == ["b: its PTX is another", "c: is not in fingerprints.json"]
