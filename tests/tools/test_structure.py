"""The package's imports run one way: no module imports, by whatever way, one that imports it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cute_attn"
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
