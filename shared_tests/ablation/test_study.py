"""`skc ablate --search --study URL`: trials in a database that several stores work on. Budget: 15 s.

Runs are made at once, by `Runs`; the database is SQLite.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from core.ablation.plan import Ablation
from core.ablation.search.search import Searched, SearchError
from core.ablation.search.study import open_study, run_shared_search
from core.cli import main
from core.config import RunConfig
from shared_tests.support.command_line import Capture, refuse
from shared_tests.support.searches import PLAN, Runs, read, smooth

SMALL = PLAN.replace("trials = 12", "trials = 4").replace("seeds = [100, 101]", "seeds = [100]\n    round = 2")


def search(runs: Runs, plan: Ablation, url: str, **options: Any) -> Searched:
    """Search with others, training where nothing else is said."""
    assert plan.search is not None
    how = (plan, plan.search, runs.store, runs.place)
    train = options.pop("train", runs.train)
    study = open_study(url, *how, look=train is None)
    return run_shared_search(study, *how, lambda _: None, train, **options)


def settings(made: Searched) -> list[str]:
    """Return the settings of all trials as text."""
    return [json.dumps(trial.settings) for trial in made.trials]


@pytest.fixture
def plan(tmp_path: Path) -> Ablation:
    return read(tmp_path, SMALL)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def of_database(url: str) -> list[Any]:
    """Return the trials of the one study there, as optuna has them."""
    storage = optuna.storages.RDBStorage(url)
    (name,) = optuna.study.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_a_search_ends_in_the_database_and_is_read_from_there(plan: Ablation, url: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "store")
    made = search(runs, plan, url)
    assert made.complete and len(made.trials) == 5 and len(set(settings(made))) == 5 and not made.short
    assert all(t.status == ("failed" if t.settings["train.lr_matrix"] > 0.3 else "done") for t in made.trials)
    scored = [t.bpb for t in made.trials[1:] if t.bpb]
    assert made.best is not None and made.best.bpb == min(scored) == made.best.figures[0][1]
    assert made.plan is plan and made.confirming().variants["found"] == made.best.settings
    stored = [trial for trial in of_database(url) if trial.user_attrs.get("kept")]
    assert len(stored) == 4 and {t.params["train.matrix_rule"] for t in stored} <= {'"adamw"', '"muon"'}, "as one reads"
    before = runs.made.total()
    assert search(runs, plan, url) == made and search(runs, plan, url, train=None) == made
    assert runs.made.total() == before == 5
    other = search(Runs(tmp_path / "other"), plan, url)
    assert other.trials == made.trials and other.elsewhere == 4 and made.elsewhere == 0


def test_two_stores_share_the_trials(plan: Ablation, url: str, tmp_path: Path) -> None:
    """While one trains its first round, another comes, takes what is left, and ends before the first does."""
    one, two = Runs(tmp_path / "one"), Runs(tmp_path / "two")
    came: list[Searched] = []

    def train(places: Any) -> None:
        if one.made and not came:
            came.append(search(two, plan, url))
        one.train(places)

    made = search(one, plan, url, train=train)
    assert not came[0].complete and [t.status for t in came[0].trials].count("running") == 2
    assert made.complete and len(set(settings(made))) == len(made.trials) == 5
    assert one.made.total() == two.made.total() == 3, "the start in each, a trial in one of them"
    again = search(two, plan, url)
    assert again.trials == made.trials and again.elsewhere == made.elsewhere == 2
    assert two.made.total() == 3


def test_stores_that_begin_at_once_make_one_study(plan: Ablation, url: str, tmp_path: Path) -> None:
    """Each finds the database empty and makes its tables: whoever is late is told that they exist, and opens them."""
    count, search = 4, plan.search
    assert search is not None
    all_here, names = threading.Barrier(count), []

    def begin(number: int) -> None:
        runs = Runs(tmp_path / str(number))
        all_here.wait(60)
        names.append(open_study(url, plan, search, runs.store, runs.place).name)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(names) == count and len(set(names)) == 1 and of_database(url) == []


def test_a_killed_search_goes_on_with_its_own_trials(plan: Ablation, url: str, tmp_path: Path) -> None:
    """Another store leaves them alone, and says that they are open, unless it is to take them over."""

    class Killed(BaseException):
        pass

    def killed(places: Any) -> None:
        if runs.made.total():
            raise Killed
        runs.train(places)

    runs, other = Runs(tmp_path / "store"), Runs(tmp_path / "other")
    with pytest.raises(Killed):
        search(runs, plan, url, train=killed)
    left = search(other, plan, url)
    open_ = [trial for trial in left.trials if trial.status == "running"]
    assert len(open_) == 2 and not left.complete and left.confirming() is plan and len(left.trials) == 5
    mended = search(runs, plan, url)
    assert mended.complete and mended.trials[1:3] == tuple(
        trial._replace(status=done.status, figures=done.figures, bpb=done.bpb, message=done.message)
        for trial, done in zip(open_, mended.trials[1:3], strict=True)
    )
    assert runs.made.total() == 3
    with pytest.raises(Killed):
        runs = Runs(tmp_path / "third")
        search(runs, read(tmp_path, SMALL.replace("trials = 4", "trials = 6")), url, train=killed)
    plan = read(tmp_path, SMALL.replace("trials = 4", "trials = 6"))
    assert not search(other, plan, url).complete and search(other, plan, url, takeover=True).complete


def test_looking_makes_nothing(plan: Ablation, url: str, tmp_path: Path) -> None:
    looked = search(Runs(tmp_path / "store"), plan, url, train=None)
    assert len(looked.trials) == 1 and not looked.complete and not (tmp_path / "study.db").exists()


def test_another_code_or_space_is_another_study(plan: Ablation, url: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "store")
    search(runs, plan, url)
    changed = read(tmp_path, SMALL.replace("high = 64", "high = 48"))
    assert search(runs, changed, url).study != search(runs, plan, url).study
    assert len(optuna.study.get_all_study_names(optuna.storages.RDBStorage(url))) == 2


@pytest.mark.long
def test_settings_that_no_run_can_have_are_passed_over(plan: Ablation, url: str, tmp_path: Path) -> None:
    def check(config: RunConfig) -> None:
        if config.train.matrix_rule == "muon":
            raise ValueError("no muon here")

    runs = Runs(tmp_path / "store")
    assert plan.search is not None
    how = (plan, plan.search, runs.store, runs.place)
    made = run_shared_search(open_study(url, *how), *how, check, runs.train)
    assert made.complete and {trial.settings["train.matrix_rule"] for trial in made.trials} == {"adamw"}
    assert any(trial.state.name == "FAIL" for trial in of_database(url))


def foreign(tmp_path: Path) -> str:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    return f"sqlite:///{tmp_path / 'text.db'}"


WRONG: dict[str, tuple[Callable[[Path], str], str]] = {
    "words": (lambda p: "my secret", "is no URL of a database; expected sqlite:///FILE"),
    "another kind": (lambda p: "mysql://me:secret@host/db", "--study mysql://me:***@host/db: expected sqlite:///FILE"),
    "no such driver": (lambda p: "postgresql+none://me:secret@host/db", "postgresql+none://me:***@host/db: "),
    "a password behind a question mark": (
        lambda p: "postgresql+none://me@host/db?password=secret", "--study postgresql+none://me@host/db: "
    ),
    "in memory": (lambda p: "sqlite://", "--study sqlite://: expected sqlite:///FILE"),
    "no folder": (lambda p: f"sqlite:///{p}/none/study.db", "unable to open database file"),
    "no database": (foreign, "file is not a database"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_url_is_one_line_without_a_password(case: str, tmp_path: Path, capsys: Capture) -> None:
    make, words = WRONG[case]
    url = make(tmp_path)
    runs, plan = Runs(tmp_path / "store"), read(tmp_path)
    with pytest.raises(SearchError) as refused:
        search(runs, plan, url)
    assert words in str(refused.value) and "\n" not in str(refused.value) and "secret" not in str(refused.value)
    assert not runs.made


def test_a_study_of_something_else_is_refused(plan: Ablation, url: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "store")
    name = search(runs, plan, url).study
    study = optuna.load_study(study_name=name, storage=url)
    study.add_trial(optuna.create_trial(value=1.0, user_attrs={"kept": True}))
    with pytest.raises(SearchError, match="trial 5 is not of this search"):
        search(runs, plan, url)


def test_the_verb_has_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The report names the study, and no file of the store its URL."""
    runs, url = Runs(tmp_path / "store", smooth), f"sqlite:///{tmp_path / 'study.db'}"
    read(tmp_path, SMALL)
    monkeypatch.setattr("core.verbs.ablate.run_all", runs.run_all)
    monkeypatch.setattr("core.verbs.ablate.code_version", lambda: "code")
    words = ["ablate", str(tmp_path / "rates.toml"), "--store", str(tmp_path / "store"), "--study", url]
    assert "--study is about trials of a search" in refuse(capsys, *words)
    assert main([*words, "--search"]) == 0
    said = capsys.readouterr().out
    assert "search, 4 of 4 trials: trial " in said and "found" in said
    report = (tmp_path / "store" / "ablations" / "rates" / "report.md").read_text()
    assert "in the study rates-" in report
    texts = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(texts) > 10 and not any(b"study.db" in text for text in texts)
    assert main([*words, "--search", "--dry-run"]) == 0
