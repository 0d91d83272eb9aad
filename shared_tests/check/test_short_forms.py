"""Short forms of settings, settings out of files, and help that fits a screen. Budget: 15 s."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from core import presets
from core.ablation.base import NAMES, with_base
from core.ablation.plan import Ablation, read_plan
from core.cli import VERBS, _parse, main
from core.command_line.options import options_of
from core.command_line.short_forms import HELP_ALL, OWN, RATES, SHORT, SHORTENED, lengthened, of_verb
from core.config import MOST_STEPS, ConfigError, RunConfig, changed, to_json
from core.training.run import Run, config_digest
from core.verbs.ablate import Ablate
from shared_tests.support.command_line import Capture, call, refuse

DOCS = Path(__file__).resolve().parents[2] / "docs/command_line.md"
KINDS = {verb: getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].options) for verb in SHORTENED}
TINY = presets.get("tiny").config
GIVEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--steps": (["7"], {"train.steps": 7}),
    "--seconds": (["9"], {"train.seconds": 9.0, "train.steps": MOST_STEPS}),
    "--batch": (["6"], {"train.batch": 6}),
    "--seq": (["48"], {"train.seq": 48}),
    "--data": (["sample-case"], {"data.path": "sample-case"}),
    "--lr": (["0.5"], {f"train.{name}": 0.5 * getattr(TINY.train, name) for name in RATES}),
    "--storage": (["int6/row"], {"model.matrix_storage": "int6/row"}),
    "--blocks": (["koopman", "skc"], {"model.blocks": ("koopman", "skc")}),
}


def parsed(*words: str, verb: str = "train") -> RunConfig:
    """Return the settings of a command line."""
    return _parse(verb, list(words)).config()


@pytest.mark.parametrize("verb, short", [(verb, short) for verb in SHORTENED for short in of_verb(verb)])
def test_a_short_form_is_its_setting(verb: str, short: str) -> None:
    values, settings = GIVEN[short]
    words = [[short, *values], *([[f"{short}={values[0]}"]] if len(values) == 1 else [])]
    for given in words:
        options = lengthened(verb, given, TINY)
        assert {*options_of(KINDS[verb])} >= {word.partition("=")[0] for word in options if word.startswith("--")}
        assert verb != "train" or parsed("tiny", *given) == changed(TINY, settings) != TINY


def test_short_forms_go_together() -> None:
    both = parsed("tiny", "--seconds", "9", "--steps", "7", "--model.dim", "64", "--batch", "4")
    assert both == changed(TINY, {"train.seconds": 9.0, "train.steps": 7, "model.dim": 64, "train.batch": 4})
    assert parsed("tiny", "--seconds", "9", "--train.steps", "7").train.steps == 7
    assert _parse("train", ["tiny", "--steps", "3"]).given == ("--train.steps",), "what is recorded is the setting"
    assert _parse("bench", ["tiny", "--seconds", "2"]).seconds == 2, "bench has an option of its own of this name"
    assert _parse("parity", ["tiny", "--steps", "2"]).steps == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        ("train tiny --steps 3 --train.steps 4", "--steps and --train.steps are two values of one setting: give one"),
        ("train tiny --train.lr_hash=3 --lr 2", "--lr and --train.lr-hash are two values of one setting"),
        ("train tiny --lr fast", "--lr fast: expected a factor of all learning rates, as in --lr 0.5"),
        ("train tiny --lr -1", "--lr -1: expected a factor"),
        ("train tiny --lr nan", "--lr nan: expected a factor"),
        ("train tiny --lr", "--lr: expected a factor"),
        ("train tiny --steps", "Missing value for argument '--train.steps'"),
        ("train tiny --stpes 3", "unknown option --stpes; did you mean --steps?"),
        ("train tiny --storage int5/rows", "invalid choice 'int5/rows' .*; did you mean int5/row?"),
        ("info tiny --steps 3", "unknown option --steps: it has no meaning in skc info"),
        ("info tiny --out x", "unknown option --out: it has no meaning in skc info"),
        ("bench tiny --data x", "unknown option --data: it has no meaning in skc bench; it times random tokens"),
        ("bench tiny --steps 3", "unknown option --steps: .*; it times rounds of --seconds"),
        ("parity tiny --backend mlx", "unknown option --backend: it has no meaning in skc parity; it holds both"),
        ("ablate x.toml --seed 3", "unknown option --seed: it has no meaning in skc ablate; the file's seeds say it"),
        ("ablate x.toml --out x", "unknown option --out: .*; the folder of runs is --store"),
        ("train tiny --config x.toml", "--config takes the place of a preset: leave one of them out"),
        ("train --config nowhere.toml", "nowhere.toml: No such file"),
    ],
)
def test_what_a_short_form_cannot_be(argv: str, message: str, capsys: Capture) -> None:
    line = refuse(capsys, *argv.split())
    assert re.search(message.replace("?", "[?]"), line), line


def test_the_docs_have_the_table() -> None:
    rows = dict(re.findall(r"^\| `(--[a-z]+)[^`]*` \| (.*?) \|", DOCS.read_text(), re.MULTILINE))
    assert rows.keys() >= {*SHORT, *OWN}
    for short, row in SHORT.items():
        settings = ["train.lr_*"] if short == "--lr" else [s.removeprefix("--").replace("-", "_") for s in row.settings]
        assert all(f"`{setting}`" in rows[short] for setting in settings), short


# Help.


@pytest.mark.parametrize("argv", ["train", "train tiny", "info", "bench", "parity", "ablate"])
def test_help_fits_a_screen(argv: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*argv.split(), "--help"])
    verb, lines = argv.split()[0], capsys.readouterr().out.splitlines()
    shown = {match[1] for line in lines if (match := re.match(r"  (?:-h, )?(--[\w-]+)", line))}
    own = options_of(KINDS[verb])
    more = {"--config"} if VERBS[verb].first else set()
    assert stop.value.code == 0 and len(lines) <= 40 and max(map(len, lines[3:])) <= 126
    assert shown == {name for name in own if "." not in name} | {*of_verb(verb)} | more | {"--help", HELP_ALL}
    assert lines[0].startswith(f"usage: skc {verb} ")


def test_help_shows_a_presets_own_values_and_help_all_every_setting(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny", "-h"])
    out = capsys.readouterr().out
    assert re.search(r"--steps INT +Steps of training\. \(default: 400\)", out) and "--model.dim" not in out
    with pytest.raises(SystemExit):
        main(["train", "tiny", HELP_ALL])
    assert "Width D of the residual stream. (default: 128)" in capsys.readouterr().out


# Settings out of files.


def written(folder: Path, text: str) -> str:
    """Return the path of a TOML file."""
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


def test_a_toml_file_brings_a_preset_and_settings(tmp_path: Path) -> None:
    file = written(tmp_path, 'preset = "tiny"\nseed = 5\n[train]\nsteps = 12\n[model.mlp]\nhidden = 64\n')
    config = changed(TINY, {"seed": 5, "train.steps": 12, "model.mlp.hidden": 64})
    assert parsed("--config", file) == config
    assert parsed("--steps", "9", f"--config={file}", "--lr", "1") == changed(config, {"train.steps": 9})
    dotted = written(tmp_path, 'preset = "tiny"\n"train.steps" = 12\n[train]\nseconds = "none"\n')
    assert parsed("--config", dotted, verb="info") == changed(TINY, {"train.steps": 12})


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed = 3", "mine.toml: preset: missing"),
        ('preset = "tinny"', "preset 'tinny' does not exist; did you mean tiny?"),
        ('preset = "tiny"\n[trian]\nsteps = 3', "mine.toml: unknown key 'trian'; did you mean train?"),
        ('preset = "tiny"\n[train]\nstps = 3', "mine.toml: unknown field 'train.stps'; did you mean train.steps?"),
        ('preset = "tiny"\nseed = "x"', "mine.toml: seed"),
        ('preset = "tiny"\n[train]\nsteps = 0', "mine.toml: train.steps=0: expected at least 1"),
        ("preset = ", "mine.toml: not TOML"),
        ('preset = "tiny"\n[eval]\nplugins = ["no.such:Class"]', "names a plug-in that is not ours [(]no.such:Class"),
    ],
)
def test_a_file_that_brings_no_settings_gets_one_line(text: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    assert re.search(message.replace("?", "[?]"), refuse(capsys, "train", "--config", written(tmp_path, text)))


def test_a_runs_config_given_back_is_the_same_run(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run"
    short = ("--steps", "2", "--lr", "0.5", "--storage", "int6/row", "--eval.documents", "2", "--backend", "mlx")
    end = call(capsys, "train", "debug", "--seed", "3", *short, "--out", str(path))
    before = Run.open(path)
    for given in (path / "config.json", path):
        assert parsed("--config", str(given)) == before.config
    assert before.logged_configs() == {config_digest(parsed("--config", str(path)))}
    argv = ("train", "--config", str(path / "config.json"), "--backend", "mlx", "--out", str(path))
    again = call(capsys, *argv)
    assert again["already"] and again["score"] == end["score"], "what is there is known as the same run"
    assert "seed: 3 -> 4" in refuse(capsys, *argv, "--seed", "4")
    (path / "config.json").write_text(json.dumps(to_json(TINY) | {"seeed": 3}))
    assert "seeed" in refuse(capsys, "train", "--config", str(path / "config.json"))


# Ablations.


def plan_of(folder: Path) -> Ablation:
    """Return an ablation of three variants, one of which sets what the tests change."""
    path = folder / "three.toml"
    path.write_text(
        'base = "debug"\nseeds = [0]\nbackends = ["cuda"]\n[budget]\nsteps = 9\n[settings]\n"train.lr_hash" = 0.5\n'
        '[variants.plain]\n[variants.own]\n"train.batch" = 2\n"train.lr_matrix" = 0.25\n"model.blocks" = ["skc"]\n'
        '[variants.int4]\n"model.matrix_storage" = "int4/row"\n'
    )
    return read_plan(path)


def test_short_forms_of_an_ablation_change_the_base_and_not_what_a_variant_sets(tmp_path: Path) -> None:
    words = ["--batch", "6", "--lr", "0.5", "--seq", "32", "--blocks", "koopman", "skc", "--storage", "int6/row"]
    options = _parse("ablate", ["three.toml", *words, "--steps", "4", "--backend", "mlx", "--data", "sample-case"])
    plan = with_base(plan_of(tmp_path), vars(options))
    plain, own, int4 = (plan.config(name, 0) for name in ("plain", "own", "int4"))
    debug = presets.get("debug").config.train
    assert (plain.train.batch, own.train.batch, plain.train.seq) == (6, 2, 32) == (6, 2, own.train.seq)
    assert plain.train.lr_embed == 0.5 * debug.lr_embed and plain.train.lr_hash == 0.25
    assert plain.train.lr_matrix == 0.5 * debug.lr_matrix and own.train.lr_matrix == 0.25
    assert (plain.model.blocks, own.model.blocks) == (("koopman", "skc"), ("skc",))
    assert (plain.model.matrix_storage, int4.model.matrix_storage) == ("int6/row", "int4/row")
    assert plain.train.steps == 4 and plan.backends == ("mlx",) and plain.data.path == "sample-case"
    again = _parse("ablate", plan.command(False).split()[2:])
    assert {name: getattr(again, name) for name in NAMES} == {name: getattr(options, name) for name in NAMES}
    assert {*SHORT} <= {*options_of(Ablate)}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"steps": 3, "seconds": 2.0}, "--steps and --seconds are two budgets"),
        ({"seconds": 0.0}, "--seconds 0.0: expected a positive number"),
        ({"storage": "int4/row"}, "variants.int4: is the same as variants.plain"),
        ({"batch": 0}, "variants.plain: train.batch=0"),
        ({"blocks": ()}, "variants.plain: model.blocks is empty"),
        ({"seq": 1 << 30}, "train.seq=1073741824: expected at most"),
    ],
)
def test_a_base_that_no_variant_can_have_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_base(plan_of(tmp_path), dict.fromkeys(NAMES) | given)
