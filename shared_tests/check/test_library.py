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
from core.formats.toml import read_toml
from core.training.run import Run
from shared_tests.support.killed import small_data
from shared_tests.support.searches import Runs, smooth

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
TEXT = "The old man went down to the sea."
LOAD: Any = skc.load
TRAIN: Any = skc.train
RUNS: Any = skc.runs
ABLATE: Any = skc.ablate


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
    monkeypatch.setattr("core.verbs.ablate.run_all", Runs(place / "runs" / "ablate", smooth).run_all)  # trains nothing
    said = []
    for block in BLOCKS:
        exec(block, {})
        said.append(capsys.readouterr().out)
    assert re.fullmatch(r"\d\.\d{3} bits per byte, \d+\.\d nats, \d+ tokens\n", said[0])
    assert said[1].startswith("The") and len(said[1]) > 10 and said[1].endswith("True\n")
    assert said[2] and said[1].startswith("The" + said[2])
    tokens = len(skc.load("runs/quickstart").tokenizer.encode("The old man"))
    assert said[3] == f"({1 + tokens}, 1024) True 2\n"
    assert float(said[4]) == pytest.approx(float(said[0].split()[0]), abs=0.1)
    assert re.fullmatch(r"\d\.\d\d bits per byte, \d\d,\d{3} bytes, in runs/mine\nThe.*", said[5], re.S)
    rows = dict(line.split()[:2] for line in said[6].splitlines())
    assert rows == {"runs/mine": "finished", "runs/quickstart": "finished"}
    assert said[7].splitlines()[0].startswith("plain 2 1.98") and said[7].splitlines()[1].startswith("wide 2 1.94")
    assert said[8] == "runs/nothing: no such run folder or artifact; make one with: skc train tiny --out runs/nothing\n"


def test_load_score_and_sample_take_six_lines_at_most() -> None:
    assert len(BLOCKS) == 9
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
    "an id": (lambda m, p: m.logits([1, 1024]), skc.ConfigError, "ids: from 1 to 1,024; expected one or more whole"),
    "no ids": (lambda m, p: m.state([]), skc.ConfigError, "ids=[]: expected one or more whole numbers from 0 to 1,023"),
    "half an id": (lambda m, p: m.state().advance([1.5]), skc.ConfigError, "ids=[1.5]: expected one or more"),
    "rows of ids": (lambda m, p: m.logits(np.zeros((2, 2), int)), skc.ConfigError, "ids=int64, shape (2, 2): exp"),
    "bytes for ids": (lambda m, p: m.logits(b"ab"), skc.ConfigError, "b'ab': expected text, or token ids"),
    "pieces of no text": (lambda m, p: m.generate("a", tokens=0), skc.ConfigError, "tokens=0: expected at least 1"),
    "a preset": (lambda m, p: TRAIN("debugg"), skc.ConfigError, "did you mean debug?"),
    "a setting": (lambda m, p: TRAIN("debug", {"train.step": 3}), skc.ConfigError, "did you mean train.steps?"),
    "a value": (lambda m, p: TRAIN("debug", {"train.steps": "x"}), skc.ConfigError, "settings: train.steps='x': exp"),
    "a type of training": (lambda m, p: TRAIN("debug", dtype="int8"), skc.ConfigError, "dtype='int8': expected one of"),
    "no folder of runs": (lambda m, p: skc.runs(p / "nothing"), skc.RunError, "does not exist, expected a folder"),
    "a nameless plan": (lambda m, p: skc.ablate({"base": "debug"}), skc.ConfigError, "plan: name=None: expected text"),
    "an odd plan": (lambda m, p: skc.ablate({"name": "x", "base": m}), skc.FileError, "plan.base: Model; expected"),
    "a plan's field": (lambda m, p: skc.ablate({"name": "x", "base": "y"}, store=p), skc.ConfigError, "is no preset"),
    "data of no name": (lambda m, p: LOAD(p / "runs/quickstart", data=5), skc.ConfigError, "data=5: expected the name"),
    "no preset": (lambda m, p: TRAIN(None), skc.ConfigError, "preset=None: expected the name of a preset"),
    "no settings": (lambda m, p: TRAIN("debug", 5), skc.ConfigError, "settings=5: expected a table"),
    "no field": (lambda m, p: TRAIN("debug", {5: 1}), skc.ConfigError, "settings={5: 1}: expected a table"),
    "no run folder": (lambda m, p: TRAIN("debug", out=5), skc.ConfigError, "out=5: expected a run folder"),
    "no runs": (lambda m, p: RUNS(5), skc.ConfigError, "folder=5: expected a folder of runs"),
    "no plan": (lambda m, p: ABLATE(None), skc.ConfigError, "plan=None: expected a file, or a table"),
    "no file of a plan": (lambda m, p: ABLATE(p / "none.toml"), skc.FileError, "none.toml: No such file"),
    "a store in a file": (
        lambda m, p: ABLATE({"name": "x"}, store=p / "runs/quickstart/env.json"), skc.FileError, "Not a directory"
    ),
    "half a process": (lambda m, p: ABLATE({"name": "x"}, store=p, parallel=1.5), skc.ConfigError, "--parallel 1.5"),
    "no tokens": (lambda m, p: m.sample("a", tokens=0), skc.ConfigError, "tokens=0: expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_a_typed_error_of_one_line(case: str, model: skc.Model, place: Path) -> None:
    call, kind, words = REFUSED[case]
    with pytest.raises(kind, match=re.escape(words)) as refused:
        call(model, place)
    assert "\n" not in str(refused.value) and type(refused.value).__module__.startswith("core.")


def test_numbers_of_numpy_are_numbers(model: skc.Model) -> None:
    ints: Any = {"tokens": np.int64(4), "top_k": np.int32(9), "seed": np.uint8(3), "block": np.int64(4)}
    floats: Any = {"temperature": np.float32(0.5), "top_p": np.float64(0.75)}
    plain = model.sample("The", tokens=4, top_k=9, seed=3, block=4, temperature=0.5, top_p=0.75)
    assert model.sample("The", **ints, **floats) == plain
    state = model.state("The")
    assert state.advance(state.logits.argmax()).shape == (1, 1024)


def test_pieces_are_the_sample(model: skc.Model) -> None:
    """Together and behind the prompt; whoever stops taking them stops the model."""
    pieces = list(model.generate("She", tokens=30, seed=4))
    assert "She" + "".join(pieces) == model.sample("She", tokens=30, seed=4) and len(pieces) > 10 and all(pieces)
    drafted = model.generate("She", tokens=30, seed=4, draft="ngram")
    assert "".join(drafted) == "".join(pieces)
    few = model.generate("She", tokens=10**9)
    assert next(few) and next(few)


def test_logits_and_states_say_what_the_engine_does(model: skc.Model) -> None:
    ids = np.append(model.tokenizer.bos, model.tokenizer.encode(TEXT)).astype(np.int32)
    logits = model.logits(TEXT)
    assert logits.dtype == np.float32 and logits.shape == (len(ids), 1024)
    assert np.array_equal(logits, model.logits(ids)) and np.array_equal(logits, model.engine.logits(ids[None])[0])
    whole, single, empty = model.state(TEXT), model.state(ids[:1]), model.state()
    assert np.allclose(whole.logits, logits[-1], atol=1e-4) and whole.tokens == len(ids) and empty.tokens == 1
    rows = [single.advance(int(token)) for token in ids[1:4]]
    assert np.allclose(np.concatenate(rows), logits[1:4], atol=1e-4)
    kept = single.copy()
    more = single.advance(ids[4:])
    assert np.allclose(more, logits[4:], atol=1e-4) and np.array_equal(single.logits, more[-1])
    assert (kept.tokens, single.tokens) == (4, len(ids)) and np.allclose(kept.logits, logits[3], atol=1e-4)
    assert np.allclose(kept.advance(ids[4:]), logits[4:], atol=1e-4), "the copy goes its own way"
    with pytest.raises(ValueError, match="read-only"):
        kept.logits[0] = 0.0


def test_training_is_that_of_the_verb(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bits, nothing printed, a log all the same; what is finished is returned as it is; verbose speaks."""
    settings = {"train.steps": 1, "train.seq": 32, "eval.seq": 8, "data.path": str(place / "data")}
    capsys.readouterr()
    made = skc.train("debug", settings, out=place / "runs" / "again")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    verb = Run.open(place / "runs" / "quickstart")
    ours = Run.open(made.path)
    assert ours.artifact_path.read_bytes() == verb.artifact_path.read_bytes()
    assert made.score.to_json() == ours.last("final/artifact")["score"] and made.step == 1
    assert ours.last("final/artifact")["score"] == verb.last("final/artifact")["score"]
    assert made.artifact == ours.artifact_path and made.artifact_bytes == made.artifact.stat().st_size and made.within
    assert "the whole run is in" in ours.log_path.read_text()
    assert "--train.steps 1 --train.seq 32" in ours.environment()["command"]
    assert str(made.load()).startswith("<skc.Model: run ")
    again = skc.train("debug", settings, out=place / "runs" / "again", verbose=True)
    assert again == made and "already finished" in capsys.readouterr().out
    with pytest.raises(skc.ConfigError, match="holds a run with other settings"):
        skc.train("debug", {**settings, "model.dim": 64}, out=place / "runs" / "again")


def test_a_plan_of_python_is_the_plan_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its names and texts are; the file in the store repeats it, and its runs are not made again."""
    plan: dict[str, Any] = {
        "name": "odd", "purpose": 'a "quoted" \\ line\nand é \x7f \u2028', "base": "debug", "seeds": (1, 2),
        "budget": {"steps": 3}, "settings": {"train.log_every": 1, "model.blocks": ["koopman"]},
        "variants": {"plain": {}, "v.2": {"model": {"dim": 64}, "train.warmup": 0.25}},
    }  # fmt: skip
    runs = Runs(tmp_path, smooth)
    monkeypatch.setattr("core.verbs.ablate.run_all", runs.run_all)
    found = skc.ablate(plan, store=tmp_path)
    assert [row.variant for row in found.rows] == ["plain", "v.2"] and not found.failed and runs.made.total() == 4
    assert found.rows[1].difference == pytest.approx(-0.032, abs=0.001) and found.rows[0].verdict == "held against"
    file = tmp_path / "ablations" / "odd" / "plan.toml"
    assert read_toml(file)[0] == {**plan, "seeds": [1, 2]}
    assert skc.ablate(file, store=tmp_path).rows == found.rows and runs.made.total() == 4
    assert all(path.exists() for path in found.files)


def test_the_wheel_has_the_module() -> None:
    import tomllib

    assert tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"] == [
        "skc"
    ]
