"""Ways past the auditor by what learns while a text is scored, each caught by its rule, and honest ones. Budget: 20 s.

The evaluations run in this process, with an engine of numpy that learns; one with a real one, in processes, is long.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.audit import auditor
from core.audit.legality import headline
from core.audit.watch import evaluation as watched
from core.console import Console
from core.scoring import evaluation
from shared_tests.support import zoo_adapting as zoo
from shared_tests.support.in_process import Place, made, verdicts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with made(tmp_path_factory.mktemp("zoo")) as here:
        yield here


def audit(place: Place, out: Path, patch: pytest.MonkeyPatch, engine: type, **parts: Any) -> auditor.AuditResult:
    """Audit an evaluation that adapts, with an engine of numpy."""
    patch.setattr(watched, "load_engine", lambda backend, settings, *_: engine(settings.model.vocab))
    patch.setattr(evaluation, "loose_names", lambda *_, **__: ("table", "w"))
    # Four flips, so that one falls where it shows: into a chunk's first pass, to a document's start.
    plan = place.plan(out, tokens=700, flips=4)
    config = dataclasses.replace(plan.config, eval=zoo.settings(plan.config.eval, parts))
    return auditor.audit(plan._replace(config=config), Console(as_json=True))


PHASES = {"at": (0.3,), "chunk": 32, "lr": 0.3}
LEAK = {"D7": "noticed that must not", "D9": r"what learns \((lora|sgd) .* used token"}
CHEATS: dict[str, tuple[zoo.Plant | type, dict[str, Any], dict[str, str]]] = {
    "an update before the score": (zoo.learns_first, {}, LEAK),
    "an update before the score, with carry": (zoo.learns_first, {"windows": "stateful"}, LEAK),
    "a neighbour row's gradient": (zoo.Neighbours, {}, {**LEAK, "D9": "or from a row or document that its"}),
    "a neighbour row's gradient, warm A": (zoo.Neighbours, {"adapt": {"warm_a": True}}, LEAK),
    "B is kept though reset": (zoo.keeps_b, {}, LEAK),
    "B is kept though reset, warm A": (zoo.keeps_b, {"adapt": {"warm_a": True}}, LEAK),
    "a phase of unscored documents": (zoo.phase_of_all, {"phases": PHASES}, {"D9": "is not scored: nothing may"}),
    "a phase past the ledger": (zoo.phase_past_the_ledger, {"phases": PHASES}, LEAK),
    "a tilt that reads the target": (zoo.tilt_reads_the_target, {"plugins": ("temperature",)}, LEAK),
    "a hint table updated before the write": (
        zoo.counts_before_the_write, {"plugins": ("counts",)}, {**LEAK, "D12": "broken: D7, D9"},
    ),
    "learning twice from a chunk": (zoo.learns_twice, {}, {"D9": "which row 1 scored at version 0"}),
    "learning from the tail and scoring it again": (zoo.scores_the_tail_again, {}, {"D10": "already scored by"}),
    "weights that learn inside a chunk": (zoo.Impatient, {"adapt": {"kind": "sgd"}}, LEAK),
    "a rate that knows where the document ends": (
        zoo.rate_of_the_document, {}, {"D7": "a document went on, not ended", "D9": "used token"},
    ),
}  # fmt: skip
"""Way -> plant or engine, settings, and the rules that fail, these and no others, with words of why."""


SHORT = (
    "an update before the score", "a neighbour row's gradient", "B is kept though reset", "a phase past the ledger",
    "a hint table updated before the write", "learning from the tail and scoring it again",
    "warm A, a phase, a temperature that lags", "sgd",
)  # fmt: skip
"""What the short run audits; each takes a second and a half."""


def case(name: str) -> Any:
    """Return a case as a parameter; others than SHORT are marked long."""
    return pytest.param(name, marks=() if name in SHORT else pytest.mark.long)


@pytest.mark.parametrize("name", [case(name) for name in CHEATS])
def test_a_cheat_fails_by_its_rule(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    way, parts, broken = CHEATS[name]
    if not isinstance(way, type):
        way(monkeypatch)
    found = audit(place, tmp_path, monkeypatch, way if isinstance(way, type) else zoo.Learner, **parts)
    failed = verdicts(found, "FAIL")
    assert failed.keys() - {"D5"} == broken.keys() and not found.ok, failed
    for rule, words in broken.items():
        assert re.search(words, failed[rule]), failed[rule]


HONEST: dict[str, dict[str, Any]] = {
    "warm A, a phase, a temperature that lags": {
        "adapt": {"warm_a": True}, "phases": PHASES, "plugins": ("temperature",),
    },
    "counts, longest first, with carry": {
        "windows": "stateful", "adapt": {"order": "length", "documents": 3}, "plugins": ("counts",),
    },
    "adapters for themselves": {"adapt": {"steps": 2}, "round": 2},
    "never reset": {"adapt": {"reset": "never", "documents": 1, "schedule": "cosine"}},
    "sgd": {"adapt": {"kind": "sgd", "schedule": "cosine"}, "plugins": ("temperature",)},
    "sgd of every document": {"adapt": {"kind": "sgd", "chunk": 64, "reset": "document"}},
}  # fmt: skip


@pytest.mark.parametrize("name", [case(name) for name in HONEST])
def test_an_honest_near_miss_breaks_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    parts = HONEST[name]
    found = audit(place, tmp_path, monkeypatch, zoo.Learner, **parts)
    assert found.ok and not verdicts(found, "FAIL"), verdicts(found, "FAIL")
    passed = verdicts(found, "PASS")
    assert {"D4", "D7", "D8", "D9", "D10", "D11", "D12"} <= passed.keys()
    kind = parts.get("adapt", {}).get("kind", "lora")
    assert f"from scored targets alone (D9): {kind}" in passed["D11"] and f"there learned: {kind}" in headline(found)
    assert re.search("adapters of . rows, changed up to" if kind == "lora" else "weights changed [0-9]+", passed["D9"])
    assert found.isolated.value["flips"]["ends"] >= 1
    side = "several side by side" if kind == "lora" and "reset" not in parts.get("adapt", {}) else "from left to right"
    assert ("in another order" if "longest" in name else side) in passed["D10"]
