"""Phases: when they come, what they learn from, and which cannot come. Budget: 3 s."""

import numpy as np
import pytest

from core.config import AdaptConfig, ConfigError, EvalConfig, PhasesConfig
from core.engine.adapting import AdaptStep
from core.scoring.adapt.phases import PlannedPhase, learn_phase, phases_of, planned_phases
from core.scoring.adapt.weights import LooseWeights, rate
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.windows import document_ranges
from shared_tests.support.known_scores import BOS, make_dataset
from shared_tests.support.streams import Recorder

LENGTHS = [5, 40, 1, 17, 16, 2, 33, 20, 9]
SEQ = 12


def test_the_records_boundaries() -> None:
    """50,000 documents in rounds of 8 batches of 64: the boundaries are theirs, the phases come at the rounds' ends."""
    config = PhasesConfig(at=(0.01666, 0.03332, 0.05))
    phases = planned_phases(config, np.full(50_000, 800), 512)
    assert phases == (PlannedPhase(2, 833), PlannedPhase(4, 1666), PlannedPhase(5, 2500))
    assert planned_phases(PhasesConfig(at=(0.5,), chunk=10), np.full(8, 10), 4) == (PlannedPhase(1, 4),)
    assert planned_phases(PhasesConfig(at=(0.29,), chunk=10), np.full(100, 10), 32) == (
        PlannedPhase(1, 29),
    )  # not 28.99...
    assert planned_phases(PhasesConfig(), np.full(8, 10), 4) == ()


@pytest.mark.parametrize(
    "at, targets, per_round, message",
    [
        ((0.01,), 40, 4, "at=0.01 of 40 documents comes before the first"),
        ((0.95,), 40, 4, "is document 38, which is scored in the last round of 4"),
        ((0.5,), 40, 64, "is document 20, which is scored in the last round of 64"),
        ((0.999,), 40, 1, "is document 40, which is scored in the last round"),
        ((0.2, 0.25), 40, 16, "at=0.25 of 40 documents comes in round 1, as the phase before it does"),
        ((0.15,), 40, 4, "the first 6 have 180 targets, one chunk of eval.phases.chunk=180 at most"),
    ],
)
def test_a_phase_that_cannot_come_is_refused(at: tuple[float, ...], targets: int, per_round: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        planned_phases(PhasesConfig(at=at, chunk=180), np.full(targets, 30), per_round)
    assert "\n" not in str(refused.value)


def test_an_evaluation_names_its_phases_before_it_scores() -> None:
    """Documents, rows and rounds are the evaluation's own; one that does not adapt has none."""
    adapt = AdaptConfig(kind="lora", chunk=8, documents=2)
    config = EvalConfig(windows="documents", seq=SEQ, round=2, adapt=adapt, phases=PhasesConfig(at=(0.5,), chunk=8))
    split = make_dataset(LENGTHS).val
    assert phases_of(Evaluation(split, config, adapts=True)) == (PlannedPhase(1, 4),)
    assert phases_of(Evaluation(split, config)) == ()
    with pytest.raises(ConfigError, match="at=0.5 of 3 documents is document 2, which is scored in the last round"):
        phases_of(Evaluation(split, config, 3, adapts=True))


def learned(chunk: int, documents: list[int], **changes: object) -> tuple[Recorder, np.ndarray, np.ndarray]:
    """Return what an engine was to learn in a phase of these documents, and their targets and inputs in order."""
    split, engine = make_dataset(LENGTHS).val, Recorder()
    ledger, rng = Ledger(len(split)), np.random.default_rng(0)
    begins, ends = (side[documents] for side in document_ranges(len(split), split.document_starts))
    for place in rng.permutation(np.concatenate([np.arange(a + 1, b + 1) for a, b in zip(begins, ends, strict=True)])):
        ledger.write(np.array([place]), np.ones(1), int(place) % 3, int(place) % 5)  # by many rows, in any order
    weights = LooseWeights(engine, split, ledger, SEQ, ("embed.weight",))
    config = PhasesConfig(at=(0.5,), chunk=chunk, **changes)  # type: ignore[arg-type]
    learn_phase(weights, ledger, begins, ends, config)
    text = split.read(0, len(split))
    pairs = zip(begins, ends, strict=True)
    targets, inputs = zip(*((text[a + 1 : b + 1], text[a:b]) for a, b in pairs), strict=True)
    return engine, np.concatenate(targets), np.concatenate(inputs)


@pytest.mark.parametrize("documents", [[1, 6, 7], [8, 3, 4, 0]])
def test_a_pass_over_the_documents_without_its_last_chunk(documents: list[int]) -> None:
    """Document after document as they were scored; momenta begin anew; along a cosine; each target with its input."""
    engine, targets, inputs = learned(20, documents)
    chunks = -(-len(targets) // 20)
    assert engine.calls == ["loosen", "forget", *["descend"] * (chunks - 1)] and chunks > 2
    for i, (batch, step) in enumerate(zip(engine.batches, engine.steps, strict=True)):
        real = batch.targets >= 0
        assert batch.tokens.shape == (2, SEQ) and real.sum() == 20 and not batch.tokens[~real].any()
        assert (batch.targets[real] == targets[i * 20 : (i + 1) * 20]).all()
        assert (batch.tokens[real] == inputs[i * 20 : (i + 1) * 20]).all()
        assert step == AdaptStep("sgd", rate(0.001, "cosine", i, chunks), momentum=0.9, clip=1.0)
    rates = [step.lr for step in engine.steps]
    assert rates[0] == 0.001 and all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert inputs[0] == BOS


def test_epochs_are_updates_on_each_chunk() -> None:
    engine, _, _ = learned(20, [1, 6], epochs=2, momentum=0.5, clip=0.0, lr=0.1)
    assert [float(step.lr) for step in engine.steps] == [rate(0.1, "cosine", i // 2, 4) for i in range(6)]
    assert all((step.momentum, step.clip) == (0.5, 0.0) for step in engine.steps)
    assert (engine.batches[0].tokens == engine.batches[1].tokens).all()
    assert (engine.batches[1].tokens != engine.batches[2].tokens).any()


def test_a_document_that_is_not_scored_is_not_learned_from() -> None:
    split, engine = make_dataset(LENGTHS).val, Recorder()
    ledger = Ledger(len(split))
    begins, ends = document_ranges(len(split), split.document_starts)
    ledger.write(np.arange(begins[1] + 1, ends[1] + 1), np.ones(ends[1] - begins[1]), 0)
    weights = LooseWeights(engine, split, ledger, SEQ, ("embed.weight",))
    with pytest.raises(LedgerError, match="is not scored") as refused:
        learn_phase(weights, ledger, begins[[1, 3]], ends[[1, 3]], PhasesConfig(at=(0.5,), chunk=41))
    assert refused.value.rule == "D9" and "descend" not in engine.calls
