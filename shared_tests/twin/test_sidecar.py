"""The file of a twin: read back as written, refused for another artifact, never anything but one typed error."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.formats.tensors import write_tensors
from core.model.params import start_values
from core.training.checkpoint import digest
from core.twin import sidecar
from core.twin.params import twin_start
from core.twin.settings import TwinConfig
from core.twin.sidecar import (
    Sidecar,
    SidecarError,
    artifact_sha256,
    beside,
    check_place,
    read_sidecar,
    write_sidecar,
)
from shared_tests.support import mutants, mutations
from shared_tests.support.distilling import small_config

MODEL = small_config().model
TWINS = {"full": TwinConfig(block=4), "low": TwinConfig(rank=2, block=6, rule="end")}


def written(folder: Path, name: str) -> tuple[Path, Path, Sidecar]:
    """Write the twin of an artifact (whose content a sidecar does not read) and return both files."""
    artifact = folder / "artifact.skc"
    artifact.write_bytes(b"SKCMODEL and so on")
    weights, twin = start_values(MODEL, 1), TWINS[name]
    params = {n: np.asarray(value, np.float32) for n, value in twin_start(MODEL, twin, weights)[0].items()}
    made = Sidecar(twin, params, artifact_sha256(artifact), digest(weights), 12)
    write_sidecar(beside(artifact), made)
    return artifact, beside(artifact), made


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    artifact, path, made = written(tmp_path, name)
    read = read_sidecar(path, MODEL, artifact)
    assert path.name == "twin.safetensors" and read._replace(params={}) == made._replace(params={})
    assert read.params.keys() == made.params.keys()
    assert all(np.array_equal(read.params[n], made.params[n]) for n in made.params)


def test_the_twin_of_another_artifact_is_refused_in_one_line(tmp_path: Path) -> None:
    artifact, path, _ = written(tmp_path, "full")
    artifact.write_bytes(b"another")
    with pytest.raises(SidecarError, match="is the twin of artifact .* make its own with skc distill"):
        read_sidecar(path, MODEL, artifact)


def test_a_twin_takes_the_place_of_nothing_but_a_twin(tmp_path: Path) -> None:
    artifact, path, made = written(tmp_path, "full")
    own, other = tmp_path / "own_text.safetensors", tmp_path / "other.safetensors"
    write_tensors(own, {"tokens": np.zeros(3, np.int32)}, {"skc": '{"artifact": "a"}'})
    write_sidecar(other, made)
    path.write_bytes(b"a damaged one, to be made again")
    for free in (path, other, tmp_path / "new.safetensors"):
        check_place(free, artifact)
    (tmp_path / "model").mkdir()
    named = artifact.rename(tmp_path / "model" / "twin.safetensors")
    (tmp_path / "linked").symlink_to(named)
    for taken in (named, tmp_path / "linked", own, tmp_path, tmp_path / "nowhere" / "twin.safetensors"):
        with pytest.raises(SidecarError, match="choose another --twin"):
            check_place(taken, named)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    artifact, path, made = written(tmp_path, "full")
    name = next(iter(made.params))
    bad = {
        "finite": {**made.params, name: np.full_like(made.params[name], np.nan)},
        "missing": {n: value for n, value in made.params.items() if n != name},
        "shape": {**made.params, name: made.params[name][..., :-1]},
        "float32": {**made.params, name: made.params[name].astype(np.float16)},
    }
    for word, params in bad.items():
        write_sidecar(path, made._replace(params=params))
        with pytest.raises(SidecarError, match=word):
            read_sidecar(path, MODEL, artifact)
    write_sidecar(path, made._replace(twin=TwinConfig(block=4, rank=2)))
    with pytest.raises(SidecarError):
        read_sidecar(path, MODEL, artifact)


def campaign(folder: Path, count: int) -> tuple[Counter, str]:
    """Read `count` mutants of both twins; return the outcomes and the first failure."""
    counts: Counter = Counter()
    for name in TWINS:
        place = folder / name
        place.mkdir()
        artifact, path, made = written(place, name)
        whole, shapes = path.read_bytes(), {n: value.shape for n, value in made.params.items()}

        def read(path: Path, artifact: Path = artifact, made: Sidecar = made, shapes: dict = shapes) -> None:
            got = read_sidecar(path, MODEL, artifact)
            assert got.artifact_sha256 == made.artifact_sha256 and 0 <= got.steps < 2**53
            assert all(np.isfinite(value).all() for value in got.params.values())
            assert {n: value.shape for n, value in got.params.items()} == shapes

        reader = mutations.Reader(
            ".safetensors", SidecarError, [whole], mutants.mutate_checkpoint,
            lambda whole: 8 + int.from_bytes(whole[:8], "little"), read,
        )  # fmt: skip
        for index in range(count):
            data = mutations.mutant(reader, name, 1, index, index % 3 > 0)
            path.write_bytes(data)
            outcome, detail = mutations.attempt(reader, path)
            counts[outcome] += 1
            if outcome == "failed":
                return counts, f"{name} {index}: {detail}"
    return counts, ""


@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.long)])
def test_no_mutation_breaks_the_reader(count: int, tmp_path: Path) -> None:
    counts, failure = campaign(tmp_path, count)
    assert not failure, failure
    assert counts["accepted"] > 5 and counts["refused"] > count, counts


@pytest.mark.parametrize("check", ["check_arrays", "check_value"])
def test_a_reader_without_a_check_is_found(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, check, lambda *arguments: None)
    assert campaign(tmp_path, 150)[1]
