"""`import skc`: what docs/python.md says, run as it stands, and what is refused. Budget: 15 s."""

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skc
from core.cli import main
from shared_tests.support.killed import small_data

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
TEXT = "The old man went down to the sea."
LOAD: Any = skc.load


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step at runs/quickstart."""
    folder = tmp_path_factory.mktemp("library")
    options = ("--train.steps", "1", "--train.seq", "32", "--eval.seq", "8", "--data.path", small_data(folder))
    assert main(["train", "debug", *options, "--out", str(folder / "runs" / "quickstart")]) == 0
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> skc.Model:
    return skc.load(place / "runs" / "quickstart")


def test_the_page_works_as_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    said = []
    for block in BLOCKS:
        exec(block, {})
        said.append(capsys.readouterr().out)
    assert re.fullmatch(r"\d\.\d{3} bits per byte, \d+\.\d nats, \d+ tokens\n", said[0])
    assert said[1].startswith("The") and len(said[1]) > 10 and said[1].endswith("True\n")
    assert float(said[2]) == pytest.approx(float(said[0].split()[0]), abs=0.1)
    assert said[3] == "runs/nothing: no such run folder or artifact; make one with: skc train tiny --out runs/nothing\n"


def test_load_score_and_sample_take_six_lines_at_most() -> None:
    assert len(BLOCKS) == 4
    for block in BLOCKS[:3]:
        assert len([line for line in block.splitlines() if line.strip()]) <= 6


def test_a_score_is_of_the_text_as_one_document(model: skc.Model) -> None:
    """By hand: BOS in front, windows of eval.seq tokens, bytes as the text has them."""
    ids = np.append(model.tokenizer.bos, model.tokenizer.encode(TEXT)).astype(np.int32)
    nats = 0.0
    for start in range(0, len(ids) - 1, 8):
        window = ids[start : start + 9]
        logits = np.asarray(model.engine.logits(window[None, :-1]), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= logprobs[np.arange(len(window) - 1), window[1:]].sum()
    score = model.score(TEXT)
    assert score.nats == pytest.approx(nats, rel=1e-5) and score.targets == len(ids) - 1 > 8
    assert score.bytes == len(TEXT) and score.bpb == score.nats / math.log(2) / len(TEXT)
    assert score.bpb_raw == score.bpb and score.full and score.documents == 1


def test_bytes_of_other_letters_are_those_of_utf_8(model: skc.Model) -> None:
    score = model.score("café 東京")
    assert score.bytes == len("café 東京".encode()) and math.isfinite(score.bpb)


def test_samples_repeat(model: skc.Model) -> None:
    first = model.sample("The cat", tokens=12, seed=3)
    assert first == model.sample("The cat", tokens=12, seed=3) and first.startswith("The cat")
    assert first != model.sample("The cat", tokens=12, seed=4)
    assert model.sample(tokens=1) and "skc.Model: run" in repr(model)


def test_an_artifact_alone_takes_its_tokenizer_from_data(place: Path, model: skc.Model, tmp_path: Path) -> None:
    bare = tmp_path / "bare.skc"
    os.link(place / "runs" / "quickstart" / "artifact.skc", bare)
    loaded = skc.load(str(bare), data=str(place / "data"))
    assert loaded.score(TEXT).bpb == pytest.approx(model.score(TEXT).bpb, abs=0.05)


def broken(place: Path) -> str:
    path = place / "broken.skc"
    path.write_bytes((place / "runs" / "quickstart" / "artifact.skc").read_bytes()[:-7])
    return str(path)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no run": (lambda m, p: LOAD(p / "nothing"), skc.RunError, "no such run folder or artifact"),
    "no path": (lambda m, p: LOAD(3), skc.ConfigError, "path=3: expected a run folder or an artifact"),
    "a folder": (lambda m, p: LOAD(p / "data"), skc.RunError, "data"),
    "no step": (lambda m, p: LOAD(p / "runs/quickstart", step=7), skc.RunError, "7"),
    "damaged": (lambda m, p: LOAD(broken(p)), skc.ArtifactError, "broken.skc"),
    "other data": (
        lambda m, p: LOAD(p / "runs/quickstart", data=str(p / "nothing")), skc.DataError, "nothing"
    ),
    "a backend": (lambda m, p: LOAD(p / "runs/quickstart", backend="jax"), skc.ConfigError, "'jax': expected one"),
    "no letters": (lambda m, p: m.score(""), skc.ConfigError, "has no tokens"),
    "bytes": (lambda m, p: m.score(b"text"), skc.ConfigError, "expected text, got bytes"),
    "surrogates": (lambda m, p: m.score("a\ud800"), skc.ConfigError, "text: is not valid Unicode"),
    "a number": (lambda m, p: m.sample(5), skc.ConfigError, "prompt=5: expected text, got int"),
    "half a token": (lambda m, p: m.sample("a", tokens=1.5), skc.ConfigError, "tokens=1.5: expected a whole number"),
    "tokens in words": (lambda m, p: m.sample("a", tokens="3"), skc.ConfigError, "tokens='3': expected a whole number"),
    "a temperature": (lambda m, p: m.sample("a", temperature="x"), skc.ConfigError, "temperature='x': expected a"),
    "candidates": (lambda m, p: m.sample("a", top_k=2.5), skc.ConfigError, "top_k=2.5: expected a whole number"),
    "a seed": (lambda m, p: m.sample("a", seed=True), skc.ConfigError, "seed=True: expected a whole number"),
    "a type": (lambda m, p: LOAD(p / "runs/quickstart", dtype="float8"), skc.ConfigError, "dtype='float8': expected"),
    "a share": (lambda m, p: m.sample("a", top_p="x"), skc.ConfigError, "top_p='x': expected a number"),
    "a drafter": (lambda m, p: m.sample("a", draft="me"), skc.ConfigError, "draft='me': expected one of none, ngram"),
    "a block": (lambda m, p: m.sample("a", block=1), skc.ConfigError, "block=1: expected 2 to 64"),
    "half a block": (lambda m, p: m.sample("a", block=2.5), skc.ConfigError, "block=2.5: expected a whole number"),
    "a sampler": (lambda m, p: m.sample("a", sampler="best"), skc.ConfigError, "sampler='best': expected one of"),
    "no tokens": (lambda m, p: m.sample("a", tokens=0), skc.ConfigError, "tokens=0: expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_a_typed_error_of_one_line(case: str, model: skc.Model, place: Path) -> None:
    call, kind, words = REFUSED[case]
    with pytest.raises(kind, match=re.escape(words)) as refused:
        call(model, place)
    assert "\n" not in str(refused.value) and type(refused.value).__module__.startswith("core.")


def test_the_wheel_has_the_module() -> None:
    import tomllib

    assert tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"] == [
        "skc"
    ]
