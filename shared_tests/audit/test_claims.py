"""Recorded scores are held to what the audit finds: settings, windows, plug-ins, figures. Budget: 10 s.

The evaluations run in this process, with an engine of numpy (in_process.py).
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.audit.claims import check_reference
from core.training.run import Run, RunError, config_digest
from shared_tests.support import zoo_data
from shared_tests.support.in_process import BATCH, SEQ, Place, made, verdicts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with made(tmp_path_factory.mktemp("claims")) as here:
        yield here


@pytest.fixture(scope="module")
def truth(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The score that an audit gives."""
    return place.audit(tmp_path_factory.mktemp("truth")).isolated.value["score"]


def claimed(place: Place, folder: Path, score: dict[str, Any], seed: int = 1337, **evaluation: Any) -> Place:
    """Make a run that claims `score`, with other settings of its evaluation if there are any; return its place."""
    config = zoo_data.small(place.data)
    settings = dataclasses.replace(config.eval, **({"seq": SEQ, "batch": BATCH} | evaluation))
    config = dataclasses.replace(config, eval=settings, seed=seed)
    path = zoo_data.claimed_run(folder, config, zoo_data.half_weights(config), score)
    Run.open(path).log_path.write_text(f"settings sha256 {config_digest(config)}\n")
    Run.open(path).env_path.write_text(json.dumps({"backend": "numpy", "dtype": "float32"}))
    return Place(place.data, path)


OWN: dict[str, Any] = {"data": None, "seq": None, "batch": None}


def test_a_true_claim_passes(place: Place, truth: dict[str, Any], tmp_path: Path) -> None:
    for i, score in enumerate((truth, {**truth, "bpb": truth["bpb"] + 9e-6, "nats": truth["nats"] + 0.01})):
        found = claimed(place, tmp_path / f"run{i}", score).audit(tmp_path / "out", **OWN)
        assert found.ok and "at most 1e-05 apart" in verdicts(found, "PASS")["D16"], verdicts(found, "FAIL")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bpb": 3.0}, "recorded bpb 3.0, audited 3.8"),
        ({"loss": 3.0}, "recorded loss 3.0"),
        ({"nats": 3.0}, "nats 3.0"),
        ({"bpb_raw": None}, "bpb_raw None"),
        ({"windows": "sliding seq=32 stride=1"}, "recorded windows sliding seq=32 stride=1, audited plain"),
        ({"bytes": 9000}, "recorded bytes 9000"),
        ({"targets": 9000}, "recorded targets 9000"),
        ({"documents": 7}, "recorded documents 7"),
        ({"byte_rule": "raw"}, "recorded byte_rule raw"),
        ({"full": False}, "not of its own settings: full False, by config.json True"),
        ({"plugins": ["temperature"]}, "not of its own settings: plugins"),
    ],
)
def test_a_claim_that_the_audit_does_not_find_fails(
    place: Place, truth: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run = claimed(place, tmp_path / "run", truth | changes)
    failed = verdicts(run.audit(tmp_path / "out", **OWN), "FAIL")
    assert "D16" in failed and words in failed["D16"] and failed.keys() <= {"D13", "D16"}, failed


def test_a_log_of_other_settings_than_the_configuration(place: Place, truth: dict[str, Any], tmp_path: Path) -> None:
    run = claimed(place, tmp_path / "run", truth)
    path = Run.open(run.model).path / "config.json"
    settings = json.loads(path.read_text())
    settings["train"]["lr_matrix"] = 0.5
    path.write_text(json.dumps(settings))
    failed = verdicts(run.audit(tmp_path / "out", **OWN), "FAIL")
    assert failed.keys() == {"D16"} and "other settings than its config.json" in failed["D16"]


def test_a_number_that_is_none_is_no_claim(place: Place, truth: dict[str, Any], tmp_path: Path) -> None:
    run = claimed(place, tmp_path / "run", truth)
    path = Run.open(run.model).metrics_path
    for value in ("NaN", "1e400", "-Infinity"):
        path.write_text(path.read_text().replace(str(truth["bpb"]), value))
        with pytest.raises(RunError, match=r"metrics.jsonl:1"):
            run.audit(tmp_path / "out", **OWN)


def test_what_the_audit_scores_otherwise_is_not_compared(place: Place, truth: dict[str, Any], tmp_path: Path) -> None:
    wrong = truth | {"bpb": 3.0}
    others: list[tuple[dict[str, Any], str]] = [
        ({"windows": "sliding", "stride": 8}, "with --windows --stride the audit scores otherwise"),
        ({"seq": 16}, "with --seq the audit"),
        ({"tokens": 300}, "only a part of the text"),
        ({"plugins": ("temperature",)}, "with --plugins the audit"),
    ]
    run = claimed(place, tmp_path / "run", wrong)
    for i, (options, words) in enumerate(others):
        found = run.audit(tmp_path / f"out{i}", **(OWN | options))
        assert not verdicts(found, "FAIL") and words in verdicts(found, "NOT CHECKED")["D16"]
    estimate = claimed(place, tmp_path / "estimate", wrong | {"full": False, "label": "estimate"}, documents=4)
    found = estimate.audit(tmp_path / "estimated", **OWN)
    assert "an estimate from 4 documents" in verdicts(found, "NOT CHECKED")["D16"]
    found = claimed(place, tmp_path / "said", truth, documents=4).audit(tmp_path / "out", **OWN)
    assert "full True, by config.json False" in verdicts(found, "FAIL")["D16"]  # an estimate that says it is a score


def test_seeds_with_figures_that_cannot_be(place: Place, truth: dict[str, Any], tmp_path: Path) -> None:
    runs = [claimed(place, tmp_path / f"run{i}", truth, seed=i) for i in range(2)]
    runs.append(claimed(place, tmp_path / "run2", truth | {"loss": -1.0}, seed=2))
    options = OWN | {"seeds": tuple(run.model for run in runs[1:]), "reference": (4.0, 4.1)}
    found = check_reference(runs[0].plan(tmp_path / "out", **options))
    assert found.verdict == "FAIL" and "no numbers above 0" in found.evidence and "run2" in found.evidence
