"""Options: what was meant, how values may be spelled, what follows the data, what messages advise. Budget: 20 s."""

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core import presets
from core.ablation.fields import flat, put
from core.cli import VERBS, _parse, main
from core.command_line.options import given, meant_options, options_of, spelled, unknown
from core.command_line.short_forms import CONFIG, HELP_ALL, of_verb
from core.config import AdaptConfig, ConfigError, EvalConfig, RunConfig, changed, from_json, to_json
from core.data.tokenizer_training import train_tokenizer
from core.engine.loading import choose_backend
from core.model.upgrade import MOVED
from core.verbs.common import fit_tokens
from core.verbs.scoring_options import judged
from core.verbs.train import Train
from shared_tests.support.command_line import Capture, call, refuse

ROOT = Path(__file__).resolve().parents[2]
KNOWN = options_of(Train)


@functools.cache
def options(verb: str) -> dict[str, Any]:
    """Return the options of a verb."""
    return options_of(getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].options))


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_those_of_the_help(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help-all"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    shown = {name for line in text.splitlines() for name in re.findall(r"^[│ ]*(--\w[\w.-]*)", line)}
    assert shown - {"--help"} == options(verb).keys()
    assert "_" not in "".join(shown), "options are shown with hyphens"
    assert text.startswith(f"usage: skc {verb}")


def test_help_says_what_the_first_argument_may_be(capsys: Capture) -> None:
    for verb, first in (("info", "PRESET|RUN|ARTIFACT"), ("train", "PRESET")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: skc {verb} {first} [-h]")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("distill RUN --steps 30", "unknown option --steps; did you mean --distill.steps?"),
        ("pack debug --lr 0.1", "unknown option --lr; did you mean --train.lr-embed or --train.lr-matrix"),
        ("train debug --train.eval-evry 3", "unknown option --train.eval-evry; did you mean --train.eval-every?"),
        ("pack debug --seed=3 --data x", "unknown option --data; did you mean --data.path?"),
        (
            "train debug --layers 3",
            "unknown option --layers; did you mean --model.layers or --model.value-embed.layers?",
        ),
        (
            "train debug --hidden 3",
            "unknown option --hidden; did you mean --model.mlp.hidden or --model.experts.hidden?",
        ),
        ("train debug --model.bank head", "unknown option --model.bank; did you mean --model.bank.at?"),
        ("train debug --model.bank-heads=3", "unknown option --model.bank-heads; did you mean --model.bank.heads?"),
        ("train debug --model.sck.times 1 4", "unknown option --model.sck.times; did you mean --model.skc.times?"),
        ("train debug --model.sck 3", "--model.sck; did you mean --model.skc.capsules or --model.skc.heads or"),
        ("train debug --model.bank.at hed", "invalid choice 'hed' .*; did you mean head?"),
        ("eval RUN --windows slidng", "invalid choice 'slidng' .*; did you mean sliding?"),
        ("eval RUN --temprature 3", "unknown option --temprature [(]see: skc eval --help[)]"),
        ("sample RUN --temprature 3", "unknown option --temprature; did you mean --temperature?"),
        ("train debug --track wandbb", "did you mean wandb?"),
        ("train debug --backend trch", "did you mean torch?"),
        ("audit RUN --backends mlx", "unknown option --backends; did you mean --backend?"),
    ],
)
def test_a_wrong_option_is_told_what_was_meant(argv: str, message: str, capsys: Capture) -> None:
    line = refuse(capsys, *argv.split())
    assert re.search(message.replace("?", "[?]"), line), line


@pytest.mark.parametrize("old, new", MOVED.items())
def test_every_old_spelling_names_the_new_one(old: str, new: str) -> None:
    """On the command line, and in an ablation file, whose every form it has."""
    option = f"--model.{new}".replace("_", "-")
    for typed in (f"--model.{old}", f"--model.{old}".replace("_", "-")):
        assert unknown([typed, "3"], KNOWN) == f"unknown option {typed}; did you mean {option}?"
    for table in ({f"model.{old}": 3}, {"model": {old: 3}}):
        with pytest.raises(ConfigError, match=rf"^f: unknown field 'model\.{old}'; did you mean model\.{new}\?$"):
            for field, value in flat(table, "f").items():
                put(to_json(RunConfig()), field, value, "f")


def test_a_part_in_an_ablation_file_may_be_written_in_three_ways() -> None:
    for table in ({"model.bank.at": "head"}, {"model": {"bank": {"at": "head"}}}, {"model": {"bank.at": "head"}}):
        values = to_json(RunConfig())
        for field, value in flat(table, "f").items():
            put(values, field, value, "f")
        assert from_json(RunConfig, values).model.bank.at == "head"
    with pytest.raises(ConfigError, match=r"f: model\.bank\.at: is given twice"):
        flat({"model": {"bank": {"at": "head"}}, "model.bank.at": "both"}, "f")


@pytest.mark.parametrize(
    "table, close",
    [
        ({"model.sck.times": [1, 4]}, r"model\.skc\.times"),
        ({"model": {"sck": {"times": [1, 4]}}}, r"model\.skc\.capsules or model\.skc\.heads or"),
        ({"model.skc": 3}, r"model\.skc\.capsules or model\.skc\.heads or"),
        (
            {"train.times": 3},
            r"model\.koopman\.times or model\.skc\.times or model\.delta\.times or model\.bank\.times",
        ),
        ({"train.eval-every": 3}, r"train\.eval_every"),
    ],
)
def test_a_wrong_field_of_an_ablation_file_is_told_what_was_meant(table: dict[str, Any], close: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f: unknown field '[\w.-]+'; did you mean {close}"):
        for field, value in flat(table, "f").items():
            put(to_json(RunConfig()), field, value, "f")


def test_every_part_has_a_box_of_its_own(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    boxes = re.findall(r"(model[\w.-]*) options", capsys.readouterr().out)
    own = ["deviations", *RunConfig().model.parts]
    assert [box.replace("-", "_") for box in boxes] == ["model", *(f"model.{name}" for name in own)]


def test_the_last_part_of_a_name_comes_first() -> None:
    assert meant_options("--steps", list(KNOWN)) == ["--train.steps"]
    assert meant_options("--model.steps", list(KNOWN)) == ["--train.steps"]
    assert meant_options("--windows", list(KNOWN)) == ["--eval.windows"]


def test_nothing_and_switches_may_be_spelled_as_people_do() -> None:
    typed = "--train.eval-every none --train.clip=Off --model.skips.on on --export.budget 5 --out none --json on"
    kept = "--export.budget 5 --out none --json on"  # --out takes text, and --json no value
    assert " ".join(spelled(typed.split(), KNOWN)) == (
        f"--train.eval-every None --train.clip=None --model.skips.on True {kept}"
    )
    assert given(typed.split(), KNOWN) == [
        "--train.eval-every", "--train.clip", "--model.skips.on", "--export.budget", "--out", "--json"
    ]  # fmt: skip


def test_the_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"skc \d+\.\d+\.\d+\n|skc of a checkout.*\n", capsys.readouterr().out)


def test_torch_is_a_name_of_cuda() -> None:
    assert choose_backend("torch") == "cuda" and "torch" in str(KNOWN["--backend"])


# What follows something else.


def dataset(vocab: int, bos: int) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(vocab=vocab, bos=bos))


def test_vocabulary_and_bos_follow_the_data_unless_they_are_given() -> None:
    base = presets.get("debug").config
    made, changed = fit_tokens(base, dataset(512, 2), ["--train.steps"])
    assert (made.model.vocab, made.model.bos) == (512, 2) and len(changed) == 2
    assert "model.vocab=512, as the data have it (the preset: 1024)" in changed
    made, changed = fit_tokens(base, dataset(512, 1), ["--model.vocab"])
    assert made.model.vocab == 1024 and not changed
    assert fit_tokens(base, dataset(1024, 1), [])[0] == base


def test_train_follows_the_data(tmp_path: Path, capsys: Capture) -> None:
    """A folder with 300 pieces trains with no word about them; a vocabulary that is given is the user's."""
    texts = [f"Document {i}: the cat number {i} sat on the mat and looked at {i}." for i in range(300)]
    (tmp_path / "mine.model").write_bytes(train_tokenizer(texts, 300))
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    (tmp_path / "text.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    out = str(tmp_path / "data")
    call(
        capsys,
        "data",
        "prepare",
        str(tmp_path / "text.jsonl"),
        "--tokenizer",
        str(tmp_path / "mine.model"),
        "--out",
        out,
    )
    argv = ("train", "debug", "--data.path", out, "--train.seq", "16", "--eval.seq", "16", "--train.steps", "1")
    assert main([*argv, "--backend", "mlx", "--out", str(tmp_path / "run")]) == 0
    assert "model.vocab=300, as the data have it (the preset: 1024)" in capsys.readouterr().out
    line = refuse(capsys, *argv, "--model.vocab", "1024", "--out", str(tmp_path / "other"))
    assert "model.vocab=1024, but data.path=" in line and "has 300: leave out --model.vocab" in line
    assert call(capsys, "info", "debug", "--data.path", out)["table"]["embed.weight"] == [300, 16]


def scoring(*words: str, base: EvalConfig, verb: str = "eval") -> EvalConfig:
    """Return the settings of a score that a command line makes of a run's."""
    return judged(base, _parse(verb, ["run", *words]), "run")


def test_sliding_windows_have_a_stride() -> None:
    base, slid = EvalConfig(seq=64), EvalConfig(seq=64, windows="sliding", stride=4)
    for form in ("--", "--eval."):
        sliding = (f"{form}windows", "sliding")
        assert scoring(*sliding, base=base).stride == 16
        assert scoring(*sliding, f"{form}seq", "2", base=base).stride == 1
        assert scoring(*sliding, f"{form}stride", "8", base=base).stride == 8
        assert scoring(f"{form}windows", "plain", base=slid).stride is None
        assert scoring(f"{form}batch", "3", base=slid).batch == 3 and scoring(*sliding, base=slid).stride == 4
    assert scoring(base=slid) == slid


def test_a_score_takes_every_setting_of_a_run() -> None:
    base = EvalConfig(seq=64, windows="sliding", stride=4, documents=7)
    for verb in ("eval", "audit"):
        assert {option for option in KNOWN if option.startswith("--eval.")} <= {*options(verb)}
        assert scoring("--eval.seed", "3", "--eval.seq", "32", base=base, verb=verb) == changed(
            base, {"seed": 3, "seq": 32}
        )
        assert scoring("--eval.plugins.temperature.prior", "5", base=base, verb=verb).plugins == (
            "temperature(prior=5)",
        )
    assert scoring("--eval.documents", "none", base=base).documents is None
    assert scoring("--documents", "all", "--eval.documents", "none", base=base).documents is None
    assert scoring("--seq", "32", "--eval.seq=32", base=base).seq == 32
    with pytest.raises(ConfigError, match="^eval.stride=4: expected from 1 to eval.seq=2$"):  # joined with the run's
        scoring("--eval.seq", "2", base=base)


def test_two_spellings_of_one_setting_agree(capsys: Capture) -> None:
    base = EvalConfig()
    for words, line in (
        (("--seq", "32", "--eval.seq", "64"), "--seq 32 and eval.seq=64 are two values of one setting: give one"),
        (("--documents", "all", "--eval.documents", "9"), "--documents all and eval.documents=9 are two"),
        (("--plugins", "--eval.plugins", "temperature"), "--plugins  and eval.plugins=temperature are two"),
    ):
        with pytest.raises(ConfigError, match=re.escape(line)):
            scoring(*words, base=base)
    line = "--eval.documents 9: an audit is of the whole text, or of its first --tokens N"
    assert line in refuse(capsys, "audit", "run", "--eval.documents", "9")


def test_another_kind_of_adaptation_starts_from_its_own_defaults() -> None:
    """What the old kind alone has would be refused: nobody should have to take a preset's twelve settings back."""
    base = presets.get("pr1855").config.eval
    assert base.phases.at and base.adapt.rank == 80
    none = scoring("--eval.adapt.kind", "none", base=base)
    assert none == base.plain() and not none.learns
    sgd = scoring("--eval.adapt.kind=sgd", "--eval.adapt.lr", "0.1", base=base)
    assert sgd == dataclasses.replace(base.plain(), adapt=AdaptConfig(kind="sgd", lr=0.1))
    more = scoring("--eval.adapt.kind", "lora", "--eval.adapt.rank", "4", base=base)
    assert more == changed(base, {"adapt.rank": 4})
    for words in (["--eval.adapt.kind", "none"], ["--eval.adapt.kind=none"]):
        assert _parse("train", ["pr1855", *words]).config().eval == none
    assert _parse("train", ["pr1855"]).config().eval == base  # no option at all
    values = to_json(presets.get("pr1855").config)
    put(values, "eval.adapt.kind", "none", "file")
    assert from_json(RunConfig, values).eval == none
    with pytest.raises(ConfigError, match="^eval.adapt.rank=4 changes nothing"):
        scoring("--eval.adapt.kind", "none", "--eval.adapt.rank", "4", base=base)


# What messages advise.

REACHED = {
    ("core/verbs/common.py", "--step"): ("eval", "sample"),
    ("core/verbs/scoring_options.py", "--plugins"): ("eval", "audit"),
    ("core/verbs/common.py", "--data"): ("eval", "sample", "audit", "export"),
    ("core/compare/pair.py", "--by"): ("compare",),
    ("core/check/doctor.py", "--mini"): ("parity",),
    ("core/training/run.py", "--out"): ("train", "import-official"),
    ("core/training/run.py", "--dtype"): ("train",),
    ("core/engine/ranks.py", "--backend"): ("train", "eval"),
    ("core/forecast/probe.py", "--train.micro-batch"): ("train",),
    ("core/check/parity.py", "--steps"): ("parity",),
    ("core/check/parity.py", "--dtype"): ("parity",),
    ("core/training/trackers.py", "--track"): ("train", "ablate"),
    ("core/ablation/search/search.py", "--search"): ("ablate",),
    ("core/ablation/locks.py", "--store"): ("ablate",),
    ("core/ablation/store.py", "--store"): ("ablate",),
}
"""What verbs reach a message that names an option; other files' messages need at least one verb that has it."""
OTHERS = {"--help", HELP_ALL, CONFIG, "--version", "--nproc_per_node", "--standalone"}
"""Options of every verb, of the program, and of torchrun."""
NO_VERB = ("core/config.py", "core/model/config.py", "core/train_config.py", "core/checks.py", "core/scoring/")
"""Files whose messages reach verbs of other options (`eval` has --stride, `train` --eval.stride): they name fields."""


def messages() -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every string in core and backends that is no docstring; values in it are left out."""
    for path in sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | alone:
                text = node.value
            else:
                continue
            yield path.relative_to(ROOT).as_posix(), text


def advised() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (file, option, verbs): every option in a message, with the verbs that it is for."""
    names = sorted(VERBS, key=len, reverse=True)
    for file, text in messages():
        for match in re.finditer(r"(?<![\w-])(?<!var\()--([a-z][\w.-]*)(?<![.])(?![\w:.-]*:)", text):
            option, before = f"--{match[1]}".rstrip("."), text[: match.start()]
            if option in OTHERS or file.startswith(("core/device_", "core/audit/")) or " " not in text:
                continue
            told = re.findall("skc (" + "|".join(names) + r")\b", before)
            yield file, option, (told[-1],) if told else REACHED.get((file, option), ())


def test_no_message_begins_with_the_name_of_a_verb() -> None:
    """`skc VERB: ` stands in front of every message; what comes behind does not say the verb again."""
    begins = re.compile(rf"({'|'.join(VERBS)})(: | --)")
    doubled = [(path, text) for path, text in raised() if begins.match(text)]
    assert not doubled and begins.match("compare: 1 run given") and len(list(raised())) > 300


def raised() -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every message that core raises; values in it are left out."""
    for path in sorted((ROOT / "core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.exc.args[0]).removeprefix("f").strip("'\"")


def test_every_advice_is_an_option_that_the_verb_has() -> None:
    found, wrong = 0, []
    for file, option, verbs in advised():
        found += 1
        having = [verb for verb in VERBS if option in {**options(verb), **of_verb(verb)}]
        if not having or not set(verbs) <= set(having) or file.startswith(NO_VERB):
            wrong.append((file, option, verbs, having))
    assert not wrong and found > 40
