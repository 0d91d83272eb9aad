"""`skc VERB ...`: finds the verb, reads its options, runs it, and turns what went wrong into one line and an exit code.

0: done; 1: a check failed; 2: the user's input was wrong; 130: interrupted. Bugs keep their traceback.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from core.console import Console, one_line, replace_odd
from core.verbs.errors import UsageError, is_users, message

BEGAN = time.monotonic()
"""When this process began, but for the start of the interpreter."""


class Verb(NamedTuple):
    """Where a verb lives: its module has a dataclass of options and a function of (options, Context)."""

    module: str
    options: str
    function: str
    purpose: str
    first: str = ""
    """What the first argument may be, if it brings the settings that the options replace."""


VERBS = {
    "doctor": Verb("core.verbs.doctor", "Doctor", "doctor", "check this machine: versions, devices, both backends"),
    "presets": Verb("core.verbs.presets", "Presets", "list_presets", "list the named runs"),
    "info": Verb(
        "core.verbs.info",
        "Info",
        "info",
        "parameters, bytes, FLOPs of a preset, run or artifact",
        "preset, run or artifact",
    ),
    "data sample": Verb("core.verbs.data", "BundledSample", "prepare_bundled", "prepare the bundled text"),
    "data prepare": Verb("core.verbs.data", "Prepare", "prepare_text", "tokenise text files into shards"),
    "data fineweb": Verb("core.verbs.data", "Fineweb", "fetch", "download the challenge's published shards"),
    "data adopt": Verb("core.verbs.data", "Adopt", "adopt", "use a folder of downloaded official shards"),
    "train": Verb("core.verbs.train", "Train", "train_run", "train a preset, score it, export it, report", "preset"),
    "eval": Verb("core.verbs.eval", "Eval", "evaluate", "score a run or an artifact on validation text"),
    "sample": Verb("core.verbs.sample", "Sample", "write_text", "let a run or an artifact write text"),
    "serve": Verb("core.verbs.serve", "Serve", "serve_models", "a local page and API of runs and artifacts"),
    "watch": Verb("core.verbs.watch", "WatchOptions", "watch_folder", "a page of a run or of ablations, which goes on"),
    "distill": Verb("core.verbs.distill", "Distill", "distill", "let a frozen model learn to draft for itself"),
    "audit": Verb("core.verbs.audit", "Audit", "audit_score", "does the score of a run or an artifact keep the rules?"),
    "export": Verb("core.verbs.export", "Export", "export_run", "write a run's artifact, reload it, score it again"),
    "pack": Verb("core.verbs.pack", "Pack", "pack_preset", "one program that trains, exports and scores", "preset"),
    "ablate": Verb("core.verbs.ablate", "Ablate", "ablate", "variants of a preset: what helped, by how much, how sure"),
    "import-official": Verb(
        "core.verbs.import_official", "Import", "import_official", "make a run of a checkpoint of the official scripts"
    ),
    "import-hf": Verb(
        "core.verbs.import_hf", "ImportHF", "import_hf", "make a run of a Qwen3.5 text model in Hugging Face's form"
    ),
    "track": Verb("core.verbs.track", "Track", "track", "copy recorded runs to TensorBoard or Weights & Biases"),
    "runs": Verb("core.verbs.runs", "Runs", "show_runs", "list runs and ablations, or the best; skc runs rm removes"),
    "runs rm": Verb("core.verbs.runs", "RemoveRuns", "remove_runs", "remove runs and stores, after a question"),
    "compare": Verb("core.verbs.compare", "Compare", "compare_runs", "runs: what differs, where curves part, speed"),
    "submit": Verb("core.verbs.submit", "Submit", "submit", "write, check or run again the folder that one would send"),
    "parity": Verb("core.verbs.parity", "Parity", "parity", "hold both backends to each other", "preset"),
    "bench": Verb("core.verbs.bench", "Bench", "bench", "measure training speed", "preset"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit code."""
    open_streams()
    began = BEGAN if argv is None else time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "skc"
    try:
        _refuse_bytes(argv)
        if not argv or argv[0] in ("-h", "--help"):
            print(_help(VERBS))
            return 0
        if argv[0] == "--version":
            print(f"skc {_version()}")
            return 0
        verb, rest = _find(argv)
        if verb is None:
            print(_help({key: value for key, value in VERBS.items() if key.startswith(f"{argv[0]} ")}))
            return 0
        name = f"skc {verb}"
        options = _parse(verb, rest)
        return _run(VERBS[verb], options, shlex.join(["skc", *argv]), began)
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted; the same command goes on from the last checkpoint, if it made one", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # `| head`: nobody reads on, and the interpreter must not complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ArithmeticError, OSError, MemoryError, RuntimeError) as error:
        if not is_users(error):
            raise
        _complain(name, error)
        return 1 if isinstance(error, ArithmeticError) else 2


def open_streams() -> None:
    """Give the process standard streams: closed ones lead nowhere, and what a stream cannot encode is replaced."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, which a file of ours must not
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w":
            replace_odd(stream)


def _refuse_bytes(argv: Sequence[str]) -> None:
    """Raise UsageError for an argument that is no text: its bytes would fail in whatever stores or tokenises it."""
    for before, argument in zip(["", *argv], argv, strict=False):
        if not any("\ud800" <= letter <= "\udfff" for letter in argument):
            continue
        where = f"{before} " if before.startswith("-") else ""
        try:
            os.fsencode(argument).decode()
        except UnicodeError as error:
            raise UsageError(f"{where}{argument!r}: not valid Unicode, expected UTF-8") from error
        raise UsageError(f"{where}{argument!r}: the locale of this shell is not UTF-8: set LC_ALL=C.UTF-8")


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("skc-lab")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def _run(verb: Verb, options: Any, command: str, began: float) -> int:
    from core.verbs.common import Context

    context = Context(Console(options.json), command, began=began, verbs=VERBS)
    try:
        outcome = getattr(importlib.import_module(verb.module), verb.function)(options, context)
    finally:
        context.say.clear()
    context.say.result({"ok": outcome.ok, **outcome.value})
    return 0 if outcome.ok else 1


def _complain(name: str, error: Exception) -> None:
    """Say what went wrong; of several ranks, only the first of each machine says what all of them find."""
    from core.config import ConfigError
    from core.engine.ranks import launched
    from core.training.loop import NonFiniteError

    _, rank = launched() or ("", 0)
    first = os.environ.get("LOCAL_RANK", str(rank)) == "0"
    if not first and isinstance(error, ConfigError | UsageError | NonFiniteError):
        return
    print(f"{name}: {f'rank {rank}: ' if rank else ''}{message(error)}", file=sys.stderr)


def _help(verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {name.ljust(width)}  {verb.purpose}" for name, verb in verbs.items()]
    return "\n".join(
        [
            "usage: skc VERB ...",
            "",
            *lines,
            "",
            "skc VERB --help shows its options (--help-all: every setting); every verb takes --json",
        ]
    )


def _find(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the verb of a command line and its arguments; None for the verb: help on a group was asked for."""
    groups = {name.split()[0] for name in VERBS if " " in name}
    words = 2 if argv[0] in groups and (argv[0] not in VERBS or " ".join(argv[:2]) in VERBS) else 1
    if words == 2 and argv[1:2] in (["-h"], ["--help"]):
        return None, []
    name = " ".join(argv[:words])
    if words == 2 and name not in VERBS:
        members = ", ".join(verb for verb in VERBS if verb.startswith(f"{argv[0]} "))
        raise UsageError(f"unknown verb {name!r}; expected one of: {members}")
    if name in VERBS:
        return name, argv[words:]
    known = sorted({*VERBS, *groups})
    close = difflib.get_close_matches(name, known, 1)
    raise UsageError(f"unknown verb {name!r}; {f'did you mean {close[0]}?' if close else 'see: skc --help'}")


def _parse(name: str, arguments: list[str]) -> Any:
    """Return a verb's options; UsageError in one line for whatever tyro says in many."""
    import tyro

    from core.command_line import options, short_forms
    from core.command_line.option_help import short_help
    from core.scoring.choices import folded

    verb = VERBS[name]
    kind = getattr(importlib.import_module(verb.module), verb.options)
    purpose = f"{verb.purpose[0].upper()}{verb.purpose[1:]}."
    wants_help = any(a in ("-h", "--help", short_forms.HELP_ALL) for a in arguments)
    default: Any = None
    program = f"skc {name}"
    if verb.first:
        default, arguments = _defaults(name, kind, arguments, wants_help)
        program += f" {'|'.join(re.split(', | or ', verb.first)).upper()}"
        purpose += f" The defaults are those of the {verb.first}: {program} --help shows them."
    if name == "distill" and (chosen := options.value_of(arguments, "--recipe")):
        default = importlib.import_module(verb.module).by_recipe(chosen)
    if name in short_forms.SHORTENED and {"-h", "--help"} & {*arguments}:
        print(short_help(name, program if verb.first else f"{program} FILE", purpose, kind, default))
        raise SystemExit(0)
    known = options.options_of(kind)
    if verb.first and default is not None and not wants_help:
        arguments = short_forms.lengthened(name, arguments, default.config())
    for option in [name for name in known if name.endswith("plugins")]:
        arguments = folded(arguments, option, default.eval.plugins if default else ())
    arguments = ["--help" if a == short_forms.HELP_ALL else a for a in arguments]
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    messages = io.StringIO()
    try:
        with contextlib.nullcontext() if wants_help else _captured(messages):
            parsed = tyro.cli(
                kind, args=options.spelled(arguments, known), prog=program, description=purpose, use_underscores=False,
                **keywords,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 0:
            raise
        box = condense(messages.getvalue()).rstrip(".")
        problem = short_forms.refused(name, arguments, list(known)) or options.unknown(
            arguments, known, short_forms.of_verb(name)
        )
        problem = problem or box + options.choice(arguments, known)
        more = short_forms.HELP_ALL if name in short_forms.SHORTENED else "--help"
        raise UsageError(f"{problem} (see: skc {name}{' PRESET' if verb.first else ''} {more})") from None
    given = {"given": tuple(options.given(arguments, known))} if hasattr(parsed, "given") else {}
    return dataclasses.replace(parsed, **given)


def _defaults(name: str, kind: Any, arguments: list[str], wants_help: bool) -> tuple[Any, list[str]]:
    """Return the settings that a verb's first argument, or the file of --config, brings, and the other arguments.

    None for the settings: only help on the verb was asked for.
    """
    from core import presets
    from core.command_line.options import taken, value_of
    from core.command_line.short_forms import CONFIG
    from core.config_file import settings_of_file
    from core.scoring.plugins import foreign
    from core.verbs.scoring_options import of_kind

    first, file = VERBS[name].first, None
    if arguments and not arguments[0].startswith("-"):
        default, arguments = kind.named(arguments[0]), arguments[1:]
        if value_of(arguments, CONFIG):
            raise UsageError(f"{CONFIG} takes the place of a {first}: leave one of them out")
    elif file := value_of(arguments, CONFIG):
        default, arguments = kind.of(settings_of_file(file)), taken(arguments, CONFIG)
        strangers = foreign(default.eval.plugins)
        if strangers and not value_of(arguments, "--eval.plugins"):
            raise UsageError(
                f"{file}: names a plug-in that is not ours ({', '.join(strangers)}), whose code runs only if you name "
                f"it: add --eval.plugins {shlex.join(default.eval.plugins)}"
            )
    elif wants_help:
        return None, arguments
    else:
        raise UsageError(f"name a {first} first: skc {name} PRESET [options]; known: {', '.join(presets.PRESETS)}")
    if chosen := value_of(arguments, "--eval.adapt.kind"):
        default = dataclasses.replace(default, eval=of_kind(default.eval, chosen))
    return default, arguments


@contextlib.contextmanager
def _captured(messages: io.StringIO) -> Iterator[None]:
    """Collect stderr, on a terminal so wide that tyro breaks no line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        with contextlib.redirect_stderr(messages):
            yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def condense(box: str) -> str:
    """Return the message of one of tyro's error boxes (a title, a rule, parts with rules between) as one line."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    drawn = bool(lines) and lines[0].startswith("╭")  # elsewhere than on a UTF-8 stdout, tyro draws with minus signs
    lines = [line for line in lines[1 if drawn else 2 :] if line and line[0] != "╰"]
    ends = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}] or [len(lines)]
    words = one_line(" ".join(lines[: ends[0]]))
    words = re.sub(r"^Error parsing \w+: (?=\w+[.=])", "", words).split(". Got errors: ")[0]
    words = re.sub(r"(?<=Expected one of \()[^()]*'None'[^()]*", _in_order, words)
    rest = " ".join(lines[ends[0] :])
    near = re.search(r"Perhaps you meant:.*?(--[\w.-]+)", rest)
    kind = re.search(r"Argument helptext:\W+--[\w.-]+ (\S+)", rest)
    hint = f"; did you mean {near.group(1)}?" if near else f"; expected {kind.group(1)}" if kind else ""
    return words + hint


def _in_order(choices: re.Match[str]) -> str:
    """Return choices with None last: tyro has them in another order in every process, out of a set."""
    return ", ".join(sorted(choices.group().rstrip(",").split(", "), key=lambda choice: (choice == "'None'", choice)))


if __name__ == "__main__":
    sys.exit(main())
