"""The fourteen checks: one good folder that passes all, and one broken folder for each check. Budget: 6 s."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.submission.checks.answers import Checked, SubmissionCheck
from core.submission.checks.fourteen import CHECKS, run_checks
from core.submission.folder import read_folder
from shared_tests.support.submissions import PROGRAM, SEEDS, submitted

REFERENCE = {"1": 1.0885, "2": 1.0887, "3": 1.0889}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of three good runs; its artifacts lie three folders up."""
    return submitted(tmp_path_factory.mktemp("good")).folder


def artifact_of(folder: Path) -> Path:
    return folder.parents[2] / f"{folder.name}_seed42.skc"


def checked(
    folder: Path, artifact: Path | None = None, reference: dict[str, float] | None = None
) -> dict[int, SubmissionCheck]:
    return {check.number: check for check in run_checks(Checked(read_folder(folder), artifact, reference or REFERENCE))}


def test_the_good_folder_passes_every_check(good: Path) -> None:
    checks = checked(good, artifact_of(good))
    assert {number: check.verdict for number, check in checks.items()} == dict.fromkeys(range(1, 15), "PASS"), checks
    assert good.parent.name == "track_10min_16mb" and good.name == "2026-04-30_Small_packed"
    assert checks[11].evidence.startswith("lower by 0.0")


def test_what_was_not_given_is_not_checked(good: Path) -> None:
    answer = CHECKS[10][1](Checked(read_folder(good)))
    assert (answer.verdict, answer.words()) == ("NOT CHECKED", "give the reference's scores with --against FILE")


def edit(folder: Path, name: str, change: Callable[[str], str]) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(change(text))
    assert (folder / name).read_text() != text, f"{name}: nothing was broken"


def fields(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "submission.json") -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, name, lambda text: text.replace(old, new))


def put(path: str, value: Any, name: str = "submission.json") -> Callable[[Path], None]:
    """Return what gives a field of a JSON file another value."""

    def change(whole: dict[str, Any]) -> None:
        *outer, last = path.split("/")
        for key in outer:
            whole = whole[key]
        whole[last] = value

    return lambda folder: fields(folder, change, name)


def all_logs(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for seed in SEEDS:
            edit(folder, f"train_seed{seed}.log", lambda text: text.replace(old, new))

    return change


def link(folder: Path) -> None:
    (folder / "extra").symlink_to("/etc/hostname")


def renamed(folder: Path) -> None:
    (folder / "train_seed42.log").rename(folder / "train_42.txt")


def big(folder: Path) -> None:
    with open(folder / "weights.bin", "wb") as file:
        file.truncate(10_000_001)


def twice(folder: Path) -> None:
    edit(folder, "submission.json", lambda text: text.replace('"author"', '"author": "B", "author"', 1))


def over(folder: Path) -> None:
    """One seed of three is over the limit, as #401's seed 42 was inside the mean of three."""
    edit(folder, "train_seed42.log", lambda text: text.replace("artifact_bytes: 10242", "artifact_bytes: 16059704"))


def stub(folder: Path) -> None:
    (folder / "train_gpt.py").write_bytes(b'exec(open("solution.py").read())')


def no_model(folder: Path) -> None:
    (folder / "train_gpt.py").write_bytes(b"value = 1\n" * 500)


def another_program(folder: Path) -> None:
    (folder / "train_gpt.py").write_bytes(PROGRAM.replace(b"SETTING_1", b"SETTING_X"))


def cased(size: int) -> Callable[[Path], None]:
    """Return what makes all logs those of a text with case operators, over so many bytes."""

    def change(folder: Path) -> None:
        all_logs("transform: none", "transform: caseops")(folder)
        all_logs("val_bytes: 151077600", f"val_bytes: {size}")(folder)

    return change


def many(folder: Path) -> None:
    """A key is twice among more keys than anyone compares in pairs."""
    spare = ", ".join(f'"k{i}": 0' for i in range(1100))
    edit(folder, "submission.json", lambda text: text.replace('"author"', f'{spare}, "author": "B", "author"', 1))


def swapped(folder: Path) -> None:
    first, second = folder / "train_seed42.log", folder / "train_seed314.log"
    texts = first.read_bytes(), second.read_bytes()
    second.write_bytes(texts[0])
    first.write_bytes(texts[1])


def deep(folder: Path) -> None:
    place = folder.joinpath(*"abcdefg")
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(b"x")


def zipped(folder: Path) -> None:
    """A zip whose first source has a token."""
    with zipfile.ZipFile(folder / "train_gpt.py", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("__main__.py", PROGRAM.decode() + f"TOKEN = 'hf_{'a' * 30}'\n")


def found(rule: str, verdict: str) -> Callable[[Path], None]:
    """Return what gives a rule another verdict in one seed's audit."""

    def change(whole: dict[str, Any]) -> None:
        for finding in whole["audits"]["42"]["findings"]:
            finding["verdict"] = verdict if finding["rule"] == rule else finding["verdict"]

    return lambda folder: fields(folder, change, "audit.json")


BROKEN: list[tuple[int, Callable[[Path], object], str]] = [
    (1, link, "extra: is a link"),
    (1, renamed, "expected train_seed<N>.log"),
    (1, big, "weights.bin: 10,000,001 bytes"),
    (1, lambda folder: (folder / "README.md").unlink(), "no README.md"),
    (1, swapped, "train_seed42.log: is the log of seed 314"),
    (1, deep, "a/b/c/d/e: lies below 4 folders"),
    (2, twice, "key 'author' is there twice"),
    (2, many, "key 'author' is there twice"),
    (2, put("date", "2026-02-30"), "date: '2026-02-30'"),
    (2, put("val_bpb", None), "val_bpb: null"),
    (2, put("seeds", [42, 42, 999]), "a seed is there twice"),
    (2, put("seeds", {"42": {}, "314": {}, "999": {}}), "seeds is an object"),
    (2, put("github_id", "@awriter"), "without @"),
    (2, put("compliance/train_under_600s", False), "compliance.train_under_600s is false"),
    (2, lambda folder: (folder / "train_seed42.log").unlink(), "logs of 2 seeds"),
    (3, put("seed_results/42/artifact_bytes", 10_241), "seed 42: artifact_bytes 10241, train_seed42.log says 10242"),
    (3, put("seed_results/42/val_bpb", 1.08004299), "seed 42: val_bpb 1.08004299"),
    (3, put("val_bpb", 1.080042), "which is one seed's alone"),
    (3, put("val_bpb_std", 0.0001), "val_bpb_std"),
    (3, put("bytes_total", 10_000), "bytes_total 10,000, by the logs"),
    (3, put("artifact_bytes_max", 10_000), "artifact_bytes_max 10000, by the logs"),
    (3, put("artifact_bytes_mean", 10_000), "artifact_bytes_mean 10000, by the logs"),
    (3, put("step_stop", 5_000), "step_stop 5000, by the logs"),
    (3, put("seed_results/42/pre_ttt_val_bpb", 1.09), "seed 42: pre_ttt_val_bpb 1.09"),
    (3, replaced("train_seed42.log", "stop_step: 4790", "stop_step: nan"), "stop_step: 'nan', expected a whole number"),
    (3, put("hardware", "8xA100"), "hardware '8xA100', train_seed42.log says '8xH100 80GB HBM3'"),
    (3, put("pytorch_version", "2.9.0"), "pytorch_version '2.9.0', train_seed42.log says '2.9.1+cu128'"),
    (3, all_logs("skc_log: 1", "skc_log: 2"), "skc_log: version 2, only 1 is known here"),
    (4, over, "seed 42: 16,0"),
    (4, replaced("README.md", "## Results", "The artifact has 15.9 MiB.\n\n## Results"), "in MiB"),
    (5, all_logs("parameters: 32900", "parameters: 32901"), "its settings have 32,900"),
    (5, put("model_params", 30_000), "model_params 30,000"),
    (6, replaced("README.md", "train.seconds = 600.0", "train.seconds = 590.0"), "train.seconds = 590.0"),
    (6, replaced("README.md", "## Training", "A cosine schedule.\n\n## Training"), "claims cosine"),
    (7, all_logs("closed_seconds: 595.500", "closed_seconds: 603.100"), "calibration ended at 603.1 s"),
    (7, all_logs("eval_strict_seconds: 121", "eval_strict_seconds: 670"), "strictly"),
    (7, all_logs("ranks: 8", "ranks: 1"), "the track's times are of 8 H100"),
    (8, all_logs("val_documents: 50000", "val_documents: 10000"), "documents 10,000 (published: 50,000)"),
    (8, all_logs("val_full: true", "val_full: false"), "an estimate of 50,000 documents"),
    (9, stub, "32 bytes, a stub"),
    (9, lambda folder: (folder / "train_gpt.py").write_bytes(b""), "is empty"),
    (9, no_model, "no model in it"),
    (9, another_program, "was made by another program"),
    (9, lambda folder: (folder / "train_gpt.py").write_bytes(PROGRAM + b"def ("), "does not compile"),
    (9, put("bytes_code", 1_000), "bytes_code 1,000"),
    (10, replaced("train_seed42.log", '"dim": 32', '"dim": 48'), "config_sha256 is not that of its settings"),
    (11, lambda folder: None, "needed p < 0.01"),
    (12, lambda folder: (folder / "audit.json").unlink(), "no audit.json"),
    (12, put("artifacts/42/sha256", "0" * 64, "audit.json"), "audit.json: seed 42: sha256 000000"),
    (12, put("code/sha256", "0" * 64, "audit.json"), "audit.json: code is not train_gpt.py"),
    (12, found("D2", "FAIL"), "compliance.train_under_600s is true, by the findings of audit.json false"),
    (12, found("D9", "NOT CHECKED"), "compliance.score_first_ttt is true, by the findings of audit.json not checked"),
    (12, put("audits", {}, "audit.json"), "compliance.no_slot is true, by the findings of audit.json not checked"),
    (13, zipped, "a Hugging Face token"),
    (13, lambda folder: (folder / "bpe.model").write_bytes(b"\0\1/home/somebody/text.txt\2"), "has a home folder"),
    (13, lambda folder: (folder / "notes.txt").write_text("hf_" + "a" * 30, "utf-16"), "a Hugging Face token"),
    (13, replaced("README.md", "## Results", "See /home/somebody/runs.\n\n## Results"), "line 7 has a home folder"),
    (13, replaced("legality.md", "# What", "hf_" + "a" * 30 + "\n# What"), "a Hugging Face token"),
    (14, cased(162_000_000), "are operators charged?"),
]  # fmt: skip
"""(check, what breaks it, a part of what it says)."""


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_a_broken_folder_fails_its_check(case: int, good: Path, tmp_path: Path) -> None:
    number, breaks, words = BROKEN[case]
    folder = tmp_path / "records" / good.parent.name / good.name
    shutil.copytree(good, folder)
    breaks(folder)
    reference = {"1": 1.0801, "2": 1.0802, "3": 1.0803} if number == 11 else None
    answer = CHECKS[number - 1][1](Checked(read_folder(folder), artifact_of(good), reference or REFERENCE))
    assert answer.verdict == "FAIL" and words in answer.words(), answer


def test_every_check_has_a_broken_folder() -> None:
    assert {number for number, _, _ in BROKEN} == set(range(1, len(CHECKS) + 1))


def test_an_artifact_that_is_not_the_named_one_fails(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.skc"
    other.write_bytes(b"other")
    answer = CHECKS[11][1](Checked(read_folder(good), other))
    assert answer.verdict == "FAIL" and "other.skc: sha256" in answer.words()


def test_case_operators_are_not_checked_without_an_audit(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / good.name
    shutil.copytree(good, folder)
    cased(151_075_000)(folder)
    fields(folder, lambda value: value.update(audits={}), "audit.json")
    assert CHECKS[13][1](Checked(read_folder(folder))).verdict == "NOT CHECKED"
