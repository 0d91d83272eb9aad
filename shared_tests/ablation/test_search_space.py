"""What a search may try: every mistake is one clear line, what cannot run is passed over. Budget: 10 s."""

from pathlib import Path

import pytest

from core.ablation.report import search_wording
from core.ablation.search.search import Sampler, Trial, run_search
from core.ablation.search.space import Search
from core.config import ConfigError, RunConfig
from shared_tests.support.searches import PLAN, Runs, read

SPACE = '"train.lr_matrix" = { low = 1e-4, high = 1.0, log = true }'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[100, 101]", "[100, 2]", "search: seeds: 2 also among the ablation's seeds: the best of many trials looks"),
        ("seeds = [100, 101]", "", "search: seeds: missing"),
        ("trials = 12", "", "search: trials: missing"),
        ("trials = 12", "trials = 0", "search: trials: 0: expected a whole number from 1"),
        ("trials = 12", "trails = 12", "unknown key 'trails'; did you mean trials"),
        ("trials = 12", 'trials = 12\n    variant = "wide"', "search: variant: 'wide' is not a variant; known: plain"),
        ("trials = 12", "trials = 12\n    round = 0", "search: round: 0: expected a whole number from 1"),
        ("[variants.plain]", "[variants.plain]\n    [variants.found]\n    model.dim = 64", "variants.found: is what"),
        ("[variants.plain]", "[variants.plain]\n    [variants.trial-3]\n    model.dim = 64", "trial-3: is what"),
        (SPACE, SPACE.replace("matrix", "matrx"), "unknown field 'train.lr_matrx'; did you mean train.lr_matrix"),
        (SPACE, SPACE.replace("high", "hihg"), "train.lr_matrix: unknown key 'hihg'; did you mean high"),
        (SPACE, SPACE.replace("high = 1.0", "high = 1e-4"), "train.lr_matrix: low 0.0001 is not below high 0.0001"),
        (SPACE, SPACE.replace("low = 1e-4", "low = 0.0"), "train.lr_matrix: low 0.0: a logarithm needs"),
        (SPACE, SPACE.replace("low = 1e-4", "low = -1.0").replace(", log = true", ""), "lr_matrix=-1.0: expected"),
        (SPACE, SPACE.replace("1.0", "inf"), "train.lr_matrix: high: inf: expected a finite number"),
        (SPACE, SPACE.replace("log = true", "log = true, step = 0.1"), "log and step exclude each other"),
        (SPACE, SPACE.replace("low = 1e-4, ", ""), "train.lr_matrix: low: missing"),
        (SPACE, '"train.lr_matrix" = 0.1', "train.lr_matrix: expected {low=..., high=...} or {values="),
        (SPACE, '"train.steps" = { low = 1, high = 9 }', r"train.steps: is what \[budget\] decides"),
        (SPACE, '"data.path" = { values = ["a", "b"] }', "data.path: says what is measured, .* only model.* and train"),
        (SPACE, '"train.quantise" = { low = 1, high = 2 }', "train.quantise: is not a number; expected {values="),
        (SPACE, '"train.seq_until" = { low = 0.1, high = 0.2 }', "train.seq_until: is not a number"),
        (SPACE, '"train.quantise" = { values = ["never", "nevr"] }', "train.quantise='nevr': expected"),
        (SPACE, '"train.batch" = { low = 1, high = 2.5 }', "train.batch: high: 2.5: expected a whole number"),
        ("high = 64", "high = 60", "model.dim: high 60 is not a whole number of steps of 16 above low 16"),
        ("low = 16, high = 64, step = 16", "low = 15, high = 63, step = 16", "search.space: model.dim=15"),
        ('["adamw", "muon"]', '["adamw", "adamw"]', "train.matrix_rule: values: .*all different"),
        (SPACE, "", "trials: 12: the space has only 8 settings"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    """The file, the field, what was given, what is expected."""
    assert PLAN.count(old) == 1
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, PLAN.replace(old, new))
    assert "\n" not in str(caught.value) and "rates.toml: " in str(caught.value)


def test_a_value_that_only_another_fields_value_allows_is_good(tmp_path: Path) -> None:
    """3 heads do not divide the start's 32 channels, but 48."""
    plan = read(tmp_path, PLAN + '"model.attention.heads" = { values = [2, 3] }\n')
    made = Runs(tmp_path / "store").search(plan)
    assert made.complete and all(
        t.settings["model.dim"] % t.settings["model.attention.heads"] == 0 for t in made.trials
    )
    assert any(t.settings["model.attention.heads"] == 3 for t in made.trials)
    nested = PLAN.replace(SPACE, "").replace('"model.dim" =', "model.dim =")
    space: Search | None = read(tmp_path, nested.replace("trials = 12", "trials = 8")).search
    assert space is not None and [field.name for field in space.space] == ["model.dim", "train.matrix_rule"]


def test_useless_suggestions_cost_nothing(tmp_path: Path) -> None:
    """Tried before, or refused: others are asked for; where there are none the search ends early and says why."""
    text = PLAN.replace('"train.lr_matrix" = { low = 1e-4, high = 1.0, log = true }\n', "")
    plan = read(tmp_path, text.replace("trials = 12", "trials = 8"))
    made = Runs(tmp_path / "store").search(plan)
    assert len(made.trials) == 1 + 7 and made.complete, "8 settings, one of which is the start"
    assert "tried before" in made.short and made.short in search_wording.summary(made)

    def narrow(config: RunConfig) -> None:
        if config.model.dim > 32:
            raise ConfigError("model.dim: over the budget")

    runs = Runs(tmp_path / "narrow")
    assert plan.search is not None
    made = run_search(plan, plan.search, runs.store, runs.place, narrow, runs.train)
    assert {t.settings["model.dim"] for t in made.trials} == {16, 32} and len(made.trials) == 4


def test_the_start_is_told_where_it_lies_in_the_space(tmp_path: Path) -> None:
    """Its figure counts for the sampler like a trial's, unless no trial could have its settings."""
    search = read(tmp_path).search
    assert search is not None
    inside = {"train.lr_matrix": 0.003, "model.dim": 32, "train.matrix_rule": "adamw"}
    for changes, told in (
        ({}, 1), ({"model.dim": 16, "train.matrix_rule": "muon"}, 1), ({"train.lr_matrix": 2.0}, 0),
        ({"model.dim": 40}, 0), ({"train.matrix_rule": "sgd"}, 0), ({"train.lr_matrix": 0.00123456}, 0),
    ):  # fmt: skip
        sampler = Sampler(search)
        sampler.start(Trial(0, {**inside, **changes}, "done", (), 2.0))
        assert [trial.value for trial in sampler._study.trials] == [2.0] * told, changes
    sampler = Sampler(search)
    sampler.start(Trial(0, inside, "failed"))
    assert not sampler._study.trials
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "start", lambda _, trial: told.append(trial))
        made = Runs(tmp_path / "store").search(read(tmp_path))
    assert told == [made.start] and made.start.bpb is not None
