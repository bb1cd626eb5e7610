"""The package's imports run one way: no module imports, by whatever way, one that imports it.

No test imports another, and each lies in its room.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cute_attn"
TESTS = Path(__file__).parents[1]
ROOMS = {"features", "host", "integrations", "interpreter", "kernels", "tools"}
INSIDE = {f"cute_attn.kernels.{p.stem}": p for p in (PACKAGE / "kernels").glob("*.py")}
MODULES = INSIDE | {
    ".".join(("cute_attn", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
    if "kernels" not in p.relative_to(PACKAGE).parts
}


def imported(name: str, path: Path, modules) -> set[str]:
    """The package's modules that a module imports, inside of functions too. A package's own name is all that it has."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cute_attn")):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
            found |= {x if x in modules else source for x in wanted}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {x for x in found if x in modules and x != "cute_attn"}


def circle(modules: dict[str, Path]) -> list[str]:
    """One, if there is any."""
    try:
        TopologicalSorter({name: imported(name, path, modules) for name, path in modules.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_circle():
    assert len(MODULES) > 80 and circle(MODULES) == []


@pytest.mark.parametrize("where", ["from . import b", "def f():\n    from .b import g"])
def test_a_circle_is_found(tmp_path, where):
    (tmp_path / "a.py").write_text(where)
    (tmp_path / "b.py").write_text("from cute_attn.a import f")
    modules = {f"cute_attn.{name}": tmp_path / f"{name}.py" for name in "ab"}
    assert set(circle(modules)) == set(modules)


def imported_tests(path: Path) -> set[str]:
    """What a module imports of modules of tests, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if any(part.startswith("test_") for part in name.split("."))}


def test_no_test_imports_another():
    """What two of them need is in tests/support."""
    assert {path.name: found for path in TESTS.rglob("*.py") if (found := imported_tests(path))} == {}


@pytest.mark.parametrize(
    "how", ["from tests.host import test_a", "def f():\n    from .test_a import g", "import tests.host.test_a as a"]
)
def test_an_import_of_a_test_is_found(tmp_path, how):
    (tmp_path / "test_b.py").write_text(f"import pytest\n{how}")
    assert len(imported_tests(tmp_path / "test_b.py")) == 1


def test_every_test_lies_in_a_room():
    assert {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} == {Path(room) for room in ROOMS}
