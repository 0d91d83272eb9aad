"""The mutation campaign: no bytes break a reader, and a reader that is broken is found. Budget: 20 s."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest

import core.data.dataset
import core.data.manifest
import core.scoring.ledger
import core.training.checkpoint
import core.training.records
from core.ablation import records as ablation_records
from core.export import codecs
from core.export.coder import Decoder
from core.formats import toml
from shared_tests.support import mutants, mutations


@pytest.mark.parametrize("before, after", [(1_000, 700), pytest.param(10_000, 2_000, marks=pytest.mark.long)])
def test_no_mutation_breaks_a_reader(before: int, after: int) -> None:
    command = [sys.executable, "-m", "shared_tests.support.mutations", "--seed", "1"]
    command += ["--before", str(before), "--after", str(after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if ": accepted" in line]
    assert len(lines) == 6 and f"{before + after} of each file" in done.stdout
    for line in lines:  # a campaign whose files are all refused at the door would prove little
        accepted, refused = (int(part.split()[-1]) for part in line.partition(": ")[2].split(","))
        assert accepted > 20 and refused > accepted, line


class AnyBytes(bytes):
    """Bytes that no others differ from."""

    def __ne__(self, other: object) -> bool:
        return False


def any_tables(reader: object, at: int) -> bytes:
    return AnyBytes()


def any_end(decoder: Decoder) -> None:
    pass


def any_type_of_tensor(path: Path, key: str, value: np.ndarray) -> None:
    pass


def no_digest(arrays: dict[str, np.ndarray]) -> str:
    return "0" * 64


def tokens_to_the_end(path: str) -> np.ndarray:
    return np.memmap(path, "<u2", "r", 1024)


FAULTS = {
    "artifact": [(Decoder, "close", any_end), (codecs, "SCALE_FLOOR", 0.0), (codecs.PlanReader, "since", any_tables)],
    "checkpoint": [
        (core.training.checkpoint, "_check_type", any_type_of_tensor),
        (core.training.checkpoint, "digest", no_digest),
    ],
    "shard": [(mutations, "open_shard", tokens_to_the_end)],
}


@pytest.mark.parametrize("name, fault", [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_planted_fault_is_found(
    name: str, fault: tuple[object, str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*fault)
    _, failure = mutations.campaign(tmp_path, 1, range(300), 200)
    assert failure and failure[1].startswith(f"{name}, ")


def test_an_index_gives_the_same_file_whatever_came_before_it(tmp_path: Path) -> None:
    for name, reader in mutations.readers(tmp_path).items():
        files = [mutations.mutant(reader, name, 1, index, index < 60) for index in range(80)]
        again = [mutations.mutant(reader, name, 1, index, index < 60) for index in reversed(range(80))]
        assert files == again[::-1] and len(set(files)) > 40, name
    rng, before = mutants.Random(1), repr(mutants.HOSTILE)
    for _ in range(500):  # small trees, so that what was put into one is changed again
        tree = {"a": 1}
        for _ in range(5):
            mutants.alter(rng, tree)
    assert repr(mutants.HOSTILE) == before


def test_no_mutation_breaks_a_reader_of_records(tmp_path: Path) -> None:
    """What a run, prepared data, a ledger and an ablation are described by: each refused in a line, or used."""
    names = mutations.records(tmp_path)
    counts, failure = mutations.campaign(tmp_path, 1, range(50), 40, names=names)
    assert failure is None, failure[1]
    assert len(names) == 11 and len(counts) == 22
    assert all(accepted[""] for (name, _), accepted in counts.items() if name in ("machine", "looked"))
    for name in ("metrics", "env", "manifest", "ledger", "members", "plan"):
        before = counts[name, "before"]
        assert before[""] and before.total() > before[""], name


def by_numpy(file: BinaryIO) -> SimpleNamespace:
    file.seek(8)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return SimpleNamespace(type=dtype.str, fortran=fortran, shape=shape)


def unchecked(_: object, positions: np.ndarray, __: object, *marks: int) -> list[np.ndarray]:
    """Return what the ledger's check does, of whatever is given."""
    return [np.full(positions.shape, mark) for mark in marks]


RECORD_FAULTS = {
    "job": (ablation_records, "read_json", lambda path, limit: json.loads(path.read_text())),
    "members": (ablation_records, "read_json", lambda path, limit: json.loads(path.read_text())),
    "metrics": (core.training.records, "check_value", lambda *_: None),
    "env": (core.training.records, "check_value", lambda *_: None),
    "plan": (toml, "decode_text", lambda path, data: data.decode()),
    "ledger": (core.scoring.ledger.Ledger, "_check", unchecked),
    "manifest": (core.data.manifest, "check_value", lambda *_: None),
    "lengths": (core.data.dataset, "read_header", by_numpy),
}


@pytest.mark.parametrize("name", RECORD_FAULTS)
def test_a_planted_fault_in_a_reader_of_records_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*RECORD_FAULTS[name])
    _, failure = mutations.campaign(tmp_path, 1, range(900), 800, names=[name])
    assert failure and failure[1].startswith(f"{name}, ")
