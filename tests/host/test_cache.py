"""The disk cache where it is another's, read-only, shared, full or not to be trusted; calls run, a warning says so."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from cute_attn import cache as files
from cute_attn import compile, device, plan, tuned

CONFIGS = [plan.config(d, "bf16", "bhsd", False) for d in (64, 96)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")


class Code:
    """What the DSL's compiler gives, without compiling."""

    def export_to_c(self, path, symbol):
        Path(path).write_bytes(b"object code")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The configs that were compiled; no folder is named yet."""
    found = []
    monkeypatch.setattr(compile, "compile", lambda config: found.append(config) or Code())
    monkeypatch.setattr(files, "_named", set())
    return found


@pytest.fixture
def umask():
    """Set for a test, and set back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def kept(config=CONFIGS[0]):
    return compile._kept(compile.cache_file(config), config)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_others_may_read_what_the_umask_allows(cache, umask):
    for mask, want in ((0o022, 0o644), (0o002, 0o644), (0o077, 0o600)):
        umask(mask)
        compile.cache_file(CONFIGS[0]).unlink(missing_ok=True)
        kept()
        assert mode(compile.cache_file(CONFIGS[0])) == want
    assert [p.suffix for p in sorted(cache.iterdir())] == [".lock", ".o"]


def test_a_new_folder_is_its_users_alone_to_write(cache, umask, monkeypatch):
    umask(0o002)
    monkeypatch.setenv("CUTE_ATTN_CACHE_DIR", str(cache / "new"))
    kept()
    assert mode(cache / "new") == 0o755


@pytest.mark.parametrize("bits", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_compiled_again(cache, compiled, bits):
    path = compile.cache_file(CONFIGS[0])
    files.write(path, b"somebody's code")
    path.chmod(bits)
    with pytest.warns(RuntimeWarning, match=f"{cache}: .* may be written by others, its mode is {bits:o}"):
        assert kept() == b"object code"
    assert compiled == CONFIGS[:1] and mode(path) == 0o644 and files.read(path) == b"object code"


def test_whose_files_are_read(cache, monkeypatch):
    """This user's, root's, the package's owner's; a folder's owner's where not anybody could have made the folder."""

    def refused(uid, folder=cache, bits=0o100644):
        return files.refused(SimpleNamespace(st_mode=bits, st_uid=uid), folder / "a.o")

    mine, package = os.geteuid(), Path(files.__file__).stat().st_uid
    stranger = 1 + max(mine, package, cache.stat().st_uid)
    assert [refused(uid) for uid in (mine, 0, package)] == [None] * 3
    assert refused(stranger) == f"a.o was written by user {stranger}"
    assert "is no regular file" in refused(mine, bits=0o040755)
    owned = SimpleNamespace(st_uid=stranger, st_mode=0o040755)
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **how: owned if self == cache else real(self, **how))
    for everywhere, want in ((0o040755, True), (0o041777, False)):
        parents = SimpleNamespace(st_uid=0, st_mode=everywhere)
        monkeypatch.setattr(Path, "stat", lambda self, parents=parents, **how: owned if self == cache else parents)
        assert (stranger in files.trusted(cache)) == want


@needs_root
def test_another_user_reads_what_root_has_written(umask):
    """And of a folder that all may write no stranger's file."""
    with tempfile.TemporaryDirectory() as folder:
        two_users(Path(folder))


def two_users(cache):
    files.write(cache / "roots.o", b"1")
    files.write(cache / "strangers.o", b"2")
    os.chown(cache / "strangers.o", 12345, 12345)
    code = (
        "import encodings.ascii, importlib.util, os, pathlib, sys\n"  # no file of root's home is read later
        f"spec = importlib.util.spec_from_file_location('cache', {files.__file__!r})\n"
        "cache = importlib.util.module_from_spec(spec); spec.loader.exec_module(cache)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"folder = pathlib.Path({str(cache)!r})\n"
        "with cache.alone(folder / 'mine.o'): cache.write(folder / 'mine.o', b'3')\n"
        "print([cache.read(folder / name) for name in ('roots.o', 'strangers.o', 'mine.o')])"
    )
    for bits, mine in ((0o755, None), (0o1777, b"3")):
        cache.chmod(bits)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == str([b"1", None, mine]), done.stderr
        assert done.stderr.count("RuntimeWarning") == 1, done.stderr


def failing(monkeypatch, where, name, number, only=lambda *_: True):
    real = getattr(where, name)

    def fails(*args, **how):
        if only(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **how)

    monkeypatch.setattr(where, name, fails)


def test_a_read_only_folder_is_read_without_a_word(cache, compiled, monkeypatch):
    kept()
    for name in ("replace", "unlink", "mkdir"):
        failing(monkeypatch, os, name, errno.EROFS)
    failing(monkeypatch, os, "open", errno.EROFS, lambda path, flags, *_: flags & os.O_WRONLY or flags & os.O_RDWR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept() == b"object code"
    assert compiled == CONFIGS[:1]
    with pytest.warns(RuntimeWarning, match="cannot be written: Read-only file system.*CUTE_ATTN_CACHE_DIR"):
        assert kept(CONFIGS[1]) == b"object code"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_once(cache, compiled, monkeypatch, number):
    failing(monkeypatch, os, "replace", number)
    with pytest.warns(RuntimeWarning) as said:
        assert [kept(config) for config in CONFIGS] == [b"object code"] * 2
    assert len(said) == 1 and os.strerror(number) in str(said[0].message) and str(cache) in str(said[0].message)
    assert compiled == CONFIGS and {p.suffix for p in cache.iterdir()} <= {".lock"}, "nothing half-written stays"
    assert compile.store(CONFIGS[0]) is None


def test_an_unreadable_file_is_named(cache, monkeypatch):
    failing(monkeypatch, os, "open", errno.EACCES, lambda path, *_: Path(path).parent == cache)
    with pytest.warns(RuntimeWarning, match=r"\.o cannot be read: Permission denied"):
        assert kept() == b"object code"


def test_a_folder_without_locks_is_used(cache, monkeypatch):
    def unsupported(*_):
        raise NotImplementedError

    monkeypatch.setattr(files.filelock.FileLock, "acquire", unsupported)
    assert kept() == b"object code" and files.read(compile.cache_file(CONFIGS[0])) == b"object code"


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("CUTE_ATTN_CACHE_DIR", raising=False)
    monkeypatch.setattr(compile.platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    with pytest.warns(RuntimeWarning, match="this user has no home"):
        assert compile.cache_file(CONFIGS[0]) is None


def test_a_home_that_may_not_be_looked_into_has_no_tables(monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError

    monkeypatch.delenv("CUTE_ATTN_TUNED", raising=False)
    monkeypatch.setattr(os, "stat", forbidden)
    assert device.name() is None and tuned.table.__wrapped__("NVIDIA H200") is tuned.shipped()


def test_the_first_compile_is_announced(cache, caplog):
    with caplog.at_level("INFO", logger="cute_attn"):
        kept()
        kept()
    (said,) = caplog.messages
    assert said.startswith(f"compiled {CONFIGS[0].name} for sm_90a in ") and said.endswith(" s")
