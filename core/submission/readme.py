"""README.md of a submission: everything out of the records, but for the blurb and the credits."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from core.config import RunConfig, chosen
from core.model.params import param_table
from core.plain import flattened
from core.submission.log_values import Log
from core.submission.submission_json import RULES, Author, hardware

FILES = {
    "README.md": "this page", "submission.json": "the figures, out of the logs",
    "train_gpt.py": "the whole program: trains, exports, scores", "requirements.txt": "what it imports, pinned",
    "tokenizer.model": "the tokenizer", "audit.json": "sizes and hashes of the artifacts, findings of the audits",
    "legality.md": "the findings, to read",
}  # fmt: skip
FORMS = {"text": "source", "packed text": "compressed source in a line", "zip": "a zip that Python runs"}
UNTOLD = ("schema", "seed", "data.")


class Page(NamedTuple):
    """What the README is made of."""

    about: Author
    track: str
    why: tuple[str, ...]
    """Why it is not in the record track; nothing: it is."""
    config: RunConfig
    logs: Sequence[Log]
    code: dict[str, Any]
    """bytes, sha256, form and, if the runs were made by it, ran."""
    values: dict[str, Any]
    """The object of submission.json."""
    silent: dict[int, str]
    """Seed -> why it has no audit."""


def readme(page: Page) -> str:
    """Return the text of README.md."""
    about, values, versions = page.about, page.values, page.logs[0].versions or {}
    spread = f" (standard deviation {values['val_bpb_std']:.8f})" if "val_bpb_std" in values else ""
    lines = [
        f"# {about.name}",
        "",
        about.blurb,
        "",
        f"**val_bpb {values['val_bpb']:.8f}**, mean of {len(page.logs)} seeds{spread}; val_loss "
        f"{values['val_loss']:.8f} nats. Track `{page.track}`.",
        "",
        *(f"* Not in the record track: {reason}." for reason in page.why),
        *([""] if page.why else []),
        "## Results",
        "",
        *_results(page.logs),
        "",
        f"Largest artifact with the code: {values['bytes_total']:,} bytes of 16,000,000 "
        f"({values['artifact_bytes_max']:,} and {values['bytes_code']:,}).",
        "",
        "## Architecture",
        "",
        *_architecture(page),
        "",
        "## Training",
        "",
        *_training(page.logs),
        "",
        "## Run command",
        "",
        *_command(page),
        "",
        "## Requirements",
        "",
        f"requirements.txt; the runs had Python {versions.get('python')} on {hardware(page.logs[0])}.",
        "",
        "## Compliance",
        "",
        *_compliance(page),
        "",
        "## Configuration",
        "",
        "Every setting that is not at its default; the logs hold all of them.",
        "",
        *_settings(page.config),
        "",
        "## Credits",
        "",
        *([f"* {line}" for line in about.credits] or ["None named."]),
        "",
        "## Included files",
        "",
        *(f"* `{name}`: {what}" for name, what in FILES.items()),
        *(f"* `train_seed{log.seed}.log`: the log of seed {log.seed}" for log in page.logs),
    ]
    return "\n".join(lines) + "\n"


def _results(logs: Sequence[Log]) -> list[str]:
    names = (
        "seed",
        "steps",
        "step ms",
        "before export",
        "exported",
        "final bpb",
        "artifact bytes",
        "train s",
        "eval s",
    )
    rows = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for log in logs:
        cells = (
            str(log.seed), _of(log.stop_step, ",d"), _of(log.step_avg_ms, ".3f"), _of(log.weights_val_bpb, ".8f"),
            _of(log.exported_val_bpb, ".8f"), f"**{_of(log.val_bpb, '.8f')}**", _of(log.artifact_bytes, ",d"),
            _of(log.train_seconds, ".3f"), _of(log.eval_seconds, ".3f"),
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _of(value: float | int | None, form: str) -> str:
    return "not recorded" if value is None else format(value, form)


def _architecture(page: Page) -> list[str]:
    storage: dict[str, int] = {}
    for row in param_table(page.config.model).values():
        storage[row.storage] = storage.get(row.storage, 0) + row.size
    stored = ", ".join(f"{size:,} as {name}" for name, size in storage.items())
    model = page.config.model
    return [
        f"* {page.values['model_params']:,} parameters ({stored}).",
        f"* {model.layers} layers of width {model.dim}, blocks {', '.join(dict.fromkeys(model.blocks))}.",
        f"* Tokenizer: {page.values['tokenizer']}.",
    ]


def _training(logs: Sequence[Log]) -> list[str]:
    return [
        f"* Seed {log.seed}: stopped by {log.stop_reason} at step {log.stop_step:,}; training ended at "
        f"{_of(log.train_seconds, '.3f')} s, its text was closed at {_of(log.closed_seconds, '.3f')} s; scoring took "
        f"{_of(log.eval_seconds, '.3f')} s, {_of(log.eval_strict_seconds, '.3f')} s with reading the artifact."
        for log in logs
    ]


def _command(page: Page) -> list[str]:
    ranks = page.logs[0].ranks or 1
    start = "python" if page.logs[0].backend == "mlx" or ranks == 1 else "torchrun --standalone"
    each = f" --nproc_per_node={ranks}" if start != "python" else ""
    names = "DATA_PATH=data TOKENIZER_PATH=tokenizer.model"
    lines = [f"    SEED={log.seed} RUN_ID=seed{log.seed} {names} {start}{each} train_gpt.py" for log in page.logs]
    code = page.code
    about = f"train_gpt.py has {code['bytes']:,} bytes ({FORMS[code['form']]}), SHA-256 {code['sha256']}."
    if not code["ran"]:
        about += " The runs were made by a checkout; the program was packed from their settings, and did not make them."
    return [about, "", *lines]


def _compliance(page: Page) -> list[str]:
    answers = page.values["compliance"]
    lines = [f"* {name}: {str(value).lower()} ({RULES[name]})" for name, value in answers.items()]
    missing = [name for name in RULES if name not in answers]
    if missing:
        lines.append(f"* NOT CHECKED, and so not claimed: {', '.join(missing)}.")
    lines += [f"* Seed {seed}: {why}." for seed, why in page.silent.items()]
    return [*lines, "", "legality.md has the verdict of each rule with its evidence."]


def _settings(config: RunConfig) -> list[str]:
    """Return the settings that are not at their defaults, as `name = JSON value`."""
    flat = flattened(chosen(config))
    return [f"    {name} = {json.dumps(value)}" for name, value in flat.items() if not name.startswith(UNTOLD)]
