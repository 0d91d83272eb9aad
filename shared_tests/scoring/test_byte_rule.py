"""Which bytes nats are divided by, and that prepare, train and eval say alike what a user must know. Budget: 10 s."""

import json
import os
import re
from pathlib import Path

import pytest

from core.cli import main
from core.config import EvalConfig
from core.data.bundled import BUNDLED
from core.data.dataset import DataError, open_dataset
from core.scoring.accounting import byte_note
from core.scoring.evaluation import Evaluation
from core.scoring.score import score
from shared_tests.support.killed import small_data
from shared_tests.support.known_scores import BigramEngine

MODEL = str(BUNDLED / "tokenizer.model")
SHORT = ("--train.steps", "1", "--train.batch", "2", "--train.seq", "8", "--eval.seq", "8", "--backend", "cuda")
Capture = pytest.CaptureFixture[str]


def written(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_a_tokenizer_without_a_space_gets_raw_bytes_and_a_word(tmp_path: Path, capsys: Capture) -> None:
    """Trained on Chinese, used on English: the table would charge 3 bytes for each space."""
    letters = [chr(0x4E00 + i) for i in range(40)]
    train = written(tmp_path / "t.jsonl", ["".join(letters[i * 7 % 40 :] + letters[: i % 40]) for i in range(40)])
    val = written(tmp_path / "v.jsonl", [f"The year was {1800 + i} , a dry one" for i in range(9)])
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    said = r"bytes are those of the raw text, for the byte table does not hold: the tokenizer has no piece for a space"
    assert main(["data", "prepare", train, "--val", val, "--out", data, "--vocab", "310"]) == 0
    assert re.search(said, capsys.readouterr().out)
    vocab = ["--model.vocab", "310", "--data.path", data]
    assert main(["train", "debug", *vocab, *SHORT, "--eval.documents", "2", "--out", run]) == 0
    assert re.search(said, capsys.readouterr().out) and re.search(said, (Path(run) / "log.txt").read_text())
    assert main(["eval", run, "--documents", "all", "--backend", "cuda", "--json"]) == 0
    output = capsys.readouterr()
    assert re.search(said, output.err)
    found, entry = json.loads(output.out)["score"], open_dataset(data).manifest["splits"]["val"]
    assert found["byte_rule"] == "raw" and found["bytes"] == entry["raw_bytes"] < entry["table_bytes"]
    assert found["bpb"] == found["bpb_raw"]


def test_a_table_that_counts_more_than_the_text_has_is_said(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ligatures that become many letters: the rule stays the table's, and a line says by how much it flatters.

    And the tokenizer beside the artifact is taken: nothing is prepared to sample from it.
    """
    source = written(tmp_path / "t.jsonl", [f"The {i}th o\ufb03ce is \u3392 and \ufdfa" for i in range(60)])
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["data", "prepare", source, "--out", data, "--tokenizer", MODEL]) == 0
    assert re.search(
        r"the byte table counts \d+ bytes of validation, [\d.]+% more than its raw", capsys.readouterr().out
    )
    dataset = open_dataset(data)
    note = byte_note(dataset.tokenizer, dataset.manifest["splits"]["val"])
    assert note and byte_note(dataset.tokenizer, {"raw_bytes": 10, "table_bytes": 10, "unknown_tokens": 0}) is None
    assert main(["train", "debug", "--data.path", data, *SHORT, "--eval.documents", "None", "--out", run]) == 0
    said = capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["sample", f"{run}/artifact.skc", "--tokens", "2", "--backend", "cuda"]) == 0
    assert not (tmp_path / "cache").exists()
    assert note in said and re.search(
        r"score [\d.]+ bits per byte \(rule table, .*; [\d.]+ per byte of the raw text", said
    )


def test_a_score_is_of_the_text_that_was_prepared(tmp_path: Path) -> None:
    """A token that was changed in the middle of a shard, size kept: never a score; an estimate does not read it all."""
    data = small_data(tmp_path, 60)
    settings = EvalConfig(seq=16, batch=4)
    whole = score(BigramEngine(), Evaluation(open_dataset(data).val, settings))
    assert whole.full
    path = Path(data, "val_000000.bin")
    shard, stamp = bytearray(path.read_bytes()), os.stat(path)
    shard[1024 + 2 * 9] ^= 1
    path.write_bytes(shard)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match=r"val_000000\.bin: sha256: not what the manifest says"):
        score(BigramEngine(), Evaluation(open_dataset(data).val, settings))
    assert not score(BigramEngine(), Evaluation(open_dataset(data).val, settings, 1)).full
