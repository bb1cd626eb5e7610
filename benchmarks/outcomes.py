"""A pytest plugin, `-p outcomes`: each test's outcome is on disk when it ends, whatever becomes of the run."""

import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="add a line of JSON to this file for each test that ends")
    parser.addoption("--but", type=Path, help="leave out the tests that such a file has")


def pytest_configure(config):
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Log(path))


def pytest_collection_modifyitems(config, items):
    known = read(config.getoption("--but"))
    gone = [item for item in items if item.nodeid in known]
    items[:] = [item for item in items if item.nodeid not in known]
    config.hook.pytest_deselected(items=gone)


class Log:
    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line = dict(test=report.nodeid, outcome=report.outcome, properties=dict(report.user_properties))
        if report.outcome != "passed":
            line["why"] = why(report)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def why(report) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext[-4000:]


def read(path: Path | None) -> dict[str, dict]:
    """Test -> its last line, or that of its failure."""
    found: dict[str, dict] = {}
    for text in path.read_text().splitlines() if path is not None and path.exists() else ():
        line = json.loads(text)
        before = found.get(line["test"])
        if before is None or before["outcome"] != "failed":
            found[line["test"]] = line
    return found
