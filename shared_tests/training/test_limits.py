"""No number, text or list of a configuration makes anything hang: it works, or it is refused in one line. Budget: 15 s.

The cases are made of the fields of the dataclasses, and go in as config.json, artifact header, TOML and command line.
"""

import contextlib
import dataclasses
import itertools
import json
import resource
import signal
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from core import presets
from core.ablation.plan import read_plan
from core.checks import ConfigError, in_words
from core.cli import main
from core.config import MOST_TOKENS, EvalConfig, ModelConfig, RunConfig, changed, flattened, from_json, to_json
from core.console import MESSAGE, one_line
from core.export.artifact import ArtifactError, read_artifact, write_artifact
from core.model import trunk
from core.model.params import MOST_VALUES, count, param_table, start_values
from core.training.run import Run
from core.verbs.common import open_subject
from core.verbs.errors import is_users, message
from shared_tests.reference import storage as reference
from shared_tests.support.artifacts import join, parts
from shared_tests.support.command_line import Capture
from shared_tests.support.harness import EVERYTHING, mini
from shared_tests.support.hostile import put

WHOLE = (10**9, 10**18, 2**40, 2**62, -(2**62), 10**4000, -1, 0)
TEXTS = ("a" * 100_000, "a\0b", "a\ud800b", "\x1b[2Ja", "")
SECONDS, MEMORY = 10.0, 512 << 20
"""Of processor time and of memory that one case may take."""
MOMENT = 0.1
"""Seconds of processor time in which a header with one number that is too large is refused."""


def kinds(hint: Any) -> set[Any]:
    """Return the plain types that a field takes."""
    if get_origin(hint) is typing.Literal:
        return {str}
    return set().union(*map(kinds, get_args(hint))) if get_args(hint) else {hint}


def fields(kind: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name of every setting, with dots, and what it takes."""
    for name, hint in typing.get_type_hints(kind).items():
        inside = dataclasses.is_dataclass(hint)
        yield from fields(hint, f"{prefix}{name}.") if inside else [(f"{prefix}{name}", hint)]


def cases() -> Iterator[tuple[str, Any]]:
    """Yield (setting, value) for every setting: numbers, texts and lists that no one means."""
    for name, hint in fields():
        values: list[Any] = []
        if get_origin(hint) is tuple:
            one = {int: 3, float: 0.5, str: "attention"}[kinds(hint).difference({type(...)}).pop()]
            values += [[one] * 20_000, [10**18], [], [[]]]
        elif int in kinds(hint):
            values += WHOLE
        elif float in kinds(hint):
            values += [*WHOLE, 1e308, -1e308, 5e-324]
        elif str in kinds(hint):
            values += TEXTS
        yield from ((name, value) for value in values)


ALL = list(cases())


def edited(config: RunConfig, case: tuple[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it, with one setting changed."""
    return json.loads(json.dumps(put(to_json(config), *case)))


def check(act: Callable[[], object], case: object) -> bool:
    """Return whether something is accepted; AssertionError unless it is quick, and refused in one line if it is not."""
    try:
        with within(SECONDS, case):
            act()
        return True
    except (ValueError, OSError) as error:
        said = message(error)
        assert is_users(error), f"{in_words(case)}: {type(error)}: {said}"
        assert said.isprintable() and 0 < len(said) <= MESSAGE, f"{in_words(case)}: {said!r}"
        return False


@contextlib.contextmanager
def within(seconds: float, case: object) -> Iterator[None]:
    """Raise AssertionError once the block has used so much processor time: what hangs fails too."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{in_words(case)}: more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let this process have no more than MEMORY beside what it has: what asks for more dies of a MemoryError."""
    if not Path("/proc/self/statm").exists():  # macOS takes the limit and enforces nothing
        yield
        return
    had = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (had + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def use(config: RunConfig) -> None:
    """Do what every verb does with a configuration before anything is trained or scored."""
    assert count(config.model) <= MOST_VALUES
    assert config.train.tokens_per_step and config.train.lengths and trunk.layers(config.model, True)


def test_config_json(tmp_path: Path) -> None:
    """Every field of every section, as a run folder says it."""
    run = Run.create(tmp_path / "run", presets.get("debug").config, b"tokenizer")
    file, accepted = run.path / "config.json", 0
    for case in ALL:
        file.write_text(json.dumps(edited(run.config, case)))
        accepted += check(lambda: use(Run.open(run.path).config), case)
    assert 40 < accepted < len(ALL) / 4, "most are refused, and what is meant by someone works"


@pytest.fixture(scope="module", params=["debug", EVERYTHING])
def header(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The header and the streams of an artifact: of a plain model, and of one with everything on."""
    path, model = tmp_path_factory.mktemp("good") / "good.skc", mini(request.param).model
    stored = reference.stored_model(model, start_values(model, 0))
    write_artifact(path, model, stored, tokenizer_sha256="0" * 64, provenance={"train_seq": 16})
    return parts(path.read_bytes())


MODEL = [(name.removeprefix("model."), value) for name, value in ALL if name.startswith("model.")]
COUNTS = [name.removeprefix("model.") for name, hint in fields() if name.startswith("model.") and int in kinds(hint)]
"""The settings of a model, with values that no one means, and those that are whole numbers or lists of them."""


def test_an_artifact(header: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    """Every setting of a model, as an artifact's header says it."""
    bad, (good, payload) = tmp_path / "bad.skc", header
    for name, value in MODEL:
        if not (isinstance(value, str) and "\ud800" in value):
            bad.write_bytes(join(good | {"model": put(good["model"], name, value)}, payload))
            check(lambda: read_artifact(bad), (name, value))


def test_an_artifact_says_how_long_its_rows_were(header: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    bad, (good, payload) = tmp_path / "bad.skc", header
    for seq in (2**62, MOST_TOKENS + 1, 0, -1, 64.0, "64"):
        bad.write_bytes(join(good | {"provenance": {"train_seq": seq}}, payload))
        with pytest.raises(ArtifactError, match="provenance: train_seq=.*: expected a whole number from 1 to"):
            open_subject(str(bad), None)
    for provenance, seq in (({}, EvalConfig.seq), ({"train_seq": 16}, 16), ({"train_seq": MOST_TOKENS}, MOST_TOKENS)):
        bad.write_bytes(join(good | {"provenance": provenance}, payload))
        assert open_subject(str(bad), None).config.train.seq == seq


def test_a_header_of_huge_numbers_is_refused_in_moments(header: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    """Whatever else a header switches on: its numbers are bounded before anything is made of them."""
    bad, (good, payload) = tmp_path / "bad.skc", header
    for name in COUNTS:
        for value in (2**40, 2**62, 10**4000):
            at = [value] if isinstance(at_default(name), tuple) else value
            bad.write_bytes(join(good | {"model": put(good["model"], name, at)}, payload))
            with pytest.raises(ArtifactError, match=rf"model\.{name}.*expected at most"), within(MOMENT, name):
                read_artifact(bad)


def at_default(name: str) -> Any:
    """Return the default of a model's setting."""
    return flattened(to_json(ModelConfig()))[name]


def test_two_numbers_at_their_limits_cost_little(header: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    """What each would be allowed alone; most models of both are refused for their size or their tensors."""
    bad, (good, payload) = tmp_path / "bad.skc", header
    refused = []
    largest = {name: limit for name in COUNTS if (limit := allowed(good["model"], name))}
    assert len(largest) > 15
    for one, other in itertools.combinations(largest, 2):
        model = put(put(good["model"], one, largest[one]), other, largest[other])
        bad.write_bytes(join(good | {"model": model}, payload))
        refused.append(not check(lambda: read_artifact(bad), (one, other)))
    assert sum(refused) > 100


def allowed(model: dict[str, Any], name: str) -> int | None:
    """Return the largest power of two that a number of a model may be, the others being as they are."""
    for exponent in range(20, 1, -1):
        with contextlib.suppress(ConfigError):
            from_json(ModelConfig, put(model, name, 2**exponent), "model")
            return 2**exponent
    return None


def toml(value: Any) -> str:
    """Return a value as TOML has it, which nearly is as JSON has it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value).replace("'", '"')


def test_toml(tmp_path: Path) -> None:
    """Every field of every section, as an ablation's settings say it, and what an ablation itself may ask for."""
    file = tmp_path / "plan.toml"
    lines = {"base": '"debug"', "seeds": "[1]", "backends": '["cuda"]', "[budget]\nsteps": "5"}

    def plan(changes: dict[str, str], rest: str = "[variants.plain]\n") -> bool:
        text = "".join(f"{key} = {value}\n" for key, value in {**lines, **changes}.items())
        file.write_text(text + rest, "utf-8", "surrogatepass")
        return check(lambda: read_plan(file).jobs(), (str(changes)[:80], rest[:80]))

    assert plan({})
    for name, value in ALL:
        if "." in name and name not in ("train.steps", "train.seconds"):
            plan({}, f'[settings]\n"{name}" = {toml(value)}\n[variants.plain]\n')
    for value in WHOLE:
        for changes in (
            {"[budget]\nsteps": str(value)},
            {"[search]\ntrials": f"{value}\nseeds = [2]"},
            {"[search]\ntrials": f'5\nseeds = [2]\n[search.space."train.lr_matrix"]\nlow = -1\nhigh = {value}'},
            {"seeds": f"[{value}]"},
        ):  # fmt: skip
            plan(changes)
    assert not plan({"seeds": str(list(range(100_000)))})
    assert not plan(
        {"seeds": str(list(range(300)))}, "".join(f'[variants.v{i}]\n"train.warmup" = 0.0{i}\n' for i in range(20))
    )
    assert not plan({}, "".join(f"[variants.v{i}]\n" for i in range(5000)))
    assert not plan({"backends": str(["cuda"] * 100_000).replace("'", '"')})
    assert not plan({"base": '"' + "a" * 900_000 + '"'})
    assert not plan({}, f"[variants.{'a' * 900_000}]\n")


HOSTILE_TOML = {
    "deep lists": "a = " + "[" * 100_000,
    "deep tables": "a = " + "{a=" * 100_000,
    "dotted keys": "a." * 20_000 + "a = 1",
    "dotted keys, spaced": "a . " * 2_000 + "a = 1",
    "a dotted header": "[" + "a." * 2_000 + "a]",
    "many digits": "seeds = [" + "9" * 5_000 + "]",
    "hexadecimal": "seeds = [0x" + "f" * 5_000 + "]",
    "an endless string": 'a = """' + r"\"" "" * 200_000,
    "too large": "#" * (2 << 20),
    "UTF-16": "\ufeffa = 1",
}


@pytest.mark.parametrize("name", HOSTILE_TOML)
def test_toml_that_is_no_plan(name: str, tmp_path: Path) -> None:
    """Depth, length and digits are bounded before or while it is read."""
    (tmp_path / "p.toml").write_text(HOSTILE_TOML[name], "utf-16" if name == "UTF-16" else "utf-8")
    assert not check(lambda: read_plan(tmp_path / "p.toml"), name)


def test_toml_as_people_write_it(tmp_path: Path) -> None:
    """Marks inside strings and comments are none, 32 levels are some, and a byte order mark is no letter."""
    text = 'base = "debug" # [[[[ . . .\nseeds = [1]\nbackends = ["cuda"]\n'
    text += f'purpose = """{"[" * 50} {"." * 50} " "" \\""""""\n'
    text += "[budget]\r\nsteps = 5\n[variants.plain]\n"
    (tmp_path / "p.toml").write_text(text, "utf-8-sig")
    plan = read_plan(tmp_path / "p.toml")
    assert plan.purpose.endswith(' " "" """') and plan.budget == ("steps", 5)


def test_the_command_line(capsys: Capture) -> None:
    """The same through options: one field of each section, in full, and one number for every field."""
    tried = [("model.layers", value) for value in WHOLE] + [("data.path", value) for value in TEXTS[2:]]
    tried += [("train.batch", 2**62), ("train.seq_stages", 2**40), ("eval.seq", 2**40), ("eval.batch", 2**40)]
    for name, value in tried:
        code, took = main(["info", "debug", f"--{name}", str(value)]), time.process_time()
        said = capsys.readouterr().err
        assert time.process_time() - took <= SECONDS
        if code:
            assert code == 2 and said.count("\n") == 1 and len(said) <= 400 and said[:-1].isprintable(), said[:1000]


@pytest.mark.parametrize("steps", [10**9, 10**7, 200_001])
def test_a_plan_of_too_many_steps_is_refused_at_once(steps: int, capsys: Capture) -> None:
    """--dry-run goes through a run step by step."""
    began = time.process_time()
    assert main(["train", "debug", "--dry-run", "--train.steps", str(steps)]) == 2
    assert time.process_time() - began < SECONDS
    assert f"expected at most {10**7:,}" in (said := capsys.readouterr().err) or "goes through 200,000 at most" in said


def test_sizes_at_their_limits_cost_little() -> None:
    """What the bounds let through is counted in moments, and never allocated."""
    deep = dataclasses.replace(
        ModelConfig(), layers=1024, blocks=("skc", "attention"), repeat_layers=tuple(range(1024))
    )
    assert not check(lambda: start_values(deep, 0), "deep")
    deep = changed(deep, {
        "dim": 16, "attention.heads": 1, "attention.kv_heads": 1, "mlp.hidden": 16, "attention.rope_dims": 0,
        "koopman.dim": 16, "skc.capsules": 1,
    })  # fmt: skip
    began = time.process_time()
    assert len(param_table(deep)) > 15_000 and time.process_time() - began < 5
    wide = changed(
        ModelConfig(),
        {"vocab": 1 << 20, "dim": 1 << 20, "mlp.hidden": 1 << 20, "attention.heads": 1, "attention.kv_heads": 1},
    )
    assert not check(lambda: start_values(wide, 0), "wide")


def test_every_limit_is_checked_first() -> None:
    """A number that is too large is refused by its limit, not by what would be computed from it."""
    for name, hint in fields():
        if "." in name and int in kinds(hint):
            value = [10**18] if get_origin(hint) is tuple else 10**18
            with pytest.raises(ConfigError, match=rf"^{name}.*expected at most"):
                from_json(RunConfig, edited(RunConfig(), (name, value)))


# What leaves the program.


def test_a_message_is_one_short_line_that_any_terminal_can_have() -> None:
    """Sixty megabytes are cut in their middle, escapes are written out, and lone surrogates are the bytes they were."""
    said = one_line("file: " + "\x1b[2Jk" * 1_000_000 + " is wrong\n\tdo this")
    assert len(said) <= MESSAGE and said.startswith("file: \\x1b[2Jk") and said.endswith("is wrong do this")
    assert "(cut: " in said and said.isprintable()
    assert one_line("caf\udce9 \ud800 \x00 \u202e") == "caf\\xe9 \\ud800 \\x00 \\u202e"
    assert one_line("é 日本 ± …") == "é 日本 ± …"


@pytest.mark.parametrize("argv", [["eval", "nope\udce9"], ["train", "debug", "--out", "caf\udce9"]])
def test_arguments_that_are_no_utf_8(argv: list[str], capsys: Capture) -> None:
    """One line that shows the byte."""
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "e9': not valid Unicode" in said


def test_what_a_console_shows_and_logs(tmp_path: Path, capsys: Capture) -> None:
    """Lines, cells of tables and log.txt have the same text: escaped, cut, in UTF-8."""
    from core.console import CELL, LINE, Console

    say = Console()
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as file, say.copied_to(file):
        say("\x1b[31mred\ud800\nnext")
        say("k" * 60_000_000)
        say.table(("a", "b"), [("k" * 1_000_000, 1)])
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "log.txt").read_text(encoding="utf-8")
    lines = shown.splitlines()
    assert lines[:2] == ["\\x1b[31mred\\ud800", "next"] and len(lines[2]) == LINE and len(lines[4]) < CELL + 10
