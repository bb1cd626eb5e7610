"""docs/adding_a_feature.md, done in a copy of the repository: six files, and the new test passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding_a_feature.md").read_text()
FOLDERS = "cute_attn", "kernels", "tests", "docs"
LABELLED = re.compile(r"^(?:In )?`(\S+)`:\n\n((?:```\w+\n.*?^```\n+)+)", re.MULTILINE | re.DOTALL)


def edits() -> dict[str, list[tuple[str, str]]]:
    """Of each file, ("diff" or "python", text)."""
    return {path: re.findall(r"```(\w+)\n(.*?)^```$", text, re.M | re.S) for path, text in LABELLED.findall(GUIDE)}


def changed(text: str, diff: str) -> str:
    """A text after one hunk, whose old lines are in it once."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert text.count(old) == 1, f"the guide's lines are not in the file once:\n{old}"
    return text.replace(old, new)


def copied(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def test_six_files_make_a_feature(tmp_path):
    copied(tmp_path)
    done = edits()
    assert len(done) == 6 and all(f"`{path}`" in GUIDE.partition("## 1.")[0] for path in done), "the guide's own table"
    for path, blocks in done.items():
        file = tmp_path / path
        for kind, text in blocks:
            assert (kind == "diff") == file.exists(), path
            file.write_text(changed(file.read_text(), text) if kind == "diff" else text)
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), CUTE_ATTN_CACHE="0")
    tests = ["tests/features/test_prefix.py", "tests/host/test_features.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and re.search(r"\d+ passed", ran.stdout), ran.stdout[-3000:] + ran.stderr[-1000:]
