"""scripts/gpu_check and mac_check on the CPU: limits, kills, what is on the disk, and that faults fail. Budget: 30 s.

`python -m shared_tests.check.test_device_check ITEM FOLDER TEMPORARY DEVICE` is one of the items below,
`... drive FOLDER ITEM ...` a check made of them.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shared_tests.device import driver, records
from shared_tests.device.child import Child, die_with_the_driver
from shared_tests.device.driver import Driver, ended_by_signals
from shared_tests.device.plan import NOT_MIXED, PLANS, Item

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("tyro", "optuna", "hypothesis", "pytest", "xdist", "pyarrow", "zstandard")
"""What a bare machine lacks, with PyTorch or with MLX."""
COMMAND = [sys.executable, "-m", "shared_tests.check.test_device_check"]


# Items that measure nothing.


def quick(child: Child) -> None:
    child.check("small", 1.0, 2.0)
    child.figure("runs", 1, "")


def beyond(child: Child) -> None:
    child.check("large", 3.0, 2.0)
    child.check("not a number", float("nan"), 2.0)


def hang(child: Child) -> None:
    """Start another process, say where both are, and never end."""
    child.figure("before", 7, "")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (child.folder / "pids").write_text(f"{os.getpid()} {other.pid}")
    time.sleep(600)


def slow(child: Child) -> None:
    """Never end, unless told not to begin."""
    child.figure("before", 7, "")
    (child.folder / "begun").write_text(str(os.getpid()))
    (child.folder / "begun").rename(child.folder / "running")  # whole at once: who waits for it reads it
    while not (child.folder / "go").exists():
        time.sleep(0.02)


def crash(child: Child) -> None:
    with child.part("a model"):
        raise RuntimeError("no kernel\nimage")
    child.check("another model", 0.0, 1.0)


def vanish(child: Child) -> None:
    os._exit(9)


def compiles(child: Child) -> None:
    """Wait for a turn that must come after `quick`."""
    child.turn()
    runs = records.latest(records.read(child.folder))
    child.figure("quick had ended", "quick" in runs and records.state(runs["quick"]) == "done", "")


def item(name: str, cap: float = 90.0, **more: Any) -> Item:
    return Item(name, f"test.{name}", cap, **more)


PLAN = (
    item("compiles", prepares=True), item("quick"), item("vanish", prepares=True), item("crash"),
    item("never", gpu_only=True), item("beyond"),
)  # fmt: skip


def drive(folder: Path, *items: Item, budget: float = 600.0, command: list[str] = COMMAND) -> tuple[int, list[str]]:
    """Run items and return the exit code and what was said."""
    said: list[str] = []
    return Driver("a check", items, command, folder, budget, False, said.append).run(), said


def found(folder: Path) -> dict[str, list[records.Line]]:
    return records.latest(records.read(folder))


def gone(pid: int) -> bool:
    """Return whether a process has ended, within a minute."""
    for _ in range(3000):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


# The driver.


def test_items_run_in_order_and_the_report_says_what_is_wrong(tmp_path: Path) -> None:
    code, said = drive(tmp_path, *PLAN)
    runs, report = found(tmp_path), (tmp_path / "report.md").read_text()
    assert code == 1 and {name: records.state(run) for name, run in runs.items()} == {
        "compiles": "done", "quick": "done", "vanish": "failed", "crash": "failed", "never": "skipped",
        "beyond": "failed",
    }  # fmt: skip
    assert next(line["value"] for line in runs["compiles"] if line.get("what") == "quick had ended") == 1.0
    assert "**vanish: failed**: ended with code 9 before its turn" in report and "| never | needs a GPU |" in report
    assert "RuntimeError: no kernel image" in report and 'raise RuntimeError("no kernel' in report, "the traceback"
    assert "**beyond: large**: 3 is beyond 2" in report and "not a number**: not finite is beyond 2" in report
    assert "| small | 1 | 2 | ok |" in report and "Checks: 4, 2 beyond their limit." in report
    assert any("    large: 3.0 beyond 2.0" in line for line in said)
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "report.md", "report.zip", "results.jsonl"}
    with zipfile.ZipFile(tmp_path / "report.zip") as bundle:
        assert {*bundle.namelist()} == {"log.txt", "report.md", "results.jsonl"}
        assert bundle.read("report.md").decode() == report, "as it is at the end"


def test_an_item_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    code, _ = drive(tmp_path, item("hang", cap=5.0), item("quick"))
    runs = found(tmp_path)
    assert code == 1 and time.monotonic() - began < 120
    assert runs["hang"][-1]["state"] == "capped" and runs["hang"][-1]["text"] == "capped after 5 s"
    assert any(line.get("value") == 7 for line in runs["hang"]), "what it had measured is kept"
    assert records.state(runs["quick"]) == "done"
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_what_no_longer_fits_the_budget_is_not_started(tmp_path: Path) -> None:
    code, said = drive(tmp_path, item("quick"), item("beyond", cap=1000), budget=500)
    assert code == 1 and "beyond" not in found(tmp_path) and said[-1].startswith("not started, ")
    code, said = drive(tmp_path, item("quick"), item("beyond", cap=1000, optional=True), budget=500)
    assert code == 0 and said[-1].startswith("not started, "), "what is optional need not be reached"
    code, said = drive(tmp_path, item("quick"), item("crash"), budget=500)
    assert said[0].startswith("1 items have a result"), "a second call skips what has one"


def test_an_item_whose_package_is_missing_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = (item("quick", needs=("numpy", "nowhere")), item("compiles", prepares=True, needs=("nowhere",)))
    code, said = drive(tmp_path, *plan)
    assert code == 0 and all(records.state(run) == "skipped" for run in found(tmp_path).values())
    how = f"{sys.executable} -m pip install -c constraints.txt -e '.[mlx,nowhere]'"
    assert said[0].endswith(f"quick: skipped (needs nowhere: skipped; {how})") and len(said) == 2
    assert f"| quick | needs nowhere: skipped; {how} |" in (tmp_path / "report.md").read_text()
    (tmp_path / "nowhere.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    code, said = drive(tmp_path, *plan)
    assert code == 0 and all(records.state(run) == "done" for run in found(tmp_path).values())


def test_a_model_that_crashes_is_said_at_once_and_ends_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_tests.device.driver.AFTER_A_CRASH", 0.0)
    command = [*COMMAND[:-1], "shared_tests.check.test_device_check", "as", "crash"]
    code, said = drive(tmp_path, item("smoke"), item("quick"), command=command)
    assert code == 1 and "quick" not in found(tmp_path)
    assert any('raise RuntimeError("no kernel' in line for line in said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_told_to_end_takes_all_along_and_leaves_one_file(number: int, tmp_path: Path) -> None:
    """Ctrl-C, a kill, a terminal that is closed: items have a session of their own, and hear nothing of it."""
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)  # a shell's background job would not hear Ctrl-C
    command = [*COMMAND, "drive", str(tmp_path), "quick", "hang"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=heard)
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(number)
    assert first.wait(600) == 1
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    with zipfile.ZipFile(tmp_path / "report.zip") as bundle:
        assert "| hang | not ended |" in bundle.read("report.md").decode() and b"before" in bundle.read(records.FILE)


def test_an_item_ends_with_a_killed_driver_on_a_mac_too(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from shared_tests.device.child import die_with_the_driver\n"
        "sys.platform = 'darwin'; die_with_the_driver(); open('pid.part', 'w').write(str(os.getpid()))\n"
        "os.rename('pid.part', 'pid'); time.sleep(600)"
    )
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}], start_new_session=True)"
    first = subprocess.Popen([sys.executable, "-c", starts], cwd=tmp_path)
    while not (tmp_path / "pid").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_rehearsal_is_not_taken_for_what_a_gpu_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records.append(tmp_path, {"item": "quick", "state": "started", "device": "gpu"})
    assert records.devices(tmp_path) == set(), "there was no GPU, and --device cpu is the advice"
    drive(tmp_path, item("quick"))
    assert records.devices(tmp_path) == {"cpu"}
    monkeypatch.setattr(sys, "argv", ["mac_check", "--out", str(tmp_path)])
    assert driver.main("mlx", "GPU", None) == 2
    wanted = f"mac_check: {tmp_path} holds results of a rehearsal (--device cpu): choose another --out, or forget them"
    assert capsys.readouterr().err == f"{wanted} with --again\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed driver is noticed within half a second")
def test_a_killed_check_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [*COMMAND, "drive", str(tmp_path), "quick", "slow"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "running").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert gone(int((tmp_path / "running").read_text())), "nothing may hold the device"
    assert records.state(found(tmp_path)["quick"]) == "done" and "slow" in (tmp_path / "report.md").read_text()
    with (tmp_path / records.FILE).open("ab") as file:
        file.write(b'{"item": "slow", "what": "cut of')
    (tmp_path / "go").touch()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 items have a result" in done.stdout
    lines = records.read(tmp_path)
    assert sum(line.get("what") == "runs" for line in lines) == 1, "what has a result was not run again"
    assert sum(line.get("what") == "before" for line in lines) == 2 and len(found(tmp_path)["slow"]) == 3


def test_a_line_is_on_the_disk_when_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    records.append(tmp_path, {"item": "a", "value": float("inf")})
    assert synced == [(tmp_path / records.FILE).stat().st_size]
    assert json.loads((tmp_path / records.FILE).read_text()) == {"item": "a", "value": None}


def test_what_was_compiled_comes_back_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_tests.device.driver.MOST", (1 << 16) + 5000)
    (tmp_path / "temporary").mkdir()
    driver = Driver("a check", (), COMMAND, tmp_path / "out", 1.0, False, print)
    driver.temporary = tmp_path / "temporary"
    for name, size in (("small", 1000), ("large", 9000)):
        (driver.temporary / f"{name}.compiled").write_bytes(os.urandom(size))
    kept = (driver.temporary / "small.compiled").read_bytes()
    driver._pack()
    (driver.temporary / "small.compiled").unlink()
    (driver.temporary / "large.compiled").unlink()
    driver._unpack()
    assert (driver.temporary / "small.compiled").read_bytes() == kept
    assert not (driver.temporary / "large.compiled").exists(), "what does not fit is left out"


def test_a_file_that_grows_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_tests.device.driver.MOST", 1000)
    driver = Driver("a check", (), COMMAND, tmp_path, 1.0, False, print)
    (tmp_path / "log.txt").write_bytes(b"a" * 400 + b"end")
    driver._report()
    assert (tmp_path / "log.txt").read_bytes() == b"a" * 400 + b"end"
    (tmp_path / "log.txt").write_bytes(b"a" * 600 + b"end")
    driver._report()
    assert (tmp_path / "log.txt").read_bytes() == b"a" * 247 + b"end"


def test_plans_fit_their_rules() -> None:
    for plan in PLANS.values():
        names = [part.name for part in plan]
        assert len(set(names)) == len(names) and names[0] == "environment"
        for part in plan:
            assert set(part.needs) <= {"torch"} and part.environment.keys() <= NOT_MIXED.keys()
            assert set(part.after) <= set(names[: names.index(part.name)]), "what it waits for comes before it"
            file, function = part.call.split(".")
            assert f"def {function}(child: Child" in (ROOT / "shared_tests" / "device" / f"{file}.py").read_text()
    assert all(part.cap <= 80 for part in PLANS["cuda"]) and sum(part.cap for part in PLANS["cuda"][:8]) <= 480


# Interpreters.


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python without packages."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def test_a_python_that_lacks_packages_finds_one_that_has_them(bare: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from shared_tests.device import interpreter; from pathlib import Path\n"
        "interpreter.ROOT, interpreter.ENVIRONMENTS = Path(sys.argv[1]), ('.venv',)\n"
        "interpreter.use(('numpy', 'torch'), 'torch'); import torch"
    )
    script = tmp_path / "gpu_check"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}; print(torch.__name__)\n")
    done = subprocess.run([str(bare), str(script), str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert f"gpu_check needs Python 3.11 with numpy, torch: {bare} lacks numpy, torch; " in done.stderr
    assert f"{tmp_path}/.venv/bin/python is not there: pip install -c constraints.txt -e '.[torch]'" in done.stderr
    other = tmp_path / ".venv" / "bin" / "python"
    other.parent.mkdir(parents=True)
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    done = subprocess.run([str(bare), str(script), str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch\n", "")


@pytest.mark.parametrize("name, device", [("gpu_check", "CUDA device"), ("mac_check", "GPU that MLX knows")])
def test_without_an_accelerator_it_is_one_line_and_exit_2(name: str, device: str, tmp_path: Path) -> None:
    if sys.platform == "darwin" and name == "mac_check":
        pytest.skip("here is one")
    command = [sys.executable, str(ROOT / "scripts" / name), "--only", "environment", "--out", str(tmp_path)]
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=hidden)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"there is no {device} here: nothing was checked (--device cpu tries the script without)\n"


# What a bare machine has.


def test_items_need_nothing_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    """A process that cannot import it runs real items, and imports the file of every other one."""
    files = [path.stem for path in (ROOT / "shared_tests" / "device").glob("*.py") if path.stem != "__init__"]
    items, blocked = ("quantiser", "speed baseline, 32 rows"), (*BLOCKED, "mlx")
    for name in items:
        (tmp_path / f"{name}.go").touch()
    program = [
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))",
        *(f"import shared_tests.device.{name}" for name in files),
        "main = shared_tests.device.child.main",
        f"sys.exit(sum(main('cuda', name, {str(tmp_path)!r}, {str(tmp_path)!r}, 'cpu') for name in {items!r}))",
    ]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, env=hidden)
    assert done.returncode == 0, done.stderr
    runs = found(tmp_path)
    assert sum("ok" in line for line in runs[items[0]]) == 23 and (tmp_path / "profiles.txt").stat().st_size > 500
    assert any(line.get("what") == "update alone" and line["value"] > 0 for line in runs[items[1]])


def test_a_mac_without_pytorch_is_checked_all_the_same(tmp_path: Path) -> None:
    """Every item but the one that says so runs where PyTorch cannot be imported; long ones are imported only."""
    items = [part for part in PLANS["mlx"] if not part.needs]
    assert [part.name for part in PLANS["mlx"] if part.needs] == ["models"]
    modules = sorted({part.call.split(".")[0] for part in items})
    program = [
        f"import sys; sys.modules.update(dict.fromkeys({(*BLOCKED, 'torch')!r}))",
        *(f"import shared_tests.device.{name}" for name in modules),
        "main = shared_tests.device.child.main",
        f"sys.exit(sum(main('mlx', name, {str(tmp_path)!r}, {str(tmp_path)!r}, 'cpu') for name in "
        "('environment', 'types', 'speed tiny')))",
    ]
    code = "import shared_tests.device.child\n" + "\n".join(program)
    free = {key: value for key, value in os.environ.items() if key != "MLX_ENABLE_TF32"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=free)
    assert done.returncode == 0, done.stderr
    runs = found(tmp_path)
    assert len([line for line in runs["types"] if line.get("unit") == "ms"]) == 3
    assert any("MLX_ENABLE_TF32=0" in str(line.get("text")) for line in runs["environment"])
    assert any(line.get("what") == "update alone" for line in runs["speed tiny"])


def test_mac_check_takes_any_gpu_of_mlx_and_the_cpu_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    from shared_tests.device import child

    taken: list[Any] = []
    monkeypatch.setattr(mx, "set_default_device", taken.append)
    monkeypatch.setattr(child, "die_with_the_driver", lambda: None)
    folder = str(tmp_path)
    assert child.main("mlx", "environment", folder, folder, "cpu") == 0 and taken == [mx.cpu]
    assert child.main("mlx", "environment", folder, folder, "gpu") == child.NO_DEVICE and len(taken) == 1
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "NVIDIA H100", "total_memory": 85e9})
    assert not mx.metal.is_available() and child.main("mlx", "environment", folder, folder, "gpu") == 0


def test_extras_are_wheels_of_one_kind_each() -> None:
    """None builds FlashAttention from source, and MLX for the CPU and for CUDA are not in one."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["mlx-cuda"] == ["mlx[cuda13]>=0.32.4; sys_platform == 'linux'"]
    assert extras["cuda"] == extras["torch"] and not any("flash" in line for lines in extras.values() for line in lines)


if __name__ == "__main__":
    die_with_the_driver()
    if sys.argv[1] == "drive":
        with ended_by_signals():
            plan = tuple(item(name) for name in sys.argv[3:])
            try:
                sys.exit(Driver("a check", plan, COMMAND, Path(sys.argv[2]), 600.0, False, print).run())
            except KeyboardInterrupt:
                sys.exit(1)
    work, arguments = sys.argv[1], sys.argv[1:]
    if work == "as":  # another item's work under a name
        work, arguments = sys.argv[2], sys.argv[3:]
    made = Child("cuda", item(arguments[0]), Path(arguments[1]), Path(arguments[2]), False)
    globals()[work](made)
    sys.exit(any(True for _ in records.bad(found(made.folder)[made.item.name])))
