"""Streams and arguments that cannot hold every text, closed ones, too little memory: one line. Budget: 60 s.

The commands are those of public bug reports: salesforce/ctrl 17, fastprogress 12 (stdout without UTF-8), MOSS 23,
tiktoken 541 (arguments that are no UTF-8), dvc 10041 (closed streams), parameter-golf 100, mlx-lm 236 (memory),
sentencepiece 517, open_clip 180 (a run used from elsewhere), sentencepiece 863 and 650 (the prompt comes back).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.cli import main
from core.engine.memory import OutOfMemoryError, enough_memory, is_memory, memory_message
from core.files import read_json
from core.presets import get
from shared_tests.support.command_line import Capture, call
from shared_tests.support.killed import small_data

SMALL = "--train.seq 16 --eval.seq 16 --backend mlx --data.path DATA"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run `r0` and its data in `data`."""
    folder = tmp_path_factory.mktemp("streams")
    data = small_data(folder)
    options = [word.replace("DATA", data) for word in SMALL.split()]
    assert main(["train", "debug", "--train.steps", "2", *options, "--out", str(folder / "r0")]) == 0
    return folder


def shell(place: Path, command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell's command in `place`, where `skc` is the program and DATA the data."""
    script = f'skc() {{ "{sys.executable}" -m core.cli "$@"; }}; {command.replace("DATA", str(place / "data"))}'
    return subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, timeout=300)


@pytest.mark.parametrize(
    "name, command, code, said",
    [
        ("stdout_not_utf8", f"PYTHONIOENCODING=ascii skc train debug --train.steps 2 {SMALL} --out r1", 0, ""),
        ("stdout_not_utf8", "PYTHONIOENCODING=latin-1 skc sample r0 --tokens 9 --prompt '→' --backend mlx", 0, ""),
        ("prompt_not_utf8", "skc sample r0 --prompt $'caf\\xe9'", 2, r"--prompt 'caf\udce9': not valid Unicode"),
        ("prompt_not_utf8", "skc train debug --out $'r.b\\xffd'", 2, r"--out 'r.b\udcffd': not valid Unicode"),
        (
            "prompt_not_utf8",
            "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 skc sample r0 --prompt $'caf\\xc3\\xa9'",
            2,
            "the locale of this shell is not UTF-8: set LC_ALL=C.UTF-8",
        ),
        ("stdout_closed", "skc presets >&-", 0, ""),
        ("stdout_closed", f"skc train debug --train.steps 2 {SMALL} --out r2 >&- 2>&- <&-", 0, ""),
        ("stdout_closed", "skc nonsense 2>&-", 2, ""),
        (
            "out_of_memory",
            "ulimit -v 3000000; skc eval r0 --batch 60000 --seq 4096 --backend cuda",
            2,
            "--batch (now 60,000 windows) or --seq",
        ),
        ("run_used_from_another_folder", "mkdir e; cd e; skc eval ../r3", 2, "give its data with --data PATH"),
        ("run_used_from_another_folder", "mkdir f; cd f; skc audit ../r3", 2, "give its data with --data PATH"),
        ("run_used_from_another_folder", "mkdir g; cd g; skc export ../r3 --backend mlx", 2, "with --data PATH"),
    ],
)
def test_public_cases(name: str, command: str, code: int, said: str, place: Path) -> None:
    if name == "run_used_from_another_folder" and not (place / "r3").exists():
        moved(place)
    done = shell(place, command)
    err = done.stderr.decode("utf-8", "replace")
    assert done.returncode == code, err
    assert b"Traceback" not in done.stderr and (said in err if said else not code or err == "")
    assert not code or (err.count("\n") == 1 if said else done.stdout == b"")


def moved(place: Path) -> Path:
    """Copy `r0` to `r3`, whose data are named by a relative path."""
    subprocess.run(["cp", "-r", "r0", "r3"], cwd=place, check=True)
    settings = read_json(place / "r3" / "config.json")
    settings["data"]["path"] = "data"
    (place / "r3" / "config.json").write_text(json.dumps(settings))
    return place / "r3"


def test_the_log_keeps_what_the_screen_cannot_show(place: Path) -> None:
    command = f"PYTHONIOENCODING=ascii skc train debug --train.steps 2 --train.eval-every 1 {SMALL} --out r4"
    done = shell(place, command)
    assert done.returncode == 0 and b" ? 0.0" in done.stdout
    log = (place / "r4" / "log.txt").read_text("utf-8")
    assert " ± 0.0" in log


def test_closed_streams_leave_a_whole_run(place: Path) -> None:
    """No file of the run gets the number of a closed stream, into which libraries print."""
    code = (
        "import os, sys; os.close(0); os.close(1); os.close(2); sys.stdin = sys.stdout = sys.stderr = None\n"
        "from core.cli import open_streams\n"
        "open_streams(); print('lost'); print('lost', file=sys.stderr)\n"
        "file = open('mine', 'w'); os.write(1, b'a library'); file.write(str(file.fileno())); file.close()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=place).returncode == 0
    assert int((place / "mine").read_text()) > 2


@pytest.mark.parametrize("prompt", ["ﬁ ½", "▁▁", "She  was\r\nhere", "", "She was"])
def test_a_text_begins_with_its_prompt(prompt: str, place: Path, capsys: Capture) -> None:
    argv = ["sample", str(place / "r0"), "--prompt", prompt, "--tokens", "3", "--backend", "mlx"]
    (found,) = call(capsys, *argv)["samples"]
    assert found["text"].startswith(prompt) and found["prompt"] == prompt
    assert (found["read_as"] == prompt) == (prompt in ("", "She was"))
    main(argv)
    assert ("the tokenizer normalises text" in capsys.readouterr().out) == (found["read_as"] != prompt)


def test_export_takes_the_data_from_elsewhere(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = place / "r3" if (place / "r3").exists() else moved(place)
    monkeypatch.chdir(place / "r0")
    found = call(capsys, "export", str(run), "--data", str(place / "data"), "--backend", "mlx")
    assert found["artifact"]["within"] and 50_000 < found["artifact"]["packed_code"] < 400_000
    other = small_data(place / "other", 40)
    assert main(["export", str(run), "--data", other, "--backend", "mlx"]) == 2
    assert "holds another text than it was trained on" in capsys.readouterr().err


# Memory.

SAID = {
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "5242880000 bytes. Error code 12 (Cannot allocate memory)": "a request of 5.24 GB failed",
    "CUDA out of memory. Tried to allocate 38.15 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.00 GiB is "
    "free.": "a request of 41 GB failed, this GPU may have 84.9 GB",
    "[malloc] Unable to allocate 64000000000 bytes.": "a request of 64 GB failed",
    "[metal::malloc] Attempting to allocate 64000000000 bytes which is greater than the maximum allowed buffer size of "
    "9534832640 bytes.": "a request of 64 GB failed",
    "Unable to allocate 93.1 TiB for an array with shape (100000000000, 128) and data type int64": "102,365 GB failed",
    "std::bad_alloc": "not enough memory, this process may have",
}


@pytest.mark.parametrize("text, said", SAID.items())
def test_allocators_are_understood(text: str, said: str) -> None:
    assert is_memory(RuntimeError(text)) and said in memory_message(RuntimeError(text))
    with (
        pytest.raises(OutOfMemoryError, match=r"4 rows of 100,000 tokens in one pass take .* lower --these"),
        enough_memory(get("debug").config.model, 4, 100_000, "--these", training=True),
    ):
        raise RuntimeError(text)


def test_other_errors_are_left_alone() -> None:
    assert not is_memory(RuntimeError("expected channels_last memory format")) and is_memory(MemoryError())
    with pytest.raises(RuntimeError, match="shape"), enough_memory(get("debug").config.model, 1, 1, "", training=False):
        raise RuntimeError("shape")


def test_what_the_machine_cannot_hold_is_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture, place: Path) -> None:
    """A batch that no machine can hold, through the real verbs."""

    def full(*_: object, **__: object) -> np.ndarray:
        return np.empty(1 << 60, np.uint8)

    monkeypatch.setattr("core.training.loop.rng.integers16", full)
    options = [word.replace("DATA", str(place / "data")) for word in SMALL.split()]
    assert main(["train", "debug", *options, "--out", str(place / "r5")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "a request of 1,152,921,505 GB failed" in line
    assert "4 rows of 16 tokens" in line and "lower --train.micro-batch (now 4 rows), --train.seq, or --eval.b" in line
    monkeypatch.setattr("core.verbs.sample.write", full)
    assert main(["sample", str(place / "r0"), "--backend", "mlx"]) == 2
    assert capsys.readouterr().err.startswith("skc sample: not enough memory: a request of")
