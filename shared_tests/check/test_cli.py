"""Every verb on `debug`, and one line with exit code 2 for wrong input. Budget: 40 s."""

import dataclasses
import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core import presets
from core.audit.code import packed_code
from core.cli import VERBS, main
from core.config import EvalConfig, RunConfig, changed
from core.engine.loading import load_engine
from core.export.budget import predicted_bytes
from core.model.params import count, param_table
from core.training.run import Run
from core.verbs.common import PresetOptions
from shared_tests.support.command_line import SHORT, Capture, call, refuse

GRID = Path(__file__).parents[2] / "scripts/adapt_grid"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on the PyTorch backend."""
    path = tmp_path_factory.mktemp("runs") / "debug"
    assert main(["train", "debug", *SHORT, "--out", str(path)]) == 0
    return path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_help_names_every_verb_without_a_framework() -> None:
    heavy = "{'torch', 'mlx', 'tyro', 'numpy'} & {*sys.modules}"
    code = f"import sys; from core.cli import main; main(['--help']); print('HEAVY', {heavy})"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0, "of processor time"
    assert all(f"  {name} " in out and verb.purpose in out for name, verb in VERBS.items())
    assert out.endswith("HEAVY set()\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help-all"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out and "default:" in out


def test_options_of_a_preset_are_the_fields_of_a_run() -> None:
    fields = [f.name for f in dataclasses.fields(RunConfig)]
    assert [f.name for f in dataclasses.fields(PresetOptions)] == [*fields, "given", "json"]
    assert PresetOptions().config() == RunConfig()


def test_presets_lists_what_is_recorded(capsys: Capture) -> None:
    rows = call(capsys, "presets")["presets"]
    assert {row["name"]: row["parameters"] for row in rows} == {n: p.params for n, p in presets.PRESETS.items()}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_info_gives_every_preset_its_recorded_count(name: str, capsys: Capture) -> None:
    config, lacks = presets.get(name).config, presets.get(name).lacks
    # Six bits by the largest weight are too many for weights that are spread as at the start; a fitted step never is.
    room = config.export.budget - max(config.export.code_bytes, *packed_code().values())
    over = predicted_bytes(config.model) > room and not config.export.fit
    value = call(capsys, "info", name, code=int(over))
    assert over is (name in {"pr401", "pr550"})
    assert value["parameters"] == presets.get(name).params and value["not_here_yet"] == lacks
    code = max(config.export.code_bytes, *value["packed_code"].values())
    assert value["bytes_total"] == value["bytes_predicted"] + code
    assert value["within_budget"] is not over and list(value["table"]) == list(param_table(config.model))


@pytest.mark.long
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_builds_with_its_recorded_count(name: str) -> None:
    built = load_engine("cuda", presets.get(name).config).weights()
    assert sum(array.size for array in built.values()) == presets.get(name).params


def test_info_says_by_how_much_a_model_is_over(capsys: Capture) -> None:
    half = ("--model.matrix-storage", "float16", "--model.embedding.storage", "float16")
    value = call(capsys, "info", "baseline", *half, code=1)
    over = value["bytes_total"] - 16_000_000
    assert value["bytes_by_storage"] == {"float16": 2 * 17_059_912} and over > 0
    assert main(["info", "baseline", *half]) == 1
    assert f"{over + 16_000_000:,} of 16,000,000 bytes: OVER by {over:,}" in capsys.readouterr().out
    value = call(capsys, "info", "debug", "--model.layers", "1", "--model.head.bias", "False")
    smaller = changed(presets.get("debug").config.model, {"layers": 1, "head.bias": False})
    assert value["parameters"] == count(smaller)
    assert sum(part["flops"] for part in value["parts"].values()) == value["flops_per_token"]


def test_train_leaves_a_whole_run_folder(trained: Path, capsys: Capture) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.json", "env.json", "metrics.jsonl", "log.txt", "tokenizer.model", "state",
        "artifact.skc", "report.md", "curve.png", "lock",
    }  # fmt: skip
    run = Run.open(trained)
    env, final, stored = run.environment(), run.last("final/score"), run.last("final/artifact")
    assert env["backend"] == "cuda" and env["dtype"] == "float32" and env["versions"]["numpy"] and env["device"]
    assert env["command"].startswith("skc train debug --train.steps 6") and len(env["commit"] or "x" * 40) == 40
    assert final["label"] == "estimate" and final["documents"] == 2 and abs(stored["gap"]) < 1e-3
    assert stored["bytes"] == (trained / "artifact.skc").stat().st_size and stored["within"]
    report = (trained / "report.md").read_text()
    for text in (f"estimate: {final['bpb']:.4f}", "byte rule table", env["command"], f"{stored['bytes']:,} bytes"):
        assert text in report
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG") and "step 6/6" in (
        trained / "log.txt"
    ).read_text()
    assert len(run.last("samples")) == 2


def test_a_finished_run_is_scored_again_but_not_trained(copy: Path, capsys: Capture) -> None:
    before = Run.open(copy).checkpoint()
    value = call(capsys, "train", "debug", *SHORT, "--again", "--out", str(copy))
    after = Run.open(copy).checkpoint()
    assert (
        before and after and value["step"] == 6 and value["score"]["bpb"] == Run.open(copy).last("final/score")["bpb"]
    )
    assert all(before.params[name].tobytes() == after.params[name].tobytes() for name in before.params)
    env = Run.open(copy).environment()
    call(
        capsys, "train", "debug", *SHORT[:-1], "mlx", "--again", "--out", str(copy)
    )  # trains nothing, so it relabels nothing
    assert Run.open(copy).environment() == env and env["backend"] == "cuda" and not env["earlier"]


def test_eval_of_run_and_artifact_agree_with_the_report(trained: Path, capsys: Capture) -> None:
    run = Run.open(trained)
    of_run = call(capsys, "eval", str(trained), "--backend", "cuda")
    assert of_run["score"] == run.last("final/score") and of_run["step"] == 6
    of_file = call(
        capsys, "eval", str(trained / "artifact.skc"), "--documents", "2", "--backend", "cuda", "--batch", "8"
    )
    assert of_file["score"]["bpb"] == pytest.approx(run.last("final/artifact")["score"]["bpb"], abs=1e-9)
    sliding = call(capsys, "eval", str(trained), "--windows", "sliding", "--stride", "32", "--backend", "cuda")
    assert (
        sliding["score"]["windows"].endswith("stride=32") and sliding["score"]["targets"] == of_run["score"]["targets"]
    )


def test_eval_says_what_learning_gains_and_how_long_it_took(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    began = time.monotonic()
    asked = ["eval", str(trained), "--backend", "cuda", "--eval.seq", "512"]
    learning = ["--gain", "2", "--eval.plugins.temperature.prior", "9", "--eval.round", "1", "--batch", "4"]
    value = call(capsys, *asked, *learning)
    gain = value["gain"]
    assert gain["after"] == value["score"] and gain["after"]["plugins"] == ["temperature(prior=9)"]
    assert gain["before"]["documents"] == gain["after"]["documents"] == 2 and not gain["before"]["plugins"]
    assert gain["difference"] == pytest.approx(gain["after"]["bpb"] - gain["before"]["bpb"], abs=1e-12)
    assert gain["error"] > 0
    seconds = value["seconds"]
    assert sum(gain["seconds"]) < seconds["timer"] < seconds["strict"] < time.monotonic() - began
    assert seconds["limit"] == seconds["training_limit"] == 600
    assert seconds["training"] == Run.open(trained).last("clock/seconds")
    line = refuse(capsys, *asked, *learning, "--ledger", str(tmp_path / "book"))
    assert "--gain 2 makes two scores of so many documents: leave out --ledger" in line
    assert "nothing can be gained" in refuse(capsys, *asked, "--gain", "2")


def test_the_grid_of_adaptation_goes_on_where_it_was(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting of scripts/adapt_grid can be built, and a line that is there is not made again."""
    names = runpy.run_path(str(GRID))
    settings = {name: changed(EvalConfig(seq=512, documents=48), fields) for name, fields in names["grid"]().items()}
    assert list(names["named"](["temperature", "counts/t*", "lora", "lora"])) == ["temperature", "counts/tilt", "lora"]
    assert len(settings) > 50 and all(config.learns for config in settings.values())
    out = tmp_path / "grid.jsonl"
    argv = [str(trained), "--out", str(out), "--documents", "2", "--backend", "cuda", "--seq", "256", "--only"]
    texts = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["adapt_grid", *argv, "temperature"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(GRID), run_name="__main__")
        texts.append(out.read_text())
        told = capsys.readouterr().out
        assert stop.value.code == 0
    assert texts[0] == texts[1]
    plain, temperature = map(json.loads, texts[0].splitlines())
    assert (plain["name"], temperature["reference"]) == ("plain/documents-64", "plain/documents-64")
    assert temperature["difference"] == pytest.approx(temperature["bpb"] - plain["bpb"], abs=1e-12)
    assert temperature["difference_error"] > 0 and temperature["processor_seconds_per_token"] > 0
    assert "temperature  " in told and len(plain["nats"]) == plain["documents"] == 2

    middle, reach = temperature["difference"] - 0.01, 12.7062 * 0.01  # t(0.975, 1), times spread / sqrt(2)
    other = temperature | {"bpb": temperature["bpb"] - 0.01, "difference": temperature["difference"] - 0.02}
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    (tmp_path / "older.jsonl").write_text(json.dumps(other | {"settings": {"seq": 128}}) + "\n")
    for second, code in (("other.jsonl", 0), ("older.jsonl", 0), ("none.jsonl", 2)):
        monkeypatch.setattr(sys, "argv", ["adapt_grid", "--mean", str(out), str(tmp_path / second)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(GRID), run_name="__main__")
        assert stop.value.code == code
        told = capsys.readouterr().out.splitlines()
        if second == "older.jsonl":
            assert not any(line.startswith("temperature") for line in told), "a name with other settings is another"
        elif code == 0:
            (row,) = (line for line in told if line.startswith("temperature"))
            assert f" {middle:+.4f} {middle - reach:+.4f} to {middle + reach:+.4f} " in " ".join(row.split())
        else:
            assert told == [f"{tmp_path / second}: no lines; expected a file that --out wrote"]


@pytest.mark.pair
def test_an_artifact_scores_the_same_on_the_other_backend(trained: Path, capsys: Capture) -> None:
    scores = [
        call(capsys, "eval", str(trained / "artifact.skc"), "--documents", "2", "--backend", backend)["score"]
        for backend in ("mlx", "cuda")
    ]
    assert scores[0]["bpb"] == pytest.approx(scores[1]["bpb"], abs=1e-6)


@pytest.mark.pair
def test_the_same_text_on_both_backends(trained: Path, capsys: Capture) -> None:
    artifact = str(trained / "artifact.skc")
    argv = ("--prompt", "She was", "--tokens", "12", "--seed", "3")
    found = [call(capsys, "sample", artifact, *argv, "--backend", backend)["samples"] for backend in ("mlx", "cuda")]
    (text,) = (sample["text"] for sample in found[0])
    assert found[0] == found[1] and text.startswith("She was") and len(text) > len("She was")
    argv = ("--prompt", "He", "She was", "--n", "2", *argv[2:])
    (*_, third, fourth) = samples = call(capsys, "sample", str(trained), *argv, "--backend", "cuda")["samples"]
    assert [sample["prompt"] for sample in samples] == ["He", "He", "She was", "She was"]
    assert third["text"] != fourth["text"] and all(len(sample["text"]) > len(sample["prompt"]) for sample in samples)
    assert main(["sample", str(trained), *argv, "--backend", "cuda"]) == 0
    heads = [f"{i + 1} of 4, sample {i % 2 + 1} after {sample['prompt']!r}:" for i, sample in enumerate(samples)]
    lines = "\n\n".join(f"{head}\n{sample['text']}" for head, sample in zip(heads, samples, strict=True))
    assert re.fullmatch(re.escape(lines) + r"\n48 tokens in \d+\.\d s, [\d,]+ tokens/s\n", capsys.readouterr().out)
    drafted = call(capsys, "sample", str(trained), *argv, "--backend", "cuda", "--draft", "jacobi", "--block", "3")
    assert drafted["samples"] == samples and drafted["decoding"]["drafted"] > 0
    assert (
        drafted["decoding"]["tokens"]
        == 4 * 12
        == sum(drafted["decoding"]["by_accepted"].values()) + (drafted["decoding"]["accepted"])
    )
    assert main(["sample", str(trained), *argv, "--backend", "cuda", "--draft", "ngram"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:-2] == lines.splitlines() and re.fullmatch(
        r"ngram: \d\.\d\d tokens a cycle, \d+% of \d+ cycles kept no draft", said[-1]
    )


@pytest.mark.pair
def test_a_run_on_mlx_ends_where_the_other_does(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    value = call(capsys, "train", "debug", *SHORT[:-1], "mlx", "--out", str(tmp_path / "run"))
    assert value["backend"] == "mlx"
    assert value["score"]["bpb"] == pytest.approx(Run.open(trained).last("final/score")["bpb"], abs=1e-4)


@pytest.mark.pair
def test_a_run_moves_to_the_other_backend(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    lines = [line for line in (path / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 3]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    longer = ("--train.steps", "8", *SHORT[2:-1])
    settings = json.loads((path / "config.json").read_text())
    settings["train"]["steps"] = 8
    (path / "config.json").write_text(json.dumps(settings))
    ends = []
    for backend in ("mlx", "cuda"):
        target = tmp_path / backend
        shutil.copytree(path, target)
        ends.append(call(capsys, "train", "debug", *longer, backend, "--out", str(target)))
    assert [end["step"] for end in ends] == [8, 8] and [end["backend"] for end in ends] == ["mlx", "cuda"]
    assert ends[0]["score"]["bpb"] == pytest.approx(ends[1]["score"]["bpb"], abs=1e-5)


def test_export_writes_the_same_artifact_again(copy: Path, capsys: Capture) -> None:
    first = (copy / "artifact.skc").read_bytes()
    (copy / "artifact.skc").unlink()
    value = call(capsys, "export", str(copy), "--backend", "cuda")
    assert (copy / "artifact.skc").read_bytes() == first and value["artifact"]["within"]


def test_export_over_the_budget_fails(copy: Path, capsys: Capture) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["export"] |= {"budget": 50_000, "code_bytes": 1000}
    (copy / "config.json").write_text(json.dumps(settings))
    value = call(capsys, "export", str(copy), "--backend", "cuda", code=1)
    assert value["ok"] is False and value["artifact"]["bytes"] > value["artifact"]["allowed"] == 49_000


def test_a_step_that_is_not_finite_exits_1_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    rates = [word for group in ("embed", "vector", "matrix") for word in (f"--train.lr_{group}", "1e12")]
    argv = ("train", "debug", *SHORT, "--train.eval_every", "none", *rates)
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not finite" in err and "skc train: step " in err


def test_data_verbs(tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "sample")
    sample = call(capsys, "data", "sample", "--out", out)
    assert sample["name"] == "sample" and sample["splits"]["val"]["documents"] == 8
    lines = [
        json.dumps({"text": f"Document {i}: the cat number {i} sat on the mat and looked at {i}."}) for i in range(300)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    made = call(
        capsys, "data", "prepare", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "mine"), "--vocab", "300"
    )  # fmt: skip
    assert made["tokenizer"]["vocab"] == 300
    assert sum(split["documents"] for split in made["splits"].values()) == 300
    official = tmp_path / "official"
    official.mkdir()
    for split in ("train", "val"):
        shutil.copy(Path(out) / f"{split}_000000.bin", official / f"fineweb_{split}_000000.bin")
    adopted = call(capsys, "data", "adopt", str(official), "--tokenizer", str(Path(out) / "tokenizer.model"))
    assert adopted["splits"]["val"]["tokens"] == sample["splits"]["val"]["tokens"]


@pytest.mark.pair
def test_doctor_finds_this_machine_sound(capsys: Capture) -> None:
    value = call(capsys, "doctor")
    assert value["ok"] and value["parity"] is True and {"mlx", "cuda"} == value["backends"].keys()
    assert all(backend["ok"] for backend in value["backends"].values()) and value["blas"]


def test_doctor_reports_a_backend_that_fails(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, config: RunConfig) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr("core.check.doctor.load_engine", broken)
    monkeypatch.setattr("core.check.doctor.available_backends", lambda: ["cuda"])
    value = call(capsys, "doctor", code=1)
    assert value["backends"]["cuda"] == {"installed": True, "ok": False, "error": "RuntimeError: no device"}
    assert value["backends"]["mlx"] == {"installed": False}


@pytest.mark.pair
def test_parity_says_yes_and_no(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("parity", "debug", "--mini", "--steps", "2", "--dtype", "float64")
    assert call(capsys, *argv)["ok"]
    monkeypatch.setattr("core.check.tolerances.P4_FLOAT64", -1.0)
    assert call(capsys, *argv, code=1)["ok"] is False


# What users get wrong.


@pytest.mark.parametrize(
    "argv, message",
    [
        (("eval", "RUN", "--stride", "8"), "has no meaning with eval.windows=plain: take sliding or documents"),
        (
            ("eval", "RUN", "--windows", "documents", "--stride", "8", "--eval.adapt.kind", "lora"),
            "eval.stride=8 changes nothing with eval.adapt.kind=lora, whose windows end with a chunk",
        ),
        (("eval", "RUN", "--documents", "some"), r"parsing --documents: .*\['some'\]"),
        (("sample", "RUN", "--tokens", "0"), "tokens=0: expected at least 1"),
        (("sample", "RUN", "--n", "0"), "n=0: expected at least 1"),
        (("sample", "RUN", "--prompt"), "--prompt: expected a text"),
        (("sample", "RUN", "--draft", "ngram", "--block", "1"), "block=1: expected 2 to 64"),
        (("sample", "RUN", "--top-p", "0"), "top_p=0.0: expected more than 0, at most 1"),
        (
            ("train", "debug", *SHORT, "--seed", "4", "--out", "RUN"),
            "holds a run with other settings .seed: 1337 -> 4.",
        ),
        (("train", "debug", *SHORT, "--out", "RUN/report.md"), "report.md: is a file"),
        (("train", "debug", *SHORT, "--out", "RUN/.."), "is not empty and is not a run"),
    ],
)
def test_wrong_use_of_a_run_gets_one_line(argv: tuple[str, ...], message: str, copy: Path, capsys: Capture) -> None:
    line = refuse(capsys, *(word.replace("RUN", str(copy)) for word in argv))
    assert re.search(message, line), line


def test_what_is_refused_leaves_no_ledger(copy: Path, capsys: Capture) -> None:
    """Else the settings that would do were refused, too: the file would be another evaluation's. A gain makes none."""
    argv = ("eval", str(copy), "--windows", "documents", "--eval.adapt.kind", "lora", "--eval.phases.at", "0.5")
    ledger = copy.parent / "costs.ledger"
    for option, value in (("--ledger", str(ledger)), ("--gain", "2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("core.scoring.gain.score", None)  # nothing is scored before
            assert main([*argv, "--backend", "cuda", option, value]) == 2
        assert "is scored in the last round" in capsys.readouterr().err
    assert not ledger.exists()


def spoil(name: str) -> Callable[[Path], None]:
    """Return a function that cuts a file of a run in half."""

    def cut(run: Path) -> None:
        path = run / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    "damage, verb, message",
    [
        (spoil("config.json"), "eval RUN", r"config\.json: not JSON"),
        (spoil("state/checkpoint.safetensors"), "eval RUN", r"checkpoint\.safetensors: .*is damaged; delete it"),
        (spoil("state/checkpoint.safetensors"), "export RUN", r"checkpoint\.safetensors: .*is damaged; delete it"),
        (spoil("artifact.skc"), "eval RUN/artifact.skc", r"artifact\.skc: payload_bytes"),
        (lambda run: shutil.rmtree(run / "state"), "sample RUN", "has no checkpoint yet; train it first"),
        (lambda run: (run / "tokenizer.model").unlink(), "eval RUN", r"tokenizer\.model: No such file"),
        (lambda run: (run / "tokenizer.model").write_bytes(b"x"), "eval RUN", "was made with tokenizer"),
        (
            lambda run: (run / "tokenizer.model").write_bytes(b"x"),
            "sample RUN",
            "neither a SentencePiece .model nor a tokenizer.json",
        ),
    ],
)
def test_a_damaged_run_gets_one_line(
    damage: Callable[[Path], None], verb: str, message: str, copy: Path, capsys: Capture
) -> None:
    damage(copy)
    line = refuse(capsys, *verb.replace("RUN", str(copy)).split())
    assert re.search(message, line), line


def test_export_refuses_a_tokenizer_that_is_not_the_runs(copy: Path, capsys: Capture) -> None:
    before = (copy / "artifact.skc").read_bytes()
    (copy / "tokenizer.model").write_bytes(b"another")
    assert "its tokenizer.model is not that of" in refuse(capsys, "export", str(copy), "--backend", "cuda")
    assert (copy / "artifact.skc").read_bytes() == before
