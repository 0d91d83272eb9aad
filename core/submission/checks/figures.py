"""Checks of figures: everything that submission.json claims, computed again from the logs."""

import re
import statistics
from collections.abc import Callable
from typing import Any

from core.audit.claims import LIMIT, SECONDS
from core.audit.seeds import beats
from core.console import shorten
from core.data.published import BYTES, BYTES_PER_TOKEN, DOCUMENTS, TARGETS, TOLERANCE, compare_published
from core.statistics import StatisticsError
from core.submission.checks.answers import Answer, Checked, agrees, claimed_number
from core.submission.folder import TRACKS, SubmissionFolder
from core.submission.log_values import Log
from core.submission.submission_json import hardware

LN2 = 0.6931471805599453
MEBIBYTES = re.compile(
    r"(?:artifact|submission|budget|limit|model|code|total|size)[^\n]{0,60}?[\d.]{1,20}\s?MiB"
    r"|[\d.]{1,20}\s?MiB[^\n]{0,40}?(?:artifact|limit|budget|cap)\b",
    re.IGNORECASE,
)
"""Sizes of what is sent, in units that make 15.9 of them 16.7 million bytes."""
OF_LOG: dict[str, Callable[[Log], float | int | None]] = {
    "val_bpb": lambda log: log.val_bpb, "val_loss": lambda log: log.val_loss,
    "artifact_bytes": lambda log: log.artifact_bytes, "steps": lambda log: log.stop_step,
    "step_avg_ms": lambda log: log.step_avg_ms, "train_time_s": lambda log: log.train_seconds,
    "eval_time_s": lambda log: log.eval_seconds, "bytes_total": lambda log: _total(log),
    "pre_ttt_val_bpb": lambda log: log.exported_val_bpb,
}  # fmt: skip
"""Field of a seed's results -> what a log says of it."""
OTHER_NAMES = {"total_bytes": "bytes_total", "ms_per_step": "step_avg_ms"}
PUBLIC_RATIOS = {
    62_021_632: (2.43592,), 45_508_608: (3.31968, 3.3197), 45_514_752: (3.31925,), 40_540_160: (3.72663, 3.72675),
    47_851_520: (3.15715, 3.15736), 151_130_112: (0.99967,),
}  # fmt: skip
"""Targets as logs count them -> bytes per token of the published text: that of the score, that of the diagnostics."""
LONGEST_ROW = 32_768
"""Tokens: scripts cut the text to whole rows."""


def check_figures(subject: Checked) -> Answer:
    """Hold every figure of submission.json to the logs."""
    folder, values = subject.folder, subject.folder.submission
    if values is None or not folder.logs:
        what = "submission.json" if values is None else "log"
        return Answer("", unchecked=f"there is no {what} that can be read")
    problems = [problem for log in folder.logs for problem in log.problems]
    notes: dict[str, None] = {}
    logs, compared = {log.seed: log for log in folder.logs}, 0
    for seed, claim in folder.claimed.items():
        if seed not in logs:
            problems.append(f"seed {seed}: no log")
            continue
        for name, value in claim.items():
            spelled = OTHER_NAMES.get(name, name)
            if spelled in OF_LOG and (claimed := claimed_number(value)) is not None:
                compared += 1
                problems += _hold(f"seed {seed}: {name}", spelled, claimed, logs[seed], notes)
    problems += [*_means(values, folder), *_spreads(values, folder), *_totals(values, folder)]
    problems += [*_over_seeds(values, folder), *_made_on(values, folder)]
    if not compared:
        notes["no figure of a seed is claimed"] = None
    spare = [log.name for log in folder.spare if log.val_bpb is not None]
    if spare:
        notes[f"more logs than seeds: {', '.join(spare[:5])}; say in the README what they are"] = None
    seen = f"{compared} figures of {len(folder.claimed)} seeds compared with {len(folder.logs)} logs"
    return Answer("; ".join([seen, *notes]), problems)


def _hold(what: str, name: str, claimed: float, log: Log, notes: dict[str, None]) -> list[str]:
    """Return what is wrong with a claimed figure of one seed."""
    found = OF_LOG[name](log)
    if found is None:
        notes[f"{log.name} does not say {name}"] = None
        return []
    if agrees(claimed, found, at_least=4 if "val_" in name else 0):
        return []
    if name == "artifact_bytes" and claimed == log.total_bytes:
        notes["artifact_bytes are totals with the code, expected the artifact alone"] = None
        return []
    return [f"{what} {claimed:.10g}, {log.name} says {found:.10g}"]


def _means(values: dict[str, Any], folder: SubmissionFolder) -> list[str]:
    """Return which means over the seeds are not those of the logs."""
    problems = []
    before: dict[str, Callable[[Log], float | None]] = {
        "pre_quant_val_bpb": lambda log: log.weights_val_bpb, "pre_quant_val_loss": lambda log: log.weights_val_loss,
    }  # fmt: skip
    for name, of in {**{n: OF_LOG[n] for n in ("val_bpb", "val_loss")}, **before}.items():
        claimed, found = claimed_number(values.get(name)), [of(log) for log in folder.logs]
        if claimed is None or None in found:
            continue
        mean = statistics.fmean(value for value in found if value is not None)
        if not agrees(claimed, mean, at_least=4):
            of_best = [value for value in found if value is not None and agrees(claimed, value, at_least=4)]
            hint = ", which is one seed's alone" if of_best and len(found) > 1 else ""
            problems.append(f"{name} {claimed:.10g}{hint}, the mean of {len(found)} logs is {mean:.8f}")
    return problems


def _spreads(values: dict[str, Any], folder: SubmissionFolder) -> list[str]:
    problems = []
    for name in ("val_bpb", "val_loss"):
        claimed, found = claimed_number(values.get(f"{name}_std")), [OF_LOG[name](log) for log in folder.logs]
        known = [value for value in found if value is not None]
        if claimed is None or len(known) < len(found) or len(known) < 2:
            continue
        sample, all_there_is = statistics.stdev(known), statistics.pstdev(known)
        if not agrees(claimed, sample, at_least=3):
            hint = ", which divides by n" if agrees(claimed, all_there_is, at_least=4) else ""
            problems.append(f"{name}_std {claimed:.10g}{hint}, that of the logs (n - 1) is {sample:.8f}")
    return problems


def _totals(values: dict[str, Any], folder: SubmissionFolder) -> list[str]:
    """Return whether bytes_total is not the largest artifact with the code, as claimed and as logged."""
    claimed, code = claimed_number(values.get("bytes_total")), claimed_number(values.get("bytes_code"))
    if claimed is None:
        return []
    logged = [total for log in folder.logs if (total := _total(log)) is not None]
    artifacts = [log.artifact_bytes for log in folder.logs if log.artifact_bytes is not None]
    wanted = {max(logged)} if len(logged) == len(folder.logs) else set()
    wanted |= {max(artifacts) + int(code)} if code is not None and len(artifacts) == len(folder.logs) else set()
    if not wanted or int(claimed) in wanted:
        return []
    return [f"bytes_total {claimed:,.0f}, by the logs {' or '.join(f'{total:,}' for total in sorted(wanted))}"]


def _over_seeds(values: dict[str, Any], folder: SubmissionFolder) -> list[str]:
    """Return which other figures over the seeds are not those of the logs; sizes may be those with the code."""
    sizes = [[log.artifact_bytes for log in folder.logs], [_total(log) for log in folder.logs]]
    whole = [[size for size in found if size is not None] for found in sizes if None not in found]
    steps = [log.stop_step for log in folder.logs if log.stop_step is not None]
    allowed: dict[str, list[float]] = {
        "artifact_bytes_max": [max(found) for found in whole],
        "artifact_bytes_mean": [statistics.fmean(found) for found in whole],
        "step_stop": [*steps, statistics.fmean(steps)] if len(steps) == len(folder.logs) else [],
    }
    problems = []
    for name, wanted in allowed.items():
        claimed, near = claimed_number(values.get(name)), 1.0 if name.endswith("mean") else 0.5
        if claimed is not None and wanted and not any(abs(claimed - value) <= near for value in wanted):
            problems.append(f"{name} {claimed:.10g}, by the logs {' or '.join(f'{value:.10g}' for value in wanted)}")
    return problems


def _made_on(values: dict[str, Any], folder: SubmissionFolder) -> list[str]:
    """Return in what hardware and versions are not those of the logs; public logs say neither."""
    said: dict[str, Callable[[Log], Any]] = {
        "hardware": lambda log: log.device and hardware(log),
        "pytorch_version": lambda log: (log.versions or {}).get("torch"),
        "mlx_version": lambda log: (log.versions or {}).get("mlx"),
    }
    return [
        f"{name} {shorten(str(values[name])[:100], 60)!r}, {log.name} says {shorten(str(found)[:100], 60)!r}"
        for name, of in said.items()
        for log in folder.logs
        if values.get(name) is not None and (found := of(log)) not in (None, "", values[name])
    ]


def _total(log: Log) -> int | None:
    """Return the bytes of artifact and code by a log."""
    if log.total_bytes is not None or log.artifact_bytes is None or log.code_bytes is None:
        return log.total_bytes
    return log.artifact_bytes + log.code_bytes


def check_totals(subject: Checked) -> Answer:
    """Judge that artifact and code of each seed are within the limit, in bytes of a million to the MB."""
    folder = subject.folder
    code = claimed_number((folder.submission or {}).get("bytes_code"))
    shipped = len(folder.program or b"")
    problems, totals = [], {}
    for log in folder.logs:
        total = _total(log)
        if folder.ours and log.artifact_bytes is not None:  # what is shipped counts, whatever a log says of it
            total = max(total or 0, log.artifact_bytes + max(shipped, int(code or 0)))
        if total is not None:
            totals[log.seed] = total
    for seed, claim in folder.claimed.items():
        artifact = claimed_number(claim.get("artifact_bytes"))
        if artifact is not None:
            totals[seed] = max(totals.get(seed, 0), int(artifact))
    problems += [f"seed {seed}: {total:,} bytes, over {LIMIT:,}" for seed, total in totals.items() if total > LIMIT]
    for name, text in (
        ("README.md", folder.readme or ""),
        ("submission.json", str((folder.submission or {}).values())),
    ):
        if match := MEBIBYTES.search(text):
            problems.append(f"{name}: {match[0][-60:]!r} is in MiB: the limit is {LIMIT:,} bytes, 15.26 MiB")
    missing = [log.name for log in folder.logs if log.seed not in totals]
    unchecked = "no log says a size" if not totals else f"no size in {', '.join(missing)}" if missing else ""
    return Answer(f"largest total {max(totals.values(), default=0):,} of {LIMIT:,} bytes", problems, unchecked)


def check_times(subject: Checked) -> Answer:
    """Judge training with its calibration, and evaluation by the timer and strictly, against 600 s."""
    folder, record = subject.folder, subject.folder.track == TRACKS[0]
    problems, seen, silent = [], [], []
    for log in folder.logs:
        step = (log.step_avg_ms or 0.0) / 1000  # the one in which the time ran out
        trained = max(log.train_seconds or 0.0, log.closed_seconds or 0.0)
        evaluated = max(log.eval_seconds or 0.0, log.eval_strict_seconds or 0.0)
        seen.append(f"{log.name} {trained:.1f} s and {evaluated:.1f} s")
        if log.train_seconds is None or log.eval_seconds is None:
            silent.append(log.name)
        late = "calibration" if (log.closed_seconds or 0.0) > (log.train_seconds or 0.0) + step else "training"
        if trained > SECONDS + step:
            problems.append(f"{log.name}: {late} ended at {trained:.1f} s, over {SECONDS:.0f} s")
        if evaluated > SECONDS:
            how = "" if (log.eval_seconds or 0.0) > SECONDS else " strictly, reading and compiling included"
            problems.append(f"{log.name}: evaluation took {evaluated:.1f} s{how}, over {SECONDS:.0f} s")
        if record and log.device is not None and not (log.ranks == 8 and "H100" in log.device):
            problems.append(f"{log.name}: ran on {log.ranks} x {log.device}, the track's times are of 8 H100")
    evidence = f"training with calibration, and evaluation: {', '.join(seen)}"
    if not record:
        return Answer("; ".join([*problems, evidence]), unchecked=f"track {folder.track} has no limit of time")
    lacking = f"no time of training or evaluation in {', '.join(silent)}" if silent else ""
    return Answer(evidence, problems, lacking if folder.logs else "no log")


def check_text(subject: Checked) -> Answer:
    """Hold what was scored to the published validation text: documents, targets, bytes per token."""
    problems, known, unknown = [], [], []
    for log in subject.folder.logs:
        if log.skc_log is not None:
            problems += _of_our_log(log, known, unknown)
        elif log.val_loss and log.val_bpb and log.val_tokens:
            ratio = log.val_loss / LN2 / log.val_bpb
            near = [known for known in PUBLIC_RATIOS if 0 <= known - log.val_tokens <= LONGEST_ROW]
            ratios = PUBLIC_RATIOS[near[0]] if near else None
            words = f"{log.name}: {log.val_tokens:,} targets, {ratio:.5f} bytes per token"
            if ratios is None:
                problems.append(f"{words}: no published text has so many targets")
            elif not any(abs(ratio - value) <= TOLERANCE for value in ratios):
                problems.append(f"{words}, published {' or '.join(map(str, ratios))}")
            else:
                known.append(words)
        else:
            unknown.append(f"{log.name} does not say its score and targets")
    return Answer("; ".join(known), problems, "; ".join(unknown) or ("" if known or problems else "no log"))


def _of_our_log(log: Log, known: list[str], unknown: list[str]) -> list[str]:
    if None in (log.val_targets, log.val_bytes, log.val_documents, log.val_loss, log.val_bpb) or not log.val_bytes:
        unknown.append(f"{log.name} does not say what it scored")
        return []
    targets, size, loss, bpb = log.val_targets or 1, log.val_bytes, log.val_loss or 0.0, log.val_bpb or 0.0
    problems = []
    if abs(loss / LN2 * targets / size - bpb) > 1e-5:
        problems.append(f"{log.name}: val_loss {loss:.8f} over {size:,} bytes is not val_bpb {bpb:.8f}")
    if not log.val_full:
        return [*problems, f"{log.name}: an estimate of {log.val_documents:,} documents, expected every document"]
    model = (log.settings or {}).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    kind: Any = log.transform or "none"
    key = (vocab if type(vocab) is int else 0, kind)
    result = compare_published(key[0], log.val_documents or 0, targets + 1, size, kind)
    words = f"{log.name}: {log.val_documents:,} documents, {targets:,} targets, {size / targets:.5f} bytes per token"
    if result["differs"] and (key in TARGETS or log.val_documents == DOCUMENTS):
        return [*problems, f"{words}: not the published text: {'; '.join(result['differs'])}"]
    if result["same"]:
        known.append(words)
    else:
        unknown.append(f"{words}: of a text or a vocabulary that was never published")
    return problems


def check_operators(subject: Checked) -> Answer:
    """Judge that case operators cost no bytes: the counted bytes are those of the text."""
    folder = subject.folder
    logs = [log for log in folder.logs if log.transform == "caseops" or log.val_tokens == 47_851_520]
    if not logs:
        named = [entry.name for entry in folder.entries if "caseops" in entry.name.lower()]
        if named:
            return Answer("", unchecked=f"{named[0]}: no log says how many tokens were scored")
        return Answer("no case operators in the text", unchecked="" if folder.logs else "no log")
    problems, low, high = [], *BYTES
    for log in logs:
        size = log.val_bytes
        if size is None and log.val_loss and log.val_bpb and log.val_tokens:
            size = round(log.val_loss / LN2 / log.val_bpb * log.val_tokens)
        if size is None or not low - 12_000 <= size <= high + 12_000:  # scores with 8 digits, cut to whole rows
            shown = "no bytes" if size is None else f"{size:,} bytes"
            problems.append(f"{log.name}: {shown}, the text has {low:,} to {high:,}: are operators charged?")
    ratio = BYTES_PER_TOKEN[(8192, "caseops")][0]
    audited = _audited_bytes(folder)
    seen = f"{len(logs)} logs with case operators, {ratio} bytes per token published"
    if audited:
        return Answer(f"{seen}; {audited}", problems)
    lacking = "the bytes fit the published text; a count token by token takes its shards: skc audit, D13"
    return Answer(seen, problems, lacking)


def _audited_bytes(folder: SubmissionFolder) -> str:
    """Return the passed finding of an audit that counted the bytes of every token, or an empty text."""
    audits = (folder.audit or {}).get("audits")
    for audit in audits.values() if isinstance(audits, dict) else ():
        findings = audit.get("findings") if isinstance(audit, dict) else None
        for finding in findings if isinstance(findings, list) else ():
            if isinstance(finding, dict) and finding.get("rule") == "D13" and finding.get("verdict") == "PASS":
                return f"audit: {str(finding.get('evidence'))[:300]}"
    return ""


def check_against(subject: Checked) -> Answer:
    """Judge by Welch's test whether the seeds are below the reference by 0.005 nats, at p < 0.01."""
    folder, reference = subject.folder, subject.reference
    if reference is None:
        return Answer("", unchecked="give the reference's scores with --against FILE")
    losses = {f"seed {log.seed}": log.val_loss for log in folder.logs}
    ours = {name: loss for name, loss in losses.items() if loss is not None}
    first = next((log for log in folder.logs if log.val_loss and log.val_bpb), None)
    if first is None or len(ours) < len(losses):
        return Answer("", unchecked="not every log says val_loss and val_bpb")
    per_bit = 1.0 if subject.unit == "loss" else (first.val_loss or 0.0) / (first.val_bpb or 1.0)
    try:
        finding = beats(ours, [value * per_bit for value in reference.values()])
    except StatisticsError as error:
        return Answer("", [str(error)])
    unchecked = finding.evidence if finding.verdict == "NOT CHECKED" else ""
    problems = [finding.evidence] if finding.verdict == "FAIL" else []
    return Answer("" if unchecked or problems else finding.evidence, problems, unchecked)
