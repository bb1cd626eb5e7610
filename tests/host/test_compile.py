"""Compiling without a GPU: the memory and the disk cache, many threads, many processes, damaged files."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cute_attn import cache as cache_files
from cute_attn import compile, plan, warmup
from tests.support.nightly import sample

CONFIG = plan.config(64, "bf16", "bhsd", False)


def files(cache):
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def test_second_call_is_a_look_up(cache, monkeypatch):
    first = compile.get(CONFIG)
    assert files(cache) == [compile.cache_file(CONFIG).name]
    monkeypatch.setattr(compile, "_load_or_compile", None)
    assert compile.get(CONFIG) is first


COUNTED = """
from cute_attn import compile, plan
compiled, original = [], compile.compile
compile.compile = lambda config: compiled.append(config) or original(config)
compile.get(plan.config(64, "bf16", "bhsd", False))
print(len(compiled))
"""


def counted() -> subprocess.Popen:
    """Another process that asks for the kernel and says how often it was compiled."""
    return subprocess.Popen([sys.executable, "-c", COUNTED], stdout=subprocess.PIPE, text=True)


def test_what_is_on_disk_is_loaded(cache, monkeypatch, whole):
    """By the next process: this one has nothing in memory."""
    compile.cache_file(CONFIG).write_bytes(whole)
    monkeypatch.setattr(compile, "compile", None)
    assert callable(compile.get(CONFIG))
    assert files(cache) == [compile.cache_file(CONFIG).name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of the kernel's file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_ATTN_CACHE_DIR", str(tmp_path_factory.mktemp("whole")))
        return compile.store(CONFIG).read_bytes()


@pytest.fixture
def at_once(whole, monkeypatch):
    """Every kernel is compiled to that file's code, in no time."""
    one = SimpleNamespace(export_to_c=lambda file, _: Path(file).write_bytes(whole[:-32]))
    monkeypatch.setattr(compile, "compile", lambda config: one)


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "flipped", "foreign object"])
@pytest.mark.usefixtures("at_once")
def test_a_damaged_file_is_compiled_again(cache, damage, whole):
    path = compile.cache_file(CONFIG)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    other = Path(os.__file__).read_bytes()
    bad = {
        "empty": b"",
        "cut": whole[:-100],
        "foreign": other,
        "flipped": bytes(flipped),
        "foreign object": whole[:-32],
    }
    path.write_bytes(bad[damage])
    assert callable(compile.get(CONFIG))
    assert path.read_bytes() == whole


def test_the_key_follows_sources_versions_and_config(cache, monkeypatch, tmp_path):
    files = {compile.cache_file(c) for c in plan.prebuilt()}
    assert len(files) == len(plan.prebuilt())
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for source in compile.KERNELS.glob("*.py"):
        (kernels / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(compile, "KERNELS", kernels)
    compile.fingerprint.cache_clear()
    same = compile.fingerprint()
    (kernels / "mask.py").write_text((kernels / "mask.py").read_text() + "\n")
    compile.fingerprint.cache_clear()
    assert compile.fingerprint() != same
    monkeypatch.setattr(compile.cutlass, "__version__", "0.0.0")
    now = compile.fingerprint()
    compile.fingerprint.cache_clear()
    assert compile.fingerprint() != now
    monkeypatch.undo()
    compile.fingerprint.cache_clear()
    assert compile.fingerprint() == same


def test_threads_compile_once(cache, monkeypatch):
    compiled = []
    original = compile.compile
    monkeypatch.setattr(compile, "compile", lambda config: compiled.append(config) or original(config))
    configs = [CONFIG, plan.config(64, "fp16", "bhsd", False)]
    results = {c: set() for c in configs}
    threads = [
        threading.Thread(target=lambda c=c: results[c].add(id(compile.get(c)))) for c in configs for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, compiled)) == sorted(map(str, configs))
    assert all(len(found) == 1 for found in results.values())


def test_processes_share_the_cache(cache):
    """Of two that ask at once, one compiles, and the other loads what that has stored."""
    running = [counted() for _ in range(2)]
    assert sorted(process.communicate()[0] for process in running) == ["0\n", "1\n"]
    assert files(cache) == [compile.cache_file(CONFIG).name]
    assert cache_files.read(compile.cache_file(CONFIG)) is not None


def test_a_failed_write_leaves_nothing(cache, monkeypatch):
    def fails(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(compile, "compile", fails)
    with pytest.raises(KeyboardInterrupt):
        compile.get(CONFIG)
    assert files(cache) == []


@pytest.mark.usefixtures("at_once")
def test_cache_can_be_off_or_impossible(cache, monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_CACHE", "0")
    assert compile.cache_dir() is None
    assert callable(compile.get(CONFIG))
    assert files(cache) == []
    (cache / "a file").touch()
    monkeypatch.setenv("CUTE_ATTN_CACHE", "1")
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(cache / "a file"))
    monkeypatch.setattr(compile, "_compiled", {})
    assert callable(compile.get(CONFIG))


def test_default_directory(monkeypatch):
    monkeypatch.delenv("CUTE_ATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("CUTE_ATTN_CACHE", raising=False)
    assert compile.cache_dir().name == "cute_attn"


@pytest.mark.usefixtures("at_once")
def test_warmup(cache):
    ready = warmup((64, 72), dtype="bf16", layout="bhsd", causal=False)
    assert [(c.head_dim, c.scheduler.name) for c in ready[:2]] == [(64, "static"), (96, "static")]
    sizes = [(h, s) for h in (1, 4, 16, 32, 256) for s in (1, 64, 512, 600, 1024, 4096)]
    reached = {plan.plan(plan.Problem(1, h, h, s, 8 * s, d)) for h, s in sizes for d in (64, 72)}
    assert reached == set(ready), "no size compiles anything more"
    assert files(cache) == sorted(compile.cache_file(c).name for c in ready)


def test_cold_compile_takes_three_seconds_at_most(cache):
    started = time.process_time()
    compile.get(plan.config(128, "bf16", "bhsd", True))
    assert time.process_time() - started < 6  # 3 s on the machines that have a Hopper GPU; this one may be slow


OTHER = [config for config in plan.prebuilt() if config.layout != "bhsd"]  # test_sass.py compiles those of "bhsd"


@pytest.mark.machine_code
@pytest.mark.parametrize("config", sample(3, OTHER), ids=lambda c: f"{c.name}_{c.layout}_{c.scheduler.__name__}")
def test_every_prebuilt_kernel_of_the_other_layout_compiles(config):
    assert callable(compile.get(config))
