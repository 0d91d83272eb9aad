"""What users get wrong at the command line gets one line and exit code 2; bugs keep a traceback. Budget: 15 s."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.cli import condense, main
from core.data.bundled import open_data
from shared_tests.support.command_line import Capture, refuse


@pytest.fixture(autouse=True, scope="module")
def sample() -> None:
    """Prepare the bundled text, which says so where it is done."""
    open_data("sample")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("trian debug", "unknown verb 'trian'; did you mean train?"),
        ("data", "expected one of: data sample, data prepare"),
        ("train", "name a preset first"),
        ("train --seed 3 debug", "name a preset first"),
        ("train debgu", "preset 'debgu' does not exist; did you mean debug?"),
        ("train debug --model.dimm 3", "unknown option --model.dimm; did you mean --model.dim?"),
        ("train debug --model.dim wide", "Error parsing --model.dim: .*'wide'; expected INT"),
        ("train debug --train.steps", "Missing value for argument '--train.steps'"),
        ("train debug --model.dim 31", "skc train: model.dim=31 is not divisible by model.attention.heads=2"),
        ("train debug --train.micro_batch 3", "train.batch=4 is not divisible by train.micro_batch=3"),
        ("train debug --train.steps 0", "train.steps=0: expected at least 1"),
        ("train debug --model.mlp.activation gelu", "invalid choice 'gelu' .*relu2"),
        ("train debug --backend tpu", "invalid choice 'tpu' .*mlx"),
        ("train debug --eval.stride 8", "eval.stride=8 has no meaning with eval.windows=plain"),
        ("train debug --model.vocab 2048", "model.vocab=2048, but data.path=sample has 1024: leave out --model.vocab"),
        ("train debug --train.seq 9999999", "shorter than one row"),
        (
            "train debug --export.budget 240000",
            r"would have about [\d,]+ bytes, [\d,]+ over what export.budget",
        ),
        ("train debug --train.repeat_from 0.5", "train.repeat_from=0.5: .* model.repeat_layers"),
        (
            "train debug --model.blocks koopmann",
            "unknown layer kind 'koopmann'; known kinds: attention, attention_parallel, attention_gated, koopman, skc",
        ),
        ("train debug --model.blocks skc --model.koopman.dim 48", "model.koopman.dim=48: expected a power of two"),
        ("train debug --model.engram.orders 2 --model.engram.dim 12", "model.engram.dim=12 is not divisible by the 8"),
        (
            "train debug --model.shared-blocks 1 --model.blocks skc attention",
            "of different kinds would share a block",
        ),
        ("train debug --data.path nowhere", "nowhere: no such folder; make the folder with"),
        (
            "train debug --eval.windows documents --eval.adapt.kind lora --eval.phases.at 0.5",
            "eval.phases.at=0.5 of 4 documents is document 2, which is scored in the last round",
        ),
        ("info debug --eval.plugins tempratur", "'tempratur' is not a plug-in; did you mean temperature?"),
        ("info debug --eval.plugins.temperature.priro 3", "temperature.priro: unknown key; did you mean prior?"),
        ("info debug --eval.plugins no.such:Class", "eval.plugins: 'no.such:Class': No module named"),
        ("info", "name a preset, run or artifact first"),
        ("compare", "skc compare: expected two or more runs, got 0: skc compare RUN RUN"),
        ("info debug extra", "Unrecognized options: extra"),
        ("eval", "Missing from skc eval"),
        ("eval nowhere", "nowhere: no such run folder or artifact; make one with"),
        ("sample nowhere", "nowhere: no such run folder or artifact"),
        ("sample nowhere --draft ngram --block 1", "block=1: expected 2 to 64"),
        ("export nowhere", "nowhere: does not exist; make a run with"),
        ("data prepare nowhere.txt --out x", "nowhere.txt: no such file"),
        ("data adopt nowhere --tokenizer nowhere.model", "nowhere.model: No such file"),
        ("bench debug --variants tpu", "variant 'tpu' does not exist"),
    ],
)
def test_wrong_input_gets_one_line(argv: str, message: str, capsys: Capture) -> None:
    line = refuse(capsys, *argv.split())
    assert re.search(message, line), line


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(options: object, context: object) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr("core.verbs.presets.list_presets", bug)
    with pytest.raises(ValueError, match="broadcast"):
        main(["presets"])


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stop(options: object, context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core.verbs.presets.list_presets", stop)
    assert main(["presets"]) == 130
    assert capsys.readouterr().err.startswith("skc presets: interrupted; ")


def test_a_model_that_no_artifact_can_hold_is_not_trained_in_vain(tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "run")
    assert "model.layers=1025: expected at most 1,024" in refuse(
        capsys, "train", "debug", "--model.layers", "1025", "--out", out
    )
    wide = ("--model.mlp.hidden", "700000", "--out", out)
    assert "bytes before compression; an artifact holds at most" in refuse(capsys, "train", "debug", *wide)
    assert not Path(out).exists()


def test_exit_codes_and_streams_of_the_real_program(tmp_path: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "core.cli", *argv], capture_output=True, text=True, cwd=tmp_path)

    wrong = run("train", "debug", "--model.dim", "31")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    over = run("info", "baseline", "--export.budget", "15000000", "--json")
    assert over.returncode == 1 and json.loads(over.stdout)["ok"] is False and "OVER" in over.stderr
    assert run("presets").returncode == 0


@pytest.mark.parametrize("corners, rule", [("╭╰│", "─"), ("   ", "-")])
def test_condense_keeps_the_message_and_the_first_suggestion(corners: str, rule: str) -> None:
    top, bottom, side = corners
    parts = [
        "Error parsing model: model.dim=31 is odd",
        rule * 9,
        "Perhaps you meant:",
        "--model.dims INT",
        rule * 9,
        "Run",
    ]
    title = [f"{top}{rule} Value error {rule}"] if top != " " else [" Value error", f" {rule * 9} "]
    box = "\n".join([*title, *(f"{side} {part} {side}" for part in parts), f"{bottom}{rule if bottom != ' ' else ''}"])
    assert condense(box) == "model.dim=31 is odd; did you mean --model.dims?"


@pytest.mark.parametrize("given", ["'b', 'None', 'a'", "'None', 'a', 'b'"])
def test_condense_has_one_order_of_what_tyro_has_in_any(given: str) -> None:
    box = f"╭─ Error ─\n│ invalid choice 'c' for argument '--x'. Expected one of ({given}) │\n╰─"
    assert condense(box) == "invalid choice 'c' for argument '--x'. Expected one of ('a', 'b', 'None')"
    assert condense(box.replace("'None'", "'z'")).count(given.replace("'None'", "'z'")) == 1, "a Literal has its own"
