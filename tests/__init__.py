"""The tests, a folder for each room; `support` has what they share, `interpreter` runs PTX without a GPU."""

import pytest

pytest.register_assert_rewrite("tests.support")  # a helper's assert says as much as a test's
