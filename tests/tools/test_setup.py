"""`.ci/setup`, with stand-ins for python and nvidia-smi: what it installs, and what becomes of an interrupted one."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

SETUP = Path(__file__).parents[2] / ".ci" / "setup"


def _heeds_ctrl_c():
    """A shell in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


PYTORCH = "https://download.pytorch.org/whl/cpu"

# Of venv, pip and the checks as much as the script asks of them. What is installed is a file of $home/packages. STOP
# names the step at whose half SIGNAL (9, 15; full: a full disk) comes. OFFERS: who has torch's CPU build.
PYTHON = r"""#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
home=$(dirname "$here") words="$*"
mkdir -p "$home/packages"
stop() {
  [[ ${STOP:-} == "$1" ]] || return 0
  [[ $SIGNAL == full ]] && { echo "No space left on device" >&2; exit 1; }
  kill -"$SIGNAL" 0
  sleep 60
}
install() { touch "$home/packages/half-$1"; stop "$1"; mv "$home/packages/half-$1" "$home/packages/$1"; }
has() { [[ -e $home/packages/$1 ]]; }
case $words in
  "-m venv "*)
    stop venv
    mkdir -p "$3/bin" && touch "$3/half-venv" && cp "$0" "$3/bin/python"
    stop pip
    ln -sf python "$3/bin/python3"
    echo "PATH=$PWD/$3/bin:\$PATH" > "$3/bin/activate"
    mkdir -p "$3/packages" && touch "$3/packages/pip" && rm "$3/half-venv" ;;
  "-m pip --version") has pip ;;
  "-m ensurepip") touch "$home/packages/pip" ;;
  "-m pip install "*)
    has pip || exit 1
    echo "pip ${words#-m pip install }" >> "$LOG"
    case $words in
      *torch==*+cpu*--index-url*) [[ $OFFERS == *pytorch* ]] && install torch+cpu ;;
      *torch==*+cpu*) [[ $OFFERS == *local* ]] && install torch+cpu ;;
      *torch*) has torch+cpu || install torch ;;
      *-e*) install rest ;;
    esac ;;
  "- "*) cat > /dev/null; { has torch || has torch+cpu; } && has rest && [[ -z $(ls "$home"/packages/half-* 2>&-) ]] ;;
  *is_available*) [[ -n ${SEES_GPU:-} ]] && echo "$home/torch" ;;
  *getsitepackages*) echo "$home/packages" ;;
  *version.cuda*) [[ -n ${SEES_GPU:-} ]] && echo ",cu13" || echo "" ;;
  *"import torch"*) has torch || has torch+cpu || has half-torch || has half-torch+cpu ;;
  *) echo "python $words" >> "$LOG"; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the script alone, and a machine of stand-ins; `run` gives the process, `log` pip's arguments."""
    here, log = tmp_path / "checkout", tmp_path / "log"
    (here / ".ci").mkdir(parents=True)
    shutil.copy(SETUP, here / ".ci")
    machine = tmp_path / "machine" / "bin"
    machine.mkdir(parents=True)
    program(machine / "python3", PYTHON)
    program(machine / "nvidia-smi", '#!/bin/bash\n[[ $* == -L && -n ${GPU:-} ]] && echo "$GPU" || exit 9\n')

    def run(**env):
        words = 'set -euo pipefail; source .ci/setup test; echo "$(command -v python3) ${PYTHONPATH%%:*}"'
        env = {"PATH": f"{machine}:/usr/bin:/bin", "LOG": str(log), "OFFERS": "local", **env}
        command = ["bash", "-c", words]
        how = dict(capture_output=True, text=True, start_new_session=True, preexec_fn=_heeds_ctrl_c)
        return subprocess.run(command, cwd=here, env=env, **how)

    venv = here / ".venv"
    read = lambda: log.read_text().splitlines() if log.exists() else []  # noqa: E731
    return SimpleNamespace(run=run, log=read, here=here, machine=machine, venv=venv, logfile=log)


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def packages(checkout):
    return {path.name for path in (checkout.venv / "packages").iterdir()}


def is_whole(checkout, done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(checkout.venv / "bin" / "python3"), str(checkout.here)]
    assert not [name for name in packages(checkout) if name.startswith("half")]
    assert not (checkout.venv / "half-venv").exists() and not (checkout.venv / "setup_is_running").exists()


def test_without_a_gpu_the_cpu_build_from_where_pip_looks(checkout):
    done = checkout.run()
    is_whole(checkout, done)
    assert packages(checkout) == {"pip", "torch+cpu", "rest"} and done.stderr == ""
    assert checkout.log() == ["pip -q --no-deps torch==2.13.0+cpu", "pip -q torch==2.13.0", "pip -q -e .[test]"]


def test_else_from_pytorchs_index(checkout):
    done = checkout.run(OFFERS="pytorch")
    is_whole(checkout, done)
    assert packages(checkout) == {"pip", "torch+cpu", "rest"} and done.stderr == ""
    asked = f"pip -q --no-deps torch==2.13.0+cpu --index-url {PYTORCH} --retries 1 --timeout 10"
    assert checkout.log()[1:3] == [asked, "pip -q torch==2.13.0"]


def test_where_nobody_has_it_one_line_says_so(checkout):
    done = checkout.run(OFFERS="")
    is_whole(checkout, done)
    assert packages(checkout) == {"pip", "torch", "rest"}
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup: no CPU build of torch 2.13.0: ") and PYTORCH in line
    assert "taking torch==2.13.0 as pip finds it, with up to 3 GB of CUDA libraries" in line


def test_with_a_gpu_any_torch_that_serves(checkout):
    is_whole(checkout, checkout.run(GPU="GPU 0: NVIDIA H200 (UUID: GPU-5eed)"))
    assert checkout.log() == ["pip -q torch>=2.8", "pip -q -e .[test]"]


@pytest.mark.parametrize("says", ["No devices found.", "NVIDIA-SMI has failed because it couldn't communicate"])
def test_a_driver_without_a_gpu_is_no_gpu(checkout, says):
    checkout.run(GPU=says)
    assert checkout.log()[0] == "pip -q --no-deps torch==2.13.0+cpu"


def test_a_torch_that_sees_a_gpu_is_kept(checkout):
    (checkout.machine.parent / "packages").mkdir()
    (checkout.machine.parent / "packages" / "torch").touch()
    done = checkout.run(SEES_GPU="1")
    assert checkout.log() == ["pip -q -e .[test,cu13]"]
    assert (checkout.venv / "packages" / "torch_at_hand.pth").read_text() == f"{checkout.machine.parent}/torch\n"
    assert done.returncode == 1, "the stand-in's check does not follow the .pth file: nothing is called whole"
    assert (checkout.venv / "setup_is_running").exists()


def test_a_python_with_everything_serves_as_it_is(checkout):
    everything = checkout.machine.parent / "packages"
    everything.mkdir()
    for name in ("torch", "rest"):
        (everything / name).touch()
    done = checkout.run()
    assert done.stdout.split() == [str(checkout.machine / "python3"), str(checkout.here)]
    assert not checkout.venv.exists() and checkout.log() == []


def test_a_whole_one_is_used_again(checkout):
    checkout.run()
    checkout.logfile.unlink()
    is_whole(checkout, checkout.run())
    assert checkout.log() == []


STEPS = ("venv", "pip", "torch+cpu", "rest")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "full"], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_one_is_made_anew(checkout, step, how):
    stopped = checkout.run(STOP=step, SIGNAL=how if how == "full" else str(int(how)))
    assert stopped.returncode != 0 and not stopped.stdout
    assert (checkout.venv / "setup_is_running").exists()
    debris = checkout.venv / "debris"
    debris.touch()
    done = checkout.run()
    is_whole(checkout, done)
    assert not debris.exists() and packages(checkout) == {"pip", "torch+cpu", "rest"}
    assert done.stderr == "setup: an interrupted set-up left .venv half-made; making it anew\n"
    assert not (checkout.here / ".venv.half").exists()


def test_interrupted_twice(checkout):
    checkout.run(STOP="rest", SIGNAL="9")
    checkout.run(STOP="pip", SIGNAL="9")
    is_whole(checkout, checkout.run())


def test_a_half_made_one_is_not_taken_for_its_python_either(checkout):
    """Activated, and with all that is asked for: an interruption came before the last word."""
    checkout.run()
    (checkout.venv / "setup_is_running").touch()
    (checkout.venv / "debris").touch()
    is_whole(checkout, checkout.run(PATH=f"{checkout.venv}/bin:{checkout.machine}:/usr/bin:/bin"))
    assert not (checkout.venv / "debris").exists()


def test_an_interruption_while_the_half_made_one_is_removed(checkout):
    checkout.run(STOP="rest", SIGNAL="9")
    os.rename(checkout.venv, checkout.here / ".venv.half")
    (checkout.here / ".venv.half" / "setup_is_running").unlink()
    is_whole(checkout, checkout.run())
    assert not (checkout.here / ".venv.half").exists()


def own_venv(checkout, *names):
    """A .venv that someone else made."""
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.machine / "python3", checkout.venv / "bin" / "python")
    (checkout.venv / "bin" / "python3").symlink_to("python")
    (checkout.venv / "bin" / "activate").write_text(f"PATH={checkout.venv}/bin:$PATH\n")
    (checkout.venv / "packages").mkdir()
    for name in (*names, "of_someone_else"):
        (checkout.venv / "packages" / name).touch()


@pytest.mark.parametrize("names", [("pip",), ()], ids=["with pip", "without pip"])
def test_someones_own_gets_the_rest_and_is_never_removed(checkout, names):
    own_venv(checkout, *names)
    assert checkout.run(STOP="rest", SIGNAL="9").returncode != 0
    assert "of_someone_else" in packages(checkout)
    is_whole(checkout, checkout.run())
    assert packages(checkout) == {"pip", "torch+cpu", "rest", "of_someone_else"}


def test_two_at_once(checkout):
    """The second waits for the first, and installs nothing."""
    program(checkout.machine / "python3", PYTHON.replace("install() {", "install() { sleep 0.2;"))
    words = "set -euo pipefail; source .ci/setup test; command -v python3"
    env = {"PATH": f"{checkout.machine}:/usr/bin:/bin", "LOG": str(checkout.logfile), "OFFERS": "local"}
    both = [
        subprocess.Popen(["bash", "-c", words], cwd=checkout.here, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [f"{checkout.venv}/bin/python3\n"] * 2
    assert len(checkout.log()) == 3
