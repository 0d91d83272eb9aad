"""Cheats that the auditor must catch by the rule that they break, and honest near-misses. Budget: 60 s.

Every case is a whole `skc audit`, in two to four processes with a framework in them: three of them here, all with
`scripts/test --long`. What needs no process of its own is in test_zoo_predictions.py and test_audit_texts.py, by rule.
"""

import json
import os
import py_compile
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from core.audit.rules import RULES
from core.audit.watch import answer, file_kinds, verdicts
from core.audit.watch.strace import STRACE
from core.cli import main
from core.data.dataset import open_dataset
from shared_tests.support import zoo, zoo_data
from shared_tests.support.harness import engine, working_weights


class Zoo(NamedTuple):
    """What the cases share."""

    folder: Path
    data: str
    model: str


class Seen(NamedTuple):
    """What an audit said."""

    failed: dict[str, str]
    """Broken rule -> evidence."""
    value: dict[str, Any]
    report: str


Audit = Callable[..., Seen]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A text of 4,141 tokens in 8 documents, 18,626 to train on, and the artifact of a random model."""
    folder = tmp_path_factory.mktemp("zoo")
    data = zoo_data.write_data(folder, zoo_data.novels("train", 30, 1500), zoo_data.novels("val", 8, 1200))
    config = zoo_data.small(data)
    return Zoo(folder, data, zoo_data.write_model(folder / "model.skc", config, zoo_data.half_weights(config)))


@pytest.fixture
def audit(place: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Audit a model and return what failed; the exit code, audit.json and legality.md must say the same."""
    monkeypatch.setenv("PATH", zoo_data.programs(tmp_path / "bin"))
    zoo_data.write_place(tmp_path / "place", DATA=place.data, AUDITOR=os.getpid())
    monkeypatch.syspath_prepend(tmp_path / "place")

    def run(*options: str, model: str = place.model, data: str = place.data, backend: str = "mlx") -> Seen:
        out = tmp_path / "audit"
        settings = ["--data", data, "--seq", "64", "--batch", "4", "--flips", "2", "--backend", backend]
        settings += ["--out", str(out)]
        code = main(["audit", model, *settings, *options])
        value, report = json.loads((out / "audit.json").read_text()), (out / "legality.md").read_text()
        assert {f["rule"] for f in value["findings"]} == RULES.keys()
        failed = {f["rule"]: f["evidence"] for f in value["findings"] if f["verdict"] == "FAIL"}
        assert code == (1 if failed or value["error"] else 0)
        assert set(re.findall(r"^\| (D\d+) \|.* \*\*FAIL\*\* \|", report, re.MULTILINE)) == failed.keys()
        return Seen(failed, value, report)

    return run


def named(*plugins: str) -> list[str]:
    return ["--plugins", *(name if name == "temperature" else f"shared_tests.support.zoo:{name}" for name in plugins)]


SHORT = ("Oracle", "Starter", "Neighbour")
"""Animals that the short run audits whole: what is read, started and looked into (an honest run: test_audit.py)."""


def whole(name: str) -> Any:
    """Return an animal as a parameter of a test; others than SHORT are marked long."""
    return pytest.param(name, marks=() if name in SHORT else pytest.mark.long)


CHEATS = {
    "Borrower": ("mlx", {"D9": "were not scored so"}),
    "Bypass": ("cuda", {"D7": "that is no rounding.*scored again in a fresh process with"}),
    "Oracle": ("mlx", {"D4": "opened the real one", "D7": "could not score the changed text"}),
    "Searcher": ("mlx", {"D7": "scored again in a fresh process with"}),
    "FirstOnly": ("mlx", {"D7": "scored again in a fresh process with|random tokens", "D12": "broken: D7"}),
    "TrainShard": ("mlx", {"D4": "training data: .*train_000000.bin"}),
    "TrainMap": ("mlx", {"D4": "training data: .*train_000000.bin"}),
    "Phone": ("mlx", {"D4": f"network: .*{zoo.PORT}"}),
    "Starter": ("mlx", {"D18": "foreign programs were executed: .*true"}),
}
"""Plug-in -> backend, and what breaks with the words that say so: these rules and no other."""


@pytest.mark.parametrize("name", [whole(name) for name in CHEATS])
def test_a_cheat_fails_by_its_rule(audit: Audit, name: str) -> None:
    backend, broken = CHEATS[name]
    seen = audit(*named(name), backend=backend)
    assert seen.failed.keys() == broken.keys(), seen.failed
    for rule, words in broken.items():
        assert re.search(words, seen.failed[rule]), seen.failed[rule]
    assert seen.value["error"] is None


FILES = {
    "DistInfo": {"D4": "not through the opener: .*numpy-2.0.dist-info/table.bin"},
    "SystemFile": {"D4": "not the system's: .*table.bin"},
    "Neighbour": {"D4": "another process: process_vm_readv"},
}
"""Cheats by files and processes, as above."""


@pytest.mark.parametrize("name", [whole(name) for name in FILES])
def test_what_is_read_past_the_opener_is_named(
    audit: Audit, place: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    table, system = Path(place.data) / "numpy-2.0.dist-info" / "table.bin", tmp_path / "usr" / "table.bin"
    for path in (table, system):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
    monkeypatch.setattr(file_kinds, "SYSTEM", (*file_kinds.SYSTEM, os.path.realpath(system.parent)))
    monkeypatch.setattr(verdicts, "SYSTEM", file_kinds.SYSTEM)
    zoo_data.write_place(tmp_path / "place", DATA=place.data, AUDITOR=os.getpid(), SYSTEM=str(system))
    seen = audit("--tokens", "700", *named(name))
    assert seen.failed.keys() == FILES[name].keys(), seen.failed
    for rule, words in FILES[name].items():
        assert re.search(words, seen.failed[rule]), seen.failed[rule]


@pytest.mark.long
def test_a_file_that_one_process_leaves_for_the_next_is_named(audit: Audit, place: Zoo) -> None:
    try:
        seen = audit("--tokens", "700", *named("Stash"))
    finally:
        (Path(place.data) / "stash.bin").unlink()
    assert "may have left for this process: " in seen.failed["D4"], seen.failed


@pytest.mark.long
def test_a_text_in_the_environment_does_not_arrive(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKC_ZOO_TEXT", "a text")
    seen = audit("--tokens", "700", *named("Variable"))
    assert seen.value["error"]["kind"] == "builtins.KeyError" and not seen.value["evaluation"]


@pytest.mark.long
def test_a_compiled_module_beside_its_source_is_not_read(audit: Audit, tmp_path: Path) -> None:
    source = tmp_path / "place" / "zoo_compiled.py"
    source.write_text("VALUE = 'a cheat'")
    compiled = source.parent / "__pycache__" / f"zoo_compiled.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(source), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text("VALUE = 'honest'")
    seen = audit("--tokens", "700", *named("Compiled"))
    assert not seen.failed and seen.value["error"] is None
    assert any(f["path"] == os.path.realpath(source) for f in seen.value["isolation"]["files"])


@pytest.mark.long
def test_a_copy_that_never_ends_keeps_no_audit_waiting(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "GRACE", 0.1)
    seen = audit("--tokens", "700", *named("Forker"))
    assert not seen.failed and seen.value["error"] is None


@pytest.mark.long
def test_a_killed_evaluation_breaks_no_rule_by_its_death(audit: Audit) -> None:
    seen = audit(*named("Killed"))
    assert seen.value["error"]["kind"] == answer.DIED
    assert not seen.failed.keys() & {"D4", "D18"}, seen.failed


HONEST = {
    "stateful cache": ("--backend", "cuda", "--windows", "stateful", *named("HonestCache")),
    "documents temperature": ("--windows", "documents", "--stride", "32", *named("temperature")),
    "plain training": ("--backend", "cuda", *named("HonestTraining")),
    "sliding training": ("--windows", "sliding", "--stride", "16", *named("HonestTraining")),
}
"""Others are in test_zoo_predictions.py."""


@pytest.mark.parametrize("name", [whole(name) for name in HONEST])
def test_an_honest_near_miss_breaks_nothing(audit: Audit, name: str) -> None:
    seen = audit(*HONEST[name])
    assert not seen.failed and seen.value["error"] is None
    verdicts = [(f["rule"], f["verdict"]) for f in seen.value["findings"]]
    passed = {"D1", "D3", "D4", "D5", "D6", "D7", "D8", "D9", "D10", "D12", "D13", "D14", "D18"}
    assert passed <= {rule for rule, verdict in verdicts if verdict == "PASS"}, verdicts
    versions = seen.value["evaluation"]["ledger"]["versions"]
    assert versions == 17 if name == "plain training" else versions == 1 or "training" in name


@pytest.mark.long
@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_adapters_with_a_warm_a_and_a_temperature_break_nothing(audit: Audit, backend: str) -> None:
    adapt = ("kind lora", "chunk 32", "rank 2", "lr 0.01", "documents 4", "warm-a True")
    options = [part for setting in adapt for part in f"--eval.adapt.{setting}".split()]
    seen = audit("--windows", "documents", *options, *named("temperature"), backend=backend)
    assert not seen.failed and seen.value["error"] is None
    assert seen.value["evaluation"]["flips"]["documents"] > 0
    assert "while it was scored there learned: lora rank=2" in seen.report


@pytest.mark.long
def test_recurrent_layers_with_a_cache_break_nothing(audit: Audit, place: Zoo) -> None:
    config = zoo_data.small(place.data, "skc_mac")
    stored = engine("mlx", config, working_weights(config.model, 2.0)).quantised()
    model = zoo_data.write_model(place.folder / "skc.skc", config, stored)
    seen = audit("--windows", "stateful", *named("HonestCache", "temperature"), model=model)
    assert not seen.failed and seen.value["error"] is None
    assert seen.value["evaluation"]["flips"]["noticed"] > 100 and not seen.value["evaluation"]["flips"]["wrong"]


@pytest.mark.long
@pytest.mark.parametrize("watch", ["all", "no strace"])
def test_a_native_open_is_seen_or_reads_nothing(audit: Audit, tmp_path: Path, watch: str) -> None:
    if watch == "no strace":
        os.remove(tmp_path / "bin" / "strace")
    seen = audit(*named("TrainNative"))
    force, missing = (" ".join(seen.value["isolation"][side]) for side in ("in_force", "missing"))
    d4 = next(f for f in seen.value["findings"] if f["rule"] == "D4")
    if "covered" in force:
        assert seen.value["error"] is None  # it raises if it reads a byte
    if STRACE in force:
        assert watch == "all" and seen.failed.keys() == {"D4"} and "seen by the system" in seen.failed["D4"]
    else:
        assert STRACE in missing and f"Not in force: {STRACE}" in seen.report
        assert d4["verdict"] == ("PASS" if "covered" in force else "NOT CHECKED"), d4


@pytest.mark.long
@pytest.mark.parametrize("way", ["documents", "passages"])
def test_validation_text_in_training(audit: Audit, place: Zoo, tmp_path: Path, way: str) -> None:
    train, val = zoo_data.novels("train", 30, 1500), zoo_data.novels("val", 8, 4000)
    if way == "passages":
        train += [f"Once more. {text}" for text in val]
    data = zoo_data.write_data(tmp_path, train, val)
    if way == "documents":
        text = open_dataset(data).val
        copied = text.read(0, int(text.document_starts[1]))
        zoo_data.change_tokens(data, "train", lambda tokens: np.append(tokens, copied))
    seen = audit("--tokens", "700", data=data)
    assert seen.failed.keys() == {"D6"}
    figures = next(f["details"] for f in seen.value["findings"] if f["rule"] == "D6")
    assert (figures["copied_documents"] > 0) == (way == "documents")
    assert (figures["copied_passages"] > figures["passages"] // 2) == (way == "passages")


@pytest.mark.long
def test_unknown_tokens_at_no_bytes(audit: Audit, place: Zoo, tmp_path: Path) -> None:
    data = str(shutil.copytree(place.data, tmp_path / "data"))

    zoo_data.change_tokens(
        data, "val", lambda tokens: np.where((np.arange(len(tokens)) % 50 == 5) & (tokens != 1), 3, tokens)
    )
    config = zoo_data.small(data)
    windows = "plain seq=64 stride=64"
    score = {
        "label": "score",
        "nats": 27_738.0,
        "documents": 8,
        "total_documents": 8,
        "error": None,
        "bpb_raw": None,
        "bpb": 3.3,
        "byte_rule": "table",
        "loss": 6.7,
        "targets": 4140,
        "bytes": 11_700,
        "windows": windows,
        "full": True,
    }
    run = zoo_data.claimed_run(tmp_path / "run", config, zoo_data.half_weights(config), score)
    seen = audit(model=run, data=data)
    assert seen.failed.keys() == {"D13", "D16"}  # the score is not found again either: raw bytes are counted
    assert re.search("[78][0-9] unknown tokens were charged 0 bytes", seen.failed["D13"])


@pytest.mark.long
def test_a_table_beside_the_artifact_counts(audit: Audit, place: Zoo) -> None:
    table = Path(place.data) / "table.bin"
    table.write_bytes(bytes(16_000_000))
    seen = audit(*named("Table"))
    table.unlink()
    assert seen.failed.keys() == {"D1"} and "table.bin 16,000,000" in seen.failed["D1"]


@pytest.mark.long
def test_an_oversize_artifact(audit: Audit, place: Zoo) -> None:
    config = zoo_data.small(place.data, model={"bigram.buckets": 65_521, "bigram.dim": 168})
    path = place.folder / "wide.skc"
    zoo_data.write_model(path, config, zoo_data.half_weights(config, wide=True))
    assert path.stat().st_size > 16_000_000
    seen = audit("--tokens", "700", model=str(path))
    assert seen.failed.keys() == {"D1"} and f"{path.stat().st_size:,}" in seen.failed["D1"]
