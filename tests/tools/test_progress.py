"""How far long work has come: a bar on a terminal, a line now and then elsewhere, nothing in stdout."""

import io
import sys

import pytest

from cute_attn.tools.benchmark import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Each step of the work takes `seconds`."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        return self.now


def work(clock, total):
    with progress.steps("cells", total, clock) as step:
        for _ in range(total):
            clock.now += clock.seconds
            step()


@pytest.mark.parametrize("force", ["", "1"])
def test_in_a_pipe_a_line_every_ten_seconds(force, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", force)  # as workflows set it: colours, but no terminal
    work(Clock(4.0), 8)
    out, err = capsys.readouterr()
    assert err.splitlines() == ["cells: 3 of 8 after 12 s", "cells: 6 of 8 after 24 s"]
    assert not out and "\r" not in err and "\x1b" not in err


def test_short_work_says_nothing_in_a_pipe(capsys):
    work(Clock(1.0), 9)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    work(Clock(4.0), 8)
    assert "cells" in terminal.getvalue() and "\x1b[" in terminal.getvalue()
    assert "after" not in terminal.getvalue() and capsys.readouterr().out == ""


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    work(Clock(20.0), 1)
    assert terminal.getvalue() == "cells: 1 of 1 after 20 s\n"


def test_work_that_ends_early_tells_what_is_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    done = []
    for x in progress.each([1, 2, 3], "numbers"):
        done.append(x)
        if x == 2:
            break
    assert done == [1, 2] and capsys.readouterr().err.splitlines() == ["numbers: 1 of 3 after 0 s"]
