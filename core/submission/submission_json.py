"""submission.json: every figure out of the logs, every claim of compliance out of an audit's verdict."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from core.audit.rules import Verdict
from core.submission.log_values import Log

RULES = {
    "train_under_600s": "D2", "artifact_under_16mb": "D1", "eval_under_600s": "D3", "no_slot": "D11",
    "no_pre_quant_ttt": "D11", "no_etlb": "D11", "no_ngram_cache": "D12", "score_first_ttt": "D9",
    "three_seeds": "D16",
}  # fmt: skip
"""Key of `compliance` -> the rule whose verdict answers it."""
SEEDS = 3
DIGITS = 8


class Author(NamedTuple):
    """Who sends it, and what they say of it."""

    author: str
    github_id: str
    name: str
    blurb: str
    date: str
    """YYYY-MM-DD."""
    credits: tuple[str, ...] = ()


def submission_json(
    about: Author, track: str, logs: Sequence[Log], code_bytes: int, compliance: dict[str, bool]
) -> dict[str, Any]:
    """Return the object of submission.json."""
    first = logs[0]
    values: dict[str, Any] = {**about._asdict(), "track": track}
    values.pop("credits")
    for name, of in _MEANS.items():
        values |= _mean(name, [of(log) for log in logs], spread=name.startswith("val"))
    artifacts = [log.artifact_bytes for log in logs if log.artifact_bytes is not None]
    values |= {
        "seeds": [log.seed for log in logs],
        "seed_results": {str(log.seed): _result(log) for log in logs},
        "bytes_total": max(artifacts) + code_bytes,
        "bytes_code": code_bytes,
        "artifact_bytes_mean": round(statistics.fmean(artifacts)),
        "artifact_bytes_max": max(artifacts),
        "step_stop": first.stop_step,
        "hardware": hardware(first),
        "model_params": first.parameters,
        "tokenizer": f"SentencePiece, {_vocab(first)} pieces, transform {first.transform}",
        "compliance": compliance,
    }
    versions = first.versions or {}
    for name, package in (("pytorch_version", "torch"), ("mlx_version", "mlx")):
        if (first.backend == "mlx") == (package == "mlx") and package in versions:
            values[name] = versions[package]
    return values


_MEANS: dict[str, Callable[[Log], float | None]] = {
    "val_loss": lambda log: log.val_loss, "val_bpb": lambda log: log.val_bpb,
    "pre_quant_val_loss": lambda log: log.weights_val_loss, "pre_quant_val_bpb": lambda log: log.weights_val_bpb,
}  # fmt: skip


def _mean(name: str, found: Sequence[float | None], spread: bool) -> dict[str, float]:
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return {}
    result = {name: round(statistics.fmean(values), DIGITS)}
    if spread and len(values) > 1:
        result[f"{name}_std"] = round(statistics.stdev(values), DIGITS)
    return result


def _result(log: Log) -> dict[str, Any]:
    """Return the figures of one seed; what its records do not hold is left out."""
    figures = {
        "val_loss": log.val_loss, "val_bpb": log.val_bpb, "pre_ttt_val_bpb": log.exported_val_bpb,
        "artifact_bytes": log.artifact_bytes, "steps": log.stop_step, "step_avg_ms": log.step_avg_ms,
        "train_time_s": log.train_seconds, "eval_time_s": log.eval_seconds,
    }  # fmt: skip
    if not (log.val_plugins or log.val_adaptation):
        del figures["pre_ttt_val_bpb"]
    return {name: value for name, value in figures.items() if value is not None}


def hardware(log: Log) -> str:
    """Return what a run was made on, as 8xH100 80GB HBM3."""
    return f"{log.ranks or 1}x{(log.device or 'unknown').removeprefix('NVIDIA ')}"


def _vocab(log: Log) -> object:
    model = (log.settings or {}).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def verdict_of(rule: str, audits: Sequence[dict[str, Any]], seeds: int) -> Verdict:
    """Return the verdict of a rule over the audits: FAIL if one failed, PASS if that of each of `seeds` seeds passed.

    One audit compares the settings of all seeds (D16).
    """
    verdicts = [finding["verdict"] for audit in audits for finding in audit["findings"] if finding["rule"] == rule]
    if "FAIL" in verdicts:
        return "FAIL"
    enough = "PASS" in verdicts if rule == "D16" else len(audits) == seeds and set(verdicts) == {"PASS"}
    return "PASS" if enough else "NOT CHECKED"


def compliance_of(logs: Sequence[Log], audits: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return the keys of `compliance` that some verdict answers; those that none does are left out."""
    answers: dict[str, bool] = {}
    counted = any("counts" in (log.val_plugins or ()) for log in logs)
    denied = {"three_seeds": len(logs) < SEEDS, "no_ngram_cache": counted}
    for key, rule in RULES.items():
        verdict = verdict_of(rule, audits, len(logs))
        if denied.get(key):
            answers[key] = False
        elif verdict != "NOT CHECKED":
            answers[key] = verdict == "PASS"
    return answers
