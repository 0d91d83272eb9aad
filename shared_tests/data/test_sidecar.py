"""Byte sidecars of published shards: held to the tokens, used where they agree, refused with a reason. Budget: 5 s."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.data.adopt
from core.audit.text.rules import check_bytes, check_reversible
from core.cli import main
from core.data.bundled import BUNDLED
from core.data.corpus import read_documents
from core.data.dataset import DataError, Dataset, open_dataset
from core.data.shards import file_sha256, open_shard, write_shard
from core.data.tokenizer import TRANSFORMED, Tokenizer
from core.data.tokenizer_training import train_tokenizer
from core.data.transform import ESCAPE, NEXT, TITLE
from core.scoring.accounting import count_bytes

SENTENCE = "The NASA Team and Bob saw an iPhone over Texas"
"""46 bytes, in tokens 6 markers."""
NOVEL = next(iter(read_documents([str(BUNDLED / "val.jsonl.xz")])))
TEXTS = [SENTENCE, "McKay", f"{TITLE} Odd {ESCAPE}", NOVEL[:2000]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer as published ones are: with the four markers, and nothing that says what for."""
    path = tmp_path_factory.mktemp("model") / "ops.model"
    path.write_bytes(train_tokenizer([NOVEL, SENTENCE], 400, "caseops").removesuffix(TRANSFORMED["caseops"]))
    return str(path)


def honest(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what the tokens of a document cost, counted by the pieces' letters one by one; BOS costs nothing."""
    costs, escaped = [0], False
    for i in tokenizer.encode(text).tolist():
        cost = 0
        piece = tokenizer._processor.id_to_piece(i)
        for letter in piece.replace("\u2581", " "):
            if not escaped and letter == ESCAPE:
                escaped = True
            elif escaped or letter not in f"{TITLE}\ue002{NEXT}":
                cost, escaped = cost + len(letter.encode()), False
        costs.append(1 if tokenizer._processor.is_byte(i) else cost)
    return costs


def published(
    folder: Path, model: str, texts: list[str], change: Any = None, shards: int = 1
) -> tuple[str, np.ndarray, np.ndarray]:
    """Write published shards of texts with a sidecar of validation; return the folder, its tokens and its sidecar."""
    tokenizer = Tokenizer.load(model).transformed("caseops")
    stream = np.concatenate([np.append(tokenizer.bos, tokenizer.encode(text)) for text in texts])
    costs = np.concatenate([honest(tokenizer, text) for text in texts])
    if change:
        costs = change(stream, costs.copy())
    folder.mkdir()
    write_shard(str(folder / "fineweb_train_000000.bin"), stream[:50])
    for name, numbers in (("val", stream), ("val_bytes", costs)):
        for i, part in enumerate(np.array_split(numbers, shards)):
            write_shard(str(folder / f"fineweb_{name}_{i:06d}.bin"), part)
    return str(folder), stream, costs


def adopt(folder: str, model: str, transform: str = "caseops") -> int:
    return main(["data", "adopt", folder, "--tokenizer", model, "--transform", transform])


def all_bytes(dataset: Dataset) -> list[int]:
    starts = dataset.val.document_starts
    ends = np.append(starts[1:], len(dataset.val)) - 1
    return count_bytes(dataset.val, starts, ends, np.arange(len(starts))).counted.tolist()


def test_a_sidecar_that_agrees_is_what_a_score_goes_by(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards of any size, read in pieces of any size, it gives the bytes that the table gives."""
    monkeypatch.setattr(core.data.adopt, "SCAN", 7)
    folder, stream, costs = published(tmp_path / "a", model, TEXTS, shards=3)
    assert adopt(folder, model) == 0
    dataset = open_dataset(folder)
    assert dataset.val.sidecar is not None and dataset.train.sidecar is None
    assert dataset.manifest["transform"] == "caseops" and "notes" not in dataset.manifest
    assert dataset.val.costs(0, len(stream)).tolist() == costs.tolist()
    wanted = [len(dataset.tokenizer.normalise(text).encode()) for text in TEXTS]
    assert all_bytes(dataset) == wanted and wanted[0] == 46
    assert dataset.manifest["splits"]["val"]["table_bytes"] == sum(wanted)
    for file in Path(folder).glob("*_bytes_*"):
        file.unlink()
    (tmp_path / "a" / "manifest.json").unlink()
    assert adopt(folder, model) == 0
    table = open_dataset(folder)
    assert table.val.sidecar is None and all_bytes(table) == wanted
    for data in (dataset, table):
        assert check_bytes(data, "table", None, None, sum(wanted)).verdict == "PASS"
        assert check_reversible(data, None, None).verdict == "PASS"
    for piece in (4, int(stream[-1])):  # planted: markers that cost 3 bytes, and a piece that costs a letter more
        wrong = open_dataset(folder)
        wrong.tokenizer.table.base[piece] += 3 if piece == 4 else 1
        finding = check_bytes(wrong, "table", None, None)
        assert finding.verdict == "FAIL" and "bytes in the table (document" in finding.evidence


def three_bytes(stream: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Charge 3 bytes for every marker, as preparation by decoding prefixes did that fell back on the marker's own."""
    return costs + 3 * ((stream >= 4) & (stream <= 7))


def test_markers_that_cost_three_bytes_are_refused(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, costs = published(tmp_path / "a", model, [SENTENCE], three_bytes)
    assert costs.sum() == 64, "the published fault: 64 bytes where the sentence has 46"
    assert adopt(folder, model) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fineweb_val_bytes_000000.bin: charges 6 case markers that are no text (up to 3 bytes each)" in said
    assert "64 bytes where the text has 46: bits per byte would be too low; scores by it would be wrong" in said
    assert not (tmp_path / "a" / "manifest.json").exists()


def put(place: int, value: int) -> Any:
    def change(stream: np.ndarray, costs: np.ndarray) -> np.ndarray:
        costs[place] += value
        return costs

    return change


def letters_twice(stream: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return costs + ((stream > 263) & (costs > 0))


WRONG = {
    "1 documents have other bytes than their text; 47 bytes where the text has 46": put(-1, 1),
    "1 documents have other bytes than their text; 45 bytes where the text has 46": put(-1, -1),
    "charges 1 control tokens, which are no text; 48 bytes": put(0, 2),
    "charges 1 case markers that are no text": put(1, 1),
    r"1 documents have other bytes than their text; \d\d bytes": letters_twice,
    r"1 files of (\d+) numbers, the shards are 1 of": lambda stream, costs: costs[:-1],
}


@pytest.mark.parametrize("message", WRONG)
def test_other_wrong_sidecars(tmp_path: Path, model: str, message: str) -> None:
    folder, _, _ = published(tmp_path / "a", model, [SENTENCE], WRONG[message])
    with pytest.raises(DataError, match=message) as caught:
        core.data.adopt.adopt_shards(folder, model, transform="caseops")
    assert "\n" not in str(caught.value) and "move it away" in str(caught.value)


def test_a_damaged_sidecar_and_shards_without_their_transform(tmp_path: Path, model: str) -> None:
    folder, _, _ = published(tmp_path / "a", model, [SENTENCE])
    with pytest.raises(DataError, match="pieces for case markers, so the text .* give --transform caseops"):
        core.data.adopt.adopt_shards(folder, model)
    with (tmp_path / "a" / "fineweb_val_bytes_000000.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="fineweb_val_bytes_000000.bin: size: "):
        core.data.adopt.adopt_shards(folder, model, transform="caseops")


def test_bytes_before_normalisation_are_noted_and_not_used(tmp_path: Path, model: str) -> None:
    """Published sidecars count what the text was before: a space of 2 bytes here and there."""
    folder, _, _ = published(tmp_path / "a", model, [NOVEL[:3000], SENTENCE], put(50, 1))
    manifest = core.data.adopt.adopt_shards(folder, model, transform="caseops")
    assert "token_bytes" not in manifest["splits"]["val"]
    size = manifest["splits"]["val"]["table_bytes"]
    assert manifest["notes"] == [
        f"the byte sidecar is not used: {size + 1:,} bytes where the text has {size:,}, as normalisation left it (1 "
        "documents differ)"
    ]
    assert check_bytes(open_dataset(folder), "table", None, None, size).verdict == "PASS"


def test_an_audit_finds_a_sidecar_that_was_changed(tmp_path: Path, model: str) -> None:
    """By its checksum; where the manifest was changed with it, by decoding the text."""
    folder, _, costs = published(tmp_path / "a", model, TEXTS)
    assert adopt(folder, model) == 0
    file, manifest = f"{folder}/fineweb_val_bytes_000000.bin", tmp_path / "a" / "manifest.json"
    before = file_sha256(file)
    write_shard(file, put(5, 1)(None, np.array(open_shard(file), np.int64)))
    with pytest.raises(DataError, match=r"fineweb_val_bytes_000000.bin: sha256"):
        open_dataset(folder).val.verify()
    manifest.write_text(manifest.read_text().replace(before, file_sha256(file)))
    dataset = open_dataset(folder)
    dataset.val.verify()
    finding = check_bytes(dataset, "table", None, None, int(costs.sum()) + 1)
    assert finding.verdict == "FAIL" and "1 documents differ, +1 bytes in the sidecar (document 0: " in finding.evidence
    shards = json.loads(manifest.read_text())
    shards["splits"]["val"]["token_bytes"] = shards["splits"]["train"]["files"]
    manifest.write_text(json.dumps(shards))
    with pytest.raises(DataError, match=r"val bytes: 50 numbers, \d+ tokens; prepare the data again"):
        open_dataset(folder)


def test_markers_in_the_wrong_place_are_no_text(tmp_path: Path, model: str) -> None:
    """A document that no text becomes does not pass as one that comes back (rule D14)."""
    folder, stream, _ = published(tmp_path / "a", model, [SENTENCE, "the sea"])
    for file in Path(folder).glob("*_bytes_*"):
        file.unlink()
    write_shard(f"{folder}/fineweb_val_000000.bin", np.append(stream, 4))
    assert adopt(folder, model) == 0
    finding = check_reversible(open_dataset(folder), None, None)
    assert finding.verdict == "NOT CHECKED" and "1 do not come back" in finding.evidence
    assert "the first is document 1: character 7, '\\ue001': a marker without its letters" in finding.evidence
    assert check_bytes(open_dataset(folder), "table", None, None).verdict == "PASS"
