"""`skc watch` of a run: everything at first, then what is new, by new bytes alone, whatever lies there. Budget: 6 s."""

import asyncio
import dataclasses
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import presets
from core.config import to_json
from core.serve import tail, watch_run
from core.serve.page_files import page_routes
from core.serve.run import application
from core.serve.tail import BLOCK, MARK, Tail
from core.serve.watch import MOST_WATCHERS, Watchers, check_watched, feed_of
from core.serve.watch_run import MOST_POINTS, RunFeed, WatchEvent
from core.training.records import RunError
from shared_tests.support.ablation_worker import whole_score
from shared_tests.support.command_line import Capture, refuse
from shared_tests.support.serving import ask
from shared_tests.support.watching import listen, watched


def line(step: int, **values: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    return {"step": step, "train/loss": 3.0, "train/bpb": 2.0, "clock/seconds": 0.5 * step, **values}


def append(folder: Path, *rows: Any) -> int:
    """Append lines to a run's metrics and return how many bytes they are."""
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    with open(folder / "metrics.jsonl", "ab") as file:
        return file.write(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with settings and two lines."""
    path = tmp_path / "run"
    path.mkdir()
    config = presets.get("debug").config
    train = dataclasses.replace(config.train, steps=40)
    (path / "config.json").write_text(json.dumps(to_json(dataclasses.replace(config, train=train))))
    (path / "env.json").write_text(json.dumps({"backend": "cuda", "device": "CPU", "command": "skc train debug"}))
    append(path, line(10), line(20))
    return path


def steps(event: WatchEvent) -> list[int]:
    """Return the steps of an event's rows."""
    return [row["step"] for row in event.value["rows"]]


def test_everything_comes_first_and_then_a_new_line_alone(folder: Path) -> None:
    feed = RunFeed(folder)
    (first,) = feed.look()
    assert (first.name, steps(first)) == ("all", [10, 20])
    run = first.value["run"]
    assert (run["preset"], run["steps"], run["command"]) == ("debug", 40, "skc train debug")
    assert ["device", "CPU"] in run["facts"] and "train.steps: 20 -> 40" in run["settings"]
    assert feed.look() == []
    append(folder, line(30, **{"val/bpb": 2.5, "val/error": 0.1}))
    (second,) = feed.look()
    assert second.name == "more" and second.value["rows"] == [line(30, **{"val/bpb": 2.5, "val/error": 0.1})]
    assert (second.value["state"], second.value["left"]) == ("training", pytest.approx(5.0))
    assert feed.look() == []


def test_a_run_by_the_clock_has_the_rest_of_its_seconds_left(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["train"] |= {"seconds": 60.0, "reserve_seconds": 5.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert RunFeed(folder).look()[0].value["left"] == 45.0


def test_half_a_line_waits_for_its_other_half(folder: Path) -> None:
    feed = RunFeed(folder)
    feed.look()
    whole = json.dumps(line(30)).encode() + b"\n"
    append(folder, whole[:20])
    assert feed.look() == []
    append(folder, whole[20:] + whole[:5])
    (event,) = feed.look()
    assert steps(event) == [30] and event.value["unread"] == 0


@pytest.mark.parametrize("how", ["truncated", "replaced", "written over"])
def test_a_file_that_begins_anew_is_told_anew(folder: Path, how: str) -> None:
    feed, file = RunFeed(folder), folder / "metrics.jsonl"
    feed.look()
    rows = b"".join(json.dumps(line(step)).encode() + b"\n" for step in (5, 6, 7))
    if how == "truncated":
        os.truncate(file, 0)
        append(folder, line(5))
    elif how == "replaced":  # as training does when it goes on from a checkpoint
        (folder / "other").write_bytes(rows[: rows.index(b"\n") + 1])
        os.replace(folder / "other", file)
    else:  # longer than before, the same file
        file.write_bytes(rows)
    (event,) = feed.look()
    assert event.name == "all" and steps(event) == ([5, 6, 7] if how == "written over" else [5])
    append(folder, line(8))
    assert steps(feed.look()[0]) == [8]


HOSTILE = (
    b"\n", b"{\n", b"null\n", b"[1]\n", b'{"step": NaN}\n', b'{"step": -1}\n', b'{"step": 1, "train/loss": 1}\n',
    b'{"step": 1, "surprise": 1}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"step": 1e999}\n', b"\0\0\0\n",
    b'{"step": 3, "samples": [{}]}\n', b'{"step": "<script>"}\n', b"x" * (BLOCK + 10) + b"\n",
    b"y" * (2 * BLOCK) + b"\n",
)  # fmt: skip


def test_hostile_lines_are_counted_and_break_nothing(folder: Path) -> None:
    feed = RunFeed(folder)
    feed.look()
    for number, bad in enumerate(HOSTILE, 1):
        append(folder, bad, line(20 + number))
        (event,) = feed.look()
        assert steps(event) == [20 + number], bad[:40]
    assert event.value["unread"] == len(HOSTILE) - 2, "lines that are too long are passed over"
    assert steps(RunFeed(folder).look()[0])[-1] == 20 + len(HOSTILE)


class Counting(io.BufferedReader):
    """A file whose raw reads are counted."""

    taken = 0

    @property
    def raw(self) -> Any:  # type: ignore[override]
        """The same file, counting."""
        inner = super().raw

        class Raw:
            seek = inner.seek

            @staticmethod
            def read(count: int) -> bytes:
                data = inner.read(count) or b""
                Counting.taken += len(data)
                return data

        return Raw


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count what is read of files that are followed; return a function that tells and forgets it."""
    door = tail.open_file
    monkeypatch.setattr(tail, "open_file", lambda path, limit: Counting(door(path, limit).detach()))

    def taken() -> int:
        found, Counting.taken = Counting.taken, 0
        return found

    return taken


def test_new_bytes_alone_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(folder, *(line(step) for step in range(21, 30_000)))
    size = (folder / "metrics.jsonl").stat().st_size
    taken, feed = counted(monkeypatch), RunFeed(folder)
    feed.look()
    assert size <= taken() <= size + MARK * (2 + size // BLOCK) and size > 2 * BLOCK
    for step in range(30_000, 30_010):
        added = append(folder, line(step))
        assert steps(feed.look()[0]) == [step] and taken() <= added + MARK
        assert feed.look() == [] and taken() == 0, "a file that did not change is not opened"


def test_a_long_curve_is_thinned_and_keeps_samples_and_the_newest_line(folder: Path) -> None:
    append(folder, line(21, samples=["She was"]), *(line(step) for step in range(22, 6000)))
    (event,) = RunFeed(folder).look()
    assert len(event.value["rows"]) <= 2 * MOST_POINTS and steps(event)[-1] == 5999
    assert [row["samples"] for row in event.value["rows"] if "samples" in row] == [["She was"]]
    gaps = {b - a for a, b in zip(steps(event)[:300], steps(event)[1:300], strict=False)}
    assert max(gaps) <= 16, "the start is thinned evenly"


def test_many_lines_at_once_are_told_thinned_and_a_few_blocks_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = RunFeed(folder)
    feed.look()
    append(folder, *(line(step) for step in range(21, 6000)))
    (event,) = feed.look()
    assert event.name == "all" and len(event.value["rows"]) <= 2 * MOST_POINTS and steps(event)[0] < steps(event)[-1]
    monkeypatch.setattr(watch_run, "LOOKS", 1)
    monkeypatch.setattr(tail, "BLOCK", 1 << 15)
    append(folder, *(b'{"step": %d}\n' % step for step in range(6000, 10_000)))
    read = [steps(event)[-1] for _ in range(3) for event in feed.look()]
    assert read == sorted(set(read)) and 6000 < read[0] < 9_999 == read[-1], "the page need not wait for the end"
    monkeypatch.setattr(watch_run, "MAX_ROWS", 9_000)
    (event,) = feed.look()
    assert event.value["words"].endswith("over 9,000 lines: this is not a run's") and feed.look() == []


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path, folder: Path) -> None:
    feed = RunFeed(tmp_path / "later")
    (event,) = feed.look()
    assert (event.value["state"], event.value["run"]) == ("waiting", None) and "no run yet" in event.value["words"]
    assert feed.look() == []
    (tmp_path / "later").mkdir()
    assert feed.look() == []
    (tmp_path / "later" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (event,) = feed.look()
    assert event.name == "all" and "nothing is recorded yet" in event.value["words"] and event.value["run"]["steps"]
    append(tmp_path / "later", line(1))
    (event,) = feed.look()
    assert (event.name, event.value["state"], steps(event)) == ("more", "training", [1])


def test_damaged_settings_are_said_and_the_curve_goes_on(folder: Path) -> None:
    feed = RunFeed(folder)
    good = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    (event,) = feed.look()
    assert event.value["run"] is None and "not JSON" in event.value["words"] and steps(event) == [10, 20]
    append(folder, line(30))
    assert "not JSON" in feed.look()[0].value["words"], "for as long as it is so"
    (folder / "config.json").write_text(good)
    assert feed.look()[0].value["run"]["steps"] == 40


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "too large"])
def test_whatever_lies_in_the_place_of_the_metrics_is_said(folder: Path, kind: str) -> None:
    file = folder / "metrics.jsonl"
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with open(file, "wb") as large:
            large.truncate((64 << 20) + 1)
    (event,) = RunFeed(folder).look()
    assert event.value["state"] == "waiting"
    assert "expected" in event.value["words"], event.value["words"]


def test_a_finished_run_says_so_and_then_nothing(folder: Path) -> None:
    for name in ("artifact.skc", "report.md", "curve.png"):
        (folder / name).touch()
    feed = RunFeed(folder)
    feed.look()
    score = whole_score(1.9)
    append(folder, {"step": 40, "final/score": score})
    assert feed.look()[0].value["state"] == "training"
    append(folder, {"step": 40, "final/artifact": {"score": score, "bytes": 1000}})
    assert feed.look()[0].value["state"] == "finished"
    assert [feed.look() for _ in range(3)] == [[], [], []]


def test_nothing_is_written_into_the_folder(folder: Path) -> None:
    def seen() -> list[tuple[str, int, int]]:
        files = [folder, *folder.rglob("*")]
        return sorted((str(file), file.stat().st_mtime_ns, file.stat().st_ino) for file in files)

    before, feed = seen(), RunFeed(folder)
    feed.look()
    feed.look()
    assert seen() == before


def test_a_block_ends_inside_a_line(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    rows = [f"{number:07d}".encode() for number in range(BLOCK // 4)]
    file.write_bytes(b"\n".join(rows) + b"\n")
    follower, found, more = Tail(file), [], True
    while more:
        lines, anew, more = follower.look()
        assert not anew
        found += lines
    assert found == rows


def app(folder: Path, every: float = 0.0) -> Any:
    """Return what `skc watch` serves."""
    watchers = Watchers(folder, threading.Event(), every)
    return application([*page_routes("watch.html"), *watchers.routes()], ["127.0.0.1"])


def test_the_stream_tells_several_watchers_what_comes(folder: Path) -> None:
    served = app(folder)

    def seen(body: bytes) -> bool:
        """Let the run record another line once both watchers have what there is."""
        count = body.count(b"event: ")
        waiting[0] += count == 1 and body.endswith(b"\n\n")
        if waiting[0] == 2:
            waiting[0] = 3
            append(folder, line(30))
        return count == 2

    async def both() -> list[Any]:
        return await asyncio.gather(*(listen(served, seen) for _ in range(2)))

    waiting = [0]
    for answer in asyncio.run(both()):
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
        (first, whole), (second, more) = answer.events()
        assert (first, len(whole["rows"]), whole["kind"]) == ("all", 2, "run")
        assert (second, [row["step"] for row in more["rows"]]) == ("more", [30])


def test_a_quiet_stream_says_that_it_is_there(folder: Path) -> None:
    assert [name for name, _ in watched(app(folder), lambda body: b": still here\n\n" in body)] == ["all"]


def test_the_stream_ends_when_the_server_does(folder: Path) -> None:
    stopping = threading.Event()
    served = application(Watchers(folder, stopping, 0.0).routes(), ["127.0.0.1"])

    def stop(body: bytes) -> bool:
        stopping.set()
        return False

    assert len(watched(served, stop)) == 1


def test_too_many_watchers_are_refused_and_places_come_free(folder: Path) -> None:
    watchers = Watchers(folder, threading.Event(), 0.0)
    served = application(watchers.routes(), ["127.0.0.1"])

    async def crowd() -> int:
        streams = [watchers.events() for _ in range(MOST_WATCHERS)]
        for stream in streams:
            await anext(stream)
        refused = (await listen(served)).status
        for stream in streams:
            await stream.aclose()
        return refused

    assert asyncio.run(crowd()) == 429
    assert asyncio.run(listen(served, bool)).status == 200


def test_a_foreign_host_gets_nothing_and_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    served = app(folder)
    assert ask(served, "GET", "/api/watch", headers=(("host", "evil.example"),)).status == 403
    page = ask(served, "GET", "/")
    assert page.status == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("watch.js", "watch_run.js", "watch_store.js", "page.css", "dom.js", "chart.js", "icon.svg"):
        assert ask(served, "GET", f"/{name}").status == 200, name
    for path in ("/page.js", "/../watch.py", "/config.json", "/%2e%2e/watch.py", "/metrics.jsonl"):
        assert ask(served, "GET", path).status == 404, path


def test_what_is_no_run_and_no_store_is_refused(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refuse(capsys, "watch", str(tmp_path / "file"))
    assert f"it holds run: skc watch {folder}" in refuse(capsys, "watch", str(tmp_path))
    (tmp_path / "other").mkdir()
    assert check_watched(str(tmp_path / "other")) == tmp_path / "other", "an empty folder may become a run"
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(RunError, match="is no run .* and no store"):
        check_watched(str(tmp_path / "other"))
    assert check_watched(str(tmp_path / "later")) == tmp_path / "later"
    assert isinstance(feed_of(folder), RunFeed)
