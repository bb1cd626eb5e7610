"""The store of compiled kernels: built once, whoever asks, and for one state of the sources."""

import threading

import pytest

from cute_attn import compile, plan
from cute_attn.tools import inspect
from tests.support import built
from tests.support.nightly import sample, where

CONFIG = plan.config(64, "bf16", "bhsd", False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty store in place of the run's own."""
    monkeypatch.setattr(built, "_folder", tmp_path)
    return tmp_path


def test_a_second_worker_waits_and_reads(folder):
    made, found = [], []

    def make():
        made.append("once")
        return "text", b"\xff\x00"

    threads = [threading.Thread(target=lambda: found.append(built.get("kind", CONFIG, make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(b"text", b"\xff\x00")] * 8 and made == ["once"]
    assert built.get("other kind", CONFIG, lambda: ("2",)) == (b"2",)
    assert built.get("kind", plan.config(64, "bf16", "bhsd", True), lambda: ("3",)) == (b"3",)


@pytest.mark.parametrize("damage", [b"", b"no archive", None], ids=["empty", "foreign", "cut"])
def test_a_damaged_entry_is_made_again(folder, damage):
    built.get("kind", CONFIG, lambda: ("x" * 1000,))
    (path,) = folder.glob("*.zip")
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    assert built.get("kind", CONFIG, lambda: ("again",)) == (b"again",) == built.get("kind", CONFIG, None)


def test_a_failed_build_leaves_nothing(folder):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built.get("kind", CONFIG, fails)
    assert list(folder.glob("*.zip")) == []


def test_reports_are_read_from_the_store(folder, monkeypatch):
    """As conftest has set up: what inspect asks the compiler is asked once."""
    inspect.build.cache_clear()  # what an earlier test has built is not in this store
    first = inspect.report(CONFIG)
    monkeypatch.setattr(compile, "compile", None)
    inspect.build.cache_clear()
    assert inspect.report(CONFIG) == first


def test_each_state_of_the_sources_has_a_folder_and_old_ones_go(tmp_path, monkeypatch):
    monkeypatch.setattr(built, "_folder", None)
    monkeypatch.setattr(inspect, "build", inspect.build)
    for source in "abcde":
        monkeypatch.setattr(compile, "fingerprint", lambda source=source: source)
        built.keep_in(tmp_path)
        built.get("kind", CONFIG, lambda source=source: (source,))
    assert len(list(tmp_path.iterdir())) == 5
    built.forget_old(tmp_path)
    assert len(list(tmp_path.iterdir())) == built.FOLDERS_KEPT
    assert built.get("kind", CONFIG, None) == (b"e",), "the last one is kept"


def test_a_sample_has_all_cases_and_marks_the_rest():
    cases = sample(3, range(4), "ab")
    assert [case.values for case in cases] == [(i, letter) for i in range(4) for letter in "ab"]
    assert sum(not case.marks for case in cases) == 3
    assert {mark.name for case in cases for mark in case.marks} == {"nightly"}
    assert cases == sample(3, range(4), "ab")
    with pytest.raises(AssertionError, match="8 of 8 cases are no sample"):
        sample(8, range(4), "ab")


def test_those_that_run_every_time_are_chosen():
    cases = where((2).__eq__, range(4))
    assert [case.values for case in cases] == [(0,), (1,), (2,), (3,)]
    assert [not case.marks for case in cases] == [False, False, True, False]
