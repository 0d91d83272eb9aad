"""What `skc VERB --help` shows of verbs with hundreds of settings: short forms and own options, a line each."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from typing import Any

from core.command_line.options import options_of
from core.command_line.short_forms import CONFIG, HELP_ALL, of_verb
from core.config import RunConfig

MOST = 124
"""Letters of a line."""
COLUMN = 26
"""Where purposes begin, unless an option is longer."""
CONFIG_PURPOSE = "In place of a preset: a TOML file with `preset` and settings, or the config.json of a run."


def short_help(verb: str, usage: str, purpose: str, kind: type, base: Any) -> str:
    """Return the help of a verb: `kind` its dataclass of options, `base` their defaults (None: those of `kind`)."""
    rows = [
        _row(name, short.kind, short.purpose, short.default(_config(base))) for name, short in of_verb(verb).items()
    ]
    lines = [f"usage: {usage} [-h] [OPTIONS]", "", purpose, ""]
    if rows:
        lines += ["short forms of settings:", *rows, "", "options:"]
    else:
        lines += ["options:"]
    about, hints = docs_of(kind), options_of(kind)
    for field in sorted(dataclasses.fields(kind), key=lambda field: field.name == "json"):
        name = f"--{field.name.replace('_', '-')}"
        if name in hints and name not in of_verb(verb):
            default = getattr(base, field.name) if base is not None else field.default
            lines.append(_row(name, metavar(hints[name]), about.get(field.name, ""), default))
    if rows:
        lines.append(_row(CONFIG, "FILE", CONFIG_PURPOSE))
    more = "All settings (model.*, data.*, train.*, eval.*, export.*)." if rows else "The same at length."
    return "\n".join([*lines, _row("-h, --help", "", "This help."), _row(HELP_ALL, "", more)])


def _config(base: Any) -> RunConfig:
    return RunConfig() if base is None else base.config()


def _row(name: str, kind: str, purpose: str, default: Any = None) -> str:
    """Return a line: an option, as much of its purpose as there is room for, and what it has where it is not given."""
    head = f"  {name} {kind}".rstrip()
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    tail = "" if default in (None, False, ()) else f" (default: {shown})"
    room = MOST - max(COLUMN, len(head)) - 2 - len(tail)
    return f"{head:<{COLUMN}}  {textwrap.shorten(purpose, room, placeholder=' ...')}{tail}"


def metavar(hint: Any) -> str:
    """Return an option's value as help shows it: nothing for a switch, the choices if they are few."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    if typing.get_origin(hint) is typing.Literal:
        choices = "|".join(map(str, typing.get_args(hint)))
        return choices if len(choices) <= COLUMN + 10 else "NAME"
    if typing.get_origin(hint) is tuple:
        return f"{metavar(parts[0])} ..."
    if parts:
        return metavar(parts[0])
    return "" if hint is bool else hint.__name__.upper()


def docs_of(kind: type) -> dict[str, str]:
    """Return field -> the text under it in the source of a dataclass and of those that it is made of."""
    docs: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        for field, text in itertools.pairwise(getattr(body, "body", [])):
            about = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and text.value.value
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(about, str):
                docs[field.target.id] = about
    return docs
