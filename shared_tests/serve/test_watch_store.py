"""`skc watch` of a store: the runs of an ablation as they get on and end, and what they show so far. Budget: 6 s."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from core.ablation.plan import Ablation, read_plan
from core.ablation.report import wording
from core.ablation.stats.findings import assess
from core.ablation.store import Place, RunStore
from core.files import replace_text
from core.serve import watch_store
from core.serve.run import application
from core.serve.watch import Watchers, check_watched, feed_of
from core.serve.watch_run import WatchEvent
from core.serve.watch_store import StoreFeed
from core.training.run import Run
from shared_tests.support import ablation_worker
from shared_tests.support.ablation_runs import DATA, PLAN, places, write
from shared_tests.support.serving import Reply, ask
from shared_tests.support.watching import watched


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in worker take its steps without waiting."""
    monkeypatch.setenv("SKC_TEST_STEP", "0")


class Begun:
    """An ablation that has begun, and whose runs the test takes to their ends."""

    def __init__(self, folder: Path, text: str = PLAN) -> None:
        self.plan: Ablation = read_plan(write(folder, text))
        self.store = RunStore(folder / "store")
        self.places = places(self.store, self.plan)
        self.store.write_members(self.plan, self.places)

    def place(self, variant: str, seed: int) -> Place:
        """Return the place of a run."""
        return next(one for one in self.places if (one.job.variant, one.job.seed) == (variant, seed))

    def prepare(self, variant: str, seed: int) -> Place:
        """Let a run be asked for."""
        place = self.place(variant, seed)
        self.store.prepare(place, "code", DATA, "test")
        return place

    def finish(self, variant: str, seed: int) -> None:
        """Train a run to its end."""
        ablation_worker.take(self.prepare(variant, seed).home)


@pytest.fixture
def begun(tmp_path: Path) -> Begun:
    """Two variants, four seeds, nothing trained."""
    return Begun(tmp_path)


def statuses(event: WatchEvent) -> dict[tuple[str, int], str]:
    """Return how the runs of an event stand."""
    return {(run["variant"], run["seed"]): run["status"] for run in event.value["runs"]}


def test_all_runs_come_first_and_then_those_that_changed(begun: Begun) -> None:
    feed = StoreFeed(begun.store.path)
    (first,) = feed.look()
    assert first.name == "all" and set(statuses(first).values()) == {"waiting"} and len(first.value["runs"]) == 8
    store = first.value["store"]
    assert (store["name"], store["reference"], store["variants"]) == ("widths", "plain", ["plain", "wide"])
    assert ("runs", "8 waiting") in first.value["facts"] and first.value["findings"][0]["rows"] == []
    assert feed.look() == []
    begun.finish("plain", 2)
    (second,) = feed.look()
    assert second.name == "more" and statuses(second) == {("plain", 2): "done"}
    run = second.value["runs"][0]
    assert run["bpb"] == pytest.approx(2.0 - 0.032 + 2e-4) and run["points"] == [[i, 2.0] for i in range(1, 11)]
    assert ("runs", "1 done, 7 waiting") in second.value["facts"]
    assert feed.look() == []


def test_a_run_under_way_tells_its_new_points_alone(begun: Begun) -> None:
    feed = StoreFeed(begun.store.path)
    feed.look()
    place = begun.prepare("wide", 1)
    with begun.store.held(place):
        run = Run.create(place.folder, place.job.config, b"tokenizer")
        for step in (1, 2):
            run.log(step, {"train/loss": 3.0, "train/bpb": 2.5, "clock/seconds": 1.0 * step})
        (event,) = feed.look()
        (told,) = event.value["runs"]
        assert (told["status"], told["step"], told["steps"], told["left"]) == ("running", 2, 10, 8.0)
        assert told["points"] == [[1, 2.5], [2, 2.5]]
        assert "wide seed 1" in " ".join(event.value["findings"][0]["doubts"])
        run.log(3, {"train/loss": 3.0, "train/bpb": 2.25, "clock/seconds": 3.0})
        (event,) = feed.look()
        assert event.value["runs"][0]["points"] == [[3, 2.25]] and "findings" not in event.value
        assert feed.look() == []
    (event,) = feed.look()
    assert statuses(event) == {("wide", 1): "waiting"}, "its process is gone, and left no message"


def test_findings_are_those_of_the_report(begun: Begun) -> None:
    feed = StoreFeed(begun.store.path)
    for seed in (1, 2, 3):
        begun.finish("plain", seed)
        begun.finish("wide", seed)
    (event,) = feed.look()
    (told,) = event.value["findings"]
    (tables,) = assess(begun.store.outcome(begun.plan, begun.places))
    assert told["rows"] == wording.table(tables, "plain")
    ((effect, words),) = wording.answers(tables, "plain")
    assert told["answers"][0]["words"].lower() == words.lower()
    assert told["effects"][0]["mean"] == pytest.approx(-0.032) and effect.paired
    assert told["effects"][0]["differences"] == effect.differences
    assert json.dumps(event.value, allow_nan=False)


def test_failures_are_told_with_their_words(begun: Begun) -> None:
    feed = StoreFeed(begun.store.path)
    feed.look()
    begun.store.fail(begun.prepare("plain", 1), "the loss (nan) is not finite")
    (event,) = feed.look()
    assert statuses(event) == {("plain", 1): "failed"}
    assert event.value["runs"][0]["message"] == "the loss (nan) is not finite"
    begun.finish("plain", 1)
    assert statuses(feed.look()[0]) == {("plain", 1): "done"}


def test_finished_metrics_are_read_once(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, reader = [], watch_store.read_result
    monkeypatch.setattr(
        watch_store, "read_result", lambda job, folder, status: reads.append(folder) or reader(job, folder, status)
    )
    feed = StoreFeed(begun.store.path)
    for seed in (1, 2):
        begun.finish("plain", seed)
        feed.look()
        feed.look()
    assert reads == [begun.place("plain", seed).folder for seed in (1, 2)]


@pytest.mark.parametrize("gone", ["moved", "damaged"])
def test_without_its_file_an_ablation_is_known_by_its_runs(begun: Begun, gone: str) -> None:
    begun.finish("plain", 1)
    begun.finish("wide", 1)
    file = Path(begun.plan.path)
    file.unlink() if gone == "moved" else file.write_text("[")
    (event,) = StoreFeed(begun.store.path).look()
    assert event.value["store"]["reference"] == "plain" and ("base", "unknown") in event.value["facts"]
    assert event.value["findings"][0]["effects"][0]["mean"] == pytest.approx(-0.032)


def test_trials_of_a_search_are_runs_and_no_variants(begun: Begun) -> None:
    trial = begun.places[0]._replace(job=begun.places[0].job._replace(variant="trial-0", seed=9), key="a" * 16)
    begun.store.write_members(begun.plan, [*begun.places, trial])
    (event,) = StoreFeed(begun.store.path).look()
    assert event.value["store"]["variants"] == ["plain", "wide", "trial-0"] and len(event.value["runs"]) == 9
    assert dict(event.value["facts"])["seeds"] == "1, 2, 3, 4"


def test_a_store_of_several_ablations_shows_the_newest_or_the_one_named(begun: Begun, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    other = read_plan(write(tmp_path / "two", PLAN.replace('"widths"', '"others"')))
    begun.store.write_members(other, places(begun.store, other)[:2])
    os.utime(begun.store.ablation_folder(begun.plan) / "members.json", ns=(1, 1))
    (event,) = StoreFeed(begun.store.path).look()
    assert (event.value["store"]["name"], event.value["names"]) == ("others", ["others", "widths"])
    assert StoreFeed(begun.store.path, "widths").look()[0].value["store"]["name"] == "widths"
    assert feed_of(begun.store.ablation_folder(begun.plan)).look()[0].value["store"]["name"] == "widths"
    assert check_watched(str(begun.store.path)) == begun.store.path


@pytest.mark.parametrize("name", ["none", "../../secret", "/etc", "", "\0"])
def test_a_name_that_the_store_does_not_have_is_told(begun: Begun, name: str) -> None:
    feed = StoreFeed(begun.store.path, name)
    (event,) = feed.look()
    assert event.value["store"] is None and "no ablation of the name" in event.value["words"]
    assert feed.look() == []


HOSTILE = ("{", "[]", '{"schema": 1, "file": "x", "runs": [["a", [], {}, "k"]]}', '{"schema": 9}', "\0")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_damaged_list_of_runs_is_said_until_it_is_mended(begun: Begun, text: str) -> None:
    members = begun.store.ablation_folder(begun.plan) / "members.json"
    good = members.read_text()
    members.write_text(text)
    feed = StoreFeed(begun.store.path)
    (event,) = feed.look()
    assert event.value["store"] is None and "members.json" in event.value["words"]
    assert feed.look() == []
    members.write_text(good)
    assert len(feed.look()[0].value["runs"]) == 8


@pytest.mark.parametrize("text", HOSTILE)
def test_damaged_files_of_a_run_end_nothing(begun: Begun, text: str) -> None:
    home = begun.prepare("plain", 1).home
    (home / "job.json").write_text(text)
    (event,) = StoreFeed(begun.store.path).look()
    assert statuses(event)["plain", 1] == "waiting" and event.value["runs"][0]["steps"] is None
    (home / "failed.json").write_text("{")
    (event,) = StoreFeed(begun.store.path).look()
    assert statuses(event)["plain", 1] == "failed" and "failed.json" in event.value["runs"][0]["message"]
    (home / "run").mkdir()
    os.mkfifo(home / "run" / "metrics.jsonl")
    (event,) = StoreFeed(begun.store.path).look()
    assert "a FIFO" in event.value["runs"][0]["message"]


def test_the_report_is_served_as_it_is_and_nothing_else_of_the_store(begun: Begun, tmp_path: Path) -> None:
    served = application(Watchers(begun.store.path, threading.Event(), 0.0).routes(), ["127.0.0.1"])

    def get(query: str) -> Reply:
        return ask(served, "GET", f"/report?{query}")

    assert get("name=widths").status == 404, "there is none yet"
    report = begun.store.ablation_folder(begun.plan) / "report.html"
    replace_text(report, "<title>report</title>")
    answer = get("name=widths")
    assert (answer.status, answer.body) == (200, "<title>report</title>")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for query in ("", "name=..", "name=../../store", "name=%00", "name=widths/../widths"):
        assert get(query).status == 404, query
    report.unlink()
    (tmp_path / "secret").write_text("secret")
    report.symlink_to(tmp_path / "secret")
    assert get("name=widths").status == 404


def test_the_stream_of_a_store_tells_a_run_that_ends(begun: Begun) -> None:
    served = application(Watchers(begun.store.path, threading.Event(), 0.0).routes(), ["127.0.0.1"])
    done: list[Any] = []

    def enough(body: bytes) -> bool:
        if not done:
            done.append(begun.finish("wide", 4))
        return b"event: more" in body

    names = [(name, value["kind"] if name == "all" else len(value["runs"])) for name, value in watched(served, enough)]
    assert names == [("all", "store"), ("more", 1)]


def test_a_store_that_begins_later_takes_the_place_of_a_run_that_is_waited_for(tmp_path: Path) -> None:
    served = application(Watchers(tmp_path / "store", threading.Event(), 0.0).routes(), ["127.0.0.1"])

    def enough(body: bytes) -> bool:
        if not (tmp_path / "store").exists():
            Begun(tmp_path)
        return b'"kind": "store"' in body

    kinds = [value["kind"] for _, value in watched(served, enough)]
    assert kinds == ["run", "store"]
