"""Running a program again: which losses are judged, how, and what the program may see. Budget: 6 s."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from core.submission.folder import SubmissionError, SubmissionFolder, read_folder
from core.submission.log_values import Log
from core.submission.reproduce import judge_losses, reproduce
from shared_tests.support.submissions import submitted, write_run

LOSSES = ((1, "6.931863"), (2, "6.929252"), (5, "6.926267"))
LOG = Log(
    "train_seed1.log", skc_log=1, seed=1, dtype="float32", device="CPU, 2 threads", ranks=1, backend="cuda",
    versions={"numpy": "2.0", "torch": "2.9"}, settings={"train": {"seconds": None}}, losses=LOSSES,
)  # fmt: skip


def again(**changes: object) -> Log:
    return dataclasses.replace(LOG, **changes)  # pyright: ignore[reportArgumentType]


def test_equal_digits_pass_and_one_other_digit_fails() -> None:
    assert judge_losses(LOG, again(), 5).verdict == "PASS"
    result = judge_losses(LOG, again(losses=(*LOSSES[:2], (5, "6.926268"))), 5)
    assert result.verdict == "FAIL" and result.rows[-1][:3] == (5, "6.926267", "6.926268")
    assert judge_losses(LOG, again(losses=(*LOSSES[:2], (5, "6.926268"))), 2).verdict == "PASS"  # beyond what was asked


def test_bfloat16_may_differ_by_two_hundredths() -> None:
    log = again(dtype="bfloat16")
    for loss, verdict in (("6.946", "PASS"), ("6.947", "FAIL")):
        assert judge_losses(log, again(dtype="bfloat16", losses=((5, loss),)), 5).verdict == verdict


@pytest.mark.parametrize(
    "changes",
    [{"device": "NVIDIA H100"}, {"device": "CPU, 8 threads"}, {"ranks": 8}, {"dtype": "bfloat16"},
     {"backend": "mlx"}, {"dtype": None}, {"versions": {"numpy": "2.0", "torch": "2.11"}}],
)  # fmt: skip
def test_on_another_machine_nothing_is_judged(changes: dict[str, object]) -> None:
    for losses in (LOSSES, ((5, "1.0"),)):
        result = judge_losses(LOG, again(losses=losses, **changes), 5)
        assert result.verdict == "NOT CHECKED" and result.rows and "not judged" in result.evidence


def test_under_a_schedule_of_the_clock_only_equality_is_judged() -> None:
    log = again(settings={"train": {"seconds": 600.0}})
    assert judge_losses(log, LOG, 5).verdict == "PASS"
    assert judge_losses(log, again(losses=((5, "6.9"),)), 5).verdict == "NOT CHECKED"


PROGRAM = (
    """
import json, os, sys, time


class Model:
    def forward(self, x):
        return x


print("skc_log: 1\\nbackend: cuda\\nranks: 1\\ndtype: float32")
print("device: CPU,", os.environ["OMP_NUM_THREADS"], "threads")
print('versions: {"numpy": "2.4.6", "torch": "2.9.1+cu128"}')
print("environment: " + json.dumps(sorted(os.environ)), flush=True)
LOSSES = [(1, 6.00022), (2, 6.00002), (1000, 5.80042)]
for step, loss in LOSSES:
    print(f"step:{step}/20000 train_loss:{loss:.6f}", flush=True)
    time.sleep(0.02)
# padding
"""
    + "# more\n" * 150
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SubmissionFolder:
    place = tmp_path_factory.mktemp("again")
    run = write_run(place / "runs", 42, PROGRAM.encode(), device="CPU, 2 threads", ranks=1, dtype="float32")
    return read_folder(submitted(place, (run,)).folder)


def changed(folder: SubmissionFolder, old: str, new: str) -> SubmissionFolder:
    assert folder.program is not None and old.encode() in folder.program
    return dataclasses.replace(folder, program=folder.program.replace(old.encode(), new.encode()))


def test_a_program_is_run_with_its_seed_and_judged(made: SubmissionFolder) -> None:
    result = reproduce(made, None, 2, None, 60.0)
    assert (result.verdict, result.seed) == ("PASS", 42) and [row[0] for row in result.rows] == [1, 2], result
    other = reproduce(changed(made, "6.00002", "6.00003"), 42, 2, None, 60.0)
    assert other.verdict == "NOT CHECKED"  # the run's schedule follows the clock
    assert other.rows[1][1:3] == ("6.000020", "6.000030")


def test_losses_that_a_program_writes_to_its_log_alone_are_read(made: SubmissionFolder) -> None:
    quiet = changed(made, "# padding", "time.sleep(300)")
    quiet = changed(
        quiet, 'print("skc_log', 'os.mkdir("logs")\nsys.stdout = open("logs/seed42.txt", "w")\nprint("skc_log'
    )
    result = reproduce(quiet, 42, 1000, None, 60.0)
    assert (result.verdict, len(result.rows)) == ("PASS", 3), result


def test_a_program_sees_its_settings_and_no_secret(
    made: SubmissionFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("ITERATIONS", "3")
    seen = tmp_path / "seen.json"
    spy = changed(made, "# padding", f"json.dump(dict(os.environ), open({str(seen)!r}, 'w'))\n")
    spy = changed(spy, "LOSSES = [", f"json.dump(dict(os.environ), open({str(seen)!r}, 'w'))\nLOSSES = [")
    reproduce(spy, 42, 2, str(tmp_path), 60.0)
    environment = json.loads(seen.read_text())
    assert environment["SEED"] == "42" and environment["RUN_ID"] == "seed42"
    assert environment["DATA_PATH"] == str(tmp_path) and environment["TOKENIZER_PATH"].endswith("tokenizer.model")
    assert not {"HF_TOKEN", "ITERATIONS", "PYTHONPATH"} & environment.keys()


def test_what_cannot_be_run_again_is_told(made: SubmissionFolder) -> None:
    cases = [
        (
            changed(made, "LOSSES = [", "sys.exit('no data here')\nLOSSES = ["),
            42,
            2,
            "ended before step 2.*no data here",
        ),
        (changed(made, "LOSSES = [", "time.sleep(60)\nLOSSES = ["), 42, 2, "did not come to that step in 2 s"),
        (made, 7, 2, "no log with losses of seed 7; logs of seeds: 42"),
        (dataclasses.replace(made, program=None), 42, 2, "no program to run"),
    ]
    for folder, seed, steps, words in cases:
        with pytest.raises(SubmissionError, match=words):
            reproduce(folder, seed, steps, None, 2.0)


def test_a_program_is_ended_after_its_step(made: SubmissionFolder, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    lasting = changed(made, "LOSSES = [", f"open({str(note)!r}, 'w').write(str(os.getpid()))\nLOSSES = [")
    lasting = changed(lasting, "# padding", "time.sleep(300)")
    assert reproduce(lasting, 42, 1000, None, 60.0).verdict in ("PASS", "NOT CHECKED")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
