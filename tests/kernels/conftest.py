"""What the tests of kernels share."""

import pytest

from cute_attn import call, operands


@pytest.fixture
def planned_by(monkeypatch):
    """A function: from then on, calls run this kernel."""

    def set_plan(config):
        call.known.clear()
        monkeypatch.setattr(operands, "plan", lambda problem, gpu=None: config)

    yield set_plan
    call.known.clear()
