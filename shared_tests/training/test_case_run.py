"""A run on text with a case transform: trained, scored, sampled, exported, audited as plain text. Budget: 10 s.

The audit of the whole bundled text is long.
"""

import json
import shutil
from pathlib import Path

import pytest

import skc
from core.cli import main
from core.data.bundled import BUNDLED, TOKENIZERS
from core.data.prepare import prepare
from core.data.shards import open_shard, write_shard
from core.training.records import read_rows
from shared_tests.support.texts import jsonl

TEXTS = [f"The Old Man of {place} saw the NASA team number {i}." for i, place in enumerate(["Rome", "Kent"] * 30)]


def case_data(folder: Path, transform: str) -> str:
    source, held = jsonl(folder / "t.jsonl", TEXTS), jsonl(folder / "v.jsonl", ["An iPhone in TEXAS", "Bob and I"])
    name = {"case": "sample-case", "none": "sample"}[transform]
    prepare([source], str(folder / transform), val=[held], tokenizer=str(BUNDLED / TOKENIZERS[name]),
            transform=transform, threads=1)  # type: ignore[arg-type]  # fmt: skip
    return str(folder / transform)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data in both forms, and a run of one step on the transformed one."""
    folder = tmp_path_factory.mktemp("case")
    data = case_data(folder, "case")
    case_data(folder, "none")
    options = ("--train.steps", "1", "--train.seq", "32", "--eval.seq", "32", "--eval.documents", "None")
    assert main(["train", "debug", *options, "--data.path", data, "--out", str(folder / "run")]) == 0
    shutil.copy(folder / "run" / "artifact.skc", folder / "bare.skc")
    return folder


def test_the_score_is_per_byte_of_the_plain_text(place: Path) -> None:
    """Of the data and of any text, by the library, from the run and from its artifact, whose tokenizer lies beside."""
    rows = read_rows(place / "run" / "metrics.jsonl")
    score = next(row["final/score"] for row in rows if "final/score" in row)
    assert score["byte_rule"] == "table" and score["bytes"] == len("An iPhone in TEXAS") + len("Bob and I")
    for path in (place / "run", place / "run" / "artifact.skc"):
        model = skc.load(path)
        assert model.tokenizer.transform == "case"
        for text in ("The NASA team and Bob", "\ue001 Odd \ue004\ue004\ue002 é"):
            assert model.score(text).bytes == len(text.encode())


def test_text_is_shown_plain(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(place / "run" / "metrics.jsonl")
    samples = [text for row in rows for text in row.get("samples", [])]
    report = (place / "run" / "report.md").read_text()
    assert samples and any(text.startswith("The") for text in samples)
    assert main(["sample", str(place / "run"), "--prompt", "The NASA iPhone", "--tokens", "20", "--json"]) == 0
    sample = json.loads(capsys.readouterr().out)["samples"][0]
    assert sample["read_as"] == "The NASA iPhone" and sample["text"].startswith("The NASA iPhone")
    written = "".join([*samples, report, sample["text"]])
    assert not any(marker in written for marker in "\ue001\ue002\ue003")


@pytest.mark.parametrize("words", [("eval", "run", "--data", "none"), ("eval", "bare.skc", "--data", "none")])
def test_a_model_is_refused_on_text_in_another_form(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(place)
    assert main([*words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was made with tokenizer" in said and "give the data it was trained on with --data PATH" in said
    assert main([words[0], words[1], "--data", "case"]) == 0


def test_a_run_does_not_go_on_with_the_other_form(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--train.seq", "32", "--eval.seq", "32", "--eval.documents", "None", "--train.steps", "1")
    assert main(["train", "debug", *words, "--data.path", str(place / "none"), "--out", str(place / "run")]) == 2
    assert "its tokenizer.model is not that of data.path" in capsys.readouterr().err


@pytest.mark.long
def test_the_bundled_text_is_audited_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny run on sample-case passes; with a sidecar that lies about bytes it does not."""
    run, data = str(tmp_path / "run"), tmp_path / "data"
    assert main(["data", "sample", "--transform", "case", "--out", str(data)]) == 0
    assert main(["train", "debug", "--data.path", str(data), "--train.steps", "2", "--out", run]) == 0
    assert main(["audit", run, "--tokens", "3000", "--flips", "1"]) == 0
    assert "D13  PASS" in capsys.readouterr().out.replace("D13   PASS", "D13  PASS")
    manifest = json.loads((data / "manifest.json").read_text())
    val = manifest["splits"]["val"]
    write_shard(str(data / "val_bytes_000000.bin"), 2 + 0 * open_shard(str(data / val["files"][0]["file"]))[:])
    val["token_bytes"] = [{"file": "val_bytes_000000.bin", "tokens": val["tokens"]}]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert main(["audit", run, "--tokens", "3000", "--flips", "1"]) == 1
    assert "bytes in the sidecar" in " ".join(capsys.readouterr().out.split())
