"""What a run's own records may hold, metrics.jsonl and env.json, by name: one typed reader for every verb.

People edit these files and copy them from elsewhere, so that a value of another type than the writer's is one line that
names file, line and field, before anything is computed of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from core.files import MAX_TEXT, FileError, decode_text, open_file, parse_json, read_json, read_text
from core.formats.kinds import (
    ANYTHING,
    COUNT,
    FLAG,
    NUMBER,
    SCALAR,
    Kind,
    among,
    check_value,
    number,
    or_null,
    text,
    whole,
)

MAX_ROWS = 1 << 19
"""Lines of metrics.jsonl; MAX_TEXT bytes of real ones are fewer."""
BLOCK = 1 << 14
"""Bytes at the end of metrics.jsonl that are looked at first for the last line of a loss."""


class RunError(ValueError):
    """A run folder cannot be used: the message names the file and what is wrong with it."""


@contextmanager
def of_a_run() -> Iterator[None]:
    """Let what is wrong with a file of the block be wrong with the run."""
    try:
        yield
    except FileError as error:
        raise RunError(str(error)) from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; RunError, OSError."""
    with of_a_run():
        value = read_json(path)
        check_value(value, {"*": ANYTHING}, str(path))
    return value


def read_environment(path: Path) -> dict[str, Any]:
    """Return what env.json says, nothing where there is none; RunError, OSError."""
    if not path.exists():
        return {}
    value = read_object(path)
    with of_a_run():
        check_value(value, ENVIRONMENT, str(path))
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; one that a kill cut short is left out; RunError names line and field, OSError.

    A line may be without any name but `step`; one of a loss also says at which time of training it was.
    """
    if not path.exists():
        return []
    with of_a_run():
        *lines, _ = read_text(path).split("\n")
        if len(lines) > MAX_ROWS:
            raise RunError(f"{path}: {len(lines):,} lines, expected at most {MAX_ROWS:,}: this is not a run's")
    return [read_row(f"{path}:{place}", line) for place, line in enumerate(lines, 1)]


def read_last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl from the last one of a loss on; errors as of `read_rows`.

    They say how far a run is and what it came to. Where no line has a loss all lines come. What is before them is not
    looked at: of a long run it takes a tenth of a second.
    """
    if not path.exists():
        return []
    with of_a_run():
        with open_file(path, MAX_TEXT) as file:
            text = _last_lines(file)
        lines = decode_text(path, text).split("\n")[:-1]
        if len(lines) > MAX_ROWS:
            raise RunError(f"{path}: over {MAX_ROWS:,} lines without a loss: this is not a run's")
    return [read_row(f"{path}: line {len(lines) - place} from its end", line) for place, line in enumerate(lines)]


def _last_lines(file: BinaryIO) -> bytes:
    """Return the whole lines at the end of a file, from the last one of a loss on."""
    size, count = file.seek(0, os.SEEK_END), BLOCK
    while True:
        file.seek(max(0, size - count))
        text = file.read(count)
        text = text[: text.rfind(b"\n") + 1]
        begin = text.rfind(b"\n", 0, max(0, text.rfind(b'"train/loss"'))) + 1
        if begin or count >= size:  # a text in quotes has no such quotes; line 1 begins with no line end
            return text[begin:]
        count *= 2


def read_row(where: str, line: str) -> dict[str, Any]:
    """Return one line of metrics.jsonl; RunError names `where` and the field."""
    with of_a_run():
        row = parse_json(where, line)
        check_value(row, ROW, where)
    if "train/loss" in row and "clock/seconds" not in row:
        raise RunError(f"{where}: clock/seconds: missing beside train/loss; mend or remove the line")
    return row


POSITIVE = number("a finite number from 0 up", 0.0, 1e15)
SHARE = number("a share from 0 to 1", 0.0, 1.0)
ONE = whole("a whole number from 1 up", 1, 2**53)
TEXT = text(1 << 16)
SCORE = {
    "label": among("score", "estimate"), "bpb": NUMBER, "byte_rule": among("table", "raw"), "nats": NUMBER,
    "targets": ONE, "bytes": ONE, "loss": NUMBER, "documents": COUNT, "total_documents": COUNT, "full": FLAG,
    "error": or_null(POSITIVE), "bpb_raw": or_null(NUMBER), "windows": TEXT, "plugins?": [TEXT],
    "adaptation?": TEXT,
}  # fmt: skip
"""A core.scoring.score.Score."""
ARTIFACT = {
    "score": SCORE, "bytes": COUNT, "gap?": NUMBER, "allowed?": COUNT, "within?": FLAG, "exact?": FLAG, "once?": FLAG,
    "rounding?": {"method": among("round", "gptq"), "documents": ONE, "gap": NUMBER, "plain": NUMBER},
}  # fmt: skip
"""`exact`: forward passes used the stored form; `once`: the bits are those in memory, and one score stands for both;
`rounding`: estimates of what codes that were chosen after training cost, and plainly rounded ones would have cost."""
METRICS: dict[str, tuple[Kind, str]] = {
    "train/loss": (NUMBER, "mean nats per target since the last line"),
    "train/bpb": (NUMBER, "estimate of bits per byte from train/loss and the bytes per token of the training text"),
    "train/grad_norm": (POSITIVE, "mean global gradient norm before clipping since the last line"),
    "opt/lr": (POSITIVE, "learning rate of the matrix group"),
    "perf/tok_s": (POSITIVE, "tokens per second of training time since the last line"),
    "perf/step_ms": (POSITIVE, "training time per step since the last line"),
    "perf/memory": (POSITIVE, "bytes that arrays took at most so far, or the process where the engine tells no more"),
    "clock/seconds": (
        POSITIVE, "training time since step 0: no evaluation, samples, checkpoints or compilation"
    ),
    "clock/stopped": (POSITIVE, "training time when the last step was done"),
    "clock/closed": (
        POSITIVE, "the same when the training text was closed; the last checkpoint, written in between, counts"
    ),
    "clock/train_stop": (POSITIVE, "when training was to end (runs with train.reserve_seconds only)"),
    "tokens": (COUNT, "tokens that the steps so far had (runs with train.batch_stages only)"),
    "progress": (SHARE, "share of the run that the schedule saw at the last step"),
    "progress/each": ([SHARE], "the same for every step since the last line (runs with train.seconds only)"),
    "val/bpb": (NUMBER, "validation estimate made during training"),
    "val/error": (POSITIVE, "its standard error"),
    "samples": ([TEXT], "texts that the model wrote"),
    "final/score": (SCORE, "the Score of the weights in memory"),
    "final/artifact": (
        ARTIFACT, "the Score of the weights reloaded from the artifact, its bytes and the gap"
    ),
    "twin/frozen": (TEXT, "SHA-256 of the frozen weights before and after a twin learned (skc distill)"),
    "twin/text": ({"rows": ONE, "distinct": SHARE}, "own text that a twin learns from: rows, share of new 8-grams"),
    "twin/places": (
        {"*": {"agreement": [SHARE], "kl": [NUMBER], "cosine": {"*": NUMBER}}},
        "by kind of text: how near the twin's rows are to the model's, by place of a block and by layer",
    ),
    "twin/decoding": (
        {"*": {"*": {"*": NUMBER}}}, "by kind of text and drafter: what drafts came to in the decoding loop"
    ),
    "final/plugins": (SCORE, "the Score of the artifact with eval.plugins and eval.adapt"),
    "clock/scoring": (POSITIVE, "time of the pass that gave the claimed score, if one start made it whole"),
    "clock/scoring_strict": (POSITIVE, "the same from before the artifact was read: decompression counts"),
}  # fmt: skip
"""Every name that metrics.jsonl may hold beside `step`, the number of steps done: what it is, and what it means."""
ROW = {"step": COUNT} | {f"{name}?": kind for name, (kind, _) in METRICS.items()}
START = {
    "command?": TEXT, "commit??": TEXT, "dirty??": FLAG, "step?": COUNT, "backend?": TEXT, "device?": TEXT,
    "ranks?": whole("a whole number from 1 to 65536", 1, 2**16), "dtype?": TEXT, "notes?": [TEXT], "platform?": TEXT,
    "versions?": {"*": TEXT}, "data?": {"*": SCALAR}, "imported?": {"*": SCALAR}, "train_tokens?": COUNT,
    "val_tokens?": COUNT, "tokenizer_sha256?": TEXT, "transform?": TEXT,
    "program_sha256?": TEXT, "program_bytes?": COUNT, "program_form?": TEXT, "*": SCALAR,
}  # fmt: skip
ENVIRONMENT = {**START, "earlier?": [START]}
"""What env.json says of a start of the run, and of those before it."""
