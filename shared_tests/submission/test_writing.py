"""The folder that is written: its figures, its track, what is refused, and nothing private in it. Budget: 6 s."""

import getpass
import json
import re
import socket
import statistics
import sys
import types
from pathlib import Path

import pytest

from core.submission import writing
from core.submission.checks.form import secrets_in
from core.submission.folder import SubmissionError
from core.submission.public_logs import read_log
from shared_tests.support.submissions import ABOUT, PROGRAM, SEEDS, submitted, write_audit, write_run, write_runs


def test_every_figure_is_that_of_the_records(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    written = submitted(tmp_path, runs)
    value = json.loads((written.folder / "submission.json").read_text())
    bpb = [run.last("final/artifact")["score"]["bpb"] for run in runs]
    assert value["val_bpb"] == round(statistics.fmean(round(b, 8) for b in bpb), 8)
    assert value["val_bpb_std"] == round(statistics.stdev(round(b, 8) for b in bpb), 8)
    assert value["bytes_total"] == max(run.artifact_path.stat().st_size for run in runs) + len(PROGRAM)
    assert value["seed_results"]["42"]["train_time_s"] == runs[0].last("clock/stopped")
    assert value["seeds"] == list(SEEDS) and value["hardware"] == "8xH100 80GB HBM3"
    assert (written.folder / "train_gpt.py").read_bytes() == PROGRAM
    for run, artifact in zip(runs, written.artifacts, strict=True):
        assert artifact.read_bytes() == run.artifact_path.read_bytes()
    log = read_log(written.folder / "train_seed42.log")
    assert (log.parameters, log.stop_step, log.losses[0]) == (32_900, 4790, (1, "6.000220")) and not log.problems


def test_an_artifact_that_was_not_scored_is_refused(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    runs[1].artifact_path.unlink()
    runs[1].artifact_path.symlink_to(secret)
    with pytest.raises(SubmissionError, match="15 bytes, but the run scored an artifact of 10,243"):
        submitted(tmp_path, runs)
    assert not (tmp_path / "out").exists()


def test_a_checkouts_runs_go_to_the_other_track_with_the_program_packed_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pack(config: object, backend: str, form: str) -> bytes:
        asked.append((config, backend, form))
        return PROGRAM

    packer = types.ModuleType("core.submission.pack")
    packer.__dict__["pack_program"] = pack
    monkeypatch.setitem(sys.modules, packer.__name__, packer)
    runs = write_runs(tmp_path / "runs", program=None)
    written = submitted(tmp_path, runs, form="zip")
    assert asked == [(runs[0].config, "cuda", "zip")]
    assert written.track == "non_record_16mb" and written.folder.parent.name == "track_non_record_16mb"
    assert written.why == ("the runs were made by a checkout, not by the program in this folder",)
    readme = (written.folder / "README.md").read_text()
    assert "made by a checkout" in readme and "did not make them" in readme


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"ranks": 2}, "ran on 2 x NVIDIA H100"), ({"device": "CPU, 2 threads"}, "ran on 8 x CPU, 2 threads")],
)
def test_what_does_not_hold_decides_the_track(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    written = submitted(tmp_path, write_runs(tmp_path / "runs", **changes))
    assert written.track == "non_record_16mb" and words in written.why[0]
    assert words in (written.folder / "README.md").read_text()


def test_two_seeds_are_no_record(tmp_path: Path) -> None:
    written = submitted(tmp_path, write_runs(tmp_path / "runs")[:2])
    value = json.loads((written.folder / "submission.json").read_text())
    assert written.why == ("2 seeds, the track asks for 3",) and value["compliance"]["three_seeds"] is False


def test_compliance_follows_the_audits_verdicts(tmp_path: Path) -> None:
    runs = tuple(write_run(tmp_path / "runs", seed) for seed in SEEDS)
    for run in runs[:2]:
        write_audit(run, D9="FAIL", D16="NOT CHECKED")
    written = submitted(tmp_path, runs)
    value = json.loads((written.folder / "submission.json").read_text())
    assert value["compliance"] == {"score_first_ttt": False}  # of the others, seed 999 has no audit
    readme = (written.folder / "README.md").read_text()
    assert "NOT CHECKED, and so not claimed: train_under_600s, artifact_under_16mb" in readme
    assert "Seed 999: it was not audited" in readme


def test_an_audit_of_another_artifact_does_not_count(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    (runs[0].path / "artifact.skc").write_bytes(b"x" * 10_242)
    written = submitted(tmp_path, runs)
    assert json.loads((written.folder / "submission.json").read_text())["compliance"] == {"three_seeds": True}
    assert "Seed 42: its audit was of another artifact" in (written.folder / "legality.md").read_text()


def test_no_path_user_or_machine_is_in_what_is_written(tmp_path: Path) -> None:
    """Audits, logs and environments name places of this machine: none of them may come through."""
    runs = write_runs(tmp_path / "runs", command=f"{tmp_path}/train_gpt.py", notes=[f"kernels in {tmp_path}"])
    written = submitted(tmp_path, runs)
    names = [str(tmp_path), tmp_path.name, str(Path.home()), socket.gethostname()]
    names += [getpass.getuser()] if getpass.getuser() != "root" else []
    for file in written.folder.iterdir():
        if file.name == "tokenizer.model":
            continue
        text = file.read_text()
        assert not [name for name in names if len(name) > 3 and name in text], file.name
        assert not re.search(r"/(tmp|home|root|work|Users|var)/", text), file.name
    legality = (written.folder / "legality.md").read_text()
    assert "looked at the run of seed 42/artifact.skc and shard.bin" in legality


def test_a_secret_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = PROGRAM + b'TOKEN = "hf_' + b"a" * 34 + b'"\n'
    runs = write_runs(tmp_path / "runs", program=program)
    with pytest.raises(SubmissionError, match="train_gpt.py: line 49 has a Hugging Face token") as raised:
        submitted(tmp_path, runs)
    assert "hf_" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["see /home/ann/runs", "C:\\Users\\ann", "key ghp_" + "a" * 36, "AKIA" + "A" * 16, "https://ann:pass@host.org/x",
     "WANDB_API_KEY=" + "0" * 40, "-----BEGIN RSA PRIVATE KEY-----", "(env) ann@box7:~/runs$ python train_gpt.py",
     "10.0.0.5:29500"],
)  # fmt: skip
def test_what_must_not_be_sent_is_found(text: str) -> None:
    assert secrets_in(f"first line\n{text}\n")


@pytest.mark.parametrize(
    "text", ["seeds 1/2/3 of /dev/null", "an email@address.org", "tokens: 1.0.0.5", "sk-learn", "api_key", "homes/x"]
)
def test_plain_words_are_no_secrets(text: str) -> None:
    assert not secrets_in(text)


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    written = submitted(tmp_path, runs)
    (written.folder / "README.md").write_text("mine")
    with pytest.raises(SubmissionError, match="is there already"):
        submitted(tmp_path, runs)
    assert (written.folder / "README.md").read_text() == "mine"
    submitted(tmp_path, runs, replace=True)
    assert (written.folder / "README.md").read_text().startswith("# Small & packed")
    (written.folder / "submission.json").unlink()
    with pytest.raises(SubmissionError, match="holds no submission"):
        submitted(tmp_path, runs, replace=True)


def test_runs_that_are_no_submission_are_refused(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    again = write_run(tmp_path / "more", 42)
    other = write_run(tmp_path / "others", 7, program=PROGRAM + b"# changed\n")
    for given, words in (
        ((), "no run"),
        ((runs[0], again), "two runs of one seed"),
        ((*runs, other), "different prog"),
    ):
        with pytest.raises(SubmissionError, match=words):
            submitted(tmp_path, given)
    with pytest.raises(SubmissionError, match="no letter or digit"):
        submitted(tmp_path, runs, about=ABOUT._replace(name="!?"))
    (runs[0].path / "train_gpt.py").write_bytes(PROGRAM + b"# changed\n")
    with pytest.raises(SubmissionError, match="the runs were made by the program"):
        submitted(tmp_path, runs, program=runs[0].path / "train_gpt.py")
    assert submitted(tmp_path, runs, program=runs[1].path / "train_gpt.py").track == writing.TRACKS[0]
