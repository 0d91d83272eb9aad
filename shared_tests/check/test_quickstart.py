"""scripts/quickstart and scripts/test before anything is installed, on machines that are put on. Budget: 10 s.

What the scripts ask of a machine (uname, sysctl, python3.*, uv) is a fake on a PATH that has nothing else of these; the
rest of PATH are the tools that every system has.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "sh", "cat", "dirname", "basename", "cksum", "mkdir", "sed", "rm", "mktemp")
MAKES = """
case "$*" in
*"-m venv "*|*"venv --seed --allow-existing --python 3.12 "*)
    for folder in "$@"; do :; done
    mkdir -p "$folder/bin"
    sed "s/^# fake/# installed/" "$TREE/engine" >"$folder/bin/python"
    chmod +x "$folder/bin/python" ;;
esac
"""
"""What a fake Python and a fake uv do when they are asked for a virtual environment."""
ENGINE = """#!/bin/sh
if [ "$*" = "-m pip --version" ]; then exit; fi
echo "$*" >>"$TREE/calls"
case "$*" in
*"core.cli train"*)
    mkdir -p runs/quickstart
    cat >runs/quickstart/report.md <<'END'
# a report
**bits per byte 1.9000** (exact)
| artifact | 700,000 bytes |
| other | no |
| training | 300 steps |
END
;;
esac
"""
"""The Python of the new environment: it notes what it is asked for, and writes a report when it is to train."""


class Machine:
    """A checkout with only what the scripts read, and a PATH."""

    def __init__(self, folder: Path, system: str = "Linux", processor: str = "x86_64", translated: bool = False):
        self.tree, self.path = folder / "tree", folder / "bin"
        (self.tree / "scripts").mkdir(parents=True)
        self.path.mkdir()
        for name in ("quickstart", "test", "environment.sh"):
            shutil.copy(ROOT / "scripts" / name, self.tree / "scripts" / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.tree / name)
        (self.tree / "engine").write_text(ENGINE)
        for tool in (*TOOLS, "chmod"):
            os.symlink(shutil.which(tool) or tool, self.path / tool)
        self.fake("uname", f'if [ "$1" = -s ]; then echo {system}; else echo {processor}; fi')
        known = f"echo {int(translated)}" if system == "Darwin" else "exit 1"
        self.fake("sysctl", f'[ "$*" = "-n sysctl.proc_translated" ] || exit 1; {known}')

    def fake(self, name: str, body: str) -> None:
        """Put a program on PATH."""
        path = self.path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def python(self, name: str, version: tuple[int, int], processor: str = "arm64", venv: bool = True) -> None:
        """Put a Python on PATH: it answers the script's question as such a Python would, by running the question."""
        stand_in = (
            f"import sys, platform; sys.version_info = {(*version, 1)}; platform.machine = lambda: {processor!r}; "
            + ("" if venv else "sys.modules['ensurepip'] = None; ")
        )
        self.fake(
            name,
            f'echo {name} >>"$TREE/asked"\n'
            f'if [ "$1" = -c ]; then exec {sys.executable} -S -c "{stand_in}$2" "$3"; fi\n{MAKES}',
        )

    def run(self, script: str = "quickstart") -> subprocess.CompletedProcess:
        """Run a script."""
        variables = {"PATH": str(self.path), "TREE": str(self.tree), "HOME": str(self.tree)}
        command = [str(self.path / "bash"), str(self.tree / "scripts" / script)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)

    def calls(self) -> list[str]:
        """Return what the new environment's Python was asked for."""
        return (self.tree / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "pythons, taken",
    [
        ({"python3": (3, 9), "python3.12": (3, 12), "python3.11": (3, 11)}, "python3.12"),  # Homebrew beside macOS's
        ({"python3": (3, 9), "python3.14": (3, 14), "python3.13": (3, 13)}, "python3.14"),
        ({"python3": (3, 13), "python": (2, 7)}, "python3"),
        ({"python": (3, 11)}, "python"),
        ({"python3": (3, 15), "python3.13": (3, 13)}, "python3.13"),  # Homebrew's newest, for which there are no wheels
        ({"python3.10": (3, 10), "python3": (3, 10)}, None),
        ({"python3": (3, 15), "python": (3, 15)}, None),
    ],
)
def test_the_newest_python_that_fits_is_taken(pythons: dict[str, tuple[int, int]], taken: str | None, tmp_path: Path):
    mac = Machine(tmp_path, "Darwin", "arm64")
    for name, version in pythons.items():
        mac.python(name, version)
    done = mac.run()
    if taken is None:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(
            "scripts/quickstart: needs Python 3.11 to 3.14 with venv, or uv. No python3.14 to"
        )
    else:
        assert done.returncode == 0, done.stderr
        assert f"making a virtual environment in .venv with {mac.path}/{taken}\n" in done.stdout
        assert mac.calls()[0].endswith("-c constraints.txt -e .[mlx,serve]")


def test_uv_is_taken_where_no_python_fits(tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin", "arm64")
    mac.python("python3", (3, 9))
    mac.python("python3.12", (3, 12), processor="x86_64")  # Homebrew of an Intel Mac that was moved
    mac.python("python3.11", (3, 11), venv=False)
    mac.fake("uv", f'echo "$*" >"$TREE/uv"{MAKES}')
    done = mac.run()
    assert done.returncode == 0 and "with uv\n" in done.stdout, done.stderr
    assert (mac.tree / "uv").read_text() == "venv --seed --allow-existing --python 3.12 .venv\n"
    assert mac.calls()[1] == "-m core.cli train skc_mac --out runs/quickstart"


@pytest.mark.parametrize("maker", ["python3.12", "uv"])
def test_an_environment_without_pip_is_completed(maker: str, tmp_path: Path) -> None:
    """Ctrl-C while it was made leaves one, and so does uv."""
    mac = Machine(tmp_path, "Darwin", "arm64")
    if maker == "uv":
        mac.fake("uv", MAKES)
    else:
        mac.python(maker, (3, 12))
    assert mac.run().returncode == 0
    python = mac.tree / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\necho No module named pip >&2\nexit 1\n")
    done = mac.run()
    assert done.returncode == 0 and "making a virtual environment in .venv" in done.stdout, done.stderr
    assert "already installed" not in done.stdout and "making" not in mac.run().stdout


@pytest.mark.parametrize("script", ["quickstart", "test"])
@pytest.mark.parametrize(
    "translated, message", [(True, "runs under Rosetta, .* arm64 one"), (False, "Intel Mac, .* skc info")]
)
def test_a_mac_without_wheels_is_told_so(script: str, translated: bool, message: str, tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin", "x86_64", translated)
    mac.python("python3.12", (3, 12), processor="x86_64")
    done = mac.run(script)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"scripts/{script}: this ")
    assert re.search(message, done.stderr)
    assert not (mac.tree / ".venv").exists() and not (mac.tree / "asked").exists()


def test_the_whole_of_it_on_linux_twice(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.python("python3", (3, 11), processor="x86_64")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "bits per byte 1.9000\nartifact: 700,000 bytes\ntraining: 300 steps\nread runs/" in done.stdout
    assert "about ten minutes on two CPU cores" in done.stdout and "mac_check" not in done.stdout
    again = machine.run()
    assert "already installed" in again.stdout and "making" not in again.stdout
    assert [call.split()[1] for call in machine.calls()] == ["pip", "core.cli", "core.cli"]
    mac = Machine(tmp_path / "mac", "Darwin", "arm64")
    mac.python("python3.13", (3, 13))
    said = mac.run().stdout
    assert "(an estimate: nobody has measured it)" in said and "scripts/mac_check" in said


def test_the_tests_take_the_same_python(tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin", "arm64")
    mac.python("python3", (3, 9))
    mac.python("python3.13", (3, 13))
    done = mac.run("test")
    assert f"making a virtual environment in .venv-test with {mac.path}/python3.13" in done.stdout
    assert mac.calls()[0].endswith("-c constraints.txt -e .[mlx,torch,dev]") and mac.calls()[1] == "-m ruff check ."


@pytest.mark.parametrize("name", ["quickstart", "test", "environment.sh"])
def test_macos_has_bash_3_2_and_posix_sed(name: str) -> None:
    text = (ROOT / "scripts" / name).read_text()
    newer = (
        "\\|",
        "mapfile",
        "readarray",
        "declare -A",
        "local -n",
        "${!",
        ",,}",
        "^^}",
        "|&",
        "&>>",
        "sed -i",
        "sed -E",
    )
    assert not [word for word in newer if word in text]
