"""What the tests of kernels share."""

import pytest

from cute_attn import api


@pytest.fixture
def planned_by(monkeypatch):
    """A function: from then on, calls run this kernel."""

    def set_plan(config):
        api._calls.clear()
        monkeypatch.setattr(api, "plan", lambda problem, gpu=None: config)

    yield set_plan
    api._calls.clear()
