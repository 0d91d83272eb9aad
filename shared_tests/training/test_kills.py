"""Killed at the worst moments, a run ends like one that nobody killed (many more: scripts/kills). Budget: 25 s."""

import os
from pathlib import Path
from typing import Any

import pytest

from core.engine.loading import load_engine
from core.files import TEMPORARY
from core.training.run import Run
from shared_tests.support.killed import PLACES, everything, small_data
from shared_tests.support.kills import campaign, compare, live


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and `whole`, a run that nobody killed."""
    made = tmp_path_factory.mktemp("kills")
    assert live("mlx", made / "whole", small_data(made)).kill is None
    return made


def test_kills_inside_a_save(folder: Path) -> None:
    """One run, killed in the write, before the fsync, before the rename and before the copy of a checkpoint."""
    path, data = folder / "run", str(folder / "data")
    expected = {"write": (2, 2, 0.5), "fsync": (4, 2, 1.0), "rename": (6, 2, 1.0), "copy": (12, 0, 0.0)}
    for place in PLACES:
        # Every life comes to its second save: the first goes through, and is the one that is left. Step 12 is kept.
        life = live("mlx", path, data, die=f"{place}:{1 if place == 'copy' else 2}")
        assert life.kill and life.kill.when == "save", f"{place} was not reached, or not in a save"
        sizes = {file.name: file.stat().st_size for file in (path / "state").iterdir()}
        fresh = [size for name, size in sizes.items() if name.startswith("checkpoint.safetensors.")]
        assert len(fresh) == (place != "copy"), "what earlier lives left is swept"
        written = sum(fresh) / sizes["checkpoint.safetensors"]
        assert (life.kill.saved, life.kill.lost, round(written, 2)) == expected[place], place
    assert Run.open(path).kept() == [6], "step 12 was to be copied"
    assert live("mlx", path, data).kill is None
    compare(path, folder / "whole")
    assert Run.open(path).kept() == [6, 12]


@pytest.mark.long
def test_kills_at_any_time(folder: Path) -> None:
    said: list[str] = []
    found = campaign("mlx", 3, 1, folder / "campaign", said.append)
    assert len(found.kills) == 3 and max(kill.lost for kill in found.kills) <= 2, found


def test_a_save_is_on_the_disk_before_it_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kill can show, for the kernel keeps what was written: in which order it must reach the disk."""
    config = everything(str(folder / "data"))
    run = Run.create(folder / "order", config, (folder / "whole" / "tokenizer.model").read_bytes())
    run.log(6, {"train/loss": 1.0})
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def name(handle: int) -> str:
        known = [path for path in run.path.rglob("*") if os.path.samestat(path.stat(), os.fstat(handle))]
        return known[0].name

    def record(what: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            last = arguments[-1]
            done.append(f"{what} {TEMPORARY.sub('.tmp', name(last) if isinstance(last, int) else Path(last).name)}")
            return function(*arguments)

        return call

    engine = load_engine("mlx", config)
    for word, function in (("fsync", fsync), ("replace", replace)):
        monkeypatch.setattr(os, word, record(word, function))
    run.save(engine, 6, 1.0)
    assert done == [
        "fsync metrics.jsonl",
        "fsync checkpoint.safetensors.tmp",
        "replace checkpoint.safetensors",
        "fsync step-6.safetensors.tmp",
        "replace step-6.safetensors",
        "fsync state",
    ]
