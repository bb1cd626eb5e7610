"""Wheel and sdist: what is in them, and that the wheel works outside the checkout, beside another package `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = (".ci", ".github", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "benchmarks", "cute_attn", "kernels")
TREE += ("docs", "pyproject.toml", "tests")
SMOKE = """
import importlib.metadata, os, pathlib, sys
import torch, cute_attn
assert pathlib.Path(cute_attn.__file__).is_relative_to(sys.prefix), cute_attn.__file__
assert importlib.metadata.version("cute_attn") == cute_attn.__version__
q, k, v = torch.randn(3, 1, 2, 5, 16, dtype=torch.bfloat16)
o, lse = cute_attn.flash_fwd(q, k, v, causal=True, return_lse=True)
want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
torch.testing.assert_close(o.float(), want, atol=0.02, rtol=0.02)
config = cute_attn.plan.shipped()[0]
assert callable(cute_attn.compile.get(config))  # for sm_90a
assert cute_attn.compile.cache_file(config).stat().st_size > 10_000
print("smoke passed")
"""
HELP = """
import contextlib, runpy, sys
sys.argv[1:] = ["--help"]
for module in ("bench", "inspect", "tune", "validate"):
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"cute_attn.{module}", run_name="__main__", alter_sys=True)
"""
BESIDE = """
import importlib.metadata, importlib.util, pathlib
{imports}
site = pathlib.Path(cute_attn.__file__).parents[1]
assert pathlib.Path(ours.__file__) == site / "cute_attn" / "kernels" / "config.py"
assert pathlib.Path(importlib.util.find_spec("kernels").origin) == site / "kernels" / "__init__.py"
files = [set(map(str, importlib.metadata.files(name))) for name in ("cute_attn", "kernels")]
assert not files[0] & files[1]
print("side by side")
"""


def run(*command, cwd, **env):
    """The command's output; a failure shows it."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env or None, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(tree, out, *which):
    """With the hatchling at hand: nothing is downloaded."""
    run(sys.executable, "-m", "build", "--no-isolation", *which, "--outdir", out, tree, cwd=out.parent)
    return out


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def environment(folder, *wheels):
    """A fresh environment with these wheels only, that also sees this one's packages, but not its editable installs."""
    venv.create(folder, with_pip=False, symlinks=True)
    install(folder, "--no-index", *wheels)
    site = next(folder.glob("lib/python*/site-packages"))
    seen = [path for path in sys.path if {"site-packages", "dist-packages"} & set(Path(path).parts)]
    (site / "at_hand.pth").write_text("\n".join(seen) + "\n")
    return folder / "bin" / "python"


def install(folder, *arguments):
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--no-deps")
    run(*pip, "--ignore-installed", *arguments, cwd=folder)


def smoke(python, cwd, cache):
    """Isolated (-I): neither the checkout nor PYTHONPATH is on the path."""
    env = {"CUTE_ATTN_CACHE_DIR": str(cache), "HOME": str(cwd), "PATH": "/usr/bin:/bin"}
    assert run(python, "-I", "-c", SMOKE, cwd=cwd, **env).endswith("smoke passed\n")


def stand_in(folder):
    """A wheel whose import name is `kernels`."""
    info = "kernels-99.dist-info"
    parts = {
        "kernels/__init__.py": "get_kernel = 'not ours'\n",
        "kernels/config.py": "raise ImportError('not ours')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    parts[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*parts, f"{info}/RECORD"])
    wheel = folder / "kernels-99-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the repository holds."""
    folder = tmp_path_factory.mktemp("dist") / "tree"
    folder.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(tree):
    """A folder with the sdist and the wheel, each built from the tree."""
    return build(tree, tree.parent / "built", "--sdist", "--wheel")


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Of an environment with the wheel."""
    return environment(tmp_path_factory.mktemp("wheel") / "env", wheel)


@pytest.fixture(scope="module")
def unpacked(dist):
    """The sdist's own tree."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(dist.parent / "unpacked", filter="data")
    return next((dist.parent / "unpacked").iterdir())


def test_wheel_holds_the_package_and_nothing_else(wheel, tree):
    inside = contents(wheel)
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"cute_attn"}
    assert "cute_attn/py.typed" in inside
    assert inside["cute_attn/CHANGELOG.md"] == (tree / "CHANGELOG.md").read_bytes()
    assert inside["cute_attn/gates.json"] == (tree / "benchmarks" / "gates.json").read_bytes()
    (licence,) = (text for name, text in inside.items() if name.endswith("/licenses/LICENSE"))
    assert licence == (tree / "LICENSE").read_bytes()
    for path in (tree / "cute_attn").rglob("*.*"):
        if path.is_file():
            assert inside[str(path.relative_to(tree))] == path.read_bytes()
    for name, source in files(tree / "kernels", "*.py").items():
        assert inside[f"cute_attn/kernels/{name}"] == source
    assert not [info for info in zipfile.ZipFile(wheel).infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]


def test_wheel_metadata(wheel):
    inside = contents(wheel)
    metadata = next(text for name, text in inside.items() if name.endswith("/METADATA")).decode()
    version = re.search(r'__version__ = "(.*)"', inside["cute_attn/__init__.py"].decode())[1]
    assert f"## [{version}]" in inside["cute_attn/CHANGELOG.md"].decode()
    for line in (
        f"Version: {version}",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: <3.14,>=3.10",
    ):
        assert f"\n{line}\n" in metadata


def test_sdist_holds_what_its_own_tests_need(unpacked, tree):
    assert files(unpacked / "kernels") == files(unpacked / "cute_attn" / "kernels") == files(tree / "kernels")
    for name in ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"):
        assert (unpacked / name).read_bytes() == (tree / name).read_bytes()
    rooms = [f"tests/{path.name}" for path in (tree / "tests").iterdir() if path.is_dir()]
    for folder in (".ci", ".github/workflows", "benchmarks", "benchmarks/results", "docs", "tests", *rooms):
        assert files(unpacked / folder) == files(tree / folder)
    for script in (".ci/run", "benchmarks/gpu_ci", "benchmarks/run", "tests/run"):
        assert os.access(unpacked / script, os.X_OK)


@pytest.mark.slow
def test_sdist_runs_its_own_tests(unpacked):
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*command, "tests/tools/test_package.py", "tests/kernels/test_mask.py", "-k", "not type_checkers", cwd=unpacked)


def test_wheel_from_the_sdist_is_the_wheel_from_the_tree(unpacked, wheel):
    again = next(build(unpacked, unpacked.parent / "again", "--wheel").glob("*.whl"))
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(python, tmp_path):
    smoke(python, tmp_path, tmp_path / "cache")
    options = run(python, "-I", "-c", HELP, cwd=tmp_path).split("usage: ")[1:]
    for told, option in zip(options, ("--sweep", "--sass", "--help", "--gates"), strict=True):
        assert option in told


@pytest.mark.slow
def test_wheel_works_beside_a_package_named_kernels(python, tmp_path):
    install(python.parents[1], "--no-index", stand_in(tmp_path))
    ours, theirs = "import cute_attn, cute_attn.kernels.config as ours", "import kernels; kernels.get_kernel"
    for imports in (f"{ours}\n{theirs}", f"{theirs}\n{ours}"):
        assert run(python, "-I", "-c", BESIDE.format(imports=imports), cwd=tmp_path) == "side by side\n"


@pytest.mark.nightly
def test_wheel_works_beside_hugging_face_kernels(wheel, tmp_path):
    """The real package, with the dependencies that are at hand: both are found, and ours works."""
    python = environment(tmp_path / "env", wheel)
    try:
        install(tmp_path / "env", "--retries", "0", "--timeout", "20", "--only-binary", ":all:", "kernels")
    except AssertionError as error:
        pytest.skip(f"kernels could not be downloaded: {str(error).strip().splitlines()[-1]}")
    smoke(python, tmp_path, tmp_path / "cache")
    ours, theirs = "import cute_attn, cute_attn.kernels.config as ours", "import kernels; kernels.get_kernel"
    has = "import importlib.util as u; print(bool(u.find_spec('huggingface_hub') and u.find_spec('tomlkit')))"
    orders = (f"{ours}\n{theirs}", f"{theirs}\n{ours}") if run(python, "-c", has, cwd=tmp_path) == "True\n" else (ours,)
    for imports in orders:
        assert run(python, "-I", "-c", BESIDE.format(imports=imports), cwd=tmp_path) == "side by side\n"
