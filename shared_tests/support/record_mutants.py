"""Hostile records for `support.mutations`: what a run, prepared data, a ledger and an ablation are described by.

A text is changed as what it says, and written as its writer would; or in the bytes of the finished file. Readers are
the ones that verbs use: what they refuse must be a typed error of one short line that names the file.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core import presets
from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.records import read_job, read_members, read_shown, starts
from core.ablation.stats.results import read_result
from core.compare.runs import compare, comparison_table, lines
from core.config import to_json
from core.console import MESSAGE
from core.data.dataset import open_dataset
from core.formats.toml import read_toml
from core.scoring.ledger import Ledger
from core.training.run import Run
from core.verbs.common import check_data
from core.verbs.errors import is_users, message
from shared_tests.support.ablation_worker import whole_score
from shared_tests.support.killed import small_data
from shared_tests.support.mutants import Random, alter, edit, hostile, json_text

SCORE = whole_score(2.0)
PLAN = """
name = "parts"
purpose = "What helps?"
base = "debug"
seeds = [1, 2]
backends = ["cuda"]
reference = "plain"
[budget]
steps = 10
[settings]
"train.log_every" = 1
eval.documents = 4
[variants.plain]
[variants.wide]
"model.dim" = 64
model.blocks = ["skc", "attention"]
[search]
trials = 3
seeds = [7]
[search.space]
"train.lr_matrix" = { low = 0.003, high = 0.3, log = true }
"train.matrix_rule" = { values = ["adamw", "muon"] }
"model.mlp.hidden" = { low = 64, high = 128, step = 64 }
"""
PIECES = (
    *'[]{}=,."\'#\n\\ ', '"""', "'''", "[[", "]]", "inf", "nan", "-1", "0x" + "f" * 40, "1e400", "true", "none",
    "9" * 30, "9" * 5000, "a." * 40, "[" * 50, "1979-05-27T07:32:00Z", "\\ud800", "\x1b[2J", "[variants.x]", "[search]",
    "\r\n",
)  # fmt: skip


class RefusedError(ValueError):
    """A reader refused a file as it should."""


def reading(read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a reader whose refusals are RefusedError: typed, one short line, with the file's name."""

    def made(path: Path) -> None:
        try:
            read(path)
        except (ValueError, ArithmeticError, OSError) as error:
            if not is_users(error):
                raise
            said = message(error)
            assert said.isprintable() and len(said) <= MESSAGE, f"not one short line: {said[:500]!r}"
            assert path.name in said or path.parent.name in said, f"it does not name the file: {said}"
            rest = said.partition(path.name)[2].removeprefix(":").strip()
            raise RefusedError(f"{path}: {re.sub('[0-9]+: ', '', rest, count=1)}") from error

    return made


def run_folder(folder: Path) -> Path:
    """Make a run that nobody trained, and another to hold it against; return the folder of the first."""
    config = presets.get("debug").config
    for name in ("run", "other"):
        run = Run.create(folder / name, config, b"no tokenizer")
        (run.path / "metrics.jsonl").write_bytes(metrics_files()[0])
        (run.path / "env.json").write_bytes(env_files()[0])
    return folder / "run"


def metrics_files() -> list[bytes]:
    """Return metrics.jsonl of a finished run, with every name that it may hold."""
    rows: list[dict[str, Any]] = []
    for step in (5, 10, 15, 20):
        row = {"train/loss": 3.0 - step / 50, "train/bpb": 2.5, "train/grad_norm": 1.0, "opt/lr": 1e-3}
        row |= {"perf/tok_s": 1e4, "perf/step_ms": 20.0, "clock/seconds": step / 10, "progress": step / 20}
        rows.append({"step": step, **row})
        rows.append({"step": step, "val/bpb": 2.6 - step / 50, "val/error": 0.01})
    rows.append({"step": 20, "samples": ["It was", "she said"]})
    rows.append({"step": 20, "clock/stopped": 2.0, "clock/closed": 2.01})
    rows.append({"step": 20, "final/score": SCORE})
    rows.append({"step": 20, "final/artifact": {"score": SCORE, "bytes": 81_000, "gap": 0.0}})
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def env_files() -> list[bytes]:
    """Return env.json of a run that was started twice."""
    start = {
        "command": "skc train debug", "commit": "0" * 40, "dirty": False, "step": 0, "backend": "cuda",
        "device": "CPU", "ranks": 1, "dtype": "float32", "notes": ["exact"], "platform": "Linux",
        "versions": {"python": "3.11.7", "numpy": "2.0"}, "data": {"name": "sample", "sha256": "0" * 64},
    }  # fmt: skip
    return [json.dumps({**start, "step": 10, "earlier": [start]}, indent=2).encode()]


def look_at_run(path: Path) -> None:
    """Read a run as `skc compare` and `skc ablate` do, and say what they say."""
    folder = path.parent
    found, _ = compare([str(folder), str(folder.with_name("other"))])
    assert all(isinstance(line, str) for line in lines(found)) and comparison_table(found)
    run = Run.open(folder)
    read_result(Job("plain", 1, "cuda", run.config, None), folder, "done")
    json.dumps(found.to_json(), allow_nan=False)


def mutate_lines(rng: Random, whole: bytes) -> bytes:
    """Return JSON lines with one or two of them changed, moved or repeated."""
    rows = [json.loads(line) for line in whole.splitlines()]
    for _ in range(rng.randint(1, 2)):
        at, what = rng.randrange(len(rows)), rng.randrange(8)
        if what == 0:
            rows.insert(rng.randrange(len(rows)), json.loads(json.dumps(rows[at])))
        elif what == 1:
            rows[at] = hostile(rng)
        else:
            alter(rng, rows[at]) if type(rows[at]) in (dict, list) else None
    return b"".join(json_text(rng, row, canonical=False) + b"\n" for row in rows)


def mutate_json(rng: Random, whole: bytes) -> bytes:
    """Return a JSON file with one or two places changed."""
    tree = [json.loads(whole)]
    for _ in range(rng.randint(1, 2)):
        alter(rng, tree if rng.random() < 0.05 else tree[0] if tree and type(tree[0]) in (dict, list) else tree)
    return json_text(rng, tree[0] if tree else None, canonical=False)


def mutate_plan(rng: Random, whole: bytes) -> bytes:
    """Return TOML with lines moved, removed or repeated, or values and pieces of syntax put over it."""
    text = whole.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        at, what = rng.randrange(len(text)), rng.randrange(6)
        if what == 0:
            text.insert(rng.randrange(len(text)), text[at])
        elif what == 1:
            text[at] = ""
        elif what == 2 and "=" in text[at]:
            value = hostile(rng)
            text[at] = text[at].partition("=")[0] + "= " + json.dumps(value, ensure_ascii=False)
        else:
            to = rng.randrange(len(text[at]) + 1)
            text[at] = text[at][:to] + rng.choice(PIECES) + text[at][to + rng.randrange(3) :]
    return "\n".join(text).encode("utf-8", "surrogatepass")


def look_at_plan(path: Path) -> None:
    """Read an ablation file as `skc ablate` does."""
    plan: Ablation = read_plan(path)
    assert plan.jobs() and read_toml(path)[0]


def data_folder(folder: Path) -> Path:
    """Prepare a small text in `folder`/data; its texts' lengths are a .npy file."""
    path = Path(small_data(folder, 12))
    assert (path / length_file(path)).exists()
    return path


def length_file(path: Path) -> str:
    """Return the name of the file that holds the bytes of every validation document."""
    return json.loads((path / "manifest.json").read_text())["splits"]["val"]["document_bytes"]


def look_at_data(path: Path) -> None:
    """Open prepared data as `skc train` does, with its checks."""
    config = presets.get("debug").config
    dataset = open_dataset(str(path.parent))
    model = dataclasses.replace(config.model, vocab=dataset.tokenizer.vocab, bos=dataset.tokenizer.bos)
    train = dataclasses.replace(config.train, seq=8)
    check_data(dataclasses.replace(config, model=model, train=train), dataset, "")


def mutate_npy(rng: Random, whole: bytes) -> bytes:
    """Return a .npy file whose header says something else, with the length of the header repaired or not."""
    size = int.from_bytes(whole[8:10], "little")
    header, rest = whole[10 : 10 + size].decode(), whole[10 + size :]
    count = re.search(r"\((\d+),\)", header)
    shape = count[0] if count else "()"
    values = (
        "(-1,)", "(True,)", "((3,),)", "(10**18,)", f"({2**62},)", "(1.0,)", "()", "(0,)", f"({2**63},)", "[3]", "None",
        "(" * 300 + ")" * 300, f"({shape[1:-2]}, 1)", "('a',)", "(1" + "0" * 5000 + ",)",
    )  # fmt: skip
    kinds = (
        "'|O'",
        "'<f8'",
        "'>i8'",
        "'|b1'",
        "'|V1000000'",
        "[('a', '<i8')]",
        "'<M8[s]'",
        "'<U9'",
        "None",
        "'<i4'",
        "1",
    )
    what = rng.randrange(6)
    if what == 0:
        header = header.replace(shape, rng.choice(values))
    elif what == 1:
        header = re.sub(r"'[<|>][a-z]\d'", lambda _: rng.choice(kinds), header, count=1)
    elif what == 2:
        header = header.replace("False", rng.choice(("True", "0", "None", "[", "(" * 200)))
    elif what == 3:
        header = edit(rng, header.encode()).decode("latin-1")
    elif what == 4:
        rest = edit(rng, rest)
    else:
        header += rng.choice((" " * 60_000, "{" * 5000, "\0", "__import__('os')"))
    data = header.encode("latin-1")
    length = len(data) if rng.random() < 0.9 else rng.choice((0, size + 1, 65_535))
    version = b"\x01\x00" if rng.random() < 0.95 else rng.choice((b"\x02\x00", b"\x03\x00", b"\xff\xff"))
    return whole[:6] + version + min(length, 65_535).to_bytes(2, "little") + data + rest


def ledger_files(folder: Path) -> list[bytes]:
    """Return a ledger of a few writes, of ranges and of scattered targets."""
    ledger = Ledger.open(folder / "l", 64, "0f" * 32)
    for positions in (np.arange(1, 20), np.arange(30, 50), np.array([21, 23, 29, 60])):
        ledger.write(positions, np.full(len(positions), 2.5), 0)
    ledger.close()
    whole = (folder / "l").read_bytes()
    os.unlink(folder / "l")
    return [whole]


def look_at_ledger(path: Path) -> None:
    """Read a ledger; its entries must be what a ledger takes."""
    ledger = Ledger.read(path)
    entries = ledger.entries
    assert len(entries) < 1 << 26 and np.isfinite(entries["nats"]).all() and (entries["nats"] > -1e-3).all()
    assert not ledger.complete() or ledger.total() > -1


def mutate_ledger(rng: Random, whole: bytes) -> bytes:
    """Return a ledger whose header or records were changed."""
    size = int.from_bytes(whole[8:12], "little")
    header, records = whole[12 : 12 + size], whole[12 + size :]
    if rng.random() < 0.5:
        tree = json.loads(header)
        alter(rng, tree)
        header = json_text(rng, tree)
        return whole[:8] + len(header).to_bytes(4, "little") + header + records
    return whole[: 12 + size] + edit(rng, records)


def store_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of an ablation store by name."""
    start = {"host": "0" * 8, "device": "0", "threads": 2, "parallel": 1, "seconds": 3.5, "beside": 1.0}
    job = {
        "schema": 1, "key": "0" * 16, "config": to_json(presets.get("debug").config), "backend": "cuda", "dtype": None,
        "code": "0" * 64, "data": {"name": "test", "sha256": "0"}, "command": "skc ablate parts.toml",
    }  # fmt: skip
    files = {
        "job.json": job,
        "machine.json": {"schema": 1, "starts": [start, {**start, "seconds": None, "beside": None}]},
        "members.json": {"schema": 1, "ablation": "parts", "file": "p.toml", "runs": [["plain", 1, "cuda", "0" * 16]]},
        "looked.json": {"shown": ["0" * 16]},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in files.items()}


STORE_READERS: dict[str, Callable[[Path], object]] = {
    "job.json": lambda path: read_job(path.parent),
    "machine.json": lambda path: starts(path.parent),
    "members.json": read_members,
    "looked.json": read_shown,
}


@functools.cache
def kinds(
    folder: Path,
) -> dict[str, tuple[Path, list[bytes], Callable[[Random, bytes], bytes], Callable[[Path], None]]]:
    """Return name -> (where a file lies, whole files, how one is changed, how it is read)."""
    run, data = run_folder(folder / "records"), data_folder(folder / "text")
    config = json.dumps(to_json(presets.get("debug").config)).encode()
    lengths = data / length_file(data)
    made: dict[str, Any] = {
        "metrics": (run / "metrics.jsonl", metrics_files(), mutate_lines, look_at_run),
        "env": (run / "env.json", env_files(), mutate_json, look_at_run),
        "config": (run / "config.json", [config], mutate_json, look_at_run),
        "manifest": (data / "manifest.json", [(data / "manifest.json").read_bytes()], mutate_json, look_at_data),
        "lengths": (lengths, [lengths.read_bytes()], mutate_npy, look_at_data),
        "ledger": (folder / "mutant.ledger", ledger_files(folder), mutate_ledger, look_at_ledger),
        "plan": (folder / "plan.toml", [PLAN.encode()], mutate_plan, look_at_plan),
    }
    for name, whole in store_files(folder).items():
        made[name.removesuffix(".json")] = (folder / "store" / name, [whole], mutate_json, STORE_READERS[name])
    (folder / "store").mkdir(exist_ok=True)
    return {name: (place, whole, mutate, reading(read)) for name, (place, whole, mutate, read) in made.items()}
