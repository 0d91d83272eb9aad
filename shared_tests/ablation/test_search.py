"""Searches: the same trials whatever happens, failures that stay failures, the best judged afresh. Budget: 20 s.

Most runs here are made at once, by `Runs`; the one test with processes uses shared_tests.support.ablation_worker.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.ablation.report import pictures, search_pictures, search_wording
from core.ablation.report.report import write_report
from core.ablation.search.search import Sampler, Searched
from core.cli import main
from core.config import RunConfig
from shared_tests.support.ablation_runs import go, taken
from shared_tests.support.killed import small_data
from shared_tests.support.report_page import EVIL, Page, offline
from shared_tests.support.searches import PLAN, Runs, read, smooth


def luck(config: RunConfig) -> float:
    """Return bits per byte that no setting changes: noise alone."""
    key = [config.seed, int(1e6 * config.train.lr_matrix), config.model.dim, config.train.matrix_rule == "muon"]
    return 2.0 + 0.05 * np.random.default_rng(key).normal()


def settings(made: Searched) -> list[dict[str, Any]]:
    """Return the settings of all trials."""
    return [trial.settings for trial in made.trials]


def test_trials_are_runs_and_their_replay_is_equal(tmp_path: Path) -> None:
    """Trained once; read again they are the same, in another store too; another sampler seed asks for others."""
    plan = read(tmp_path)
    runs = Runs(tmp_path / "store")
    made = runs.search(plan)
    assert made.complete and [t.number for t in made.trials] == list(range(13)) and not made.short
    assert len({json.dumps(s) for s in settings(made)}) == 13 and set(runs.made.values()) == {1}
    assert made.start.settings == {"train.lr_matrix": 0.003, "model.dim": 32, "train.matrix_rule": "adamw"}
    for trial in made.trials:
        of = runs.store.outcome(plan, [p for p in made.places if p.job.variant == trial.name]).results
        assert [r.seed for r in of] == [100, 101]
        assert trial.status == ("failed" if trial.settings["train.lr_matrix"] > 0.3 else "done")
        if trial.bpb is not None:
            assert trial.bpb == pytest.approx(sum(r.bpb or 0.0 for r in of) / 2)
            assert f"{trial.settings['train.lr_matrix']:.4g}" == f"{trial.settings['train.lr_matrix']:.12g}"
    best = made.best
    assert (
        best is not None and best.bpb == min(t.bpb for t in made.trials[1:] if t.bpb) and made.ranks[best.number] == 1
    )
    assert runs.search(plan) == made and runs.search(plan, train=False) == made and set(runs.made.values()) == {1}
    assert settings(Runs(tmp_path / "other").search(plan)) == settings(made)
    other = read(tmp_path, PLAN.replace("trials = 12", "trials = 12\n    sampler_seed = 1"))
    assert settings(Runs(tmp_path / "third").search(other)) != settings(made)


def test_more_trials_go_on_where_fewer_ended(tmp_path: Path) -> None:
    """6 trials, then 12: the first 6 stay, in whatever rounds they were asked for; nothing is trained twice."""
    runs, whole = Runs(tmp_path / "store"), Runs(tmp_path / "whole")
    few = runs.search(read(tmp_path, PLAN.replace("trials = 12", "trials = 6")))
    many = runs.search(read(tmp_path))
    assert many.trials[:7] == few.trials and len(many.trials) == 13 and set(runs.made.values()) == {1}
    assert settings(whole.search(read(tmp_path))) == settings(many)


def test_a_failed_trial_stays_failed_until_it_is_tried_again(tmp_path: Path) -> None:
    """It has no figure and no rank, keeps its last line, and the rest goes on; --retry trains it again."""
    plan, runs = read(tmp_path), Runs(tmp_path / "store")
    made = runs.search(plan)
    assert made.failed and len(made.ranks) == 12 - len(made.failed) and made.complete
    assert all(t.bpb is None and t.message == runs.message and t.number not in made.ranks for t in made.failed)
    before = runs.made.total()
    assert runs.search(plan) == made and runs.made.total() == before
    runs.bpb = lambda config: smooth(config) or 3.0
    again = runs.search(plan, retry=True)
    assert not again.failed and runs.made.total() > before
    lost = made.failed[0].number
    assert settings(again)[: lost + 1] == settings(made)[: lost + 1], "until it failed nothing can have changed"
    # A search of which every trial fails has no variant `found`, and says so.
    runs = Runs(tmp_path / "none", lambda _: None)
    none = runs.search(plan)
    assert none.best is None and none.confirming() == plan and "None gave a figure" in search_wording.summary(none)


def test_failures_are_learned_from(tmp_path: Path) -> None:
    """Told as infinitely bad, fewer trials fail than where they are told as failed, which TPE passes over."""
    search = read(tmp_path, PLAN.replace("trials = 12", "trials = 32")).search
    assert search is not None

    class Passed(Sampler):
        """Tells failures as failures."""

        def tell(self, figures: Sequence[float | None]) -> None:
            kept = [(t, v) for t, v in zip(self._open, figures, strict=True) if v is not None]
            for trial in [t for t, v in zip(self._open, figures, strict=True) if v is None]:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            self._open = [t for t, _ in kept]
            super().tell([v for _, v in kept])

    def lost(kind: type[Sampler]) -> int:
        count = 0
        for seed in range(4):
            sampler = kind(search._replace(sampler_seed=seed))
            for _ in range(search.trials // search.round):
                rates = [(sampler.ask(lambda _: True) or {})["train.lr_matrix"] for _ in range(search.round)]
                figures = [None if rate > 0.02 else math.log10(rate / 0.02) ** 2 for rate in rates]
                count += figures.count(None)
                sampler.tell(figures)
        return count

    assert lost(Sampler) < 0.75 * lost(Passed)


def test_what_trials_gave_steers_those_that_follow(tmp_path: Path) -> None:
    """The first 10 are drawn blindly, the others after the figures: near the best, wherever that is."""
    plan = read(tmp_path, PLAN.replace("trials = 12", "trials = 28").replace("[100, 101]", "[100]"))

    def away(made: Searched, best: float) -> tuple[float, float]:
        far = [abs(math.log10(t.settings["train.lr_matrix"] / best)) for t in made.trials[1:]]
        return float(np.mean(far[:10])), float(np.mean(far[-8:]))

    low = Runs(tmp_path / "low", lambda c: 2 + math.log10(c.train.lr_matrix / 0.0003) ** 2).search(plan)
    high = Runs(tmp_path / "high", lambda c: 2 + math.log10(c.train.lr_matrix / 0.3) ** 2).search(plan)
    assert settings(low)[:9] == settings(high)[:9] and settings(low)[-8:] != settings(high)[-8:]
    for made, best in ((low, 0.0003), (high, 0.3)):
        first, last = away(made, best)
        assert last < 0.6 * first


START = """
import sys
from pathlib import Path
from core.ablation.plan import read_plan
from shared_tests.support.ablation_runs import go
from shared_tests.support.searches import Runs
runs = Runs(Path(sys.argv[2]))
runs.search(read_plan(sys.argv[1]), lambda places: go(runs.store, places))
"""


def test_a_killed_search_asks_for_the_same_trials(tmp_path: Path) -> None:
    """kill -9 in the second round: the next start takes the steps that are left, once, and all trials are as ever."""
    text = PLAN.replace("[100, 101]", "[100]\n    round = 2").replace("trials = 12", "trials = 4")
    plan, runs = read(tmp_path, text), Runs(tmp_path / "store")
    variables = {**os.environ, "SKC_TEST_STEP": "0.15"}
    first = subprocess.Popen([sys.executable, "-c", START, plan.path, str(runs.store.path)], env=variables)
    until = time.monotonic() + 240
    while time.monotonic() < until and len(list(runs.store.path.glob("runs/*/taken.txt"))) < 4:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while time.monotonic() < until and any(runs.store.busy(p) for p in runs.search(plan, train=False).places):
        time.sleep(0.05)
    cut = runs.search(plan, train=False)
    assert not cut.complete and [t.status for t in cut.trials[:3]] == ["done"] * 3 and len(cut.trials) == 5
    made = runs.search(plan, lambda places: go(runs.store, list(places)))
    steps = taken(list(made.places))
    assert made.complete and all(set(s) == set(map(str, range(10))) for s in steps)
    assert sum(times - 1 for s in steps for times in s.values()) <= 2, "at most the steps that were under way"
    other = Runs(tmp_path / "other", lambda config: 2.0 - config.model.dim / 1000 + config.seed / 10_000)
    assert settings(other.search(plan)) == settings(made)


def test_luck_is_selected_but_not_confirmed(tmp_path: Path) -> None:
    """Where settings do nothing the best trial looks good on its own seeds, and not on the ablation's."""
    plan, runs = read(tmp_path, PLAN.replace("trials = 12", "trials = 24")), Runs(tmp_path / "store", luck)
    made = runs.search(plan)
    last = made.confirming()
    assert list(last.variants) == ["plain", "found"] and last.seeds == (1, 2, 3, 4)
    places = [runs.place(job) for job in last.jobs()]
    assert not {p.key for p in places} & {p.key for p in made.places}, "no run has a part in both"
    runs.train(places)
    outcome = runs.store.outcome(last, places)
    selected, confirmed = search_wording.gains(made, outcome)
    assert made.best is not None and selected.found == made.best.bpb and "too good" in selected.note
    assert (selected.figure, selected.seeds, selected.test) == ("selected", (100, 101), None)
    assert (confirmed.figure, confirmed.seeds) == ("confirmed", (1, 2, 3, 4))
    assert confirmed.found == pytest.approx(np.mean([luck(p.job.config) for p in places if p.job.variant == "found"]))
    assert selected.found is not None and confirmed.found is not None and confirmed.test is not None
    assert selected.found < 1.95 < 1.96 < confirmed.found, "2 is what every setting gives"
    assert confirmed.test.low is not None and confirmed.test.high is not None
    assert confirmed.test.low < 0 < confirmed.test.high


def look(made: Searched, runs: Runs, folder: Path) -> tuple[str, str]:
    """Write a report and return (report.html, report.md)."""
    last = made.confirming()
    places = [runs.place(job) for job in last.jobs()]
    runs.train(places)
    html, text, *_ = write_report(runs.store.outcome(last, places), folder, made)
    return html.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")


def test_the_report_has_the_search(tmp_path: Path) -> None:
    """Trials by rank, both figures, pictures; self-contained, escaped; its file gives the search again."""
    plan, runs = read(tmp_path), Runs(tmp_path / "store", message=EVIL)
    made = runs.search(plan)._replace(short=EVIL)
    html, text = look(made, runs, tmp_path / "out")
    page = Page(html)
    words = "".join(page.words)
    assert offline(html) and len(html) < 1_000_000 and "<script>" not in text
    assert f"but {EVIL}" in words and f"failed: {EVIL}" in words
    assert {"search.png", "search-fields.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    both = next(t for t in page.tables if tuple(t[0]) == search_wording.GAIN_HEAD)
    assert [row[0] for row in both[1:]] == ["selected", "confirmed"] and "too good" in both[1][-1]
    head, start, *rows = next(t for t in page.tables if tuple(t[0]) == search_wording.head(made))
    assert head[1:4] == ["train.lr_matrix", "model.dim", "train.matrix_rule"] and start[0] == "start"
    assert len(rows) == 12 and [r[-2] for r in rows[: len(made.ranks)]] == list(map(str, range(1, len(made.ranks) + 1)))
    for row in rows:
        trial = made.trials[int(row[0].split()[1])]
        assert row[1] == f"{trial.settings['train.lr_matrix']:g}" and row[3] == trial.settings["train.matrix_rule"]
        assert row[-3] == ("–" if trial.bpb is None else f"{trial.bpb:.4f}")
        assert f"| `{row[0]}` | {row[1]} | {row[2]} | {row[3]} | {row[4]} | {row[5]} |" in text
    assert Path(plan.path).read_text() in words
    assert "skc ablate rates.toml --search" in text and "skc ablate rates.toml --search" in "".join(page.words)
    write_report(runs.store.outcome(plan, [runs.place(job) for job in plan.jobs()]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("search*")), "pictures of an earlier report"


def test_pictures_show_the_trials_at_their_figures(tmp_path: Path) -> None:
    """Every trial with a figure under its number and settings; far ones are beyond the scale, failed ones left out."""
    from matplotlib import pyplot

    text = (
        PLAN + '"model.attention.heads" = { values = [1, 2] }\n    "train.batch" = { low = 2, high = 64, log = true }\n'
    )

    def far_or_lost(config: RunConfig) -> float | None:
        bpb = smooth(config)
        return None if bpb is None else bpb + 9 * (config.train.batch > 30)

    runs = Runs(tmp_path / "store", far_or_lost)
    searched = runs.search(read(tmp_path, text.replace("trials = 12", "trials = 30")))
    scored = [trial for trial in searched.trials[1:] if trial.bpb is not None]
    far = [trial for trial in scored if (trial.bpb or 0.0) > 5]
    assert far and searched.failed
    with pyplot.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = search_pictures.plots(searched)
        (history,) = figures["search"].axes
        dots = history.collections[0].get_offsets().tolist()
        assert sorted(map(tuple, dots)) == [(trial.number, trial.bpb) for trial in scored]
        panels = {panel.get_xlabel(): panel for panel in figures["search-fields"].axes if panel.get_xlabel()}
        assert panels.keys() == {field.name for field in searched.search.space}
        for name in ("train.lr_matrix", "model.dim", "train.batch"):
            dots = panels[name].collections[0].get_offsets().tolist()
            assert sorted(map(tuple, dots)) == sorted((trial.settings[name], trial.bpb) for trial in scored)
        for panel in (history, *panels.values()):
            low, high = panel.get_ylim()
            assert low < min(trial.bpb or 9.0 for trial in scored) < high < 5
            assert [line for line in panel.lines if line.get_label() == "Start"][0].get_ydata()[0] == searched.start.bpb
        for figure in figures.values():
            pyplot.close(figure)
    style = dict(pyplot.rcParams)
    images = search_pictures.draw(searched)
    assert [image[:4] for image in images.values()] == [b"\x89PNG"] * 2 and not pyplot.get_fignums()
    assert dict(pyplot.rcParams) == style, "the style of these pictures is not that of later ones"
    one = searched._replace(trials=(searched.start, scored[0]))
    assert search_pictures.draw(one).keys() == images.keys()
    assert search_pictures.draw(searched._replace(trials=searched.trials[:1])) == {}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Search, confirm, report; again nothing is trained; without --search it is left alone, and that is said."""
    from core.verbs import ablate

    data, store, runs = small_data(tmp_path), tmp_path / "store", Runs(tmp_path / "store")
    plan = read(tmp_path)
    command = ["ablate", plan.path, "--data", data, "--store", str(store), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "run_all", runs.run_all)
        patch.setattr(pictures, "png", lambda _, path: path.touch())  # they take most of the time, elsewhere made
        patch.setattr("core.ablation.report.report.draw_search", lambda _: {"search": b"", "search-fields": b""})
        assert main([*command, "--search"]) == 0
        said = capsys.readouterr()
        value = json.loads(said.out)
        assert value["search"]["best"] and len(value["search"]["trials"]) == 13 and not value["failed"]
        assert [g["figure"] for g in value["search"]["gains"]] == ["selected", "confirmed"]
        assert "best of" in said.err and "too good" in said.err and "--retry trains them again" in said.err
        (effect,) = value["backends"]["cuda"]["effects"]
        assert effect["variant"] == "found" and list(effect["seeds"]) == [1, 2, 3, 4]
        folder = store / "ablations" / "rates"
        members = {row[0] for row in json.loads((folder / "members.json").read_text())["runs"]}
        assert members == {"plain", "found", *(f"trial-{i}" for i in range(13))}
        before = runs.made.total()
        repeated = f"skc ablate rates.toml --data {data} --search"
        assert repeated in (folder / "report.html").read_text() and repeated in (folder / "report.md").read_text()
        assert main([*command, "--search"]) == 0 and runs.made.total() == before
        assert json.loads(capsys.readouterr().out)["search"] == value["search"]
        assert main(command) == 0 and runs.made.total() == before
        said = capsys.readouterr()
        assert "[search] is left alone: add --search" in said.err and "search" not in json.loads(said.out)
        assert "Selected" not in (folder / "report.html").read_text() and not (folder / "search.png").exists()


def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No optuna, no [search], --retry alone: one line, exit code 2, no store."""
    plan, store = read(tmp_path), tmp_path / "store"
    command = ["ablate", plan.path, "--store", str(store), "--search"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        for extra in ([], ["--dry-run"]):
            assert main([*command, *extra]) == 2
            assert capsys.readouterr().err == "skc ablate: --search needs optuna: pip install -e '.[search]'\n"
    assert main(["ablate", plan.path, "--store", str(store), "--retry"]) == 2
    assert "add --search" in capsys.readouterr().err
    (tmp_path / "rates.toml").write_text(textwrap.dedent(PLAN.split("[search]")[0]))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "--search needs a table [search]" in said and said.count("\n") == 1 and not store.exists()
