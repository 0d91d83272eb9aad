"""The watched process: what it must let pass, and planted thefts that it must see. Budget: 20 s."""

import ast
import base64
import hashlib
import os
import py_compile
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.audit.watch import answer, file_kinds, isolation, owners, strace, verdicts, watched_process
from core.audit.watch.answer import DIED
from core.audit.watch.file_kinds import File
from core.audit.watch.isolation import HOOK, Isolated, run_isolated
from core.audit.watch.verdicts import check_isolation, check_packages
from core.files import locked
from shared_tests.support import watched
from shared_tests.support.watched import (
    HERE,
    NATIVE_WAYS,
    PYTHON_WAYS,
)

SECRET = b"what a model learns from, 40 bytes long"


def run(name: str, arguments: dict[str, Any], **options: Any) -> Isolated:
    return run_isolated(f"{HERE}:{name}", arguments, **options)


def kinds(found: Isolated) -> dict[str, File]:
    return {file.path: file for file in found.files}


def write(folder: Path, *names: str) -> list[Path]:
    """Make files of the same length and different text."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(SECRET[: -len(name)] + name.encode())
    return [Path(os.path.realpath(folder / name)) for name in names]


@pytest.fixture(params=["all", "hook"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Run once with all that this system has, and once with neither strace nor unshare."""
    if request.param == "hook":
        monkeypatch.setenv("PATH", str(tmp_path))
    return request.param


def test_an_honest_evaluation_passes(tmp_path: Path, forced: str) -> None:
    (path,), (train,) = write(tmp_path / "inputs", "val.bin"), write(tmp_path / "train", "train.bin")
    (tmp_path / "out").mkdir()
    arguments = {"path": str(path), "folder": str(tmp_path / "out")}
    found = run("honest", arguments, hidden=[train], writable=[tmp_path / "out"])
    assert found.error is None and found.value == path.read_text() and found.returncode == 0
    files = kinds(found)
    assert files[str(path)].kind == "input" and files[str(path)].size == path.stat().st_size
    ledger = files[os.path.realpath(tmp_path / "out" / "ledger")]
    assert ledger.kind == "audit" and ledger.wrote and ledger.read
    read_by_site = [f for f in found.files if f.path.endswith((".pth", "pyvenv.cfg"))]
    assert any("hook" in f.seen_by for f in read_by_site)  # site itself ran under the hook
    assert any(f.kind == "package" and "hook" in f.seen_by and "/numpy/" in f.path for f in found.files)
    assert any(f.kind == "code" and f.path == os.path.realpath(watched.__file__) for f in found.files)
    assert found.packages["numpy"] == np.__version__ and not found.network
    isolation, packages = check_isolation(found, [train]), check_packages(found)
    assert isolation.verdict == packages.verdict == "PASS", (isolation, packages)
    assert found.measures[0] == HOOK and all(words in isolation.evidence for words in found.measures + found.missing)
    assert f"numpy {np.__version__}" in packages.evidence
    if forced == "hook":
        assert found.measures == [HOOK] and any(words.startswith("strace") for words in found.missing)


def test_the_hook_comes_before_any_import() -> None:
    body = ast.parse(Path(watched_process.__file__).read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import sys"]
    assert "sys.addaudithook(hook)" in map(ast.unparse, body)


def test_every_way_to_a_training_file_is_seen_or_said_to_be_unseen(tmp_path: Path, forced: str) -> None:
    train = write(tmp_path / "train", *PYTHON_WAYS, *NATIVE_WAYS)
    found = run("steal", {"folder": str(tmp_path / "train")}, hidden=train)
    assert found.error is None, found.error
    finding = check_isolation(found, train)
    assert finding.verdict == "FAIL"
    traced_too = strace.STRACE in found.measures
    assert traced_too or any(words.startswith(strace.STRACE) for words in found.missing)
    covered = any("covered" in words for words in found.measures)
    assert covered or any("covered" in words or "strace" in words for words in found.missing)
    for way in (*PYTHON_WAYS, *NATIVE_WAYS):
        assert found.value[way] == (0 if covered else len(SECRET)), way
        seen = ("hook",) * (way in PYTHON_WAYS) + ("system",) * traced_too
        file = kinds(found).get(path := str(tmp_path.resolve() / "train" / way))
        assert (file.seen_by if file else ()) == seen, way
        assert any(words.startswith(f"training data: {path} ") for words in finding.details["problems"]) == bool(seen)


def test_links_copies_and_unannounced_files_are_found(tmp_path: Path) -> None:
    train = write(tmp_path / "train", "linked", "copied", "unread")
    (clean, stranger), (old,) = write(tmp_path / "inputs", "clean", "stranger"), write(tmp_path / "out", "old")
    link, copy = tmp_path / "inputs" / "link", tmp_path / "inputs" / "copy"
    os.link(train[0], link)
    copy.write_bytes(train[1].read_bytes())
    inputs, others = [str(p) for p in (clean, link, copy)], [str(p) for p in (stranger, old)]
    found = run("stray", {"inputs": inputs, "others": others}, hidden=train, writable=[tmp_path / "out"])
    problems = check_isolation(found, train).details["problems"]
    assert {problem.rpartition(" (")[0] for problem in problems} == {
        f"training data: {os.path.realpath(link)}", f"training data: {os.path.realpath(copy)}",
        f"not through the opener: {stranger}", f"not through the opener: {old}",
    }  # fmt: skip


def test_a_connection_is_a_failure(tmp_path: Path) -> None:
    found = run("reach", {"port": 41_017})
    assert any(words == "socket.connect ('127.0.0.1', 41017)" for words in found.network), found.network
    if strace.STRACE in found.measures:
        assert sum("connect AF_INET" in words for words in found.network) == 2
        assert any("htons(41018)" in words for words in found.network)
    finding = check_isolation(found, [])
    assert finding.verdict == "FAIL" and "network: " in finding.evidence


def test_a_program_is_a_failure_and_a_compiler_is_not(forced: str) -> None:
    found = run("start", {})
    finding = check_packages(found)
    assert finding.verdict == "FAIL" and any(words.endswith("sh -c exit 0") for words in finding.details["foreign"])
    assert check_isolation(found, []).verdict == "PASS"
    allowed = [
        "/usr/bin/g++ -O3 x.cpp", "/bin/sh -c g++ --version > /dev/null 2>&1", "/usr/bin/x86_64-linux-gnu-gcc-12 -v",
        "/sbin/ldconfig -p", f"{sys.executable} -c pass", "/usr/bin/openssl sha512 header.i", "(os.fork: a copy)",
    ]  # fmt: skip
    for words in allowed:
        assert check_packages(found._replace(executed=[words])).verdict == "PASS", words
    refused = ["/home/me/gcc x", "/usr/bin/openssl s_client", "/usr/bin/xz -d", "/bin/sh -c lrzip x", "/usr/bin/gccx"]
    for words in refused:
        assert check_packages(found._replace(executed=[words])).verdict == "FAIL", words


def test_an_exception_comes_back() -> None:
    found = run("fail", {"path": "a.bin"})
    assert found.error is not None and found.error["kind"] == "core.data.column.DataError"
    assert found.error["message"] == "a.bin: magic: 0" and "in fail" in found.error["traceback"]
    assert found.value is None and found.returncode == 1
    finding = check_isolation(found, [])
    assert finding.verdict == "NOT CHECKED" and "a.bin: magic: 0" in finding.evidence
    absent = run_isolated("core.nothing:here", {})
    assert absent.error is not None and absent.error["kind"] == "builtins.ModuleNotFoundError"


def test_a_killed_process_proves_nothing_but_what_the_system_saw(tmp_path: Path) -> None:
    (path,) = write(tmp_path, "train.bin")
    found = run("die", {"path": str(path)})
    assert found.error is not None and found.error["kind"] == DIED and found.error["traceback"] == ""
    assert "signal 9" in found.error["message"] and found.returncode == -signal.SIGKILL
    assert HOOK not in found.measures and any(words.startswith(HOOK) for words in found.missing)
    assert check_packages(found).verdict == "NOT CHECKED"
    seen = strace.STRACE in found.measures
    assert check_isolation(found, [path]).verdict == ("FAIL" if seen else "NOT CHECKED")
    assert check_isolation(found._replace(files=[]), []).verdict == "NOT CHECKED"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    note = tmp_path / "pid"
    # A background job of a script has SIGINT ignored, and passes that on.
    call = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    call += (
        f"from core.audit.watch.isolation import run_isolated; run_isolated('{HERE}:wait', {{'path': {str(note)!r}}})"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", call], env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(number)
    assert parent.wait(240) == -number
    must_end(note)


def must_end(note: Path) -> None:
    """Wait until the process that holds `note` has ended: its number may be one of another view of the processes."""
    deadline = time.monotonic() + 240
    with open(note, "ab") as file:
        assert file.tell(), "the process was never there"
        while not locked(file):
            assert time.monotonic() < deadline, "the process goes on"
            time.sleep(0.02)


def test_what_outlives_the_answer_is_ended(tmp_path: Path, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "GRACE", 0.2)
    found = run("leave", {"path": str(tmp_path / "note")}, writable=[tmp_path])
    if strace.STRACE in found.measures:  # without it nobody waits for a copy, nor knows of it
        assert found.outlived and "were ended" in check_packages(found).evidence
    must_end(tmp_path / "note")
    assert found.value == "done" and check_isolation(found, []).verdict == check_packages(found).verdict == "PASS"


def test_an_evaluation_without_an_answer_is_ended(tmp_path: Path) -> None:
    found = run("wait", {"path": str(tmp_path / "note")}, writable=[tmp_path], patience=8.0)
    assert found.error is not None and found.error["kind"] == DIED
    assert "gave no answer for 8 s" in found.error["message"]
    must_end(tmp_path / "note")


def test_what_a_killed_process_had_announced_is_known(tmp_path: Path) -> None:
    (path,) = write(tmp_path, "val.bin")
    found = run("read_and_die", {"path": str(path)})
    finding = check_isolation(found, [])
    assert finding.verdict == "NOT CHECKED" and "signal 9" in finding.evidence, finding
    if strace.STRACE in found.measures:
        assert kinds(found)[str(path)].kind == "input"


def test_the_environment_carries_no_text_and_starts_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('ran')")
    for name, value in {"TEXT": "text", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CC": "x" * 300}.items():
        monkeypatch.setenv(name, value)
    found = run("variables", {})
    assert found.error is None and found.value["OMP_NUM_THREADS"] == "1"
    assert not {"TEXT", "CC", "PYTHONPATH"} & found.value.keys()
    assert str(tmp_path / "sitecustomize.py") not in kinds(found)


def test_compiled_modules_of_others_are_not_read(tmp_path: Path) -> None:
    source, cache = tmp_path / "module_a.py", tmp_path / "__pycache__" / f"module_a.{sys.implementation.cache_tag}.pyc"
    source.write_text("VALUE = 'a text'")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(cache), invalidation_mode=unchecked)
    py_compile.compile(str(source), str(tmp_path / "module_b.pyc"), invalidation_mode=unchecked)
    source.write_text("VALUE = 1")
    for warm in ((), ("core.data.dataset",)):
        found = run("import_value", {"module": "module_a"}, paths=[str(tmp_path)], warm=warm)
        assert found.value == 1 and check_isolation(found, []).verdict == "PASS"
        assert kinds(found)[os.path.realpath(source)].kind == "code"  # and counted
    found = run("import_value", {"module": "module_b"}, paths=[str(tmp_path)])
    problems = check_isolation(found, []).details["problems"]
    assert [problem.partition(" (")[0] for problem in problems] == [
        f"not through the opener: {os.path.realpath(tmp_path / 'module_b.pyc')}"
    ]


def test_a_note_among_the_compiled_modules_is_a_failure() -> None:
    found = run("leave_note", {})
    assert found.error is None and "compiled modules" in check_isolation(found, []).evidence
    assert not os.path.exists(os.path.join(isolation.compiled_folder(), "note.pyc"))  # the next have another folder


def test_what_one_process_left_for_the_next_is_named(tmp_path: Path) -> None:
    old, young, unused = (str(path) for path in write(tmp_path, "old", "young", "unused"))
    start = time.time_ns()
    Path(young).write_bytes(SECRET)
    before = run("stray", {"inputs": [old, young], "others": []})
    found = run("stray", {"inputs": [old, young, unused], "others": []})
    left = [words.partition(" (")[0].rpartition(" ")[2] for words in verdicts.notes_left(found, before, start, "/own")]
    assert left == [young, unused]
    assert not verdicts.notes_left(found, before, start, os.path.realpath(tmp_path))
    assert check_isolation(found._replace(tampered=("a note",)), []).verdict == "FAIL"


def test_looking_into_another_process_is_a_failure(forced: str) -> None:
    found = run("spy", {"process": os.getpid()})
    problems = check_isolation(found, []).details["problems"]
    if strace.ALONE not in found.measures and sys.platform == "linux":
        assert any(words.startswith(f"another process: /proc/{os.getpid()}/mem") for words in problems), problems
    if strace.STRACE in found.measures:
        assert f"another process: process_vm_readv({os.getpid()})" in problems


def test_a_package_is_what_its_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "numpy/good.py": "package", "numpy/changed.py": "other", "numpy/text.txt": "other", "stray.py": "code",
        "numpy-9.dist-info/METADATA": "package", "numpy-9.dist-info/text": "other", "mine/__init__.py": "code",
        "mine/table.bin": "code", "numpy-9.dist-info/RECORD": "package", "other-1.dist-info/text": "other",
    }  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"Name: {name.split('-')[0].split('/')[0]}\nVersion: 9\n")
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1\n")
    for package, names in {
        "numpy-9": ("numpy/good.py", "numpy/changed.py", "numpy-9.dist-info/METADATA"),
        "mine-1": ("mine/__init__.py", "mine/table.bin"),
    }.items():
        lines = [f"{name},sha256={_sha256(tmp_path / name)},1" for name in names]
        (tmp_path / f"{package}.dist-info" / "RECORD").write_text("\n".join([*lines, f"{package}.dist-info/RECORD,,"]))
    (tmp_path / "numpy" / "changed.py").write_text("a text")
    monkeypatch.setattr(owners, "package_folders", lambda: [os.path.realpath(tmp_path)])
    monkeypatch.setattr(file_kinds, "_PACKAGES", [os.path.realpath(tmp_path)])
    cached = (owners.package_files, owners.unlisted_packages)
    for function in cached:
        function.cache_clear()
    try:
        found = {name: file_kinds.classify(os.path.realpath(tmp_path / name)) for name in files}
    finally:
        for function in cached:
            function.cache_clear()
    assert found == files


def _sha256(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def test_the_system_is_what_its_lists_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("listed", "changed", "text", "libdriver.so.1", "libtext.so")
    listed, changed, _, driver, _ = write(tmp_path, *names)
    hashes = {str(listed): hashlib.md5(listed.read_bytes()).hexdigest(), str(changed): "0" * 32}
    driver.write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(owners, "system_hashes", lambda: hashes)
    monkeypatch.setattr(file_kinds, "SYSTEM", (os.path.realpath(tmp_path),))
    found = {name: file_kinds.classify(os.path.realpath(tmp_path / name)) for name in names}
    assert found == {
        "listed": "system", "changed": "other", "text": "other", "libdriver.so.1": "system", "libtext.so": "other"
    }  # fmt: skip


def test_traces_are_read(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "thread.7").write_text(
        '10.000001 execve("/v/bin/python", ["/v/bin/python", "w.py"], 0x7ffc /* 9 vars */) = 0\n'
        '10.000003 openat(AT_FDCWD</w>, "a\\303\\251 \\"b\\"", O_RDONLY|O_CLOEXEC) = 3</real/a\\303\\251 "b"\\76>\n'
        '10.000004 openat(AT_FDCWD</w>, "gone", O_RDONLY) = -1 ENOENT (No such file or directory)\n'
        '10.000005 openat(5</w/x>, "../locked", O_RDONLY) = -1 EACCES (Permission denied)\n'
        '10.000006 openat(AT_FDCWD</w>, "/w", O_RDONLY|O_DIRECTORY) = 3</w>\n'
        '10.000007 openat2(AT_FDCWD</w>, "n", {flags=O_RDWR|O_CREAT|O_EXCL, mode=0600, resolve=0}, 24) = 3</w/n>\n'
        '10.000008 creat("/w/c", 0644) = 4</w/c>\n'
        '10.000009 openat(AT_FDCWD</w>, "cut off", O_RDONLY <unfinished ...>\n'
        "10.000010 --- SIGCHLD {si_signo=SIGCHLD} ---\n"
        "10.000011 io_uring_setup(8, {flags=0}) = 5<anon_inode:[io_uring]>\n"
        "10.000012 process_vm_readv(1, [], 0, [], 0, 0) = -1 EPERM (Operation not permitted)\n"
        "10.000013 process_vm_readv(8, [], 0, [], 0, 0) = 0\n"
        "10.000014 ptrace(PTRACE_ATTACH, 2) = -1 EPERM (Operation not permitted)\n"
        "10.000015 pidfd_getfd(4<pid:3>, 1, 0) = 5</x>\n"
    )
    (tmp_path / "trace" / "thread.8").write_text(
        '10.000002 open("/first", O_WRONLY|O_APPEND) = 3</first>\n'
        '10.000020 execve("/no/ld", ["ld"], 0x1 /* 1 var */) = -1 ENOENT (No such file or directory)\n'
        '10.000021 execve("/bin/ld", ["ld", "-t"], 0x1 /* 1 var */) = 0\n'
        '10.000022 connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("10.0.0.1")}, 16)'
        " = -1 ENETUNREACH (Network is unreachable)\n"
        '10.000023 connect(3<socket:[1]>, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT (No)\n'
        "10.000024 bind(3<socket:[1]>, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 0\n"
        '10.000025 sendto(3<socket:[1]>, "x", 1, 0, NULL, 0) = 1\n'
    )
    seen = strace.read_trace(tmp_path)
    assert seen is not None
    assert seen.opened == [
        strace.Opening("/first", False, True, False),
        strace.Opening('/real/aé "b">', True, False, False),
        strace.Opening("/w/locked", True, False, False),
        strace.Opening("/w/n", True, True, True),
        strace.Opening("/w/c", False, True, True),
    ]
    assert seen.executed == ["/bin/ld -t"] and len(seen.kernel) == 1 and seen.processes == {7, 8}
    assert seen.reached == ["process_vm_readv(1)", "ptrace(2)", "pidfd_getfd(4<pid:3>)"]
    assert seen.network == [
        'connect AF_INET sin_port=htons(80), sin_addr=inet_addr("10.0.0.1")',
        "connect unix /var/run/nscd/socket",
    ]
    (tmp_path / "trace" / "thread.7").unlink()
    (tmp_path / "trace" / "thread.8").write_text("")
    assert strace.read_trace(tmp_path) is None


def test_the_kind_of_a_file() -> None:
    numpy, root = os.path.realpath(np.__file__), file_kinds.ROOT
    expected = {
        numpy: "package", os.path.realpath(ast.__file__): "python", os.path.realpath(sys.executable): "python",
        f"{root}/core/data/dataset.py": "code", f"{root}/core/data/bundled/tokenizer.model": "other",
        f"{root}/data/x.bin": "other",
        "/etc/passwd": "system", "/dev/shm/x": "other", "/home/me/train.bin": "other", "/run-1/x": "audit",
        "/run-10/x": "other", "/given/val.bin": "input", f"{root}/lab.egg-info/entry_points.txt": "other",
        f"{root}/skc_lab.egg-info/entry_points.txt": "code", f"/proc/{os.getpid()}/maps": "system",
        "/proc/1/mem": "other", "/usr/share/text": "other",
    }  # fmt: skip
    assert {p: file_kinds.classify(p, {"/given/val.bin"}, ["/run-1"], {os.getpid()}) for p in expected} == expected
