"""Mutations of submission.json, audit.json and logs: verdicts and typed errors only. Budget: 8 s."""

import json
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from core.files import FileError
from core.submission.audits import audit_of
from core.submission.checks.answers import Checked
from core.submission.checks.fourteen import CHECKS
from core.submission.folder import MAX_ENTRIES, MAX_TEXT, SubmissionError, find_folder, parse_object, read_folder
from core.submission.log_values import FIELDS, MAX_LINES, parse_log
from core.submission.public_logs import read_log
from core.submission.unpack import MAX_UNPACKED, unpack_program
from core.training.run import RunError
from core.verbs.submit import _reference
from shared_tests.support.mutants import alter, edit, hostile, json_text
from shared_tests.support.submissions import submitted, write_runs

CASES = 80
SLOW = (9,)
"""Checks that start a process: the compiler's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    return submitted(place, write_runs(place / "runs")[:1]).folder


def look(folder: Path) -> None:
    """Ask every check but the slow ones: an answer is words and a verdict, whatever lies there."""
    subject = Checked(read_folder(folder), reference={"1": 1.1, "2": 1.2})
    for number, (_, ask) in enumerate(CHECKS, 1):
        if number not in SLOW:
            answer = ask(subject)
            assert answer.verdict in ("PASS", "FAIL", "NOT CHECKED")
            assert "\n" not in answer.words() and len(answer.words()) <= 4000


@pytest.mark.parametrize("name", ["submission.json", "audit.json"])
def test_mutated_json_is_never_a_crash(name: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / folder.name
    shutil.copytree(folder, place)
    whole = (folder / name).read_bytes()
    for case in range(CASES):
        rng = Random(f"{name} {case}")
        value = json.loads(whole)
        for _ in range(rng.randint(1, 3)):
            alter(rng, value)
        (place / name).write_bytes(json_text(rng, value) if rng.random() < 0.8 else edit(rng, whole))
        look(place)


def mutated_log(rng: Random, whole: bytes) -> bytes:
    """Return a log with lines changed as what they say, or in its bytes."""
    if rng.random() < 0.3:
        return edit(rng, whole)
    lines = whole.decode().split("\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        name, mark, text = lines[at].partition(": ")
        if name == "settings" and mark and rng.random() < 0.9:
            value = json.loads(text) if text.startswith("{") else {}
            alter(rng, value)
            lines[at] = f"settings: {json_text(rng, value).decode('utf-8', 'replace')}"
        elif rng.random() < 0.5:
            lines[at] = f"{rng.choice([name, *FIELDS])}: {json.dumps(hostile(rng))[:5000]}"
        else:
            lines.insert(at, lines[rng.randrange(len(lines))])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_mutated_logs_are_never_a_crash(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / folder.name
    shutil.copytree(folder, place)
    whole = (folder / "train_seed42.log").read_bytes()
    seen = 0
    for case in range(2 * CASES):
        (place / "train_seed42.log").write_bytes(mutated_log(Random(f"log {case}"), whole))
        seen += bool(read_folder(place).problems)
        look(place)
    assert seen < CASES, "most mutants must be read, or nothing was tried"


def test_a_known_line_with_a_bad_value_is_a_problem_and_counts_for_nothing() -> None:
    for name in FIELDS:
        log = parse_log("a.log", ["skc_log: 1", f"{name}: \x00", f"unknown: {name}"])
        assert len(log.problems) == (0 if FIELDS[name].__name__ == "read_words" else 1), (name, log.problems)
        assert getattr(log, name) is None or FIELDS[name].__name__ == "read_words" or name == "skc_log"
    twice = parse_log("a.log", ["skc_log: 1", "seed: 1", "seed: 2"])
    assert twice.seed == 1 and "an earlier line says 1" in twice.problems[0]
    assert parse_log("a.log", ["step:3/9 train_loss:nan"]).problems


def test_long_files_take_no_longer_than_their_lengths(folder: Path, tmp_path: Path) -> None:
    """Ten megabytes of newlines once took minutes. Processor time, of a place with 200,000 of them in every file."""
    place = tmp_path / folder.name
    shutil.copytree(folder, place)
    for name in ("README.md", "train_gpt.py"):
        (place / name).write_text("\n" * 200_000 + " " * 200_000)
    (place / "train_seed42.log").write_text("\n" * (MAX_LINES + 1))
    began = time.process_time()
    look(place)
    assert time.process_time() - began < 10
    assert any(f"expected at most {MAX_LINES:,}" in problem for problem in read_folder(place).problems)
    (place / "README.md").write_text("a" * (MAX_TEXT + 1))
    assert any("README.md" in problem for problem in read_folder(place).problems)
    for i in range(4):
        (place / f"{i}.bin").write_bytes(bytes(9_000_000))
    assert CHECKS[12][1](Checked(read_folder(place))).verdict == "NOT CHECKED"


def test_links_are_named_and_never_followed(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / folder.name
    shutil.copytree(folder, place)
    outside = tmp_path / "outside.log"
    shutil.copy(place / "train_seed42.log", outside)
    for name in ("train_seed42.log", "submission.json", "README.md", "train_gpt.py"):
        (place / name).unlink()
        (place / name).symlink_to(outside)
    (place / "deep").symlink_to("/")
    found = read_folder(place)
    assert not found.logs and found.submission is None and found.readme is None and found.program is None
    assert {entry.name for entry in found.entries if entry.kind == "link"} >= {"deep", "train_gpt.py"}
    with pytest.raises(FileError):
        read_log(place / "train_seed42.log")


def test_a_folder_of_too_much_is_named(tmp_path: Path) -> None:
    for i in range(MAX_ENTRIES + 5):
        (tmp_path / f"{i}.py").touch()
    found = read_folder(tmp_path)
    assert len(found.entries) == MAX_ENTRIES and "names: this is no submission folder" in found.problems[0]


def test_a_program_that_unpacks_to_too_much_is_bounded() -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__main__.py", b"#" * (MAX_UNPACKED + 1))
    assert unpack_program(buffer.getvalue()).problems == (f"unpacks to over {MAX_UNPACKED:,} bytes",)
    assert unpack_program(buffer.getvalue()[:-30]).problems or not unpack_program(buffer.getvalue()[:-30]).texts


@pytest.mark.parametrize("packer", ["lzma", "raw", "zlib", "seams", "bz2"])
def test_a_packed_program_is_read_and_never_run(packer: str) -> None:
    import base64
    import bz2
    import lzma
    import zlib

    source = "import sys\nsys.exit('was run')\ndef forward():\n    pass\n" + "\n".join(
        f"a{i} = {i * i}" for i in range(200)
    )
    raw = [{"id": lzma.FILTER_LZMA2}]
    if packer == "bz2":
        source += "\0core.name\0def second(): pass"
        data = bz2.compress(source.encode())
    elif packer == "raw":
        data = lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=raw)
    else:
        data = zlib.compress(source.encode()) if packer == "zlib" else lzma.compress(source.encode())
    text = base64.b85encode(data).decode()
    if packer == "seams":
        text = '""'.join(text[i : i + 90] for i in range(0, len(text), 90))
    found = unpack_program(f'import x\nexec(x.decode("{text}"))\n'.encode())
    assert found.form == "packed text" and found.texts[1:] == tuple(source.split("\0"))


def test_references_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    for text in ('{"1": "a"}', '{"1": -1}', '{"1": 1e400}', "[1, 2]", '{"1": 1, "1": 2}', "{", '{"seeds": [1]}'):
        path.write_text(text)
        with pytest.raises((SubmissionError, FileError)):
            _reference(path)
    path.write_text(
        '{"seed_results": {"1": {"val_loss": 2.5, "val_bpb": 1.1}, "2": {"val_loss": 2.6, "val_bpb": 1.2}}}'
    )
    assert _reference(path) == ({"1": 2.5, "2": 2.6}, "loss")


def test_a_damaged_audit_of_a_run_is_one_typed_error(tmp_path: Path) -> None:
    run = write_runs(tmp_path)[0]
    path = run.path / "audit" / "audit.json"
    whole = json.loads(path.read_text())
    for case in range(60):
        rng = Random(case)
        value = json.loads(json.dumps(whole))
        alter(rng, value)
        path.write_bytes(json_text(rng, value))
        try:
            audit_of(run, [run])
        except (SubmissionError, RunError) as error:
            assert str(path) in str(error)


def test_keys_that_are_twice_are_told() -> None:
    assert parse_object("a", '{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}') == ({"a": 3, "b": {"c": 2}}, ("c", "a"))


def test_the_one_folder_below_a_place_is_meant(folder: Path, tmp_path: Path) -> None:
    assert find_folder(folder.parents[2]) == folder and find_folder(folder) == folder
    with pytest.raises(SubmissionError, match="no such folder"):
        find_folder(tmp_path / "none")
