"""README and docs/: links resolve, names and options exist, numbers are the records', and the code runs."""

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import cute_attn
from cute_attn.tools import bench, tune, validate
from cute_attn.tools.inspect import __main__ as inspect_cli

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *DOCS]
API = (ROOT / "docs" / "api.md").read_text()
COMMANDS = dict(bench=bench, inspect=inspect_cli, tune=tune, validate=validate)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
docs = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)


def blocks(page):
    """(what follows ```python, the code) of each block."""
    return re.findall(r"^```python *(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    """Relative ones that lead to no file, or to no heading of it."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def missing_names(text):
    """Dotted names under cute_attn, and operators, that do not exist."""
    missing = []
    for name in set(re.findall(r"\bcute_attn(?:\.\w+)+", text)):
        parts = name.split(".")
        for i in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                continue
            for part in parts[i:]:
                found = getattr(found, part, None)
            if found is None:
                missing.append(name)
            break
    return missing


def test_there_is_a_page_for_each_thing():
    wanted = {"adding_a_feature.md", "api.md", "features.md", "how_it_works.md", "numerics.md"}
    assert wanted <= {page.name for page in DOCS}
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in readme] == []


@pages
def test_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "x.md").write_text(
        "# One thing\n[a](x.md#one-thing) [b](y.md) [c](#other) [d](https://example.com/y.md)\n"
    )
    assert broken_links(tmp_path / "x.md") == ["y.md", "#other"]


@pages
def test_code_compiles(page):
    for _, code in blocks(page):
        ast.parse(code)


def undefined(code):
    """Names that a block of code reads, and neither it nor Python defines."""
    nodes = list(ast.walk(ast.parse(code)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names]
    made |= {name.asname or name.name.partition(".")[0] for name in imports}
    return sorted(read - made - set(dir(builtins)))


def test_every_block_of_the_readme_imports_what_it_uses():
    found = blocks(ROOT / "README.md")
    assert len(found) >= 4 and [undefined(code) for _, code in found] == [[]] * len(found)


def test_a_missing_import_is_seen():
    assert undefined("import x.y\nfrom a import b as c\nfor i in c(x, d): e = f'{i} {g}'") == ["d", "g"]


def test_the_first_block_of_the_readme_says_what_it_needs_and_runs_without():
    before, _, rest = (ROOT / "README.md").read_text().partition("```python\n")
    assert before.splitlines()[-2].startswith("This needs a Hopper GPU.")
    code = rest.partition("```")[0]
    assert 'device="cuda"' in code and "(16, 16, 2048, 64," in code
    here = {}
    exec(code.replace("cuda", "cpu").replace("(16, 16, 2048, 64,", "(1, 16, 32, 64,"), here)
    assert here["o"].shape == (1, 16, 32, 64) and not here["o"].isnan().any()


@pytest.mark.gpu
def test_the_first_block_of_the_readme_runs_on_the_gpu(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_CACHE", "0")
    here = {}
    exec(blocks(ROOT / "README.md")[0][1], here)
    assert here["o"].shape == (16, 16, 2048, 64) and not here["o"].isnan().any()


@docs
def test_code_runs(page, monkeypatch):
    """All blocks of a page one after the other; those for a GPU in the test below."""
    monkeypatch.setenv("CUTE_ATTN_CACHE", "0")
    run(page, monkeypatch, gpu=False)


@pytest.mark.gpu
@docs
def test_code_runs_on_the_gpu(page, monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_CACHE", "0")
    run(page, monkeypatch, gpu=True)


def run(page, monkeypatch, gpu):
    torch.manual_seed(0)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("docs_page", None))
    monkeypatch.setitem(importlib.import_module("sys").modules, "docs_page", module)  # dataclasses look it up
    for word, code in blocks(page) if page.name != "adding_a_feature.md" else ():  # test_adding_a_feature does
        assert word in ("", "gpu")
        if gpu or word != "gpu":
            exec(compile(code, page.name, "exec"), module.__dict__)


@pages
def test_names_exist(page):
    text = page.read_text()
    assert missing_names(re.sub(r"torch\.ops\.cute_attn\.\w+", "", text)) == []
    for name in re.findall(r"torch\.ops\.cute_attn\.(\w+)", text):
        assert hasattr(torch.ops.cute_attn, name)


def test_a_missing_name_is_seen():
    assert missing_names("`cute_attn.flash_fwd`, `cute_attn.inspect.sass`, `cute_attn.nothing`") == [
        "cute_attn.nothing"
    ]


MADE_BY_USERS = [name for name in cute_attn.__all__ if callable(getattr(cute_attn, name)) and name != "DecodePlan"]


@pytest.mark.parametrize("name", MADE_BY_USERS)
def test_every_argument_of_every_function_is_documented(name):
    arguments = inspect.signature(getattr(cute_attn, name)).parameters
    section = API.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert [x for x in arguments if not re.search(rf"`{x}`|\b{x}=", section)] == []
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.MULTILINE)
    assert {x for row in table for x in re.findall(r"\w+", row)} <= set(arguments)
    if name == "flash_fwd":
        assert {x for row in table for x in re.findall(r"\w+", row)} == set(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_exist(command, capsys):
    section = API.partition(f"\n### python -m cute_attn.{command}\n")[2].partition("\n##")[0]
    with pytest.raises(SystemExit):
        COMMANDS[command].main(["--help"])
    known = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    assert section and set(re.findall(r"--\w[\w-]*", section)) <= known
    assert command != "validate" or known - {"--help"} <= set(re.findall(r"--\w[\w-]*", section))


def test_the_gates_of_validate_are_the_tables():
    for gate in validate.GATES:
        assert f"| {gate.name} |" in API
    assert f"{len(validate.Lab({}, None).edges)} calls" in API


def test_every_environment_variable_is_documented():
    sources = "".join(path.read_text() for path in (ROOT / "cute_attn").rglob("*.py"))
    named = r"CUTE_ATTN_\w+"
    table = API.partition("\n## Environment variables\n")[2]
    assert set(re.findall(named, sources)) == set(re.findall(named, table))


def test_the_ladder_is_the_record(readme):
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    content = readme.ablation_text(json.loads((readme.RESULTS / "ladder.json").read_text()))
    assert text.partition(readme.BEGIN_ABLATION)[2].partition(readme.END)[0].strip() == content.replace("](", "](../")


def test_the_readmes_numbers_are_the_records(readme):
    text = (ROOT / "README.md").read_text()
    content = readme.text(json.loads((readme.RESULTS / "sweep_bf16.json").read_text()))
    assert text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip() == content
    for name in ("window", "varlen", "modifiers", "lists"):
        assert readme.recorded(name), f"no record {name}.json"


def test_other_pages_have_no_times():
    """Measured numbers are in the records; README and the ladder quote them."""
    for page in DOCS:
        text = page.read_text().partition("<!-- benchmarks/readme.py")[0]
        assert re.findall(r"\d[\d,.]* ?(?:TFLOPS|us\b|GB/s)", text) == []
